"""The native library as a whole: what it has, what it says it runs on, and that its sources compile elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from textok_fast import _native, ops
from textok_fast.ops import library

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"


def schemas_of_the_sources() -> dict[str, str]:
    """Name to schema of each operation that csrc/cpu/ops.cpp defines, but for build_info."""
    text = (CSRC / "cpu" / "ops.cpp").read_text(encoding="utf-8")
    definitions = re.findall(r'm\.def\(((?:\s*"[^"]*")+)\);', text)
    schemas = ["".join(re.findall(r'"([^"]*)"', literals)) for literals in definitions]
    return {
        schema[: schema.index("(")]: schema[schema.index("(") :] for schema in schemas if not schema.startswith("build_info")
    }


def test_the_loader_knows_what_the_sources_define() -> None:
    assert set(_native.OPERATIONS) == set(schemas_of_the_sources())


@pytest.mark.parametrize("name", _native.OPERATIONS)
def test_sources_and_python_define_the_same_schema(name: str) -> None:
    assert hasattr(ops, "layer_norm_modulate")  # importing textok_fast.ops has declared them all
    declared = library._definitions[name]
    parsed = [torch._C.parse_schema(f"x::{name}{schema}") for schema in (schemas_of_the_sources()[name], declared.schema)]
    assert str(parsed[0]) == str(parsed[1])


@pytest.mark.skipif(not _native.load().available, reason=_native.load().reason)  # tests/test_packaging.py asks why
@pytest.mark.parametrize("name", _native.OPERATIONS)
def test_the_loaded_library_has_every_operation(name: str) -> None:
    assert library.has_native(name), _native.load().reason
    schema = str(getattr(torch.ops.textok_fast, name).default._schema)
    assert schema == str(torch._C.parse_schema(f"textok_fast::{name}{library._definitions[name].schema}"))


@pytest.mark.skipif(not _native.load().available, reason=_native.load().reason)
def test_the_library_says_which_products_run() -> None:
    info = _native.load().info
    wanted = [name for name in ("vnni", "bf16") if f"avx512{name}" in info["isa"].split(",")]
    if info["kernels"] != "avx512" or os.environ.get("TEXTOK_ISA"):  # isa.h: asked for by name, it is without them
        wanted = []
    assert info["products"] == (",".join(wanted) or "none")


@pytest.mark.skipif(not library.has_native("layer_norm_modulate"), reason=_native.load().reason)
def test_a_tensor_without_dimensions_is_refused_by_name() -> None:
    x, number = torch.zeros(1, 2, 4), torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="shift has the wrong shape"):
        torch.ops.textok_fast.layer_norm_modulate(x, number, x[:, 0], 1e-6)
    with pytest.raises(RuntimeError, match=r"must be|wrong shape"):
        torch.ops.textok_fast.layer_norm_modulate(number, x[:, 0], x[:, 0], 1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_kernels_need_nothing_of_x86() -> None:
    """Without SSE2 the headers take the branch of other processors, which includes less."""
    sources = sorted((CSRC / "cpu" / "kernels").glob("*.cpp"))
    assert len(sources) >= 4
    options = ["-U__SSE2__", "-fsyntax-only", "-std=c++20", "-DTEXTOK_ISA=baseline", "-DTEXTOK_ISA_BASELINE"]
    done = subprocess.run(["g++", *options, *map(str, sources)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("info", "runs", "does_not"),
    [
        ({}, [], [80, 90, 120]),
        ({"cuda": "no"}, [], [80, 90, 120]),
        ({"cuda": "12.6 (80,90)"}, [80, 86, 89, 90], [75, 91, 100, 120]),
        ({"cuda": "13.0 (86,100,120)"}, [86, 89, 100, 103, 120, 121], [80, 90, 110]),
        ({"cuda": "13.0 (80,90,100,120)", "cuda_ptx": "90,120"}, [80, 89, 90, 100, 103, 110, 121, 130], [75]),
        ({"cuda": "13.0 (90)", "cuda_ptx": ""}, [90], [80, 91, 100]),
    ],
)
def test_gpus_that_the_library_runs_on(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, str], runs: list[int], does_not: list[int]
) -> None:
    capabilities, ptx = library._native_capabilities(info)
    monkeypatch.setattr(library, "_NATIVE_CAPABILITIES", capabilities)
    monkeypatch.setattr(library, "_NATIVE_PTX", ptx)
    assert library.has_native_cuda() is bool(runs)
    for capability in runs + does_not:
        properties = SimpleNamespace(major=capability // 10, minor=capability % 10)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        x = SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda"))
        assert bool(library.native_runs_on(x)) is (capability in does_not), capability
    assert library.native_runs_on(torch.zeros(1)) == ""
