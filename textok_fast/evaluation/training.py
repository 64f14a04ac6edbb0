"""How fast training steps are, and how near to what the machine can do: ``textok-fast bench training``.

A step is what the training loop does between two batches, on inputs that lie on the device: forward, loss, backward, clipping,
AdamW, moving average. The tokenizer is measured by itself and with LPIPS, the discriminator and its step, as published. All
forms of a network and precision run in turn, round after round, on the same weights. Left out: data loading, the frozen text
encoder, and R1's penalty, which is in one step of many.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from textok_fast.config import (
    GENERATOR_SIZES,
    TOKENIZER_SIZES,
    DiscriminatorConfig,
    DiTConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    TexTokConfig,
)
from textok_fast.diffusion import build_process
from textok_fast.errors import InputError
from textok_fast.evaluation.provenance import provenance, reporter
from textok_fast.evaluation.roofline import Ceilings, count_flops, measure_ceilings, time_call, use_threads
from textok_fast.evaluation.step_times import Spread
from textok_fast.modeling import DiT, TexTok
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.ops.device import resolve_device
from textok_fast.ops.dispatch import use_backend
from textok_fast.training.critic import GanCritic
from textok_fast.training.loop import StepRandom
from textok_fast.training.losses import tokenizer_loss
from textok_fast.training.optim import ExponentialMovingAverage, build_optimizers
from textok_fast.training.parallel import check_run, place, precision
from textok_fast.training.perceptual import LPIPS

SYSTEMS = ("tokenizer", "adversarial", "generator")
# form -> what it is, and its settings of a run. "plain" has the operations' PyTorch references and AdamW as torch chooses it.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("eager PyTorch, no operation fused", {}),
    "fused": ("our operations, fused AdamW", {}),
    "compile": ("the same with blocks by torch.compile", {"compile": True}),
    "recompute": ("our operations, blocks recomputed in the backward pass", {"activation_checkpointing": True}),
}
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp8": "fp8"}  # and what a run calls them
WARMUP = 2  # steps before the clock starts: torch.compile compiles in the first


@dataclass
class TrainingConfig:
    """What to measure. Sizes, batches and precisions left empty follow the device: TexTok-base and DiT-XL in bf16 on a GPU,
    TexTok-small and DiT-S in fp32 and bf16 on a CPU.

    ``systems``: "adversarial" is the tokenizer with LPIPS over VGG16, the StyleGAN2 discriminator with LeCAM, and the adaptive
    weight. ``tokens`` a picture; ``image_size`` in pixels; ``text_length`` tokens of a caption, read by the tokenizer on both
    sides. The generator is class-conditional on Gaussian diffusion, as published. ``rounds``: each form is timed once in each.
    """

    systems: tuple[str, ...] = SYSTEMS
    forms: tuple[str, ...] = ("plain", "fused", "compile")
    precisions: tuple[str, ...] = ()
    tokenizer: str = ""
    generator: str = ""
    tokenizer_batch: int = 0
    generator_batch: int = 0
    tokens: int = 32
    image_size: int = 256
    text_length: int = 128
    rounds: int = 7
    threads: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        on_gpu = resolve_device(self.device).type == "cuda"
        self.tokenizer = self.tokenizer or ("base" if on_gpu else "small")
        self.generator = self.generator or ("XL" if on_gpu else "S")
        self.tokenizer_batch = self.tokenizer_batch or (32 if on_gpu else 2)
        self.generator_batch = self.generator_batch or (256 if on_gpu else 16)
        self.precisions = self.precisions or (("bf16",) if on_gpu else ("fp32", "bf16"))
        choices: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
            "systems": (self.systems, SYSTEMS),
            "forms": (self.forms, tuple(FORMS)),
            "precisions": (self.precisions, tuple(PRECISIONS)),
            "tokenizer": ((self.tokenizer,), tuple(TOKENIZER_SIZES)),
            "generator": ((self.generator,), tuple(GENERATOR_SIZES)),
        }
        for name, (given, known) in choices.items():
            if not given or (unknown := [value for value in given if value not in known]):
                what = f"got {unknown[0]!r}" if given else "got none"
                raise InputError(f"{name} must be of {', '.join(known)}; {what}")
        for name in ("systems", "forms", "precisions"):
            setattr(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for name in ("tokenizer_batch", "generator_batch", "tokens", "image_size", "text_length", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for dtype in self.precisions:
            check_run(RunConfig(mixed_precision=PRECISIONS[dtype]), resolve_device(self.device), 1)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrainingRow:
    """One network in one form and precision. ``wall`` and ``processor``: seconds a step; ``ratio``: how many times faster than
    "plain", round by round. ``flops``: of the network's forward and backward pass, what is computed again not counted, so that
    ``utilisation`` (of the ceiling of this precision) is comparable between forms. ``memory``: peak bytes on a GPU."""

    system: str
    network: str
    form: str
    precision: str
    batch: int
    parameters: int
    wall: Spread
    processor: Spread
    images_per_s: float
    flops: int
    utilisation: float
    ratio: Spread | None
    memory: int | None


@dataclass
class TrainingResult:
    config: TrainingConfig
    rows: list[TrainingRow]
    ceilings: list[Ceilings]
    device: str
    threads: int
    machine: dict[str, Any]
    command: str
    date: str  # ISO 8601, UTC

    def to_dict(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        config = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self.config).items()}
        rows, ceilings = [dataclasses.asdict(row) for row in self.rows], [entry.to_dict() for entry in self.ceilings]
        return {**values, "config": config, "rows": rows, "ceilings": ceilings}

    def to_markdown(self) -> str:
        headings: tuple[str, ...] = (
            "network",
            "precision",
            "batch",
            "form",
            "images/s",
            "ms a step (p25 .. p75)",
            "of the ceiling",
            "faster than plain",
        )
        headings += ("CPU ms",) if self.device == "cpu" else ("peak GB",)
        lines = ["| " + " | ".join(headings) + " |", "|---|---|---:|---|" + "---:|" * (len(headings) - 4)]
        for row in self.rows:
            wall, ratio = row.wall, row.ratio
            cells = [row.network, row.precision, str(row.batch), row.form, f"{row.images_per_s:.3g}"]
            cells.append(f"{1e3 * wall.median:.4g} ({1e3 * wall.p25:.4g} .. {1e3 * wall.p75:.4g})")
            cells.append(f"{row.utilisation:.0%}")
            cells.append(f"{ratio.median:.2f}x ({ratio.min:.2f} .. {ratio.max:.2f})" if ratio else "")
            cells.append(f"{1e3 * row.processor.median:.4g}" if row.memory is None else f"{row.memory / 1e9:.3g}")
            lines.append("| " + " | ".join(cells) + " |")
        where = self.machine["cpu"] if self.device == "cpu" else self.machine["gpus"][0]["name"]
        ceilings = ", ".join(f"{entry.dtype} {entry.matmul_flops / 1e12:.3g} TFLOP/s" for entry in self.ceilings)
        forms = "; ".join(f"{name}: {FORMS[name][0]}" for name in self.config.forms)
        notes = [
            f"{forms}.",
            "A step: forward, loss, backward, clipping, AdamW, moving average, and where it is named LPIPS and the "
            "discriminator's own step; without data loading, text encoder and R1's penalty. Share of the ceiling: FLOPs of "
            f"forward and backward over time and over the fastest matrix product measured in the same run ({ceilings}).",
            f"{self.date}, {where}, {self.threads} thread(s), torch {self.machine['torch']}, commit "
            f"{self.machine['git_commit'] or 'unknown'}: `{self.command}`",
        ]
        return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


class Judge:
    """What the published loss of a tokenizer has beside l2, of random weights: LPIPS and a discriminator."""

    def __init__(self, model: TexTok, batch: int, device: torch.device) -> None:
        self.weights = LossConfig(lpips=1.0, gan=0.1, lecam=0.001)
        with device:
            self.perceptual = LPIPS()
            discriminator = DiscriminatorConfig(stddev_group=math.gcd(batch, DiscriminatorConfig().stddev_group))
            self.critic = GanCritic(self.weights, discriminator, model.config.image_size)
        for head in self.perceptual.heads:
            torch.nn.init.ones_(head)
        self.last_layer = model.last_layer

    def loss(self, output: Any, pixels: Tensor) -> Tensor:
        opposition = self.critic.oppose(pixels, output.reconstruction)
        return tokenizer_loss(output, pixels, self.weights, self.perceptual, opposition, self.last_layer)["loss"]

    def own_loss(self, forward: Any, device: torch.device) -> Tensor:
        """The discriminator's, on the pictures that :meth:`loss` judged last."""
        return self.critic.loss(forward, StepRandom(0, 1, 0, 0, 1, device))["loss"]


