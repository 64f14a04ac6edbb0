"""Every GPU kernel compiled ahead of time, as one table: ``python -m textok_fast.ops.report``. Needs Triton, but no GPU.

Compiles the list ``AOT`` of each module of :mod:`textok_fast.ops.triton_kernels` for sm_80, sm_90 and sm_100 (or ``--arch``)
and prints registers a thread, shared memory a block, local memory a thread (spilled registers) and the tensor-core instructions
of each. ``--cuda`` adds the CUDA sources, where nvcc is. The exit code is 1 when a kernel spills, lacks the tensor-core
instructions that it must have, needs more shared memory than the architecture has, or does not compile.

The compiler runs in processes of its own without ``TRITON_INTERPRET``, so that this also works from a process that interprets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from textok_fast.errors import InputError
from textok_fast.files import write_text
from textok_fast.ops import nvcc
from textok_fast.ops.aot import AotCase, AotResult, compile_case
from textok_fast.ops.library import KERNELS

ARCHITECTURES = (80, 90, 100)
_RECORD = "@aot "  # begins the lines that are results; a compiler may print what it likes
# What would change what is compiled, or keep a process without a GPU from importing the kernels.
_NOT_INHERITED = ("TRITON_INTERPRET", "TEXTOK_OPS")


def kernel_modules() -> list[str]:
    """Dotted names of the modules whose kernels are compiled."""
    return [f"textok_fast.ops.triton_kernels.{module}" for module in KERNELS]


def compile_all(
    modules: Sequence[str] | None = None,
    arches: Sequence[int] = ARCHITECTURES,
    jobs: int | None = None,
    progress: Callable[[AotResult], None] | None = None,
) -> list[AotResult]:
    """Compiles the ``AOT`` lists of ``modules`` (default: all of ours) for each architecture in ``jobs`` processes.

    What cannot be imported or compiled becomes a result with an ``error``. Order: module, case, architecture.
    """
    modules = list(kernel_modules() if modules is None else modules)
    jobs = jobs or _usable_cores()
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(lambda index: _run_worker(modules, arches, index, jobs, progress), range(jobs))
        found = [pair for part in parts for pair in part]
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_worker(
    modules: list[str], arches: Sequence[int], index: int, count: int, progress: Callable[[AotResult], None] | None
) -> list[tuple[int, AotResult]]:
    """Results of every ``count``-th piece of work from ``index`` on, with their places."""
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    root = Path(__file__).resolve().parents[2]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "textok_fast.ops.report", "--worker", f"{index}/{count}"]
    command += ["--modules", *modules, "--arch", *map(str, arches)]
    planned: dict[int, AotResult] = {}
    done: dict[int, AotResult] = {}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith(_RECORD):
                    continue
                record = json.loads(line.removeprefix(_RECORD))
                result = AotResult.from_dict(record["result"])
                (done if record["done"] else planned)[record["place"]] = result
                if record["done"] and progress is not None:
                    progress(result)
        errors.seek(0)
        last_words = errors.read().strip().splitlines()[-1:]
    if process.returncode and not planned:
        raise RuntimeError(f"the compiling process ended with {process.returncode}: {' '.join(last_words)}")
    lost = [place for place in planned if place not in done]  # a crash of the compiler takes its process with it
    for place in lost:
        why = f"the compiler crashed ({process.returncode})" if place == lost[0] else "not compiled, see the crash before it"
        done[place] = AotResult.from_dict(planned[place].to_dict() | {"error": why})
    return list(done.items())


def _work(modules: Sequence[str], arches: Sequence[int], index: int, count: int) -> None:
    """The worker: announces its share of the work, then does it, one JSON line for each."""
    work: list[tuple[AotResult, AotCase | None]] = []
    for module in modules:
        cases, error = _cases(module)
        if error:
            work.append((AotResult(module.rpartition(".")[2], "(module)", 0, error=error), None))
        for case in cases:
            for arch in arches:
                work.append((AotResult(case.kernel_name, case.name, arch), case))
    share = [(place, *item) for place, item in enumerate(work) if place % count == index]

    def say(place: int, result: AotResult, done: bool) -> None:
        print(_RECORD + json.dumps({"place": place, "done": done, "result": result.to_dict()}), flush=True)

    for place, result, _ in share:
        say(place, result, done=False)
    for place, result, planned in share:
        if planned is not None:
            try:
                result = compile_case(planned, result.arch)
            except Exception as error:
                result = AotResult.from_dict(result.to_dict() | {"error": _one_line(error)})
        say(place, result, done=True)


def _cases(module: str) -> tuple[Sequence[AotCase], str]:
    try:
        imported = import_module(module)
    except Exception as error:
        traceback.print_exc()
        return (), f"cannot be imported: {_one_line(error)}"
    cases = getattr(imported, "AOT", None)
    return (cases, "") if cases else ((), "has no AOT list")


def _one_line(error: BaseException) -> str:
    """The last lines of Triton's errors say what is wrong, the first ones where."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 400 else '... ' + text[-400:]}"


# -- what a reader sees --------------------------------------------------------------------------------------------------------

HEADINGS = ("kernel", "configuration", "arch", "warps", "registers", "shared bytes", "spill bytes", "tensor cores")


