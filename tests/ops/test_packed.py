"""Packed linear layers: the reference against NumPy, every backend against the reference, the choice between them."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from textok_fast import _native, ops
from textok_fast.errors import InputError
from textok_fast.ops import dispatch, packed
from textok_fast.ops.choices import choices
from textok_fast.ops.packed import PackedWeight, quantize_int8

FORMS = [("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.float32), ("int8", torch.bfloat16)]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}  # relative, of a result and its sums
KINDS = {"fp32": 0, "bf16": 1, "int8": 2}


def backends(precision: str) -> list[str]:
    """Those that this machine has."""
    weight = torch.empty(4, 4)
    return [name for name, rule in packed._RULES.items() if not rule(weight, KINDS[precision], 64)] + ["reference"]


CASES = [(precision, dtype, backend) for precision, dtype in FORMS for backend in backends(precision)]


def gelu(x: np.ndarray, activation: str) -> np.ndarray:
    if activation == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x if activation == "none" else 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def integers(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Row by row, with scales (..., 1)."""
    values = x.float().numpy()
    scales = (np.abs(values).max(-1, keepdims=True) / np.float32(127)).astype(np.float32)
    scales[scales == 0] = 1
    return np.rint(values / scales).astype(np.int64), scales.astype(np.float64)  # rint: half to even


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str, activation: str) -> np.ndarray:
    if precision == "int8":
        (q, scales), (w, channels) = integers(x), integers(weight)
        product = (q @ w.T) * scales * channels[:, 0]
    else:
        rounded = weight.bfloat16() if precision == "bf16" else weight
        product = x.double().numpy() @ rounded.double().numpy().T
    if bias is not None:
        product = product + (bias.bfloat16() if precision == "bf16" else bias).double().numpy()
    return gelu(product, activation)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("precision", "dtype", "backend"), CASES)
def test_is_the_formula(precision: str, dtype: torch.dtype, backend: str, activation: str) -> None:
    for rows, inputs, outputs, with_bias in ((1, 5, 3, True), (7, 48, 33, False), (70, 130, 64, True)):
        weight, bias = torch.randn(outputs, inputs), torch.randn(outputs) if with_bias else None
        x = (torch.randn(rows, inputs) * torch.rand(rows, 1) * 3).to(dtype)
        layer = ops.pack_linear(weight, bias, precision, backend)  # type: ignore[arg-type]
        out = ops.packed_linear(x, layer, activation)
        assert out.dtype == dtype and layer.backend == backend
        wanted = exact(x, weight, bias, precision, activation)
        sums = np.abs(x.double().numpy()) @ np.abs(weight.double().numpy()).T
        tolerance = 2e-6 * (1 + sums) + ROUNDING[dtype] * np.abs(wanted)
        assert (np.abs(out.double().numpy() - wanted) <= tolerance).all()


def test_int8_rounds_half_to_even_and_never_leaves_the_range() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0], [1e-42, 0.0, 0.0, 0.0, 0.0]])
    values, scales = quantize_int8(x)
    assert values[0].tolist() == [127, 0, 2, -2, -127] and scales[:2].tolist() == [1.0, 1.0]
    assert values[1].tolist() == [0] * 5 and values.abs().max() <= 127


@pytest.mark.parametrize(("precision", "dtype", "backend"), CASES)
def test_a_nan_spoils_its_row_and_no_other(precision: str, dtype: torch.dtype, backend: str) -> None:
    layer = ops.pack_linear(torch.randn(20, 40), torch.randn(20), precision, backend)  # type: ignore[arg-type]
    x = torch.randn(4, 40).to(dtype)
    clean = ops.packed_linear(x, layer)
    x[1, 3] = torch.nan
    if precision == "int8":
        x[2, 0] = torch.inf
    out = ops.packed_linear(x, layer)
    assert out[1].isnan().all() and torch.equal(out[[0, 3]], clean[[0, 3]])
    assert out[2].isnan().all() if precision == "int8" else torch.equal(out[2], clean[2])


@pytest.mark.parametrize(("precision", "dtype", "backend"), CASES)
def test_shapes_and_strides(precision: str, dtype: torch.dtype, backend: str) -> None:
    layer = ops.pack_linear(torch.randn(24, 16), torch.randn(24), precision, backend)  # type: ignore[arg-type]
    wide = torch.randn(2, 5, 3, 40).to(dtype)
    for x in (wide[..., 8:24], wide[:, 1:4, 0, :16], wide.transpose(0, 1)[..., :16], wide[0, 0, 0, :16], wide[:0, ..., :16]):
        out = ops.packed_linear(x, layer)
        assert out.shape == (*x.shape[:-1], 24)
        torch.testing.assert_close(out, ops.packed_linear(x.contiguous(), layer), rtol=2.0**-8, atol=1e-5)


