"""Scaled dot-product attention over views of packed projections.

Backends: ``native`` (csrc: CPU), ``triton`` (short sequences), ``flash`` (the flash-attn package, generation 2, 3 or 4, where
it is installed), ``sdpa`` (PyTorch's, which takes everything), ``reference`` (the formula, in float32 or wider). The last is a
definition and slow, so it runs only where it is forced for this operation; exporters and ``use_backend("reference")`` get
``sdpa``.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from textok_fast import _native
from textok_fast.errors import InputError
from textok_fast.ops import dispatch
from textok_fast.ops.dispatch import (
    REFERENCE,
    choose,
    describe,
    needs_gradient,
    one_device,
    register,
    register_backend,
    without_autocast,
)
from textok_fast.ops.library import define, has_native, library, triton_runs_on

MAX_KEYS = 256  # what the Triton kernel takes
MAX_HEAD_DIM = 128
HALVES = (torch.bfloat16, torch.float16)

# What is chosen without being forced. A DiT-XL step over 32 tokens on an H200, bf16, ms with triton and sdpa: 1.07 and 1.23 at
# batch 1, 1.53 and 1.81 at 8, 7.17 and 8.29 at 64 (benchmarks/results/step-choices-h200-2026-11-27.json). Beyond 32 tokens and
# for flash-attn nothing is measured yet: benchmarks/PENDING.md says how. In float32 Triton's exact products do without tensor
# cores, which is no reason to prefer it to torch's.
TRITON_UP_TO = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 0}  # dtype -> keys up to which Triton is chosen
# Keys up to which the CPU's own kernel is chosen, by the native library's kernels. On one and two threads of an AVX-512
# processor it took 0.8 to 0.95 of the time of torch's in float32 from 32 to 4,096 keys, with products of bf16 half of it in
# bfloat16; kept to AVX2 there 0.94 at 32 in float32 and 1.1 at 1,344, to the baseline 1.3.
NATIVE_UP_TO = {"avx512": math.inf, "avx2": 64, "baseline": 0}
NATIVE_KEYS = NATIVE_UP_TO.get(_native.load().info.get("kernels", ""), 0)  # on this machine
FLASH_ORDER = {8: (2,), 9: (3, 4, 2), 10: (4, 2), 11: (4, 2), 12: (2, 4)}  # major compute capability -> flash-attn's generation
FLASH_MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}  # each has flash_attn_func
FLASH_OPERATORS = {2: "flash_attn", 3: "flash_attn_3"}  # torch.ops namespaces of those that torch.compile can trace

# -- reference ---------------------------------------------------------------------------------------------------------------


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """:func:`attention` as its formula, in float32 (float64 for float64), under autocast too."""
    q, k, v, dtype = *(_by_head(part) for part in (q, k, v)), q.dtype  # (B, H, N, D)
    with without_autocast(q):
        out = _weights(q, k, mask) @ v  # (B, H, N_q, D)
    return out.transpose(1, 2).flatten(2).to(dtype)  # (B, N_q, H * D)


def _by_head(x: Tensor) -> Tensor:
    """(B, N, H, D) -> (B, H, N, D), float32 or wider."""
    return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) (B, H, N_q, N_k); zeros for a query without any key, as torch's attention has it."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, N_q, N_k)
    if mask is None:
        return scores.softmax(dim=-1)
    scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    return scores.softmax(dim=-1).masked_fill(~mask.any(dim=1)[:, None, None, None], 0)


# -- public functions --------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, each head by itself (Vaswani et al. 2017).

    Args:
        q: (B, N_q, H, D), float. A strided view, such as a slice of a packed projection, is read in place.
        k, v: (B, N_k, H, D), same dtype.
        mask: (B, N_k) bool, True where a key may be attended to; None for all. A row of only False gives zeros.

    Returns: (B, N_q, H * D), same dtype as ``q``.
    Raises: InputError for shapes or dtypes that do not belong together.
    """
    _check(q, k, v, mask)
    backend = choose("attention", q, k, v, mask)
    if backend == REFERENCE and dispatch.forced().get("attention") != REFERENCE:
        backend = "sdpa"  # what PyTorch has for it: for exporters, and where all operations are to be PyTorch's
    if backend in ("native", "triton"):
        return library(backend).attention(q, k, v, mask)
    if backend == "flash":
        return _flash(q, k, v)
    return _sdpa(q, k, v, mask) if backend == "sdpa" else attention_reference(q, k, v, mask)


