"""What a run will take, what the machine has, and the refusal when the one does not fit into the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from textok_fast.errors import InputError
from textok_fast.inference.precision import ADALN, DTYPES, Precision, _blocks, _linears

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run takes on its device, and ``available``: what it may take in all, the weights that lie there included."""

    weights: int
    modulation: int  # of a generator: the adaLN outputs that are kept, and the rows of one evaluation
    activations: int  # what is alive at the worst moment of one forward pass
    state: int  # samples, noise, text and image tokens, tables
    available: int

    @property
    def total(self) -> int:
        return self.weights + self.modulation + self.activations + self.state

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    def describe(self) -> str:
        """One line, such as "1.4 GiB: weights 1.3 GiB, activations 96 MiB, state 12 KiB; available 22.0 GiB"."""
        named = {"weights": self.weights, "modulation": self.modulation, "activations": self.activations, "state": self.state}
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in named.items() if size)
        return f"{format_bytes(self.total)}: {parts}; available {format_bytes(self.available)}"


def require_fits(estimate: MemoryEstimate, what: str, advice: str) -> None:
    """Raises InputError with the numbers and ``advice`` when ``what`` (such as "a batch of 64") does not fit."""
    if not estimate.fits:
        raise InputError(f"{what} does not fit, it takes {estimate.describe()}; {advice}")


def weights_estimate(
    model: nn.Module, precision: Precision, device: torch.device, packs: bool = True, limit: int | None = None
) -> MemoryEstimate:
    """What the copy of ``model`` that an engine makes on ``device`` will hold, known before anything is moved.

    Args:
        packs: whether a CPU's products are packed (``products`` of the plan is not "reference").
        limit: as in :func:`available_memory`.
    """
    dtype = DTYPES[precision]
    products = {id(linear.weight) for block in _blocks(model) for linear in _linears(block)}
    bytewise = products if precision in ("int8", "fp8") else set()
    copied = products if device.type == "cpu" and packs else bytewise
    tensors = {id(each): (name, each) for name, each in (*model.named_parameters(), *model.named_buffers())}
    weights = shared = 0
    for key, (name, tensor) in tensors.items():
        kind = torch.int8 if key in bytewise else dtype if tensor.is_floating_point() else tensor.dtype
        if ADALN in name and precision == "int8" and packs:
            kind = torch.bfloat16
        weights += tensor.numel() * kind.itemsize
        if key not in copied and ADALN not in name and tensor.device == device and tensor.dtype == kind:
            shared += tensor.nbytes
    return MemoryEstimate(weights, 0, 0, 0, available_memory(device, shared, limit))


def available_memory(device: torch.device, resident: int = 0, limit: int | None = None) -> int:
    """Bytes that a run may take on ``device``.

    On CUDA what the driver has free and what torch holds unused, but for the memory of CUDA graphs, which only they use; on a
    CPU the kernel's MemAvailable, or what is left of the container's limit (cgroup v2 or v1) where that is less.

    Args:
        resident: bytes of the run that lie there already, such as weights; they are added.
        limit: never more than this (:attr:`Plan.memory_limit`).
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        for segment in torch.cuda.memory_snapshot(include_traces=False):
            if segment["device"] == (device.index or 0) and tuple(segment["segment_pool_id"]) == (0, 0):
                free += segment["total_size"] - segment["active_size"]
    else:
        free = min(left for left in (_system_free(), _container_free()) if left is not None)
    total = free + resident
    return total if limit is None else min(total, limit)


def format_bytes(size: int) -> str:
    """Such as "1.5 GiB"; no fraction below a MiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.1f} {unit}" if unit in ("MiB", "GiB") else f"{value:.0f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def _system_free() -> int:
    try:
        lines = (_PROC / "meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 2**62  # no such file on this system: only the limit of the plan holds


def _container_free() -> int | None:
    """What the tightest memory limit above this process leaves, or None where there is none."""
    try:
        groups = (_PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    left: list[int] = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # v2
            root, names = _CGROUP, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = _CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = root / path.lstrip("/")
        for directory in (own, *own.parents):  # a limit of any group above holds too; inside a container the root is the group
            if (room := _group_free(directory, *names)) is not None:
                left.append(room)
            if directory == root:
                break
    return min(left, default=None)


def _group_free(directory: Path, limit_name: str, usage_name: str, reclaimable: str) -> int | None:
    try:
        limit, usage = ((directory / name).read_text(encoding="ascii").strip() for name in (limit_name, usage_name))
        if limit == "max" or int(limit) >= 2**60:  # v1 writes a huge number for none
            return None
        fields = dict(line.split() for line in (directory / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(int(limit) - int(usage) + int(fields.get(reclaimable, 0)), 0)  # file cache gives way
    except (OSError, ValueError):
        return None
