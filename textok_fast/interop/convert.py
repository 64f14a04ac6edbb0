"""One function for all kinds of foreign weights, and one that writes them in our own format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from textok_fast.diffusion import Objective
from textok_fast.errors import InputError
from textok_fast.interop.dit import load_diffusers_dit, load_dit
from textok_fast.interop.layout import Shape, read_sizes
from textok_fast.interop.softvq import ContinuousTokenizer, convert_softvq
from textok_fast.interop.titok import TiTok, convert_titok
from textok_fast.interop.weights import PIPELINE_NAME, Source, Weights, locate, read_weights
from textok_fast.modeling.autoencoder import SD_VAE, LatentTokenizer, build_autoencoder, is_autoencoder
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.saving import CONFIG_NAME, load_state, read_config
from textok_fast.modeling.tokenizer import TexTok


@dataclass(frozen=True)
class Kind:
    """A family of public weights.

    ``build``: (weights, **options) -> our model, with options of the names ``options``. ``wrap``: our model -> an object with
    the peer's own calls; None where our model has them itself. ``what``: for readers.
    """

    what: str
    build: Callable[..., nn.Module]
    options: tuple[str, ...]
    wrap: Callable[[nn.Module], nn.Module] | None = None


def _dit(weights: Weights, **options: Any) -> nn.Module:
    return load_dit(weights.state, **options)


def _one_d(sigma: bool) -> Callable[..., nn.Module]:
    def build(weights: Weights, **options: Any) -> nn.Module:
        return load_dit(weights.state, learn_sigma=sigma, **options)

    return build


def _diffusers_dit(weights: Weights, **options: Any) -> nn.Module:
    if not weights.config:
        raise InputError(f"{weights.source} has no config.json beside it, which a diffusers model's sizes are read from")
    return load_diffusers_dit(weights.state, weights.config, **options)


def _titok(weights: Weights, **options: Any) -> nn.Module:
    return convert_titok(weights.state, **options)


def _softvq(weights: Weights, **options: Any) -> nn.Module:
    return convert_softvq(weights.state, weights.config, **options)


# Older files of it name its attention's layers otherwise.
_SD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _sd_vae(weights: Weights, image_size: int | None = None) -> nn.Module:
    """diffusers' AutoencoderKL itself: ``encode(x).latent_dist``, ``decode(z).sample``."""
    size = {} if image_size is None else {"sample_size": image_size}
    with torch.device("meta"):
        vae = build_autoencoder({**(weights.config or SD_VAE), **size})
    given = weights.state
    is_old = any(old in name for name in given for old in _SD_VAE_NAMES)
    theirs: dict[str, str] = {}  # by our names
    for ours in vae.state_dict():
        theirs[ours] = ours
        for old, new in _SD_VAE_NAMES.items() if is_old and ".attentions." in ours else ():
            theirs[ours] = theirs[ours].replace(new, old)
    layout: dict[str, Shape] = {}
    for ours, value in vae.state_dict().items():
        once_conv = ".to_" in ours and value.ndim == 2 and theirs[ours] in given and given[theirs[ours]].ndim == 4
        layout[theirs[ours]] = (*value.shape, *((1, 1) if once_conv else ()))
    read_sizes(given, layout, "AutoencoderKL")
    state = {ours: given[theirs[ours]].reshape(value.shape) for ours, value in vae.state_dict().items()}
    vae = vae.to_empty(device="cpu")
    load_state(vae, state, weights.source)
    LatentTokenizer(vae)  # InputError for a size that it does not decode to
    return vae


