"""TiTok and TA-TiTok (bytedance/1d-tokenizer; arXiv 2406.07550 and 2501.07730), single-stage, as a TexTok.

A TiTok is a TexTok with text nowhere, a TA-TiTok one with text in the decoder only. Both have a class token (a register here),
a LayerNorm before the first block and a convolution over the decoded picture; their pictures are in [0, 1], which goes into the
first and the last weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from textok_fast.errors import InputError
from textok_fast.interop.dit import published_heads
from textok_fast.interop.layout import Shape, count_blocks, holds, read_sizes, shape_of
from textok_fast.interop.vit import backends_of, config_of, core_of, load_texttok, pixel_rows
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.modeling.tokenizer import TexTok

CLIP = "openai/clip-vit-large-patch14-336"  # whose token features TA-TiTok reads
_PUBLISHED = {512: 8}  # attention heads; the other widths have those of DiT
# Theirs -> ours, in a block.
_BLOCK = {
    "ln_1": "norm1",
    "attn.in_proj": "attn.qkv",
    "attn.out_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TEXT = ("decoder.text_guidance_proj.weight", "decoder.text_guidance_proj.bias", "decoder.text_guidance_positional_embedding")


def convert_titok(
    state: dict[str, Tensor], heads: int | None = None, normalize_codes: bool = True, text_encoder: str = CLIP
) -> TexTok:
    """A :class:`TexTok` in eval mode from the state dict of a TiTok or a TA-TiTok, VQ or KL; sizes are read from the shapes.

    Its null caption is what TA-TiTok makes of features that are all zero: it was trained with captions only.

    Args:
        heads: attention heads; None for the published number at that width, on each side.
        normalize_codes: whether codes are compared by cosine; all published ones are.
        text_encoder: TA-TiTok's: where captions find CLIP's text model, a directory or a Hub id.

    Raises: InputError naming a missing, unexpected or misshapen key, and for a two-stage TiTok, which decodes through a VQGAN.
    """
    if not isinstance(normalize_codes, bool):
        raise InputError(f"normalize_codes is true or false, got {normalize_codes!r}")
    second = next((key for key in state if key == "decoder.ffn.2.weight" or key.startswith("pixel_decoder.")), None)
    if second is not None:
        raise InputError(
            f"this is a two-stage TiTok, whose decoder makes codes of a MaskGIT-VQGAN (it has {second}): only single-stage "
            "ones are taken, such as tokenizer_titok_bl64_vq8k_imagenet and all of TA-TiTok"
        )
    state = {key: value for key, value in state.items() if key != "quantize.embed_prob"}  # how often training used a code
    has_text, has_codes = holds(state, _TEXT), "quantize.embedding.weight" in state
    what = "TA-TiTok" if has_text else "TiTok"
    depths = {side: count_blocks(state, f"{side}.transformer.", _block("D")) for side in ("encoder", "decoder")}
    layout: dict[str, Shape] = {
        "latent_tokens": ("N", "D"),
        "encoder.patch_embed.weight": ("D", 3, "p", "p"),
        "encoder.patch_embed.bias": ("D",),
        "encoder.conv_out.weight": ("O", "D", 1, 1),
        "encoder.conv_out.bias": ("O",),
        "decoder.mask_token": (1, 1, "E"),
        "decoder.decoder_embed.weight": ("E", "C"),
        "decoder.decoder_embed.bias": ("E",),
        "decoder.ffn.0.weight": ("3 p p", "E", 1, 1),
        "decoder.ffn.0.bias": ("3 p p",),
        "decoder.conv_out.weight": (3, 3, 3, 3),
        "decoder.conv_out.bias": (3,),
    }
    for side, width in (("encoder", "D"), ("decoder", "E")):
        layout[f"{side}.class_embedding"] = (1, width)
        layout[f"{side}.positional_embedding"] = ("P", width)
        layout[f"{side}.latent_token_positional_embedding"] = ("N", width)
        layout |= {f"{side}.{norm}.{name}": (width,) for norm in ("ln_pre", "ln_post") for name in ("weight", "bias")}
        for index in range(depths[side]):
            layout |= {f"{side}.transformer.{index}.{name}": shape for name, shape in _block(width).items()}
    if has_text:
        layout |= dict(zip(_TEXT, (("E", "T"), ("E",), ("L", "E")), strict=True))
    if has_codes:
        layout["quantize.embedding.weight"] = ("K", "C")
    sizes = read_sizes(state, layout, what)
    channels, p, grid = sizes["C"], sizes["p"], math.isqrt(sizes["P"] - 1)
    if sizes["O"] != (channels if has_codes else 2 * channels):
        lacking = " (or quantize.embedding.weight is missing)" if sizes["O"] == channels else ""
        raise InputError(
            f"these are not the weights of a {what}: {shape_of(state, 'encoder.conv_out.weight')} makes {sizes['O']} channels, "
            f"wanted {channels if has_codes else 2 * channels} for the {channels} that "
            f"{shape_of(state, 'decoder.decoder_embed.weight')} takes{lacking}"
        )
    if grid * grid != sizes["P"] - 1 or not grid:
        raise InputError(
            f"these are not the weights of a {what}: {shape_of(state, 'encoder.positional_embedding')} and "
            f"{shape_of(state, 'decoder.positional_embedding')}: wanted 1 row for the class token and a square number of them "
            "for the patches"
        )
    options: dict[str, Any] = {
        "image_size": grid * p,
        "patch_size": p,
        "num_tokens": sizes["N"],
        "latent_dim": channels,
        "bottleneck": "vq" if has_codes else "kl",
        "text": "decoder" if has_text else "none",
        "registers": 1,
        "decoder_registers": 1,
        "pre_norm": True,
        "pixel_conv": True,
    }
    embed = state["encoder.patch_embed.weight"].flatten(1)  # (D, 3 p p)
    places, register = state["encoder.positional_embedding"], state["encoder.class_embedding"]
    latents = state["latent_tokens"] + state["encoder.latent_token_positional_embedding"]
    decoder_places, decoder_register = state["decoder.positional_embedding"], state["decoder.class_embedding"]
    taken = {
        "encoder.patch_embed.weight": embed / 2,  # their x in [0, 1] is (x + 1) / 2 of ours
        "encoder.patch_embed.bias": state["encoder.patch_embed.bias"] + embed.sum(1) / 2,
        "encoder.patch_positions": places[1:],
        "encoder.latents": torch.cat([latents, register + places[:1]]),
        "encoder.to_latents.weight": state["encoder.conv_out.weight"].flatten(1),
        "encoder.to_latents.bias": state["encoder.conv_out.bias"],
        "decoder.queries": torch.cat(
            [state["decoder.mask_token"][0] + decoder_places[1:], decoder_register + decoder_places[:1]]
        ),
        "decoder.from_latents.weight": state["decoder.decoder_embed.weight"],
        "decoder.from_latents.bias": state["decoder.decoder_embed.bias"],
        "decoder.latent_positions": state["decoder.latent_token_positional_embedding"],
        "decoder.to_pixels.weight": pixel_rows(state["decoder.ffn.0.weight"].flatten(1), p),
        "decoder.to_pixels.bias": pixel_rows(state["decoder.ffn.0.bias"], p),
        "decoder.conv_out.weight": 2 * state["decoder.conv_out.weight"],  # to [-1, 1]
        "decoder.conv_out.bias": 2 * state["decoder.conv_out.bias"] - 1,
    }
    for side, depth in depths.items():
        for name in ("weight", "bias"):
            taken[f"{side}.pre_norm.{name}"] = state[f"{side}.ln_pre.{name}"]
            taken[f"{side}.norm.{name}"] = state[f"{side}.ln_post.{name}"]
            for index in range(depth):
                for theirs, ours in _BLOCK.items():
                    separator = "_" if theirs == "attn.in_proj" else "."
                    key = f"{side}.transformer.{index}.{theirs}{separator}{name}"
                    taken[f"{side}.blocks.{index}.{ours}.{name}"] = state[key]
    if has_text:
        weight, bias, positions = (state[key] for key in _TEXT)
        taken |= {"decoder.text.proj.weight": weight, "decoder.text.proj.bias": bias, "decoder.text.positions": positions}
        taken["decoder.text.null"] = bias + positions[0]
        options |= {"text_positions": True, "text_window": True, "max_text_tokens": sizes["L"], "text_dim": sizes["T"]}
        options["text_encoder"] = str(text_encoder)
    if has_codes:
        taken["bottleneck.codebook"] = state["quantize.embedding.weight"]
        options |= {"codebook_size": sizes["K"], "normalize_codes": normalize_codes}
    encoder, decoder = (
        (width, depths[side], published_heads(width, heads, _PUBLISHED))
        for side, width in (("encoder", sizes["D"]), ("decoder", sizes["E"]))
    )
    return load_texttok(config_of(encoder, decoder, options), taken)


def _block(width: str) -> dict[str, Shape]:
    """The tensors of a block by their names."""
    return {
        **{f"{norm}.{name}": (width,) for norm in ("ln_1", "ln_2") for name in ("weight", "bias")},
        "attn.in_proj_weight": (f"3 {width}", width),
        "attn.in_proj_bias": (f"3 {width}",),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (f"4 {width}", width),
        "mlp.c_fc.bias": (f"4 {width}",),
        "mlp.c_proj.weight": (width, f"4 {width}"),
        "mlp.c_proj.bias": (width,),
    }


# -- called as the peer is -----------------------------------------------------------------------------------------------------


class Posterior(NamedTuple):
    """What a continuous TiTok's ``encode`` returns beside a sample: mean and log-variance, each (B, C, 1, N); without KL the
    log-variance is -inf."""

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, 1, N), drawn on the generator's device, else on the mean's."""
        place = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=place, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)


