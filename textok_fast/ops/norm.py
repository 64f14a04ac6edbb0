"""LayerNorm joined to what stands around it: adaLN's modulation, the gated residual before it, an affine transformation.

The residual stream x may be float32 where everything else is bfloat16 or float16: many branches are added to it one after the
other, and each sum in bfloat16 would cost it half a unit in the eighth bit. It is then read, summed and written in float32, and
what a LayerNorm gives to a product has the dtype of its scale (its weight).

Backends: ``native`` (csrc: CPU in float32 and bfloat16, CUDA), ``triton`` (any float dtypes), ``reference``.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.ops.dispatch import REFERENCE, choose, describe, one_device, register
from textok_fast.ops.fp8 import RowScaled, lacks_e4m3, quantize_rows_reference
from textok_fast.ops.library import (
    define,
    has_native,
    library,
    native_runs_on,
    refuse_second_derivative,
    save_nothing,
    triton_runs_on,
)

# -- references --------------------------------------------------------------------------------------------------------------


def layer_norm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """:func:`layer_norm_modulate` in PyTorch."""
    normalized = F.layer_norm(x, (x.shape[-1],), eps=eps)  # (B, N, D)
    factor, added = 1 + _widened(scale, x).unsqueeze(1), _widened(shift, x).unsqueeze(1)  # each (B, 1, D)
    return (normalized * factor + added).to(_normalized_dtype(x, scale))


def gated_residual_layer_norm_modulate_reference(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """:func:`gated_residual_layer_norm_modulate` in PyTorch."""
    residual = _add_branch(x, branch, gate)  # (B, N, D)
    return residual, layer_norm_modulate_reference(residual, shift, scale, eps)


def gated_residual_layer_norm_reference(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """:func:`gated_residual_layer_norm` in PyTorch."""
    residual = _add_branch(x, branch, gate)  # (B, N, D)
    hidden = F.layer_norm(residual, (x.shape[-1],), _widened(weight, x), _widened(bias, x), eps)  # (B, N, D)
    return residual, hidden.to(_normalized_dtype(x, weight))


def _add_branch(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    branch = _widened(branch, x)
    return (x + (branch if gate is None else _widened(gate, x).unsqueeze(1) * branch)).to(x.dtype)  # (B, N, D)


def _widened(tensor: Tensor, x: Tensor) -> Tensor:
    """In ``x``'s dtype where that is the wider one, so that nothing is rounded before it meets the residual stream."""
    return tensor.to(torch.promote_types(tensor.dtype, x.dtype))


def _normalized_dtype(x: Tensor, scale: Tensor) -> torch.dtype:
    mixed = x.dtype == torch.float32 and scale.dtype in (torch.bfloat16, torch.float16)
    return scale.dtype if mixed else x.dtype


# -- public functions --------------------------------------------------------------------------------------------------------


@overload
def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, fp8: Literal[False] = False
) -> Tensor: ...
@overload
def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, fp8: Literal[True]) -> RowScaled: ...
def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, fp8: bool = False) -> Tensor | RowScaled:
    """LayerNorm(x) * (1 + scale) + shift, the norm without weight or bias (adaLN, Peebles & Xie 2023).

    Args:
        x: (B, N, D), float; rows may lie anywhere, a row's numbers next to each other.
        shift, scale: (B, D), one row a sample, read in place: views of a chunk or of a table's row.
        fp8: quantize each row for an FP8 product. Without gradient.

    Returns: (B, N, D) in ``x``'s dtype, or for a float32 ``x`` with a bfloat16 or float16 ``scale`` in that of ``scale``; with
        ``fp8`` :class:`RowScaled` of (B, N, D) and (B, N). Gradients have their input's dtype.
    Raises: InputError for shapes that do not belong together.
    """
    _check(x, shift=shift, scale=scale)
    if fp8:
        x, shift, scale = x.detach(), shift.detach(), scale.detach()
        backend = choose("layer_norm_modulate_fp8", x, shift, scale)
        if backend == REFERENCE:
            return quantize_rows_reference(layer_norm_modulate_reference(x, shift, scale, eps))
        return RowScaled(*library(backend).layer_norm_modulate_fp8(x, shift, scale, eps))
    backend = choose("layer_norm_modulate", x, shift, scale)
    if backend == REFERENCE:
        return layer_norm_modulate_reference(x, shift, scale, eps)
    return library(backend).layer_norm_modulate(x, shift, scale, eps)


