"""The tokenizer's loss terms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from textok_fast.config import LossConfig
from textok_fast.modeling.tokenizer import TexTokOutput


def gradient_loss(reconstruction: Tensor, target: Tensor, scales: int = 3) -> Tensor:
    """Mean l1 distance between horizontal and vertical image gradients at ``scales`` scales, each half the one before.

    A stand-in for a perceptual loss that needs no network: it asks for edges where l2 settles for a blur.
    reconstruction, target: (B, C, H, W) -> scalar.
    """
    total = reconstruction.new_zeros(())
    difference = reconstruction - target  # gradients are linear, so the gradient of the difference is enough
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)  # (B, C, H / 2, W / 2)
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return total / (2 * scales)


def tokenizer_loss(output: TexTokOutput, target: Tensor, weights: LossConfig) -> dict[str, Tensor]:
    """All terms by name, and their weighted sum as "loss". target: (B, 3, S, S) in [-1, 1]. A weight of 0 skips its term."""
    terms: dict[str, Tensor] = {"l2": F.mse_loss(output.reconstruction, target)}
    if weights.gradient:
        terms["gradient"] = gradient_loss(output.reconstruction, target)
    terms.update(output.bottleneck.losses)
    total = torch.zeros((), device=target.device)
    for name, value in terms.items():
        total = total + getattr(weights, name) * value
    return {"loss": total, **terms}