class TiTok(nn.Module):
    """A tokenizer with TiTok's and TA-TiTok's calls: pictures (B, 3, S, S) in [0, 1], latents (B, C, 1, N), indices (B, 1, N).

    ``quantize_mode`` is "vq" for those with indices (VQ, FSQ), "vae" for the others.

    Args:
        tokenizer: a :class:`TexTok`, or an engine of one.
    """

    picture_range = "unit"  # as TexTokImageProcessor calls [0, 1]

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.quantize_mode = "vq" if tokenizer.config.bottleneck in ("vq", "fsq") else "vae"
        self.num_latent_tokens = tokenizer.config.num_tokens

    def around(self, tokenizer: Any) -> TiTok:
        """The same calls around another tokenizer, such as an engine of this one's."""
        return TiTok(tokenizer)

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        text_guidance: Tensor | Sequence[str] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | Posterior]:
        """x (B, 3, S, S) in [0, 1] -> z_quantized (B, C, 1, N), and for VQ and FSQ ``min_encoding_indices`` (B, 1, N) with the
        loss terms, else the :class:`Posterior` of which z_quantized is a sample.

        ``text_guidance``: as of :meth:`decode`, for a TexTok that reads captions in its encoder, which TiTok's do not; None is
        the null caption. Raises: InputError for another shape, range or dtype, and for unwanted text.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise InputError(f"TiTok takes float pictures (B, 3, S, S) in [0, 1], got {getattr(x, 'dtype', type(x).__name__)}")
        core, place = core_of(self.tokenizer), self.tokenizer.device
        pixels = core._check_images(2 * x - 1)
        if text_guidance is not None and not self.tokenizer.config.text_in_encoder:
            raise InputError("this tokenizer encodes without text: leave text_guidance out")
        text = core.text_features(text_guidance, len(pixels))
        with backends_of(self.tokenizer):
            z = core.encoder(pixels.to(place), text)  # (B, N, C or 2 C)
            out = core.bottleneck(z)
        if out.mean is not None and out.logvar is not None:
            posterior = Posterior(_fake_2d(out.mean), _fake_2d(out.logvar))
            return posterior.sample(generator), posterior
        if out.indices is None:
            mean = _fake_2d(out.latents)
            return mean, Posterior(mean, torch.full_like(mean, -math.inf))
        none = out.latents.new_zeros(())  # of FSQ, whose codes are not learned
        commitment = 0.25 * out.losses.get("commitment", none)
        losses = {"commitment_loss": commitment, "codebook_loss": out.losses.get("codebook", none)}
        losses["quantizer_loss"] = commitment + losses["codebook_loss"]
        return _fake_2d(out.latents), {**losses, "min_encoding_indices": out.indices.unsqueeze(1)}

    @torch.no_grad()
    def decode(self, z_quantized: Tensor, text_guidance: Tensor | Sequence[str] | None = None) -> Tensor:
        """z_quantized (B, C, 1, N) -> pictures (B, 3, S, S), not clamped to [0, 1].

        ``text_guidance``: CLIP's token features (B, N_t, D_t), as TA-TiTok takes them: all of them count, padding too. Or
        captions, whose features the tokenizer's text encoder makes so.
        Raises: InputError for another shape, and where text is lacking or unwanted, and for captions without a text encoder.
        """
        core, config = core_of(self.tokenizer), self.tokenizer.config
        wanted = (config.latent_dim, 1, config.num_tokens)
        if not isinstance(z_quantized, Tensor) or not z_quantized.is_floating_point():
            got = getattr(z_quantized, "dtype", type(z_quantized).__name__)
            raise InputError(f"latents must be a float tensor (B, {', '.join(map(str, wanted))}), got {got}")
        if z_quantized.ndim != 4 or tuple(z_quantized.shape[1:]) != wanted:
            raise InputError(f"latents must be (B, {', '.join(map(str, wanted))}), got {tuple(z_quantized.shape)}")
        text: TextFeatures | None = None
        if config.text_in_decoder:
            if text_guidance is None:
                raise InputError(
                    f"this tokenizer decodes with text: give text_guidance (B, N_t, {config.text_dim}) or captions"
                )
            text = core.text_features(text_guidance, len(z_quantized))
        elif text_guidance is not None:
            raise InputError("this tokenizer has no text: leave text_guidance out")
        latents = z_quantized.squeeze(2).transpose(1, 2).to(self.tokenizer.device, core.dtype)  # (B, N, C)
        with backends_of(self.tokenizer):
            return (core.decoder(latents, text) + 1) / 2

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor, text_guidance: Tensor | Sequence[str] | None = None) -> Tensor:
        """Indices (B, 1, N) or (B, N) int64, without indices latents (B, C, 1, N) -> pictures, as :meth:`decode`."""
        core, config = core_of(self.tokenizer), self.tokenizer.config
        if self.quantize_mode == "vae":
            return self.decode(tokens, text_guidance)
        if not isinstance(tokens, Tensor):
            raise InputError(f"tokens must be an integer tensor (B, 1, {config.num_tokens}), got {type(tokens).__name__}")
        indices = tokens.squeeze(1) if tokens.ndim == 3 else tokens
        indices = core._check_tokens(indices.long()) if not tokens.is_floating_point() else tokens
        if indices.is_floating_point() or tuple(indices.shape[1:]) != (config.num_tokens,):
            raise InputError(f"tokens must be integers (B, 1, {config.num_tokens}), got {tokens.dtype} {tuple(tokens.shape)}")
        return self.decode(_fake_2d(core.bottleneck.latents_from_indices(indices.to(self.tokenizer.device))), text_guidance)

    def forward(
        self, x: Tensor, text_guidance: Tensor | Sequence[str] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | Posterior]:
        """:meth:`encode`, then :meth:`decode`."""
        z, found = self.encode(x, text_guidance=text_guidance if self.tokenizer.config.text_in_encoder else None)
        return self.decode(z, text_guidance), found


def _fake_2d(latents: Tensor) -> Tensor:
    return latents.transpose(1, 2).unsqueeze(2)  # (B, N, C) -> (B, C, 1, N)