@overload
def gated_residual_layer_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    fp8: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def gated_residual_layer_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, fp8: Literal[True]
) -> tuple[Tensor, RowScaled]: ...
def gated_residual_layer_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, fp8: bool = False
) -> tuple[Tensor, Tensor | RowScaled]:
    """r = x + gate * branch;  h = LayerNorm(r) * (1 + scale) + shift.  Returns (r, h).

    Args:
        x, branch: (B, N, D), float.
        gate, shift, scale: (B, D), one row a sample, read in place. No gate: r = x + branch.
        fp8: quantize each row of h for an FP8 product. Without gradient.

    Returns: the residual stream (B, N, D) in ``x``'s dtype and the normalized branch input (B, N, D), whose dtype is as in
        :func:`layer_norm_modulate`; with ``fp8`` it is :class:`RowScaled` of (B, N, D) and (B, N).
    Raises: InputError for shapes that do not belong together.
    """
    _check(x, branch, gate=gate, shift=shift, scale=scale)
    if fp8:
        x, branch, shift, scale = x.detach(), branch.detach(), shift.detach(), scale.detach()
        gate = None if gate is None else gate.detach()
        backend = choose("gated_residual_layer_norm_modulate_fp8", x, branch, gate, shift, scale)
        if backend == REFERENCE:
            residual, hidden = gated_residual_layer_norm_modulate_reference(x, branch, gate, shift, scale, eps)
            return residual, quantize_rows_reference(hidden)
        fused = library(backend).gated_residual_layer_norm_modulate_fp8
        residual, values, scales = fused(x, branch, gate, shift, scale, 1.0, eps)
        return residual, RowScaled(values, scales)
    backend = choose("gated_residual_layer_norm_modulate", x, branch, gate, shift, scale)
    if backend == REFERENCE:
        return gated_residual_layer_norm_modulate_reference(x, branch, gate, shift, scale, eps)
    return library(backend).gated_residual_layer_norm_modulate(x, branch, gate, shift, scale, 1.0, eps)


@overload
def gated_residual_layer_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    fp8: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def gated_residual_layer_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, fp8: Literal[True]
) -> tuple[Tensor, RowScaled]: ...
def gated_residual_layer_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, fp8: bool = False
) -> tuple[Tensor, Tensor | RowScaled]:
    """r = x + gate * branch;  h = LayerNorm(r) * weight + bias.  Returns (r, h).

    Without a gate, what stands between the branches of a pre-norm ViT (Dosovitskiy et al. 2021). The kernels are those of
    :func:`gated_residual_layer_norm_modulate`, with one row of modulation for all samples.

    Args:
        x, branch: (B, N, D), float.
        gate: (B, D), or None: r = x + branch.
        weight, bias: (D,).
        fp8: quantize each row of h for an FP8 product. Without gradient.

    Returns: the residual stream (B, N, D) in ``x``'s dtype and the normalized branch input (B, N, D), in ``x``'s dtype or, for
        a float32 ``x`` with a bfloat16 or float16 ``weight``, in that of ``weight`` (so float32 weights keep what follows in
        float32, as in training under autocast, which converts it itself); with ``fp8`` it is :class:`RowScaled` of (B, N, D)
        and (B, N).
    Raises: InputError for shapes that do not belong together.
    """
    _check(x, branch, gate=gate)
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise InputError(f"weight and bias must be ({x.shape[-1]},), got {tuple(weight.shape)} and {tuple(bias.shape)}")
    scale, shift = weight.expand(x.shape[0], -1), bias.expand(x.shape[0], -1)  # (B, D), the batch's stride is 0
    if fp8:
        x, branch, shift, scale = x.detach(), branch.detach(), shift.detach(), scale.detach()
        gate = None if gate is None else gate.detach()
        backend = choose("gated_residual_layer_norm_modulate_fp8", x, branch, gate, shift, scale)
        if backend == REFERENCE:
            residual, hidden = gated_residual_layer_norm_reference(x, branch, gate, weight.detach(), bias.detach(), eps)
            return residual, quantize_rows_reference(hidden)
        fused = library(backend).gated_residual_layer_norm_modulate_fp8
        residual, values, scales = fused(x, branch, gate, shift, scale, 0.0, eps)
        return residual, RowScaled(values, scales)
    backend = choose("gated_residual_layer_norm_modulate", x, branch, gate, shift, scale)
    if backend == REFERENCE:
        return gated_residual_layer_norm_reference(x, branch, gate, weight, bias, eps)
    return library(backend).gated_residual_layer_norm_modulate(x, branch, gate, shift, scale, 0.0, eps)


def _check(x: Tensor, branch: Tensor | None = None, **rows: Tensor | None) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise InputError(f"x must be float (B, N, D), got {describe(x)}")
    if branch is not None and branch.shape != x.shape:
        raise InputError(f"branch must have the shape of x, {tuple(x.shape)}, got {tuple(branch.shape)}")
    for name, row in rows.items():
        if row is not None and (row.shape != (x.shape[0], x.shape[2]) or not row.is_floating_point()):
            raise InputError(f"{name} must be float (B, D) = {(x.shape[0], x.shape[2])}, got {describe(row)}")


# -- choice ------------------------------------------------------------------------------------------------------------------


