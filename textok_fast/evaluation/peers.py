"""Our engine against other runtimes on one denoising step of a DiT: the same random weights, the same inputs, one machine.

Each contestant lives in a process of its own. In one process the thread pools of torch (OpenMP), OpenVINO (TBB) and ONNX
Runtime spin while another one computes, and one that crashes or runs out of memory takes the run with it; apart, a contestant
is as fast as where it is deployed, and one that fails is a line that says why. The processes take turns, round after round,
starting with another one each round: what disturbs the machine disturbs each of them, and no two compute at once. The weights
are one file, mapped by all.

What each computes is compared with our engine's output and with the reference form's in float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast import ops
from textok_fast.config import GENERATOR_SIZES, DiTConfig
from textok_fast.errors import InputError
from textok_fast.evaluation.provenance import provenance, reporter
from textok_fast.evaluation.roofline import count_flops, measure_ceilings, time_call, use_threads
from textok_fast.evaluation.step_times import Spread, StepTimesConfig, build_networks, network_config, step_inputs
from textok_fast.files import save_tensors
from textok_fast.interop import to_diffusers_dit
from textok_fast.modeling.dit import DiT, timestep_features
from textok_fast.ops.device import resolve_device
from textok_fast.ops.dispatch import use_backend

OURS = "textok-fast engine"
PRECISIONS = ("fp32", "bf16", "int8", "fp8")
MODULATIONS = ("inside", "given")
OPSET = 20  # in float32 TensorRT refuses 23's Attention, and ONNX Runtime and OpenVINO are as fast with either
TURN_SECONDS = 0.25  # a fast contestant takes several steps a turn
MOST_STEPS = 50
PRODUCT_SHAPES = ((512, 1152, 4608), (1024, 1152, 4608), (2048, 2048, 2048))  # (rows, inner, columns), for the ceiling


@dataclass
class PeersConfig:
    """What to compare. ``tokens``, ``batch``, ``precisions``, ``modulation`` and ``threads`` are each measured with each.

    ``tokens``: transformer tokens; 1,024 and 4,096 are 2-D patches, others 1-D tokens. ``modulation``: "inside" computes the
    adaLN products in the step, "given" is handed their results, as a sampling loop that has them ahead does. ``peers``: names
    from :data:`PEERS`; empty for all that this machine can run. ``compile_mode``: torch.compile's.
    """

    size: str = "XL"
    tokens: tuple[int, ...] = (32,)
    batch: tuple[int, ...] = (1, 2)
    precisions: tuple[str, ...] = ("fp32", "bf16", "int8")
    modulation: tuple[str, ...] = MODULATIONS
    threads: tuple[int, ...] = (1, 2)
    peers: tuple[str, ...] = ()
    rounds: int = 7
    compile_mode: str = "max-autotune"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "precisions", "modulation", "threads", "peers"):
            setattr(self, name, tuple(dict.fromkeys(getattr(self, name))))
        choices: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
            "size": ((self.size,), tuple(GENERATOR_SIZES)),
            "precisions": (self.precisions, PRECISIONS),
            "modulation": (self.modulation, MODULATIONS),
            "peers": (self.peers, tuple(PEERS)),
            "compile_mode": ((self.compile_mode,), ("default", "max-autotune")),
        }
        for name, (given, known) in choices.items():
            if name != "peers" and not given:
                raise InputError(f"{name} must name at least one of {', '.join(known)}")
            for value in given:
                if value not in known:
                    raise InputError(f"{name}: unknown {value!r}; known: {', '.join(known)}")
        for name in ("tokens", "batch", "threads"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise InputError(f"{name} must be one or more numbers of at least 1, got {list(values)}")
        if self.rounds < 1:
            raise InputError(f"rounds must be at least 1, got {self.rounds}")


@dataclass(frozen=True)
class Job:
    """One case for one contestant, as its process is told it. ``folder`` holds the weights, the inputs and exported graphs."""

    peer: str
    size: str
    tokens: int
    precision: str
    batch: int
    modulation: str
    threads: int
    compile_mode: str
    device: str
    folder: str

    @property
    def case(self) -> tuple[int, str, int, int, str]:
        return self.tokens, self.precision, self.threads, self.batch, self.modulation

    @property
    def given(self) -> bool:
        return self.modulation == "given"

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """What torch computes in outside of quantized products."""
        return torch.bfloat16 if self.precision in ("bf16", "fp8") else torch.float32

    @property
    def config(self) -> DiTConfig:
        return network_config(self.size, self.tokens)[1]


@dataclass(frozen=True)
class PeerRow:
    """One contestant in one case. Seconds a step: ``wall`` and ``processor`` over the rounds, ``round_wall`` each round's.

    ``floor``: below which no step can be at the measured ceilings, doing ``flops`` or reading ``weight_bytes`` once, whichever
    is longer; ``share``: that over the median. ``error_reference``: norm of the difference to the reference form's float32
    output over that output's norm; ``error_ours`` the same to our engine's output in this precision, ``max_error_ours`` the
    largest difference over its largest magnitude. ``times_ours``: how many times our engine's median. The last three are None
    where our engine did not run.
    """

    peer: str
    tokens: int
    precision: str
    threads: int
    batch: int
    modulation: str
    rounds: int
    steps: int
    wall: Spread
    processor: Spread
    round_wall: list[float]
    flops: int
    weight_bytes: int
    floor: float
    share: float
    error_reference: float
    error_ours: float | None
    max_error_ours: float | None
    times_ours: float | None

    @property
    def case(self) -> tuple[int, str, int, int, str]:
        return self.tokens, self.precision, self.threads, self.batch, self.modulation


@dataclass
class PeersResult:
    """All that one run measured and where, JSON-ready through :meth:`to_dict`. ``skipped``: contestant, case and why."""

    config: PeersConfig
    rows: list[PeerRow]
    skipped: list[dict[str, str]]
    ceilings: list[dict[str, Any]]
    machine: dict[str, Any]
    versions: dict[str, str]
    device: str
    command: str
    date: str  # ISO 8601, UTC
    duration_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.config).items()}
        return {**values, "config": config, "rows": [dataclasses.asdict(row) for row in self.rows]}

    def best_peer(self, case: tuple[int, str, int, int, str]) -> PeerRow | None:
        """The fastest of the others in a case, by median; None where there is none."""
        others = [row for row in self.rows if row.case == case and row.peer != OURS]
        return min(others, key=lambda row: row.wall.median, default=None)

    def to_markdown(self) -> str:
        return _markdown(self)


def run_peers(
    config: PeersConfig,
    command: str | None = None,
    progress: bool = True,
    on_result: Callable[[PeersResult], None] | None = None,
) -> PeersResult:
    """Measures every contestant of ``config`` in every case.

    ``command`` is recorded as how to repeat the run. ``progress``: lines on stderr. ``on_result`` gets what is measured so far
    after each case. Exported graphs and weights lie in a temporary directory that goes with the run: up to four times the
    model's size in float32.
    """
    started, device = time.perf_counter(), resolve_device(config.device)
    say = reporter(progress)
    peers = list(config.peers or PEERS)
    threads = config.threads if device.type == "cpu" else config.threads[:1]
    result = PeersResult(
        config=config,
        rows=[],
        skipped=[],
        ceilings=[],
        **provenance(command),
        versions=_versions(peers),
        device=str(device),
    )
    able: dict[str, list[str]] = {}  # precision -> who can
    for precision in config.precisions:
        for name in peers:
            reason = why_not(name, precision, device)
            if reason:
                result.skipped.append({"peer": name, "case": precision, "reason": reason})
            else:
                able.setdefault(precision, []).append(name)
    with tempfile.TemporaryDirectory(prefix="textok-peers-") as folder:
        for tokens in config.tokens:
            say(f"{tokens} tokens: drawing the weights of DiT-{config.size}")
            _write_inputs(config, tokens, device, Path(folder))
            for precision, names in able.items():
                _measure_precision(config, result, Path(folder), tokens, precision, names, threads, device, say, on_result)
            for file in Path(folder).iterdir():
                file.unlink()
    result.duration_s = time.perf_counter() - started
    return result


def why_not(peer: str, precision: str, device: torch.device) -> str:
    """Why a contestant cannot run in a precision on a device, or ""."""
    kind = PEERS[peer]
    if device.type not in kind.precisions:
        return f"runs on {' and '.join(kind.precisions)} only"
    if precision not in kind.precisions[device.type]:
        return kind.lacks or f"measured in {', '.join(kind.precisions[device.type])} only"
    missing = [module for module in kind.needs if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


# -- the parent's side -------------------------------------------------------------------------------------------------------


def _write_inputs(config: PeersConfig, tokens: int, device: torch.device, folder: Path) -> None:
    """The weights in float32, and for each batch the inputs, their modulation, and the reference form's output."""
    network = build_networks(
        StepTimesConfig(size=config.size, tokens=(tokens,), seed=config.seed), torch.device("cpu"), torch.float32
    )[tokens]
    model = cast(DiT, network.model)
    save_tensors({name: tensor.contiguous() for name, tensor in _all_tensors(model).items()}, folder / "weights.safetensors")
    for batch in config.batch:
        torch.manual_seed(config.seed)
        x, t, y = step_inputs(network.config, batch, torch.device("cpu"), torch.float32)
        model.to(device)
        with torch.inference_mode(), use_backend("reference"):
            modulation = model.modulation(model.condition(t.to(device), y.to(device)))
            out = model(x.to(device), t.to(device), y.to(device))
        tensors = {"x": x, "t": t, "y": y, "out": out}
        tensors |= {f"modulation_{index}": value for index, value in enumerate(modulation)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_tensors(tensors, folder / f"inputs-{batch}.safetensors")


def _measure_precision(
    config: PeersConfig,
    result: PeersResult,
    folder: Path,
    tokens: int,
    precision: str,
    names: list[str],
    threads: tuple[int, ...],
    device: torch.device,
    say: Callable[[str], None],
    on_result: Callable[[PeersResult], None] | None,
) -> None:
    """Every case of one token count and precision; the processes live as long as this."""

    def job(name: str, count: int, batch: int, modulation: str) -> Job:
        mode = config.compile_mode
        return Job(name, config.size, tokens, precision, batch, modulation, count, mode, str(device), str(folder))

    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(_Worker()) for name in names}
        for count in threads:
            ceiling, first = _ceiling(precision, count, device), len(result.rows)
            result.ceilings.append({"precision": precision, "threads": count, **ceiling})
            for batch in config.batch:
                for modulation in config.modulation:
                    jobs = {name: job(name, count, batch, modulation) for name in workers}
                    _measure_case(config, result, workers, jobs, ceiling, say)
                    if on_result is not None:
                        on_result(result)
            # Again, and the better of the two: a neighbour's load at one moment must not lower the ceiling.
            again = _ceiling(precision, count, device)
            ceiling = {rate: max(ceiling[rate], again[rate]) for rate in ceiling}
            result.ceilings[-1] |= ceiling
            result.rows[first:] = [_with_share(row, ceiling) for row in result.rows[first:]]
        if on_result is not None:
            on_result(result)


