"""How much faster one denoising step of a DiT is over few tokens than over many: ``textok-fast bench steps``.

All token counts of a dtype and batch run in turn, round after round, in one process: what disturbs the machine disturbs
each of them. One step is one forward of the reference PyTorch network, the same blocks each time; what precedes it (text
encoder) and follows it (decoder, sampler arithmetic) is not in it; whole systems are compared in :mod:`.speedup`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from textok_fast.config import GENERATOR_SIZES, DiTConfig
from textok_fast.errors import InputError
from textok_fast.evaluation.plots import Level, Series, line_plot
from textok_fast.evaluation.provenance import provenance, reporter
from textok_fast.evaluation.roofline import (
    Ceilings,
    count_flops,
    measure_ceilings,
    time_call,
    torch_dtype,
    use_threads,
)
from textok_fast.files import write_text
from textok_fast.ops.device import resolve_device
from textok_fast.ops.dispatch import use_backend

PUBLISHED_SPEEDUP = 93.5
PUBLISHED_CLAIM = (
    "TexTok-32 + DiT-XL against DiT-XL/2, ImageNet 512 px, generating a whole image as published (arXiv 2412.05796)"
)
TEXTOK_TOKENS = (32, 64, 128, 256)  # the token counts that TexTok was published with
WARMUP_SECONDS = 2.0  # one warm-up step is enough for a network whose step alone is this long
REPEATS = 8  # most steps that a fast network takes in one round


@dataclass
class StepTimesConfig:
    """What to measure. ``tokens`` are transformer tokens; each count is compared with the smallest one.

    ``rounds``: at most so many, at least ``min_rounds``, and as many as ``time_budget_s`` allows (seconds for the whole run;
    None: no limit). ``threads``: None keeps torch's number. ``guidance``: the network runs on twice the batch, as a step with
    classifier-free guidance does. ``warmup``: steps before the clock starts, fewer where one takes long.
    """

    size: str = "XL"
    tokens: tuple[int, ...] = (32, 1024, 4096)
    batch: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    threads: int | None = None
    rounds: int = 10
    min_rounds: int = 3
    warmup: int = 2
    device: str = "auto"
    guidance: bool = False
    time_budget_s: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.tokens, self.batch, self.dtypes = tuple(sorted(set(self.tokens))), tuple(self.batch), tuple(self.dtypes)
        if self.size not in GENERATOR_SIZES:
            raise InputError(f"unknown size {self.size!r}; known: {', '.join(GENERATOR_SIZES)}")
        for name in ("tokens", "batch"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise InputError(f"{name} must be one or more numbers of at least 1, got {list(values)}")
        if not self.dtypes:
            raise InputError("dtypes must name at least one of fp32, bf16, fp16")
        for dtype in self.dtypes:
            torch_dtype(dtype)
        if self.warmup < 0 or self.min_rounds < 1 or self.rounds < self.min_rounds:
            raise InputError(
                f"warmup must be at least 0 and 1 <= min_rounds <= rounds; got warmup={self.warmup}, "
                f"min_rounds={self.min_rounds}, rounds={self.rounds}"
            )
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads must be at least 1, got {self.threads}")
        if self.time_budget_s is not None and not self.time_budget_s > 0:
            raise InputError(f"time_budget_s must be above 0 seconds, got {self.time_budget_s}")


@dataclass(frozen=True)
class Spread:
    """Smallest value, quartiles and largest one. Seconds for steps, a plain number for ratios."""

    min: float
    p25: float
    median: float
    p75: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = torch.tensor(sorted(values), dtype=torch.float64)
        p25, p75 = (float(torch.quantile(ordered, q)) for q in (0.25, 0.75))
        return cls(min(values), p25, statistics.median(values), p75, max(values))


@dataclass(frozen=True)
class StepTimesRow:
    """One network at one dtype and batch. ``wall`` and ``processor`` are seconds a step over all ``steps``;
    ``round_wall``, ``round_processor`` the median of each round. FLOPs are of one step; rates are at the median wall time."""

    tokens: int
    network: str
    dtype: str
    batch: int
    model_batch: int  # twice the batch with guidance
    parameters: int
    rounds: int
    steps: int
    wall: Spread
    processor: Spread
    round_wall: list[float]
    round_processor: list[float]
    flops: int
    flops_per_s: float
    peak_share: float  # of the measured matmul ceiling of this dtype
    weight_bytes: int  # read once a step; embedding tables, of which a step reads one row an image, are left out
    weight_bytes_per_s: float
    read_share: float  # of the measured read ceiling


@dataclass(frozen=True)
class StepTimesRatio:
    """How many times longer ``tokens`` takes than ``base_tokens``. ``wall`` and ``processor`` are ratios of medians, the
    spreads are of the ratios of the two networks round by round; ``flops`` is the ratio of the counted FLOPs."""

    dtype: str
    batch: int
    tokens: int
    base_tokens: int
    network: str
    base_network: str
    wall: float
    wall_by_round: Spread
    processor: float
    processor_by_round: Spread
    flops: float


@dataclass
class StepTimesResult:
    """All that one run measured and where, JSON-ready through :meth:`to_dict`."""

    config: StepTimesConfig
    rows: list[StepTimesRow]
    ratios: list[StepTimesRatio]
    ceilings: list[Ceilings]
    machine: dict[str, Any]
    device: str
    threads: int
    command: str
    date: str  # ISO 8601, UTC
    duration_s: float
    published: dict[str, Any] = field(default_factory=lambda: {"speedup": PUBLISHED_SPEEDUP, "claim": PUBLISHED_CLAIM})

    def to_dict(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        for name in ("rows", "ratios"):
            values[name] = [dataclasses.asdict(entry) for entry in values[name]]
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.config).items()}
        return {**values, "config": config, "ceilings": [entry.to_dict() for entry in self.ceilings]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StepTimesResult:
        """The inverse of :meth:`to_dict`. Raises :class:`InputError` for something else."""

        def spreads(entry: dict[str, Any], *names: str) -> dict[str, Any]:
            return {**entry, **{name: Spread(**entry[name]) for name in names}}

        try:
            return cls(
                **{
                    **values,
                    "config": StepTimesConfig(**values["config"]),
                    "rows": [StepTimesRow(**spreads(row, "wall", "processor")) for row in values["rows"]],
                    "ratios": [StepTimesRatio(**spreads(r, "wall_by_round", "processor_by_round")) for r in values["ratios"]],
                    "ceilings": [Ceilings.from_dict(entry) for entry in values["ceilings"]],
                }
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"this is not a result of the step-time benchmark: {error}") from None

    def row(self, tokens: int, dtype: str, batch: int) -> StepTimesRow:
        for row in self.rows:
            if (row.tokens, row.dtype, row.batch) == (tokens, dtype, batch):
                return row
        raise InputError(f"nothing was measured for {tokens} tokens, {dtype}, batch {batch}")


def network_config(size: str, tokens: int) -> tuple[str, DiTConfig]:
    """The network that stands for a number of transformer tokens, with its name.

    32 to 256: TexTok-N tokens of 8 channels. 1,024 and 4,096: the patches of 64 x 64 x 4 latents (512 px) with patch size 2
    (``DiT-XL/2``) and 1 (``DiT-XL/1``). Any other number: 1-D tokens of 8 channels.
    """
    if tokens in (1024, 4096):
        patch = 2 if tokens == 1024 else 1
        name = f"DiT-{size}/{patch} at 512 px"
        return name, DiTConfig.named(size, input_size=64, patch_size=patch, in_channels=4, num_classes=1000)
    name = f"TexTok-{tokens} + DiT-{size}" if tokens in TEXTOK_TOKENS else f"DiT-{size} over {tokens} 1-D tokens"
    return name, DiTConfig.named(size, num_tokens=tokens, in_channels=8, num_classes=1000)


@functools.cache
def step_flops(size: str, tokens: int, batch: int = 1) -> int:
    """FLOPs of one forward, counted on the meta device: no memory, no time."""
    _, config = network_config(size, tokens)
    model = _meta_model(config)
    inputs = step_inputs(config, batch, torch.device("meta"), torch.float32)
    return count_flops(lambda: model(*inputs))


def run_step_times(
    config: StepTimesConfig,
    command: str | None = None,
    progress: bool = True,
    on_result: Callable[[StepTimesResult], None] | None = None,
) -> StepTimesResult:
    """Measures every token count of ``config`` in turn and returns times, rates, and ratios to the smallest count.

    ``command`` is recorded as how to repeat the run; the process's own command line by default. ``progress``: lines on stderr.
    ``on_result`` gets what is measured so far after each dtype and batch, and on Ctrl-C with the rounds that all networks have
    finished; then the interrupt passes on. Networks of one dtype share their block weights, so memory is one network's and the
    activations of the largest count.
    """
    started, device = time.perf_counter(), resolve_device(config.device)
    say = reporter(progress)
    ceilings: dict[str, Ceilings] = {}
    groups = [(dtype, batch) for dtype in config.dtypes for batch in config.batch]
    deadline = None if config.time_budget_s is None else started + config.time_budget_s

    def result(rows: list[StepTimesRow]) -> StepTimesResult:
        found = StepTimesResult(
            config=config,
            rows=rows,
            ratios=_ratios(rows),
            ceilings=list(ceilings.values()),
            **origin,
            device=str(device),
            threads=threads,
            duration_s=time.perf_counter() - started,
        )
        if rows and on_result is not None:
            on_result(found)
        return found

    rows: list[StepTimesRow] = []
    # The networks in their PyTorch form, on both sides; what our operations add is for benchmarks/test_dit_step.py to say.
    with use_threads(config.threads) as threads, torch.inference_mode(), use_backend("reference"):
        origin = provenance(command)
        for dtype in config.dtypes:
            say(f"{dtype}: measuring the ceilings of {device}, {threads} thread(s)")
            ceilings[dtype] = measure_ceilings(device, dtype)
            say(f"{dtype}: building DiT-{config.size} over {', '.join(map(str, config.tokens))} tokens")
            networks = build_networks(config, device, torch_dtype(dtype))
            measured: list[_Samples] = []
            try:
                for batch in config.batch:
                    share = len(groups) - groups.index((dtype, batch))
                    budget = None if deadline is None else (deadline - time.perf_counter()) / share
                    _measure_group(config, networks, dtype, batch, device, budget, say, measured)
                    result(rows + _rows(measured, networks, ceilings[dtype]))
            except KeyboardInterrupt:
                result(rows + _rows(measured, networks, ceilings[dtype]))
                raise
            # again, and the better of the two: a neighbour's load at one moment must not lower the ceiling
            ceilings[dtype] = ceilings[dtype].better(measure_ceilings(device, dtype))
            rows += _rows(measured, networks, ceilings[dtype])
            del networks
        return result(rows)


@dataclass(frozen=True)
class Network:
    """A network ready to be timed, by the name it is reported under."""

    name: str
    config: DiTConfig
    model: nn.Module


@dataclass
class _Samples:
    """Times of one network at one dtype and batch: (wall, processor) seconds, round by round."""

    tokens: int
    dtype: str
    batch: int
    model_batch: int
    flops: int
    rounds: list[list[tuple[float, float]]] = field(default_factory=list)


def _meta_model(config: DiTConfig) -> nn.Module:
    from textok_fast.modeling import DiT

    with torch.device("meta"):
        return DiT(config).eval()


def build_networks(config: StepTimesConfig, device: torch.device, dtype: torch.dtype) -> dict[int, Network]:
    """One network for each of ``config.tokens``, of :class:`RandomWeights`: their blocks share their tensors."""
    weights = RandomWeights(device, dtype, config.seed)
    networks = {}
    for tokens in config.tokens:
        name, network = network_config(config.size, tokens)
        networks[tokens] = Network(name, network, weights.fill(_meta_model(network)))
    return networks


class RandomWeights:
    """Gives networks values N(0, 0.02): tensors of the same name and shape are one tensor, in whatever networks.

    Every value is random: as initialised, the gates of adaLN-Zero are 0, and products with zeros or denormals may be faster
    or slower than real ones.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._shared: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def fill(self, model: nn.Module) -> nn.Module:
        """``model``, made on the meta device, with values in place of its parameters and buffers; frozen, in eval mode."""
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            place = (key, tuple(tensor.shape))
            if place not in self._shared:
                self._shared[place] = self._draw(tensor)
            _replace(model, key, self._shared[place])
        return model.requires_grad_(False).eval()

    def _draw(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device)
        values = torch.empty(tensor.shape, device=self.device).normal_(0, 0.02, generator=self._generator)
        return values.to(self.dtype)


