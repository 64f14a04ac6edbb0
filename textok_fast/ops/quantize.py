"""Nearest-code search for vector quantization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def vq_nearest(x: Tensor, codebook: Tensor, normalize: bool = False) -> Tensor:
    """argmin_k |x - c_k|^2 (van den Oord et al. 2017); with ``normalize``, of x / |x| and c / |c|.

    Args:
        x: (..., d), float.
        codebook: (K, d), float.

    Returns: (...) int64, the lowest index among equally near codes.
    """
    flat = x.reshape(-1, x.shape[-1]).float()  # (M, d)
    codes = codebook.float()
    if normalize:
        flat, codes = F.normalize(flat, dim=-1), F.normalize(codes, dim=-1)
    # |x|^2 is the same for every code and is left out.
    distance = codes.square().sum(-1) - 2 * flat @ codes.t()  # (M, K)
    return torch.argmin(distance, dim=-1).reshape(x.shape[:-1])
