"""Nearest codes: a program takes some rows and runs over blocks of codes, so that no distance is ever in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from textok_fast.ops.aot import AotCase
from textok_fast.ops.library import implement_triton

EPS = 1e-12  # torch.nn.functional.normalize's
FEW = 8  # up to so many channels are summed one by one; from there on a product of 16 wastes less than half
PROGRAMS = 256  # wanted at least, to fill a GPU: with few rows the codes are divided among programs as well


@triton.jit
def prepare_codes_kernel(  # type: ignore[no-untyped-def]
    codebook_ptr,
    normalized_ptr,
    norms_ptr,
    codes,
    dim,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """|c|^2 of each code; with NORMALIZE c / |c| and its |.|^2."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = codebook_ptr + k.to(tl.int64)[:, None] * dim
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for d0 in range(0, dim, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mask = (k < codes)[:, None] & (d < dim)[None, :]
        c = tl.load(start + d[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(c * c, axis=1)
    if NORMALIZE:
        length = tl.sqrt_rn(squares)
        length = tl.where(length < EPS, EPS, length)  # NaN stays NaN
        squares = tl.zeros((BLOCK_K,), tl.float32)
        for d0 in range(0, dim, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mask = (k < codes)[:, None] & (d < dim)[None, :]
            c = tl.load(start + d[None, :], mask=mask, other=0.0).to(tl.float32)
            c = tl.div_rn(c, tl.broadcast_to(length[:, None], c.shape))
            tl.store(normalized_ptr + k.to(tl.int64)[:, None] * dim + d[None, :], c, mask=mask)
            squares += tl.sum(c * c, axis=1)
    tl.store(norms_ptr + k, squares, mask=k < codes)


@triton.jit
def nearest_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    codes_ptr,
    norms_ptr,
    distance_ptr,
    index_ptr,
    rows,
    codes,
    codes_each,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    FEW: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows x[m] among codes [split * codes_each, (split + 1) * codes_each)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    begin = split * codes_each
    end = tl.minimum(begin + codes_each, codes)
    x_start = x_ptr + m * D
    twice = tl.full((BLOCK_M,), 2.0, tl.float32)
    if NORMALIZE:  # 2 x.c / |x| is 2 x.c, times 1 / |x| of the row
        squares = tl.zeros((BLOCK_M,), tl.float32)
        if D <= FEW:
            for i in tl.static_range(D):
                value = tl.load(x_start + i, mask=m < rows, other=0.0).to(tl.float32)
                squares += value * value
        else:
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                tile = tl.load(x_start[:, None] + d[None, :], mask=(m < rows)[:, None] & (d < D)[None, :], other=0.0)
                tile = tile.to(tl.float32)
                squares += tl.sum(tile * tile, axis=1)
        length = tl.sqrt_rn(squares)
        twice = tl.div_rn(twice, tl.where(length < EPS, EPS, length))  # NaN stays NaN

    # Every column keeps the best of the codes it has seen, column + a multiple of BLOCK_K; compared once, at the end.
    best = tl.full((BLOCK_M, BLOCK_K), float("inf"), tl.float32)
    best_block = tl.zeros((BLOCK_M, BLOCK_K), tl.int32) + begin
    column = tl.arange(0, BLOCK_K)
    for k0 in range(begin, end, BLOCK_K):
        k = k0 + column
        product = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        if D <= FEW:  # smaller than a dot
            for i in tl.static_range(D):
                value = tl.load(x_start + i, mask=m < rows, other=0.0).to(tl.float32)
                c = tl.load(codes_ptr + k * D + i, mask=k < end, other=0.0).to(tl.float32)
                product += value[:, None] * c[None, :]
        else:
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                tile = tl.load(x_start[:, None] + d[None, :], mask=(m < rows)[:, None] & (d < D)[None, :], other=0.0)
                c = tl.load(codes_ptr + (k * D)[None, :] + d[:, None], mask=(k < end)[None, :] & (d < D)[:, None], other=0.0)
                if x_ptr.dtype.element_ty != codes_ptr.dtype.element_ty:
                    tile, c = tile.to(tl.float32), c.to(tl.float32)
                # float32 is multiplied as such; products of 16-bit numbers are exact in float32 anyway.
                product = tl.dot(tile, c, product, input_precision="ieee")
        norm = tl.load(norms_ptr + k, mask=k < end, other=0.0)
        distance = norm[None, :] - twice[:, None] * product
        distance = tl.where((k < end)[None, :], distance, float("inf"))
        # The first NaN wins over all numbers, as in torch.argmin.
        better = (distance < best) | ((distance != distance) & (best == best))
        best = tl.where(better, distance, best)
        best_block = tl.where(better, k0, best_block)

    is_nan = best != best
    smallest = tl.min(tl.where(is_nan, float("inf"), best), axis=1)
    any_nan = tl.max(is_nan.to(tl.int32), axis=1) != 0
    candidate = (any_nan[:, None] & is_nan) | ((any_nan == 0)[:, None] & (best == smallest[:, None]))
    index = tl.min(tl.where(candidate, best_block + column[None, :], 2147483647), axis=1)
    target = split.to(tl.int64) * rows + m
    tl.store(index_ptr + target, index.to(tl.int64), mask=m < rows)
    if SPLIT:
        tl.store(distance_ptr + target, tl.where(any_nan, float("nan"), smallest), mask=m < rows)


def prepare_blocks(dim: int) -> dict[str, int]:
    """Block sizes of ``prepare_codes_kernel``."""
    columns = min(triton.next_power_of_2(dim), 128)
    return {"BLOCK_K": max(16, 1024 // columns), "BLOCK_D": columns}


def nearest_blocks(rows: int, dim: int, half: bool) -> dict[str, int]:
    """Block sizes of ``nearest_kernel``; ``half``: it multiplies 16-bit numbers, on tensor cores."""
    if dim <= FEW:  # every thread keeps its rows of x in registers
        return {"BLOCK_M": 8, "BLOCK_K": 128, "BLOCK_D": 16}
    columns = 16 if dim <= 16 else 32 if dim <= 32 or half else 16  # more than one block of float32 would spill registers
    return {"BLOCK_M": 16 if rows <= 16 else 32, "BLOCK_K": 64, "BLOCK_D": columns}


def codes_each(rows: int, codes: int, block: dict[str, int]) -> int:
    """How many codes a program takes: all, unless the rows make too few programs to fill a GPU. At least four blocks."""
    programs = triton.cdiv(rows, block["BLOCK_M"])
    splits = max(1, min(PROGRAMS // programs, codes // (4 * block["BLOCK_K"])))
    return triton.cdiv(triton.cdiv(codes, splits), block["BLOCK_K"]) * block["BLOCK_K"]


def vq_nearest(x: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    codebook = codebook.contiguous()
    codes, dim = codebook.shape
    flat = x.reshape(-1, dim).contiguous()  # (M, d)
    rows = flat.shape[0]
    norms = codebook.new_empty((codes,), dtype=torch.float32)
    normalized = codebook.new_empty((codes, dim), dtype=torch.float32) if normalize else None  # (K, d)
    compared = codebook if normalized is None else normalized
    half = flat.dtype == compared.dtype != torch.float32
    prepare, block = prepare_blocks(dim), nearest_blocks(rows, dim, half)
    each = codes_each(rows, codes, block)
    splits = triton.cdiv(codes, each)
    distances = x.new_empty((splits, rows), dtype=torch.float32) if splits > 1 else None
    indices = x.new_empty((splits, rows), dtype=torch.int64)  # (S, M)
    with torch.cuda.device_of(x):
        prepare_codes_kernel[(triton.cdiv(codes, prepare["BLOCK_K"]),)](
            codebook, normalized, norms, codes, dim, NORMALIZE=normalize, EPS=EPS, **prepare
        )
        grid = (triton.cdiv(rows, block["BLOCK_M"]), splits)
        options = {"D": dim, "NORMALIZE": normalize, "EPS": EPS, "FEW": FEW, "SPLIT": splits > 1}
        nearest_kernel[grid](flat, compared, norms, distances, indices, rows, codes, each, **options, **block)
    if distances is not None:
        # torch.argmin has the same rules: the first NaN, else the first of equals.
        indices = indices.gather(0, distances.argmin(0, keepdim=True))  # (1, M)
    return indices.reshape(x.shape[:-1])


implement_triton("vq_nearest", vq_nearest)


def _aot_prepare(dim: int, dtype: str, normalize: bool) -> AotCase:
    pointers = {"codebook_ptr": f"*{dtype}", "norms_ptr": "*fp32"} | ({"normalized_ptr": "*fp32"} if normalize else {})
    absent = {} if normalize else {"normalized_ptr": None}
    return AotCase(
        f"d={dim} {dtype}{' normalize' if normalize else ''}",
        prepare_codes_kernel,
        signature=pointers | {"codes": "i32", "dim": "i32"},
        constexprs={"NORMALIZE": normalize, "EPS": EPS} | prepare_blocks(dim) | absent,
        aligned=(*pointers, "codes", *(("dim",) if dim % 16 == 0 else ())),
    )


def _aot_nearest(rows: int, codes: int, dim: int, dtype: str, normalize: bool) -> AotCase:
    compared = "fp32" if normalize else dtype
    block = nearest_blocks(rows, dim, compared != "fp32")
    split = codes_each(rows, codes, block) < codes
    pointers = {"x_ptr": f"*{dtype}", "codes_ptr": f"*{compared}", "norms_ptr": "*fp32", "index_ptr": "*i64"}
    pointers |= {"distance_ptr": "*fp32"} if split else {}
    numbers = {"rows": rows, "codes": codes, "codes_each": codes_each(rows, codes, block)}
    absent = {} if split else {"distance_ptr": None}
    return AotCase(
        f"M={rows} K={codes} d={dim} {dtype}{' normalize' if normalize else ''}",
        nearest_kernel,
        signature=pointers | dict.fromkeys(numbers, "i32"),
        constexprs={"D": dim, "NORMALIZE": normalize, "EPS": EPS, "FEW": FEW, "SPLIT": split} | block | absent,
        tensor_cores=dim > FEW and compared != "fp32",
        aligned=(*pointers, *(name for name, number in numbers.items() if number % 16 == 0)),
    )


AOT = [
    _aot_prepare(16, "fp32", True),
    _aot_prepare(16, "bf16", False),
    *(_aot_nearest(32, 4096, dim, "fp32", normalize) for dim in (8, 16) for normalize in (False, True)),
    *(_aot_nearest(8192, 16384, dim, dtype, False) for dim in (8, 16, 32) for dtype in ("fp32", "bf16")),
    _aot_nearest(8192, 16384, 15, "fp32", True),
    _aot_nearest(8192, 16384, 256, "fp32", True),
    _aot_nearest(8192, 16384, 256, "fp16", False),
]
