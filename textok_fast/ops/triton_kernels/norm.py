"""LayerNorm joined to what stands around it, for :mod:`textok_fast.ops.norm`: forward, with FP8 result, backward.

A row is held in registers in pieces, whose number times a power of two comes close to D (1,152 = 9 * 128, 768 = 3 * 256), so
that few lanes idle. Forward, a program is one row, and up to 1,280 channels one warp, whose sums need no barrier. Backward, a
program is a chunk of rows of one sample, for which it sums the gradients of shift, scale and gate; torch adds up the chunks.
Arithmetic is in float32, the variance is that of the centred row (two passes over registers). Every tensor is read and written
in its own dtype, so that the residual stream may be float32 beside bfloat16.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# Kernels are Triton's language, in which tuples grow.

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.ops.aot import AotCase
from textok_fast.ops.fp8 import E4M3_MAX, lacks_e4m3
from textok_fast.ops.library import implement_triton
from textok_fast.ops.norm import normalized_like

# -- shapes ------------------------------------------------------------------------------------------------------------------

FORWARD_CHANNELS = 1280  # a warp has these at most, 40 a lane
BACKWARD_CHANNELS = 640  # 20 a lane, in up to nine arrays
MAX_WARPS = 8
MANY_PROGRAMS = 1024  # a few for each of a GPU's 100 to 150 multiprocessors


def num_warps(width: int, channels: int) -> int:
    """Warps for rows of ``width`` numbers, where one warp has ``channels`` of them at most."""
    return min(MAX_WARPS, triton.next_power_of_2(triton.cdiv(width, channels)))


def piece_size(width: int, warps: int) -> int:
    """Numbers in a piece of a row: 8, 4 or 2 a lane (up to 16 bytes a load), the first of those that pad the row least."""
    sizes = [32 * warps * lane for lane in (8, 4, 2)]
    return min(sizes, key=lambda size: triton.cdiv(width, size) * size)


def forward_options(width: int, branch: bool, gate: bool, fp8: bool) -> dict[str, Any]:
    """Constants of ``norm_forward`` for rows of ``width``, and its launch option num_warps."""
    warps = num_warps(width, FORWARD_CHANNELS)
    flags = {"BRANCH": branch, "GATE": gate, "FP8": fp8, "LARGEST": E4M3_MAX}
    return {"D": width, "PIECE": piece_size(width, warps), **flags, "num_warps": warps}


def backward_options(width: int, branch: bool, gate: bool) -> dict[str, Any]:
    """Constants of ``norm_backward`` for rows of ``width``, and its launch option num_warps."""
    warps = num_warps(width, BACKWARD_CHANNELS)
    return {"D": width, "PIECE": piece_size(width, warps), "BRANCH": branch, "GATE": gate, "num_warps": warps}


def rows_in_chunk(batch: int, rows: int) -> int:
    """Rows of a sample that one program of the backward pass takes; plain numbers, so that all GPUs add in the same order."""
    return min(rows, triton.cdiv(batch * rows, MANY_PROGRAMS))


# -- kernels -----------------------------------------------------------------------------------------------------------------


@triton.jit
def _load(row, D: tl.constexpr, PIECE: tl.constexpr):
    """A row in pieces, filled up with zeros, in the dtype of memory."""
    pieces = ()
    for i in tl.static_range((D + PIECE - 1) // PIECE):
        columns = i * PIECE + tl.arange(0, PIECE)
        if (i + 1) * PIECE <= D:
            pieces += (tl.load(row + columns),)
        else:
            pieces += (tl.load(row + columns, mask=columns < D, other=0.0),)
    return pieces


@triton.jit
def _store(row, pieces, D: tl.constexpr, PIECE: tl.constexpr):
    """Pieces are rounded to the dtype of memory, to nearest even."""
    for i in tl.static_range(len(pieces)):
        columns = i * PIECE + tl.arange(0, PIECE)
        rounded = pieces[i].to(row.dtype.element_ty)
        if (i + 1) * PIECE <= D:
            tl.store(row + columns, rounded)
        else:
            tl.store(row + columns, rounded, mask=columns < D)


@triton.jit
def _zeros(D: tl.constexpr, PIECE: tl.constexpr):
    pieces = ()
    for _ in tl.static_range((D + PIECE - 1) // PIECE):
        pieces += (tl.zeros((PIECE,), tl.float32),)
    return pieces


@triton.jit
def _widen(pieces):
    wide = ()
    for i in tl.static_range(len(pieces)):
        wide += (pieces[i].to(tl.float32),)
    return wide


@triton.jit
def _add_up(pieces):
    """(PIECE,)"""
    total = pieces[0]
    for i in tl.static_range(1, len(pieces)):
        total += pieces[i]
    return total


@triton.jit
def _add_up_products(a, b):
    """(PIECE,)"""
    total = a[0] * b[0]
    for i in tl.static_range(1, len(a)):
        total += a[i] * b[i]
    return total


@triton.jit
def _two_sums(a, b):
    """Of two blocks at once: warps wait for each other once."""
    return tl.split(tl.sum(tl.join(a, b), axis=0))


@triton.jit
def _subtract(pieces, mean, D: tl.constexpr, PIECE: tl.constexpr):
    """The row less its mean, with zeros after its end."""
    centred = ()
    for i in tl.static_range(len(pieces)):
        piece = pieces[i] - mean
        if (i + 1) * PIECE > D:
            piece = tl.where(i * PIECE + tl.arange(0, PIECE) < D, piece, 0.0)
        centred += (piece,)
    return centred


@triton.jit
def _quantize(row, scale, pieces, D: tl.constexpr, PIECE: tl.constexpr, LARGEST: tl.constexpr):
    """Stores a row as e4m3 and its scale, as textok_fast.ops.fp8.quantize_rows_reference has it."""
    # Magnitudes compare as integers do, with NaN above infinity, which a maximum of floats would leave out.
    magnitude = pieces[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for i in tl.static_range(1, len(pieces)):
        magnitude = tl.maximum(magnitude, pieces[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(magnitude, axis=0).to(tl.float32, bitcast=True)
    factor = tl.div_rn(largest, LARGEST)
    factor = tl.where(factor == 0, 1.0, factor)  # NaN stays NaN
    tl.store(scale, factor)
    # A correctly rounded quotient without a division's branches (Markstein 1990): the product with the reciprocal, corrected
    # by its remainder. Tiny rows are enlarged by 2**64, so that the reciprocal is finite; infinite rows are not corrected.
    enlarge = tl.where(factor < 1e-19, 18446744073709551616.0, 1.0)
    divisor = factor * enlarge
    reciprocal = tl.div_rn(1.0, divisor)
    divisor = tl.where(divisor == float("inf"), 0.0, divisor)
    quotients = ()
    for i in tl.static_range(len(pieces)):
        enlarged = pieces[i] * enlarge
        quotient = enlarged * reciprocal
        quotients += (tl.fma(tl.fma(-quotient, divisor, enlarged), reciprocal, quotient),)
    _store(row, quotients, D, PIECE)  # the cast saturates


@triton.jit
def norm_forward(
    x_ptr,  # (B, N, D)
    branch_ptr,  # (B, N, D)
    gate_ptr,  # (B, D)
    shift_ptr,  # (B, D)
    scale_ptr,  # (B, D)
    residual_ptr,  # (B, N, D) contiguous, out
    hidden_ptr,  # (B, N, D) contiguous, out
    row_scale_ptr,  # (B, N) contiguous, out
    N,
    x_sample,  # strides: x[b, n] begins at b * x_sample + n * x_row
    x_row,
    branch_sample,
    branch_row,
    gate_sample,
    shift_sample,
    scale_sample,
    offset,
    eps,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BRANCH: tl.constexpr,  # r = x + branch, stored; without it r = x
    GATE: tl.constexpr,  # r = x + gate * branch
    FP8: tl.constexpr,  # hidden as e4m3 with row_scale
    LARGEST: tl.constexpr,
):
    """hidden = LN(r) * (offset + scale) + shift of one row."""
    row = tl.program_id(0)
    b = (row // N).to(tl.int64)
    n = (row % N).to(tl.int64)
    row = row.to(tl.int64)
    # Everything is asked for before the first sum, so that memory is waited for once.
    x = _load(x_ptr + b * x_sample + n * x_row, D, PIECE)
    if BRANCH:
        branch = _load(branch_ptr + b * branch_sample + n * branch_row, D, PIECE)
        if GATE:
            gate = _load(gate_ptr + b * gate_sample, D, PIECE)
    scale = _load(scale_ptr + b * scale_sample, D, PIECE)
    shift = _load(shift_ptr + b * shift_sample, D, PIECE)

    r = _widen(x)
    if BRANCH:
        added = ()
        for i in tl.static_range(len(r)):
            term = branch[i].to(tl.float32)
            if GATE:
                term = gate[i].to(tl.float32) * term
            # Rounded as it is stored: the backward pass normalizes what it reads.
            added += ((r[i] + term).to(residual_ptr.dtype.element_ty).to(tl.float32),)
        r = added
        _store(residual_ptr + row * D, r, D, PIECE)

    centred = _subtract(r, tl.sum(_add_up(r), axis=0) / D, D, PIECE)
    inverse = tl.rsqrt(tl.sum(_add_up_products(centred, centred), axis=0) / D + eps)
    hidden = ()
    for i in tl.static_range(len(centred)):
        modulated = centred[i] * inverse * (offset + scale[i].to(tl.float32)) + shift[i].to(tl.float32)
        hidden += (modulated,)
    if FP8:
        _quantize(hidden_ptr + row * D, row_scale_ptr + row, hidden, D, PIECE, LARGEST)
    else:
        _store(hidden_ptr + row * D, hidden, D, PIECE)


@triton.jit
def norm_backward(
    grad_ptr,  # (B, N, D), of hidden
    grad_residual_ptr,  # (B, N, D)
    x_ptr,  # (B, N, D), what was normalized
    branch_ptr,  # (B, N, D)
    gate_ptr,  # (B, D)
    scale_ptr,  # (B, D)
    dx_ptr,  # (B, N, D) contiguous, out
    dbranch_ptr,  # (B, N, D) contiguous, out
    partial_ptr,  # (2 or 3, B, chunks, D) float32, out: of shift, scale and, with GATE, gate
    N,
    rows,  # in a chunk
    grad_sample,
    grad_row,
    grad_residual_sample,
    grad_residual_row,
    x_sample,
    x_row,
    branch_sample,
    branch_row,
    gate_sample,
    scale_sample,
    offset,
    eps,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BRANCH: tl.constexpr,  # there is a grad_residual
    GATE: tl.constexpr,  # there is a branch of its own gradient
):
    """dr = grad_residual + (g - mean(g) - xhat * mean(g * xhat)) / std with g = grad * (offset + scale), chunk by chunk."""
    chunk = tl.program_id(0)
    chunks = (N + rows - 1) // rows
    b = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks) * rows
    scale = _load(scale_ptr + b * scale_sample, D, PIECE)
    if GATE:
        gate = _load(gate_ptr + b * gate_sample, D, PIECE)
    dshift = _zeros(D, PIECE)
    dscale = _zeros(D, PIECE)
    dgate = _zeros(D, PIECE)
    for row in range(first, tl.minimum(first + rows, N)):
        n = tl.cast(row, tl.int64)
        x = _load(x_ptr + b * x_sample + n * x_row, D, PIECE)
        grad = _load(grad_ptr + b * grad_sample + n * grad_row, D, PIECE)
        if BRANCH:
            grad_residual = _load(grad_residual_ptr + b * grad_residual_sample + n * grad_residual_row, D, PIECE)
        if GATE:
            branch = _load(branch_ptr + b * branch_sample + n * branch_row, D, PIECE)

        x = _widen(x)
        g = ()
        for i in tl.static_range(len(grad)):
            g += (grad[i].to(tl.float32) * (offset + scale[i].to(tl.float32)),)
        sum_x, sum_g = _two_sums(_add_up(x), _add_up(g))
        centred = _subtract(x, sum_x / D, D, PIECE)
        sum_square, sum_gx = _two_sums(_add_up_products(centred, centred), _add_up_products(g, centred))
        inverse = tl.rsqrt(sum_square / D + eps)
        mean_g = sum_g / D
        mean_gx = sum_gx / D * inverse

        dr = ()
        new_dshift = ()
        new_dscale = ()
        for i in tl.static_range(len(g)):
            normalized = centred[i] * inverse
            piece = (g[i] - mean_g - normalized * mean_gx) * inverse
            if BRANCH:
                piece += grad_residual[i].to(tl.float32)
            dr += (piece,)
            new_dshift += (dshift[i] + grad[i].to(tl.float32),)
            new_dscale += (dscale[i] + grad[i].to(tl.float32) * normalized,)
        dshift = new_dshift
        dscale = new_dscale
        at = (b * N + n) * D
        _store(dx_ptr + at, dr, D, PIECE)
        if GATE:
            dbranch = ()
            new_dgate = ()
            for i in tl.static_range(len(dr)):
                dbranch += (dr[i] * gate[i].to(tl.float32),)
                new_dgate += (dgate[i] + dr[i] * branch[i].to(tl.float32),)
            dgate = new_dgate
            _store(dbranch_ptr + at, dbranch, D, PIECE)
    at = chunk.to(tl.int64) * D
    every = tl.num_programs(0).to(tl.int64) * D
    _store(partial_ptr + at, dshift, D, PIECE)
    _store(partial_ptr + every + at, dscale, D, PIECE)
    if GATE:
        _store(partial_ptr + 2 * every + at, dgate, D, PIECE)


# -- launchers ---------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """The numbers of a row next to each other, rows anywhere."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    offset: float,
    eps: float,
    hidden: Tensor,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Fills ``hidden`` and, given that, ``row_scale``. Returns the residual, which is ``x`` without a branch."""
    batch, rows, width = x.shape
    residual = x if branch is None else x.new_empty(x.shape)
    if x.numel() == 0:
        return residual
    x, shift, scale = _rows(x), _rows(shift), _rows(scale)
    # Where there is no branch or gate, any tensor stands for it and is not read.
    joined, gating = x if branch is None else _rows(branch), scale if gate is None else _rows(gate)
    with _on(x):
        norm_forward[(batch * rows,)](
            x,
            joined,
            gating,
            shift,
            scale,
            residual,
            hidden,
            hidden if row_scale is None else row_scale,
            rows,
            x.stride(0),
            x.stride(1),
            joined.stride(0),
            joined.stride(1),
            gating.stride(0),
            shift.stride(0),
            scale.stride(0),
            offset,
            eps,
            **forward_options(width, branch is not None, gate is not None, row_scale is not None),
        )
    return residual


def _fp8_results(x: Tensor) -> tuple[Tensor, Tensor]:
    if reason := lacks_e4m3(x):
        raise InputError(reason)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _backward(
    grad_residual: Tensor | None,
    grad: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    offset: float,
    eps: float,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Returns dx, dbranch where there is a gate, and sums (B, D) in float32: for shift, for scale and, with a gate, for it."""
    batch, rows, width = x.shape
    dx = x.new_empty(x.shape)
    dbranch = None if gate is None or branch is None else branch.new_empty(branch.shape)
    sums = 2 if dbranch is None else 3
    if x.numel() == 0:
        return dx, dbranch, [x.new_zeros((batch, width), dtype=torch.float32) for _ in range(sums)]
    chunk = rows_in_chunk(batch, rows)
    partial = x.new_empty((sums, batch, triton.cdiv(rows, chunk), width), dtype=torch.float32)
    grad, x, scale = _rows(grad), _rows(x), _rows(scale)
    above = x if grad_residual is None else _rows(grad_residual)
    joined = x if dbranch is None or branch is None else _rows(branch)
    gating = scale if gate is None else _rows(gate)
    with _on(x):
        norm_backward[(batch * partial.shape[2],)](
            grad,
            above,
            x,
            joined,
            gating,
            scale,
            dx,
            dx if dbranch is None else dbranch,
            partial,
            rows,
            chunk,
            grad.stride(0),
            grad.stride(1),
            above.stride(0),
            above.stride(1),
            x.stride(0),
            x.stride(1),
            joined.stride(0),
            joined.stride(1),
            gating.stride(0),
            scale.stride(0),
            offset,
            eps,
            **backward_options(width, grad_residual is not None, dbranch is not None),
        )
    return dx, dbranch, [part.sum(1) for part in partial]


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``textok_fast_triton::layer_norm_modulate``."""
    hidden = normalized_like(x, scale)
    _forward(x, None, None, shift, scale, 1.0, eps, hidden)
    return hidden


def layer_norm_modulate_fp8(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``textok_fast_triton::layer_norm_modulate_fp8``."""
    values, row_scale = _fp8_results(x)
    _forward(x, None, None, shift, scale, 1.0, eps, values, row_scale)
    return values, row_scale


