"""SoftVQ-VAE and MAETok (Hhhhhhao/continuous_tokenizer; arXiv 2412.10958 and 2502.03444) as a TexTok without text.

Their two sides are ViTs of DINOv2's form: a class token and registers, LayerScale, which goes into the weights before it, and
LayerNorms with eps 1e-6. The encoder's patches have absolute positions, the decoder's queries absolute or rotary ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from textok_fast.errors import InputError
from textok_fast.interop.dit import published_heads
from textok_fast.interop.vit import config_of, load_texttok, pixel_rows
from textok_fast.modeling.tokenizer import TexTok

_PUBLISHED = {192: 3, 384: 6, 768: 12, 1024: 16, 1536: 24}  # of DINOv2's sizes
# What training keeps beside the tokenizer: auxiliary decoders, the encoder they imitate, masks, heads that are never called.
TRAINING_ONLY = (
    *("repa_model.", "projection.", "decoder_hog.", "decoder_dino.", "decoder_clip.", "decoder_supcls.", "post_quant_conv_"),
    *("to_pixel_", "hog_generator.", "de_scale.", "scale.", "clip_model.", "encoder.mask_token", "encoder.model.head."),
    *(
        "encoder.model.fc_norm.",
        "decoder.model.head.",
        "decoder.model.fc_norm.",
        "decoder.model.patch_embed.",
        "quantize.codebook_used",
    ),
    *("encoder.freqs_t_", "decoder.freqs_t_"),
)
_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def convert_softvq(
    state: dict[str, Tensor],
    about: dict[str, Any] | None = None,
    heads: int | None = None,
    temperature: float = 0.07,
    patch_size: int | None = None,
) -> TexTok:
    """A :class:`TexTok` in eval mode from the state dict of a SoftVQ-VAE (with ``quantize.embedding``) or a MAETok (without).

    Args:
        about: its config.json: ``vq_mean`` and ``vq_std``, by which its generators' tokens are normalised.
        heads: attention heads on both sides; None for the published number at each side's width.
        temperature: of the assignment to codes, of SoftVQ-VAE.
        patch_size: of the decoder; None is the encoder's.

    Raises: InputError naming a missing, unexpected or misshapen key, and for a decoder that is modulated by its latents (MoVQ).
    """
    state = {key: value for key, value in state.items() if not key.startswith(TRAINING_ONLY)}
    if any("adaLN_modulation" in key for key in state):
        raise InputError("this tokenizer's decoder is modulated by its latents in every block (MoVQ), which a TexTok cannot be")
    take = state.pop
    try:
        latents = take("encoder.latent_tokens")[0] + take("encoder.latent_pos_embed")[0]  # (N, D)
        embed = take("encoder.model.patch_embed.proj.weight")  # (D, 3, p, p)
        outputs, p = state["decoder.to_pixel.model.weight"].shape[0], embed.shape[-1]
        if outputs != 3 * p * p:
            raise InputError(
                f"the decoder makes {outputs} numbers a patch, wanted 3 x {p} x {p} = {3 * p * p}: its patches are others"
            )
        taken: dict[str, Tensor] = {}
        sizes, registers, ropes = [], [], []
        for side in ("encoder", "decoder"):
            width, depth = _take_blocks(state, side, taken)
            prefix = [take(f"{side}.model.{name}")[0] for name in ("cls_token", "reg_token") if f"{side}.model.{name}" in state]
            registers.append(torch.cat(prefix) if prefix else embed.new_zeros(0, width))  # (R, D)
            ropes.append(f"{side}.freqs" in state)
            if ropes[-1]:
                taken[f"{side}.rope.frequencies"] = take(f"{side}.freqs")  # (2, depth, H D / 2)
            sizes.append((width, depth, heads or _PUBLISHED.get(width) or published_heads(width)))
        if ropes[0] != ropes[1]:
            raise InputError("one side has rotary positions and the other has none")
        places, own = take("encoder.model.pos_embed")[0], len(registers[0])  # (R + hw, D)
        grid = round((len(places) - own) ** 0.5)
        taken["encoder.patch_positions"] = places[own:]
        taken["encoder.latents"] = torch.cat([latents, registers[0] + places[:own]])
        taken["encoder.patch_embed.weight"], taken["encoder.patch_embed.bias"] = (
            embed.flatten(1),
            take("encoder.model.patch_embed.proj.bias"),
        )
        taken["encoder.to_latents.weight"], taken["encoder.to_latents.bias"] = (
            take("quant_conv.weight"),
            take("quant_conv.bias"),
        )
        places, own = take("decoder.model.pos_embed")[0], len(registers[1])
        mask = take("decoder.mask_token")[0]  # (1, D)
        if ropes[1]:  # in place of absolute positions
            taken["decoder.queries"] = torch.cat([mask.expand(grid * grid, -1), registers[1]])
        else:
            taken["decoder.queries"] = torch.cat([mask + places[own:], registers[1] + places[:own]])
        taken["decoder.latent_positions"] = take("decoder.latent_pos_embed")[0]
        taken["decoder.from_latents.weight"] = take("post_quant_conv.weight")
        taken["decoder.from_latents.bias"] = take("post_quant_conv.bias")
        taken["decoder.to_pixels.weight"] = pixel_rows(take("decoder.to_pixel.model.weight"), p)
        taken["decoder.to_pixels.bias"] = pixel_rows(take("decoder.to_pixel.model.bias"), p)
        channels = taken["decoder.from_latents.weight"].shape[1]
        options: dict[str, Any] = {
            "image_size": grid * p,
            "patch_size": p,
            "num_tokens": len(latents),
            "latent_dim": channels,
            "text": "none",
            "registers": len(registers[0]),
            "decoder_registers": len(registers[1]),
            "norm_eps": 1e-6,
            "rope": ropes[0],
        }
        if "quantize.embedding" in state:
            codebook = taken["bottleneck.codebook"] = take("quantize.embedding")  # (C, K, d)
            options |= {"bottleneck": "softvq", "soft_codebooks": len(codebook), "codebook_size": codebook.shape[1]}
            options["soft_temperature"] = temperature
    except KeyError as error:
        raise InputError(f"this is not a SoftVQ-VAE or MAETok state dict: {error.args[0]} is missing") from None
    except InputError:
        raise
    except (ValueError, IndexError, RuntimeError) as error:
        raise InputError(f"this is not a SoftVQ-VAE or MAETok state dict: {error}") from None
    if state:
        raise InputError(f"unexpected {', '.join(list(state)[:3])} in the weights of a SoftVQ-VAE or MAETok")
    about = about.get("config", about) if about else {}
    if isinstance(about, dict) and (about.get("vq_mean", 0.0), about.get("vq_std", 1.0)) != (0.0, 1.0):
        options["latent_mean"] = (float(about.get("vq_mean", 0.0)),) * channels
        options["latent_std"] = (float(about.get("vq_std", 1.0)),) * channels
    return load_texttok(config_of(sizes[0], sizes[1], options), taken)


def _take_blocks(state: dict[str, Tensor], side: str, taken: dict[str, Tensor]) -> tuple[int, int]:
    """Moves the blocks of a side from ``state`` to ``taken`` by our names; returns width and depth."""
    place = f"{side}.model.blocks."
    width = len(state[f"{place}0.norm1.weight"])
    depth = 1 + max(int(key.split(".")[3]) for key in state if key.startswith(place))
    for index in range(depth):
        for layer in _BLOCK:
            for name in ("weight", "bias"):
                taken[f"{side}.blocks.{index}.{layer}.{name}"] = state.pop(f"{place}{index}.{layer}.{name}")
        # gamma (W x + b) = (gamma W) x + gamma b
        for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            if (gamma := state.pop(f"{place}{index}.{scale}.gamma", None)) is not None:
                taken[f"{side}.blocks.{index}.{layer}.weight"] = (
                    gamma.unsqueeze(1) * taken[f"{side}.blocks.{index}.{layer}.weight"]
                )
                taken[f"{side}.blocks.{index}.{layer}.bias"] = gamma * taken[f"{side}.blocks.{index}.{layer}.bias"]
    for name in ("weight", "bias"):
        taken[f"{side}.norm.{name}"] = state.pop(f"{side}.model.norm.{name}")
    return width, depth


class ContinuousTokenizer(nn.Module):
    """A tokenizer with the calls of SoftVQ-VAE and MAETok: pictures (B, 3, S, S) in [-1, 1], latents (B, N, C) as their code
    has them, before the normalisation by ``vq_mean`` and ``vq_std``.

    Args:
        tokenizer: a :class:`TexTok`, or an engine of one.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.num_latent_tokens, self.codebook_embed_dim = tokenizer.config.num_tokens, tokenizer.config.latent_dim

    def encode(self, x: Tensor) -> tuple[Tensor, None, None]:
        """x (B, 3, S, S) -> latents (B, N, C), and None for the losses and the statistics that training has."""
        tokens = self.tokenizer.encode(x).as_subclass(Tensor)
        core = self.tokenizer if isinstance(self.tokenizer, TexTok) else self.tokenizer.model
        return core.denormalize(tokens), None, None

    def decode(self, quant: Tensor) -> Tensor:
        """latents (B, N, C) -> pictures (B, 3, S, S), clamped to [-1, 1]."""
        core = self.tokenizer if isinstance(self.tokenizer, TexTok) else self.tokenizer.model
        out: Tensor = self.tokenizer.decode(core.normalize(quant.to(self.tokenizer.device, self.tokenizer.dtype)))
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        """:meth:`encode`, then :meth:`decode`: pictures (B, 3, S, S), and None for losses and statistics."""
        quant, losses, info = self.encode(x)
        return self.decode(quant), losses, info