def _measure_case(
    config: PeersConfig,
    result: PeersResult,
    workers: dict[str, _Worker],
    jobs: dict[str, Job],
    ceiling: Mapping[str, float],
    say: Callable[[str], None],
) -> None:
    """All contestants through one case, in turns; those that fail are noted, and go on with the next case."""
    outputs: dict[str, Tensor] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    steps: dict[str, int] = {}

    def failed(name: str, error: _PeerFailure) -> None:
        label = _case_label(jobs[name].case)
        result.skipped.append({"peer": name, "case": label, "reason": str(error)})
        say(f"{label}: {name}: {error}")
        times.pop(name, None)

    for name, worker in workers.items():
        job = jobs[name]
        if job.given and not PEERS[name].given:
            note = {"peer": name, "case": "modulation given", "reason": "computes its modulation itself"}
            result.skipped += [note] if note not in result.skipped else []
            continue
        try:
            if PEERS[name].graph and not _graph_path(job).exists():
                say(f"exporting the graph with modulation {job.modulation} to ONNX")
                with _Worker() as exporter:  # its memory is free again before anyone is measured
                    exporter.ask("export", dataclasses.asdict(job))
            answer = worker.ask("prepare", dataclasses.asdict(job))
        except _PeerFailure as error:
            failed(name, error)
            continue
        from safetensors.torch import load_file

        outputs[name] = load_file(answer["output"])["out"]
        steps[name] = max(1, min(MOST_STEPS, round(TURN_SECONDS / answer["seconds"])))
        times[name] = []
        say(f"{_case_label(job.case)}: {name}: about {answer['seconds']:.4g} s a step")
    for index in range(config.rounds):
        order = list(times)
        for name in order[index % max(1, len(order)) :] + order[: index % max(1, len(order))]:
            try:
                answer = workers[name].ask("turn", {"steps": steps[name]})
            except _PeerFailure as error:
                failed(name, error)
                continue
            times[name].append((answer["wall"], answer["processor"]))
    for name in workers:
        with contextlib.suppress(_PeerFailure):
            workers[name].ask("release", {})
    result.rows += _rows(jobs, times, steps, outputs, ceiling)