def layer_norm_modulate_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``textok_fast_triton::layer_norm_modulate_backward``."""
    dx, _, (dshift, dscale) = _backward(None, grad, x, None, None, scale, 1.0, eps)
    return dx, dshift.to(scale.dtype), dscale.to(scale.dtype)


def gated_residual_layer_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, offset: float, eps: float
) -> tuple[Tensor, Tensor]:
    """``textok_fast_triton::gated_residual_layer_norm_modulate``."""
    hidden = normalized_like(x, scale)
    return _forward(x, branch, gate, shift, scale, offset, eps, hidden), hidden


def gated_residual_layer_norm_modulate_fp8(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, offset: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``textok_fast_triton::gated_residual_layer_norm_modulate_fp8``."""
    values, row_scale = _fp8_results(x)
    return _forward(x, branch, gate, shift, scale, offset, eps, values, row_scale), values, row_scale


def gated_residual_layer_norm_modulate_backward(
    grad_residual: Tensor,
    grad: Tensor,
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    offset: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``textok_fast_triton::gated_residual_layer_norm_modulate_backward``; without a gate two results are empty, (0,)."""
    dx, dbranch, (dshift, dscale, *dgate) = _backward(grad_residual, grad, residual, branch, gate, scale, offset, eps)
    dshift, dscale = dshift.to(scale.dtype), dscale.to(scale.dtype)
    if gate is None or dbranch is None:
        return dx, branch.new_empty(0), scale.new_empty(0), dshift, dscale
    return dx, dbranch, dgate[0].to(gate.dtype), dshift, dscale


implement_triton("layer_norm_modulate", layer_norm_modulate)
implement_triton("layer_norm_modulate_fp8", layer_norm_modulate_fp8)
implement_triton("layer_norm_modulate_backward", layer_norm_modulate_backward)
implement_triton("gated_residual_layer_norm_modulate", gated_residual_layer_norm_modulate)
implement_triton("gated_residual_layer_norm_modulate_fp8", gated_residual_layer_norm_modulate_fp8)
implement_triton("gated_residual_layer_norm_modulate_backward", gated_residual_layer_norm_modulate_backward)

# -- ahead of time -----------------------------------------------------------------------------------------------------------


def _case(width: int, label: str, name: str, branch: bool, gate: bool, kind: str) -> AotCase:
    """Contiguous x and branch, modulation out of one matrix; all tensors of one dtype ("fp32" or "bf16"), or with
    "bf16 on fp32" the residual stream in fp32 and all else in bf16."""
    kernel = norm_backward if kind == "backward" else norm_forward
    options = (
        backward_options(width, branch, gate) if kind == "backward" else forward_options(width, branch, gate, kind == "fp8")
    )
    warps = options.pop("num_warps")
    dtype, _, stream = label.partition(" on ")
    types = dict.fromkeys(("x_ptr", "residual_ptr", "grad_residual_ptr", "dx_ptr"), f"*{stream or dtype}")
    types |= {"row_scale_ptr": "*fp32", "partial_ptr": "*fp32", "offset": "fp32", "eps": "fp32"}
    if kind == "fp8":
        types["hidden_ptr"] = "*fp8e4nv"
    arguments = [argument for argument in kernel.arg_names if argument not in options]
    signature = {argument: types.get(argument, f"*{dtype}" if argument.endswith("_ptr") else "i32") for argument in arguments}
    aligned = tuple(argument for argument in arguments if argument.endswith(("_ptr", "_sample", "_row")))
    return AotCase(
        f"{name} {kind} {width} {label}",
        kernel,
        signature,
        options,
        num_warps=warps,
        needs=89 if kind == "fp8" else 80,
        aligned=aligned,
    )


AOT = [
    _case(width, label, name, branch, gate, kind)
    for width, name, branch, gate in (
        (1152, "modulated", False, False),  # DiT-XL
        (1152, "gated", True, True),
        (768, "gated", True, True),  # DiT-B
        (768, "residual", True, False),  # TexTok-B's transformers
    )
    for label in ("fp32", "bf16", "bf16 on fp32")
    for kind in ("forward", "fp8", "backward")
]
