"""How far our engine's results are from what the network means: one forward against float64, whole samples against float32.

Every number is measured when the report is made; the targets stand beside them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from textok_fast.config import GENERATOR_SIZES, TexTokConfig
from textok_fast.diffusion import FlowMatching, Process, guided, sample
from textok_fast.errors import InputError
from textok_fast.evaluation.provenance import provenance, reporter
from textok_fast.evaluation.roofline import use_threads
from textok_fast.evaluation.step_times import network_config, step_inputs
from textok_fast.inference.engine import Engine
from textok_fast.inference.pipelines import load_pipeline, seeded_noise
from textok_fast.inference.plan import Plan, StepCache
from textok_fast.modeling import LatentTokenizer, TexTok
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.ops.device import resolve_device
from textok_fast.ops.dispatch import use_backend

Precision = Literal["fp32", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8", "fp8")
FORWARD_TARGETS = {"bf16": 1e-2, "fp8": 4e-2}  # norm of the difference to float64 over the norm, at most
SAMPLE_TARGETS = {"bf16": 30.0}  # dB of the tokens' PSNR to float32's, at least
PICTURE_PEAK = 2.0  # pictures are in [-1, 1]
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)  # of noise, where the forward is measured


@dataclass
class ParityConfig:
    """What to measure. ``size`` and ``tokens``: a DiT with random weights drawn from ``seed``, its output scaled to variance 1.

    ``weights``: "even", every product keeping its input's variance, so that gates, shifts and scales are of the order of 1 and
    all blocks count in full, which is hard on a low precision; or "normal", all of standard deviation 0.02 as in the speed
    benchmarks, where blocks add little and errors in them hardly show. Trained networks lie between.
    ``model``: a folder with a trained generator and its tokenizer instead. ``sampler``: empty for euler with random weights (a
    flow: its samples move as far as its velocities say) and for the default of a trained model. ``guidance_scale`` with
    ``guidance_interval``, in the model's time as a fraction of it: what the interval changes is measured too.
    ``step_caches``: intervals of a step cache whose effect is measured.
    """

    size: str = "S"
    tokens: int = 32
    weights: str = "even"
    model: str | None = None
    precisions: tuple[str, ...] = PRECISIONS
    batch: int = 2
    steps: int = 50
    sampler: str = ""
    guidance_scale: float = 2.0
    guidance_interval: tuple[float, float] = (0.1, 0.7)
    step_caches: tuple[int, ...] = (2, 3)
    threads: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        self.precisions, self.step_caches = tuple(self.precisions), tuple(self.step_caches)
        self.guidance_interval = cast(tuple[float, float], tuple(self.guidance_interval))
        if self.size not in GENERATOR_SIZES:
            raise InputError(f"unknown size {self.size!r}; known: {', '.join(GENERATOR_SIZES)}")
        if self.weights not in ("even", "normal"):
            raise InputError(f"weights must be even or normal, got {self.weights!r}")
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise InputError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
        if not self.precisions:
            raise InputError(f"precisions must name at least one of {', '.join(PRECISIONS)}")
        for name in ("tokens", "batch", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1:
            raise InputError(f"guidance_interval must be 0 <= low < high <= 1, got {self.guidance_interval}")
        for interval in self.step_caches:
            StepCache(interval)


@dataclass(frozen=True)
class ForwardParity:
    """One precision's forward against float64: the norm of the difference over the norm, at each level of noise.

    ``mean`` and ``worst`` of the levels; ``target``: what ``worst`` may be, None for none; ``how``: what it ran on: the engine,
    or PyTorch for comparison, whose error in bf16 is what the precision itself costs.
    """

    precision: str
    mean: float
    worst: float
    target: float | None
    met: bool | None
    how: str


@dataclass(frozen=True)
class SampleParity:
    """A whole sample against the float32 sample of PyTorch's form, from the same noise. PSNR in dB, inf for no difference.

    ``tokens``: with the range of the float32 tokens as peak; ``pictures``: decoded by one float32 tokenizer, peak 2, the range
    of pictures. ``relative``: norm of the tokens' difference over the norm. ``target``: what ``tokens`` must reach.
    """

    name: str
    precision: str
    tokens: float
    pictures: float | None
    relative: float
    target: float | None
    met: bool | None


@dataclass
class ParityResult:
    """``samples`` are of the precisions, ``options`` of what changes a sample on purpose; ``skipped``: what, and why."""

    config: ParityConfig
    network: str
    sampler: str
    token_peak: float
    forwards: list[ForwardParity]
    samples: list[SampleParity]
    options: list[SampleParity]
    skipped: list[str]
    device: str
    machine: dict[str, Any]
    command: str
    date: str  # ISO 8601, UTC

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite PSNR is None, which JSON has no number for."""

        def finite(entry: SampleParity) -> dict[str, Any]:
            return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in dataclasses.asdict(entry).items()}

        config = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.config).items()}
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)} | {
            "config": config,
            "forwards": [dataclasses.asdict(entry) for entry in self.forwards],
            "samples": [finite(entry) for entry in self.samples],
            "options": [finite(entry) for entry in self.options],
        }

    def to_markdown(self) -> str:
        config = self.config
        where = self.machine["cpu"] if self.device == "cpu" else self.machine["gpus"][0]["name"]
        lines = [
            "# Parity",
            "",
            f"{self.network}; {self.date}, {where}; commit {self.machine['git_commit'] or 'unknown'}.",
            "",
            f"`{self.command}`",
            "",
            "## One forward against float64",
            "",
            f"Norm of the difference over the norm, batch {config.batch}, at {len(LEVELS)} levels of noise.",
            "",
            "| precision | mean | worst | target | met | ran |",
            "| --- | ---: | ---: | ---: | --- | --- |",
        ]
        for forward in self.forwards:
            target = "" if forward.target is None else f"at most {forward.target:.0e}"
            cells = (forward.precision, f"{forward.mean:.2e}", f"{forward.worst:.2e}", target, _yes(forward.met), forward.how)
            lines.append(f"| {' | '.join(cells)} |")
        peak = f"PSNR in dB; peak of the tokens: their range in float32, {self.token_peak:.4g}; of the pictures, in [-1, 1]: 2"
        guidance = f"guidance {config.guidance_scale:g}"
        tables = (
            (f"## Whole samples against float32: {self.sampler}, {config.steps} steps, {guidance}", self.samples),
            ("## What options change, against the float32 sample without them", self.options),
        )
        for title, entries in tables:
            lines += ["", title, "", f"Same noise. {peak}.", ""]
            lines += [
                "| | precision | tokens | pictures | relative | target | met |",
                "| --- | --- | ---: | ---: | ---: | ---: | --- |",
            ]
            for entry in entries:
                target = "" if entry.target is None else f"above {entry.target:g} dB"
                pictures = "" if entry.pictures is None else _decibel(entry.pictures)
                values = (_decibel(entry.tokens), pictures, f"{entry.relative:.2e}", target, _yes(entry.met))
                lines.append(f"| {' | '.join((entry.name, entry.precision, *values))} |")
        if self.skipped:
            lines += ["", "Not measured:", "", *(f"- {line}" for line in self.skipped)]
        return "\n".join(lines) + "\n"