def test_bad_arguments_are_named() -> None:
    weight, layer = torch.randn(3, 4), ops.pack_linear(torch.randn(3, 4), None, "bf16")
    with pytest.raises(InputError, match="precision must be one of .*'fp16'"):
        ops.pack_linear(weight, None, "fp16")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"weight must be float \(out, in\)"):
        ops.pack_linear(weight.to(torch.int8))
    with pytest.raises(InputError, match=r"bias must be \(out,\) = \(3,\), got \(4,\)"):
        ops.pack_linear(weight, torch.randn(4))
    with pytest.raises(InputError, match="unknown backend 'mkl' of packed_linear; known: native, onednn, reference"):
        ops.pack_linear(weight, backend="mkl")
    with pytest.raises(InputError, match=r"x must be \(..., in\) = \(..., 4\), got \(2, 3\)"):
        ops.packed_linear(torch.randn(2, 3), layer)
    with pytest.raises(InputError, match=r"x must be torch.bfloat16 for weights packed in bf16, got torch.float32"):
        ops.packed_linear(torch.randn(2, 4), layer)
    with pytest.raises(InputError, match="activation must be one of"):
        ops.packed_linear(torch.randn(2, 4).bfloat16(), layer, "relu")
    with pytest.raises(InputError, match="no gradient"):
        ops.packed_linear(torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True), layer)
    with torch.no_grad():
        assert ops.packed_linear(torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True), layer).shape == (2, 3)


@pytest.mark.parametrize("precision", KINDS)
def test_derivatives_are_refused_not_zero(precision: str) -> None:
    dtype, weight = torch.bfloat16 if precision == "bf16" else torch.float32, torch.randn(3, 4)
    x, tangent = torch.randn(2, 4).to(dtype), torch.randn(2, 4).to(dtype)
    for backend in backends(precision):
        layer = ops.pack_linear(weight, None, precision, backend)  # type: ignore[arg-type]

        def function(x: Tensor, layer: PackedWeight = layer) -> Tensor:
            return ops.packed_linear(x, layer)

        if backend == "reference":
            if precision != "int8":
                _, found = torch.func.jvp(function, (x,), (tangent,))
                torch.testing.assert_close(found.float(), tangent.float() @ weight.to(dtype).float().T, rtol=2e-2, atol=2e-2)
            continue
        with pytest.raises(InputError, match="no rules for torch.func and forward-mode"):
            torch.func.jvp(function, (x,), (tangent,))
        with pytest.raises(InputError, match="no rules"), forward_ad.dual_level():
            function(forward_ad.make_dual(x, tangent))
        function(x)


# -- stored ------------------------------------------------------------------------------------------------------------------

LOAD = """
import sys, torch
from textok_fast import ops
for name in ("fp32", "bf16", "int8"):
    layer, x = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=False)
    try:
        ops.packed_linear(x, layer)
        print(name, "ran")
    except RuntimeError as error:
        print(name, error)
"""


@pytest.mark.skipif(_native.load().info.get("kernels") != "avx512", reason="needs more than one layout")
@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_a_weight_packed_for_other_kernels_is_refused(tmp_path: Path, isa: str) -> None:
    mine = {"fp32": "avx512", "bf16": "avx512", "int8": "avx512"}
    for precision in KINDS:
        x = torch.randn(2, 256).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        layer = ops.pack_linear(torch.randn(192, 256), None, precision, "native")  # type: ignore[arg-type]
        torch.save((layer, x), tmp_path / f"{precision}.pt")
        again, _ = torch.load(tmp_path / f"{precision}.pt", weights_only=False)
        assert torch.equal(ops.packed_linear(x, again), ops.packed_linear(x, layer))
    products = _native.load().info["products"].split(",")
    mine |= {name: f"avx512{has}" for name, has in (("bf16", "bf16"), ("int8", "vnni")) if has in products}
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "TEXTOK_ISA": isa}, capture_output=True, text=True, timeout=120)
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ", 1)[0] in KINDS)
    assert lines.keys() == KINDS.keys(), done.stderr
    for name, line in lines.items():
        wanted = f"made for {mine[name]} kernels and {isa} ones run here" if mine[name] != isa else "ran"
        assert wanted in line


