"""Products with an epilogue, in bf16, fp16, fp32 and e4m3, and the row quantization that may follow.

Two kernels. ``product_kernel`` multiplies tiles; up to 128 rows several programs share a tile's sum, each with its own stretch
of ``inputs``, and write float32 parts. ``finish_kernel`` adds such parts, or takes finished rows, and rounds or quantizes them.
There are no atomics: the same numbers give the same result.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from textok_fast.ops.aot import AotCase
from textok_fast.ops.library import implement_triton
from textok_fast.ops.linear import PRODUCT_ROWS, PRODUCTS, SKINNY_ROWS


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)): no library function, and no cancellation for negative u.
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * u))
    return x


@triton.jit
def _store(
    total,
    x_scale_ptr,  # at the tile's first row
    w_scale_ptr,
    bias_ptr,
    out_ptr,  # at the tile's first row
    rows,  # from there on
    outputs,
    first_column,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.arange(0, total.shape[0])
    column = first_column + tl.arange(0, total.shape[1])
    if SCALED:
        total *= tl.load(x_scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        total *= tl.load(w_scale_ptr + column, mask=column < outputs, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    total = _activate(total, ACTIVATION)
    inside = (row < rows)[:, None] & (column < outputs)[None, :]
    tl.store(out_ptr + (row[:, None] * outputs + column[None, :]), total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(
    x_ptr,  # (rows, inputs), rows x_stride apart
    w_ptr,  # (outputs, inputs), rows w_stride apart
    x_scale_ptr,  # (rows,) fp32
    w_scale_ptr,  # (outputs,) fp32
    bias_ptr,  # (outputs,)
    out_ptr,  # (rows, outputs), or the parts (splits, rows, outputs) fp32
    rows,
    outputs,
    inputs,
    x_stride,
    w_stride,
    steps,  # blocks of inputs in one part
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides inputs
    WEIGHT_FIRST: tl.constexpr,  # multiply weight x^T: Hopper's products have 64 rows and any number of columns
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that run at the same time share rows of x and of the weight in L2: GROUP tiles down, then the next column.
    tile = tl.program_id(0)
    part = tl.program_id(1)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    in_group = GROUP * tl.cdiv(outputs, BLOCK_N)
    first = tile // in_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    first_row = (first + tile % in_group % height) * BLOCK_M
    first_column = (tile % in_group // height) * BLOCK_N

    # A tensor may have more than 2^31 numbers, a tile has not: one 64-bit base and offsets of 32 bits, in half the registers.
    # Beyond the edge the last row is read again, so that the loop needs no masks; it is not stored.
    row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1 - first_row)
    column = tl.minimum(tl.arange(0, BLOCK_N), outputs - 1 - first_column)
    k = tl.arange(0, BLOCK_K)
    x_offsets = row[:, None] * x_stride + k[None, :]
    w_offsets = column[:, None] * w_stride + k[None, :]
    x_ptr += first_row.to(tl.int64) * x_stride + part * steps * BLOCK_K
    w_ptr += first_column.to(tl.int64) * w_stride + part * steps * BLOCK_K
    if WEIGHT_FIRST:
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(inputs, BLOCK_K))):
        if EVEN:
            x = tl.load(x_ptr + x_offsets)
            w = tl.load(w_ptr + w_offsets)
        else:
            inside = (step * BLOCK_K + k < inputs)[None, :]
            x = tl.load(x_ptr + x_offsets, mask=inside, other=0.0)
            w = tl.load(w_ptr + w_offsets, mask=inside, other=0.0)
        if WEIGHT_FIRST:
            total = tl.dot(w, tl.trans(x), total, input_precision="ieee")
        else:
            total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K
    if WEIGHT_FIRST:
        total = tl.trans(total)

    x_scale_ptr += first_row
    out_ptr += (part.to(tl.int64) * rows + first_row) * outputs
    rows -= first_row
    if BLOCK_M * BLOCK_N > 16384:
        # One half of a large tile's columns after the other: their scales and bias fit the registers beside the sums.
        left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        middle = first_column + BLOCK_N // 2
        _store(left, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, rows, outputs, first_column, SCALED, BIAS, ACTIVATION)
        _store(right, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, rows, outputs, middle, SCALED, BIAS, ACTIVATION)
    else:
        _store(total, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, rows, outputs, first_column, SCALED, BIAS, ACTIVATION)


@triton.jit
def finish_kernel(
    x_ptr,  # (PARTS, rows, columns), rows x_stride apart
    x_scale_ptr,  # (rows,) fp32
    w_scale_ptr,  # (columns,) fp32
    bias_ptr,  # (columns,)
    out_ptr,  # (rows, columns)
    out_scale_ptr,  # (rows,) fp32
    rows,
    columns,
    x_stride,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    QUANTIZE: tl.constexpr,  # BLOCK is a whole row
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(x_ptr + (part * rows + row) * x_stride + column, mask=inside, other=0.0)
    if SCALED:
        total *= tl.load(x_scale_ptr + row)
        total *= tl.load(w_scale_ptr + column, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    total = _activate(total, ACTIVATION)
    if QUANTIZE:
        # As quantize_rows_reference, to the bit: exact divisions, and a NaN, which tl.max passes over, kept.
        largest = tl.max(tl.abs(total), axis=0)
        scale = tl.div_rn(largest, 448.0)
        scale = tl.where(scale > 0, scale, 1.0)
        scale = tl.where(tl.max((total != total).to(tl.int32), axis=0) > 0, float("nan"), scale)
        total = tl.div_rn(total, scale)
        total = tl.where(total > 448.0, 448.0, total)
        total = tl.where(total < -448.0, -448.0, total)
        tl.store(out_scale_ptr + row, scale)
    tl.store(out_ptr + row * columns + column, total.to(out_ptr.dtype.element_ty), mask=inside)


# -- sizes -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """What the sizes of blocks depend on: multiprocessors, and bytes of shared memory that one block may have."""

    processors: int
    shared: int


HOPPER = Gpu(132, 227 * 1024)


@functools.cache
def _gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return HOPPER  # interpreted: the blocks that would run there
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Plan:
    """How one product is divided."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    weight_first: bool
    warps: int
    stages: int


