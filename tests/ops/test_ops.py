from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from textok_fast import ops


def reference_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    batch, n, heads, dim = q.shape
    out = np.zeros((batch, n, heads * dim))
    for b in range(batch):
        keep = np.arange(k.shape[1]) if mask is None else np.flatnonzero(mask[b])
        for h in range(heads):
            scores = q[b, :, h] @ k[b, keep, h].T / np.sqrt(dim)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, :, h * dim : (h + 1) * dim] = weights / weights.sum(axis=1, keepdims=True) @ v[b, keep, h]
    return out


def reference_layer_norm(x: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("queries", "keys", "heads", "dim"), [(5, 5, 2, 4), (3, 7, 1, 6), (1, 9, 3, 5)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention(queries: int, keys: int, heads: int, dim: int, masked: bool, dtype: torch.dtype) -> None:
    q, k, v = double(2, queries, heads, dim), double(2, keys, heads, dim), double(2, keys, heads, dim)
    mask = None
    if masked:
        mask = torch.ones(2, keys, dtype=torch.bool)
        mask[0, keys // 2 :] = False
        mask[1, 0] = False
    out = ops.attention(q.to(dtype), k.to(dtype), v.to(dtype), mask)
    wanted = reference_attention(q.numpy(), k.numpy(), v.numpy(), None if mask is None else mask.numpy())
    assert out.dtype == dtype
    np.testing.assert_allclose(out.numpy(), wanted, atol=1e-12 if dtype == torch.float64 else 1e-5)


def test_attention_reads_strided_views_of_a_packed_projection() -> None:
    packed = double(2, 6, 3, 2, 4)
    q, k, v = packed.unbind(2)  # none of them contiguous
    assert not q.is_contiguous()
    wanted = reference_attention(*(part.numpy() for part in (q, k, v)), None)
    np.testing.assert_allclose(ops.attention(q, k, v).numpy(), wanted, atol=1e-12)


def test_attention_never_reads_a_masked_value() -> None:
    q, k, v = double(1, 3, 2, 4), double(1, 5, 2, 4), double(1, 5, 2, 4)
    mask = torch.tensor([[True, True, False, True, False]])
    before = ops.attention(q, k, v, mask)
    k[:, ~mask[0]], v[:, ~mask[0]] = 1e6, -1e6
    assert torch.equal(ops.attention(q, k, v, mask), before)


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

    mask = torch.tensor([[True, False, True, True]])
    qkv = inputs((1, 3, 2, 2), (1, 4, 2, 2), (1, 4, 2, 2))
    assert torch.autograd.gradcheck(lambda q, k, v: ops.attention(q, k, v, mask), qkv)
    rows = inputs((2, 3, 4), (2, 4), (2, 4))
    assert torch.autograd.gradcheck(ops.layer_norm_modulate, rows)
    joined = inputs((2, 3, 4), (2, 3, 4), (2, 4), (2, 4), (2, 4))
    assert torch.autograd.gradcheck(ops.gated_residual_layer_norm_modulate, joined)
    (pictures,) = inputs((1, 2, 4, 4))
    assert torch.autograd.gradcheck(lambda x: ops.unpatchify(ops.patchify(x, 2), 2, channels=2), (pictures,))


@pytest.mark.parametrize(("size", "patch", "channels"), [(8, 2, 3), (6, 3, 1), (4, 4, 5), (5, 1, 2)])
def test_unpatchify_is_the_inverse_of_patchify(size: int, patch: int, channels: int) -> None:
    images = torch.randn(2, channels, size, size)
    patches = ops.patchify(images, patch)
    assert patches.shape == (2, (size // patch) ** 2, channels * patch**2)
    assert torch.equal(ops.unpatchify(patches, patch, channels), images)


def test_patchify_and_a_linear_layer_are_a_patch_embedding_convolution() -> None:
    images, weight, bias = double(2, 3, 8, 12), double(5, 3, 4, 4), double(5)
    convolved = F.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(F.linear(ops.patchify(images, 4), weight.flatten(1), bias), convolved)


def test_patches_are_listed_row_by_row() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert ops.patchify(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("normalize", [False, True])
def test_vq_nearest_against_brute_force(normalize: bool) -> None:
    x, codes = torch.randn(3, 5, 4), torch.randn(17, 4) * torch.rand(17, 1) * 3
    found = ops.vq_nearest(x, codes, normalize)
    a, b = x.double().numpy(), codes.double().numpy()
    if normalize:
        a, b = a / np.linalg.norm(a, axis=-1, keepdims=True), b / np.linalg.norm(b, axis=-1, keepdims=True)
    wanted = ((a[..., None, :] - b) ** 2).sum(-1).argmin(-1)
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), wanted)


def test_vq_nearest_gives_the_lowest_index_of_equally_near_codes() -> None:
    codes = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert ops.vq_nearest(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), codes).tolist() == [1, 2]
    assert ops.vq_nearest(torch.tensor([[5.0, 0.0]]), codes, normalize=True).tolist() == [0]
