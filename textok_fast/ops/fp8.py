"""Tensors in FP8 e4m3 with one float32 scale a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.ops.dispatch import REFERENCE, choose, describe, register
from textok_fast.ops.library import define, interpreting, library

E4M3_MAX = 448.0  # largest finite float8_e4m3fn
MAX_COLUMNS = 16384  # a row must fit one Triton program


class RowScaled(NamedTuple):
    """``values.float() * scales.unsqueeze(-1)`` is what is meant.

    ``values`` (..., D) float8_e4m3fn; ``scales`` (...) float32, the row's largest magnitude / 448, and 1 where
    that is zero: for a row of zeros, and of numbers below 3e-43, which become zeros.
    """

    values: Tensor
    scales: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., D) in ``dtype``."""
        return (self.values.float() * self.scales.unsqueeze(-1)).to(dtype)


def quantize_rows_reference(x: Tensor) -> RowScaled:
    """x (..., D) float -> values round(x / scale) to e4m3, nearest even, with scale = max |x| / 448 of each row, in float32.

    A row with a NaN or an infinity gets that as its scale: no value in it is finite again, as in the unquantized row.
    """
    x = x.float()
    # By a tensor: by a number torch multiplies on CUDA with its reciprocal, which rounds otherwise.
    scales = x.abs().amax(dim=-1) / torch.full((), E4M3_MAX, device=x.device)  # (...)
    scales = torch.where(scales == 0, 1.0, scales)  # NaN stays NaN; a quotient below the smallest float32 is zero too
    values = (x / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return RowScaled(values, scales)


# -- public functions --------------------------------------------------------------------------------------------------------


def quantize_rows(x: Tensor) -> RowScaled:
    """Activations for an FP8 product: each row divided by its largest magnitude / 448 and rounded to e4m3. Without gradient.

    Args:
        x: (..., D), float. Rows may lie anywhere, a row's numbers next to each other.

    Returns: values (..., D) and scales (...), to the bit those of :func:`quantize_rows_reference`.
    Raises: InputError when x is not a float tensor of at least one dimension.
    """
    if not x.ndim or not x.shape[-1] or not x.is_floating_point():
        raise InputError(f"quantize_rows takes a float tensor (..., D), got {describe(x)}")
    x = x.detach()
    backend = choose("quantize_rows", x)
    if backend == REFERENCE:
        return quantize_rows_reference(x)
    return RowScaled(*library(backend).quantize_rows(x))


def quantize_channels(weight: Tensor) -> RowScaled:
    """A linear layer's weight for an FP8 product, one scale an output channel: :func:`quantize_rows` of (out, in).

    Returns: values (out, in), scales (out,).
    Raises: InputError when the weight is not a float matrix.
    """
    if weight.ndim != 2:
        raise InputError(f"weight must be (out, in), got {tuple(weight.shape)}")
    return quantize_rows(weight)


# -- choice ------------------------------------------------------------------------------------------------------------------


def lacks_e4m3(x: Tensor) -> str:
    """Why kernels on the device of ``x`` cannot convert to and multiply e4m3, or "". Triton's interpreter can."""
    if x.is_cpu and interpreting():
        return ""
    if not x.is_cuda:
        return f"no FP8 kernels on {x.device.type}"
    # torch.compile folds this call into a constant, and not get_device_capability.
    properties = torch.cuda.get_device_properties(x.device)
    capability = (properties.major, properties.minor)
    return "" if capability >= (8, 9) else f"FP8 needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"


def _triton_rule(x: Tensor) -> str:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, got {describe(x)}"
    if x.shape[-1] > MAX_COLUMNS:
        return f"a row must fit one program, D <= {MAX_COLUMNS:,}, got {x.shape[-1]}"
    return lacks_e4m3(x)


def _on_gpu(x: Tensor) -> str:
    return "" if x.is_cuda else "interpreted kernels only check numbers"


register("quantize_rows", "triton", _triton_rule, default=_on_gpu)


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


define("quantize_rows", "(Tensor x) -> (Tensor, Tensor)", _fake)
