"""Contenders of one case, timed in turn in one process: what disturbs the machine disturbs each of them.

``compare`` warms every contender up, checks that all say the same, and then takes one sample of each, round after round, the
order shifted by one each round. ``launch`` is the time of calls as Python issues them. Beside it stand on a GPU the same calls
replayed from a CUDA graph (``graph``), which is what is left when nothing waits for Python, both between events on the stream;
on a CPU the time of the process, all its threads together (``processor``), which other programs disturb less.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.evaluation.roofline import Ceilings, measure_ceilings, time_call
from textok_fast.ops.dispatch import use_backend
from textok_fast.ops.fp8 import RowScaled

SAMPLE_SECONDS = {"cpu": 2e-3, "cuda": 1e-3}  # a sample repeats its call until it is about this long
MOST_CALLS = 200
CACHE_COPIES, CACHE_COPIES_LIMIT = 3, 64  # inputs are rotated through this many times the cache, in at most so many sets


@dataclass(frozen=True)
class Contender:
    """``call`` is called with one of ``inputs`` (None: the case's own), while ``force`` (operation or "*" -> backend) holds."""

    call: Callable[..., Any]
    force: Mapping[str, str] = field(default_factory=dict)
    inputs: Sequence[tuple[Any, ...]] | None = None

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        operations = dict(self.force)
        with use_backend(operations.pop("*", None), **operations):
            yield


@dataclass(frozen=True)
class Work:
    """What a call moves and computes at least: bytes read once and written once, FLOPs (a multiply-add is 2)."""

    bytes: int = 0
    flops: int = 0


def compare(
    contenders: Mapping[str, Contender],
    inputs: Sequence[tuple[Any, ...]],
    *,
    device: torch.device,
    dtype: str,
    work: Work,
    baseline: str = "eager",
    rounds: int = 15,
    tolerance: float = 0.0,
    graphs: bool = True,
    gradients: bool = False,
) -> dict[str, Any]:
    """Times ``contenders`` and returns their statistics, JSON-ready.

    Args:
        contenders: by name. One whose forced backend does not take the inputs, or that does not compile, is left out.
        inputs: argument tuples, used in turn; more than one where the point is to read from memory and not from the cache.
        dtype: "fp32" or "bf16", of the ceiling to compare with.
        baseline: the contender that the others' times are divided into.
        tolerance: how far results may be from the baseline's: norm of the difference over norm; for integers the share of
            entries that differ by more than 1.
        graphs: also time replayed CUDA graphs, on a GPU.
        gradients: the calls run a backward pass.

    Returns: "contenders": name -> {"launch", "graph" or "processor"} -> {"median", "p10", "p90", "min" (seconds), "ratio",
        "ratio_p10", "ratio_p90" (of the baseline's time to this one's, by round), "bytes_per_s", "copy_share", "flops_per_s",
        "matmul_share"}, with "calls" a sample; or the reason under "skipped" or "error"; "rounds", "ceilings".
    Raises: AssertionError when a contender's result is not the baseline's; whatever the baseline raises.
    """
    ceiling = ceilings(str(device), dtype)
    mode = torch.enable_grad if gradients else torch.inference_mode
    result: dict[str, Any] = {"baseline": baseline, "rounds": rounds, "contenders": {}, "ceilings": ceiling.to_dict()}
    with mode():
        ready, expected = {}, None
        for name in sorted(contenders, key=lambda name: name != baseline):
            contender = contenders[name]
            sets = contender.inputs or inputs
            try:
                with contender.forced():
                    found = contender.call(*sets[0])
                    estimate = _estimate(contender.call, sets, device)
            except Exception as error:  # whatever a compiler raises; a backend of ours that takes the inputs must not fail
                left_out = isinstance(error, InputError)
                if name == baseline or (contender.force and not left_out):
                    raise
                result["contenders"][name] = {"skipped" if left_out else "error": _one_line(error)}
                continue
            if expected is None:
                expected = found
            elif found is not None:
                distance = _distance(found, expected)
                assert distance <= tolerance, f"{name} is {distance:.3g} away from {baseline}, allowed {tolerance:.3g}"
            calls = max(len(sets), min(MOST_CALLS, math.ceil(SAMPLE_SECONDS[device.type] / estimate)))
            ready[name] = _Timed(contender, sets, calls, device)
        pairs = _rounds(ready, "launch", rounds)
        samples = {"launch": {name: [wall for wall, _ in taken] for name, taken in pairs.items()}}
        if device.type != "cuda":
            samples["processor"] = {name: [own for _, own in taken] for name, taken in pairs.items()}
        elif graphs and not gradients:
            for name in list(ready):
                try:
                    ready[name].capture()
                except Exception as error:
                    if name == baseline:
                        raise
                    result["contenders"][name] = {"graph_error": _one_line(error)}
            pairs = _rounds({name: timed for name, timed in ready.items() if timed.graph}, "replay", rounds)
            samples["graph"] = {name: [wall for wall, _ in taken] for name, taken in pairs.items()}
    for kind, times in samples.items():
        for name, taken in times.items():
            entry = result["contenders"].setdefault(name, {})
            entry["calls"] = ready[name].calls
            entry[kind] = _statistics(taken, times[baseline], work, ceiling)
    result["contenders"] = {name: result["contenders"][name] for name in contenders}
    return result


class _Timed:
    """One contender, its inputs in turn, so many calls a sample. Results are kept as long as there are sets of inputs, so that
    the memory written rotates as the memory read does."""

    def __init__(self, contender: Contender, sets: Sequence[tuple[Any, ...]], calls: int, device: torch.device) -> None:
        self.contender, self.sets, self.calls, self.device = contender, sets, calls, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self._kept: deque[Any] = deque(maxlen=len(sets))

    def _run(self) -> None:
        for index in range(self.calls):
            self._kept.append(self.contender.call(*self.sets[index % len(self.sets)]))

    def launch(self) -> tuple[float, float]:
        """(wall, processor) seconds a call."""
        with self.contender.forced():
            return self._a_call(time_call(self._run, self.device))

    def _a_call(self, times: tuple[float, float]) -> tuple[float, float]:
        return times[0] / self.calls, max(times[1] / self.calls, 1e-9)

    def capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        self._kept.clear()
        with self.contender.forced():
            with torch.cuda.stream(stream):
                self._run()
            torch.cuda.current_stream().wait_stream(stream)
            self._kept.clear()
            with torch.cuda.graph(graph):
                self._run()
        self.graph = graph
        graph.replay()

    def replay(self) -> tuple[float, float]:
        """(wall, processor) seconds a call."""
        assert self.graph is not None
        return self._a_call(time_call(self.graph.replay, self.device))


def _rounds(ready: Mapping[str, _Timed], method: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    names = list(ready)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for index in range(rounds + 1):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            taken = getattr(ready[name], method)()
            if index:  # the first round warms up
                times[name].append(taken)
    return times


def _estimate(call: Callable[..., Any], sets: Sequence[tuple[Any, ...]], device: torch.device) -> float:
    calls = [functools.partial(call, *sets[index % len(sets)]) for index in range(3)]
    return min(time_call(bound, device)[0] for bound in calls)


def _statistics(times: Sequence[float], baseline: Sequence[float], work: Work, ceiling: Ceilings) -> dict[str, float]:
    ratios = [base / own for base, own in zip(baseline, times, strict=True)]
    median = statistics.median(times)
    found = {"median": median, "p10": _quantile(times, 0.1), "p90": _quantile(times, 0.9), "min": min(times)}
    found |= {"ratio": statistics.median(ratios), "ratio_p10": _quantile(ratios, 0.1), "ratio_p90": _quantile(ratios, 0.9)}
    if work.bytes:
        found |= {"bytes_per_s": work.bytes / median, "copy_share": work.bytes / median / ceiling.copy_bytes}
    if work.flops:
        found |= {"flops_per_s": work.flops / median, "matmul_share": work.flops / median / ceiling.matmul_flops}
    return found


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _quantile(values: Sequence[float], q: float) -> float:
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), q))


