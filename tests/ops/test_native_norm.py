"""The C++ kernels of the norms on the CPU, against the formulas in float64.

Tolerances are bounds on the rounding of fp32 arithmetic, plus half a unit in the last place of a bfloat16 result. The last test
runs this file again for the instruction sets that this processor would not choose.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from textok_fast import _native, ops
from textok_fast.ops.dispatch import use_backend
from textok_fast.ops.library import has_native, library

ISA = os.environ.get("TEXTOK_ISA", "")
if os.environ.get("TEXTOK_NATIVE") != "0":  # tests/test_packaging.py fails where the library could have been built and was not
    pytestmark = pytest.mark.skipif(not has_native("layer_norm_modulate"), reason=_native.load().reason)
else:
    pytestmark = pytest.mark.skip(reason="TEXTOK_NATIVE=0")

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = [(F32, F32), (BF16, BF16), (F32, BF16)]  # of the residual stream, of all else
ROW_LAYOUTS = ["contiguous", "strided", "misaligned", "one sample", "one row", "reversed", "every second number"]
SAMPLE_LAYOUTS = ["contiguous", "chunk", "misaligned", "one row", "every second number"]
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 72, 96, 127, 128, 160, 200, 257]))
EPS32 = torch.finfo(torch.float32).eps
ROUNDING = {torch.float32: EPS32 / 2, torch.bfloat16: 2**-8}  # of a result, relative


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same shape and, where nothing is repeated, the same values, lying otherwise in memory; what lies between is NaN."""
    if layout == "contiguous" or not values.numel():
        return values.contiguous()
    if layout in ("one sample", "one row"):
        return (values[:1] if layout == "one sample" or values.ndim == 2 else values[:, :1]).expand(values.shape)
    if layout == "reversed":  # rows before samples in memory
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every second number":
        room = torch.full((*values.shape, 2), torch.nan, dtype=values.dtype)
        return room[..., 0].copy_(values)
    before, after = {"strided": (0, 8), "misaligned": (1, 2), "chunk": (values.shape[-1], 4 * values.shape[-1])}[layout]
    width = values.shape[-1]
    room = torch.full((*values.shape[:-1], before + width + after), torch.nan, dtype=values.dtype)
    return room[..., before : before + width].copy_(values)