@dataclass(frozen=True)
class System:
    """A network to train and its loss on inputs that are drawn once. ``judged``: whether by a :class:`Judge` too."""

    name: str
    batch: int
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.device], tuple[Any, ...]]
    loss: Callable[..., Tensor]  # of the network, the inputs and a judge
    judged: bool = False

    def judge(self, model: nn.Module, device: torch.device) -> Judge | None:
        if not self.judged:
            return None
        assert isinstance(model, TexTok)
        return Judge(model, self.batch, device)

    def flops(self) -> int:
        """Of one step's forward and backward passes, counted on the meta device."""
        meta = torch.device("meta")
        with meta:
            model = self.build()
        judge = self.judge(model, meta)

        def step() -> None:
            self.loss(model, self.inputs(meta), judge).backward()
            if judge is not None:
                judge.own_loss(judge.critic.model, meta).backward()

        return count_flops(step, backward=True)


def systems(config: TrainingConfig) -> dict[str, System]:
    """What ``config`` names."""
    sizes = {"num_tokens": config.tokens, "image_size": config.image_size, "max_text_tokens": config.text_length}
    tokenizer = TexTokConfig.named(config.tokenizer, **sizes)
    generator = DiTConfig.named(config.generator, num_tokens=config.tokens, in_channels=tokenizer.latent_dim)
    process = build_process("gaussian", generator.learn_sigma, "epsilon")

    def tokenizer_inputs(device: torch.device) -> tuple[Any, ...]:
        batch, length = config.tokenizer_batch, config.text_length
        pixels = torch.rand(batch, 3, config.image_size, config.image_size, device=device) * 2 - 1
        mask = torch.ones(batch, length, dtype=torch.bool, device=device)
        return pixels, TextFeatures(torch.randn(batch, length, tokenizer.text_dim, device=device), mask)

    def generator_inputs(device: torch.device) -> tuple[Any, ...]:
        batch = config.generator_batch
        x = torch.randn(2, batch, config.tokens, generator.in_channels, device=device)  # tokens and noise
        t = torch.arange(batch, device=device) * 37 % 1000
        return x[0], x[1], t, torch.arange(batch, device=device) % generator.num_classes

    def tokenizer_step(model: nn.Module, inputs: tuple[Any, ...], judge: Judge | None = None) -> Tensor:
        pixels, text = inputs
        output = model(pixels, text)
        return tokenizer_loss(output, pixels, LossConfig())["loss"] if judge is None else judge.loss(output, pixels)

    def generator_step(model: nn.Module, inputs: tuple[Any, ...], judge: Judge | None = None) -> Tensor:
        x, noise, t, labels = inputs
        if x.is_meta:  # where the schedule's numbers are not
            return model(x, t, labels).float().mean()
        return process.training_losses(lambda x, t: model(x, t, labels).float(), x, t, noise)["loss"].mean()

    name = f"TexTok-{config.tokenizer}, {config.tokens} tokens, {config.image_size} px"
    of_tokenizer = (config.tokenizer_batch, lambda: TexTok(tokenizer), tokenizer_inputs, tokenizer_step)
    return {
        "tokenizer": System(name, *of_tokenizer),
        "adversarial": System(f"{name}, LPIPS and discriminator", *of_tokenizer, judged=True),
        "generator": System(
            f"DiT-{config.generator} over {config.tokens} tokens",
            config.generator_batch,
            lambda: DiT(generator),
            generator_inputs,
            generator_step,
        ),
    }


