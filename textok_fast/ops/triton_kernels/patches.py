"""Patches: bytes to patches and back, a program taking some pixel rows of some columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from textok_fast.ops.aot import AotCase
from textok_fast.ops.library import implement_triton


@triton.jit
def patchify_kernel(  # type: ignore[no-untyped-def]
    images_ptr,
    out_ptr,
    lines,
    height,
    width,
    stride_b,
    stride_y,
    stride_x,
    stride_c,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    line = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # pixel rows of all pictures, b * H + y
    x = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (line < lines)[:, None] & (x < width)[None, :]
    # A view may reach further than its own size says: 64 bits.
    row_start = (line // height).to(tl.int64) * stride_b + (line % height).to(tl.int64) * stride_y
    source = images_ptr + row_start[:, None] + (x.to(tl.int64) * stride_x)[None, :]
    # line // P counts the patch rows of all pictures, since p divides H.
    patch = (line // P)[:, None] * (width // P) + (x // P)[None, :]
    target = out_ptr + patch * (3 * P * P) + ((line % P) * P)[:, None] + (x % P)[None, :]
    for c in tl.static_range(3):
        value = tl.load(source + c * stride_c, mask=mask, other=0).to(tl.float32)
        # Rounded as the reference rounds: `/` is approximate here, and a byte has few values to spend an exact one on.
        value = tl.div_rn(value, tl.full(value.shape, 127.5, tl.float32)) - 1.0
        tl.store(target + c * (P * P), value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def unpatchify_kernel(  # type: ignore[no-untyped-def]
    patches_ptr, out_ptr, lines, width, P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr
):
    line = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # pixel rows of all pictures
    at = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)  # bytes of a pixel row: x * 3 + c
    mask = (line < lines)[:, None] & (at < 3 * width)[None, :]
    x, c = at // 3, at % 3
    patch = (line // P)[:, None] * (width // P) + (x // P)[None, :]
    source = patches_ptr + patch * (3 * P * P) + ((line % P) * P)[:, None] + (c * (P * P) + x % P)[None, :]
    value = (tl.load(source, mask=mask, other=0.0).to(tl.float32) + 1.0) * 127.5
    value = tl.where(value > 0.0, value, 0.0)  # and NaN to 0
    value = tl.where(value < 255.0, value, 255.0)
    value = (value + 8388608.0) - 8388608.0  # at 2^23 float32 has no fractions: rounded half to even
    tl.store(out_ptr + line[:, None] * (3 * width) + at[None, :], value.to(tl.uint8), mask=mask)


def blocks(line_elements: int) -> dict[str, int]:
    """Block sizes for pixel rows of so many elements: a program takes about 1,024."""
    columns = min(triton.next_power_of_2(line_elements), 512)
    return {"BLOCK_R": 1024 // columns, "BLOCK_W": columns}


def patchify_uint8(images: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    b, height, width, _ = images.shape
    out = images.new_empty((b, (height // patch_size) * (width // patch_size), 3 * patch_size**2), dtype=dtype)
    block = blocks(width)
    grid = (triton.cdiv(b * height, block["BLOCK_R"]), triton.cdiv(width, block["BLOCK_W"]))
    with torch.cuda.device_of(images):
        patchify_kernel[grid](images, out, b * height, height, width, *images.stride(), P=patch_size, **block)
    return out


def unpatchify_uint8(patches: Tensor, patch_size: int, rows: int) -> Tensor:
    b, count, _ = patches.shape
    height, width = rows * patch_size, count // rows * patch_size
    out = patches.new_empty((b, height, width, 3), dtype=torch.uint8)
    block = blocks(3 * width)
    grid = (triton.cdiv(b * height, block["BLOCK_R"]), triton.cdiv(3 * width, block["BLOCK_W"]))
    with torch.cuda.device_of(patches):
        unpatchify_kernel[grid](patches.contiguous(), out, b * height, width, P=patch_size, **block)
    return out


implement_triton("patchify_uint8", patchify_uint8)
implement_triton("unpatchify_uint8", unpatchify_uint8)


def _aot_patchify(side: int, patch_size: int, dtype: str) -> AotCase:
    return AotCase(
        f"{side} px p={patch_size} {dtype}",
        patchify_kernel,
        signature={"images_ptr": "*u8", "out_ptr": f"*{dtype}"}
        | dict.fromkeys(("lines", "height", "width", "stride_b", "stride_y", "stride_x"), "i32"),
        constexprs={"stride_c": 1, "P": patch_size} | blocks(side),
        aligned=("images_ptr", "out_ptr", "lines", "height", "width", "stride_b", "stride_y"),
    )


def _aot_unpatchify(side: int, patch_size: int, dtype: str) -> AotCase:
    return AotCase(
        f"{side} px p={patch_size} {dtype}",
        unpatchify_kernel,
        signature={"patches_ptr": f"*{dtype}", "out_ptr": "*u8", "lines": "i32", "width": "i32"},
        constexprs={"P": patch_size} | blocks(3 * side),
        aligned=("patches_ptr", "out_ptr", "lines", "width"),
    )


AOT = [
    case(side, p, d) for case in (_aot_patchify, _aot_unpatchify) for side, p in ((256, 8), (256, 16)) for d in ("fp32", "bf16")
]
