"""One function for all kinds of foreign weights, and one that writes them in our own format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from textok_fast.diffusion import Objective
from textok_fast.errors import InputError
from textok_fast.files import write_text
from textok_fast.interop.dit import load_diffusers_dit, load_dit
from textok_fast.interop.layout import Shape, read_sizes
from textok_fast.interop.schedulers import gaussian_noise, read_scheduler
from textok_fast.interop.softvq import ContinuousTokenizer, convert_softvq
from textok_fast.interop.titok import TiTok, convert_titok
from textok_fast.interop.weights import PIPELINE_NAME, Source, Weights, locate, read_weights, refuse_pipeline
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

    @property
    def calls(self) -> str:
        """The name of what ``wrap`` makes, "" for none."""
        return self.wrap.__name__ if isinstance(self.wrap, type) else ""


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
# What values of options are, in words and as types; of the others the converters say it.
_OPTION_TYPES: dict[str, tuple[str, Any]] = {
    "guided_channels": ("a whole number", int),
    "frequency_shift": ("0 or 1", int),
    "learn_sigma": ("true or false", bool | None),
    "time_scale": ("a number", int | float),
    "text_encoder": ("a directory or a Hub id", str | Path),
    "image_size": ("a whole number of pixels", int | None),
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


# Whose calls a tokenizer has: in config.json beside what :class:`TexTok` reads.
CALLS_NAME = "_calls"
_WRAPPERS = {wrapper.__name__: wrapper for wrapper in (TiTok, ContinuousTokenizer)}


def _ours(source: Source) -> nn.Module | None:
    """The model of a directory in our own format, wrapped as :func:`load` says; None for all else."""
    if not isinstance(source, str | Path) or not (directory := Path(source).expanduser()).is_dir():
        return None
    about = read_config(directory) if (directory / CONFIG_NAME).is_file() else {}
    if about.get("model_type") == DiT.model_type:
        return DiT.from_pretrained(directory)
    if about.get("model_type") != TexTok.model_type:
        return None
    model = TexTok.from_pretrained(directory)
    if (wrapper := _WRAPPERS.get(about.get(CALLS_NAME, ""))) is not None:
        return wrapper(model)
    if not model.config.registers:  # a TexTok of its own, or nobody said so; most of the others have a class token
        return model
    return TiTok(model) if model.config.pixel_conv else ContinuousTokenizer(model)


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model inside a tokenizer's calls, and the name of these; the model itself, and ""."""
    if isinstance(model, (TiTok, ContinuousTokenizer)):
        inner: nn.Module = model.tokenizer
        return inner, type(model).__name__
    return model, ""


def note_calls(directory: Path, calls: str) -> None:
    """Adds to the config.json of a saved TexTok whose calls :func:`load` gives it; "" for its own."""
    if calls:
        text = json.dumps({**read_config(directory), CALLS_NAME: calls}, indent=2)
        write_text(directory / CONFIG_NAME, text + "\n")


