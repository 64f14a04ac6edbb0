"""A DiT block as one operation, for inference: on a CPU with packed weights, on a GPU with few rows in bfloat16.

Backends: ``native`` (csrc), ``reference`` (the operations that it is made of, one after the other). On a CPU, calling these
from Python one by one is a noticeable part of a step with few tokens. On a GPU of compute capability 9.0 or later they are
kernels of their own (csrc/cuda/few_rows.h) whose launches overlap: each reads its weights while the one before computes.
``TEXTOK_OVERLAP=0`` launches them one after the other, ``TEXTOK_WARPGROUPS=0`` multiplies without Hopper's own instructions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.ops import dispatch
from textok_fast.ops.attention import NATIVE_KEYS, short_attention
from textok_fast.ops.dispatch import REFERENCE, choose, describe, needs_gradient, one_device, register
from textok_fast.ops.library import define, has_native, library, native_runs_on
from textok_fast.ops.norm import gated_residual_layer_norm_modulate
from textok_fast.ops.packed import ACTIVATIONS, PRECISIONS, PackedWeight, packed_linear

# Of the GPU's kernels: tokens a sample and numbers a head of the attention, D of the LayerNorm, rows of the products.
MAX_TOKENS, MAX_HEAD, MAX_WIDTH, MAX_ROWS = 64, 96, 2048, 256
EPS = 1e-6  # of a DiT's LayerNorms


class PackedBlock(NamedTuple):
    """The weights of a DiT block, each from :func:`textok_fast.ops.pack_linear`, and what shapes do not tell.

    On a GPU they are packed for ``reference``, which leaves them as ``nn.Linear`` has them, and nothing that is queued on the
    stream may still be writing to them: kernels read weights ahead.
    """

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

    Returns: y (B, N, D) in ``x``'s dtype and h (B, N, D) in that of ``hidden``; on a CPU to the bit what the native operations
        give one after the other, on a GPU with the branches added before they are rounded.
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
    if any(backend != "native" for name, backend in dispatch.forced().items() if name != "packed_block"):
        return "an operation inside of it may be forced to another backend"
    if block.mlp_eps != EPS:
        return f"its LayerNorms have epsilon {EPS}, the one before fc1 was to have {block.mlp_eps}"
    if x.is_cuda:
        return _cuda_rule(block, x, hidden, modulation, shift, scale)
    if any(each.backend != "native" or each.bias is None for each in block.weights):
        return "it takes weights packed by the native library, with biases"
    if len({each.precision for each in block.weights}) > 1 or block.activation not in ACTIVATIONS:
        return "its weights must be of one precision"
    if not x.is_cpu or x.dtype not in (torch.float32, hidden.dtype) or hidden.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16 on the CPU, got {describe(x)} and {describe(hidden)}"
    if any(tensor.dtype != hidden.dtype for tensor in (modulation, shift, scale)):
        return f"modulation, shift and scale must be of hidden's dtype, {hidden.dtype}"
    return "" if x.shape[1] else "it takes at least one token"


def _cuda_rule(block: PackedBlock, x: Tensor, hidden: Tensor, modulation: Tensor, shift: Tensor, scale: Tensor) -> str:
    if not has_native("few_rows_linear"):
        return "the native library is of an older build"
    if reason := native_runs_on(x):
        return reason
    if torch.cuda.get_device_properties(x.device).major < 9:
        return "it needs thread block clusters, which GPUs have from compute capability 9.0 on"
    if any(each.backend != REFERENCE or each.precision != "bf16" or each.bias is None for each in block.weights):
        return "on a GPU it takes bfloat16 weights packed for 'reference', with biases"
    if block.activation not in ACTIVATIONS:
        return f"it knows the activations {', '.join(ACTIVATIONS)}"
    tables = {"modulation": modulation, "shift": shift, "scale": scale}
    if hidden.dtype != torch.bfloat16 or x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes bfloat16 beside a float32 or bfloat16 x, got {describe(hidden)} and {describe(x)}"
    if any(tensor.dtype != torch.bfloat16 for tensor in tables.values()):
        return "modulation, shift and scale must be bfloat16"
    if not one_device(x, hidden, *tables.values(), *(tensor for each in block.weights for tensor in (each.weight, each.bias))):
        return "the tensors lie on different devices"
    batch, tokens, width = x.shape
    inner, head = block.fc1.out_features, width // block.heads
    if not 0 < tokens <= MAX_TOKENS or batch == 0:
        return f"it takes 1 to {MAX_TOKENS} tokens, got {tokens}"
    if batch * tokens > MAX_ROWS:
        return f"above {MAX_ROWS} rows it would read the weights several times, got {batch * tokens}"
    if width % 32 or inner % 32 or width > MAX_WIDTH or head % 8 or head > MAX_HEAD:
        return f"it takes D and hidden of multiples of 32, D <= {MAX_WIDTH}, D / heads a multiple of 8 <= {MAX_HEAD}"
    if not x.is_contiguous() or not hidden.is_contiguous() or any(tensor.stride(1) != 1 for tensor in tables.values()):
        return "x and hidden must be contiguous, and the numbers of a modulation side by side"
    aligned = all((batch == 1 or tensor.stride(0) % 4 == 0) and tensor.storage_offset() % 4 == 0 for tensor in tables.values())
    return "" if aligned else "rows of modulation, shift and scale must be of 8-byte alignment"


def _native_default(block: PackedBlock, x: Tensor, *_: Tensor) -> str:
    if x.is_cuda:
        # A block of DiT-XL over 64 rows on an H200: 35.8 us against 36.3 us of its parts, a guided step 1.04 ms against 1.08
        # (benchmarks/results/few-rows-h200-2026-11-27.json): too little to take over for, before its tiles are chosen anew.
        return "its parts are as fast: force it with ops={'packed_block': 'native'}"
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


# What the block is made of on a GPU, one by one, to be measured and tested: benchmarks/few_rows.py, tests/ops/test_few_rows.py.
# ``overlap``: the kernel may start before the one ahead has ended. ``columns`` of a tile, blocks of a ``cluster``, ``splits``
# of the sum: 0 for what the kernel's plan says. ``warpgroups``: four warps multiply together, on Hopper. ``partial``: the sum's
# parts, without a bias.


def _fake_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    partial: bool,
    columns: int,
    cluster: int,
    splits: int,
    warpgroups: bool,
    overlap: bool,
) -> Tensor:
    if partial and not splits:
        raise NotImplementedError("how many parts there are depends on the GPU: give splits")
    shape = (len(x), weight.shape[0])
    return x.new_empty((splits, *shape), dtype=torch.float32) if partial else x.new_empty(shape)


def _fake_attention(qkv: Tensor, heads: int, overlap: bool) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


def _fake_norm(
    x: Tensor, partial: Tensor, bias: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, overlap: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(x.shape)


define(
    "few_rows_linear",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, bool partial, int columns, int cluster, int splits, "
    "bool warpgroups, bool overlap) -> Tensor",
    _fake_linear,
)
define("few_rows_attention", "(Tensor qkv, int heads, bool overlap) -> Tensor", _fake_attention)
define(
    "few_rows_norm",
    "(Tensor x, Tensor partial, Tensor bias, Tensor gate, Tensor shift, Tensor scale, float eps, bool overlap) "
    "-> (Tensor, Tensor)",
    _fake_norm,
)