def _native_rule(x: Tensor, *others: Tensor | None) -> str:
    if not has_native("gated_residual_layer_norm_modulate"):
        return "the native library is not loaded"
    if reason := native_runs_on(x):
        return reason
    given = [tensor for tensor in others if tensor is not None]
    found = {tensor.dtype for tensor in given}
    if x.is_cuda:
        fits, wants = x.dtype in (torch.float32, torch.bfloat16, torch.float16), "float32, bfloat16 or float16, all the same"
        fits = fits and found == {x.dtype}
    else:
        fits = x.dtype in (torch.float32, torch.bfloat16) and found in ({x.dtype}, {torch.bfloat16})
        wants = "float32 or bfloat16, all the same, or x in float32 and all others in bfloat16"
    if not fits:
        return f"on {x.device.type} it takes {wants}, got {describe(x)} with {[str(tensor.dtype) for tensor in given]}"
    return "" if one_device(x, *given) else "the tensors lie on different devices"


def _triton_rule(x: Tensor, *others: Tensor | None) -> str:
    if reason := triton_runs_on(x):
        return reason
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, got {describe(x)}"
    if any(t is not None and torch.promote_types(t.dtype, x.dtype) != x.dtype for t in others):
        return f"x must be of the widest dtype, got {describe(x)} with {[str(t.dtype) for t in others if t is not None]}"
    if x.shape[-1] > 8192:
        return f"a row must fit one program, D <= 8,192, got {x.shape[-1]}"
    return "" if one_device(x, *others) else "the tensors lie on different devices"


def _triton_fp8_rule(x: Tensor, *others: Tensor | None) -> str:
    return _triton_rule(x, *others) or lacks_e4m3(x)


def _on_gpu(x: Tensor, *others: Tensor | None) -> str:
    return "" if x.is_cuda else "interpreted kernels only check numbers"


for _name in ("layer_norm_modulate", "gated_residual_layer_norm_modulate"):
    register(_name, "native", _native_rule)
    register(_name, "triton", _triton_rule, default=_on_gpu)
    register(f"{_name}_fp8", "triton", _triton_fp8_rule, default=_on_gpu)


# -- torch.library -----------------------------------------------------------------------------------------------------------


def normalized_like(x: Tensor, scale: Tensor) -> Tensor:
    """Room for the normalized result, contiguous."""
    return x.new_empty(x.shape, dtype=_normalized_dtype(x, scale))


def _fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return normalized_like(x, scale)


def _fake_fp8(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, scale, ctx.eps = inputs
    ctx.save_for_backward(x, scale)


def _backward(namespace: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    dx, dshift, dscale = namespace.layer_norm_modulate_backward(grad, x, scale, ctx.eps)
    return dx, dshift, dscale, None


def _fake_gated(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, offset: float, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), normalized_like(x, scale)


def _fake_gated_fp8(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, offset: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    values, scales = _fake_fp8(x, shift, scale, eps)
    return x.new_empty(x.shape), values, scales


def _fake_gated_backward(
    grad_residual: Tensor,
    grad: Tensor,
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    offset: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Without a gate the branch's gradient is the residual's, so nothing is written for it.
    dbranch = branch.new_empty((0,) if gate is None else branch.shape)
    dgate = scale.new_empty((0,)) if gate is None else gate.new_empty(gate.shape)
    return residual.new_empty(residual.shape), dbranch, dgate, scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, branch, gate, _, scale, ctx.offset, ctx.eps = inputs
    ctx.branch_dtype = branch.dtype
    # Without a gate the derivative does not read the branch, so it is not kept: the residual stands in its place.
    ctx.save_for_backward(output[0], output[0] if gate is None else branch, gate, scale)


def _backward_gated(namespace: Any, ctx: Any, grad_residual: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    residual, branch, gate, scale = ctx.saved_tensors
    dx, dbranch, dgate, dshift, dscale = namespace.gated_residual_layer_norm_modulate_backward(
        grad_residual, grad, residual, branch, gate, scale, ctx.offset, ctx.eps
    )
    if gate is None:
        return dx, dx.to(ctx.branch_dtype), None, dshift, dscale, None, None
    return dx, dbranch, dgate, dshift, dscale, None, None


define("layer_norm_modulate", "(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor", _fake, _save, _backward)
define(
    "layer_norm_modulate_backward",
    "(Tensor grad, Tensor x, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    save_nothing,
    refuse_second_derivative,
)
define("layer_norm_modulate_fp8", "(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)", _fake_fp8)
define(
    "gated_residual_layer_norm_modulate",
    "(Tensor x, Tensor branch, Tensor? gate, Tensor shift, Tensor scale, float offset, float eps) -> (Tensor, Tensor)",
    _fake_gated,
    _save_gated,
    _backward_gated,
)
define(
    "gated_residual_layer_norm_modulate_backward",
    "(Tensor grad_residual, Tensor grad, Tensor residual, Tensor branch, Tensor? gate, Tensor scale, float offset, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_gated_backward,
    save_nothing,
    refuse_second_derivative,
)
define(
    "gated_residual_layer_norm_modulate_fp8",
    "(Tensor x, Tensor branch, Tensor? gate, Tensor shift, Tensor scale, float offset, float eps) -> (Tensor, Tensor, Tensor)",
    _fake_gated_fp8,
)
