"""A DiT block with packed weights as one operation, for inference on a CPU.

Backends: ``native`` (csrc), ``reference`` (the operations that it is made of, one after the other). With few tokens, calling
these from Python one by one is a noticeable part of a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.ops import dispatch
from textok_fast.ops.attention import NATIVE_KEYS, short_attention
from textok_fast.ops.dispatch import REFERENCE, choose, describe, needs_gradient, register
from textok_fast.ops.library import define, has_native, library
from textok_fast.ops.norm import gated_residual_layer_norm_modulate
from textok_fast.ops.packed import ACTIVATIONS, PRECISIONS, PackedWeight, packed_linear

EPS = 1e-6  # of a DiT's LayerNorms


class PackedBlock(NamedTuple):
    """The weights of a DiT block, each from :func:`textok_fast.ops.pack_linear`, and what shapes do not tell."""

    qkv: PackedWeight  # D -> 3 D
    proj: PackedWeight  # D -> D
    fc1: PackedWeight  # D -> hidden
    fc2: PackedWeight  # hidden -> D
    heads: int
    activation: str  # between fc1 and fc2: "gelu" or "gelu_tanh"
    mlp_eps: float = EPS  # of the LayerNorm before fc1

    @property
    def weights(self) -> tuple[PackedWeight, PackedWeight, PackedWeight, PackedWeight]:
        return self.qkv, self.proj, self.fc1, self.fc2


def packed_block_reference(
    block: PackedBlock, x: Tensor, hidden: Tensor, modulation: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`packed_block` by its parts, each with the backend that is chosen for it."""
    _, _, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)  # each (B, D)
    attended = short_attention(packed_linear(hidden, block.qkv), block.heads)  # (B, N, D)
    x, inner = gated_residual_layer_norm_modulate(x, packed_linear(attended, block.proj), gate1, shift2, scale2, block.mlp_eps)
    branch = packed_linear(packed_linear(inner, block.fc1, block.activation), block.fc2)  # (B, N, D)
    return gated_residual_layer_norm_modulate(x, branch, gate2, shift, scale, EPS)


def packed_block(
    block: PackedBlock, x: Tensor, hidden: Tensor, modulation: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """A DiT block (Peebles & Xie 2023) from one modulated LayerNorm to the next. Without gradient.

        r = x + gate1 proj(attention(qkv(hidden)));  m = LayerNorm(r) (1 + scale2) + shift2
        y = r + gate2 fc2(activation(fc1(m)));       h = LayerNorm(y) (1 + scale) + shift

    Args:
        x: residual stream (B, N, D), float32 or the dtype of ``hidden``.
        hidden: its LayerNorm, already modulated with this block's first shift and scale, (B, N, D).
        modulation: (B, 6 D), rows at any stride: shift1, scale1, gate1, shift2, scale2, gate2.
        shift, scale: (B, D), of what comes next.

    Returns: y (B, N, D) in ``x``'s dtype and h (B, N, D) in that of ``hidden``, to the bit what the native operations give one
        after the other.
    Raises: InputError for shapes that do not belong together, and where a gradient is wanted.
    """
    width = block.qkv.in_features
    if x.ndim != 3 or x.shape[2] != width or hidden.shape != x.shape:
        raise InputError(f"x and hidden must be (B, N, {width}), got {tuple(x.shape)} and {tuple(hidden.shape)}")
    for name, tensor, columns in (("modulation", modulation, 6 * width), ("shift", shift, width), ("scale", scale, width)):
        if tensor.shape != (len(x), columns):
            raise InputError(f"{name} must be ({len(x)}, {columns}), got {tuple(tensor.shape)}")
    if needs_gradient(x, hidden, modulation, shift, scale):
        raise InputError("packed weights have no gradient; call them under torch.no_grad()")
    if choose("packed_block", block, x, hidden, modulation, shift, scale) == REFERENCE:
        return packed_block_reference(block, x, hidden, modulation, shift, scale)
    given = [tensor for each in block.weights for tensor in (each.weight, each.bias, each.scales) if tensor is not None]
    kind = PRECISIONS.index(block.qkv.precision)
    return library("native").packed_block(x, hidden, modulation, shift, scale, given, block.heads, kind, block.activation, EPS)


# -- choice ------------------------------------------------------------------------------------------------------------------


def _native_rule(block: PackedBlock, x: Tensor, hidden: Tensor, modulation: Tensor, shift: Tensor, scale: Tensor) -> str:
    if not has_native("packed_block"):
        return "the native library is not loaded, or of an older build"
    if any(each.backend != "native" or each.bias is None for each in block.weights):
        return "it takes weights packed by the native library, with biases"
    if len({each.precision for each in block.weights}) > 1 or block.activation not in ACTIVATIONS:
        return "its weights must be of one precision"
    if block.mlp_eps != EPS:
        return f"its LayerNorms have epsilon {EPS}, the one before fc1 was to have {block.mlp_eps}"
    if any(backend != "native" for name, backend in dispatch.forced().items() if name != "packed_block"):
        return "an operation inside of it may be forced to another backend"
    if not x.is_cpu or x.dtype not in (torch.float32, hidden.dtype) or hidden.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16 on the CPU, got {describe(x)} and {describe(hidden)}"
    if any(tensor.dtype != hidden.dtype for tensor in (modulation, shift, scale)):
        return f"modulation, shift and scale must be of hidden's dtype, {hidden.dtype}"
    return "" if x.shape[1] else "it takes at least one token"


def _native_default(block: PackedBlock, x: Tensor, *_: Tensor) -> str:
    return "" if x.shape[1] <= NATIVE_KEYS else "torch's attention is faster for so many tokens"


register("packed_block", "native", _native_rule, _native_default)


# -- torch.library -----------------------------------------------------------------------------------------------------------


def _fake(
    x: Tensor,
    hidden: Tensor,
    modulation: Tensor,
    shift: Tensor,
    scale: Tensor,
    weights: list[Tensor],
    heads: int,
    kind: int,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), hidden.new_empty(x.shape)


define(
    "packed_block",
    "(Tensor x, Tensor hidden, Tensor modulation, Tensor shift, Tensor scale, Tensor[] weights, int heads, int kind, "
    "str activation, float eps) -> (Tensor, Tensor)",
    _fake,
)