def _rows(
    jobs: dict[str, Job],
    times: dict[str, list[tuple[float, float]]],
    steps: dict[str, int],
    outputs: dict[str, Tensor],
    ceiling: Mapping[str, float],
) -> list[PeerRow]:
    from safetensors.torch import load_file

    rows = []
    ours = statistics.median(wall for wall, _ in times[OURS]) if times.get(OURS) else None
    for name, taken in times.items():
        job = jobs[name]
        wanted = load_file(str(Path(job.folder, f"inputs-{job.batch}.safetensors")))["out"]
        wall, processor = Spread.of([wall for wall, _ in taken]), Spread.of([processor for _, processor in taken])
        flops, weight_bytes = step_cost(job)
        row = PeerRow(
            peer=name,
            tokens=job.tokens,
            precision=job.precision,
            threads=job.threads,
            batch=job.batch,
            modulation=job.modulation,
            rounds=len(taken),
            steps=len(taken) * steps[name],
            wall=wall,
            processor=processor,
            round_wall=[wall for wall, _ in taken],
            flops=flops,
            weight_bytes=weight_bytes,
            floor=0.0,
            share=0.0,
            error_reference=relative_error(outputs[name], wanted),
            error_ours=None if ours is None else relative_error(outputs[name], outputs[OURS]),
            max_error_ours=None if ours is None else max_relative_error(outputs[name], outputs[OURS]),
            times_ours=None if ours is None else wall.median / ours,
        )
        rows.append(_with_share(row, ceiling))
    return rows


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||, in float64."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm())


