"""What pyproject.toml cannot say: where the packages lie, and how the native library is built.

The native library (csrc/, through CMake) is optional. Without PyTorch in the building environment, a C++ compiler or CMake the
install succeeds without it and leaves the reason for ``textok-fast info``. Environment variables:

TEXTOK_NATIVE  0: do not build it; 1: fail when it cannot be built; unset: build it if possible
TEXTOK_CUDA    0: no CUDA code; 1: CUDA code even with a CPU build of PyTorch; unset: with nvcc and a CUDA build of PyTorch
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
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

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
        except CannotBuild as problem:
            if os.environ.get("TEXTOK_NATIVE") == "1":
                raise
            report = {"built": False, "reason": str(problem)}
            print(f"textok-fast: native operations not built: {problem}", file=sys.stderr)
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
        for command in (configure, [cmake, "--build", str(build_dir), "--parallel"]):
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
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild(
            "PyTorch is not visible to the build, because pip builds in an isolated environment; "
            f"with torch and setuptools installed: {HOW} textok-fast (in a checkout: {HOW} -e .)"
        )
    directory = Path(spec.submodule_search_locations[0])
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
    if wish == "1":
        return True, "compiled, because TEXTOK_CUDA=1 was set"
    if torch_cuda is None:
        return False, "PyTorch is a CPU build (TEXTOK_CUDA=1 compiles the CUDA code all the same)"
    return True, "compiled"


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