def run_parity(config: ParityConfig, command: str | None = None, progress: bool = True) -> ParityResult:
    """Measures every precision that the device has; the others are in ``skipped``. ``progress``: lines on stderr.

    Raises InputError for a folder that holds no generator, and for a sampler that does not suit it.
    """
    device = resolve_device(config.device)
    say = reporter(progress)
    with use_threads(config.threads), torch.inference_mode():
        subject = _trained(config, device) if config.model else _random(config, device)
        say(f"{subject.name}: the forward in float64")
        forwards, skipped = _forwards(config, subject, device, say)
        samples, options, peak = _samples(config, subject, device, skipped, say)
    return ParityResult(
        config=config,
        network=subject.name,
        sampler=subject.sampler,
        token_peak=peak,
        forwards=forwards,
        samples=samples,
        options=options,
        skipped=skipped,
        device=str(device),
        **provenance(command),
    )


def psnr_db(got: Tensor, wanted: Tensor, peak: float) -> float:
    """10 log10(peak^2 / mean (got - wanted)^2) in float64; inf for equal tensors."""
    error = float((got.double() - wanted.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted|| in float64."""
    wanted = wanted.double()
    return float((got.double() - wanted).norm() / wanted.norm())


# -- what is measured --------------------------------------------------------------------------------------------------------


@dataclass
class _Subject:
    """A float32 network, how it is sampled, and conditions for ``batch`` samples."""

    name: str
    model: DiT
    tokenizer: TexTok | LatentTokenizer | None
    process: Process
    sampler: str
    labels: Tensor | None  # (B,) int64
    text: TextFeatures | None
    noise: Tensor  # (B, N, d) or (B, C, S, S)

    @property
    def duration(self) -> float:
        """The model's time at the noise end."""
        return 1.0 if self.process.objective == "flow" else 1000.0

    def times(self, level: float) -> Tensor:
        """A time of the model for a level of noise in [0, 1]: (B,)."""
        value = level * self.duration
        batch, device = len(self.noise), self.noise.device
        if self.process.objective == "flow":
            return torch.full((batch,), value, device=device)
        return torch.full((batch,), int(value), dtype=torch.int64, device=device)


def _random(config: ParityConfig, device: torch.device) -> _Subject:
    title, settings = network_config(config.size, config.tokens)
    # Without variance channels: a flow has none.
    settings = dataclasses.replace(settings, learn_sigma=False, time_scale=1000.0)
    torch.manual_seed(config.seed)
    model = DiT(settings).eval().requires_grad_(False)
    # As DiT is initialised its blocks add nothing, and errors in them would not show.
    even = config.weights == "even"
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5 if even else 0.02)
            nn.init.normal_(module.bias, std=0.02)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 if even else 0.02)
    if not even and isinstance(model.pos_embed, nn.Parameter):
        nn.init.normal_(model.pos_embed, std=0.02)
    model.to(device)
    torch.manual_seed(config.seed)
    noise, _, labels = step_inputs(settings, config.batch, device, torch.float32)
    with use_backend("reference"):
        spread = model(noise, torch.full((config.batch,), 0.5, device=device), labels).std()
    for tensor in (model.final_layer.linear.weight, model.final_layer.linear.bias):
        tensor.div_(spread)
    tokenizer = None
    if settings.num_tokens:
        sizes = {"num_tokens": config.tokens, "latent_dim": settings.in_channels, "image_size": 64, "text": "none"}
        tokenizer = TexTok(TexTokConfig.named("tiny", **sizes)).to(device).eval()
    name = f"{title} with random weights ({config.weights}), as a flow"
    return _Subject(name, model, tokenizer, FlowMatching(), config.sampler or "euler", labels, None, noise)


