"""Joules that a block of code takes: a GPU's by NVML or nvidia-smi, a CPU's by RAPL, or None with the reason.

A device's counter counts all that runs on it. For a GPU that is the board; for a CPU the packages, without memory.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from textok_fast.ops.device import resolve_device

POWERCAP = Path("/sys/class/powercap")
POLL_SECONDS = 0.1  # nvidia-smi takes tens of milliseconds to answer


class Energy:
    """``with Energy(device) as energy: ...``, then ``energy.joules`` and ``energy.seconds``.

    Attributes:
        joules: what the device took inside the block; None where nothing tells, and inside the block.
        seconds: how long the block took, wall time; the GPU is waited for at both ends.
        source: what told: "nvml", "nvidia-smi" or "rapl"; "" where nothing did.
        reason: why there is no number, else "".
    """

    def __init__(self, device: str | torch.device = "auto") -> None:
        self.device = resolve_device(device)
        self.joules: float | None = None
        self.seconds = 0.0
        self._meter, self.source, self.reason = _find_meter(self.device)

    def __enter__(self) -> Energy:
        self.joules = None
        self._wait()
        self._started = time.perf_counter()
        if self._meter is not None:
            self._meter.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._wait()
        self.seconds = time.perf_counter() - self._started
        if self._meter is not None:
            self.joules, self.reason = self._meter.stop()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _find_meter(device: torch.device) -> tuple[Any, str, str]:
    """A meter, its name, and why there is none."""
    if device.type == "cpu":
        packages = rapl_packages()
        if not packages:
            return None, "", f"no readable RAPL counter under {POWERCAP} (virtual machines have none; else it is for root)"
        return _Counter(lambda: [read_rapl(package) for package in packages]), "rapl", ""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    read, why = _nvml_counter(uuid)
    if read is not None:
        return _Counter(read), "nvml", ""
    command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", f"--id={uuid}"]
    if read_power(command) is None:
        return None, "", f"NVML: {why}; nvidia-smi reports no power"
    return PowerPoll(lambda: read_power(command)), "nvidia-smi", ""


# -- counters of energy ------------------------------------------------------------------------------------------------------

Counts = list[tuple[float, float]]  # of each counter: joules now, and where it starts again at 0 (0: never)


class _Counter:
    """The difference of counters that count up."""

    def __init__(self, read: Callable[[], Counts]) -> None:
        self._read = read
        self._before: Counts | str = []

    def start(self) -> None:
        self._before = self._try()

    def stop(self) -> tuple[float | None, str]:
        after, before = self._try(), self._before
        if isinstance(before, str) or isinstance(after, str):
            return None, before if isinstance(before, str) else str(after)
        used = [now - then + (wrap if now < then else 0) for (then, wrap), (now, _) in zip(before, after, strict=True)]
        return sum(used), ""

    def _try(self) -> Counts | str:
        try:
            return self._read()
        except Exception as error:  # NVML's errors are of its own kind; a number that is missing must not end a benchmark
            return f"{type(error).__name__}: {error}"


def rapl_packages(root: Path | None = None) -> list[Path]:
    """The directories of the processor packages whose RAPL counters can be read; not of their parts, which they contain."""
    found = []
    for package in sorted((root or POWERCAP).glob("*-rapl:*")):
        try:
            if package.name.count(":") == 1 and (package / "name").read_text().startswith("package"):
                read_rapl(package)
                found.append(package)
        except (OSError, ValueError):
            continue
    return found


def read_rapl(package: Path) -> tuple[float, float]:
    """Joules so far, and the joules at which the counter starts again."""
    micro = [int((package / name).read_text()) for name in ("energy_uj", "max_energy_range_uj")]
    return micro[0] / 1e6, micro[1] / 1e6


def _nvml_counter(uuid: str) -> tuple[Callable[[], Counts] | None, str]:
    """What reads a GPU's energy since the driver was loaded (Volta and later), or None and why."""
    try:
        import pynvml
    except ImportError:
        return None, "pynvml is not installed (pip install nvidia-ml-py)"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return None, str(error)
    return lambda: [(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)], ""  # millijoules


# -- power, polled -----------------------------------------------------------------------------------------------------------


def read_power(command: list[str]) -> float | None:
    """Watts as nvidia-smi prints them, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return float(done.stdout.strip().splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


class PowerPoll:
    """Watts read in a thread, every ``POLL_SECONDS`` and at both ends, and summed up by the trapezoidal rule."""

    def __init__(self, read: Callable[[], float | None]) -> None:
        self._read = read
        self._samples: list[tuple[float, float]] = []  # (seconds, watts)
        self._done = threading.Event()

    def start(self) -> None:
        self._samples, self._done = [], threading.Event()
        self._sample()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[float | None, str]:
        self._done.set()
        self._thread.join()
        self._sample()
        if len(self._samples) < 2:
            return None, "nvidia-smi reported power less than twice"
        pairs = zip(self._samples, self._samples[1:], strict=False)
        return sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairs), ""

    def _poll(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self._sample()

    def _sample(self) -> None:
        watts = self._read()
        if watts is not None:
            self._samples.append((time.perf_counter(), watts))