# block_m, block_n, warps, stages: the first that gives every multiprocessor a tile is taken, else the last.
_TILES = ((128, 256, 8, 3), (128, 128, 8, 3), (64, 128, 4, 4), (64, 64, 4, 4))
_STEP_BYTES = 128  # of a row, in one step of the loop
_MAX_SPLITS = 8


def plan(rows: int, inputs: int, outputs: int, itemsize: int, gpu: Gpu) -> Plan:
    """Blocks for a product (rows, inputs) x (outputs, inputs)^T of numbers of ``itemsize`` bytes."""
    block_k = _STEP_BYTES // itemsize

    def stages(block_m: int, block_n: int, wanted: int) -> int:
        return min(wanted, (gpu.shared - 4096) // ((block_m + block_n) * _STEP_BYTES))

    if rows <= SKINNY_ROWS:
        block_m, block_n = max(16, triton.next_power_of_2(rows)), 64
        # Enough programs to keep every multiprocessor reading, with two steps each or more.
        steps = triton.cdiv(inputs, block_k)
        splits = min(triton.cdiv(gpu.processors, triton.cdiv(outputs, block_n)), triton.cdiv(steps, 2), _MAX_SPLITS)
        splits = triton.cdiv(steps, triton.cdiv(steps, splits))  # none of them empty
        return Plan(block_m, block_n, block_k, splits, True, 4 if rows <= 64 else 8, stages(block_m, block_n, 4))
    if itemsize == 4:  # without tensor cores, in registers
        return Plan(64, 64, block_k, 1, False, 4, 2)
    fitting = [tile for tile in _TILES if stages(tile[0], tile[1], 3) == 3]
    busy = [tile for tile in fitting if triton.cdiv(rows, tile[0]) * triton.cdiv(outputs, tile[1]) >= gpu.processors]
    block_m, block_n, warps, wanted = (busy or fitting[-1:])[0]
    return Plan(block_m, block_n, block_k, 1, False, warps, stages(block_m, block_n, wanted))


def product_options(chosen: Plan, inputs: int, scaled: bool, bias: bool, activation: str, parts: bool) -> dict[str, Any]:
    """Compile-time arguments of ``product_kernel``. Parts are bare: ``finish_kernel`` does the rest."""
    return {
        "SCALED": scaled and not parts,
        "BIAS": bias and not parts,
        "ACTIVATION": "none" if parts else activation,
        "EVEN": inputs % chosen.block_k == 0,
        "WEIGHT_FIRST": chosen.weight_first,
        "GROUP": 8,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
    }


def finish_options(columns: int, parts: int, scaled: bool, bias: bool, activation: str, quantize: bool) -> dict[str, Any]:
    """Compile-time arguments of ``finish_kernel``."""
    block = triton.next_power_of_2(columns)
    return {
        "PARTS": parts,
        "SCALED": scaled,
        "BIAS": bias,
        "ACTIVATION": activation,
        "QUANTIZE": quantize,
        "BLOCK": block if quantize else min(block, 1024),
    }


def finish_warps(options: dict[str, Any]) -> int:
    """About 16 numbers a thread."""
    return min(max(options["BLOCK"] // 512, 1), 16)


# -- launchers ---------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (M, D), a row's numbers next to each other; a copy only where that needs one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _product(
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """(..., out) in ``dtype``, and None; for ``dtype`` None e4m3 and the scales (...)."""
    shape, outputs = x.shape[:-1], weight.shape[0]
    x, weight = _rows(x), _rows(weight)
    rows, inputs = x.shape
    quantize = dtype is None
    out = x.new_empty((rows, outputs), dtype=torch.float8_e4m3fn if dtype is None else dtype)
    out_scale = x.new_empty(rows, dtype=torch.float32) if quantize else None
    if not rows or not outputs:
        return out.reshape(*shape, outputs), None if out_scale is None else out_scale.reshape(shape)
    # x stands for the pointers that are not used.
    x_scale, weight_scale = (x, x) if scales is None else (scales[0].reshape(-1).contiguous(), scales[1].contiguous())
    given_bias = x if bias is None else bias.contiguous()

    chosen = plan(rows, inputs, outputs, x.element_size(), _gpu(x.device))
    parts = chosen.splits > 1 or (quantize and rows <= SKINNY_ROWS)
    if parts:
        product = x.new_empty((chosen.splits, rows, outputs), dtype=torch.float32)
    else:
        product = x.new_empty((rows, outputs), dtype=torch.bfloat16) if quantize else out
    grid = (triton.cdiv(rows, chosen.block_m) * triton.cdiv(outputs, chosen.block_n), chosen.splits)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        product_kernel[grid](
            x,
            weight,
            x_scale,
            weight_scale,
            given_bias,
            product,
            rows,
            outputs,
            inputs,
            x.stride(0),
            weight.stride(0),
            triton.cdiv(triton.cdiv(inputs, chosen.block_k), chosen.splits),
            **product_options(chosen, inputs, scales is not None, bias is not None, activation, parts),
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
    if parts:
        options = finish_options(outputs, chosen.splits, scales is not None, bias is not None, activation, quantize)
    elif quantize:
        options = finish_options(outputs, 1, False, False, "none", True)
    if parts or quantize:
        _finish(product, x_scale, weight_scale, given_bias, out, out_scale, options)
    return out.reshape(*shape, outputs), None if out_scale is None else out_scale.reshape(shape)


def _finish(
    x: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor, out: Tensor, out_scale: Tensor | None, options: dict[str, Any]
) -> None:
    rows, columns = out.shape
    with torch.cuda.device_of(x):
        finish_kernel[(rows, triton.cdiv(columns, options["BLOCK"]))](
            x,
            x_scale,
            w_scale,
            bias,
            out,
            x_scale if out_scale is None else out_scale,
            rows,
            columns,
            x.stride(-2),
            **options,
            num_warps=finish_warps(options),
        )


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return _product(x, weight, None, bias, "gelu_tanh" if approximate == "tanh" else "gelu", x.dtype)[0]


def _fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    return _product(x, weight, (x_scale, weight_scale), bias, activation, dtype)[0]


def _fp8_linear_fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    return _product(x, weight, (x_scale, weight_scale), bias, activation, None)


def _activate_quantize_rows(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    shape, x = x.shape, _rows(x)
    out = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(x.shape[0], dtype=torch.float32)
    if x.numel():
        _finish(x, x, x, x, out, scales, finish_options(x.shape[1], 1, False, False, activation, True))
    return out.reshape(shape), scales.reshape(shape[:-1])


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return _activate_quantize_rows(x, "none")


implement_triton("linear_gelu", _linear_gelu)
implement_triton("fp8_linear", _fp8_linear)
implement_triton("fp8_linear_fp8", _fp8_linear_fp8)
implement_triton("activate_quantize_rows", _activate_quantize_rows)
implement_triton("quantize_rows", _quantize_rows)


# -- ahead of time -----------------------------------------------------------------------------------------------------------


_SCALES_AND_BIAS = {"x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16"}


def _aot() -> list[AotCase]:
    """DiT-XL's FP8 products and both models' first MLP products in bf16, 32 to 8,192 rows, as they are divided on an H200."""
    cases: dict[tuple[Any, ...], AotCase] = {}

    def product(rows: int, inputs: int, outputs: int, dtype: str, activation: str) -> Plan:
        chosen = plan(rows, inputs, outputs, 1 if dtype == "fp8e4nv" else 2, HOPPER)
        parts = chosen.splits > 1
        scaled = dtype == "fp8e4nv"
        options = product_options(chosen, inputs, scaled, True, activation, parts)
        pointers = {"x_ptr": f"*{dtype}", "w_ptr": f"*{dtype}", **_SCALES_AND_BIAS}
        integers = dict.fromkeys(("rows", "outputs", "inputs", "x_stride", "w_stride", "steps"), "i32")
        signature = {**pointers, "out_ptr": "*fp32" if parts else "*bf16", **integers}
        tile = f"{chosen.block_m}x{chosen.block_n}x{chosen.block_k}"
        name = f"{dtype} {tile} " + ("parts" if parts else options["ACTIVATION"])
        cases["product", name] = AotCase(
            name,
            product_kernel,
            signature,
            options,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            needs=89 if scaled else 80,
            tensor_cores=True,
            aligned=tuple(name for name in signature if name != "steps"),
        )
        return chosen

    def finish(columns: int, parts: int, scaled: bool, bias: bool, activation: str, quantize: bool) -> None:
        options = finish_options(columns, parts, scaled, bias, activation, quantize)
        dtype = "fp32" if parts > 1 or scaled else "bf16"
        pointers = {"x_ptr": f"*{dtype}", **_SCALES_AND_BIAS}
        results = {"out_ptr": "*fp8e4nv" if quantize else "*bf16", "out_scale_ptr": "*fp32"}
        signature = {**pointers, **results, **dict.fromkeys(("rows", "columns", "x_stride"), "i32")}
        name = f"{parts} x {dtype} {options['BLOCK']} {activation}" + (" to e4m3" if quantize else "")
        cases["finish", name] = AotCase(
            name,
            finish_kernel,
            signature,
            options,
            num_warps=finish_warps(options),
            needs=89 if quantize else 80,
            aligned=tuple(signature),
        )

    for rows in PRODUCT_ROWS:
        for inputs, outputs in PRODUCTS[:4]:  # DiT-XL's
            activation = "gelu_tanh" if outputs == 4 * inputs else "none"
            chosen = product(rows, inputs, outputs, "fp8e4nv", activation)
            if chosen.splits > 1:
                finish(outputs, chosen.splits, True, True, activation, activation != "none")
        for (inputs, outputs), activation in ((PRODUCTS[2], "gelu_tanh"), (PRODUCTS[6], "gelu")):
            chosen = product(rows, inputs, outputs, "bf16", activation)
            if chosen.splits > 1:
                finish(outputs, chosen.splits, False, True, activation, False)
    for columns, activation in ((1152, "none"), (4608, "none"), (4608, "gelu_tanh"), (3072, "gelu")):
        finish(columns, 1, False, False, activation, True)  # quantize_rows, and after a product of more than 128 rows
    return list(cases.values())


AOT = _aot()
