"""The C++ kernels of vq_nearest on the CPU, against distances in float64."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from textok_fast import ops
from textok_fast.ops.dispatch import use_backend
from textok_fast.ops.library import has_native, library

pytestmark = pytest.mark.skipif(not has_native("vq_nearest"), reason="the native library is not built")

DTYPES = [torch.float32, torch.bfloat16]
EXAMPLES = 15 if "TEXTOK_ISA" in os.environ else 60


def distances(x: Tensor, codebook: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """|c|^2 - 2 x.c, (M, K) float64, and a bound on what float32 makes of it, (M, 1)."""
    x, c = x.double(), codebook.double()
    if normalize:
        x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        c = c / c.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    square = c.square().sum(-1)
    size = square + 2 * x.norm(dim=-1, keepdim=True) * square.sqrt()  # bounds all partial sums
    rounding = (x.shape[-1] + 6) * 2.0**-24
    return square - 2 * x @ c.T, size.amax(dim=-1, keepdim=True) * rounding


def check(x: Tensor, codebook: Tensor, normalize: bool) -> None:
    index = library("native").vq_nearest(x, codebook, normalize)
    assert index.dtype == torch.int64 and index.shape == x.shape[:-1] and index.is_contiguous()
    rows, index = x.reshape(-1, x.shape[-1]), index.reshape(-1)
    if len(rows) == 0:
        return
    distance, error = distances(rows, codebook, normalize)
    assert ((index >= 0) & (index < len(codebook))).all()
    best, nearest = distance.min(dim=-1, keepdim=True)
    assert (distance.gather(1, index[:, None]) <= best + 2 * error).all()
    clear = (distance <= best + 2 * error).sum(dim=-1) == 1  # no other code comes near
    assert torch.equal(index[clear], nearest[clear, 0])


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    st.integers(0, 3),
    st.integers(0, 70),
    st.integers(1, 300),
    st.sampled_from([1, 2, 3, 4, 5, 8, 12, 16, 17, 32, 64, 256]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from(["contiguous", "transposed", "sliced"]),
    st.floats(-6, 6),
    st.integers(0, 2**31),
)
def test_random(
    batch: int, rows: int, codes: int, width: int, dtype: torch.dtype, normalize: bool, layout: str, power: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (10**power * torch.randn(batch, rows, width, generator=generator)).to(dtype)
    codebook = (10**power * torch.randn(codes, width, generator=generator)).to(dtype)
    if layout == "transposed":
        x, codebook = x.transpose(1, 2).contiguous().transpose(1, 2), codebook.T.contiguous().T
    elif layout == "sliced":
        x, codebook = torch.cat((x, x), -1)[..., :width], torch.cat((codebook, codebook), -1)[..., width:]
    check(x, codebook, normalize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 16, 4096), (300, 8, 2050), (1, 32, 1024)])
def test_many_codes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, width, codes = shape
    check(torch.randn(rows, width).to(dtype), torch.randn(codes, width).to(dtype), False)
    check(torch.randn(rows, width).to(dtype), torch.randn(codes, width).to(dtype), True)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    st.integers(1, 80),
    st.integers(1, 200),
    st.integers(1, 20),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_lowest_of_equals_and_first_nan(
    rows: int, codes: int, width: int, dtype: torch.dtype, special: bool, seed: int
) -> None:
    """Small integers: every distance is exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (rows, width), generator=generator).to(dtype)
    codebook = torch.randint(-1, 2, (codes, width), generator=generator).to(dtype)
    if special:
        for tensor in (x, codebook):
            values = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(dtype)
            drawn = torch.randint(0, 10 * width, tensor.shape, generator=generator)
            tensor.copy_(torch.where(drawn < 3, values[drawn.clamp(max=2)], tensor))
    distance = codebook.double().square().sum(-1) - 2 * x.double() @ codebook.double().T
    first_nan = [[value != value for value in row] for row in distance.tolist()]
    wanted = [
        nan.index(True) if any(nan) else row.index(min(row)) for nan, row in zip(first_nan, distance.tolist(), strict=True)
    ]
    assert library("native").vq_nearest(x, codebook, False).tolist() == wanted


