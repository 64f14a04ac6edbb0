"""Tensors in FP8 e4m3 with one float32 scale a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

E4M3_MAX = 448.0  # largest finite float8_e4m3fn


class RowScaled(NamedTuple):
    """``values.float() * scales.unsqueeze(-1)`` is what is meant.

    ``values`` (..., D) float8_e4m3fn; ``scales`` (...) float32, the row's largest magnitude / 448, and 1 for a row of zeros.
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
    largest = x.abs().amax(dim=-1)  # (...)
    scales = torch.where(largest > 0, largest / E4M3_MAX, torch.where(largest == 0, 1.0, largest))  # NaN stays NaN
    values = (x / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return RowScaled(values, scales)