def _built(kind: str | None, found: Weights, options: dict[str, Any]) -> tuple[nn.Module, Kind]:
    name = guess_kind(found) if kind is None else kind
    if name not in KINDS:
        raise InputError(f"unknown kind of weights {name!r}; known: {', '.join(KINDS)}")
    likely = guess_kind(found, name)
    if likely != name and {likely, name} != {"dit-1d", "sit-1d"}:  # which the tensors do not always tell apart
        raise InputError(f"{found.source} looks like {likely} ({KINDS[likely].what}), not like {name}")
    taken = KINDS[name].options
    if "heads" in taken and "num_heads" in options:  # either word
        if "heads" in options:
            raise InputError("heads and num_heads are the same: give one of them")
        options = {{"num_heads": "heads"}.get(key, key): value for key, value in options.items()}
    if unknown := [key for key in options if key not in taken]:
        raise InputError(f"{name} has no option {unknown[0]!r}; it has {', '.join(taken) or 'none'}")
    for key, value in options.items():
        wanted, kinds = _OPTION_TYPES.get(key, ("", object))
        if not isinstance(value, kinds) or (kinds is not object and isinstance(value, bool) and "true" not in wanted):
            raise InputError(f"{key} is {wanted}, got {value!r}")
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
    """Writes weights in our own format, for ``from_pretrained``; returns what was found and where it lies.

    ``weights`` may also be a directory of diffusers' DiTPipeline, or its Hub id: its VAE is then the tokenizer, its scheduler
    says what the generator predicts and by which schedule noise was added, and its classes have names. ``weights`` and
    ``tokenizer`` may be in our own format already; a generator's kind, and so how it was trained, is then yours to say.

    Args:
        tokenizer: weights of the tokenizer whose tokens a generator makes: ``out`` is then a pipeline's directory, as
            ``textok-fast sample`` and ``load_pipeline`` take it, and guides as published (:data:`GUIDED_CHANNELS`). For a
            DiT over 2-D latents an SD-VAE, for one over 1-D tokens their tokenizer. ``tokenizer_options``: what its shapes do
            not tell.
        schedule: linear or cosine, by which a Gaussian generator's noise was added; None for what the pipeline says, else the
            published one of its kind.

    Raises: InputError as :func:`load`, for a scheduler of noise that is not known here, and for an ``out`` in which the
        weights themselves lie.
    """
    from textok_fast.inference.pipelines import ClassToImagePipeline

    parts = _parts(weights, tokenizer)
    out = Path(out)
    _require_elsewhere(out, parts.weights, parts.tokenizer)
    if parts.tokenizer is None and (schedule is not None or tokenizer_options):
        given = "schedule" if schedule is not None else f"tokenizer.{next(iter(tokenizer_options or {}))}"
        raise InputError(f"{given} is for a pipeline: give the tokenizer whose tokens the generator makes, too")
    model, calls, name, what = _model_of(kind, parts, options)
    report: dict[str, Any] = {"kind": name, "what": what, "out": str(out), "class": type(model).__name__}
    report["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if parts.tokenizer is None:
        model.save_pretrained(out)  # type: ignore[operator]
        note_calls(out, calls)
        return report
    if not isinstance(model, DiT):
        raise InputError(f"a tokenizer goes with a generator, and {_shown(parts.weights)} is {what}")
    if name not in OBJECTIVES:
        kinds = ", ".join(OBJECTIVES)
        raise InputError(f"{_shown(parts.weights)} does not say how it was trained: give the kind it was ({kinds})")
    objective, published = OBJECTIVES[name]
    prediction = "epsilon"
    if parts.scheduler is not None and objective == "gaussian":
        prediction, published = gaussian_noise(parts.scheduler)
    if objective == "flow" and schedule is not None:
        raise InputError(f"{name} is a flow, to which no schedule adds noise: leave schedule out")
    decoder, decoder_calls, about = _decoder_of(parts.tokenizer, model, tokenizer_options or {})
    pipeline = ClassToImagePipeline(
        model, decoder, objective, parts.label_names, prediction=prediction, schedule=schedule or published
    )
    pipeline.save_pretrained(out)
    note_calls(out / "tokenizer", decoder_calls)
    return {**report, "tokenizer": about, "image_size": decoder.config.image_size}


OURS = "own"  # in place of a kind


def _model_of(kind: str | None, parts: _Parts, options: dict[str, Any]) -> tuple[nn.Module, str, str, str]:
    """(model, whose calls it has, kind, what it is); a kind that is not said is :data:`OURS` for our own format."""
    if (ours := _ours(parts.weights)) is not None:
        if options:
            raise InputError(f"{_shown(parts.weights)} is in this library's format: leave out {', '.join(options)}")
        model, calls = unwrapped(ours)
        is_dit = isinstance(model, DiT)
        if kind is not None and (kind in OBJECTIVES) != is_dit:
            raise InputError(f"{_shown(parts.weights)} is a {type(model).__name__} in this library's format, not {kind}")
        return model, calls, kind or OURS, f"a {type(ours).__name__} in this library's format"
    found = read_weights(parts.weights)
    name = guess_kind(found) if kind is None else kind
    if parts.tokenizer is not None and name in GUIDED_CHANNELS:
        options = {"guided_channels": GUIDED_CHANNELS[name], **options}
    built, known = _built(name, found, options)
    return built, known.calls, name, known.what


def _decoder_of(source: Source, generator: DiT, options: dict[str, Any]) -> tuple[TexTok | LatentTokenizer, str, str]:
    """(tokenizer, whose calls it has, what it is) for the tokens of a generator."""
    if (ours := _ours(source)) is not None:
        if options:
            raise InputError(f"{_shown(source)} is in this library's format: leave out tokenizer.{next(iter(options))}")
        decoder, calls = unwrapped(ours)
        about = f"a {type(ours).__name__} in this library's format"
    else:
        decoder, known = _built(None, read_weights(source), options)
        calls, about = known.calls, known.what
    if is_autoencoder(decoder):
        if "image_size" in options:
            raise InputError("the generator says of which size its pictures are: leave tokenizer.image_size out")
        made = LatentTokenizer(decoder)
        size = generator.config.input_size * made.config.factor  # pictures of any size
        decoder = LatentTokenizer(decoder, size or None)
    if not isinstance(decoder, (TexTok, LatentTokenizer)):
        raise InputError(f"a pipeline decodes with a tokenizer, got {about}")
    return decoder, calls, about


class _Parts(NamedTuple):
    """What :func:`convert` was given, or found in a directory of diffusers' DiTPipeline."""

    weights: Source
    tokenizer: Source | None
    scheduler: Mapping[str, Any] | None = None
    label_names: Sequence[str] = ()


def _parts(weights: Source, tokenizer: Source | None) -> _Parts:
    """The transformer of a DiTPipeline's directory, with its scheduler, names and, unless another tokenizer is given, its VAE;
    or the transformer's own directory in it. All else as it is, downloaded."""
    tokenizer = locate(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    if not isinstance(weights, str | Path):
        return _Parts(weights, tokenizer)
    path = locate(weights)
    if (path / PIPELINE_NAME).is_file():
        refuse_pipeline(path, weights, diffusers_too=False)
        tokenizer = path / "vae" if tokenizer is None else tokenizer
        return _Parts(path / "transformer", tokenizer, read_scheduler(path), _label_names(path))
    if path.name == "transformer" and (path.parent / PIPELINE_NAME).is_file() and tokenizer is not None:
        return _Parts(path, tokenizer, read_scheduler(path.parent), _label_names(path.parent))
    return _Parts(path, tokenizer)


def _label_names(pipeline: Path) -> list[str]:
    """What model_index.json calls the classes, DiTPipeline's or TexTokPipeline's, by index; [] where it does not."""
    try:
        index = json.loads((pipeline / PIPELINE_NAME).read_text(encoding="utf-8"))
        names = index.get("id2label") or dict(enumerate(index.get("label_names") or []))
        by_index = {int(number): str(name) for number, name in names.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read the names of classes in {pipeline / PIPELINE_NAME}: {error}") from None
    return [by_index.get(number, str(number)) for number in range(max(by_index, default=-1) + 1)]


def _require_elsewhere(out: Path, *sources: Source | None) -> None:
    """InputError where ``out`` is a directory that weights are read from, or writes into one."""
    written = {path.expanduser().resolve() for path in (out, out / "generator", out / "tokenizer")}
    for source in sources:
        if isinstance(source, str | Path):
            path = Path(source).expanduser()
            if (path if path.is_dir() else path.parent).resolve() in written:
                raise InputError(f"{out} would overwrite files beside the weights in {source}: choose another directory")


def _shown(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "the given state dict"