def max_relative_error(got: Tensor, wanted: Tensor) -> float:
    """max |got - wanted| / max |wanted|, in float64."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).abs().max() / wanted.abs().max())


def _with_share(row: PeerRow, ceiling: Mapping[str, float]) -> PeerRow:
    floor = max(row.flops / ceiling["products"], row.weight_bytes / ceiling["read"])
    return dataclasses.replace(row, floor=floor, share=floor / row.wall.median)


def step_cost(job: Job) -> tuple[int, int]:
    """FLOPs of a step, and the bytes of the weights that it reads once."""
    with torch.device("meta"):
        model = DiT(job.config)
    x, t, y = step_inputs(job.config, job.batch, torch.device("meta"), torch.float32)
    modulation = [torch.empty(job.batch, count * job.config.width, device="meta") for count in [6] * job.config.depth + [2]]
    flops = count_flops(lambda: model.step(x, modulation) if job.given else model(x, t, y))
    left_out = ("y_embedder", *(("adaLN_modulation", "t_embedder") if job.given else ()))  # of y's table one row is read
    numbers = sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in left_out))
    return flops, numbers * {"fp32": 4, "bf16": 2}.get(job.precision, 1)


def _ceiling(precision: str, threads: int, device: torch.device) -> dict[str, float]:
    """The best rate of matrix products, FLOP/s, of torch's and our own, and of reading, bytes/s."""
    dtype = "bf16" if precision in ("bf16", "fp8") else "fp32"
    with use_threads(threads), torch.inference_mode():
        found = measure_ceilings(device, dtype, threads)
        best = found.matmul_flops if precision in ("fp32", "bf16") else 0.0
        for rows, inner, columns in PRODUCT_SHAPES:
            call = _product(precision, device, rows, inner, columns)
            if call is not None:
                seconds = min(time_call(call, device)[0] for _ in range(8))
                best = max(best, 2 * rows * inner * columns / seconds)
        return {"products": best, "read": found.read_bytes}


def _product(precision: str, device: torch.device, rows: int, inner: int, columns: int) -> Callable[[], Any] | None:
    """One product of our own in a precision, which may beat torch's F.linear; None where there is none."""
    dtype = torch.bfloat16 if precision in ("bf16", "fp8") else torch.float32
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    weight = torch.randn(columns, inner, device=device, dtype=dtype)
    if device.type == "cpu" and precision != "fp8":
        packed = ops.pack_linear(weight, None, precision)  # type: ignore[arg-type]
        return lambda: ops.packed_linear(x, packed)
    if device.type == "cuda" and precision == "fp8":
        quantized, by_channel = ops.quantize_rows(x), ops.quantize_rows(weight)
        return lambda: ops.fp8_linear(quantized, by_channel)
    return None


class _PeerFailure(Exception):
    """A contestant could not do what it was asked; says why in one line."""


