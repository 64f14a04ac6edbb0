"""Attention over up to 256 keys: softmax(q k^T / sqrt(D)) v, read from strided views and written as (B, N_q, H * D).

A program takes a block of queries of one (sample, head), or of several heads in turn where there is little to do for each. Up
to 64 keys are one block; more go through the running maximum and sum of online softmax (Milakov & Gimelshein 2018, Dao et al.
2022).

Tensor cores want powers of two. A head of 72 channels is a product over 64 and one over 16, 8 of them zeros, not one of 128.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from textok_fast.ops.aot import AotCase
from textok_fast.ops.attention import MAX_HEAD_DIM, MAX_KEYS
from textok_fast.ops.library import implement_triton

# Of the launcher's choices, awaiting measurement on a GPU.
KEYS_IN_ONE_BLOCK = 64  # also the size of the blocks of more keys
ENOUGH_PROGRAMS = 1024  # several for each of a GPU's 100 to 150 processors; only beyond does one take several heads
MAX_HEADS = 4  # heads that one program takes in turn


@triton.jit
def load_part(pointer, rows, stride, limit, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """SIZE channels from START on of some rows, (rows, SIZE); zeros for rows from ``limit`` and channels from HEAD_DIM on."""
    channels = START + tl.arange(0, SIZE)
    inside = rows[:, None] < limit
    if START + SIZE > HEAD_DIM:
        inside = inside & (channels[None, :] < HEAD_DIM)
    return tl.load(pointer + rows[:, None] * stride + channels[None, :], mask=inside, other=0.0)


@triton.jit
def store_part(pointer, rows, stride, limit, values, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The counterpart of ``load_part``."""
    channels = START + tl.arange(0, SIZE)
    inside = rows[:, None] < limit
    if START + SIZE > HEAD_DIM:
        inside = inside & (channels[None, :] < HEAD_DIM)
    tl.store(pointer + rows[:, None] * stride + channels[None, :], values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def score_block(  # type: ignore[no-untyped-def]
    q_first,
    q_second,
    k,
    k_row,
    mask,
    mask_key,
    rows,
    keys,
    scale,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """q k^T * scale (BLOCK_M, BLOCK_N) in float32, -inf for keys that may not be attended to."""
    scores = tl.dot(q_first, tl.trans(load_part(k, rows, k_row, keys, 0, FIRST, HEAD_DIM)), input_precision="ieee")
    if SECOND > 0:
        k_second = load_part(k, rows, k_row, keys, FIRST, SECOND, HEAD_DIM)
        scores = tl.dot(q_second, tl.trans(k_second), scores, input_precision="ieee")
    allowed = rows < keys
    if MASKED:
        allowed = allowed & (tl.load(mask + rows * mask_key, mask=allowed, other=0) != 0)
    return tl.where(allowed[None, :], scores * scale, float("-inf"))


@triton.jit
def attention_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    mask_batch,
    mask_key,
    queries,
    keys,
    heads,
    scale,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    HEADS: tl.constexpr,
    VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Strides of q, k and v come divided by VECTOR, so that the compiler knows them to be multiples of it.

    ``scale`` includes log2(e): exp(x) = 2^(x log2(e)).
    """
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    for turn in tl.range(0, HEADS):
        pair = tl.program_id(0) * HEADS + turn
        batch = (pair // heads).to(tl.int64)
        head = (pair % heads).to(tl.int64)
        q = q_ptr + (batch * q_batch + head * q_head) * VECTOR
        k = k_ptr + (batch * k_batch + head * k_head) * VECTOR
        v = v_ptr + (batch * v_batch + head * v_head) * VECTOR
        mask = mask_ptr
        if MASKED:
            mask += batch * mask_batch
        q_first = load_part(q, rows, q_row * VECTOR, queries, 0, FIRST, HEAD_DIM)
        q_second = q_first
        if SECOND > 0:
            q_second = load_part(q, rows, q_row * VECTOR, queries, FIRST, SECOND, HEAD_DIM)

        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # largest score so far
        total = tl.zeros((BLOCK_M,), tl.float32)  # sum of 2^(score - top)
        out_first = tl.zeros((BLOCK_M, FIRST), tl.float32)
        out_second = tl.zeros((BLOCK_M, SECOND if SECOND > 0 else 1), tl.float32)
        for block in tl.range(0, BLOCKS_N):
            columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
            # Before the scores, so that one wait covers keys and values.
            v_first = load_part(v, columns, v_row * VECTOR, keys, 0, FIRST, HEAD_DIM)
            v_second = v_first
            if SECOND > 0:
                v_second = load_part(v, columns, v_row * VECTOR, keys, FIRST, SECOND, HEAD_DIM)
            scores = score_block(
                q_first, q_second, k, k_row * VECTOR, mask, mask_key, columns, keys, scale, HEAD_DIM, FIRST, SECOND, MASKED
            )
            new_top = tl.maximum(top, tl.max(scores, 1))
            # While every score is -inf, subtract 0 and not -inf, which would make them NaN.
            finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - finite_top[:, None])
            shrink = tl.exp2(top - finite_top)
            total = total * shrink + tl.sum(weights, 1)
            top = new_top
            weights = weights.to(v_ptr.dtype.element_ty)
            out_first = tl.dot(weights, v_first, out_first * shrink[:, None], input_precision="ieee")
            if SECOND > 0:
                out_second = tl.dot(weights, v_second, out_second * shrink[:, None], input_precision="ieee")

        total = tl.where(total == 0.0, 1.0, total)  # a query without any key gives zeros
        row = heads * HEAD_DIM
        out = out_ptr + batch * queries * row + head * HEAD_DIM
        store_part(out, rows, row, queries, out_first / total[:, None], 0, FIRST, HEAD_DIM)
        if SECOND > 0:
            store_part(out, rows, row, queries, out_second / total[:, None], FIRST, SECOND, HEAD_DIM)


class Plan(NamedTuple):
    """How the kernel is launched."""

    grid: tuple[int, int]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


def parts(head_dim: int) -> tuple[int, int]:
    """One or two powers of two, from 16 on, that hold so many channels: 72 -> (64, 16), 64 -> (64, 0), 120 -> (128, 0)."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    if rest <= 0:
        return first, 0
    second = max(16, triton.next_power_of_2(rest))
    return (2 * first, 0) if second == first else (first, second)


def plan(batch: int, heads: int, queries: int, keys: int, head_dim: int, itemsize: int, vector: int, masked: bool) -> Plan:
    """The launch for some sizes: a pure function, which the ahead-of-time report uses too.

    A warp has 16 rows of queries, a tensor-core instruction's. Exact float32 products have none: small blocks, more warps.
    """
    block_m = min(max(16, triton.next_power_of_2(queries)), 64)
    block_n = min(max(16, triton.next_power_of_2(keys)), KEYS_IN_ONE_BLOCK)
    num_warps = block_m // 16
    if itemsize == 4:
        block_m, block_n, num_warps = min(block_m, 32), min(block_n, 32), 4
    blocks_m, blocks_n = triton.cdiv(queries, block_m), triton.cdiv(keys, block_n)
    heads_each = 1
    while blocks_n == 1 and heads_each < MAX_HEADS and heads % (2 * heads_each) == 0:
        if batch * heads * blocks_m < ENOUGH_PROGRAMS * 2 * heads_each:
            break
        heads_each *= 2
    first, second = parts(head_dim)
    constexprs = {"HEAD_DIM": head_dim, "FIRST": first, "SECOND": second, "BLOCK_M": block_m, "BLOCK_N": block_n}
    constexprs |= {"BLOCKS_N": blocks_n, "HEADS": heads_each, "VECTOR": vector, "MASKED": masked}
    return Plan((batch * heads // heads_each, blocks_m), constexprs, num_warps, 2)


def common_vector(*tensors: Tensor) -> int:
    """Numbers in the widest load, up to 16 bytes, that all strides but the last are multiples of."""
    vector = 16 // tensors[0].element_size()
    return math.gcd(vector, *(stride for tensor in tensors for stride in tensor.stride()[:-1]))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (B, N_q, H, D), k and v (B, N_k, H, D), mask (B, N_k) bool -> (B, N_q, H * D)."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    if not 1 <= keys <= MAX_KEYS or not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"the kernel takes 1 to {MAX_KEYS} keys of 1 to {MAX_HEAD_DIM} channels, got {tuple(k.shape)}")
    out = q.new_empty((batch, queries, heads * head_dim))
    if out.numel() == 0:
        return out
    q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
    vector = common_vector(q, k, v)
    launch = plan(batch, heads, queries, keys, head_dim, q.element_size(), vector, mask is not None)
    strides = [stride // vector for part in (q, k, v) for stride in part.stride()[:-1]]
    with torch.cuda.device_of(q):
        attention_kernel[launch.grid](
            out,
            q,
            k,
            v,
            mask,
            *strides,
            *((0, 0) if mask is None else mask.stride()),
            queries,
            keys,
            heads,
            math.log2(math.e) / math.sqrt(head_dim),
            **launch.constexprs,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return out


implement_triton("attention", attention)


def _aot_case(batch: int, rows: int, head_dim: int, dtype: str, masked: bool) -> AotCase:
    """16 heads read from their packed projection, what Triton finds out about its arguments included."""
    heads, itemsize = 16, 4 if dtype == "fp32" else 2
    vector = 16 // itemsize
    launch = plan(batch, heads, rows, rows, head_dim, itemsize, vector, masked)
    packed_row = 3 * heads * head_dim // vector
    strides = {"batch": rows * packed_row, "row": packed_row, "head": head_dim // vector}
    numbers = {f"{part}_{axis}": stride for part in "qkv" for axis, stride in strides.items()}
    numbers |= {"mask_batch": rows if masked else 0, "mask_key": int(masked), "queries": rows, "keys": rows, "heads": heads}
    constexprs: dict[str, Any] = launch.constexprs | {name: number for name, number in numbers.items() if number == 1}
    pointers = {"out_ptr": f"*{dtype}", "q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "v_ptr": f"*{dtype}"}
    if masked:
        pointers["mask_ptr"] = "*i1"
    else:
        constexprs["mask_ptr"] = None
    signature = pointers | {name: "i32" for name, number in numbers.items() if number != 1} | {"scale": "fp32"}
    return AotCase(
        f"B={batch} N={rows} D={head_dim} {dtype}{' mask' if masked else ''}",
        attention_kernel,
        signature,
        constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        tensor_cores=dtype != "fp32",
        aligned=(*pointers, *(name for name, number in numbers.items() if number % 16 == 0)),
    )


AOT = [
    *(_aot_case(2, n, d, "bf16", masked) for n, d, masked in itertools.product((32, 64, 256), (64, 72), (False, True))),
    _aot_case(256, 32, 72, "bf16", False),  # several heads a program
    _aot_case(2, 256, 128, "fp16", True),
    _aot_case(2, 256, 128, "fp32", True),
]