@pytest.mark.parametrize("width", [4, 16])
def test_equal_codes_far_apart(width: int) -> None:
    codebook = torch.randn(100, width).repeat(30, 1)  # 30 copies of each
    x = torch.randn(70, width)
    index = library("native").vq_nearest(x, codebook, False)
    assert (index < 100).all()
    assert torch.equal(index, library("native").vq_nearest(x, codebook[:100], False))


@pytest.mark.parametrize("normalize", [False, True])
def test_codes_are_nearest_to_themselves(normalize: bool) -> None:
    codebook = torch.randn(1000, 12)
    scale = 3.0 if normalize else 1.0
    index = library("native").vq_nearest(scale * codebook.reshape(10, 100, 12), codebook, normalize)
    assert torch.equal(index.reshape(-1), torch.arange(1000))


def test_zero_rows_have_a_norm_of_1e_12() -> None:
    codebook = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-13, 0.0]])
    # Normalized: (0.6, 0.8), (0, 0), (0.1, 0); to the origin the second is nearest.
    assert library("native").vq_nearest(torch.zeros(1, 2), codebook, True).tolist() == [1]
    assert library("native").vq_nearest(torch.tensor([[1e-13, 0.0]]), codebook, True).tolist() == [2]


def test_huge_numbers() -> None:
    """|c|^2 overflows: such a code is infinitely far, and the first of them is taken when there is no other."""
    nearest = library("native").vq_nearest
    codebook = torch.tensor([[1e25, 0.0], [2.0, 2.0], [0.0, 1e30], [0.5, 0.0]])
    assert nearest(torch.tensor([[1.0, 1.0], [0.3, 0.1], [3.0, 3.0]]), codebook, False).tolist() == [3, 3, 1]
    assert nearest(torch.tensor([[1.0, 1.0]]), 1e20 * codebook[:1].repeat(9, 1), False).tolist() == [0]
    assert nearest(torch.tensor([[1e38, 0.0]]), torch.tensor([[-1.0, 0.0], [0.5, 0.0], [1.0, 0.0]]), False).tolist() == [2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 8, 40000), (1000, 8, 100), (97, 16, 6000)])
def test_threads_change_nothing(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """With few rows the codes are divided among the threads."""
    rows, width, codes = shape
    x = torch.randint(-3, 4, (rows, width)).to(dtype)
    codebook = torch.randint(-3, 4, (codes, width)).to(dtype)
    x[0, 0] = codebook[codes // 2, 1] = torch.nan
    wanted = library("native").vq_nearest(x, codebook, False)
    assert wanted[0] == 0 and wanted[1] == codes // 2
    codebook[codes // 2, 1] = 0
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append((library("native").vq_nearest(x, codebook, False), library("native").vq_nearest(x, codebook, True)))
    finally:
        torch.set_num_threads(threads)
    for plain, normalized in results[1:]:
        assert torch.equal(plain, results[0][0]) and torch.equal(normalized, results[0][1])


def test_public_function() -> None:
    x, codebook = torch.randn(2, 5, 8), torch.randn(50, 8)
    with use_backend(vq_nearest="native"):
        index = ops.vq_nearest(x, codebook)
    assert torch.equal(index, torch.cdist(x.double(), codebook.double()).argmin(dim=-1))
    assert library("native").vq_nearest(x[0, 0], codebook, False).shape == ()


def test_what_the_kernels_do_not_take_is_refused() -> None:
    native = library("native")
    with pytest.raises(RuntimeError, match=r"codebook must be \(K, d\)"):
        native.vq_nearest(torch.randn(3, 4), torch.randn(3, 5), False)
    with pytest.raises(RuntimeError, match="no codes"):
        native.vq_nearest(torch.randn(3, 4), torch.randn(0, 4), False)
    with pytest.raises(RuntimeError, match="codebook must be BFloat16"):
        native.vq_nearest(torch.randn(3, 4).bfloat16(), torch.randn(3, 4), False)
    with pytest.raises(RuntimeError, match="x must be Float or BFloat16"):
        native.vq_nearest(torch.randn(3, 4).double(), torch.randn(3, 4).double(), False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    arguments = (torch.randn(2, 5, 8).to(dtype), torch.randn(50, 8).to(dtype), True)
    torch.library.opcheck(torch.ops.textok_fast.vq_nearest.default, arguments)
