"""Guidance and the sampler's update: one pass over the elements."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from textok_fast.ops.aot import AotCase
from textok_fast.ops.guided import COLUMNS
from textok_fast.ops.library import implement_triton

BLOCK = 512


@triton.jit
def guided_step_kernel(  # type: ignore[no-untyped-def]
    output_ptr,
    x_ptr,
    noise_ptr,
    table_ptr,
    index_ptr,
    out_ptr,
    count,
    table_rows,
    inner,
    channels,
    guided_channels,
    PAIR: tl.constexpr,
    LEARNED: tl.constexpr,
    NOISE: tl.constexpr,
    CLIP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # x is (outer, channels, inner): (B * N, C, 1) for tokens, (B, C, H * W) for images.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    index = tl.load(index_ptr)
    valid = (index >= 0) & (index < table_rows)
    row = table_ptr + tl.where(valid, index, 0) * COLUMNS
    scale, kx, km = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    a, b = tl.load(row + 3), tl.load(row + 4)
    a = tl.where(valid, a, float("nan"))  # which makes the whole result NaN

    source = at
    if LEARNED:  # the output is (outer, 2 * channels, inner)
        source = at + at // (channels * inner) * (channels * inner)
    m = tl.load(output_ptr + source, mask=mask, other=0.0).to(tl.float32)
    if PAIR:
        half = count * 2 if LEARNED else count
        u = tl.load(output_ptr + half + source, mask=mask, other=0.0).to(tl.float32)
        m = tl.where(at // inner % channels < guided_channels, u + scale * (m - u), m)

    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x0 = kx * x + km * m
    if CLIP:
        x0 = tl.where(x0 < -1.0, -1.0, tl.where(x0 > 1.0, 1.0, x0))  # NaN stays NaN
    result = a * x0 + b * x
    if NOISE:
        high, factor = tl.load(row + 6), tl.load(row + 7)
        # With a factor of 0 nothing is read.
        needed = at < tl.where(factor != 0.0, count, 0)
        log_variance = high
        if LEARNED:
            low = tl.load(row + 5)
            w = tl.load(output_ptr + source + channels * inner, mask=needed, other=0.0).to(tl.float32)
            fraction = (w + 1.0) * 0.5
            log_variance = fraction * high + (1.0 - fraction) * low
        noise = tl.load(noise_ptr + at, mask=needed, other=0.0).to(tl.float32)
        result += tl.where(factor != 0.0, factor * tl.exp(0.5 * log_variance) * noise, 0.0)
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)


def guided_step(
    output: Tensor,
    x: Tensor,
    noise: Tensor | None,
    table: Tensor,
    index: Tensor,
    guided_channels: int,
    clip_denoised: bool,
) -> Tensor:
    out = x.new_empty(x.shape)
    dim = 2 if x.ndim == 3 else 1
    channels, inner = x.shape[dim], 1 if x.ndim == 3 else x.shape[2] * x.shape[3]
    with torch.cuda.device_of(x):
        guided_step_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            output.contiguous(),
            x.contiguous(),
            None if noise is None else noise.contiguous(),
            table.contiguous(),
            index,
            out,
            x.numel(),
            table.shape[0],
            inner,
            channels,
            guided_channels,
            PAIR=output.shape[0] != x.shape[0],
            LEARNED=output.shape[dim] != channels,
            NOISE=noise is not None,
            CLIP=clip_denoised,
            COLUMNS=COLUMNS,
            BLOCK=BLOCK,
        )
    return out


implement_triton("guided_step", guided_step)


def _aot_case(name: str, inner: int, channels: int, dtype: str, pair: bool, learned: bool, noise: bool, clip: bool) -> AotCase:
    """A float32 state, and a model's output in ``dtype``."""
    pointers = {"output_ptr": f"*{dtype}", "x_ptr": "*fp32", "table_ptr": "*fp32", "index_ptr": "*i64", "out_ptr": "*fp32"}
    pointers |= {"noise_ptr": "*fp32"} if noise else {}
    numbers = {
        "count": 32 * channels * inner,
        "table_rows": 50,
        "inner": inner,
        "channels": channels,
        "guided_channels": channels,
    }
    options = {"PAIR": pair, "LEARNED": learned, "NOISE": noise, "CLIP": clip, "COLUMNS": COLUMNS, "BLOCK": BLOCK}
    return AotCase(
        f"{name} {dtype}",
        guided_step_kernel,
        signature=pointers | {key: "i32" for key, number in numbers.items() if number != 1},
        constexprs=options
        | ({} if noise else {"noise_ptr": None})
        | {key: number for key, number in numbers.items() if number == 1},
        aligned=(*pointers, *(key for key, number in numbers.items() if number % 16 == 0)),
    )


AOT = [
    *(_aot_case("DDPM tokens pair", 1, 16, dtype, True, True, True, False) for dtype in ("fp32", "bf16")),
    _aot_case("DDIM images pair clipped", 32 * 32, 4, "bf16", True, True, False, True),
    _aot_case("Euler tokens", 1, 16, "bf16", False, False, False, False),
]
