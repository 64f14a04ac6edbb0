"""What pyproject.toml cannot say: where the packages lie, and how the native library is built.

The native library (csrc/, through CMake) is optional. Without an installed PyTorch, a C++ compiler or CMake the install
succeeds without it and leaves the reason for ``textok-fast info``. Environment variables:

TEXTOK_NATIVE  0: do not build it; 1: fail when it cannot be built; unset: build it if possible
TEXTOK_CUDA    0: no CUDA code; 1: CUDA code even with a CPU build of PyTorch, and fail when it cannot be built;
               unset: if possible, with a CUDA build of PyTorch and the nvcc of its CUDA version
CMAKE_BUILD_PARALLEL_LEVEL  how many files to compile at a time; unset: as many as there are usable cores
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit(
        "textok-fast is built with setuptools 77 or later: pip install -U setuptools, then install again"
    ) from None

ROOT = Path(__file__).resolve().parent
LIBRARY = "libtextok_fast.so"  # no Python version in the name: it does not use Python's ABI
REPORT = "_native_build.json"  # read by textok_fast/_native.py
OLDEST_TORCH = (2, 11)  # TORCH_TARGET_VERSION in CMakeLists.txt
HOW = "pip install --no-build-isolation"


class CannotBuild(Exception):
    """The native library cannot be built here; the message says why and what to do."""


class BuildNative(build_ext):
    """Builds the one extension through CMake and writes a report beside it, whether that succeeded or not."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join("textok_fast", LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.build_lib) / "textok_fast" / LIBRARY
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # one left by an earlier build must not pass for this one
        try:
            report = self.build_native(target)
        except (
            CannotBuild,
            OSError,
            StopIteration,
            ValueError,
            KeyError,
        ) as problem:  # also remains of a PyTorch, a broken tool
            native, cuda = os.environ.get("TEXTOK_NATIVE"), os.environ.get("TEXTOK_CUDA")
            if native == "1" or (cuda == "1" and native != "0"):  # it was asked for
                raise
            reason = str(problem) if isinstance(problem, CannotBuild) else f"{type(problem).__name__}: {problem}"
            report = {"built": False, "reason": " ".join(reason.split())}
            print(f"textok-fast: native operations not built: {report['reason']}", file=sys.stderr)
        target.with_name(REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def build_native(self, target: Path) -> dict[str, object]:
        if os.environ.get("TEXTOK_NATIVE") == "0":
            raise CannotBuild("TEXTOK_NATIVE=0 was set while installing")
        torch_dir, torch_version, torch_cuda = find_torch()
        compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        if compiler is None:
            raise CannotBuild(f"no C++ compiler was found; install one (apt-get install g++), then install again with {HOW}")
        cmake = find_tool("cmake")
        if cmake is None:
            raise CannotBuild(f"CMake was not found; install it (pip install cmake ninja), then install again with {HOW}")

        with_cuda, cuda_note = decide_cuda(torch_cuda)
        attempts = [True, False] if with_cuda and os.environ.get("TEXTOK_CUDA") != "1" else [with_cuda]
        for cuda in attempts:
            try:
                self.run_cmake(cmake, torch_dir, cuda, target)
                break
            except CannotBuild as problem:
                if cuda is attempts[-1]:
                    raise
                cuda_note = f"the CUDA sources did not compile: {problem}"
        return {"built": True, "reason": "", "torch": torch_version, "cuda": cuda_note}

    def run_cmake(self, cmake: str, torch_dir: Path, cuda: bool, target: Path) -> None:
        build_dir = Path(self.build_temp).resolve() / "native"
        shutil.rmtree(build_dir, ignore_errors=True)  # a cache made for another compiler or checkout makes CMake fail
        configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DTEXTOK_TORCH_DIR={torch_dir}", f"-DTEXTOK_CUDA={'ON' if cuda else 'OFF'}"]
        ninja = find_tool("ninja")
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        for command in (configure, [cmake, "--build", str(build_dir), "--parallel", parallel_level()]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
            print(done.stdout)
            if done.returncode:
                raise CannotBuild(
                    f"CMake {'configuration' if command is configure else 'build'} failed: {first_error(done.stdout)}"
                )
        shutil.copyfile(next(build_dir.glob("libtextok_fast.*")), target)

    def copy_extensions_to_source(self) -> None:
        # Editable installs. Not build_ext's own copying: it would keep an old library when none was built now.
        built = Path(self.build_lib) / "textok_fast"
        for name in (LIBRARY, REPORT):
            beside = ROOT / "textok_fast" / name
            beside.unlink(missing_ok=True)  # a new file, because the old one may be mapped by a running process
            if (built / name).exists():
                shutil.copyfile(built / name, beside)


class NativeWheel(bdist_wheel):
    """Tags the wheel by what it holds: any Python in either case, any machine when the native library was not built."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        library = Path(self.get_finalized_command("build_ext").build_lib) / "textok_fast" / LIBRARY
        return "py3", "none", platform if library.exists() else "any"


def find_torch() -> tuple[Path, str, str | None]:
    """Directory, version and CUDA version of the installed PyTorch, without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    places = [*(spec.submodule_search_locations or [])] if spec is not None else []
    # pip's isolated builds hide what is installed from import, but not where. Only PyTorch's stable ABI is used, so that the
    # library does not mind if the same install goes on to replace that PyTorch.
    places.append(os.path.join(sysconfig.get_path("platlib"), "torch"))
    directory = next((Path(place) for place in places if os.path.isfile(os.path.join(place, "version.py"))), None)
    if directory is None:
        raise CannotBuild(
            "PyTorch is not visible to the build: it is not installed, or the build is isolated from it; "
            f"with torch and setuptools>=77 installed: {HOW} textok-fast (in a checkout: {HOW} -e .)"
        )
    facts = runpy.run_path(str(directory / "version.py"))
    version = str(facts["__version__"])
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
        raise CannotBuild(f"PyTorch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    return directory, version, facts.get("cuda")


def decide_cuda(torch_cuda: str | None) -> tuple[bool, str]:
    """Whether to compile csrc/cuda, and why."""
    wish, nvcc = os.environ.get("TEXTOK_CUDA"), os.environ.get("CUDACXX") or shutil.which("nvcc")
    if wish == "0":
        return False, "TEXTOK_CUDA=0 was set while installing"
    if nvcc is None:
        if wish == "1":
            raise CannotBuild("TEXTOK_CUDA=1 needs nvcc on PATH or in CUDACXX")
        return False, "nvcc was not found while installing"
    version = nvcc_version(nvcc)
    if wish == "1":
        if version is None:
            raise CannotBuild(f"TEXTOK_CUDA=1 was set, but {nvcc} does not run")
        return True, "compiled, because TEXTOK_CUDA=1 was set"
    if torch_cuda is None:
        return False, "PyTorch is a CPU build (TEXTOK_CUDA=1 compiles the CUDA code all the same)"
    # A driver that runs this PyTorch need not run code of a later major version of CUDA.
    if version is None or version.split(".")[0] != torch_cuda.split(".")[0]:
        found = f"nvcc is of CUDA {version}" if version else f"{nvcc} does not run"
        return False, f"PyTorch was built with CUDA {torch_cuda}, but {found} (CUDACXX=... names another nvcc)"
    return True, "compiled"


def nvcc_version(nvcc: str) -> str | None:
    """The version that nvcc gives of itself, such as "13.0", or None if it does not run."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, errors="replace")
    except OSError:
        return None
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else None


def parallel_level() -> str:
    """How many files to compile at a time. ``--parallel`` without a number would let make start all of them at once."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(usable or 1)


def find_tool(name: str) -> str | None:
    """A program on PATH or beside this Python, where pip puts the ``cmake`` and ``ninja`` packages."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def first_error(output: str) -> str:
    """A build log's first line that speaks of an error, with the two after it, else its last lines; all on one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)), max(0, len(lines) - 3))
    return " ".join(lines[start : start + 3])[:400] or "no output"


# export/ lies beside textok_fast/ in the repository and is installed inside it. textok_fast/export is a symbolic link to it,
# for running from the checkout and for tools that only read files; installing does not depend on the link.
packages = find_packages(include=["textok_fast", "textok_fast.*"], exclude=["textok_fast.export", "textok_fast.export.*"])
packages += ["textok_fast.export", *(f"textok_fast.export.{name}" for name in find_packages("export"))]

setup(
    packages=packages,
    package_dir={"textok_fast.export": "export"},
    ext_modules=[Extension("textok_fast.native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
)
