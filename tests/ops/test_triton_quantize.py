"""The Triton kernels of the nearest-code search: interpreted, or on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_quantize import TIES, check, nan_cases
from torch import Tensor

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops import dispatch
from textok_fast.ops.quantize import vq_nearest_reference

pytest.importorskip("triton")

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]


@pytest.fixture(autouse=True)
def _triton(device: torch.device) -> None:
    reason = dispatch.load_backend("triton")
    if reason:
        pytest.skip(reason)


def nearest(x: Tensor, codes: Tensor, normalize: bool = False) -> Tensor:
    return torch.ops.textok_fast_triton.vq_nearest(x, codes, normalize)


# One block and several, of rows, codes and channels; a dot and a sum over channels.
@pytest.mark.parametrize(
    ("rows", "codes", "dim"), [(5, 17, 3), (1, 1, 1), (33, 70, 16), (9, 300, 15), (7, 130, 40), (2, 65, 100)]
)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_sizes(rows: int, codes: int, dim: int, normalize: bool, dtypes: Any, device: torch.device) -> None:
    x = torch.randn(2, rows, dim, device=device).to(dtypes[0])
    book = (torch.randn(codes, dim, device=device) * (0.5 + torch.rand(codes, 1, device=device))).to(dtypes[1])
    check(nearest(x, book, normalize), x, book, normalize)


@pytest.mark.parametrize(("codes", "dim"), [(1100, 4), (600, 24)])
@pytest.mark.parametrize("normalize", [False, True])
def test_codes_divided_among_programs(codes: int, dim: int, normalize: bool, device: torch.device) -> None:
    from textok_fast.ops.triton_kernels.quantize import codes_each, nearest_blocks

    x, book = torch.randn(3, dim, device=device), torch.randn(codes, dim, device=device)
    book[-200:] = book[:200]  # equals in other parts
    x[2] = book[-150]
    assert codes_each(3, codes, nearest_blocks(3, dim, False)) <= codes - 200
    found = nearest(x, book, normalize)
    check(found, x, book, normalize)
    assert (found < codes - 200).all() and found[2] == 50
    book[-50, 0], book[-70, 1] = torch.nan, torch.nan
    assert nearest(x, book, normalize).tolist() == [codes - 70] * 3


def test_every_code_is_searched_once() -> None:
    from textok_fast.ops.triton_kernels.quantize import codes_each, nearest_blocks

    for rows in (1, 16, 32, 1000, 100_000):
        for codes in (1, 63, 64, 1000, 4096, 16384):
            block = nearest_blocks(rows, 16, rows > 100)
            each = codes_each(rows, codes, block)
            assert each % block["BLOCK_K"] == 0 and (-(-codes // each) - 1) * each < codes <= -(-codes // each) * each
            assert -(-codes // each) == 1 or each >= 4 * block["BLOCK_K"]


def test_the_lowest_of_equals(device: torch.device) -> None:
    for codes, x, normalize, wanted in TIES:
        assert nearest(torch.tensor(x, device=device), torch.tensor(codes, device=device), normalize).tolist() == wanted
    book = torch.randn(70, 16, device=device).repeat(3, 1)  # the same codes in other blocks and columns
    x = torch.randn(9, 16, device=device)
    assert (nearest(x, book) < 70).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy, which interprets
@pytest.mark.parametrize(("codes", "dim"), [(9, 3), (100, 20)])
@pytest.mark.parametrize("normalize", [False, True])
def test_nan_and_infinity(codes: int, dim: int, normalize: bool, device: torch.device) -> None:
    x, book = (tensor.to(device) for tensor in nan_cases(codes, dim))
    assert nearest(x, book, normalize).tolist() == vq_nearest_reference(x, book, normalize).tolist()
    whole = torch.randn(codes, dim, device=device)
    assert nearest(x[1:3], whole, normalize).tolist() == vq_nearest_reference(x[1:3], whole, normalize).tolist()
    whole[:, 0] = torch.inf  # every distance is infinite, or NaN
    assert nearest(x, whole, normalize).tolist() == vq_nearest_reference(x, whole, normalize).tolist()


def test_zeros_are_normalized_to_zeros(device: torch.device) -> None:
    book = torch.randn(40, 5, device=device)
    book[7] = 0.0  # at distance 0 from a row of zeros, and 1 from others
    x = torch.zeros(2, 5, device=device)
    assert nearest(x, book, True).tolist() == [7, 7]


def test_layouts(device: torch.device) -> None:
    x, book = torch.randn(4, 6, 20, device=device), torch.randn(20, 50, device=device)
    for view in (x.transpose(0, 1), x[:, ::2], x[:1].expand(3, 6, 20), x[0, 0]):
        check(nearest(view, book.t()), view, book.t(), False)
    check(nearest(x[..., 1:8], book[:7].t(), True), x[..., 1:8], book[:7].t(), True)


def test_operation_is_sound(device: torch.device) -> None:
    x, book = torch.randn(2, 3, 4, device=device), torch.randn(5, 4, device=device)
    torch.library.opcheck(torch.ops.textok_fast_triton.vq_nearest, (x, book, True))
    torch.library.opcheck(torch.ops.textok_fast_triton.vq_nearest, (x.transpose(0, 1).bfloat16(), book.bfloat16(), False))


def test_compiled_in_one_graph(device: torch.device) -> None:
    x, book = torch.randn(2, 3, 4, device=device), torch.randn(9, 4, device=device)
    with ops.use_backend("triton"):
        found = torch.compile(ops.vq_nearest, fullgraph=True, backend="aot_eager")(x, book, True)
    check(found, x, book, True)


def test_what_the_kernels_do_not_take(device: torch.device) -> None:
    x, book = torch.randn(2, 4, device=device), torch.randn(9, 4, device=device)
    with ops.use_backend(vq_nearest="triton"):
        with pytest.raises(InputError, match="it takes float32, bfloat16 and float16, got .* float64"):
            ops.vq_nearest(x.double(), book)
        with pytest.raises(InputError, match=r"it takes 1 to 2\*\*30 elements"):
            ops.vq_nearest(x[:0], book)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("rows", "codes", "dim"), [(32, 4096, 16), (4096, 16384, 8), (8192, 8192, 32), (1000, 1000, 256)])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_on_a_gpu(rows: int, codes: int, dim: int, normalize: bool, dtypes: Any) -> None:
    x, book = torch.randn(rows, dim).cuda().to(dtypes[0]), torch.randn(codes, dim).cuda().to(dtypes[1])
    assert dispatch.choose("vq_nearest", x, book, normalize) == "triton"
    found = ops.vq_nearest(x, book, normalize)
    few = slice(0, rows, max(1, rows // 64))  # float64 needs its matrix of distances
    check(found[few].clone(), x[few], book, normalize)
    agree = found == vq_nearest_reference(x, book, normalize)
    assert agree.float().mean() > 0.99
