"""Pictures to flat patches and back.

:func:`patchify` and :func:`unpatchify` are views and copies of PyTorch. :func:`patchify_uint8` and :func:`unpatchify_uint8`
join them to the change between bytes and numbers in [-1, 1]: one pass over the picture, nothing else in memory.
Backends: ``native`` (csrc: CPU), ``triton``, ``reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.ops.dispatch import REFERENCE, choose, describe, register
from textok_fast.ops.library import define, has_native, library, triton_runs_on

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels; the references also take float64


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts (B, C, H, W) into (B, H/p * W/p, C * p * p) patches, row by row.

    Inside a patch the order is channel, row, column: the order of a convolution's weight (Dosovitskiy et al. 2021), so that
    a patch-embedding convolution and a linear layer share their weights.
    """
    b, c, height, width = images.shape
    p = patch_size
    if height % p or width % p:
        raise InputError(f"pictures must be a multiple of the patch size {p} high and wide, got {height} x {width}")
    blocks = images.reshape(b, c, height // p, p, width // p, p)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(b, (height // p) * (width // p), c * p * p)


def unpatchify(patches: Tensor, patch_size: int, channels: int = 3) -> Tensor:
    """The inverse of :func:`patchify` for square pictures: (B, G * G, C * p * p) -> (B, C, G * p, G * p)."""
    b, count, numbers = patches.shape
    grid, p = round(count**0.5), patch_size
    if grid * grid != count or numbers != channels * p * p:
        raise InputError(f"patches must be (B, G * G, {channels} * {p} * {p}), got {tuple(patches.shape)}")
    blocks = patches.reshape(b, grid, grid, channels, p, p)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(b, channels, grid * p, grid * p)


# -- references --------------------------------------------------------------------------------------------------------------


def patchify_uint8_reference(images: Tensor, patch_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """:func:`patchify_uint8` in PyTorch."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    # By a tensor: by a number torch multiplies on CUDA with its reciprocal, which rounds otherwise.
    values = images.to(work) / torch.full((), 127.5, dtype=work, device=images.device) - 1
    return patchify(values.permute(0, 3, 1, 2), patch_size).to(dtype)  # (B, H/p * W/p, 3 p p)


def unpatchify_uint8_reference(patches: Tensor, patch_size: int, rows: int | None = None) -> Tensor:
    """:func:`unpatchify_uint8` in PyTorch."""
    b, count, _ = patches.shape
    p = patch_size
    rows = round(count**0.5) if rows is None else rows
    work = torch.float64 if patches.dtype == torch.float64 else torch.float32
    levels = ((patches.to(work) + 1) * 127.5).round().clamp(0, 255)  # torch rounds halves to even
    levels = torch.where(levels.isnan(), 0, levels).to(torch.uint8)  # (B, R * G, 3 p p); a NaN has no byte
    blocks = levels.reshape(b, rows, count // rows, 3, p, p)
    return blocks.permute(0, 1, 4, 2, 5, 3).reshape(b, rows * p, count // rows * p, 3)


# -- public functions --------------------------------------------------------------------------------------------------------


def patchify_uint8(images: Tensor, patch_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """x / 127.5 - 1 of a picture's bytes, cut into patches as :func:`patchify` cuts them.

    Args:
        images: (B, H, W, 3) uint8, any strides: also a permuted (B, 3, H, W), or a crop.
        patch_size: p, which divides H and W.
        dtype: of the result; computed in float32 (float64 for float64).

    Returns: (B, H/p * W/p, 3 * p * p), contiguous; inside a patch channel, row, column.
    Raises: InputError for another dtype or shape, or sides that p does not divide.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(f"images must be uint8 (B, H, W, 3), got {describe(images)}")
    if patch_size < 1 or images.shape[1] % patch_size or images.shape[2] % patch_size:
        raise InputError(f"pictures of {images.shape[1]} x {images.shape[2]} cannot be cut into patches of {patch_size}")
    if not dtype.is_floating_point:
        raise InputError(f"dtype must be a float type, got {dtype}")
    backend = choose("patchify_uint8", images, patch_size, dtype)
    if backend == REFERENCE:
        return patchify_uint8_reference(images, patch_size, dtype)
    return library(backend).patchify_uint8(images, patch_size, dtype)


def unpatchify_uint8(patches: Tensor, patch_size: int, rows: int | None = None) -> Tensor:
    """(x + 1) * 127.5 of patches, rounded half to even and clamped to bytes, put together to pictures.

    The inverse of :func:`patchify_uint8`. A NaN becomes 0. Without gradient.

    Args:
        patches: (B, R * G, 3 * p * p) float, as :func:`patchify` lists them; computed in float32 (float64 for float64).
        patch_size: p.
        rows: R, how many patches are below each other; None for square pictures.

    Returns: (B, R * p, G * p, 3) uint8, contiguous.
    Raises: InputError for patches of another size, or a number of them that does not fill ``rows`` rows.
    """
    if patches.ndim != 3 or patch_size < 1 or patches.shape[-1] != 3 * patch_size**2 or not patches.is_floating_point():
        wanted = f"float (B, N, {3 * patch_size**2}) for patches of {patch_size}"
        raise InputError(f"patches must be {wanted}, got {describe(patches)}")
    count = patches.shape[1]
    if rows is None:
        rows = round(count**0.5)
        if rows * rows != count:
            raise InputError(f"{count} patches are no square; give rows")
    if rows < 1 or count % rows:
        raise InputError(f"{count} patches do not fill {rows} rows")
    backend = choose("unpatchify_uint8", patches, patch_size, rows)
    if backend == REFERENCE:
        return unpatchify_uint8_reference(patches, patch_size, rows)
    return library(backend).unpatchify_uint8(patches, patch_size, rows)


# -- choice ------------------------------------------------------------------------------------------------------------------


def _native_rule(tensor: Tensor, dtype: torch.dtype) -> str:
    if not has_native("patchify_uint8"):
        return "the native library is not loaded"
    if not tensor.is_cpu:
        return f"no native code for {tensor.device.type}"
    return "" if dtype in FLOAT_DTYPES else f"it takes float32, bfloat16 and float16, got {dtype}"


def _triton_rule(tensor: Tensor, dtype: torch.dtype) -> str:
    if reason := triton_runs_on(tensor):
        return reason
    if dtype not in FLOAT_DTYPES:
        return f"it takes float32, bfloat16 and float16, got {dtype}"
    return "" if 0 < tensor.numel() <= 2**30 else f"it takes 1 to 2**30 elements, got {tensor.numel()}"


def _on_gpu(tensor: Tensor, *others: object) -> str:
    return "" if tensor.is_cuda else "interpreted kernels only check numbers"


register("patchify_uint8", "native", lambda images, patch_size, dtype: _native_rule(images, dtype))
register("patchify_uint8", "triton", lambda images, patch_size, dtype: _triton_rule(images, dtype), default=_on_gpu)
register("unpatchify_uint8", "native", lambda patches, patch_size, rows: _native_rule(patches, patches.dtype))
register("unpatchify_uint8", "triton", lambda patches, patch_size, rows: _triton_rule(patches, patches.dtype), default=_on_gpu)


# -- torch.library -----------------------------------------------------------------------------------------------------------


def _fake_patchify(images: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    count = (images.shape[1] // patch_size) * (images.shape[2] // patch_size)
    return images.new_empty((images.shape[0], count, 3 * patch_size**2), dtype=dtype)


def _fake_unpatchify(patches: Tensor, patch_size: int, rows: int) -> Tensor:
    shape = (patches.shape[0], rows * patch_size, patches.shape[1] // rows * patch_size, 3)
    return patches.new_empty(shape, dtype=torch.uint8)


define("patchify_uint8", "(Tensor images, int patch_size, ScalarType dtype) -> Tensor", _fake_patchify)
define("unpatchify_uint8", "(Tensor patches, int patch_size, int rows) -> Tensor", _fake_unpatchify)
