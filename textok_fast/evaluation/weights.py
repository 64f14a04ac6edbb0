"""Somebody's weights timed on this machine: as their peer runs them, in eager PyTorch, and through the engine, in turn.

The peer's form of what is diffusers' is diffusers' own model: DiTTransformer2DModel, AutoencoderKL. Of the others, whose code
is no package, it is the network operation by operation with scaled_dot_product_attention. Results say which it was.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from textok_fast.errors import InputError
from textok_fast.evaluation.peers import OriginalDiT, relative_error
from textok_fast.evaluation.provenance import provenance, reporter
from textok_fast.evaluation.roofline import time_call, use_threads
from textok_fast.evaluation.step_times import Spread, step_inputs
from textok_fast.inference.autoencoder import PRECISION
from textok_fast.inference.engine import Engine
from textok_fast.inference.plan import Plan
from textok_fast.interop import to_diffusers_dit
from textok_fast.interop.convert import load_and_tell
from textok_fast.modeling import DiT, TexTok
from textok_fast.modeling.autoencoder import LatentTokenizer, is_autoencoder
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.ops.device import resolve_device
from textok_fast.ops.dispatch import use_backend

PRECISIONS = ("fp32", "bf16", "int8", "fp8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the peer's form; the other precisions are the engine's
DIFFUSERS = {"diffusers-dit": "DiTTransformer2DModel", "sd-vae": "AutoencoderKL"}  # kind -> the model that is the peer's form


@dataclass
class WeightsConfig:
    """``weights`` and ``kind`` as ``textok-fast convert`` takes them; ``heads`` where the width is no published one,
    ``temperature`` and ``axial_theta`` where a SoftVQ-VAE's or a MAETok's config.json does not say them.

    A generator is timed by its forward, a tokenizer or an autoencoder by encoding and decoding, each at every ``batch``.
    ``text_tokens``: of the features that a tokenizer with text is given. ``image_size``: of an autoencoder's pictures; None is
    what its config says.
    """

    weights: str = ""
    kind: str | None = None
    heads: int | None = None
    temperature: float | None = None
    axial_theta: float | None = None
    precisions: tuple[str, ...] = ("fp32", "bf16")
    batch: tuple[int, ...] = (1,)
    text_tokens: int = 77
    image_size: int | None = None
    rounds: int = 7
    threads: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        self.precisions, self.batch = tuple(self.precisions), tuple(self.batch)
        if not self.weights:
            raise InputError("give the weights: weights=FILE, a directory, or a Hub id")
        if unknown := [each for each in self.precisions if each not in PRECISIONS]:
            raise InputError(f"unknown precision {unknown[0]!r}; known: {', '.join(PRECISIONS)}")
        if not self.precisions or not self.batch or min(*self.batch, self.rounds, self.text_tokens) < 1:
            raise InputError("precisions and batch name at least one each; batch, rounds and text_tokens are at least 1")


@dataclass(frozen=True)
class WeightsRow:
    """Wall seconds of one call.

    ``ratio``: this median over the engine's in the same precision. ``error``: norm of the difference to the peer's form in
    float32, over the norm.
    """

    call: str  # forward, encode, decode
    form: str  # authors' or diffusers, and engine
    precision: str
    batch: int
    wall: Spread
    ratio: float | None
    error: float


@dataclass
class WeightsResult:
    """All that one run measured and where, JSON-ready through :meth:`to_dict`."""

    config: WeightsConfig
    what: str
    forms: dict[str, str]  # name -> what it is
    rows: list[WeightsRow]
    skipped: list[str]
    device: str
    threads: int
    machine: dict[str, Any]
    command: str
    date: str

    def to_dict(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        config = json.loads(json.dumps(dataclasses.asdict(self.config)))
        return {**values, "config": config, "rows": [dataclasses.asdict(row) for row in self.rows]}

    def to_markdown(self) -> str:
        where = self.machine["cpu"] if self.device == "cpu" else self.machine["gpus"][0]["name"]
        commit = self.machine["git_commit"] or "unknown"
        lines = [
            f"# {self.what}",
            "",
            f"{self.date}, {where}, {self.threads} thread(s), torch {self.machine['torch']}; commit {commit}. "
            f"Taking turns over {self.config.rounds} rounds. Milliseconds of wall time.",
            "",
            f"`{self.command}`",
            "",
            "| call | batch | precision | form | median (quartiles) | x engine | error |",
            "|---|---:|---|---|---:|---:|---:|",
        ]
        for row in self.rows:
            times = f"{row.wall.median * 1e3:.4g} ({row.wall.p25 * 1e3:.4g} to {row.wall.p75 * 1e3:.4g})"
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            cells = (row.call, str(row.batch), row.precision, row.form, times, ratio, f"{row.error:.1e}")
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"- {name}: {what}" for name, what in self.forms.items())]
        if self.skipped:
            lines += ["", "Not measured:", "", *(f"- {line}" for line in self.skipped)]
        return "\n".join(lines) + "\n"


Call = Callable[[], Tensor]
Model = DiT | TexTok | nn.Module  # the last diffusers' AutoencoderKL


def run_weights(config: WeightsConfig, command: str | None = None, progress: bool = True) -> WeightsResult:
    """Times the weights that ``config`` names. ``progress``: lines on stderr.

    Raises: InputError for what :func:`textok_fast.interop.load` refuses.
    """
    device, say = resolve_device(config.device), reporter(progress)
    given = {name: getattr(config, name) for name in ("heads", "temperature", "axial_theta", "image_size")}
    options = {name: value for name, value in given.items() if value is not None}
    found, kind = load_and_tell(config.kind, config.weights, **options)
    known = isinstance(found, (DiT, TexTok)) or is_autoencoder(found)
    chosen: Any = found if known else found.tokenizer
    model: Model = chosen.to(device).requires_grad_(False)
    peer, about = _peer_form(kind)
    forms = {peer: about, "engine": "textok_fast.inference"}
    result = WeightsResult(config, _describe(model), forms, [], [], str(device), 0, **provenance(command))
    with use_threads(config.threads) as threads, torch.inference_mode():
        result.threads = threads
        for batch in config.batch:
            torch.manual_seed(config.seed)
            inputs = _inputs(model, batch, config.text_tokens, device)
            wanted = {name: call().float() for name, call in _peer(peer, model, inputs, torch.float32).items()}
            for precision in config.precisions:
                calls: dict[str, dict[str, Call]] = {}
                if precision in DTYPES:
                    calls[peer] = _peer(peer, model, inputs, DTYPES[precision])
                try:
                    plan = Plan.automatic(device, precision=cast(Any, precision), batch=batch)
                    calls["engine"] = _engine(model, inputs, plan)
                except InputError as error:
                    result.skipped.append(f"engine, {precision}, batch {batch}: {error}")
                if not calls:
                    continue
                for name in wanted:
                    result.rows += _turns(name, precision, batch, calls, wanted[name], device, config.rounds)
                    times = ", ".join(f"{row.form} {row.wall.median:.4g} s" for row in result.rows[-len(calls) :])
                    say(f"{name}, {precision}, batch {batch}: {times}")
    return result


def _peer_form(kind: str) -> tuple[str, str]:
    """The name of the peer's form of weights of a kind, and what it is."""
    if kind in DIFFUSERS and importlib.util.find_spec("diffusers") is not None:
        return "diffusers", f"diffusers' own {DIFFUSERS[kind]}, eager PyTorch"
    return "authors'", "the network operation by operation, scaled_dot_product_attention, eager PyTorch"


