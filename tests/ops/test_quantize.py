"""Nearest codes: PyTorch against NumPy, and what is checked. Kernels: test_native_quantize, test_triton_quantize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops import dispatch
from textok_fast.ops.library import has_native
from textok_fast.ops.quantize import vq_nearest_reference


def distances(x: Tensor, codes: Tensor, normalize: bool) -> np.ndarray:
    """|x - c|^2 in float64, (..., K)."""
    a, b = x.double().cpu().numpy(), codes.double().cpu().numpy()
    if normalize:
        a = a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
        b = b / np.maximum(np.linalg.norm(b, axis=-1, keepdims=True), 1e-12)
    return ((a[..., None, :] - b) ** 2).sum(-1)


def check(found: Tensor, x: Tensor, codes: Tensor, normalize: bool) -> None:
    """Nearest to what float32 can tell: |c|^2 and x.c are rounded at the size that they have."""
    exact = distances(x, codes, normalize)
    assert found.dtype == torch.int64 and found.shape == x.shape[:-1] and found.is_contiguous()
    chosen = np.take_along_axis(exact, found.cpu().numpy()[..., None], -1)[..., 0]
    size = 1.0 if normalize else (codes.double().square().sum(-1).max() + x.double().square().sum(-1).max()).item()
    np.testing.assert_array_less(chosen - exact.min(-1), 4e-6 * size)


TIES = [
    ([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]], False, [1, 2]),
    ([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [[5.0, 0.0]], True, [0]),
    ([[0.0, 0.0]] * 5, [[3.0, 1.0], [0.0, 0.0]], False, [0, 0]),
]


def nan_cases(codes: int, dim: int) -> tuple[Tensor, Tensor]:
    """Rows of which one has a NaN and one an infinity; codes of which two have NaN."""
    x, book = torch.randn(4, dim), torch.randn(codes, dim)
    x[1, 0], x[2, dim - 1] = torch.nan, torch.inf
    broken = book.clone()
    broken[codes // 3, 0], broken[codes - 1, 0] = torch.nan, torch.nan
    return x, broken


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
    for codes, x, normalize, wanted in TIES:
        assert ops.vq_nearest(torch.tensor(x), torch.tensor(codes), normalize).tolist() == wanted
        assert vq_nearest_reference(torch.tensor(x), torch.tensor(codes), normalize).tolist() == wanted


def test_a_nan_counts_as_nearest() -> None:
    x, codes = nan_cases(9, 3)
    assert vq_nearest_reference(x, codes).tolist() == [3, 0, 3, 3]


def test_the_reference_is_in_float32_under_autocast_too() -> None:
    x = torch.ones(1, 4)
    codes = x * torch.tensor([[1.003], [1.001], [0.9985]])  # all the same to bfloat16, whose product lets the shortest win
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vq_nearest_reference(x, codes).tolist() == [1]
        found = torch.compile(vq_nearest_reference, fullgraph=True, backend="aot_eager")(x, codes)
    assert found.tolist() == [1]
    assert vq_nearest_reference(x.to("meta"), codes.to("meta")).shape == (1,)  # a device without autocast


def test_what_does_not_fit_is_refused() -> None:
    for x, codes in (
        (torch.randn(2, 3), torch.randn(5, 4)),
        (torch.randn(2, 3), torch.randn(3)),
        (torch.randn(2, 3), torch.randn(0, 3)),
    ):
        with pytest.raises(InputError, match=r"x must be \(\.\.\., d\) and the codebook \(K, d\), .* got \(2, 3\)"):
            ops.vq_nearest(x, codes)
    for backend in ("reference", *(["native"] if has_native("vq_nearest") else [])):
        with ops.use_backend(vq_nearest=backend), pytest.raises(InputError, match=r"K and d at least 1, got \(2, 0\)"):
            ops.vq_nearest(torch.randn(2, 0), torch.randn(5, 0))
    assert ops.vq_nearest(torch.randn(0, 7, 3), torch.randn(5, 3)).shape == (0, 7)


# -- choice ------------------------------------------------------------------------------------------------------------------


def test_compiled_in_one_graph() -> None:
    x, codes = torch.randn(2, 3, 4), torch.randn(9, 4)
    compiled = torch.compile(ops.vq_nearest, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, codes, True), vq_nearest_reference(x, codes, True))


def test_exported_as_standard_operators() -> None:
    class Nearest(torch.nn.Module):
        def forward(self, x: Tensor, codes: Tensor) -> Tensor:
            return ops.vq_nearest(x, codes)

    program = torch.export.export(Nearest(), (torch.randn(2, 3, 4), torch.randn(9, 4)))
    assert "textok" not in str(program.graph) and "autocast" not in str(program.graph)


def test_choice_on_the_cpu() -> None:
    x, codes = torch.randn(2, 4), torch.randn(9, 4)
    wanted = "native" if has_native("vq_nearest") else "reference"
    assert dispatch.choose("vq_nearest", x, codes, False) == wanted
    assert dispatch.choose("vq_nearest", x.bfloat16(), codes.bfloat16(), True) == wanted
    for other in (x.double(), x.half(), x.bfloat16()):
        assert dispatch.choose("vq_nearest", other, codes, False) == "reference"
