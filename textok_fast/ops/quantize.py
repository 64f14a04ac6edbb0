"""Nearest-code search for vector quantization. Backends: ``native`` (csrc: CPU), ``triton``, ``reference``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.ops.dispatch import REFERENCE, choose, describe, one_device, register, without_autocast
from textok_fast.ops.library import define, has_native, library, triton_runs_on


def vq_nearest_reference(x: Tensor, codebook: Tensor, normalize: bool = False) -> Tensor:
    """:func:`vq_nearest` in PyTorch: through the whole matrix of distances, in float32 under autocast too."""
    flat = x.reshape(-1, x.shape[-1]).float()  # (M, d)
    codes = codebook.float()
    if normalize:
        flat, codes = F.normalize(flat, dim=-1), F.normalize(codes, dim=-1)
    # |x|^2 is the same for every code and is left out.
    with without_autocast(x):
        distance = codes.square().sum(-1) - 2 * flat @ codes.t()  # (M, K)
    return torch.argmin(distance, dim=-1).reshape(x.shape[:-1])


def vq_nearest(x: Tensor, codebook: Tensor, normalize: bool = False) -> Tensor:
    """argmin_k |x - c_k|^2 (van den Oord et al. 2017); with ``normalize``, of x / |x| and c / |c|.

    Computed as |c|^2 - 2 x.c in float32; the fused backends never have the matrix of distances in memory. Without gradient.

    Args:
        x: (..., d), float.
        codebook: (K, d), float.

    Returns: (...) int64, the lowest index among equally near codes. A distance that is NaN counts as the smallest.
    Raises: InputError for shapes that do not belong together, an empty codebook, and vectors of no numbers.
    """
    if codebook.ndim != 2 or 0 in codebook.shape or x.ndim < 1 or x.shape[-1] != codebook.shape[1]:
        raise InputError(
            f"x must be (..., d) and the codebook (K, d), K and d at least 1, got {tuple(x.shape)} and {tuple(codebook.shape)}"
        )
    backend = choose("vq_nearest", x, codebook, normalize)
    if backend == REFERENCE:
        return vq_nearest_reference(x, codebook, normalize)
    return library(backend).vq_nearest(x, codebook, normalize)


# -- choice ------------------------------------------------------------------------------------------------------------------


def _native_rule(x: Tensor, codebook: Tensor, normalize: bool) -> str:
    if not has_native("vq_nearest"):
        return "the native library is not loaded"
    if not (x.is_cpu and codebook.is_cpu):
        return f"it takes tensors on the CPU, got {describe(x)} and {describe(codebook)}"
    if x.dtype not in (torch.float32, torch.bfloat16) or codebook.dtype != x.dtype:
        return f"it takes float32 or bfloat16, both the same, got {describe(x)} and {describe(codebook)}"
    return ""


def _triton_rule(x: Tensor, codebook: Tensor, normalize: bool) -> str:
    if reason := triton_runs_on(x):
        return reason
    if not x.is_floating_point() or not codebook.is_floating_point() or torch.float64 in (x.dtype, codebook.dtype):
        return f"it takes float32, bfloat16 and float16, got {describe(x)} and {describe(codebook)}"
    if not 0 < x.numel() <= 2**30 or not 0 < codebook.numel() <= 2**30:
        return f"it takes 1 to 2**30 elements, got {describe(x)} and {describe(codebook)}"
    return "" if one_device(x, codebook) else "the tensors lie on different devices"


def _on_gpu(x: Tensor, codebook: Tensor, normalize: bool) -> str:
    return "" if x.is_cuda else "interpreted kernels only check numbers"


register("vq_nearest", "native", _native_rule)
register("vq_nearest", "triton", _triton_rule, default=_on_gpu)


# -- torch.library -----------------------------------------------------------------------------------------------------------


def _fake(x: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


define("vq_nearest", "(Tensor x, Tensor codebook, bool normalize) -> Tensor", _fake)