def _turns(
    name: str,
    precision: str,
    batch: int,
    forms: dict[str, dict[str, Call]],
    wanted: Tensor,
    device: torch.device,
    rounds: int,
) -> list[WeightsRow]:
    calls = {form: made[name] for form, made in forms.items()}
    errors = {form: relative_error(call().float(), wanted) for form, call in calls.items()}  # the warm-up too
    times: dict[str, list[float]] = {form: [] for form in calls}
    for index in range(rounds):
        order = list(calls)
        for form in order if index % 2 == 0 else order[::-1]:
            times[form].append(time_call(calls[form], device)[0])
    walls = {form: Spread.of(taken) for form, taken in times.items()}
    engine = walls["engine"].median if "engine" in walls else None
    return [
        WeightsRow(name, form, precision, batch, wall, None if engine is None else wall.median / engine, errors[form])
        for form, wall in walls.items()
    ]


def _describe(model: Model) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config: Any = model.config
    if isinstance(model, DiT):
        what = f"DiT of width {config.width}, depth {config.depth}, over {config.sequence_length:,} tokens"
    elif isinstance(model, TexTok):
        what = f"Tokenizer of {config.image_size} px and {config.num_tokens} tokens of {config.latent_dim}"
    else:
        config = LatentTokenizer(model).config
        side = config.image_size // config.factor
        what = f"Autoencoder of {config.image_size} px and latents of {config.channels} x {side} x {side}"
    return f"{what}, {parameters:,} parameters"


