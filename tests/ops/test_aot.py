"""Every Triton kernel compiles for every architecture without spilling, and the check would say so if one did."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import textwrap
from pathlib import Path

import pytest

from textok_fast.ops import report
from textok_fast.ops.aot import AotCase, AotResult, compile_case, parse_resources, parse_sass
from textok_fast.ops.library import KERNELS

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

# -- the kernels of this library ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> list[AotResult]:
    return report.compile_all()


@needs_triton
@pytest.mark.slow
def test_no_kernel_spills_or_lacks_tensor_cores(compiled: list[AotResult]) -> None:
    assert report.problems(compiled) == []
    assert {result.arch for result in compiled} == set(report.ARCHITECTURES)
    assert all(result.registers > 0 for result in compiled if not result.skipped)
    assert any(result.must_use_tensor_cores for result in compiled)
    assert {result.skipped for result in compiled} <= {"", "needs sm_89", "needs sm_90"}


@needs_triton
@pytest.mark.slow
def test_every_kernel_is_in_the_list(compiled: list[AotResult]) -> None:
    launched = launch_targets()
    assert len(launched) >= len(KERNELS), launched
    assert launched - {result.kernel for result in compiled} == set()


def launch_targets() -> set[str]:
    """Names of the ``@triton.jit`` functions that some launcher starts: launched by name, or not called by another kernel."""
    spec = importlib.util.find_spec("textok_fast.ops.triton_kernels")
    assert spec is not None and spec.origin is not None
    kernels, called, launched = set(), set(), set()
    for path in Path(spec.origin).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                kernels.add(node.name)
                called |= {call.func.id for call in ast.walk(node) if isinstance(call, ast.Call) and hasattr(call.func, "id")}
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name):
                launched.add(node.func.value.id)
    return (kernels - called) | (kernels & launched)


# -- the check itself ---------------------------------------------------------------------------------------------------------

BAD_KERNELS = """
import os, signal
import triton
import triton.language as tl
from textok_fast.ops.aot import AotCase

@triton.jit
def spills(x_ptr, n, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset)
    tl.store(x_ptr + n + offset, x * tl.max(x))  # 256 values a thread wait for the maximum

@triton.jit
def product(x_ptr, out_ptr, SIZE: tl.constexpr, DOT: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i[:, None] * SIZE + i[None, :])
    y = tl.dot(x, x) if DOT else x + x
    tl.store(out_ptr + i[:, None] * SIZE + i[None, :], y.to(tl.float32))

class Crashes:
    __name__ = "crashes"
    @property
    def arg_names(self):
        os.kill(os.getpid(), signal.SIGKILL)

