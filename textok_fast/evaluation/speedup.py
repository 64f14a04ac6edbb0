"""The headline benchmark, ``textok-fast bench speedup``: whole systems that make pictures of 512 px, compared like for like.

Every system runs in every form (:data:`systems.FORMS`), part by part: the text encoder, the modulation that the engine computes
ahead, the denoising steps, the decoder. All of one precision and batch are in memory at once and take turns, round after round,
so that what disturbs the machine disturbs each of them. Where a whole sampling run is too long, some of its steps are timed and
scaled to all of them; the row says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from textok_fast.config import GENERATOR_SIZES
from textok_fast.errors import InputError
from textok_fast.evaluation.energy import Energy
from textok_fast.evaluation.provenance import provenance, reporter
from textok_fast.evaluation.roofline import Ceilings, measure_ceilings, time_call, use_threads
from textok_fast.evaluation.step_times import PUBLISHED_CLAIM, PUBLISHED_SPEEDUP
from textok_fast.evaluation.systems import FORMS, PRECISIONS, SAMPLERS, Bench, Loop, StepCost, System, step_cost, system_named
from textok_fast.inference.memory import available_memory, format_bytes
from textok_fast.ops.device import resolve_device

PARTS = ("text", "modulation", "step", "decoder")
WHOLE_SECONDS = 2.0  # a sampling run that takes no longer is timed as a whole
ROUND_SECONDS = 1.0  # of a longer one so much is timed in a round, but at least one step
SHORT_PART_SECONDS = 0.25  # a part that takes no longer is timed several times in a round
REPEATS = 5
ENERGY_SECONDS = 1.0  # energy is read over at least so much work: the counters tick in tenths of a second
DEFAULTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "cpu": {"systems": ("TexTok-32", "DiT/2", "DiT/1"), "precisions": ("bf16", "fp32"), "batch": (1,)},
    "cuda": {
        "systems": ("TexTok-32", "TexTok-64", "TexTok-128", "TexTok-256", "DiT/2", "DiT/1"),
        "precisions": ("bf16", "fp8"),
        "batch": (1, 8, 64, 256),
    },
}


@dataclass
class SpeedupConfig:
    """What to compare. Empty ``systems``, ``precisions`` and ``batch`` become :data:`DEFAULTS` of the device.

    Attributes:
        systems: "TexTok-N", "DiT/2" (1,024 transformer tokens at 512 px), "DiT/1" (4,096).
        forms: of :data:`systems.FORMS`.
        precisions: fp32, bf16; of the engine only int8 (CPU) and fp8 (CUDA).
        sampler: "ddpm" or "ddim", with ``steps`` steps and a guidance ``scale`` other than 1.
        rounds: at most so many, at least ``min_rounds``, and as many as ``time_budget_s`` allows (seconds for the whole run,
            without starting up). What does not get its ``min_rounds`` out of its share of the budget is left out.
        full: also times whole pictures, from caption to pixels, none of it scaled, where the time budget has room for one.
        compile_parts: on CUDA the engine form's text encoder and SD-VAE go through torch.compile max-autotune, a minute or more
            each and once a batch size; False captures them as they are, in channels-last, as CUDA graphs.
        threads: None keeps torch's number.
    """

    size: str = "XL"
    systems: tuple[str, ...] = ()
    forms: tuple[str, ...] = tuple(FORMS)
    precisions: tuple[str, ...] = ()
    batch: tuple[int, ...] = ()
    sampler: str = "ddpm"
    steps: int = 250
    scale: float = 1.5
    rounds: int = 5
    min_rounds: int = 3
    time_budget_s: float = 5400.0
    full: bool = False
    compile_parts: bool = True
    text_encoder: str = "minilm"
    threads: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("systems", "forms", "precisions", "batch"):
            setattr(self, name, tuple(dict.fromkeys(getattr(self, name))))
        if self.size not in GENERATOR_SIZES:
            raise InputError(f"unknown size {self.size!r}; known: {', '.join(GENERATOR_SIZES)}")
        for name in self.systems:
            system_named(name, self.size)
        for name, known in (("forms", FORMS), ("precisions", PRECISIONS)):
            for value in getattr(self, name):
                if value not in known:
                    raise InputError(f"unknown {name[:-1]} {value!r}; known: {', '.join(known)}")
        if not self.forms:
            raise InputError(f"forms must name at least one of {', '.join(FORMS)}")
        if any(value < 1 for value in self.batch):
            raise InputError(f"batch must be numbers of at least 1, got {list(self.batch)}")
        if self.sampler not in SAMPLERS:
            raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, which the original code has; got {self.sampler!r}")
        if not 1 <= self.steps <= 1000:
            raise InputError(f"steps must be 1 to 1000, got {self.steps}")
        if self.scale == 1:
            raise InputError("scale 1 is no guidance; every published system is guided: give another, such as 1.5")
        if not 1 <= self.min_rounds <= self.rounds:
            raise InputError(f"1 <= min_rounds <= rounds, got min_rounds={self.min_rounds}, rounds={self.rounds}")
        if not self.time_budget_s > 0:
            raise InputError(f"time_budget_s must be above 0 seconds, got {self.time_budget_s}")

    def resolved(self, device: torch.device) -> SpeedupConfig:
        """With the defaults of the device in place of what is empty."""
        given: dict[str, Any] = {name: getattr(self, name) or values for name, values in DEFAULTS[device.type].items()}
        return dataclasses.replace(self, **given)


@dataclass(frozen=True)
class Timing:
    """Wall seconds of one call, over ``samples`` calls. p99 of fewer than 100 samples is all but the longest. ``rounds``: the
    median of each round; ``processor``: median of the process's own seconds, its threads added up."""

    p50: float
    p25: float
    p75: float
    p99: float
    min: float
    max: float
    samples: int
    rounds: list[float]
    processor: float

    @classmethod
    def of(cls, rounds: Sequence[Sequence[tuple[float, float]]]) -> Timing:
        """From (wall, processor) seconds, round by round."""
        walls = torch.tensor([wall for one in rounds for wall, _ in one], dtype=torch.float64)
        p25, p50, p75, p99 = (float(torch.quantile(walls, q)) for q in (0.25, 0.5, 0.75, 0.99))
        medians = [statistics.median(wall for wall, _ in one) for one in rounds]
        processor = statistics.median(used for one in rounds for _, used in one)
        return cls(p50, p25, p75, p99, float(walls.min()), float(walls.max()), len(walls), medians, processor)