KINDS: dict[str, Kind] = {
    "dit": Kind(
        "DiT over 2-D patches, as facebookresearch/DiT saves it",
        _dit,
        ("heads", "guided_channels", "learn_sigma", "time_scale"),
    ),
    "diffusers-dit": Kind("diffusers' DiTTransformer2DModel", _diffusers_dit, ("guided_channels", "frequency_shift")),
    "dit-1d": Kind("DiT over 1-D tokens with learned variance (SoftVQ-VAE)", _one_d(True), ("heads", "guided_channels")),
    "sit-1d": Kind("SiT over 1-D tokens, a flow (SoftVQ-VAE, MAETok)", _one_d(False), ("heads", "guided_channels")),
    "titok": Kind("TiTok, single-stage, VQ or KL", _titok, ("heads", "normalize_codes"), TiTok),
    "tatitok": Kind("TA-TiTok, VQ or KL", _titok, ("heads", "normalize_codes", "text_encoder"), TiTok),
    "softvq": Kind("SoftVQ-VAE's tokenizer", _softvq, ("heads", "temperature", "axial_theta"), ContinuousTokenizer),
    "maetok": Kind("MAETok's tokenizer", _softvq, ("heads", "axial_theta"), ContinuousTokenizer),
    "sd-vae": Kind("Stable Diffusion's autoencoder f8, through diffusers", _sd_vae, ("image_size",)),
}
# The objective and the noise schedule that each was trained with as published.
OBJECTIVES: dict[str, tuple[Objective, str]] = {
    "dit": ("gaussian", "linear"),
    "diffusers-dit": ("gaussian", "linear"),
    "dit-1d": ("gaussian", "cosine"),
    "sit-1d": ("flow", "linear"),
}
# In a pipeline: DiT's own code guides three of the latents' four channels.
GUIDED_CHANNELS = {"dit": 3, "diffusers-dit": 3}


def load(kind: str | None, weights: Source, **options: Any) -> nn.Module:
    """A foreign model on our modules, in eval mode and float32, called as its own code calls it.

    What ``save_pretrained`` or :func:`convert` wrote, a directory or on the Hub, is loaded as what it says it is, whatever
    ``kind`` is.

    Generators are ``model(x, t, y)``; TiTok's tokenizers are a :class:`TiTok`, SoftVQ-VAE's and MAETok's a
    :class:`ContinuousTokenizer`, whose ``tokenizer`` is the :class:`~textok_fast.TexTok` that engines and exports take.

    Args:
        kind: of :data:`KINDS`; None guesses it from the names of the tensors.
        weights: as :func:`read_weights` takes them.
        options: what shapes do not tell: ``heads``, ``guided_channels``, ``normalize_codes``, ``temperature``, ... by kind
            (``KINDS[kind].options``); their defaults are the published ones.

    Raises: InputError for an unknown kind or option, for weights of another kind, naming the key, and for a file that is not
        what it claims.
    """
    return load_and_tell(kind, weights, **options)[0]


def load_and_tell(kind: str | None, weights: Source, **options: Any) -> tuple[nn.Module, str]:
    """:func:`load`, and which kind it was: of :data:`KINDS`, or "" for a directory in our own format."""
    weights = locate(weights) if isinstance(weights, str | Path) else weights
    if (ours := _ours(weights)) is not None:
        if options:
            raise InputError(f"{weights} is in this library's format and knows its sizes: leave out {', '.join(options)}")
        return ours, ""
    found = read_weights(weights)
    name = guess_kind(found) if kind is None else kind
    built, known = _built(name, found, options)
    return built if known.wrap is None else known.wrap(built), name


def _ours(source: Source) -> nn.Module | None:
    """The model of a directory in our own format, wrapped as :func:`load` says; None for all else."""
    if not isinstance(source, str | Path) or not (directory := Path(source).expanduser()).is_dir():
        return None
    kind = read_config(directory).get("model_type") if (directory / CONFIG_NAME).is_file() else None
    if kind == DiT.model_type:
        return DiT.from_pretrained(directory)
    if kind != TexTok.model_type:
        return None
    model = TexTok.from_pretrained(directory)
    if not model.config.registers:  # a TexTok of its own; the others have a class token
        return model
    return TiTok(model) if model.config.pixel_conv else ContinuousTokenizer(model)


def _built(kind: str | None, found: Weights, options: dict[str, Any]) -> tuple[nn.Module, Kind]:
    name = guess_kind(found) if kind is None else kind
    if name not in KINDS:
        raise InputError(f"unknown kind of weights {name!r}; known: {', '.join(KINDS)}")
    likely = guess_kind(found, name)
    if likely != name and {likely, name} not in ({"titok", "tatitok"}, {"dit-1d", "sit-1d"}):
        raise InputError(f"{found.source} looks like {likely} ({KINDS[likely].what}), not like {name}")
    taken = KINDS[name].options
    if "heads" in taken and "num_heads" in options:  # either word
        options = {{"num_heads": "heads"}.get(key, key): value for key, value in options.items()}
    if unknown := [key for key in options if key not in taken]:
        raise InputError(f"{name} has no option {unknown[0]!r}; it has {', '.join(taken) or 'none'}")
    try:
        return KINDS[name].build(found, **options), KINDS[name]
    except TypeError as error:  # of an option's value
        raise InputError(f"{name}: {error}") from None
    except InputError as error:
        raise InputError(f"{found.source}: {error}") from None