X, OUT = {"x_ptr": "*bf16"}, {"x_ptr": "*bf16", "out_ptr": "*fp32"}
SPILLS = AotCase("8192 in a warp", spills, {"x_ptr": "*fp32", "n": "i32"}, {"BLOCK": 8192}, num_warps=1)
AOT = {
    "bad": [
        SPILLS,
        AotCase("without a dot", product, OUT, {"SIZE": 64, "DOT": False}, tensor_cores=True),
        AotCase("dot", product, OUT, {"SIZE": 64, "DOT": True}, tensor_cores=True, aligned=("x_ptr", "out_ptr")),
        AotCase("dot fp8", product, OUT | {"x_ptr": "*fp8e4nv"}, {"SIZE": 64, "DOT": True}, tensor_cores=True, needs=89),
        AotCase("an argument too few", product, X, {"SIZE": 64, "DOT": True}),
        AotCase("no power of two", product, OUT, {"SIZE": 63, "DOT": True}),
    ],
    "crash": [AotCase("first", product, OUT, {"SIZE": 16, "DOT": False}), AotCase("second", Crashes(), {}, {})],
    "empty": [],
}[os.environ["AOT_TEST_LIST"]]
"""


@pytest.fixture
def bad_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "bad_kernels.py").write_text(textwrap.dedent(BAD_KERNELS), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the compiling processes must not see
    monkeypatch.setenv("AOT_TEST_LIST", "bad")
    return "bad_kernels"


@needs_triton
@pytest.mark.slow
def test_report_finds_what_is_wrong(bad_kernels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert report.main(["--modules", bad_kernels, "--arch", "sm_80", "sm_90a", "--jobs", "1", "--json", str(file)]) == 1
    written = json.loads(file.read_text(encoding="utf-8"))
    rows = {(row["kernel"], row["name"], row["arch"]): row for row in written["rows"]}
    assert len(rows) == len(written["rows"]) == 12

    spilled = rows["spills", "8192 in a warp", 90]
    assert spilled["stack"] + spilled["local"] > 0 and spilled["spilled"] > 0
    assert "spills" in spilled["problems"][0]
    assert rows["product", "without a dot", 90]["problems"] == ["no tensor-core instruction"]
    assert "missing ['out_ptr']" in rows["product", "an argument too few", 90]["error"]
    assert "power of 2" in rows["product", "no power of two", 80]["error"]

    dot = {arch: rows["product", "dot", arch] for arch in (80, 90)}
    assert [list(dot[arch]["tensor_core"]) for arch in (80, 90)] == [["HMMA"], ["HGMMA"]]
    assert all(dot[arch]["problems"] == [] and dot[arch]["registers"] > 16 for arch in (80, 90))
    assert dot[90]["shared"] >= 64 * 64 * 2
    assert rows["product", "dot fp8", 80]["skipped"] == "needs sm_89"
    assert list(rows["product", "dot fp8", 90]["tensor_core"]) == ["QGMMA"]

    printed = capsys.readouterr().out
    for text in ("HGMMA x", "MISSING", "ERROR", "needs sm_89", "spill bytes", f"{len(written['problems'])} problems"):
        assert text in printed


@needs_triton
@pytest.mark.slow
def test_crash_of_the_compiler_is_a_result(bad_kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AOT_TEST_LIST", "crash")
    first, crashed, after = report.compile_all([bad_kernels, "no_such_module"], [80], jobs=1)
    assert first.problems == [] and first.registers > 0
    assert "crashed (-9)" in crashed.error
    assert after.kernel == "no_such_module" and "not compiled" in after.error


@needs_triton
@pytest.mark.slow
def test_a_module_without_kernels_is_a_problem(bad_kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AOT_TEST_LIST", "empty")
    empty, missing = report.compile_all([bad_kernels, "no_such_module"], [80], jobs=1)
    assert empty.problems == ["has no AOT list"]
    assert "No module named 'no_such_module'" in missing.error


def test_what_the_tools_print() -> None:
    usage = """
Resource usage:
 Common:
  GLOBAL:0
 Function a:
  REG:72 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function b:
  REG:255 STACK:48 SHARED:0 LOCAL:8 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert parse_resources(usage) == {"registers": 255, "stack": 48, "local": 8}
    with pytest.raises(RuntimeError, match="no resource usage"):
        parse_resources("cuobjdump info : nothing here")
    sass = """
        /*0010*/                   LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/              @!P0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   UTCQMMA gdesc[UR6], gdesc[UR4], tmem[UR8], tmem[UR16], idesc[UR17], !UPT ;
        /*0060*/                   UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR4, UR4 ;
        /*0070*/                   STL.64 [R1+0x8], R2 ;
        /*0080*/                   LDL R2, [R1] ;
        /*0090*/                   FFMA R2, R3, R4, R2 ;
"""
    assert parse_sass(sass) == {"spilled": 2, "tensor_core": {"HMMA": 1, "HGMMA": 2, "UTCQMMA": 1}}


def test_problems_of_a_result() -> None:
    good = AotResult("kernel", "case", 90, registers=64, shared=232_448, tensor_core={"HGMMA": 1}, must_use_tensor_cores=True)
    assert good.problems == []
    assert AotResult.from_dict(json.loads(json.dumps(good.to_dict()))) == good
    assert AotResult("kernel", "case", 80, skipped="needs sm_89", must_use_tensor_cores=True).problems == []
    assert AotResult("kernel", "case", 90, stack=16).problems == ["spills 16 bytes a thread (0 instructions)"]
    assert AotResult("kernel", "case", 90, shared=232_449).problems == ["232449 bytes of shared memory, the limit is 232448"]
    assert AotResult("kernel", "case", 80, shared=200_000).problems == ["200000 bytes of shared memory, the limit is 166912"]
    assert AotResult("kernel", "case", 90, error="ValueError: no").problems == ["ValueError: no"]


def test_skipped_before_anything_is_compiled() -> None:
    pytest.importorskip("triton")
    case = AotCase("case", kernel=None, signature={}, constexprs={}, needs=90)
    assert compile_case(case, 89).skipped == "needs sm_90"


def test_architectures_by_name() -> None:
    assert [report.parse_arch(text) for text in ("90", "sm_80", "sm_90a", "100", "sm_120f")] == [90, 80, 90, 100, 120]
    for wrong in ("volta", "sm_", "9.0", "12"):
        with pytest.raises(Exception, match="must be an architecture"):
            report.parse_arch(wrong)