@dataclass(frozen=True)
class Row:
    """One system in one form, precision and batch. Seconds are of the whole batch.

    ``parts``: "text" and "modulation" (both may be absent) and "decoder" once a batch, "step" ``steps`` times.
    ``steps_timed``: steps of one sampling run timed in a round; ``steps`` when whole runs were timed, modulation included.
    ``batch_s``: text + modulation + steps x step + decoder, at the medians; ``batch_rounds`` the same round by round.
    """

    system: str
    tokens: int
    form: str
    precision: str
    batch: int
    how: str  # how the generator runs
    decoder: str
    decoder_precision: str
    sampler: str
    steps: int
    steps_timed: int
    parts: dict[str, Timing]
    batch_s: float
    batch_rounds: list[float]
    images_per_s: float
    setup_s: float  # building, compiling, capturing and the first run
    flops: int  # of a step, its modulation given
    bytes: int  # that a step must read
    floor_s: float | None  # of a step: the longer of FLOPs at the matrix ceiling and bytes at the read ceiling
    floor_by: str  # which of the two
    floor_share: float | None  # floor / measured
    memory_bytes: int | None  # the generator's weights in this form, and the peak on top of them in a run's first step
    joules_per_image: float | None  # of the sampling run, where the device reports energy
    full: Timing | None  # whole pictures, none of it scaled

    @property
    def key(self) -> tuple[str, str]:
        return self.system, self.form


@dataclass(frozen=True)
class Skipped:
    """What was to be measured and was not."""

    system: str
    form: str
    precision: str
    batch: int
    reason: str


