"""Small weights in the layout of SoftVQ-VAE and MAETok (Hhhhhhao/continuous_tokenizer): ViTs of DINOv2's form."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH, HEADS, DEPTH, GRID, PATCH, TOKENS, CHANNELS, CODES = 48, 4, 2, 3, 4, 6, 5, 11


def soft_weights(
    soft: bool,
    rope: bool = False,
    registers: int = 0,
    decoder_class_token: bool = True,
    scale: bool = True,
    movq: bool = False,
    placed_prefix: bool = True,
    width: int = WIDTH,
    tokens: int = TOKENS,
    channels: int = CHANNELS,
) -> dict[str, Tensor]:
    """A SoftVQ-VAE's (``soft``) or a MAETok's state dict, as their code saves it, of random numbers.

    ``placed_prefix``: whether the class token and the registers have positions; ``movq``: the decoder's LayerNorms have no
    weights, and the latents modulate them.
    """
    torch.manual_seed(0)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape)

    state: dict[str, Tensor] = {}
    for side in ("encoder", "decoder"):
        has_class = side == "encoder" or decoder_class_token
        prefix = has_class + registers
        state[f"{side}.model.pos_embed"] = normal(1, GRID**2 + prefix * placed_prefix, width)
        modulated = movq and side == "decoder"
        if has_class:
            state[f"{side}.model.cls_token"] = normal(1, 1, width)
        if registers:
            state[f"{side}.model.reg_token"] = normal(1, registers, width)
        state[f"{side}.model.patch_embed.proj.weight"] = normal(width, 3, PATCH, PATCH, size=0.2)
        state[f"{side}.model.patch_embed.proj.bias"] = normal(width)
        for index in range(DEPTH):
            block = f"{side}.model.blocks.{index}"
            if modulated:
                state[f"{block}.adaLN_modulation.1.weight"] = normal(4 * width, channels, size=channels**-0.5)
                state[f"{block}.adaLN_modulation.1.bias"] = normal(4 * width)
            for norm in () if modulated else ("norm1", "norm2"):
                state[f"{block}.{norm}.weight"], state[f"{block}.{norm}.bias"] = (
                    1 + normal(width, size=0.1),
                    normal(width, size=0.1),
                )
            for name, shape in (
                ("attn.qkv", (3 * width, width)),
                ("attn.proj", (width, width)),
                ("mlp.fc1", (4 * width, width)),
                ("mlp.fc2", (width, 4 * width)),
            ):
                state[f"{block}.{name}.weight"] = normal(*shape, size=shape[1] ** -0.5)
                state[f"{block}.{name}.bias"] = normal(shape[0], size=0.1)
            if scale and not modulated:
                state[f"{block}.ls1.gamma"], state[f"{block}.ls2.gamma"] = normal(width), normal(width)
        if modulated:
            state[f"{side}.model.norm.adaLN_modulation.1.weight"] = normal(2 * width, channels)
            state[f"{side}.model.norm.adaLN_modulation.1.bias"] = normal(2 * width)
        else:
            state[f"{side}.model.norm.weight"] = 1 + normal(width, size=0.1)
            state[f"{side}.model.norm.bias"] = normal(width, size=0.1)
        state[f"{side}.latent_pos_embed"] = normal(1, tokens, width)
        if rope:
            state[f"{side}.freqs"] = normal(2, DEPTH, width // 2)
            state[f"{side}.freqs_t_x"] = torch.arange(GRID**2) % GRID
    state["encoder.latent_tokens"], state["decoder.mask_token"] = normal(1, tokens, width), normal(1, 1, width)
    state["decoder.to_pixel.model.weight"] = normal(3 * PATCH**2, width, size=0.05)
    state["decoder.to_pixel.model.bias"] = normal(3 * PATCH**2, size=0.6)  # pictures beyond [-1, 1]
    state["quant_conv.weight"], state["quant_conv.bias"] = normal(channels, width, size=width**-0.5), normal(channels)
    state["post_quant_conv.weight"], state["post_quant_conv.bias"] = normal(width, channels), normal(width)
    if soft:
        state["quantize.embedding"] = normal(2, CODES, channels)
        state["quantize.codebook_used"] = torch.zeros(2, 65536)
    state["repa_model.norm.weight"] = torch.ones(3)
    return state