class _Worker:
    """A process that prepares one case after the other and runs steps of it when asked. Talks in lines of JSON."""

    def __init__(self) -> None:
        code = "from textok_fast.evaluation.peers import _serve; _serve()"
        path = os.pathsep.join(dict.fromkeys(entry or os.getcwd() for entry in sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for the parent, which ends its children
        )

    def ask(self, what: str, about: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **about}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise _PeerFailure(f"its process ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _PeerFailure(answer["error"])
        return answer

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=0.0 if kind else 5.0)  # at the end of its input it ends by itself
        self.process.kill()
        self.process.wait()


def _versions(peers: list[str]) -> dict[str, str]:
    """Of torch and of what the contestants stand on, where installed."""
    found = {"torch": str(torch.__version__)}
    for name in peers:
        for module in PEERS[name].needs:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[module] = importlib.metadata.version(module.replace("_", "-"))
    return found


def _case_label(case: tuple[int, str, int, int, str]) -> str:
    tokens, precision, threads, batch, modulation = case
    return f"{tokens} tokens, {precision}, {threads} thread(s), batch {batch}, modulation {modulation}"


def _markdown(result: PeersResult) -> str:
    """A table for each token count, precision and number of threads, and a line each for what did not run."""
    config, machine = result.config, result.machine
    where = f"{machine['cpu']}, {machine['usable_cores']} cores" if result.device == "cpu" else f"{machine['gpus'][0]['name']}"
    lines = [
        f"# One step of DiT-{config.size} in our engine and in others",
        "",
        f"{result.date}, {where}; {', '.join(f'{name} {version}' for name, version in result.versions.items())}; commit "
        f"{machine['git_commit'] or 'unknown'}. Same random weights and inputs; one process a contestant, taking turns over "
        f"{config.rounds} rounds. Milliseconds of wall time: median (quartiles). Share: of the measured ceilings, the time of "
        "the step's floor over the median. Errors: norm of the difference over the norm of the output, and in brackets the "
        "largest difference over the largest output.",
        "",
        f"`{result.command}`",
    ]
    groups = dict.fromkeys((row.tokens, row.precision, row.threads) for row in result.rows)
    for tokens, precision, threads in groups:
        rows = [row for row in result.rows if (row.tokens, row.precision, row.threads) == (tokens, precision, threads)]
        cases = list(dict.fromkeys(row.case for row in rows))
        title = f"## {tokens} tokens, {precision}{_threads_text(threads, result.device)}"
        heads = [f"batch {batch}, modulation {modulation}" for *_, batch, modulation in cases]
        columns = ["", *heads, "share", "error to fp32 reference", "error to ours"]
        lines += ["", title, "", _line(columns), _line(["---"] * len(columns))]
        for name in dict.fromkeys(row.peer for row in rows):
            own = {row.case: row for row in rows if row.peer == name}
            times = [_milliseconds(own[case].wall) if case in own else "" for case in cases]
            shares = [row.share for row in own.values()]
            share = f"{min(shares):.0%}" if len(shares) == 1 else f"{min(shares):.0%} to {max(shares):.0%}"
            to_ours = [(row.error_ours, row.max_error_ours) for row in own.values() if row.error_ours is not None]
            worst = max(to_ours, default=None)
            error = "" if worst is None or name == OURS else f"{worst[0]:.1e} [{max(e[1] or 0.0 for e in to_ours):.1e}]"
            lines.append(_line([name, *times, share, f"{max(row.error_reference for row in own.values()):.1e}", error]))
        against = []
        for case in cases:
            best = result.best_peer(case)
            ratio = None if best is None else best.times_ours
            against.append("" if best is None or ratio is None else f"{ratio:.2f}x ({best.peer})")
        lines.append(_line(["**best other over ours**", *against, "", "", ""]))
    if result.ceilings:
        lines += ["", "Ceilings: " + "; ".join(_ceiling_text(entry, result.device) for entry in result.ceilings) + "."]
    if result.skipped:
        lines += ["", "Not measured:", ""]
        reasons: dict[tuple[str, str], list[str]] = {}
        for entry in result.skipped:
            reasons.setdefault((entry["peer"], entry["reason"]), []).append(entry["case"])
        lines += [f"- {peer} ({'; '.join(cases)}): {reason}" for (peer, reason), cases in reasons.items()]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _threads_text(threads: int, device: str) -> str:
    return f", {threads} thread{'s' * (threads > 1)}" if device == "cpu" else ""


def _milliseconds(spread: Spread) -> str:
    return f"{spread.median * 1e3:.4g} ({spread.p25 * 1e3:.4g} to {spread.p75 * 1e3:.4g})"


def _ceiling_text(entry: dict[str, Any], device: str) -> str:
    rates = f"{entry['products'] / 1e9:.0f} GFLOP/s, {entry['read'] / 1e9:.1f} GB/s read"
    return f"{entry['precision']}{_threads_text(entry['threads'], device)} {rates}"


# -- the worker's side -------------------------------------------------------------------------------------------------------

Step = Callable[[], Tensor]


def _serve() -> None:
    """A worker's main loop: a line of JSON in, a line of JSON out, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    step: Step | None = None
    device = torch.device("cpu")
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        what = request.pop("do")
        try:
            if what == "export":
                _export(Job(**request))
                answer: dict[str, Any] = {}
            elif what == "release":
                step, answer = None, {}
            elif what == "turn":
                assert step is not None
                answer = _turn(step, request["steps"], device)
            else:
                step = None  # frees the former case's weights before the next are loaded
                job = Job(**request)
                torch.set_num_threads(job.threads)
                device = job.torch_device
                step = prepare(job)
                answer = _first(step, job)
        except Exception as error:  # a contestant may raise anything; the parent reports it
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:  # the parent is gone
            os._exit(1)


def prepare(job: Job) -> Step:
    """What runs one step of ``job`` in this process and returns its output, on the host or the device."""
    inner = PEERS[job.peer].build(job)

    @torch.inference_mode()
    def step() -> Tensor:
        return inner()

    return step


def _first(step: Step, job: Job) -> dict[str, Any]:
    """Warms up, keeps the output, and tells how long a step takes."""
    out = step()
    step()
    path = Path(job.folder, f"output-{os.getpid()}.safetensors")
    save_tensors({"out": out.detach().float().cpu().contiguous()}, path)
    return {"output": str(path), "seconds": _turn(step, 1, job.torch_device)["wall"]}


def _turn(step: Step, steps: int, device: torch.device) -> dict[str, float]:
    """Seconds a step, wall and processor, of ``steps`` in a row; a GPU is waited for at the end only, as in a loop."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"wall": (time.perf_counter() - wall) / steps, "processor": (time.process_time() - processor) / steps}


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _load(job: Job, dtype: torch.dtype | None = None) -> DiT:
    """The model of the run, its tensors mapped from the file; with another ``dtype`` or on a GPU a copy."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        model = DiT(job.config)
    tensors = load_file(str(Path(job.folder, "weights.safetensors")))
    for name in _all_tensors(model):
        owner, _, last = name.rpartition(".")
        module, value = model.get_submodule(owner), tensors[name]
        if last in module._parameters:
            module._parameters[last] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[last] = value
    return model.eval().to(job.torch_device, dtype or torch.float32)


@dataclass(frozen=True)
class _Inputs:
    x: Tensor  # (B, N, d) or (B, C, S, S)
    t: Tensor  # (B,) float32
    y: Tensor  # (B,) int64
    modulation: list[Tensor]  # each block's (B, 6 D), and last (B, 2 D)

    def arguments(self, given: bool) -> tuple[Any, ...]:
        return (self.x, self.modulation) if given else (self.x, self.t, self.y)

    def named(self, given: bool) -> dict[str, Tensor]:
        """As the exported graph's inputs are named."""
        if not given:
            return {"x": self.x, "t": self.t, "y": self.y}
        return {"x": self.x, **{f"modulation_{index}": value for index, value in enumerate(self.modulation)}}


def _read_inputs(job: Job, dtype: torch.dtype = torch.float32) -> _Inputs:
    from safetensors.torch import load_file

    tensors = load_file(str(Path(job.folder, f"inputs-{job.batch}.safetensors")), device=job.device)
    modulation = [tensors[f"modulation_{index}"].to(dtype) for index in range(job.config.depth + 1)]
    return _Inputs(tensors["x"].to(dtype), tensors["t"], tensors["y"], modulation)


class StepGraph(nn.Module):
    """A DiT's forward (x, t, y), or with ``given`` its step (x, modulations), as the one call that is compiled or exported."""

    def __init__(self, model: DiT, given: bool) -> None:
        super().__init__()
        self.model, self.given = model, given

    def forward(self, x: Tensor, *conditions: Any) -> Tensor:
        if self.given:
            return self.model.step(x, conditions[0])
        return self.model(x, *conditions)


def _build_engine(job: Job) -> Step:
    from textok_fast.inference.engine import Engine
    from textok_fast.inference.execution import Captured
    from textok_fast.inference.plan import Plan

    plan = Plan.automatic(job.device, precision=job.precision, batch=job.batch)  # type: ignore[arg-type]
    engine = Engine(_load(job), plan)
    inputs = _read_inputs(job, engine.dtype)
    rows = torch.cat(inputs.modulation, dim=1)  # (B, L)
    out = torch.empty(_output_shape(job), device=engine.device, dtype=engine.dtype)

    def evaluate() -> None:
        given = rows if job.given else engine.modulation(engine.model.condition(inputs.t, inputs.y))
        out.copy_(engine._whole(inputs.x, given, None, None))

    captured = Captured(evaluate, [out], plan.capture != "none")  # as the engine's loop runs an evaluation

    def step() -> Tensor:
        with engine._context():
            captured()
        return out

    return step


def _build_eager(job: Job) -> Step:
    graph = StepGraph(_load(job, job.dtype), job.given)
    arguments = _read_inputs(job, job.dtype).arguments(job.given)

    def step() -> Tensor:
        with use_backend("reference"):
            return graph(*arguments)

    return step


def _build_compiled(job: Job) -> Step:
    # Constant weights let inductor pack them for its products once. On CUDA that is experimental, and changes layouts only.
    torch._inductor.config.freezing = job.torch_device.type == "cpu"
    torch._inductor.config.autotune_num_choices_displayed = 0
    torch._dynamo.reset()
    arguments = _read_inputs(job, job.dtype).arguments(job.given)
    graph = StepGraph(_load(job, job.dtype), job.given)
    compiled = torch.compile(graph, mode=job.compile_mode, dynamic=False, fullgraph=True)

    def step() -> Tensor:
        with use_backend("reference"):
            return cast(Tensor, compiled(*arguments))

    return step


class OriginalDiT(nn.Module):
    """DiT as its authors wrote it down (arXiv 2212.09748, section 3.2 and figure 3), over the weights of ours.

    Each block computes its own SiLU and its adaLN product, then x + gate * attention(modulate(LN(x))) and
    x + gate * MLP(modulate(LN(x))), operation by operation; attention is torch's scaled_dot_product_attention.
    """

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, N, d) or (B, C, S, S), t (B,), y (B,) -> as x, with the model's output channels."""
        model, config = self.model, self.model.config
        width, heads, p = config.width, config.heads, config.patch_size
        if config.input_size:
            kernel = model.x_embedder.weight.unflatten(1, (config.in_channels, p, p))  # (D, C, p, p)
            h = F.conv2d(x, kernel, model.x_embedder.bias, stride=p).flatten(2).transpose(1, 2)  # (B, N, D)
        else:
            h = model.x_embedder(x)  # (B, N, D)
        h = h + model.pos_embed
        features = timestep_features(t * config.time_scale, model.t_embedder.frequencies)  # (B, 256)
        c = model.t_embedder.mlp(features.to(h.dtype))  # (B, D)
        if model.y_embedder is not None:
            c = c + model.y_embedder.embedding_table(y)
        for block in model.blocks:
            parts = block.adaLN_modulation(c).chunk(6, dim=1)  # type: ignore[operator]
            shift1, scale1, gate1, shift2, scale2, gate2 = parts  # each (B, D)
            hidden = _modulate(F.layer_norm(h, (width,), eps=1e-6), shift1, scale1)  # (B, N, D)
            qkv = block.attn.qkv(hidden).unflatten(-1, (3, heads, width // heads))  # type: ignore[operator,union-attr]
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D / H)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, D)
            h = h + gate1.unsqueeze(1) * block.attn.proj(mixed)  # type: ignore[operator,union-attr]
            hidden = _modulate(F.layer_norm(h, (width,), eps=1e-6), shift2, scale2)  # (B, N, D)
            hidden = F.gelu(block.mlp.fc1(hidden), approximate="tanh")  # type: ignore[operator,union-attr]
            h = h + gate2.unsqueeze(1) * block.mlp.fc2(hidden)  # type: ignore[operator,union-attr]
        shift, scale = model.final_layer.adaLN_modulation(c).chunk(2, dim=1)  # each (B, D)
        out = model.final_layer.linear(_modulate(F.layer_norm(h, (width,), eps=1e-6), shift, scale))  # (B, N, C p p)
        if not config.input_size:
            return out
        grid = config.input_size // p
        out = out.unflatten(2, (config.out_channels, p, p)).unflatten(1, (grid, grid))  # (B, rows, columns, C, p, p)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(len(x), config.out_channels, grid * p, grid * p)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)  # (B, N, D)