def _inputs(model: Model, batch: int, length: int, device: torch.device) -> dict[str, Any]:
    if isinstance(model, DiT):
        x, t, y = step_inputs(model.config, batch, device, torch.float32)
        return {"x": x, "t": t, "y": y}
    if not isinstance(model, TexTok):
        shape = LatentTokenizer(model).config
        side = shape.image_size // shape.factor
        pixels = torch.rand(batch, 3, shape.image_size, shape.image_size, device=device) * 2 - 1
        return {"pixels": pixels, "latents": torch.randn(batch, shape.channels, side, side, device=device) / shape.scale}
    config = model.config
    text = None
    if config.text != "none":
        length = min(length, config.max_text_tokens) if config.text_positions else length
        features = torch.randn(batch, length, config.text_dim, device=device)
        text = TextFeatures(features, torch.ones(batch, length, dtype=torch.bool, device=device))
    pictures = torch.randint(0, 256, (batch, config.image_size, config.image_size, 3), dtype=torch.uint8, device=device)
    tokens = torch.randn(batch, config.num_tokens, config.latent_dim, device=device)
    if model.bottleneck.codebook_size:
        tokens = torch.randint(0, model.bottleneck.codebook_size, (batch, config.num_tokens), device=device)
    return {"pictures": pictures, "tokens": tokens, "text": text}


def _peer(form: str, model: Model, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Call]:
    """The calls of the peer's form of this name in eager PyTorch."""
    copied: Any = nn.Module.to(copy.deepcopy(model), dtype)  # diffusers' own `to` warns of what it does anyway
    if not isinstance(model, (DiT, TexTok)):
        return _autoencoder_calls(copied, inputs, dtype)
    if isinstance(model, TexTok):
        return _tokenizer_calls(copied, inputs, dtype, _in_pytorch)
    x, t, y = inputs["x"].to(dtype), inputs["t"], inputs["y"]
    if form == "diffusers":
        theirs = to_diffusers_dit(copied)
        return {"forward": lambda: theirs(x, t, y, return_dict=False)[0]}
    plain = model.config.qk_norm or model.config.text_dim
    network: nn.Module = copied if plain else OriginalDiT(copied)
    return {"forward": _in_pytorch(lambda: network(x, t, y))}


def _engine(model: Model, inputs: dict[str, Any], plan: Plan) -> dict[str, Call]:
    if not isinstance(model, (DiT, TexTok)) and plan.precision not in DTYPES:
        raise InputError(f"an autoencoder has no form in {plan.precision}: its engine would run in {PRECISION[plan.precision]}")
    engine: Any = Engine(model, plan)
    if isinstance(model, DiT):
        x = inputs["x"].to(engine.dtype)
        return {"forward": lambda: engine(x, inputs["t"], inputs["y"])}
    if isinstance(model, TexTok):
        return _tokenizer_calls(engine, inputs, engine.dtype, lambda call: call)
    return _autoencoder_calls(engine, inputs, engine.dtype)


def _autoencoder_calls(autoencoder: Any, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Call]:
    pixels, latents = inputs["pixels"].to(dtype), inputs["latents"].to(dtype)
    return {
        "encode": lambda: autoencoder.encode(pixels).latent_dist.mode(),
        "decode": lambda: autoencoder.decode(latents).sample,
    }


def _tokenizer_calls(
    tokenizer: Any, inputs: dict[str, Any], dtype: torch.dtype, form: Callable[[Call], Call]
) -> dict[str, Call]:
    text = None if inputs["text"] is None else TextFeatures(inputs["text"].features.to(dtype), inputs["text"].mask)
    tokens = inputs["tokens"].to(dtype) if inputs["tokens"].is_floating_point() else inputs["tokens"]
    return {
        "encode": form(lambda: tokenizer.encode(inputs["pictures"], text).as_subclass(Tensor)),
        "decode": form(lambda: tokenizer.decode(tokens, text)),
    }


def _in_pytorch(call: Call) -> Call:
    def run() -> Tensor:
        with use_backend("reference"):
            return call()

    return run