def _replace(model: nn.Module, key: str, value: Tensor) -> None:
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[name] = value


def step_inputs(config: DiTConfig, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random x (B, N, d) or (B, C, H, W) in ``dtype``, t (B,) float32 and y (B,) int64 for one step."""
    sample = (
        (batch, config.num_tokens, config.in_channels)
        if config.num_tokens
        else (batch, config.in_channels, config.input_size, config.input_size)
    )
    x = torch.randn(sample, device=device).to(dtype)  # (B, N, d) or (B, C, H, W)
    t = torch.full((batch,), 500.0, device=device)  # (B,)
    y = torch.arange(batch, device=device) % max(1, config.num_classes)  # (B,)
    return x, t, y


def _measure_group(
    config: StepTimesConfig,
    networks: dict[int, Network],
    dtype: str,
    batch: int,
    device: torch.device,
    budget: float | None,
    say: Callable[[str], None],
    measured: list[_Samples],
) -> None:
    """Round-robin over the token counts of one dtype and batch, after a warm-up of each; whole rounds go to ``measured``."""
    model_batch = 2 * batch if config.guidance else batch
    started, steps, samples, typical = time.perf_counter(), {}, {}, {}
    for tokens, network in networks.items():
        inputs = step_inputs(network.config, model_batch, device, torch_dtype(dtype))
        steps[tokens] = _step(network.model, inputs)
        samples[tokens] = _Samples(tokens, dtype, batch, model_batch, step_flops(config.size, tokens, model_batch))
        spent, taken = 0.0, []
        for _ in range(max(1, config.warmup)):  # one at least: it also tells how long a step takes
            taken.append(time_call(steps[tokens], device)[0])
            spent += taken[-1]
            if spent > WARMUP_SECONDS:
                break
        typical[tokens] = min(taken)
        say(f"{dtype} batch {batch}: {network.name}, {tokens} tokens, about {typical[tokens]:.4g} s a step")
    # A fast network takes several steps a round, so that its share of the noise is not the larger one.
    slowest = max(typical.values())
    repeats = {tokens: min(REPEATS, max(1, round(0.05 * slowest / typical[tokens]))) for tokens in networks}
    rounds = config.rounds
    if budget is not None:
        one_round = sum(typical[tokens] * repeats[tokens] for tokens in networks)
        left = budget - (time.perf_counter() - started)
        rounds = max(config.min_rounds, min(config.rounds, int(left / one_round)))
    measured += samples.values()
    for index in range(rounds):
        times = {tokens: [time_call(steps[tokens], device) for _ in range(repeats[tokens])] for tokens in networks}
        for tokens, taken_now in times.items():
            samples[tokens].rounds.append(taken_now)
        seconds = ", ".join(f"{tokens}: {statistics.median(w for w, _ in s.rounds[-1]):.4g} s" for tokens, s in samples.items())
        say(f"{dtype} batch {batch}: round {index + 1} of {rounds}; {seconds}")


def _step(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    return lambda: model(*inputs)


def _rows(measured: list[_Samples], networks: dict[int, Network], ceiling: Ceilings) -> list[StepTimesRow]:
    rows = []
    for samples in measured:
        if not samples.rounds:
            continue
        network = networks[samples.tokens]
        times = [time for one_round in samples.rounds for time in one_round]
        wall, processor = Spread.of([wall for wall, _ in times]), Spread.of([cpu for _, cpu in times])
        weight_bytes = _weight_bytes(network.model)
        rows.append(
            StepTimesRow(
                tokens=samples.tokens,
                network=network.name,
                dtype=samples.dtype,
                batch=samples.batch,
                model_batch=samples.model_batch,
                parameters=sum(parameter.numel() for parameter in network.model.parameters()),
                rounds=len(samples.rounds),
                steps=len(times),
                wall=wall,
                processor=processor,
                round_wall=[statistics.median(wall for wall, _ in one_round) for one_round in samples.rounds],
                round_processor=[statistics.median(cpu for _, cpu in one_round) for one_round in samples.rounds],
                flops=samples.flops,
                flops_per_s=samples.flops / wall.median,
                peak_share=samples.flops / wall.median / ceiling.matmul_flops,
                weight_bytes=weight_bytes,
                weight_bytes_per_s=weight_bytes / wall.median,
                read_share=weight_bytes / wall.median / ceiling.read_bytes,
            )
        )
    return rows


def _weight_bytes(model: nn.Module) -> int:
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)


def _ratios(rows: list[StepTimesRow]) -> list[StepTimesRatio]:
    ratios = []
    for row in rows:
        base = min((r for r in rows if (r.dtype, r.batch) == (row.dtype, row.batch)), key=lambda r: r.tokens)
        if base is row:
            continue
        ratios.append(
            StepTimesRatio(
                dtype=row.dtype,
                batch=row.batch,
                tokens=row.tokens,
                base_tokens=base.tokens,
                network=row.network,
                base_network=base.network,
                wall=row.wall.median / base.wall.median,
                wall_by_round=Spread.of([_divide(a, b) for a, b in zip(row.round_wall, base.round_wall, strict=True)]),
                processor=_divide(row.processor.median, base.processor.median),
                processor_by_round=Spread.of(
                    [_divide(a, b) for a, b in zip(row.round_processor, base.round_processor, strict=True)]
                ),
                flops=row.flops / base.flops,
            )
        )
    return ratios


def _divide(a: float, b: float) -> float:
    # The processor clock of some systems ticks in milliseconds: a tiny network's step may read 0.
    return a / max(b, 1e-6)


# -- what a reader sees ---------------------------------------------------------------------------------------------------

HEADINGS = (
    "network",
    "tokens",
    "dtype",
    "batch",
    "ms/step",
    "p25 .. p75",
    "CPU ms",
    "rounds",
    "GFLOP",
    "GFLOP/s",
    "of peak",
    "weights GB/s",
    "x slower (by round)",
    "CPU x",
)


def table_cells(result: StepTimesResult) -> list[list[str]]:
    """The result as rows of text under :data:`HEADINGS`; the last two compare with the smallest token count."""
    ratios = {(ratio.dtype, ratio.batch, ratio.tokens): ratio for ratio in result.ratios}
    cells = []
    for row in result.rows:
        ratio = ratios.get((row.dtype, row.batch, row.tokens))
        spread = ratio.wall_by_round if ratio else None
        cells.append(
            [
                row.network,
                f"{row.tokens:,}",
                row.dtype,
                str(row.batch) if row.batch == row.model_batch else f"{row.batch} (guided)",
                _figures(1000 * row.wall.median),
                f"{_figures(1000 * row.wall.p25)} .. {_figures(1000 * row.wall.p75)}",
                _figures(1000 * row.processor.median),
                str(row.rounds),
                _figures(row.flops / 1e9),
                _figures(row.flops_per_s / 1e9),
                f"{100 * row.peak_share:.0f} %",
                _figures(row.weight_bytes_per_s / 1e9),
                f"{_figures(ratio.wall)} ({_figures(spread.min)} .. {_figures(spread.max)})" if ratio and spread else "1",
                _figures(ratio.processor) if ratio else "1",
            ]
        )
    return cells


def console_table(result: StepTimesResult) -> str:
    """An aligned table in plain text, with the ceilings and the machine below it."""
    cells = [list(HEADINGS), *table_cells(result)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    lines = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for name, *rest in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", *_footnotes(result)])


def markdown_table(result: StepTimesResult) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    lines += ["| " + " | ".join(line) + " |" for line in table_cells(result)]
    return "\n".join([*lines, "", *(f"- {note}" for note in _footnotes(result)), ""])


def _footnotes(result: StepTimesResult) -> list[str]:
    machine = result.machine
    notes = [
        f"Ceiling {c.dtype}: {_figures(c.matmul_flops / 1e9)} GFLOP/s (torch matmul {' x '.join(map(str, c.matmul_shape))}), "
        f"{_figures(c.read_bytes / 1e9)} GB/s read, {_figures(c.copy_bytes / 1e9)} GB/s copy."
        for c in result.ceilings
    ]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    return [
        *notes,
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {result.threads} thread(s){', ' + gpus if gpus else ''}; run on "
        f"{result.device}; torch {machine['torch']}, Python {machine['python']}, commit {machine['git_commit'] or 'unknown'}.",
        "One step = one forward of the reference PyTorch network, random weights. Published for comparison: "
        f"{result.published['speedup']}x, {result.published['claim']}.",
        f"{result.date}, {result.duration_s:.0f} s: {result.command}",
    ]


def step_times_svg(result: StepTimesResult, standalone: bool = False) -> str:
    """How many times longer a step takes than at the smallest token count, over the token count, both logarithmic, with the
    published 93.5x as a dashed line. One line a dtype (and batch)."""
    series = []
    many = len({row.batch for row in result.rows}) > 1
    base = min((row.tokens for row in result.rows), default=0)
    for dtype, batch in dict.fromkeys((row.dtype, row.batch) for row in result.rows):
        ratios = [r for r in result.ratios if (r.dtype, r.batch) == (dtype, batch)]
        points = [(float(base), 1.0), *((float(r.tokens), r.wall) for r in ratios)]
        labels = ["", *(f"{_figures(r.wall)}x" for r in ratios)]
        series.append(Series(f"{dtype}, batch {batch}" if many else dtype, points, labels, markers=True))
    where = "CPU" if result.device == "cpu" else "GPU"
    if len(series) == 1:
        where += f", {series[0].name}"
    return line_plot(
        f"DiT-{result.config.size}: a step at N / {base} tokens ({where})",
        "transformer tokens N",
        f"times the step at {base} tokens",
        series,
        [Level(float(result.published["speedup"]), f"published {result.published['speedup']}x (32 tokens against DiT-XL/2)")],
        log=True,
        x_ticks=[float(row.tokens) for row in result.rows],
        standalone=standalone,
    )


def _figures(value: float) -> str:
    """Three significant figures, never in exponent form above 1e-4."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# -- files ----------------------------------------------------------------------------------------------------------------


def save(result: StepTimesResult, path: str | Path) -> list[Path]:
    """Writes ``path`` (JSON), and beside it under the same name the table (``.md``) and the plot (``.svg``). Returns the paths.

    A killed run leaves the former files whole. Raises OSError for a place that cannot be written.
    """
    path = Path(path).with_suffix(".json")
    texts = {
        path: json.dumps(result.to_dict(), indent=2) + "\n",
        path.with_suffix(".md"): markdown_table(result),
        path.with_suffix(".svg"): step_times_svg(result, standalone=True) + "\n",
    }
    for target, text in texts.items():
        write_text(target, text)
    return list(texts)


def load(path: str | Path) -> StepTimesResult:
    """A result from :func:`save`. Raises :class:`InputError` when the file cannot be read or is something else."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the benchmark result {path}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a result of the step-time benchmark")
    return StepTimesResult.from_dict(values)