def _build_original(job: Job) -> Step:
    model = OriginalDiT(_load(job, job.dtype))
    inputs = _read_inputs(job, job.dtype)
    return lambda: model(inputs.x, inputs.t, inputs.y)


def _build_diffusers(job: Job) -> Step:
    model = to_diffusers_dit(_load(job, job.dtype))
    inputs = _read_inputs(job, job.dtype)
    return lambda: model(inputs.x, inputs.t, inputs.y, return_dict=False)[0]


# -- exported graphs -----------------------------------------------------------------------------------------------------------


def _graph_path(job: Job) -> Path:
    """In float32; in bfloat16 for TensorRT, which takes the graph's types. The others quantize or round it themselves."""
    dtype = "bf16" if PEERS[job.peer].typed_graph and job.precision == "bf16" else "fp32"
    return Path(job.folder, f"{job.modulation}-{dtype}.onnx")


def _export(job: Job) -> None:
    """The step as ONNX, batch dynamic, weights beside it."""
    from textok_fast.export.onnx import quiet_exporter

    path = _graph_path(job)
    dtype = torch.bfloat16 if path.stem.endswith("bf16") else torch.float32
    job = dataclasses.replace(job, device="cpu")
    inputs = _read_inputs(job, dtype)
    # Of a batch of 2: a batch of 1 would become a constant.
    x, t, y, *modulation = (torch.cat([value, value])[:2] for value in (inputs.x, inputs.t, inputs.y, *inputs.modulation))
    inputs = _Inputs(x, t, y, modulation)
    batch = torch.export.Dim("batch")
    shapes: tuple[Any, ...] = ({0: batch}, ([{0: batch}] * len(inputs.modulation),) if job.given else ({0: batch}, {0: batch}))
    with quiet_exporter():
        torch.onnx.export(
            StepGraph(_load(job, dtype), job.given),
            inputs.arguments(job.given),
            str(path),
            input_names=list(inputs.named(job.given)),
            output_names=["out"],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            external_data=True,
            verbose=False,
        )