class Case:
    """Inputs for one set of sizes; rows whose spread and mean differ by orders of magnitude."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        dtypes: tuple[torch.dtype, torch.dtype],
        layout: str,
        modulation: str,
        seed: int,
    ) -> None:
        self.stream, self.dtype = dtypes
        generator = torch.Generator().manual_seed(seed)
        batch, rows, width = sizes

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.x = lay_out((draw(*sizes) * 10 ** draw(batch, rows, 1) + draw(batch, rows, 1)).to(self.stream), layout)
        self.branch = lay_out(draw(*sizes).to(self.dtype), layout)
        self.gate, self.shift, self.scale = (lay_out(draw(batch, width).to(self.dtype), modulation) for _ in range(3))
        self.grad, self.grad_residual = (lay_out(draw(*sizes).to(dtype), layout) for dtype in (self.dtype, self.stream))


cases = st.builds(
    Case,
    st.tuples(st.integers(0, 3), st.integers(0, 5) | st.sampled_from([33, 70]), WIDTHS),
    st.sampled_from(DTYPES),
    st.sampled_from(ROW_LAYOUTS),
    st.sampled_from(SAMPLE_LAYOUTS),
    st.integers(0, 2**31),
)


def check(got: Tensor, wanted: Tensor, bound: Tensor, dtype: torch.dtype) -> None:
    """``bound``: of the error before the result is rounded to its dtype."""
    assert got.dtype == dtype and got.shape == wanted.shape and got.is_contiguous()
    error = (got.double() - wanted).abs()
    allowed = 1.01 * (bound + wanted.abs() * ROUNDING[dtype])
    assert bool((error <= allowed).all()), f"error up to {(error / allowed).max():.2f} of what is allowed"


class Normalized:
    """Of rows, in float64: the normalized rows, 1 / std, and how far fp32 may be from the normalized rows."""

    def __init__(self, x: Tensor, eps: float) -> None:
        x = x.double()
        centred = x - x.mean(-1, keepdim=True)
        self.inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        self.rows = centred * self.inverse
        self.error = EPS32 * (4 * self.rows.abs() + 4 * x.abs().amax(-1, keepdim=True) * self.inverse)


def check_forward(got: Tensor, x: Tensor, shift: Tensor, scale: Tensor, offset: float, eps: float) -> None:
    normalized = Normalized(x, eps) if x.numel() else None
    if normalized is None:
        assert got.shape == x.shape
        return
    factor, shift = (offset + scale.double()).unsqueeze(1), shift.double().unsqueeze(1)
    product = normalized.rows * factor
    # The factor is rounded itself, and scale may nearly cancel the offset.
    bound = normalized.error * factor.abs() + 2 * EPS32 * (product.abs() + normalized.rows.abs() * abs(offset) + shift.abs())
    check(got, product + shift, bound, scale.dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases, st.sampled_from([1e-6, 1e-3]))
def test_forward(case: Case, eps: float) -> None:
    out = library("native").layer_norm_modulate(case.x, case.shift, case.scale, eps)
    check_forward(out, case.x, case.shift, case.scale, 1, eps)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases, st.booleans(), st.sampled_from([0.0, 1.0]))
def test_forward_after_a_residual(case: Case, gated: bool, offset: float) -> None:
    gate = case.gate if gated else None
    arguments = (case.x, case.branch, gate, case.shift, case.scale, offset, 1e-5)
    residual, out = library("native").gated_residual_layer_norm_modulate(*arguments)
    added = case.branch.double() * (case.gate.double().unsqueeze(1) if gated else 1)
    check(residual, case.x.double() + added, EPS32 * (case.x.double().abs() + 2 * added.abs()), case.stream)
    check_forward(out, residual, case.shift, case.scale, offset, 1e-5)


class Derivatives:
    """Of ``sum(grad * (normalized(x) * (offset + scale) + shift))``, in float64, each with a bound on the error of fp32."""

    def __init__(self, grad: Tensor, x: Tensor, scale: Tensor, offset: float, eps: float) -> None:
        y, grad, factor = Normalized(x, eps), grad.double(), (offset + scale.double()).unsqueeze(1)
        scaled, size = grad * factor, grad.abs() * (factor.abs() + abs(offset))
        mean, product = scaled.mean(-1, keepdim=True), (scaled * y.rows).mean(-1, keepdim=True)
        self.dx = (scaled - mean - y.rows * product) * y.inverse
        sizes = size + size.mean(-1, keepdim=True) + 2 * y.rows.abs() * (size * y.rows.abs()).mean(-1, keepdim=True)
        moved = y.error * product.abs() + y.rows.abs() * (size * y.error).mean(-1, keepdim=True)
        # 1 / std is as wrong as its row is, relatively.
        inexact = (y.error.amax(-1, keepdim=True) + 4 * EPS32) * self.dx.abs()
        self.dx_bound = (4 * EPS32 * sizes + moved) * y.inverse + inexact
        terms = 4 * EPS32 * min(x.shape[1], 40)  # additions one after another: a chunk's rows, then the chunks
        self.dshift, self.dshift_bound = grad.sum(1), terms * grad.abs().sum(1)
        self.dscale = (grad * y.rows).sum(1)
        self.dscale_bound = terms * (grad * y.rows).abs().sum(1) + (grad.abs() * y.error).sum(1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases)
def test_backward(case: Case) -> None:
    dx, dshift, dscale = library("native").layer_norm_modulate_backward(case.grad, case.x, case.scale, 1e-5)
    if not case.x.numel():
        assert dx.shape == case.x.shape and not dshift.any() and not dscale.any()
        return
    wanted = Derivatives(case.grad, case.x, case.scale, 1, 1e-5)
    check(dx, wanted.dx, wanted.dx_bound, case.stream)
    check(dshift, wanted.dshift, wanted.dshift_bound, case.dtype)
    check(dscale, wanted.dscale, wanted.dscale_bound, case.dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases, st.booleans(), st.sampled_from([0.0, 1.0]))
def test_backward_after_a_residual(case: Case, gated: bool, offset: float) -> None:
    gate = case.gate if gated else None
    arguments = (case.grad_residual, case.grad, case.x, case.branch, gate, case.scale, offset, 1e-5)
    dx, dbranch, dgate, dshift, dscale = library("native").gated_residual_layer_norm_modulate_backward(*arguments)
    if not gated:
        assert dbranch.shape == dgate.shape == (0,)
    if not case.x.numel():
        assert dx.shape == case.x.shape and not dshift.any() and not dscale.any() and not dgate.any()
        return
    wanted = Derivatives(case.grad, case.x, case.scale, offset, 1e-5)
    total = wanted.dx + case.grad_residual.double()
    bound = wanted.dx_bound + 2 * EPS32 * (case.grad_residual.double().abs() + wanted.dx.abs())
    check(dx, total, bound, case.stream)
    check(dshift, wanted.dshift, wanted.dshift_bound, case.dtype)
    check(dscale, wanted.dscale, wanted.dscale_bound, case.dtype)
    if gated:
        factor, branch = case.gate.double().unsqueeze(1), case.branch.double()
        check(dbranch, total * factor, bound * factor.abs() + 2 * EPS32 * (total * factor).abs(), case.dtype)
        terms = 4 * EPS32 * min(case.x.shape[1], 40)
        dgate_bound = terms * (total * branch).abs().sum(1) + (bound * branch.abs()).sum(1)
        check(dgate, (total * branch).sum(1), dgate_bound, case.dtype)


@pytest.mark.parametrize(("dtypes", "rows"), list(zip(DTYPES, (1000, 2000, 1300), strict=True)))
def test_results_too_large_for_the_cache(dtypes: tuple[torch.dtype, torch.dtype], rows: int) -> None:
    case, native = Case((1, rows, 1152), dtypes, "contiguous", "chunk", 0), library("native")
    modulation = (case.gate, case.shift, case.scale, 1.0, 1e-6)
    residual, out = native.gated_residual_layer_norm_modulate(case.x, case.branch, *modulation)
    arguments = (case.gate, case.scale, 1.0, 1e-6)
    dx, dbranch, *_ = native.gated_residual_layer_norm_modulate_backward(
        case.grad_residual, case.grad, residual, case.branch, *arguments
    )
    # Rows among many, which are written past the cache, are the same rows alone.
    for some in (slice(0, 2), slice(rows // 2 - 1, rows // 2 + 2), slice(rows - 1, rows)):
        few = native.gated_residual_layer_norm_modulate(case.x[:, some], case.branch[:, some], *modulation)
        assert torch.equal(residual[:, some], few[0]) and torch.equal(out[:, some], few[1])
        check_forward(few[1], few[0], case.shift, case.scale, 1, 1e-6)
        tensors = (tensor[:, some] for tensor in (case.grad_residual, case.grad, residual, case.branch))
        few = native.gated_residual_layer_norm_modulate_backward(*tensors, *arguments)
        assert torch.equal(dx[:, some], few[0]) and torch.equal(dbranch[:, some], few[1])


def test_rounding_to_bfloat16() -> None:
    # Every number: a row of zeros leaves the shift.
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(64, 1024)
    zeros = torch.zeros(64, 3, 1024, dtype=torch.bfloat16)
    out = library("native").layer_norm_modulate(zeros, patterns, zeros[:, 0], 1e-6)
    torch.testing.assert_close(out, patterns[:, None].expand_as(out), rtol=0, atol=0, equal_nan=True)
    # Sums that lie between two numbers, half of them exactly in the middle, are rounded as PyTorch rounds them.
    x = torch.randn(4, 3, 1024).bfloat16()
    branch = x * torch.randint(-3, 4, x.shape) * 2.0 ** torch.randint(-9, -6, x.shape)
    branch = branch.bfloat16()
    residual, _ = library("native").gated_residual_layer_norm_modulate(x, branch, None, x[:, 0], x[:, 0], 1.0, 1e-6)
    assert torch.equal(residual, x + branch)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("width", [5, 72])
def test_nan_and_infinity_go_where_the_reference_sends_them(
    dtypes: tuple[torch.dtype, torch.dtype], bad: float, width: int
) -> None:
    def grads(function: Callable[..., Any], inputs: list[Tensor], to: list[Tensor]) -> tuple[Any, ...]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        return (*results, *torch.autograd.grad(results, leaves, to[: len(results)]))

    clean = Case((2, 3, width), dtypes, "contiguous", "contiguous", 1)
    names = ("x", "branch", "gate", "shift", "scale", "grad_residual", "grad")
    for name in names:
        for place in (0, width // 2, width - 1):
            tensors = {key: getattr(clean, key).clone() for key in names}
            tensors[name][(1, 1, place) if tensors[name].ndim == 3 else (1, place)] = bad
            to = [tensors["grad_residual"], tensors["grad"]]
            for function, inputs in (
                (ops.layer_norm_modulate, ("x", "shift", "scale")),
                (ops.gated_residual_layer_norm_modulate, ("x", "branch", "gate", "shift", "scale")),
            ):
                chosen = [tensors[key] for key in inputs]
                outputs = to if len(inputs) == 5 else to[1:]
                with use_backend("native"):
                    got = grads(function, chosen, outputs)
                with use_backend("reference"):  # in float64: bfloat16 is compared where nothing but NaN and infinity shows
                    wanted = grads(function, [tensor.double() for tensor in chosen], [tensor.double() for tensor in outputs])
                for mine, theirs in zip(got, wanted, strict=True):
                    assert torch.equal(mine.isfinite(), theirs.isfinite()), (name, place, inputs)
                # In a derivative, whether infinity meets infinity depends on the order of the sums.
                for mine, theirs in zip(got[: len(outputs)], wanted[: len(outputs)], strict=True):
                    assert torch.equal(mine.isnan(), theirs.isnan()), (name, place, inputs)
                    assert torch.equal(mine.isposinf(), theirs.isposinf()), (name, place, inputs)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_gradients_are_those_of_the_reference(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    def grads(function: Callable[..., Any], tensors: list[Tensor], read: Callable[[Any], Tensor]) -> list[Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        read(function(*leaves)).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    (stream, dtype), case = dtypes, Case((2, 7, 24), dtypes, "contiguous", "contiguous", 3)
    weights = torch.randn(2, 7, 24)
    x, branch = torch.randn(2, 7, 24).to(stream), case.branch
    affine = [x, branch, case.scale[0], case.shift[0]]

    def residual_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return ops.gated_residual_layer_norm(x, branch, None, weight, bias)

    joined = [x, branch, case.gate, case.shift, case.scale]

    def weighted(out: Tensor) -> Tensor:
        return (out * weights.to(out)).sum()

    def both(out: tuple[Tensor, Tensor]) -> Tensor:
        return weighted(out[0]) + out[1].square().sum()

    for function, tensors, read in (
        (ops.layer_norm_modulate, [x, case.shift, case.scale], weighted),
        (ops.layer_norm_modulate, [x, case.shift, case.scale], torch.sum),  # a gradient of stride 0
        (ops.gated_residual_layer_norm_modulate, joined, both),
        (ops.gated_residual_layer_norm_modulate, joined, lambda out: weighted(out[1])),  # one of two results
        (residual_layer_norm, affine, both),
    ):
        with use_backend("native"):
            got = grads(function, tensors, read)
        with use_backend("reference"):
            wanted = grads(function, [tensor.double() for tensor in tensors], read)
        assert [grad.dtype for grad in got] == [tensor.dtype for tensor in tensors]
        for mine, theirs in zip(got, wanted, strict=True):
            # bfloat16: the residual and the results in between are rounded, and differences of them are taken.
            size = theirs.abs().max().item()
            torch.testing.assert_close(
                mine.double(), theirs, rtol=4 * ROUNDING[dtype], atol=(4 * ROUNDING[dtype] + 16 * EPS32) * (size + 1)
            )


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    case = Case((2, 300, 160), (F32, F32), "contiguous", "chunk", 0)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            arguments = (case.grad_residual, case.grad, case.x, case.branch, case.gate, case.scale, 1.0, 1e-6)
            backward = library("native").gated_residual_layer_norm_modulate_backward(*arguments)
            results.append((library("native").layer_norm_modulate(case.x, case.shift, case.scale, 1e-6), *backward))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtypes", DTYPES[1:])
def test_opcheck(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    case = Case((2, 3, 40), dtypes, "strided", "chunk", 0)
    native = library("native")
    x, branch, gate, shift, scale = (
        tensor.requires_grad_() for tensor in (case.x, case.branch, case.gate, case.shift, case.scale)
    )
    torch.library.opcheck(native.layer_norm_modulate, (x, shift, scale, 1e-6))
    torch.library.opcheck(native.gated_residual_layer_norm_modulate, (x, branch, gate, shift, scale, 1.0, 1e-6))
    torch.library.opcheck(native.gated_residual_layer_norm_modulate, (x, branch, None, shift, scale, 0.0, 1e-6))
    x, branch, gate, scale = (tensor.detach() for tensor in (x, branch, gate, scale))
    torch.library.opcheck(native.layer_norm_modulate_backward, (case.grad, x, scale, 1e-6))
    for optional in (gate, None):
        arguments = (case.grad_residual, case.grad, x, branch, optional, scale, 1.0, 1e-6)
        torch.library.opcheck(native.gated_residual_layer_norm_modulate_backward, arguments)


def test_tensors_that_do_not_belong_together_are_errors() -> None:
    x, row = torch.zeros(2, 3, 8), torch.zeros(2, 8)
    native = library("native")
    for arguments, what in (
        ((x[0], row, row), "x must be"),
        ((x.double(), row, row), "x must be float32 or bfloat16"),
        ((x, row.bfloat16(), row), "shift must be Float, got BFloat16"),
        ((x, row, row[:1]), "scale has the wrong shape"),
        ((x, row, torch.zeros(2, 9)), "scale has the wrong shape"),
        ((x, row.half(), row.half()), "scale must be of x's dtype or bfloat16, got Half"),
        ((x.bfloat16(), row, row), "scale must be of x's dtype or bfloat16, got Float"),
    ):
        with pytest.raises(RuntimeError, match=what):
            native.layer_norm_modulate(*arguments, 1e-6)
    with pytest.raises(RuntimeError, match="branch has the wrong shape"):
        native.gated_residual_layer_norm_modulate(x, x[:, :2], None, row, row, 1.0, 1e-6)
    with pytest.raises(RuntimeError, match="grad_residual has the wrong shape"):
        native.gated_residual_layer_norm_modulate_backward(x[:1], x, x, x, None, row, 1.0, 1e-6)


# -- instruction sets ----------------------------------------------------------------------------------------------------


def run_again(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent.parent
    command = [sys.executable, *arguments]
    environment = {**os.environ, "TEXTOK_ISA": isa}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root, env=environment)


@pytest.mark.skipif(ISA != "", reason="this is that run")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lower_instruction_sets(isa: str) -> None:
    if isa == "avx2" and not {"avx2", "fma"} <= set(_native.load().info["isa"].split(",")):
        pytest.skip("this processor has no AVX2")
    numbers = "forward or backward or rounding or infinity or asked"
    done = run_again("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__, "-k", numbers, isa=isa)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_the_instruction_set_asked_for_is_used() -> None:
    assert _native.load().info["kernels"] == (ISA or _native.load().info["kernels"])
    assert _native.load().info["kernels"] in ("baseline", "avx2", "avx512")


@pytest.mark.skipif(ISA != "", reason="once is enough")
def test_an_unknown_instruction_set_is_an_error() -> None:
    code = (
        "import torch\nfrom textok_fast.ops.library import library, load_native\nassert not load_native()\n"
        "x = torch.zeros(1, 1, 4)\nlibrary('native').layer_norm_modulate(x, x[0], x[0], 1e-6)"
    )
    done = run_again("-c", code, isa="avx3")
    assert done.returncode != 0
    assert "TEXTOK_ISA=avx3 is none of baseline, avx2, avx512" in done.stderr
