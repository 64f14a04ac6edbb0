from __future__ import annotations

import numpy as np
import pytest
import torch

from textok_fast import ops


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


def test_gated_residual_layer_norm_modulate() -> None:
    x, branch = double(2, 5, 7), double(2, 5, 7)
    gate, shift, scale = (double(2, 7) for _ in range(3))
    residual, hidden = ops.gated_residual_layer_norm_modulate(x, branch, gate, shift, scale)
    wanted = x.numpy() + gate.numpy()[:, None] * branch.numpy()
    np.testing.assert_allclose(residual.numpy(), wanted, atol=1e-12)
    normed = reference_layer_norm(wanted, 1e-6) * (1 + scale.numpy()[:, None]) + shift.numpy()[:, None]
    np.testing.assert_allclose(hidden.numpy(), normed, atol=1e-12)


def test_gradients() -> None:
    def inputs(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(double(*shape).requires_grad_() for shape in shapes)

    rows = inputs((2, 3, 4), (2, 4), (2, 4))
    assert torch.autograd.gradcheck(ops.layer_norm_modulate, rows)
    joined = inputs((2, 3, 4), (2, 3, 4), (2, 4), (2, 4), (2, 4))
    assert torch.autograd.gradcheck(ops.gated_residual_layer_norm_modulate, joined)