def _distance(found: Any, expected: Any) -> float:
    """The largest distance of the tensors in two results."""
    if isinstance(expected, RowScaled) or isinstance(found, RowScaled):
        found, expected = (part.dequantize() if isinstance(part, RowScaled) else part for part in (found, expected))
    if not isinstance(expected, Tensor):
        return max(_distance(a, b) for a, b in zip(found, expected, strict=True))
    if not expected.is_floating_point():
        return float(((found.long() - expected.long()).abs() > 1).double().mean())
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


# -- what is compared with, and what with -------------------------------------------------------------------------------------


@functools.cache
def ceilings(device: str, dtype: str) -> Ceilings:
    """Measured once a session."""
    return measure_ceilings(device, dtype, seconds=0.2)


def inductor(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``function`` compiled for the shapes it is called with. One a case: it forgets what was compiled before."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True, **options)  # type: ignore[no-any-return]


def copy_contender(size: int, sets: int, device: torch.device) -> Contender:
    """A plain copy that moves ``size`` bytes, half of them read and half written: the floor at this very size."""
    half = max(1, size // 8)  # elements of 4 bytes
    pairs = [(torch.ones(half, device=device), torch.ones(half, device=device)) for _ in range(sets)]

    def copy(target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    return Contender(copy, inputs=pairs)


def input_sets(make: Callable[[], tuple[Any, ...]], size: int, device: torch.device, cold: bool) -> list[tuple[Any, ...]]:
    """One set of inputs, in the cache from the second call on where it fits; with ``cold`` so many that none is found there.

    ``size``: bytes that one call reads and writes.
    """
    if not cold:
        return [make()]
    count = math.ceil(CACHE_COPIES * cache_bytes(device) / size)
    return [make() for _ in range(min(CACHE_COPIES_LIMIT, max(1, count)))]


def describe_inputs(sets: Sequence[tuple[Any, ...]], size: int, device: torch.device) -> str:
    """Where one call's inputs come from, in words."""
    cache = cache_bytes(device)
    if len(sets) * size > 2 * cache:
        return "memory" if len(sets) == 1 else f"memory, {len(sets)} sets in turn"
    return "cache"


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """The last-level cache of the device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [32 * 2**20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes)
