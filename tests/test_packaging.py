"""What an installed textok-fast promises: metadata, command, the export package, and a native library that may be missing."""

from __future__ import annotations

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
from pathlib import Path
from types import ModuleType

import pytest

import textok_fast
from textok_fast import _native

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
    import torch

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


@pytest.mark.parametrize(
    ("wish", "nvcc", "torch_cuda", "expected"),
    [
        (None, True, "13.0", True),
        (None, True, None, False),
        (None, False, "13.0", False),
        ("1", True, None, True),
        ("0", True, "13.0", False),
    ],
)
def test_cuda_code_is_built_when_it_can_be_used(
    setup_script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    wish: str | None,
    nvcc: bool,
    torch_cuda: str | None,
    expected: bool,
) -> None:
    monkeypatch.delenv("TEXTOK_CUDA", raising=False)
    if wish is not None:
        monkeypatch.setenv("TEXTOK_CUDA", wish)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(setup_script.shutil, "which", lambda name, **_: "/somewhere/nvcc" if nvcc else None)
    decision, why = setup_script.decide_cuda(torch_cuda)
    assert decision is expected
    assert why


def test_a_build_without_torch_says_how_to_get_it(setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(setup_script.CannotBuild, match="--no-build-isolation"):
        setup_script.find_torch()


def test_compiler_errors_become_one_line(setup_script: ModuleType) -> None:
    log = "[1/2] Building\na.cpp:3:1: error: expected ';'\n  3 | int x\n    | ^\nninja: build stopped\n"
    assert setup_script.first_error(log).startswith("a.cpp:3:1: error: expected ';' 3 | int x")
    assert setup_script.first_error("") == "no output"