def run_training(
    config: TrainingConfig,
    command: str | None = None,
    progress: bool = True,
    on_result: Callable[[TrainingResult], None] | None = None,
) -> TrainingResult:
    """Measures every system, precision and form of ``config``; ``on_result`` gets what is there after each precision."""
    device, say = resolve_device(config.device), reporter(progress)
    ceilings: dict[str, Ceilings] = {}
    with use_threads(config.threads) as threads:
        result = TrainingResult(config, [], [], str(device), threads, **provenance(command))
        for dtype in config.precisions:
            say(f"{dtype}: measuring the ceiling of {device}, {threads} thread(s)")
            ceilings[dtype] = measure_ceilings(device, dtype)
            for name in config.systems:
                system = systems(config)[name]
                samples = _measure(config, system, dtype, device, say)
                # Again, and the better of the two: a neighbour's load at one moment must not lower the ceiling.
                ceilings[dtype] = ceilings[dtype].better(measure_ceilings(device, dtype))
                result.rows += _rows(name, system, dtype, samples, ceilings[dtype])
                result.ceilings = list(ceilings.values())
                if on_result is not None:
                    on_result(result)
    return result


@dataclass
class _Samples:
    """(wall, processor) seconds of each round."""

    parameters: int
    times: list[tuple[float, float]] = field(default_factory=list)
    memory: int | None = None