def _build_onnxruntime(job: Job) -> Step:
    import onnxruntime

    path = _graph_path(job)
    if job.precision == "int8":
        path = _once(path.with_name(f"{job.modulation}-dynamic-int8.onnx"), lambda target: _quantize_dynamic(path, target))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
    on_cuda = job.torch_device.type == "cuda"
    index = job.torch_device.index or 0
    provider = ("CUDAExecutionProvider", {"device_id": index, "use_tf32": 0}) if on_cuda else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    if on_cuda and "CUDAExecutionProvider" not in session.get_providers():
        raise InputError("this build of ONNX Runtime has no CUDA provider: install onnxruntime-gpu")
    binding = session.io_binding()
    inputs = _read_inputs(job)
    named = {name: tensor.contiguous() for name, tensor in inputs.named(job.given).items()}
    out = torch.empty(_output_shape(job), device=job.torch_device)
    import numpy as np

    place = ("cuda", index) if on_cuda else ("cpu", 0)
    for name, tensor in named.items():
        kind = np.int64 if tensor.dtype == torch.int64 else np.float32
        binding.bind_input(name, *place, kind, tuple(tensor.shape), tensor.data_ptr())
    binding.bind_output("out", *place, np.float32, tuple(out.shape), out.data_ptr())

    def step(held: dict[str, Tensor] = named) -> Tensor:  # the tensors live as long as the binding that points at them
        session.run_with_iobinding(binding)
        return out

    return step


def _build_openvino(job: Job) -> Step:
    import openvino

    path = _graph_path(job)
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if job.precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
    }
    if job.precision == "int8":
        # Its fastest int8: weights by channel, activations quantized as they come, in groups of the model's width, which
        # divides the inner size of every product. It runs ONNX Runtime's quantized graph no faster than a float32 one.
        path = _once(path.with_name(f"{job.modulation}-weights-int8.onnx"), lambda target: quantize_weights(path, target))
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = job.config.width
    named = _read_inputs(job).named(job.given)
    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape({name: list(tensor.shape) for name, tensor in named.items()})
    request = core.compile_model(model, "CPU", options).create_infer_request()
    for name, tensor in named.items():
        request.set_tensor(name, openvino.Tensor(tensor.contiguous().numpy(), shared_memory=True))

    def step(held: dict[str, Tensor] = named) -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return step


def _once(path: Path, write: Callable[[Path], None]) -> Path:
    if not path.exists():
        write(path)
    return path