def table_cells(results: Sequence[AotResult]) -> list[list[str]]:
    """Results as rows of text under :data:`HEADINGS`."""
    rows = []
    for result in results:
        head = [result.kernel, result.name, f"sm_{result.arch}" if result.arch else ""]
        if result.skipped or result.error:
            rows.append([*head, "", "", "", "", result.skipped or "ERROR"])
            continue
        instructions = ", ".join(f"{name} x{count}" for name, count in sorted(result.tensor_core.items()))
        missing = "MISSING" if result.must_use_tensor_cores else "-"
        numbers = (result.num_warps, result.registers, result.shared)
        rows.append([*head, *map(str, numbers), str(result.spill_bytes), instructions or missing])
    return rows


def aligned_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0, 1)) -> str:
    """Plain text; the columns named in ``left`` and the last one are set to the left, the others to the right."""
    lines = [list(headings), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    flush = {*left, len(headings) - 1}
    texts = [
        "  ".join(cell.ljust(w) if i in flush else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in [texts[0], "-" * len(texts[0]), *texts[1:]])


def problems(results: Sequence[AotResult]) -> list[str]:
    """One line for each thing that makes the exit code 1."""
    named = ((f"{r.kernel}, {r.name}" + (f", sm_{r.arch}" if r.arch else ""), r.problems) for r in results)
    return [f"{name}: {problem}" for name, found in named for problem in found]


def parse_arch(text: str) -> int:
    """90 of "90", "sm_90" or "sm_90a"; of "present" the architecture of this machine's GPU."""
    if text == "present":
        import torch

        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("torch sees no GPU, so that none is present")
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    digits = text.removeprefix("sm_").rstrip("af")
    if not digits.isdigit() or int(digits) < 70:
        raise argparse.ArgumentTypeError(f"must be an architecture such as sm_90, or present, got {text!r}")
    return int(digits)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m textok_fast.ops.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        type=parse_arch,
        default=list(ARCHITECTURES),
        metavar="sm_XX",
        help="architectures, or `present` for this machine's GPU (default: sm_80 sm_90 sm_100)",
    )
    parser.add_argument(
        "--modules",
        nargs="+",
        metavar="NAME",
        help="modules with an AOT list: attention, norm, ..., or dotted names of others (default: all of ours)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--cuda", action="store_true", help="also compile the CUDA sources, where nvcc and the sources are")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes at once (default: the cores this process may use)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if args.worker:
        index, _, count = args.worker.partition("/")
        _work(args.modules, args.arch, int(index), int(count))
        return 0
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        print("error: triton is not installed: pip install 'textok-fast[gpu]'", file=sys.stderr)
        return 2
    progress = _Progress() if sys.stderr.isatty() else None
    ours = {module.rpartition(".")[2]: module for module in kernel_modules()}
    modules = args.modules and [ours.get(module, module) for module in args.modules]
    results = compile_all(modules, args.arch, args.jobs, progress)
    if progress is not None:
        progress.end()
    print(aligned_table(HEADINGS, table_cells(results)))
    wrong = problems(results)
    cuda: dict[str, Any] | None = None
    if args.cuda:
        cuda, found = _cuda_sources(args.arch)
        wrong += found
    skipped, failed = sum(bool(r.skipped) for r in results), sum(bool(r.error) for r in results)
    counts = f"{len(results) - skipped - failed} compiled, {skipped} skipped, {failed} failed"
    print(f"\nTriton {version}: {counts}; {len(wrong)} problem{'' if len(wrong) == 1 else 's'}")
    for line in wrong:
        print(f"  {line}")
    if args.json is not None:
        report = {"triton": version, "rows": [result.to_dict() for result in results], "cuda": cuda, "problems": wrong}
        write_text(args.json, json.dumps(report, indent=1) + "\n")
    return 1 if wrong else 0


def _cuda_sources(arches: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """Prints the table of the CUDA sources. Returns it, JSON-ready, or why there is none, and what is wrong in it."""
    if nvcc.find_nvcc() is None or not nvcc.kernel_sources():
        why = "no nvcc" if nvcc.find_nvcc() is None else "no sources beside the package"
        print(f"\nCUDA sources not compiled: {why}")
        return {"skipped": why, "rows": []}, []
    try:
        rows = nvcc.compile_report([f"sm_{arch}{'a' if arch == 90 else ''}" for arch in arches])  # as CMakeLists.txt has them
    except InputError as error:
        print(f"\nCUDA sources: {error}")
        return {"skipped": "", "rows": []}, [str(error)]
    cells = [
        [
            row["kernel"],
            row["architecture"],
            *(str(row[key]) for key in ("registers", "shared")),
            str(_spilled(row)),
            row["source"],
        ]
        for row in rows
    ]
    print()
    print(aligned_table(("CUDA kernel", "arch", "registers", "shared bytes", "spill bytes", "source"), cells, left=(0,)))
    spilling = [f"{row['kernel']}, {row['architecture']}: spills {_spilled(row)} bytes" for row in rows if _spilled(row)]
    return {"skipped": "", "rows": rows}, spilling


def _spilled(row: dict[str, Any]) -> int:
    return int(row["spill_stores"]) + int(row["spill_loads"])


class _Progress:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, result: AotResult) -> None:
        self.count += 1
        print(f"\r\033[K{self.count}: {result.kernel}, {result.name}, sm_{result.arch}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
