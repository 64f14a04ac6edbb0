"""What every measurement says of itself: on which machine it ran, by which command, when; and how it reports on the way."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import textok_fast


def provenance(command: str | None = None) -> dict[str, Any]:
    """The fields ``machine``, ``command`` and ``date`` of a result: :func:`machine_info`, ``command`` or else this process's
    own command line, and now in ISO 8601, UTC."""
    return {
        "machine": machine_info(),
        "command": command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def reporter(progress: bool) -> Callable[[str], None]:
    """Prints lines on stderr as they come, or with ``progress`` false nothing."""

    def say(line: str) -> None:
        if progress:
            print(line, file=sys.stderr, flush=True)

    return say


def machine_info() -> dict[str, Any]:
    """What ran the measurement, JSON-ready: processor, threads, instruction sets, memory, GPUs, versions, git commit.

    ``memory_bytes`` and the GPU entries are None or empty where unknown. ``git_commit`` ends in "+changes" when tracked
    files differ from it, and is None outside a checkout of this project; the environment's TEXTOK_COMMIT comes before both.
    """
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _isa_flags(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "driver": _driver_version() if torch.cuda.is_available() else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "textok_fast": textok_fast.__version__,
        "git_commit": _git_commit(),
    }


def _cpuinfo(key: str) -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, separator, value = line.partition(":")
            if separator and name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return None


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _isa_flags() -> list[str]:
    """Of the instruction sets that decide the speed of matrix products, those that this processor has."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    wanted = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
    return [flag for flag in (*wanted, "asimd", "bf16", "sve") if flag in flags]


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in found]


def _driver_version() -> str | None:
    output = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return output.splitlines()[0].strip() if output else None


def _git_commit() -> str | None:
    if given := os.environ.get("TEXTOK_COMMIT"):  # of a copy whose .git is missing or older
        return given
    root = Path(textok_fast.__file__).resolve().parents[1]
    top = _output(["git", "-C", str(root), "rev-parse", "--show-toplevel"])
    if not top or Path(top).resolve() != root:  # installed somewhere inside another project's checkout
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}+changes" if commit and changed else commit or None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