def _quantize_dynamic(source: Path, target: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Without the shapes that the exporter noted: the quantizer transposes Gemm's weights and then finds them wrong.
    model = onnx.load(str(source), load_external_data=False)
    del model.graph.value_info[:]
    plain = source.with_name(f"{source.stem}-shapeless.onnx")
    onnx.save(model, str(plain))
    options = {"per_channel": True, "weight_type": QuantType.QInt8, "use_external_data_format": True}
    quantize_dynamic(str(plain), str(target), **options)


def quantize_weights(source: Path, target: Path) -> None:
    """The graph with every product's constant matrix (in, out) as int8 and one scale an output channel, max|w| / 127."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(source))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        name = node.input[1] if node.op_type == "MatMul" else ""
        if name in constants:
            weight = numpy_helper.to_array(constants[name])  # (in, out)
            scale = np.maximum(np.abs(weight).max(axis=0) / 127, np.finfo(np.float32).tiny).astype(np.float32)  # (out,)
            rounded = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
            model.graph.initializer.remove(constants.pop(name))
            model.graph.initializer.extend(
                [numpy_helper.from_array(rounded, f"{name}_int8"), numpy_helper.from_array(scale, f"{name}_scale")]
            )
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [name], axis=1))
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    onnx.save(model, str(target), save_as_external_data=True, location=f"{target.name}.data")


def _output_shape(job: Job) -> tuple[int, ...]:
    config = job.config
    if config.num_tokens:
        return job.batch, config.num_tokens, config.out_channels
    return job.batch, config.out_channels, config.input_size, config.input_size


# -- GPU peers -----------------------------------------------------------------------------------------------------------------


def _build_tensorrt(job: Job) -> Step:
    """TensorRT from the ONNX graph, strongly typed, one profile at the batch, replayed as a CUDA graph."""
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(_graph_path(job))):
        raise InputError(f"TensorRT does not take the graph: {parser.get_error(0)}")
    named = {name: tensor.contiguous() for name, tensor in _read_inputs(job, job.dtype).named(job.given).items()}
    settings = builder.create_builder_config()
    settings.clear_flag(tensorrt.BuilderFlag.TF32)  # nobody else has it in float32
    profile = builder.create_optimization_profile()
    for name, tensor in named.items():
        profile.set_shape(name, *[tuple(tensor.shape)] * 3)
    settings.add_optimization_profile(profile)
    blob = builder.build_serialized_network(network, settings)
    if blob is None:
        raise InputError("TensorRT could not build the graph")
    engine = tensorrt.Runtime(logger).deserialize_cuda_engine(blob)
    context = engine.create_execution_context()
    out = torch.empty(_output_shape(job), device=job.torch_device, dtype=job.dtype)
    for name, tensor in named.items():
        context.set_input_shape(name, tuple(tensor.shape))
        context.set_tensor_address(name, tensor.data_ptr())
    context.set_tensor_address("out", out.data_ptr())

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        context.execute_async_v3(stream.cuda_stream)  # the first run allocates, which a capture forbids
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)

    def step(held: tuple[Any, ...] = (engine, context, named)) -> Tensor:  # what the graph points at
        graph.replay()
        return out

    return step


def _build_torch_tensorrt(job: Job) -> Step:
    import torch_tensorrt  # noqa: F401 (registers the backend)

    torch._dynamo.reset()
    arguments = _read_inputs(job, job.dtype).arguments(job.given)
    graph = StepGraph(_load(job, job.dtype), job.given)
    options: dict[str, Any] = {"enabled_precisions": {job.dtype}, "disable_tf32": True, "min_block_size": 1}
    compiled = torch.compile(graph, backend="torch_tensorrt", dynamic=False, options=options)

    def step() -> Tensor:
        with use_backend("reference"):
            return cast(Tensor, compiled(*arguments))

    return step


@dataclass(frozen=True)
class PeerKind:
    """A contestant: how its step is built, and where and in which precisions it is measured."""

    build: Callable[[Job], Step]
    precisions: dict[str, tuple[str, ...]]  # device type -> precisions
    needs: tuple[str, ...] = ()  # modules
    given: bool = True  # whether it can be handed the modulation
    graph: bool = False  # whether it runs an exported ONNX graph
    typed_graph: bool = False  # whether that graph must be in the precision of the run
    lacks: str = ""  # why the other precisions are not measured, where there is more to say


_FLOATS: dict[str, tuple[str, ...]] = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16")}
_EXPORTER = ("onnx", "onnxscript")

PEERS: dict[str, PeerKind] = {
    OURS: PeerKind(_build_engine, {"cpu": ("fp32", "bf16", "int8"), "cuda": ("fp32", "bf16", "fp8")}),
    "original DiT form": PeerKind(_build_original, _FLOATS, given=False),
    "torch eager": PeerKind(_build_eager, _FLOATS),
    "torch.compile": PeerKind(_build_compiled, _FLOATS),
    "diffusers": PeerKind(_build_diffusers, _FLOATS, ("diffusers",), given=False),
    "ONNX Runtime": PeerKind(
        _build_onnxruntime,
        {"cpu": ("fp32", "int8"), "cuda": ("fp32",)},
        ("onnxruntime", *_EXPORTER),
        graph=True,
        lacks="it lacks bf16 kernels that the graph needs",
    ),
    "OpenVINO": PeerKind(_build_openvino, {"cpu": ("fp32", "bf16", "int8")}, ("openvino", *_EXPORTER), graph=True),
    "TensorRT": PeerKind(_build_tensorrt, {"cuda": ("fp32", "bf16")}, ("tensorrt", *_EXPORTER), graph=True, typed_graph=True),
    "torch-tensorrt": PeerKind(_build_torch_tensorrt, {"cuda": ("fp32", "bf16")}, ("torch_tensorrt",)),
}