def _trained(config: ParityConfig, device: torch.device) -> _Subject:
    assert config.model is not None
    pipeline = load_pipeline(config.model).to(device)
    model, settings = pipeline.generator.float(), pipeline.generator.config
    torch.manual_seed(config.seed)
    noise, _, labels = step_inputs(settings, config.batch, device, torch.float32)
    text = None
    if settings.text_dim:
        captions = [f"a picture, number {index}" for index in range(config.batch)]
        text = pipeline.text_features(captions)
    sampler = config.sampler or ("euler" if pipeline.objective == "flow" else "ddim")
    known = labels if settings.num_classes else None
    name = f"the generator in {Path(config.model).name}"
    return _Subject(name, model, pipeline.tokenizer.float(), pipeline.process, sampler, known, text, noise)


def _forwards(
    config: ParityConfig, subject: _Subject, device: torch.device, say: Callable[[str], None]
) -> tuple[list[ForwardParity], list[str]]:
    skipped: list[str] = []
    exact = copy.deepcopy(subject.model).double()
    arguments = [(subject.noise, subject.times(level), subject.labels) for level in LEVELS]
    text = None if subject.text is None else TextFeatures(subject.text.features.double(), subject.text.mask)
    with use_backend("reference", attention="reference"):
        wanted = [exact(x.double(), t, y, text) for x, t, y in arguments]
    del exact
    rows = []
    asked = cast(Sequence[Precision], config.precisions)
    for precision, eager in [(each, False) for each in asked] + [(each, True) for each in asked if each in ("fp32", "bf16")]:
        try:
            forward, how = _forward(subject, precision, eager, device)
        except InputError as error:
            skipped.append(f"forward in {precision}: {error}")
            continue
        errors = [relative_error(forward(x, t, y), right) for (x, t, y), right in zip(arguments, wanted, strict=True)]
        target = None if eager else FORWARD_TARGETS.get(precision)
        met = None if target is None else max(errors) <= target
        rows.append(ForwardParity(precision, sum(errors) / len(errors), max(errors), target, met, how))
        say(f"forward in {precision}, {how}: {max(errors):.2e}")
    return rows, skipped