def short_attention(qkv: Tensor, heads: int, mask: Tensor | None = None, rows: slice | None = None) -> Tensor:
    """:func:`attention` of a sequence to itself, from its packed projection, which is read in place.

    Args:
        qkv: (B, N, 3, H, D) or (B, N, 3 * H * D), float: queries, keys and values of each row.
        heads: H.
        mask: (B, N) bool, True where a key may be attended to; None for all.
        rows: the queries that are wanted; None for all.

    Returns: (B, N, H * D), or (B, N_rows, H * D), same dtype as ``qkv``.
    Raises: InputError for a ``qkv`` that is not packed so.
    """
    if qkv.ndim == 3 and heads > 0 and qkv.shape[2] % (3 * heads) == 0:
        qkv = qkv.unflatten(-1, (3, heads, qkv.shape[2] // (3 * heads)))  # (B, N, 3, H, D)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[3] != heads:
        raise InputError(f"qkv must be (B, N, 3, {heads}, D) or (B, N, 3 * {heads} * D), got {tuple(qkv.shape)}")
    if rows is not None and not isinstance(rows, slice):
        raise InputError(f"rows must be a slice of the queries, got {rows!r}")
    q, k, v = qkv.unbind(2)  # each (B, N, H, D)
    return attention(q if rows is None else q[:, rows], k, v, mask)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if q.ndim != 4:
        raise InputError(f"q must be (B, N_q, H, D), got {tuple(q.shape)}")
    if k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:] or v.shape != k.shape:
        wanted = f"({q.shape[0]}, N_k, {q.shape[2]}, {q.shape[3]})"
        raise InputError(f"k and v must be {wanted} like q, got {tuple(k.shape)} and {tuple(v.shape)}")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise InputError(f"q, k and v must be of one float dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != k.shape[:2]):
        raise InputError(f"mask must be bool {tuple(k.shape[:2])}, one for each key, got {mask.dtype} {tuple(mask.shape)}")


# -- torch's and the flash-attn package's ------------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    key_mask = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, N_k)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=key_mask)
    return out.transpose(1, 2).flatten(2)  # (B, H, N_q, D) -> (B, N_q, H * D)


_flash_functions: dict[int, Callable[..., Any]] = {}  # generation -> its flash_attn_func
_flash_generations: dict[int, int] = {}  # device -> generation


def load_flash() -> str:
    """Loader of the backend "flash". Only looks for the package: it takes seconds to import, and may start CUDA."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    names = {name.partition(".")[0] for name in FLASH_MODULES.values()}
    return "" if any(map(importlib.util.find_spec, names)) else "flash-attn is not installed"


@torch.compiler.assume_constant_result
def flash_generation(device: int) -> int:
    """The generation of flash-attn that runs on a GPU: the first of ``FLASH_ORDER`` that can be imported; 0 for none."""
    if device not in _flash_generations:
        order = FLASH_ORDER.get(torch.cuda.get_device_capability(device)[0], ())
        _flash_generations[device] = next(filter(_import_flash, order), 0)
    return _flash_generations[device]


def _import_flash(generation: int) -> bool:
    if generation not in _flash_functions:
        try:
            # Generation 4 alone leaves a package flash_attn that is empty but for its cute.
            _flash_functions[generation] = importlib.import_module(FLASH_MODULES[generation]).flash_attn_func
        except Exception as error:  # one built for another torch fails with whatever its libraries raise
            dispatch.logger.info("operations: no flash-attn %d here (%s)", generation, error)
            return False
    return True


@torch.compiler.assume_constant_result
def flash_compiles(generation: int) -> bool:
    """Whether torch.compile can trace it: 4 never, 2 and 3 since they register their kernels with torch.library."""
    return generation in FLASH_OPERATORS and hasattr(getattr(torch.ops, FLASH_OPERATORS[generation]), "_flash_attn_forward")


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # All take (B, N, H, D), scale by 1 / sqrt(D), and return that or a tuple that begins with it.
    out = _flash_functions[flash_generation(q.device.index)](q, k, v)
    return (out[0] if isinstance(out, tuple) else out).flatten(2)  # (B, N_q, H * D)


# -- choice ------------------------------------------------------------------------------------------------------------------


def _native_rule(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    if not has_native("attention"):
        return "the native library is not loaded, or of an older build"
    if not (q.is_cpu and one_device(q, k, v, mask)):
        return f"it takes tensors on the CPU, got {describe(q)}"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, got {describe(q)}"
    return "" if k.shape[1] and q.shape[3] else f"it takes at least one key of at least one channel, got {tuple(k.shape)}"


def _native_default(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    if needs_gradient(q, k, v):
        return "its backward pass is plain matrix products"
    return "" if k.shape[1] <= NATIVE_KEYS else "torch's is faster for so many keys"


def _triton_rule(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    if reason := triton_runs_on(q):
        return reason
    if q.dtype not in TRITON_UP_TO:
        return f"it takes float32, bfloat16 and float16, got {describe(q)}"
    if not 1 <= k.shape[1] <= MAX_KEYS or not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        return f"it takes up to {MAX_KEYS} keys of up to {MAX_HEAD_DIM} channels, got {tuple(k.shape)}"
    return "" if one_device(q, k, v, mask) else "the tensors lie on different devices"


def _triton_default(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    if not q.is_cuda:
        return "interpreted kernels only check numbers"
    if needs_gradient(q, k, v):
        return "its backward pass is plain matrix products"
    return "" if k.shape[1] <= TRITON_UP_TO[q.dtype] else "others are faster"


def _flash_rule(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    if not q.is_cuda or q.dtype not in HALVES:
        return f"it takes cuda bfloat16 and float16, got {describe(q)}"
    if mask is not None:
        return "it takes no key mask"
    if q.shape[3] % 8 or not 8 <= q.shape[3] <= MAX_HEAD_DIM:
        return f"it takes heads of 8 to {MAX_HEAD_DIM} channels, a multiple of 8, got {q.shape[3]}"
    if not one_device(q, k, v):
        return "the tensors lie on different devices"
    generation = flash_generation(q.device.index)
    if generation == 0:
        return "no flash-attn that is installed runs on this GPU"
    if torch.compiler.is_compiling() and not flash_compiles(generation):
        return f"torch.compile does not trace flash-attn {generation} as installed"
    return ""


register_backend("flash", load_flash)
register("attention", "native", _native_rule, default=_native_default)
register("attention", "triton", _triton_rule, default=_triton_default)
register("attention", "flash", _flash_rule)
register("attention", "sdpa", lambda *args: "")
for _backend in ("flash", "sdpa"):
    dispatch.load_backend(_backend)


# -- torch.library -----------------------------------------------------------------------------------------------------------


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(namespace: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With P = softmax(S), S = q k^T / sqrt(D): dv = P^T do, dS = P * (dP - sum_k P * dP), dP = do v^T."""
    q, k, v, mask = ctx.saved_tensors
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    grad = _by_head(grad.unflatten(-1, q.shape[2:]))  # (B, H, N_q, D)
    q, k, v = (_by_head(part) for part in (q, k, v))  # (B, H, N, D)
    with without_autocast(q):
        weights = _weights(q, k, mask)  # (B, H, N_q, N_k)
        dweights = grad @ v.transpose(-1, -2)
        dscores = weights * (dweights - (dweights * weights).sum(dim=-1, keepdim=True)) * scale
        gradients = dscores @ k, dscores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad
    dq, dk, dv = (gradient.transpose(1, 2).to(dtype) for gradient in gradients)  # (B, N, H, D)
    return dq, dk, dv, None


define("attention", "(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor", _fake, _save, _backward)
