"""Scaled dot-product attention over views of packed projections."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, each head by itself (Vaswani et al. 2017).

    Args:
        q: (B, N_q, H, D), float. A strided view, such as a slice of a packed projection, is read in place.
        k, v: (B, N_k, H, D), same dtype.
        mask: (B, N_k) bool, True where a key may be attended to; None for all. A row of only False gives NaN.

    Returns: (B, N_q, H * D), same dtype as ``q``.
    """
    key_mask = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, N_k)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=key_mask)
    return out.transpose(1, 2).flatten(2)  # (B, H, N_q, D) -> (B, N_q, H * D)
