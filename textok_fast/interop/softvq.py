"""SoftVQ-VAE and MAETok (Hhhhhhao/continuous_tokenizer; arXiv 2412.10958 and 2502.03444) as a TexTok without text.

Their two sides are ViTs of DINOv2's form: a class token and registers, LayerScale, which goes into the weights before it, and
LayerNorms with eps 1e-6. The encoder's patches have absolute positions, the decoder's queries absolute or rotary ones. The
decoder of MAETok's released configurations ("movq") has LayerNorms without weights, whose results the latents modulate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from textok_fast.errors import InputError
from textok_fast.interop.dit import published_heads
from textok_fast.interop.layout import Shape, count_blocks, holds, read_sizes, shape_of
from textok_fast.interop.vit import backends_of, config_of, core_of, load_texttok, pixel_rows
from textok_fast.modeling.tokenizer import TexTok

_PUBLISHED = {192: 3, 384: 6, 768: 12, 1024: 16, 1536: 24}  # of DINOv2's sizes
# What training keeps beside the tokenizer: auxiliary decoders, the encoder they imitate, masks, heads that are never called.
TRAINING_ONLY = (
    *("repa_model.", "projection.", "decoder_hog.", "decoder_dino.", "decoder_clip.", "decoder_supcls.", "post_quant_conv_"),
    *("to_pixel_", "hog_generator.", "de_scale.", "scale.", "clip_model.", "encoder.mask_token", "encoder.model.head."),
    *("encoder.model.fc_norm.", "decoder.model.head.", "decoder.model.fc_norm.", "decoder.model.patch_embed."),
    *("quantize.codebook_used", "encoder.freqs_t_", "decoder.freqs_t_"),
)
_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_NORMS = ("norm1", "norm2")
_SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}  # LayerScale, and the layer that it goes into
_MODULATION = "adaLN_modulation.1"


def convert_softvq(
    state: dict[str, Tensor],
    about: dict[str, Any] | None = None,
    heads: int | None = None,
    temperature: float | None = None,
    axial_theta: float | None = None,
) -> TexTok:
    """A :class:`TexTok` in eval mode from the state dict of a SoftVQ-VAE (with ``quantize.embedding``) or a MAETok (without).

    Args:
        about: its config.json: ``vq_mean`` and ``vq_std``, by which its generators' tokens are normalised,
            ``codebook_l2_norm``, and the defaults of what follows.
        heads: attention heads on both sides; None for the published number at each side's width.
        temperature: of the assignment to codes, of SoftVQ-VAE; None is ``tau`` of config.json, else 0.07.
        axial_theta: base of rotary positions by axes, of which the weights hold nothing (those of learned, mixed ones are
            read); None is ``rope_theta`` of a config.json with ``use_rope`` and not ``rope_mixed``, else there are none.

    Raises: InputError naming a missing, unexpected or misshapen key.
    """
    state = {key: value for key, value in state.items() if not key.startswith(TRAINING_ONLY)}
    about = about.get("config", about) if about else {}
    about = about if isinstance(about, dict) else {}
    if axial_theta is None and about.get("use_rope") and not about.get("rope_mixed"):
        axial_theta = _number(about, "rope_theta", 10.0)
    for name, value in (("axial_theta", axial_theta), ("temperature", temperature)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf):
            raise InputError(f"{name} must be a number above 0, got {value!r}")
    mixed = holds(state, ["encoder.freqs", "decoder.freqs"])
    if mixed and axial_theta is not None:
        raise InputError("axial_theta is for rotary positions by axes, but encoder.freqs are those of learned, mixed ones")
    has_codes, sides = "quantize.embedding" in state, {"encoder": "D", "decoder": "E"}
    depths = {side: count_blocks(state, f"{side}.model.blocks.", _block("D", [], False)) for side in sides}
    modulated = holds(state, _keys("decoder", depths, [f"{_MODULATION}.{name}" for name in ("weight", "bias")]))
    scaled = [side for side in sides if holds(state, _keys(side, depths, _SCALES))]
    tokens = {side: [name for name in ("cls_token", "reg_token") if f"{side}.model.{name}" in state] for side in sides}
    layout: dict[str, Shape] = {
        "encoder.latent_tokens": (1, "N", "D"),
        "encoder.model.patch_embed.proj.weight": ("D", 3, "p", "p"),
        "encoder.model.patch_embed.proj.bias": ("D",),
        "quant_conv.weight": ("C", "D"),
        "quant_conv.bias": ("C",),
        "post_quant_conv.weight": ("E", "C"),
        "post_quant_conv.bias": ("E",),
        "decoder.mask_token": (1, 1, "E"),
        "decoder.to_pixel.model.weight": ("3 p p", "E"),
        "decoder.to_pixel.model.bias": ("3 p p",),
    }
    for side, width in sides.items():
        by_latents = modulated and side == "decoder"
        layout[f"{side}.latent_pos_embed"] = (1, "N", width)
        layout[f"{side}.model.pos_embed"] = (1, f"P_{side}", width)
        layout |= {f"{side}.model.{name}": (1, 1 if name == "cls_token" else f"R_{side}", width) for name in tokens[side]}
        if by_latents:
            layout |= {
                f"{side}.model.norm.{_MODULATION}.weight": ("2 E", "C"),
                f"{side}.model.norm.{_MODULATION}.bias": ("2 E",),
            }
        else:
            layout |= {f"{side}.model.norm.weight": (width,), f"{side}.model.norm.bias": (width,)}
        block = _block(width, list(_SCALES) if side in scaled else [], by_latents)
        for index in range(depths[side]):
            layout |= {f"{side}.model.blocks.{index}.{name}": shape for name, shape in block.items()}
        if mixed:
            layout[f"{side}.freqs"] = (2, depths[side], f"1/2 {width}")
    if has_codes:
        layout["quantize.embedding"] = ("B", "K", "C")
    sizes = read_sizes(state, layout, "SoftVQ-VAE" if has_codes else "MAETok")

    rope = mixed or axial_theta is not None
    widths = {side: sizes[width] for side, width in sides.items()}
    counts = {side: published_heads(widths[side], heads, _PUBLISHED) for side in sides}
    prefixes = {side: _joined([state[f"{side}.model.{name}"][0] for name in tokens[side]], widths[side]) for side in sides}
    places, own = _places(state, "encoder", prefixes["encoder"])  # (hw, D), (R, D)
    p, grid, channels = sizes["p"], math.isqrt(len(places)), sizes["C"]
    embed = state["encoder.model.patch_embed.proj.weight"]  # (D, 3, p, p)
    queries = state["decoder.mask_token"][0].expand(len(places), -1)  # (hw, E)
    decoder_own = prefixes["decoder"]
    if not rope:  # which are in place of absolute positions
        decoder_places, decoder_own = _places(state, "decoder", prefixes["decoder"])
        if len(decoder_places) != len(places):
            raise InputError(
                f"{shape_of(state, 'decoder.model.pos_embed')} is for {len(decoder_places)} patches, "
                f"{shape_of(state, 'encoder.model.pos_embed')} for {len(places)}: wanted as many"
            )
        queries = queries + decoder_places
    taken: dict[str, Tensor] = {
        "encoder.patch_positions": places,
        "encoder.latents": torch.cat([state["encoder.latent_tokens"][0] + state["encoder.latent_pos_embed"][0], own]),
        "encoder.patch_embed.weight": embed.flatten(1),
        "encoder.patch_embed.bias": state["encoder.model.patch_embed.proj.bias"],
        "encoder.to_latents.weight": state["quant_conv.weight"],
        "encoder.to_latents.bias": state["quant_conv.bias"],
        "decoder.queries": torch.cat([queries, decoder_own]),
        "decoder.latent_positions": state["decoder.latent_pos_embed"][0],
        "decoder.from_latents.weight": state["post_quant_conv.weight"],
        "decoder.from_latents.bias": state["post_quant_conv.bias"],
        "decoder.to_pixels.weight": pixel_rows(state["decoder.to_pixel.model.weight"], p),
        "decoder.to_pixels.bias": pixel_rows(state["decoder.to_pixel.model.bias"], p),
    }
    for side in sides:
        _take_blocks(state, side, depths[side], side in scaled, modulated and side == "decoder", widths[side], taken)
        if mixed:
            taken[f"{side}.rope.frequencies"] = state[f"{side}.freqs"]  # (2, depth, H D / 2)
        elif axial_theta is not None:
            taken[f"{side}.rope.frequencies"] = _axial(axial_theta, depths[side], counts[side], widths[side] // counts[side])
    options: dict[str, Any] = {
        "image_size": grid * p,
        "patch_size": p,
        "num_tokens": sizes["N"],
        "latent_dim": channels,
        "text": "none",
        "registers": len(own),
        "decoder_registers": len(decoder_own),
        "norm_eps": 1e-6,
        "rope": rope,
        "modulated_decoder": modulated,
    }
    if has_codes:
        taken["bottleneck.codebook"] = state["quantize.embedding"]  # (B, K, C)
        options |= {"bottleneck": "softvq", "soft_codebooks": sizes["B"], "codebook_size": sizes["K"]}
        options["soft_temperature"] = _number(about, "tau", 0.07) if temperature is None else float(temperature)
        options["normalize_codes"] = about.get("codebook_l2_norm", True)
        if not isinstance(options["normalize_codes"], bool):
            raise InputError(f"config.json: codebook_l2_norm is true or false, got {options['normalize_codes']!r}")
    mean, std = _number(about, "vq_mean", 0.0), _number(about, "vq_std", 1.0)
    if std <= 0:
        raise InputError(f"config.json: vq_std must be above 0, got {std}")
    if (mean, std) != (0.0, 1.0):
        options |= {"latent_mean": (mean,) * channels, "latent_std": (std,) * channels}
    encoder, decoder = ((widths[side], depths[side], counts[side]) for side in sides)
    return load_texttok(config_of(encoder, decoder, options), taken)


def _number(about: dict[str, Any], name: str, default: float) -> float:
    value = about.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"config.json: {name} must be a number, got {value!r}")
    return float(value)


def _one(values: tuple[float, ...]) -> float | Tensor:
    """The number that all channels have, else all of them, (C,)."""
    return values[0] if len(set(values)) == 1 else torch.tensor(values)


def _block(width: str, scales: list[str], modulated: bool) -> dict[str, Shape]:
    """The tensors of a block by their names. ``modulated``: by the latents, in place of its LayerNorms' own weights."""
    layers: dict[str, Shape] = {
        "attn.qkv.weight": (f"3 {width}", width),
        "attn.qkv.bias": (f"3 {width}",),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.fc1.weight": (f"4 {width}", width),
        "mlp.fc1.bias": (f"4 {width}",),
        "mlp.fc2.weight": (width, f"4 {width}"),
        "mlp.fc2.bias": (width,),
        **dict.fromkeys(scales, (width,)),
    }
    if modulated:
        return {**layers, f"{_MODULATION}.weight": (f"4 {width}", "C"), f"{_MODULATION}.bias": (f"4 {width}",)}
    return {**layers, **{f"{norm}.{name}": (width,) for norm in _NORMS for name in ("weight", "bias")}}


