"""The references of the norms against NumPy, and what the public functions check."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops.fp8 import quantize_rows_reference


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