@dataclass(frozen=True)
class Ratio:
    """How many times as long ``slow`` takes as ``fast``, each (system, form), per step and per picture end to end.

    ``kind``: "method" (two systems, one form), "engine" (one system, two forms), "both". Each is the median of the ratios of
    the single rounds, in which both ran one after the other; the ranges are the lowest and the highest of them.
    """

    kind: str
    precision: str
    batch: int
    slow: tuple[str, str]
    fast: tuple[str, str]
    tokens: int  # of the slow system
    step: float
    step_range: tuple[float, float]
    image: float
    image_range: tuple[float, float]


@dataclass
class SpeedupResult:
    """All that one run measured and where, JSON-ready through :meth:`to_dict`."""

    config: SpeedupConfig
    rows: list[Row]
    skipped: list[Skipped]
    ratios: list[Ratio]
    ceilings: list[Ceilings]
    machine: dict[str, Any]
    device: str
    threads: int
    command: str
    date: str  # ISO 8601, UTC
    duration_s: float
    complete: bool = False  # whether the run came to its end
    published: dict[str, Any] = field(default_factory=lambda: {"speedup": PUBLISHED_SPEEDUP, "claim": PUBLISHED_CLAIM})
    benchmark: str = "speedup"

    def to_dict(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        for name in ("rows", "skipped", "ratios"):
            values[name] = [dataclasses.asdict(entry) for entry in values[name]]
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.config).items()}
        return {**values, "config": config, "ceilings": [entry.to_dict() for entry in self.ceilings]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SpeedupResult:
        """The inverse of :meth:`to_dict`, also after JSON. Raises :class:`InputError` for something else."""

        def row(entry: dict[str, Any]) -> Row:
            parts = {name: Timing(**part) for name, part in entry["parts"].items()}
            return Row(**{**entry, "parts": parts, "full": Timing(**entry["full"]) if entry["full"] else None})

        def ratio(entry: dict[str, Any]) -> Ratio:
            pairs = {name: tuple(entry[name]) for name in ("slow", "fast", "step_range", "image_range")}
            return Ratio(**{**entry, **pairs})

        try:
            return cls(
                **{
                    **values,
                    "config": SpeedupConfig(**values["config"]),
                    "rows": [row(entry) for entry in values["rows"]],
                    "skipped": [Skipped(**entry) for entry in values["skipped"]],
                    "ratios": [ratio(entry) for entry in values["ratios"]],
                    "ceilings": [Ceilings.from_dict(entry) for entry in values["ceilings"]],
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"this is not a result of `textok-fast bench speedup`: {error}") from None

    def row(self, system: str, form: str, precision: str, batch: int) -> Row:
        for row in self.rows:
            if (*row.key, row.precision, row.batch) == (system, form, precision, batch):
                return row
        raise InputError(f"nothing was measured for {system}, {form}, {precision}, batch {batch}")


def load(path: str | Path) -> SpeedupResult:
    """A result that :func:`textok_fast.evaluation.speedup_report.save` wrote; InputError when the file holds something else."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the benchmark result {path}: {error}") from None
    if not isinstance(values, dict) or values.get("benchmark") != "speedup":
        raise InputError(f"{path} is not a result of `textok-fast bench speedup`")
    return SpeedupResult.from_dict(values)


def run_speedup(
    config: SpeedupConfig,
    command: str | None = None,
    progress: bool = True,
    on_result: Callable[[SpeedupResult], None] | None = None,
) -> SpeedupResult:
    """Measures what ``config`` names.

    ``command`` is recorded as how to repeat the run. ``progress``: lines on stderr. ``on_result`` gets what is measured so far
    after every round, and so loses nothing to Ctrl-C.
    """
    started, device = time.perf_counter(), resolve_device(config.device)
    config = config.resolved(device)
    say = reporter(progress)
    groups = [(precision, batch) for precision in config.precisions for batch in config.batch]
    rows: list[Row] = []
    skipped: list[Skipped] = []
    ceilings: dict[str, Ceilings] = {}
    deadline = started + config.time_budget_s
    with use_threads(config.threads) as threads, torch.no_grad():
        origin = provenance(command)

        def result(found: list[Row], complete: bool = False) -> SpeedupResult:
            made = SpeedupResult(
                config=config,
                rows=found,
                skipped=list(skipped),
                ratios=ratios_of(found),
                ceilings=list(ceilings.values()),
                **origin,
                device=str(device),
                threads=threads,
                duration_s=time.perf_counter() - started,
                complete=complete,
            )
            if on_result is not None:
                on_result(made)
            return made

        for precision in config.precisions:
            say(f"{precision}: measuring the ceilings of {device}, {threads} thread(s)")
            ceilings[precision] = measure_ceilings(device, precision)
            bench = Bench(
                *(device, precision, config.sampler, config.steps, config.scale, config.text_encoder, config.seed),
                compile_parts=config.compile_parts,
            )
            finished: list[_Group] = []
            for batch in config.batch:
                left = len(groups) - groups.index((precision, batch))
                budget = (deadline - time.perf_counter()) / left
                group = _Group(config, bench, batch, ceilings[precision], budget, say, skipped)
                finished.append(group)
                group.build()
                for _ in group.rounds():
                    result(rows + [row for each in finished for row in each.rows()])
                group.release()
            # again, and the better of the two: a neighbour's load at one moment must not lower the ceiling
            ceilings[precision] = ceilings[precision].better(measure_ceilings(device, precision))
            for group in finished:
                group.ceiling = ceilings[precision]
            rows += [row for group in finished for row in group.rows()]
            del bench
            gc.collect()
        return result(rows, complete=True)


# -- one precision and batch -------------------------------------------------------------------------------------------------

Samples = list[list[tuple[float, float]]]  # (wall, processor) seconds, round by round


@dataclass
class _Part:
    """A call that is timed in turn; of systems that share it (the SD-VAE) it is one part."""

    call: Callable[[], object]
    typical: float
    samples: Samples = field(default_factory=list)


@dataclass
class _Entry:
    """A system in a form, ready to be timed."""

    system: System
    form: str
    loop: Loop
    parts: dict[str, _Part]
    cost: StepCost
    typical: float  # seconds a step
    setup_s: float
    memory_bytes: int | None
    how: str
    decoder_precision: str
    samples: Samples = field(default_factory=list)  # of steps
    joules_per_image: float | None = None
    full: Samples = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return self.typical * self.loop.total <= WHOLE_SECONDS

    @property
    def timed(self) -> int:
        return self.loop.total if self.whole else max(1, min(self.loop.total, int(ROUND_SECONDS / self.typical)))


class _Group:
    """All systems and forms of one precision and batch."""

    def __init__(
        self,
        config: SpeedupConfig,
        bench: Bench,
        batch: int,
        ceiling: Ceilings,
        budget: float,
        say: Callable[[str], None],
        skipped: list[Skipped],
    ) -> None:
        self.config, self.bench, self.batch, self.ceiling, self.skipped = config, bench, batch, ceiling, skipped
        self.deadline = time.perf_counter() + budget
        self.title = f"{bench.precision} batch {batch}"
        self.say = lambda line: say(f"{self.title}: {line}")
        self.entries: list[_Entry] = []
        self.shared: dict[tuple[str, str], _Part] = {}
        self.compile_s = 0.0  # what compiling the last network took

    def build(self) -> None:
        """Builds and warms up whatever fits into memory and time, the forms one after the other, small systems first."""
        systems = sorted((system_named(name, self.config.size) for name in self.config.systems), key=lambda s: s.tokens)
        for form in self.config.forms:
            if form != "engine" and self.bench.precision != self.bench.base_precision:
                continue  # a precision of the engine only
            for system in systems:
                try:
                    self._require_time(system, form)
                    self._require_memory(system, form)
                    self.entries.append(self._entry(system, form))
                except (InputError, RuntimeError) as error:
                    if (reason := _refusal(error)) is None:
                        raise
                    self.bench.forget(form, system)
                    self._skip(system, form, reason)
                gc.collect()

    def _skip(self, system: System, form: str, reason: str) -> None:
        self.skipped.append(Skipped(system.name, form, self.bench.precision, self.batch, reason))
        self.say(f"{system.name}, {form}: left out: {reason}")

    def _require_time(self, system: System, form: str) -> None:
        """InputError when even at the machine's ceiling this entry would not come to its rounds."""
        cost = step_cost(system, self.bench.precision, self.batch)
        known = [entry.typical for entry in self.entries if entry.system.name == system.name]
        step = max(known) if known else cost.flops / self.ceiling.matmul_flops
        compiling = self.compile_s if form == "compile" else 0.0
        promised = sum(self._round_seconds(entry) for entry in self.entries) * self.config.min_rounds
        needed = compiling + step * (2 + self.config.min_rounds)
        left = self.deadline - time.perf_counter() - promised
        if needed > left:
            raise InputError(
                f"it needs about {needed:.0f} s more, and of its share of the time budget ({self.config.time_budget_s:.0f} s "
                f"in all) {max(left, 0):.0f} s are left: a longer budget, fewer systems, forms or precisions"
            )

    def _require_memory(self, system: System, form: str) -> None:
        """InputError before a CPU's memory is gone, when nobody could be told: engines and compiled networks pack copies."""
        if self.bench.device.type != "cpu":
            return  # there it is an error that can be caught
        config, element = system.generator, self.bench.dtype.itemsize
        weights = self.bench.weight_bytes(system)
        copies = {"reference": 0 if self.entries else 1, "engine": 1, "compile": 2}[form]
        needed = copies * weights + 20 * 2 * self.batch * system.tokens * config.width * element
        if needed > (free := available_memory(self.bench.device)):
            raise InputError(
                f"it does not fit into memory: it takes about {format_bytes(needed)}, {format_bytes(free)} are free; fewer "
                "systems or forms in one run, or a smaller batch"
            )

    def _round_seconds(self, entry: _Entry) -> float:
        return entry.typical * entry.timed + sum(part.typical for part in entry.parts.values())

    def _entry(self, system: System, form: str) -> _Entry:
        bench, device, batch = self.bench, self.bench.device, self.batch
        began = time.perf_counter()
        loop = bench.loop(system, form, batch)
        with _PeakMemory(device) as peak:
            loop.begin()
            loop.advance()
            _wait(device)
        setup = time.perf_counter() - began
        for _ in range(2 if form == "compile" and device.type == "cuda" else 1):  # it captures its graph in the second call
            if loop.done == loop.total:
                loop.begin()
            typical = time_call(loop.advance, device)[0]
        if typical * loop.total <= WHOLE_SECONDS:  # as it is going to be timed
            _whole_run(loop)
            typical = time_call(lambda: _whole_run(loop), device)[0] / loop.total
        parts = {}
        if system.textok is not None:
            parts["text"] = self._shared(("text", form), lambda: bench.text(form, batch))
        if (ahead := loop.ahead) is not None and typical * loop.total > WHOLE_SECONDS:
            parts["modulation"] = self._shared(("modulation", system.name), lambda: ahead)
        parts["decoder"] = self._shared((system.decoder, form), lambda: bench.decoder(system, form, batch))
        if form == "compile":
            self.compile_s = time.perf_counter() - began
        decoder_precision = bench.precision if system.textok is not None else bench.base_precision
        taken = {name: round(part.typical, 4) for name, part in parts.items()}
        ready = time.perf_counter() - began
        self.say(f"{system.name}, {form}: about {typical:.4g} s a step, {taken}; ready after {ready:.0f} s")
        cost = step_cost(system, bench.precision, batch)
        memory = None if peak.bytes is None else loop.weight_bytes + peak.bytes
        return _Entry(system, form, loop, parts, cost, typical, setup, memory, bench.how(form, batch), decoder_precision)

    def _shared(self, key: tuple[str, str], make: Callable[[], Callable[[], object]]) -> _Part:
        if key not in self.shared:
            call, device = make(), self.bench.device
            first = time_call(call, device)[0]
            self.shared[key] = _Part(call, time_call(call, device)[0] if first < 60 or key[1] == "compile" else first)
        return self.shared[key]

    def rounds(self) -> Iterator[int]:
        """Whole rounds, as many as there are or as the budget allows; what a broken round has measured is not kept."""
        if not self.entries:
            yield 0
            return
        each = sum(self._round_seconds(entry) for entry in self.entries)
        left = self.deadline - time.perf_counter()
        count = max(self.config.min_rounds, min(self.config.rounds, int(left / each)))
        for index in range(count):
            steps = [self._time_steps(entry) for entry in self.entries]
            parts = {key: self._time_part(part) for key, part in self.shared.items()}
            for entry, samples in zip(self.entries, steps, strict=True):
                entry.samples.append(samples)
            for key, samples in parts.items():
                self.shared[key].samples.append(samples)
            self.say(f"round {index + 1} of {count}, about {each:.0f} s each")
            yield index
        for entry in self.entries:
            entry.joules_per_image = self._joules(entry)
        if self.config.full:
            for entry in self.entries:
                seconds = entry.typical * entry.loop.total + sum(part.typical for part in entry.parts.values())
                if seconds > (left := self.deadline - time.perf_counter()):
                    self._skip(entry.system, entry.form, f"whole pictures: {seconds:.0f} s, of {max(left, 0):.0f} s left")
                    continue
                entry.full.append([time_call(lambda entry=entry: self._picture(entry), self.bench.device)])  # type: ignore[misc]
                self.say(f"{entry.system.name}, {entry.form}: a whole picture took {entry.full[0][0][0]:.4g} s")
        yield count

    def _time_steps(self, entry: _Entry) -> list[tuple[float, float]]:
        loop, device = entry.loop, self.bench.device
        if entry.whole:
            repeats = max(1, min(REPEATS, int(ROUND_SECONDS / (entry.typical * loop.total))))
            runs = [time_call(lambda: _whole_run(loop), device) for _ in range(repeats)]
            return [(wall / loop.total, used / loop.total) for wall, used in runs]
        samples: list[tuple[float, float]] = []
        while len(samples) < entry.timed:
            if loop.done == loop.total:
                loop.begin()
            if loop.until_ahead == 0:  # its work for other steps is timed as a part of its own
                loop.advance()
                continue
            here = min(entry.timed - len(samples), loop.total - loop.done, loop.until_ahead)
            samples += time_advances(loop, here, device)
        return samples

    def _time_part(self, part: _Part) -> list[tuple[float, float]]:
        repeats = REPEATS if part.typical < SHORT_PART_SECONDS else 1
        return [time_call(part.call, self.bench.device) for _ in range(repeats)]

    def _picture(self, entry: _Entry) -> None:
        """A batch of pictures from their captions to their pixels."""
        if "text" in entry.parts:
            entry.parts["text"].call()
        _whole_run(entry.loop)
        entry.parts["decoder"].call()

    def _joules(self, entry: _Entry) -> float | None:
        loop, device = entry.loop, self.bench.device
        if not Energy(device).source:
            return None
        count = max(1, int(ENERGY_SECONDS / entry.typical) + 1)
        done = 0
        with Energy(device) as energy:
            while done < count:
                if loop.done == loop.total:
                    loop.begin()
                loop.advance()
                done += 1
            _wait(device)
        return None if energy.joules is None else energy.joules / done * loop.total / self.batch

    def release(self) -> None:
        """Frees what belongs to this batch; times stay."""
        for entry in self.entries:
            entry.loop = _Done(entry.loop.total)
            entry.parts = {name: dataclasses.replace(part, call=_nothing) for name, part in entry.parts.items()}
        self.shared = {}
        self.bench.forget_compiled()
        gc.collect()

    def rows(self) -> list[Row]:
        return [self._row(entry) for entry in self.entries if entry.samples]

    def _row(self, entry: _Entry) -> Row:
        parts = {name: Timing.of(part.samples) for name, part in entry.parts.items()}
        parts["step"] = Timing.of(entry.samples)
        total = entry.loop.total
        seconds = sum(timing.p50 * (total if name == "step" else 1) for name, timing in parts.items())
        rounds = [
            sum(timing.rounds[index] * (total if name == "step" else 1) for name, timing in parts.items())
            for index in range(len(entry.samples))
        ]
        reading, computing = entry.cost.bytes / self.ceiling.read_bytes, entry.cost.flops / self.ceiling.matmul_flops
        floor = max(reading, computing)
        return Row(
            system=entry.system.name,
            tokens=entry.system.tokens,
            form=entry.form,
            precision=self.bench.precision,
            batch=self.batch,
            how=entry.how,
            decoder=entry.system.decoder,
            decoder_precision=entry.decoder_precision,
            sampler=self.config.sampler,
            steps=total,
            steps_timed=entry.timed,
            parts={name: parts[name] for name in PARTS if name in parts},
            batch_s=seconds,
            batch_rounds=rounds,
            images_per_s=self.batch / seconds,
            setup_s=entry.setup_s,
            flops=entry.cost.flops,
            bytes=entry.cost.bytes,
            floor_s=floor,
            floor_by="reading weights" if reading > computing else "arithmetic",
            floor_share=floor / parts["step"].p50,
            memory_bytes=entry.memory_bytes,
            joules_per_image=entry.joules_per_image,
            full=Timing.of(entry.full) if entry.full else None,
        )


@dataclass
class _Done:
    """What stays of a loop when its group is through."""

    total: int
    weight_bytes: int = 0
    done: int = 0
    until_ahead: int = 0
    ahead: Callable[[], object] | None = None

    begin = advance = finish = lambda self: None


def _nothing() -> None:
    pass


def _whole_run(loop: Loop) -> None:
    loop.begin()
    loop.finish()


def time_advances(loop: Loop, count: int, device: torch.device) -> list[tuple[float, float]]:
    """(wall, processor) seconds of each of ``count`` evaluations. On CUDA between events in the stream: nothing waits for a
    step to end before the next one is issued, as in a real run."""
    if device.type != "cuda":
        return [time_call(loop.advance, device) for _ in range(count)]
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        torch.cuda.synchronize()
        processor = time.process_time()
        events[0].record()
        for event in events[1:]:
            loop.advance()
            event.record()
        torch.cuda.synchronize()
        used = (time.process_time() - processor) / count
    return [(before.elapsed_time(after) / 1000, used) for before, after in itertools.pairwise(events)]


def ratios_of(rows: Sequence[Row]) -> list[Ratio]:
    """Per precision and batch: each system against the one of fewest tokens, in each form; each form against the engine, for
    each system; and the reference form of each system against the engine's of the fewest tokens."""
    found = []
    for precision, batch in dict.fromkeys((row.precision, row.batch) for row in rows):
        here = {row.key: row for row in rows if (row.precision, row.batch) == (precision, batch)}
        fewest = min(here.values(), key=lambda row: row.tokens).system
        for (system, form), row in here.items():
            pairs = [("method", (fewest, form))] if system != fewest else []
            pairs += [("engine", (system, "engine"))] if form != "engine" else []
            pairs += [("both", (fewest, "engine"))] if form == "reference" and system != fewest else []
            found += [_ratio(kind, row, here[fast]) for kind, fast in pairs if fast in here]
    return found


def _ratio(kind: str, slow: Row, fast: Row) -> Ratio:
    def by_round(a: Sequence[float], b: Sequence[float]) -> list[float]:
        return [x / y for x, y in zip(a, b, strict=True)]

    steps = by_round(slow.parts["step"].rounds, fast.parts["step"].rounds)
    images = by_round(slow.batch_rounds, fast.batch_rounds)
    return Ratio(
        kind=kind,
        precision=slow.precision,
        batch=slow.batch,
        slow=slow.key,
        fast=fast.key,
        tokens=slow.tokens,
        step=statistics.median(steps),
        step_range=(min(steps), max(steps)),
        image=statistics.median(images),
        image_range=(min(images), max(images)),
    )


# -- memory and refusals ----------------------------------------------------------------------------------------------------


class _PeakMemory:
    """``bytes`` allocated inside the block at its worst moment, beyond what was allocated before; None where unknown.

    On CUDA torch's own count, on Linux the process's resident memory, whose high-water mark the kernel lets it reset.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> _PeakMemory:
        self._before = 0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
                self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._before:
            self.bytes = max(_resident("VmHWM") - self._before, 0)


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _refusal(error: Exception) -> str | None:
    """Why something is left out, when that is its own fault and not a bug: refused by a plan, lacking, too large."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text or "can't allocate memory" in text:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return f"it does not fit into memory ({text[:160]})"
    return None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
