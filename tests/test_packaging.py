"""What an installed textok-fast promises: metadata, command, the export package, and a native library that may be missing."""

from __future__ import annotations

import builtins
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import textok_fast
from textok_fast import _native
from textok_fast.recipes import recipe_about, recipe_names

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.fixture(scope="module")
def metadata() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("textok-fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("textok-fast is imported without being installed")


def test_metadata_says_what_pyproject_says(metadata: importlib.metadata.Distribution) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata.version == textok_fast.__version__
    assert metadata.metadata["License-Expression"] == "Apache-2.0"
    assert {"gpu", "export", "train", "eval", "serve", "dev"} <= set(metadata.metadata.get_all("Provides-Extra") or [])
    assert set(metadata.metadata["Requires-Python"].split(",")) == set(project["requires-python"].split(","))


def test_nothing_required_is_torchvision_or_needs_it(metadata: importlib.metadata.Distribution) -> None:
    names = {requirement.split(";")[0].split("[")[0].strip().lower() for requirement in metadata.requires or []}
    assert not any(name.startswith(("torchvision", "timm", "lpips", "torch-fidelity")) for name in names)
    assert any(name.startswith(("torch<", "torch>")) for name in names)


def test_console_script_is_the_command(metadata: importlib.metadata.Distribution) -> None:
    scripts = {point.name: point.value for point in metadata.entry_points if point.group == "console_scripts"}
    assert scripts == {"textok-fast": "textok_fast.__main__:run"}


def test_help_answers_without_importing_torch() -> None:
    # typer ends with SystemExit, so what was imported is read at exit.
    done = python(
        "-c",
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch imported:', 'torch' in sys.modules))\n"
        "sys.argv = ['textok-fast', '--help']\n"
        "from textok_fast.cli import main\n"
        "main()",
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
    assert "torch imported: False" in done.stdout


def test_python_m_is_the_same_command() -> None:
    done = python("-m", "textok_fast", "--help")
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_export_is_importable_under_its_installed_name() -> None:
    module = importlib.import_module("textok_fast.export")
    assert module.__name__ == "textok_fast.export"
    assert module.__file__ is not None


def test_type_information_is_shipped() -> None:
    assert Path(textok_fast.__file__).with_name("py.typed").is_file()


# -- native library -----------------------------------------------------------------------------------------------------


def test_load_says_whether_and_why() -> None:
    status = _native.load()
    assert status.reason and "\n" not in status.reason
    assert status.available == bool(status.info)
    if status.available:
        assert status.info["torch_target"] == "2.11"
        assert {"compiler", "isa", "kernels", "cuda"} <= set(status.info)
        if Path("/proc/cpuinfo").exists() and "x86" in os.uname().machine:
            flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
            for name, flag in (("avx2", "avx2"), ("avx512f", "avx512f"), ("avx512bf16", "avx512_bf16")):
                assert (name in status.info["isa"].split(",")) == (flag in flags)


def test_a_library_that_was_built_loads() -> None:
    if not (_native.PACKAGE_DIR / _native.LIBRARY).exists() or os.environ.get("TEXTOK_NATIVE") == "0":
        pytest.skip(f"no native library here: {_native.load().reason}")
    assert _native.load().available, _native.load().reason


def test_the_library_is_here_where_it_can_be_built() -> None:
    """Other tests skip what a missing library would do, so that its absence must not pass for success."""
    if os.environ.get("TEXTOK_NATIVE") == "0":
        pytest.skip("switched off by TEXTOK_NATIVE=0")
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or shutil.which("cmake") is None:
        pytest.skip("no compiler or no CMake here")
    status = _native.load()
    assert status.available, f"{status.reason}; build it: ./run setup, or pip install --no-build-isolation -e ."

    # What the sources define, the library must have: one left by an older build would silently run fewer operations.
    schemas = re.findall(r'"(\w+)\(', "".join((ROOT / "csrc/cpu/ops.cpp").read_text(encoding="utf-8").split("m.def(")[1:]))
    missing = [name for name in schemas if not hasattr(torch.ops.textok_fast, name)]
    assert len(schemas) > 8 and not missing, f"the library is older than csrc/: it lacks {missing}"


def test_missing_library_without_report(tmp_path: Path) -> None:
    status = _native.load_from(tmp_path)
    assert not status.available
    assert "--no-build-isolation" in status.reason


def test_missing_library_gives_the_reason_of_the_build(tmp_path: Path) -> None:
    (tmp_path / _native.REPORT).write_text(json.dumps({"built": False, "reason": "no C++ compiler was found"}))
    assert _native.load_from(tmp_path) == _native.NativeStatus(False, "no C++ compiler was found", {})


@pytest.mark.parametrize("report", ["", "{", "[]", "\x00"])
def test_damaged_files_are_a_reason_not_an_error(tmp_path: Path, report: str) -> None:
    (tmp_path / _native.REPORT).write_text(report)
    assert not _native.load_from(tmp_path).available
    (tmp_path / _native.LIBRARY).write_bytes(b"not a shared object")
    status = _native.load_from(tmp_path)
    assert not status.available
    assert "does not load" in status.reason


@pytest.mark.parametrize(
    ("text", "available", "said"),
    [("compiler=gcc\n", True, "an older build: it lacks made_up, without CUDA code"), ("odd", False, "does not load")],
)
def test_an_older_or_odd_library_is_a_reason_not_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, available: bool, said: str
) -> None:
    (tmp_path / _native.LIBRARY).touch()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops.textok_fast, "build_info", lambda: text, raising=False)
    monkeypatch.setattr(_native, "OPERATIONS", ("build_info", "made_up"))
    status = _native.load_from(tmp_path)
    assert status.available is available
    assert said in status.reason and "build_info," not in status.reason


