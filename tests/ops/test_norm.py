"""The references of the norms against NumPy, and what the public functions check."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops import norm
from textok_fast.ops.fp8 import quantize_rows_reference
from textok_fast.ops.library import has_native


def reference_layer_norm(x: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_layer_norm_modulate(eps: float) -> None:
    x, shift, scale = 3 * double(2, 5, 7) + 1, double(2, 7), double(2, 7)
    wanted = reference_layer_norm(x.numpy(), eps) * (1 + scale.numpy()[:, None]) + shift.numpy()[:, None]
    np.testing.assert_allclose(ops.layer_norm_modulate(x, shift, scale, eps).numpy(), wanted, atol=1e-12)
    # The modulation comes as a view of a chunk.
    shift, scale = torch.cat([shift, scale], dim=1).chunk(2, dim=1)
    np.testing.assert_allclose(ops.layer_norm_modulate(x, shift, scale, eps).numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
def test_gated_residual_layer_norm_modulate(gated: bool) -> None:
    x, branch = double(2, 5, 7), double(2, 5, 7)
    gate, shift, scale = (double(2, 7) for _ in range(3))
    residual, hidden = ops.gated_residual_layer_norm_modulate(x, branch, gate if gated else None, shift, scale)
    wanted = x.numpy() + (gate.numpy()[:, None] if gated else 1) * branch.numpy()
    np.testing.assert_allclose(residual.numpy(), wanted, atol=1e-12)
    normed = reference_layer_norm(wanted, 1e-6) * (1 + scale.numpy()[:, None]) + shift.numpy()[:, None]
    np.testing.assert_allclose(hidden.numpy(), normed, atol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
def test_gated_residual_layer_norm(gated: bool) -> None:
    x, branch, gate, weight, bias = double(2, 5, 7), double(2, 5, 7), double(2, 7), double(7), double(7)
    residual, hidden = ops.gated_residual_layer_norm(x, branch, gate if gated else None, weight, bias)
    wanted = x.numpy() + (gate.numpy()[:, None] if gated else 1) * branch.numpy()
    np.testing.assert_allclose(residual.numpy(), wanted, atol=1e-12)
    normed = reference_layer_norm(wanted, 1e-5) * weight.numpy() + bias.numpy()
    np.testing.assert_allclose(hidden.numpy(), normed, atol=1e-12)


def test_gradients() -> None:
    def inputs(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(double(*shape).requires_grad_() for shape in shapes)

    assert torch.autograd.gradcheck(ops.layer_norm_modulate, inputs((2, 3, 4), (2, 4), (2, 4)))
    joined = inputs((2, 3, 4), (2, 3, 4), (2, 4), (2, 4), (2, 4))
    assert torch.autograd.gradcheck(ops.gated_residual_layer_norm_modulate, joined)
    affine = inputs((2, 3, 4), (2, 3, 4), (2, 4), (4,), (4,))
    assert torch.autograd.gradcheck(ops.gated_residual_layer_norm, affine)


def test_fp8_rows_are_the_quantized_result() -> None:
    with ops.use_backend("reference"):  # what kernels round otherwise is for their own tests
        x, branch = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
        gate, shift, scale = (torch.randn(2, 7) for _ in range(3))
        values, scales = ops.layer_norm_modulate(x, shift, scale, fp8=True)
        assert values.dtype == torch.float8_e4m3fn and values.shape == x.shape
        assert scales.dtype == torch.float32 and scales.shape == (2, 5)
        wanted = quantize_rows_reference(ops.layer_norm_modulate(x, shift, scale))
        assert torch.equal(values.float(), wanted.values.float()) and torch.equal(scales, wanted.scales)
        for function, rows in (
            (ops.gated_residual_layer_norm_modulate, (gate, shift, scale)),
            (ops.gated_residual_layer_norm, (gate, shift[0], scale[0])),
        ):
            residual, hidden = function(x, branch, *rows, fp8=True)  # type: ignore[operator]
            plain_residual, plain_hidden = function(x, branch, *rows)  # type: ignore[operator]
            assert torch.equal(residual, plain_residual)
            wanted = quantize_rows_reference(plain_hidden)
            assert torch.equal(hidden.values.float(), wanted.values.float()) and torch.equal(hidden.scales, wanted.scales)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    x, row = torch.randn(2, 5, 7), torch.randn(2, 7)
    with pytest.raises(InputError, match=r"x must be float \(B, N, D\), got cpu float32 \(5, 7\)"):
        ops.layer_norm_modulate(x[0], row, row)
    with pytest.raises(InputError, match=r"scale must be float \(B, D\) = \(2, 7\), got cpu float32 \(1, 7\)"):
        ops.layer_norm_modulate(x, row, row[:1])
    with pytest.raises(InputError, match=r"branch must have the shape of x, \(2, 5, 7\), got \(2, 4, 7\)"):
        ops.gated_residual_layer_norm_modulate(x, x[:, :4], row, row, row)
    with pytest.raises(InputError, match=r"x must be float \(B, N, D\), got cpu int64"):
        ops.layer_norm_modulate(x.long(), row, row)
    with pytest.raises(InputError, match=r"gate must be"):
        ops.gated_residual_layer_norm(x, x, row[0], row[0], row[0])
    with pytest.raises(InputError, match=r"weight and bias must be \(7,\), got \(2, 7\)"):
        ops.gated_residual_layer_norm(x, x, None, row, row[0])


# -- a residual stream in float32 beside bfloat16 or float16 -----------------------------------------------------------------


def mixed(dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, ...]:
    """x float32; branch, gate, shift, scale (B, N, D) or (B, D) in ``dtype``."""
    batch, _, width = shape
    rows = (torch.randn(batch, width).to(dtype) for _ in range(3))
    return 4 * torch.randn(shape), torch.randn(shape).to(dtype), *rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "whatever is best"])
@pytest.mark.parametrize("gated", [True, False])
def test_float32_residual_stream(dtype: torch.dtype, backend: str, gated: bool) -> None:
    x, branch, gate, shift, scale = mixed(dtype, 2, 5, 40)
    chosen = gate if gated else None
    unit = torch.finfo(dtype).eps
    wanted = x.double().numpy() + (gate.double().numpy()[:, None] if gated else 1) * branch.double().numpy()
    normed = reference_layer_norm(wanted, 1e-6)
    modulated = normed * (1 + scale.double().numpy()[:, None]) + shift.double().numpy()[:, None]
    affine = normed * scale[0].double().numpy() + shift[0].double().numpy()
    with ops.use_backend("reference" if backend == "reference" else None):
        entered = ops.layer_norm_modulate(x, shift, scale)
        residual, hidden = ops.gated_residual_layer_norm_modulate(x, branch, chosen, shift, scale)
        again, plain = ops.gated_residual_layer_norm(x, branch, chosen, scale[0], shift[0], 1e-6)
    first = reference_layer_norm(x.double().numpy(), 1e-6) * (1 + scale.double().numpy()[:, None])
    for found, exact in ((entered, first + shift.double().numpy()[:, None]), (hidden, modulated), (plain, affine)):
        assert found.dtype == dtype  # rounded once, at the end
        np.testing.assert_allclose(found.double().numpy(), exact, rtol=0.51 * unit, atol=2e-5)
    for found in (residual, again):  # nothing of it is rounded to the narrow dtype
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "whatever is best"])
def test_gradients_of_a_float32_residual_stream(backend: str) -> None:
    inputs = mixed(torch.bfloat16, 2, 5, 40)
    towards = torch.randn(2, 5, 40), torch.randn(2, 5, 40).bfloat16()

    def gradients(tensors: tuple[torch.Tensor, ...], optional: bool, affine: bool) -> tuple[torch.Tensor, ...]:
        x, branch, gate, shift, scale = leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        function = ops.gated_residual_layer_norm if affine else ops.gated_residual_layer_norm_modulate
        rows = (scale[0], shift[0]) if affine else (shift, scale)
        results = function(x, branch, gate if optional else None, *rows, 1e-6)
        used = leaves if optional else [x, branch, shift, scale]
        return torch.autograd.grad(results, used, [t.to(r.dtype) for t, r in zip(towards, results, strict=True)])

    for optional in (True, False):
        for affine in (True, False):
            with ops.use_backend("reference" if backend == "reference" else None):
                found = gradients(inputs, optional, affine)
            with ops.use_backend("reference"):
                wanted = gradients(tuple(tensor.double() for tensor in inputs), optional, affine)
            used = inputs if optional else (*inputs[:2], *inputs[3:])
            for given, got, want in zip(used, found, wanted, strict=True):
                assert got.dtype == given.dtype
                tolerance = 1e-5 if given.dtype == torch.float32 else 6e-3
                assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-3)


def test_what_autocast_gives_a_float32_affine_norm_stays_float32() -> None:
    x, branch, _, _, _ = mixed(torch.bfloat16, 2, 5, 40)
    weight, bias = torch.randn(40), torch.randn(40)
    residual, hidden = ops.gated_residual_layer_norm(x, branch, None, weight, bias)
    assert residual.dtype == hidden.dtype == torch.float32
    assert torch.equal(residual, x + branch.float())
    torch.testing.assert_close(hidden, torch.nn.functional.layer_norm(residual, (40,), weight, bias), rtol=1e-5, atol=1e-5)


def test_fp8_rows_of_a_float32_residual_stream() -> None:
    x, branch, gate, shift, scale = mixed(torch.bfloat16, 2, 5, 40)
    with ops.use_backend("reference"):
        residual, hidden = ops.gated_residual_layer_norm_modulate(x, branch, gate, shift, scale, fp8=True)
        plain_residual, plain = ops.gated_residual_layer_norm_modulate(x, branch, gate, shift, scale)
    assert residual.dtype == torch.float32 and torch.equal(residual, plain_residual)
    wanted = quantize_rows_reference(plain)
    assert torch.equal(hidden.values.float(), wanted.values.float()) and torch.equal(hidden.scales, wanted.scales)


def test_backends_say_which_dtypes_they_mix() -> None:
    x, branch, gate, shift, scale = mixed(torch.bfloat16, 2, 5, 40)
    rule = norm._native_rule
    if has_native("layer_norm_modulate"):
        assert rule(x, branch, gate, shift, scale) == "" and rule(x, shift, scale) == ""
        assert "x in float32 and all others in bfloat16, got cpu float32" in rule(x, branch.half(), None, shift, scale)
        assert "x in float32 and all others in bfloat16" in rule(x, branch, None, shift.float(), scale.float())
        assert "it takes" in rule(x.bfloat16(), branch, None, shift.float(), scale.float())