def _keys(side: str, depths: dict[str, int], names: Iterable[str]) -> list[str]:
    return [f"{side}.model.blocks.{index}.{name}" for index in range(depths[side]) for name in names]


def _joined(rows: list[Tensor], width: int) -> Tensor:
    """Rows (n_i, D), or none, below each other."""
    return torch.cat([torch.empty(0, width), *rows])


def _places(state: dict[str, Tensor], side: str, prefix: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the patches (hw, D), and the class token and registers (R, D) with theirs, if they have any: timm's models
    with registers keep positions for the patches only."""
    key = f"{side}.model.pos_embed"
    places, count = state[key][0], len(prefix)
    for first in (0, count) if f"{side}.model.reg_token" in state else (count,):
        rows = len(places) - first
        if rows > 0 and math.isqrt(rows) ** 2 == rows:
            return places[first:], prefix + places[:first] if first else prefix
    tokens = [f"{side}.model.{name}" for name in ("cls_token", "reg_token")]
    found = " and ".join(shape_of(state, token) if token in state else f"no {token}" for token in tokens)
    raise InputError(f"{shape_of(state, key)}: wanted a square number of rows for the patches behind {found}")


def _axial(theta: float, depth: int, heads: int, head_dim: int) -> Tensor:
    """Rotary positions by axes (RoPE-ViT, Heo et al. 2024, arXiv 2403.13298) as mixed ones, (2, depth, H D / 2): the first half
    of a head's pairs turns by column times theta^(-4 i / D), the second by row times the same."""
    if head_dim % 4 or theta <= 0:
        raise InputError(f"rotary positions by axes need axial_theta > 0 and heads of 4 n channels, got {theta} and {head_dim}")
    magnitude = theta ** (-torch.arange(0, head_dim, 4) / head_dim)  # (D / 4,)
    zero = torch.zeros_like(magnitude)
    directions = torch.stack([torch.cat([magnitude, zero]), torch.cat([zero, magnitude])])  # (2, D / 2)
    return directions.repeat(1, heads).unsqueeze(1).repeat(1, depth, 1)


def _take_blocks(
    state: dict[str, Tensor], side: str, depth: int, scaled: bool, modulated: bool, width: int, taken: dict[str, Tensor]
) -> None:
    """The blocks of a side and the LayerNorm behind them, by our names. One without weights is one with 1 and 0."""
    plain = {"weight": torch.ones(width), "bias": torch.zeros(width)}
    for index in range(depth):
        theirs, ours = f"{side}.model.blocks.{index}", f"{side}.blocks.{index}"
        for name in ("weight", "bias"):
            for layer in _LAYERS:
                taken[f"{ours}.{layer}.{name}"] = state[f"{theirs}.{layer}.{name}"]
            for norm in _NORMS:
                taken[f"{ours}.{norm}.{name}"] = plain[name] if modulated else state[f"{theirs}.{norm}.{name}"]
            if modulated:
                taken[f"{side}.modulation.{index}.{name}"] = state[f"{theirs}.{_MODULATION}.{name}"]
        for scale, layer in _SCALES.items() if scaled else ():  # gamma (W x + b) = (gamma W) x + gamma b
            gamma = state[f"{theirs}.{scale}"]
            taken[f"{ours}.{layer}.weight"] = gamma.unsqueeze(1) * taken[f"{ours}.{layer}.weight"]
            taken[f"{ours}.{layer}.bias"] = gamma * taken[f"{ours}.{layer}.bias"]
    for name in ("weight", "bias"):  # modulated where nobody reads: at the latents
        taken[f"{side}.norm.{name}"] = plain[name] if modulated else state[f"{side}.model.norm.{name}"]


class ContinuousTokenizer(nn.Module):
    """A tokenizer with the calls of SoftVQ-VAE and MAETok: pictures (B, 3, S, S) in [-1, 1], latents (B, N, C) as their code
    has them, before the normalisation by ``vq_mean`` and ``vq_std``, which code that samples applies.

    Args:
        tokenizer: a :class:`TexTok`, or an engine of one.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        config = tokenizer.config
        self.num_latent_tokens, self.codebook_embed_dim = config.num_tokens, config.latent_dim
        self.vq_mean, self.vq_std = _one(config.latent_mean or (0.0,)), _one(config.latent_std or (1.0,))

    def around(self, tokenizer: Any) -> ContinuousTokenizer:
        """The same calls around another tokenizer, such as an engine of this one's."""
        return ContinuousTokenizer(tokenizer)

    def encode(self, x: Tensor) -> tuple[Tensor, None, None]:
        """x (B, 3, S, S) -> latents (B, N, C), and None for the losses and the statistics that training has."""
        tokens = self.tokenizer.encode(x).as_subclass(Tensor)
        return core_of(self.tokenizer).denormalize(tokens), None, None

    @torch.no_grad()
    def decode(self, quant: Tensor) -> Tensor:
        """latents (B, N, C) -> pictures (B, 3, S, S), not clamped to [-1, 1]. InputError for another shape, dtype or NaN."""
        core = core_of(self.tokenizer)
        latents = core._check_tokens(quant).to(core.device, core.dtype)
        with backends_of(self.tokenizer):
            out: Tensor = core.decoder(latents, None)
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        """:meth:`encode`, then :meth:`decode`: pictures (B, 3, S, S), and None for losses and statistics."""
        quant, losses, info = self.encode(x)
        return self.decode(quant), losses, info