def test_environment_switches_the_library_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTOK_NATIVE", "0")
    assert _native.load.__wrapped__() == _native.NativeStatus(False, "switched off by TEXTOK_NATIVE=0", {})


# -- setup.py: decisions that need no build ------------------------------------------------------------------------------


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, executed with a ``setup()`` that does nothing."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    spec = importlib.util.spec_from_file_location("textok_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_and_loader_agree_on_file_names(setup_script: ModuleType) -> None:
    assert (setup_script.LIBRARY, setup_script.REPORT) == (_native.LIBRARY, _native.REPORT)


def test_every_source_package_is_installed(setup_script: ModuleType) -> None:
    found = {
        ".".join(file.relative_to(ROOT).parent.parts)
        for file in (ROOT / "textok_fast").rglob("__init__.py")
        if "export" not in file.relative_to(ROOT).parts
    }
    assert found | {"textok_fast.export"} <= set(setup_script.packages)
    assert len(setup_script.packages) == len(set(setup_script.packages))


# Reads the weights and a recipe where no connection can be made.
OFFLINE = """
import json, socket
def refuse(*args, **options):
    raise OSError("no network in this test")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch, textok_fast
from textok_fast.recipes import recipe_about, recipe_names
tokenizer = textok_fast.TexTok.from_pretrained("textok-mini")
tokens = tokenizer.encode(torch.full((1, 64, 64, 3), 90, dtype=torch.uint8), ["cow top left; red background"])
depth = textok_fast.DiT.from_pretrained("textok-mini").config.depth
about = {name: recipe_about(name) for name in recipe_names()}
print(json.dumps([textok_fast.__file__, tokens.flatten().tolist(), depth, about]))
"""