def guess_kind(weights: Weights, otherwise: str | None = None) -> str:
    """The kind whose tensors these are named like; ``otherwise``, or InputError, where it is none."""
    names = weights.state.keys()
    if "latent_tokens" in names and "encoder.transformer.0.attn.in_proj_weight" in names:
        return "tatitok" if any("text_guidance" in name for name in names) else "titok"
    if "encoder.model.blocks.0.attn.qkv.weight" in names:
        return "softvq" if "quantize.embedding" in names else "maetok"
    if "transformer_blocks.0.attn1.to_q.weight" in names:
        return "diffusers-dit"
    if "decoder.mid_block.resnets.0.conv1.weight" in names:
        return "sd-vae"
    if "x_embedder.proj.weight" in names:
        return "dit"
    if "x_embedder.weight" in names and "final_layer.linear.weight" in names:
        inputs, outputs = weights.state["x_embedder.weight"].shape[-1:], weights.state["final_layer.linear.weight"].shape[:1]
        return "dit-1d" if inputs and outputs == (2 * inputs[0],) else "sit-1d"
    if otherwise is not None:
        return otherwise
    raise InputError(
        f"{weights.source} holds no model that is known here (tensors such as {', '.join(list(names)[:3])}); "
        f"known: {', '.join(KINDS)}"
    )


def convert(
    kind: str | None,
    weights: Source,
    out: str | Path,
    tokenizer: Source | None = None,
    *,
    tokenizer_options: dict[str, Any] | None = None,
    schedule: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Writes foreign weights in our own format, for ``from_pretrained``; returns what was found and where it lies.

    ``weights`` may also be a directory of diffusers' DiTPipeline, or its Hub id: its VAE is then the tokenizer.

    Args:
        tokenizer: weights of the tokenizer whose tokens a generator makes: ``out`` is then a pipeline's directory, as
            ``textok-fast sample`` and ``load_pipeline`` take it, and guides as published (:data:`GUIDED_CHANNELS`). For a
            DiT over 2-D latents an SD-VAE, for one over 1-D tokens their tokenizer. ``tokenizer_options``: what its shapes do
            not tell.
        schedule: linear or cosine, by which a Gaussian generator's noise was added; None for the published one of its kind.

    The others, and errors, as :func:`load`.
    """
    from textok_fast.inference.pipelines import ClassToImagePipeline

    weights, tokenizer = _parts(weights, tokenizer)
    found = read_weights(weights)
    name = guess_kind(found) if kind is None else kind
    if tokenizer is not None and name in GUIDED_CHANNELS:
        options = {"guided_channels": GUIDED_CHANNELS[name], **options}
    model, known = _built(name, found, options)
    out = Path(out)
    report: dict[str, Any] = {"kind": name, "what": known.what, "out": str(out), "class": type(model).__name__}
    report["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if tokenizer is None:
        model.save_pretrained(out)  # type: ignore[operator]
        return report
    if name not in OBJECTIVES or not isinstance(model, DiT):
        raise InputError(f"a tokenizer goes with a generator, and {found.source} is {known.what}")
    decoder, about = _built(None, read_weights(tokenizer), tokenizer_options or {})
    if is_autoencoder(decoder):
        made = LatentTokenizer(decoder)
        size = model.config.input_size * made.config.factor  # pictures of any size: the generator says of which
        decoder = LatentTokenizer(decoder, size or None)
    if not isinstance(decoder, (TexTok, LatentTokenizer)):
        raise InputError(f"a pipeline decodes with a tokenizer, got {about.what}")
    objective, published = OBJECTIVES[name]
    ClassToImagePipeline(model, decoder, objective, schedule=schedule or published).save_pretrained(out)
    return {**report, "tokenizer": about.what, "image_size": decoder.config.image_size}


def _parts(weights: Source, tokenizer: Source | None) -> tuple[Source, Source | None]:
    """Of a directory that diffusers' DiTPipeline saved its transformer and, unless another tokenizer is given, its VAE."""
    if not isinstance(weights, str | Path):
        return weights, tokenizer
    path = locate(weights)
    if not (path / PIPELINE_NAME).is_file():
        return path, tokenizer
    return path / "transformer", path / "vae" if tokenizer is None else tokenizer
