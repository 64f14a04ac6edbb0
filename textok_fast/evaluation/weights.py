"""Somebody's weights timed on this machine: as their authors run them, in PyTorch, and through the engine, in turn."""

from __future__ import annotations

import copy
import dataclasses
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
from textok_fast.inference.engine import Engine
from textok_fast.inference.plan import Plan
from textok_fast.interop import load
from textok_fast.modeling import DiT, TexTok
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.ops.device import resolve_device
from textok_fast.ops.dispatch import use_backend

PRECISIONS = ("fp32", "bf16", "int8", "fp8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the authors' form; the other precisions are the engine's


@dataclass
class WeightsConfig:
    """``weights`` and ``kind`` as ``textok-fast convert`` takes them; ``heads`` where the width is no published one.

    A generator is timed by its forward, a tokenizer by encoding and decoding, each at every ``batch``. ``text_tokens``: of the
    features that a tokenizer with text is given.
    """

    weights: str = ""
    kind: str | None = None
    heads: int | None = None
    precisions: tuple[str, ...] = ("fp32", "bf16")
    batch: tuple[int, ...] = (1,)
    text_tokens: int = 77
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

    ``ratio``: this median over the engine's in the same precision. ``error``: norm of the difference to the authors' form in
    float32, over the norm.
    """

    call: str  # forward, encode, decode
    form: str  # authors', engine
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
        if self.skipped:
            lines += ["", "Not measured:", "", *(f"- {line}" for line in self.skipped)]
        return "\n".join(lines) + "\n"


Call = Callable[[], Tensor]


def run_weights(config: WeightsConfig, command: str | None = None, progress: bool = True) -> WeightsResult:
    """Times the weights that ``config`` names. ``progress``: lines on stderr.

    Raises: InputError for what :func:`textok_fast.interop.load` refuses, and for the SD-VAE, which has one form only.
    """
    device, say = resolve_device(config.device), reporter(progress)
    options = {} if config.heads is None else {"heads": config.heads}
    found: Any = load(config.kind, config.weights, **options)
    model = found if isinstance(found, (DiT, TexTok)) else getattr(found, "tokenizer", None)
    if not isinstance(model, (DiT, TexTok)):
        raise InputError("the SD-VAE runs as diffusers has it and has no other form: `bench speedup` times it in whole systems")
    model = model.to(device).requires_grad_(False)
    result = WeightsResult(config, _describe(model), [], [], str(device), 0, **provenance(command))
    with use_threads(config.threads) as threads, torch.inference_mode():
        result.threads = threads
        for batch in config.batch:
            torch.manual_seed(config.seed)
            inputs = _inputs(model, batch, config.text_tokens, device)
            wanted = {name: call().float() for name, call in _authors(model, inputs, torch.float32).items()}
            for precision in config.precisions:
                forms: dict[str, dict[str, Call]] = {}
                if precision in DTYPES:
                    forms["authors'"] = _authors(model, inputs, DTYPES[precision])
                try:
                    plan = Plan.automatic(device, precision=cast(Any, precision), batch=batch)
                    forms["engine"] = _engine(model, inputs, plan)
                except InputError as error:
                    result.skipped.append(f"engine, {precision}, batch {batch}: {error}")
                for name in wanted:
                    result.rows += _turns(name, precision, batch, forms, wanted[name], device, config.rounds)
                    times = ", ".join(f"{row.form} {row.wall.median:.4g} s" for row in result.rows[-len(forms) :])
                    say(f"{name}, {precision}, batch {batch}: {times}")
    return result


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


def _describe(model: DiT | TexTok) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config: Any = model.config
    if isinstance(model, DiT):
        what = f"DiT of width {config.width}, depth {config.depth}, over {config.sequence_length:,} tokens"
    else:
        what = f"Tokenizer of {config.image_size} px and {config.num_tokens} tokens of {config.latent_dim}"
    return f"{what}, {parameters:,} parameters"


def _inputs(model: DiT | TexTok, batch: int, length: int, device: torch.device) -> dict[str, Any]:
    if isinstance(model, DiT):
        x, t, y = step_inputs(model.config, batch, device, torch.float32)
        return {"x": x, "t": t, "y": y}
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


def _authors(model: DiT | TexTok, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Call]:
    """The network operation by operation, attention by scaled_dot_product_attention, in eager PyTorch."""
    copied: Any = copy.deepcopy(model).to(dtype)
    if isinstance(model, DiT):
        plain = model.config.qk_norm or model.config.text_dim
        network: nn.Module = copied if plain else OriginalDiT(copied)
        return {"forward": _in_pytorch(lambda: network(inputs["x"].to(dtype), inputs["t"], inputs["y"]))}
    return _tokenizer_calls(copied, inputs, dtype, _in_pytorch)


def _engine(model: DiT | TexTok, inputs: dict[str, Any], plan: Plan) -> dict[str, Call]:
    engine: Any = Engine(cast(Any, model), plan)
    if isinstance(model, DiT):
        x = inputs["x"].to(engine.dtype)
        return {"forward": lambda: engine(x, inputs["t"], inputs["y"])}
    return _tokenizer_calls(engine, inputs, engine.dtype, lambda call: call)


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
