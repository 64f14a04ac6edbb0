"""TiTok and TA-TiTok (bytedance/1d-tokenizer; arXiv 2406.07550 and 2501.07730), single-stage, as a TexTok.

A TiTok is a TexTok with text nowhere, a TA-TiTok one with text in the decoder only. Both have a class token (a register here),
a LayerNorm before the first block and a convolution over the decoded picture; their pictures are in [0, 1], which goes into the
first and the last weights.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from textok_fast.errors import InputError
from textok_fast.interop.dit import published_heads
from textok_fast.interop.vit import config_of, load_texttok, pixel_rows
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.modeling.tokenizer import TexTok

CLIP = "openai/clip-vit-large-patch14-336"  # whose token features TA-TiTok reads
_PUBLISHED = {512: 8}  # attention heads; the other widths have those of DiT
_BLOCK = {
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.proj.weight",
    "attn.out_proj.bias": "attn.proj.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}


def convert_titok(state: dict[str, Tensor], heads: int | None = None, normalize_codes: bool = True) -> TexTok:
    """A :class:`TexTok` in eval mode from the state dict of a TiTok or a TA-TiTok, VQ or KL; sizes are read from the shapes.

    Its null caption is what TA-TiTok makes of features that are all zero: it was trained with captions only.

    Args:
        heads: attention heads; None for the published number at that width, on each side.
        normalize_codes: whether codes are compared by cosine; all published ones are.

    Raises: InputError naming a missing, unexpected or misshapen key, and for a two-stage TiTok, which decodes through a VQGAN.
    """
    state = dict(state)
    if "decoder.ffn.2.weight" in state or any(key.startswith("pixel_decoder.") for key in state):
        raise InputError(
            "this is a two-stage TiTok, whose decoder makes codes of a MaskGIT-VQGAN: only single-stage ones are taken, such "
            "as tokenizer_titok_bl64_vq8k_imagenet and all of TA-TiTok"
        )
    take = state.pop
    try:
        encoder, decoder = _side(state, "encoder", heads), _side(state, "decoder", heads)
        channels = state["decoder.decoder_embed.weight"].shape[1]
        outputs = len(state["encoder.conv_out.bias"])
        has_text = "decoder.text_guidance_proj.weight" in state
        patches, p = state["encoder.positional_embedding"].shape[0] - 1, state["encoder.patch_embed.weight"].shape[-1]
        options: dict[str, Any] = {
            "image_size": round(patches**0.5) * p,
            "patch_size": p,
            "num_tokens": len(state["latent_tokens"]),
            "latent_dim": channels,
            "bottleneck": "kl" if outputs == 2 * channels else "vq",
            "text": "decoder" if has_text else "none",
            "registers": 1,
            "decoder_registers": 1,
            "pre_norm": True,
            "pixel_conv": True,
        }
        if has_text:
            length, dim = (
                state["decoder.text_guidance_positional_embedding"].shape[0],
                state["decoder.text_guidance_proj.weight"].shape[1],
            )
            options |= {"text_positions": True, "max_text_tokens": length, "text_dim": dim, "text_encoder": CLIP}
        taken = {**encoder.blocks, **decoder.blocks}
        embed, bias = take("encoder.patch_embed.weight").flatten(1), take("encoder.patch_embed.bias")  # (D, 3 p p)
        taken["encoder.patch_embed.weight"] = embed / 2  # their x in [0, 1] is (x + 1) / 2 of ours
        taken["encoder.patch_embed.bias"] = bias + embed.sum(1) / 2
        places, register = take("encoder.positional_embedding"), take("encoder.class_embedding")
        taken["encoder.patch_positions"] = places[1:]
        latents = take("latent_tokens") + take("encoder.latent_token_positional_embedding")
        taken["encoder.latents"] = torch.cat([latents, register + places[:1]])
        taken["encoder.to_latents.weight"] = take("encoder.conv_out.weight").flatten(1)
        taken["encoder.to_latents.bias"] = take("encoder.conv_out.bias")
        places, register = take("decoder.positional_embedding"), take("decoder.class_embedding")
        taken["decoder.queries"] = torch.cat([take("decoder.mask_token")[0] + places[1:], register + places[:1]])
        taken["decoder.from_latents.weight"] = take("decoder.decoder_embed.weight")
        taken["decoder.from_latents.bias"] = take("decoder.decoder_embed.bias")
        taken["decoder.latent_positions"] = take("decoder.latent_token_positional_embedding")
        taken["decoder.to_pixels.weight"] = pixel_rows(take("decoder.ffn.0.weight").flatten(1), p)
        taken["decoder.to_pixels.bias"] = pixel_rows(take("decoder.ffn.0.bias"), p)
        taken["decoder.conv_out.weight"] = 2 * take("decoder.conv_out.weight")  # to [-1, 1]
        taken["decoder.conv_out.bias"] = 2 * take("decoder.conv_out.bias") - 1
        if has_text:
            taken["decoder.text.proj.weight"] = take("decoder.text_guidance_proj.weight")
            taken["decoder.text.proj.bias"] = take("decoder.text_guidance_proj.bias")
            taken["decoder.text.positions"] = take("decoder.text_guidance_positional_embedding")
            taken["decoder.text.null"] = taken["decoder.text.proj.bias"] + taken["decoder.text.positions"][0]
        if options["bottleneck"] == "vq":
            taken["bottleneck.codebook"] = take("quantize.embedding.weight")
            options |= {"codebook_size": len(taken["bottleneck.codebook"]), "normalize_codes": normalize_codes}
            state.pop("quantize.embed_prob", None)  # how often a code was used in training
    except KeyError as error:
        raise InputError(f"this is not a TiTok state dict: {error.args[0]} is missing") from None
    except InputError:
        raise
    except (ValueError, IndexError, RuntimeError) as error:
        raise InputError(f"this is not a TiTok state dict: {error}") from None
    if state:
        raise InputError(f"unexpected {', '.join(list(state)[:3])} in the weights of a TiTok")
    return load_texttok(config_of(encoder.sizes, decoder.sizes, options), taken)


class _Side(NamedTuple):
    sizes: tuple[int, int, int]  # width, depth, heads
    blocks: dict[str, Tensor]  # and the LayerNorms before and behind them, by our names


def _side(state: dict[str, Tensor], side: str, heads: int | None) -> _Side:
    """Takes the blocks of a side out of ``state``."""
    width, place = len(state[f"{side}.ln_pre.weight"]), f"{side}.transformer."
    depth = 1 + max(int(key.split(".")[2]) for key in state if key.startswith(place))
    found = {}
    for index in range(depth):
        for theirs, ours in _BLOCK.items():
            found[f"{side}.blocks.{index}.{ours}"] = state.pop(f"{place}{index}.{theirs}")
    for name in ("weight", "bias"):
        found[f"{side}.pre_norm.{name}"] = state.pop(f"{side}.ln_pre.{name}")
        found[f"{side}.norm.{name}"] = state.pop(f"{side}.ln_post.{name}")
    return _Side((width, depth, heads or _PUBLISHED.get(width) or published_heads(width)), found)


# -- called as the peer is -----------------------------------------------------------------------------------------------------


class Posterior(NamedTuple):
    """What a KL TiTok's ``encode`` returns beside a sample: mean and log-variance, each (B, C, 1, N)."""

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

    Args:
        tokenizer: a :class:`TexTok`, or an engine of one.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.quantize_mode = "vae" if tokenizer.config.bottleneck == "kl" else "vq"
        self.num_latent_tokens = tokenizer.config.num_tokens

    @torch.no_grad()
    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor] | Posterior]:
        """x (B, 3, S, S) in [0, 1] -> z_quantized (B, C, 1, N), and for VQ ``min_encoding_indices`` (B, 1, N) with the loss
        terms, for KL the :class:`Posterior` of which z_quantized is a sample.

        Raises: InputError for another shape, range or dtype.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise InputError(f"TiTok takes float pictures (B, 3, S, S) in [0, 1], got {getattr(x, 'dtype', type(x).__name__)}")
        core, place = _core(self.tokenizer), self.tokenizer.device
        pixels = core._check_images(2 * x - 1)
        with _context(self.tokenizer):
            z = core.encoder(pixels.to(place), None)  # (B, N, C or 2 C)
            out = core.bottleneck(z)
        if out.mean is not None and out.logvar is not None:
            posterior = Posterior(_fake_2d(out.mean), _fake_2d(out.logvar))
            return posterior.sample(generator), posterior
        commitment = 0.25 * out.losses["commitment"]
        losses = {"commitment_loss": commitment, "codebook_loss": out.losses["codebook"]}
        losses["quantizer_loss"] = commitment + losses["codebook_loss"]
        return _fake_2d(out.latents), {**losses, "min_encoding_indices": out.indices.unsqueeze(1)}

    @torch.no_grad()
    def decode(self, z_quantized: Tensor, text_guidance: Tensor | None = None) -> Tensor:
        """z_quantized (B, C, 1, N) -> pictures (B, 3, S, S), not clamped to [0, 1].

        ``text_guidance`` (B, N_t, D_t): CLIP's token features, as TA-TiTok takes them: all of them count, padding too.
        Raises: InputError for another shape, and where text is lacking or unwanted.
        """
        core, config = _core(self.tokenizer), self.tokenizer.config
        wanted = (config.latent_dim, 1, config.num_tokens)
        if z_quantized.ndim != 4 or tuple(z_quantized.shape[1:]) != wanted:
            raise InputError(f"latents must be (B, {', '.join(map(str, wanted))}), got {tuple(z_quantized.shape)}")
        text: TextFeatures | None = None
        if config.text_in_decoder:
            if text_guidance is None:
                raise InputError(f"this tokenizer decodes with text: give text_guidance (B, N_t, {config.text_dim})")
            text = core.text_features(text_guidance, len(z_quantized))
        elif text_guidance is not None:
            raise InputError("this tokenizer has no text: leave text_guidance out")
        latents = z_quantized.squeeze(2).transpose(1, 2).to(self.tokenizer.device, core.dtype)  # (B, N, C)
        with _context(self.tokenizer):
            return (core.decoder(latents, text) + 1) / 2

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor, text_guidance: Tensor | None = None) -> Tensor:
        """Indices (B, 1, N) or (B, N) int64, for KL latents (B, C, 1, N) -> pictures, as :meth:`decode`."""
        core, config = _core(self.tokenizer), self.tokenizer.config
        if self.quantize_mode == "vae":
            return self.decode(tokens, text_guidance)
        indices = tokens.squeeze(1) if tokens.ndim == 3 else tokens
        indices = core._check_tokens(indices.long()) if not tokens.is_floating_point() else tokens
        if indices.is_floating_point() or tuple(indices.shape[1:]) != (config.num_tokens,):
            raise InputError(f"tokens must be integers (B, 1, {config.num_tokens}), got {tokens.dtype} {tuple(tokens.shape)}")
        return self.decode(_fake_2d(core.bottleneck.latents_from_indices(indices.to(self.tokenizer.device))), text_guidance)

    def forward(self, x: Tensor, text_guidance: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor] | Posterior]:
        """:meth:`encode`, then :meth:`decode`."""
        z, found = self.encode(x)
        return self.decode(z, text_guidance), found


def _core(tokenizer: Any) -> Any:
    """The TexTok itself, or the one inside an engine, whose encoder and decoder are the engine's."""
    return tokenizer if isinstance(tokenizer, TexTok) else tokenizer.model


def _context(tokenizer: Any) -> Any:
    return contextlib.nullcontext() if isinstance(tokenizer, TexTok) else tokenizer._backends()


def _fake_2d(latents: Tensor) -> Tensor:
    return latents.transpose(1, 2).unsqueeze(2)  # (B, N, C) -> (B, C, 1, N)