# -- choice ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One that has everything."""
    monkeypatch.setattr(packed, "has_native", lambda name: True)
    monkeypatch.setitem(dispatch._state, "native", "")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    use_kernels(monkeypatch, "avx512")
    return monkeypatch


def use_kernels(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    monkeypatch.setattr(_native, "load", lambda: _native.NativeStatus(True, "loaded", {"kernels": kernels}))


def chosen(precision: str, rows: int = 64) -> str:
    return dispatch.choose("packed_linear", torch.empty(8, 8), KINDS[precision], rows)


def test_the_choice(machine: pytest.MonkeyPatch) -> None:
    assert chosen("fp32") == chosen("int8", 5000) == "native"
    assert chosen("fp32", 5000) == "onednn"
    with ops.use_backend(packed_linear="onednn"):
        assert chosen("fp32") == "onednn"
    with ops.use_backend("reference"):
        assert chosen("fp32") == "reference"
    machine.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert chosen("fp32", 5000) == "native"


def test_the_choice_beside_amx(machine: pytest.MonkeyPatch) -> None:
    few, many = packed.NATIVE_UP_TO_BESIDE_AMX, packed.NATIVE_UP_TO_BESIDE_AMX + 1
    assert chosen("bf16", many) == chosen("int8", many) == "native"
    machine.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert chosen("bf16", many) == chosen("int8", many) == chosen("int8", 5000) == "onednn"
    assert chosen("bf16", few) == chosen("int8", few) == chosen("fp32", 64) == "native"
    machine.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert chosen("int8", 5000) == "native"


def test_the_choice_where_onednn_knows_more_instructions(machine: pytest.MonkeyPatch) -> None:
    for kernels in ("baseline", "another"):
        use_kernels(machine, kernels)
        assert chosen("fp32", 1) == chosen("bf16", 1) == chosen("int8", 1) == "onednn"
    use_kernels(machine, "avx2")
    assert chosen("fp32", 5000) == "native"
    assert chosen("bf16", 1) == chosen("int8", 1) == "onednn"
    machine.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert chosen("int8", 5000) == "native"


def test_the_choices_that_are_shown_have_int8(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with ops.use_backend("reference"):
        assert choices("cpu")["packed_linear"] == dict.fromkeys(("float32", "bfloat16", "int8"), "reference")
    assert choices("cpu")["packed_linear"] == {"float32": "native", "bfloat16": "onednn", "int8": "onednn"}


def test_the_choice_where_there_is_no_native_library(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(packed, "has_native", lambda name: False)
    assert chosen("fp32") == chosen("int8") == "onednn"
    with pytest.raises(InputError, match="'native' does not take this weight: the native library is not loaded"):
        ops.pack_linear(torch.randn(3, 4), backend="native")
    machine.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert chosen("fp32") == "onednn" and chosen("int8") == "reference"
    machine.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert chosen("fp32") == "reference"


# -- torch.library -----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.packed = weight

    def forward(self, x: Tensor) -> Tensor:
        return ops.packed_linear(x + 1, self.packed, "gelu") * 2


@pytest.mark.parametrize(("precision", "dtype", "backend"), [case for case in CASES if case[2] != "reference"])
def test_compilers_see_through_it(precision: str, dtype: torch.dtype, backend: str) -> None:
    weight = ops.pack_linear(torch.randn(24, 16), torch.randn(24), precision, backend)  # type: ignore[arg-type]
    torch._dynamo.reset()
    layer, x = copy.deepcopy(Layer(weight)).eval(), torch.randn(2, 3, 16).to(dtype)
    with torch.no_grad():
        wanted = layer(x)
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), wanted)
        with ops.use_backend(packed_linear=backend):
            assert torch.equal(torch.export.export(layer, (x,)).module()(x), wanted)
    if backend == "native":  # opcheck wants storages, which oneDNN's tensors do not have
        arguments = (x.transpose(0, 1), weight.weight, weight.scales, weight.bias, 24, KINDS[precision], "gelu")
        torch.library.opcheck(torch.ops.textok_fast.packed_linear, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_inductor_runs_onednn() -> None:
    if "onednn" not in backends("fp32"):
        pytest.skip("no oneDNN here")
    torch._dynamo.reset()
    layer, x = Layer(ops.pack_linear(torch.randn(24, 16), backend="onednn")).eval(), torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