def _measure(
    config: TrainingConfig, system: System, dtype: str, device: torch.device, say: Callable[[str], None]
) -> dict[str, _Samples]:
    torch.manual_seed(config.seed)
    with torch.device(device):
        model = system.build()
    with torch.no_grad():  # as initialised, gates and output of a DiT are 0
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    inputs = system.inputs(device)
    steps, samples = {}, {}
    for form in config.forms:
        steps[form] = _step(system, model, form, dtype, inputs, device)
        samples[form] = _Samples(sum(parameter.numel() for parameter in model.parameters()))
        for _ in range(WARMUP):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds = time_call(steps[form], device)[0]
            samples[form].memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        say(f"{system.name}, {dtype}, {form}: about {seconds:.3g} s a step")
    for index in range(config.rounds):
        for form, step in steps.items():
            samples[form].times.append(time_call(step, device))
        medians = ", ".join(f"{form} {statistics.median(wall for wall, _ in s.times):.4g} s" for form, s in samples.items())
        say(f"{system.name}, {dtype}: round {index + 1} of {config.rounds}; medians {medians}")
    return samples


def _step(
    system: System, model: nn.Module, form: str, dtype: str, inputs: tuple[Any, ...], device: torch.device
) -> Callable[[], None]:
    """One training step of ``model`` in a form. Forms share the parameters; each has an optimizer."""
    own = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    run = RunConfig(mixed_precision=PRECISIONS[dtype], **FORMS[form][1])  # type: ignore[arg-type]
    optim, plain = OptimConfig(lr=1e-4, ema_decay=0.9999), form == "plain"
    network = place(own, run, device, 1)
    optimizers = build_optimizers(own, optim, fused=None if plain else True)
    average, taken = ExponentialMovingAverage(own, optim.ema_decay), 0
    judge = system.judge(own, device)
    if judge is not None:
        opponent = place(judge.critic.model, run, device, 1)
        opposing = build_optimizers(judge.critic.model, judge.critic.optim, fused=None if plain else True)

    def step() -> None:
        nonlocal taken
        with use_backend("reference") if plain else nullcontext():
            with precision(run, device):
                loss = system.loss(network.forward, inputs, judge)
            network.descend(loss, optimizers, optim.grad_clip, 1, True)
            if judge is not None:
                with precision(run, device):
                    loss = judge.own_loss(opponent.forward, device)
                opponent.descend(loss, opposing, judge.critic.optim.grad_clip, 1, True)
                judge.critic.end_step()
        average.update(own, taken)
        taken += 1

    return step


def _rows(name: str, system: System, dtype: str, samples: dict[str, _Samples], ceiling: Ceilings) -> list[TrainingRow]:
    flops, rows = system.flops(), []
    for form, sample in samples.items():
        wall = Spread.of([wall for wall, _ in sample.times])
        ratio = None
        if form != "plain" and "plain" in samples:
            ratio = Spread.of([a / b for (a, _), (b, _) in zip(samples["plain"].times, sample.times, strict=True)])
        rows.append(
            TrainingRow(
                system=name,
                network=system.name,
                form=form,
                precision=dtype,
                batch=system.batch,
                parameters=sample.parameters,
                wall=wall,
                processor=Spread.of([processor for _, processor in sample.times]),
                images_per_s=system.batch / wall.median,
                flops=flops,
                utilisation=flops / wall.median / ceiling.matmul_flops,
                ratio=ratio,
                memory=sample.memory,
            )
        )
    return rows
