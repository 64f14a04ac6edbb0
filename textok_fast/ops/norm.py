"""LayerNorm joined to the modulation around it (adaLN, Peebles & Xie 2023)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, the norm without weight or bias.

    Args:
        x: (B, N, D), float.
        shift, scale: (B, D), one row a sample.

    Returns: (B, N, D), same dtype as ``x``.
    """
    normalized = F.layer_norm(x, (x.shape[-1],), eps=eps)
    return normalized * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gated_residual_layer_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """r = x + gate * branch;  h = LayerNorm(r) * (1 + scale) + shift.  Returns (r, h).

    Args:
        x, branch: (B, N, D), float.
        gate, shift, scale: (B, D), one row a sample.

    Returns: the residual stream (B, N, D) and the normalized branch input (B, N, D).
    """
    residual = x + gate.unsqueeze(1) * branch
    return residual, layer_norm_modulate(residual, shift, scale, eps)
