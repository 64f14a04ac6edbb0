"""What nvcc makes of the CUDA kernels in csrc/cuda: registers, shared memory, stack and spills, without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from textok_fast.errors import InputError

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"  # in a checkout; not installed with the package

_NAME = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def find_nvcc() -> str | None:
    """The CUDA compiler in ``CUDACXX`` or on PATH."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def kernel_sources() -> list[Path]:
    """The files of csrc/cuda that hold kernels; none outside of a checkout.

    A file that includes PyTorch's headers holds the operations' entry points, and no kernel.
    """
    files = sorted(SOURCES.glob("*.cu"))
    return [
        file for file in files if "<torch/" not in (text := file.read_text(encoding="utf-8")) and '#include "kernels.h"' in text
    ]


def compile_report(architectures: Sequence[str] = ARCHITECTURES) -> list[dict[str, Any]]:
    """Compiles every CUDA kernel for each architecture and collects what the assembler says of it.

    Takes about 15 seconds of processor time an architecture.

    Args:
        architectures: such as "sm_80" or "sm_90a".

    Returns: one entry a kernel and architecture, in the order of their names: "kernel" (readable when c++filt is on PATH),
        "source", "architecture", "registers" (of a thread), and in bytes "shared" (static, of a block), "stack",
        "spill_stores", "spill_loads" (of a thread).
    Raises: InputError without nvcc, without the sources, for an architecture that nvcc does not know, and for sources that do
        not compile.
    """
    nvcc, sources = find_nvcc(), kernel_sources()
    if nvcc is None:
        raise InputError("no CUDA compiler: put nvcc on PATH, or its path in CUDACXX")
    if not sources:
        raise InputError("the CUDA sources are not installed with the package; run this in a checkout of the repository")
    for name in architectures:
        if not re.fullmatch(r"sm_\d+[af]?", name):
            raise InputError(f"an architecture is written such as sm_80 or sm_90a, got {name!r}")
    jobs = [(nvcc, source, name) for source in sources for name in architectures]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        entries = [entry for found in pool.map(lambda job: _compile(*job), jobs) for entry in found]
    names = _readable([entry["kernel"] for entry in entries])
    entries = [{**entry, "kernel": name} for entry, name in zip(entries, names, strict=True)]
    return sorted(entries, key=lambda entry: (entry["kernel"], architectures.index(entry["architecture"])))


def _compile(nvcc: str, source: Path, architecture: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        command = [nvcc, "-cubin", f"-arch={architecture}", "-std=c++17", "-O3", "-Xptxas", "-v", str(source)]
        command += ["-o", str(Path(directory) / "kernels.cubin")]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip() and "ptxas info" not in line]
        raise InputError(f"nvcc does not compile {source.name} for {architecture}: {' '.join(lines[:3]) or 'no output'}")
    return parse_ptxas(done.stdout, source.name)


def parse_ptxas(output: str, source: str) -> list[dict[str, Any]]:
    """The entries of :func:`compile_report` in what ``nvcc -Xptxas -v`` printed, with mangled names."""
    entries: list[dict[str, Any]] = []
    for line in output.splitlines():
        if match := _NAME.search(line):
            numbers = {"registers": 0, "shared": 0, "stack": 0, "spill_stores": 0, "spill_loads": 0}
            entries.append({"kernel": match[1], "source": source, "architecture": match[2], **numbers})
        elif not entries:
            continue
        elif match := _STACK.search(line):
            entries[-1].update(stack=int(match[1]), spill_stores=int(match[2]), spill_loads=int(match[3]))
        elif match := _USED.search(line):
            shared = _SHARED.search(line)
            entries[-1].update(registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    return entries


def _readable(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names) + "\n", stdout=subprocess.PIPE, text=True)
    readable = done.stdout.splitlines()
    if done.returncode or len(readable) != len(names):
        return names
    return [name.removeprefix("void ").replace("textok_fast::cuda::", "").partition("(")[0] for name in readable]