def _forward(subject: _Subject, precision: Precision, eager: bool, device: torch.device) -> tuple[Callable[..., Tensor], str]:
    if eager:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model = copy.deepcopy(subject.model).to(dtype)
        text = None if subject.text is None else TextFeatures(subject.text.features.to(dtype), subject.text.mask)

        def forward(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            with use_backend("reference"):
                return cast(Tensor, model(x.to(dtype), t, y, text))

        return forward, "PyTorch, for comparison"
    engine = Engine(subject.model, _plan(precision, device))
    emulated = ", emulated" if precision == "fp8" and device.type == "cpu" else ""  # same rounding, other speed
    return lambda x, t, y: engine(x, t, y, subject.text), f"engine{emulated}"


def _plan(precision: Precision, device: torch.device, **fields: Any) -> Plan:
    return Plan.automatic(device, precision=precision, **fields)


def _samples(
    config: ParityConfig, subject: _Subject, device: torch.device, skipped: list[str], say: Callable[[str], None]
) -> tuple[list[SampleParity], list[SampleParity], float]:
    say("a whole sample in float32, PyTorch's form")
    wanted = _reference_sample(config, subject)
    decode = _decoder(subject)
    picture = None if decode is None else decode(wanted)
    peak = float(wanted.max() - wanted.min())

    def compare(name: str, precision: Precision, target: float | None, interval: bool, **fields: Any) -> SampleParity | None:
        try:
            got = _engine_sample(config, subject, _plan(precision, device, **fields), interval)
        except InputError as error:
            skipped.append(f"sample, {name} in {precision}: {error}")
            return None
        tokens = psnr_db(got, wanted, peak)
        pictures = None if decode is None or picture is None else psnr_db(decode(got), picture, PICTURE_PEAK)
        say(f"sample, {name} in {precision}: {tokens:.1f} dB")
        met = None if target is None else tokens > target
        return SampleParity(name, precision, tokens, pictures, relative_error(got, wanted), target, met)

    precisions = cast(Sequence[Precision], config.precisions)
    found = [compare("engine", precision, SAMPLE_TARGETS.get(precision), False) for precision in precisions]
    low, high = config.guidance_interval
    options = [compare(f"guidance in [{low:g}, {high:g}] only", "fp32", None, True)] if config.guidance_scale != 1 else []
    for interval in config.step_caches:
        name = f"step cache, interval {interval}"
        options.append(compare(name, "fp32", None, False, step_cache=StepCache(interval)))
    return [row for row in found if row is not None], [row for row in options if row is not None], peak


def _reference_sample(config: ParityConfig, subject: _Subject) -> Tensor:
    """By the library's own sampler over the eager network: nothing of the engine is in it."""
    model, settings = subject.model, subject.model.config
    text = subject.text
    condition = (subject.labels, text)
    null = (
        None if subject.labels is None else torch.full_like(subject.labels, settings.num_classes),
        None if text is None else TextFeatures(text.features, torch.zeros_like(text.mask)),
    )

    def network(x: Tensor, t: Tensor, given: tuple[Tensor | None, TextFeatures | None]) -> Tensor:
        return model(x, t, given[0], None if given[1] is None else TextFeatures(*given[1]))

    with use_backend("reference"):
        pair = guided(network, condition, null, config.guidance_scale, channels=settings.guided_channels or None)
        source = seeded_noise(range(config.batch), subject.noise.device)  # as the engine draws it
        return sample(subject.sampler, pair, subject.noise, config.steps, subject.process, source)


def _engine_sample(config: ParityConfig, subject: _Subject, plan: Plan, interval: bool) -> Tensor:
    low, high = (bound * subject.duration for bound in config.guidance_interval)
    engine = Engine(subject.model, plan)
    return engine.sample(
        subject.process,
        labels=subject.labels,
        text=subject.text,
        seeds=list(range(config.batch)),
        sampler=subject.sampler,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        guidance_interval=(low, high) if interval else None,
        noise=subject.noise,
    )


def _decoder(subject: _Subject) -> Callable[[Tensor], Tensor] | None:
    tokenizer = subject.tokenizer
    if tokenizer is None:
        return None

    def decode(tokens: Tensor) -> Tensor:
        with use_backend("reference"):
            return tokenizer.decode(tokens.float())

    return decode


def _decibel(value: float) -> str:
    return "no difference" if math.isinf(value) else f"{value:.1f}"


def _yes(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "**no**"