def test_a_wheel_brings_weights_and_recipes(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    without = shutil.ignore_patterns("__pycache__", "*.so", _native.REPORT)
    for name in ("textok_fast", "export"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=without)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = (
        "import sys; from setuptools import build_meta\n"
        "build_meta.build_wheel(sys.argv[1], {'--build-option': ['--compression=stored']})"  # weights do not get smaller
    )
    environment = {**os.environ, "TEXTOK_NATIVE": "0", "TEXTOK_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("textok_fast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    for folder in ("pretrained", "recipes"):
        wanted = {path.relative_to(source) for path in (source / "textok_fast" / folder).rglob("*") if path.is_file()}
        found = {path.relative_to(unpacked) for path in (unpacked / "textok_fast" / folder).rglob("*") if path.is_file()}
        assert found == wanted and len(wanted) > 5, folder
    environment["PYTHONPATH"] = str(unpacked)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    file, tokens, depth, about = json.loads(done.stdout)
    assert Path(file).is_relative_to(unpacked)
    picture = torch.full((1, 64, 64, 3), 90, dtype=torch.uint8)
    own = textok_fast.TexTok.from_pretrained("textok-mini").encode(picture, ["cow top left; red background"])
    torch.testing.assert_close(torch.tensor(tokens), own.flatten().as_subclass(torch.Tensor), atol=1e-3, rtol=1e-3)
    assert depth == 6 and about == {name: recipe_about(name) for name in recipe_names()}


@pytest.mark.parametrize(
    ("wish", "nvcc", "torch_cuda", "expected", "said"),
    [
        (None, "13.0", "13.0", True, "compiled"),
        (None, "12.8", "12.6", True, "compiled"),
        (None, "13.0", "12.8", False, "PyTorch was built with CUDA 12.8, but nvcc is of CUDA 13.0"),
        (None, "broken", "13.0", False, "does not run"),
        (None, "13.0", None, False, "CPU build"),
        (None, "none", "13.0", False, "nvcc was not found"),
        ("1", "13.0", None, True, "TEXTOK_CUDA=1"),
        ("1", "13.0", "12.8", True, "TEXTOK_CUDA=1"),
        ("0", "13.0", "13.0", False, "TEXTOK_CUDA=0"),
    ],
)
def test_cuda_code_is_built_when_it_can_be_used(
    setup_script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    wish: str | None,
    nvcc: str,
    torch_cuda: str | None,
    expected: bool,
    said: str,
) -> None:
    monkeypatch.delenv("TEXTOK_CUDA", raising=False)
    if wish is not None:
        monkeypatch.setenv("TEXTOK_CUDA", wish)
    monkeypatch.delenv("CUDACXX", raising=False)
    program = tmp_path / "nvcc"
    program.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.88'\n")
    program.chmod(0o644 if nvcc == "broken" else 0o755)
    monkeypatch.setattr(setup_script.shutil, "which", lambda name, **_: None if nvcc == "none" else str(program))
    decision, why = setup_script.decide_cuda(torch_cuda)
    assert decision is expected
    assert said in why
    if nvcc == "broken":
        monkeypatch.setenv("TEXTOK_CUDA", "1")
        with pytest.raises(setup_script.CannotBuild, match="does not run"):
            setup_script.decide_cuda(torch_cuda)


def test_a_build_without_torch_says_how_to_get_it(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup_script.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_script.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(setup_script.CannotBuild, match="--no-build-isolation"):
        setup_script.find_torch()
    (tmp_path / "torch").mkdir()  # what an uninstall may leave
    with pytest.raises(setup_script.CannotBuild, match="--no-build-isolation"):
        setup_script.find_torch()


def test_an_isolated_build_finds_the_installed_torch(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup_script.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_script.sysconfig, "get_path", {"platlib": str(tmp_path)}.__getitem__)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.12.1+cu130'\ncuda = '13.0'\n")
    assert setup_script.find_torch() == (tmp_path / "torch", "2.12.1+cu130", "13.0")
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.10.0'\ncuda = None\n")
    with pytest.raises(setup_script.CannotBuild, match=r"2\.10\.0 is older than 2\.11"):
        setup_script.find_torch()


class FakeBuild:
    """What BuildNative.build_extension needs of itself, with a build that fails."""

    def __init__(self, build_lib: Path, problem: Exception) -> None:
        self.build_lib, self.problem = str(build_lib), problem

    def build_native(self, target: Path) -> dict[str, object]:
        raise self.problem


@pytest.mark.parametrize("problem", ["CannotBuild", "FileNotFoundError", "StopIteration", "ValueError", "KeyError"])
@pytest.mark.parametrize(
    ("native", "cuda", "fails"), [(None, None, False), ("1", None, True), (None, "1", True), ("0", "1", False)]
)
def test_what_was_not_asked_for_may_fail(
    setup_script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    problem: str,
    native: str | None,
    cuda: str | None,
    fails: bool,
) -> None:
    for name, value in (("TEXTOK_NATIVE", native), ("TEXTOK_CUDA", cuda)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    error = setup_script.CannotBuild if problem == "CannotBuild" else getattr(builtins, problem)
    build = FakeBuild(tmp_path, error("broken\ntool"))
    report = tmp_path / "textok_fast" / setup_script.REPORT
    if fails:
        with pytest.raises(error, match="broken"):
            setup_script.BuildNative.build_extension(build, None)
        assert not report.exists()
    else:
        setup_script.BuildNative.build_extension(build, None)
        found = json.loads(report.read_text(encoding="utf-8"))
        assert found["built"] is False
        assert "broken" in found["reason"] and "tool" in found["reason"] and "\n" not in found["reason"]


def test_a_build_uses_the_cores_it_may_use(setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CMAKE_BUILD_PARALLEL_LEVEL", raising=False)
    assert 1 <= int(setup_script.parallel_level()) <= (os.cpu_count() or 1)
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "3")
    assert setup_script.parallel_level() == "3"


def test_compiler_errors_become_one_line(setup_script: ModuleType) -> None:
    log = "[1/2] Building\na.cpp:3:1: error: expected ';'\n  3 | int x\n    | ^\nninja: build stopped\n"
    assert setup_script.first_error(log).startswith("a.cpp:3:1: error: expected ';' 3 | int x")
    assert setup_script.first_error("") == "no output"
