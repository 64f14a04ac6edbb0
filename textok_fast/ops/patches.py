"""Pictures to flat patches and back."""

from __future__ import annotations

from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts (B, C, H, W) into (B, H/p * W/p, C * p * p) patches, row by row.

    Inside a patch the order is channel, row, column: the order of a convolution's weight (Dosovitskiy et al. 2021), so that
    a patch-embedding convolution and a linear layer share their weights.
    """
    b, c, height, width = images.shape
    p = patch_size
    blocks = images.reshape(b, c, height // p, p, width // p, p)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(b, (height // p) * (width // p), c * p * p)


def unpatchify(patches: Tensor, patch_size: int, channels: int = 3) -> Tensor:
    """The inverse of :func:`patchify` for square pictures: (B, G * G, C * p * p) -> (B, C, G * p, G * p)."""
    b, count, _ = patches.shape
    grid, p = round(count**0.5), patch_size
    blocks = patches.reshape(b, grid, grid, channels, p, p)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(b, channels, grid * p, grid * p)
