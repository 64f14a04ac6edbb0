"""What every part of the diffusion package agrees on about tensors: where channels are, and in which precision to compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from textok_fast.errors import InputError

# (x (B, ...), t (B,)) -> output (B, ...); t is the training step for Gaussian diffusion, and in [0, 1] for flow matching.
ModelFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def channel_dim(x: Tensor) -> int:
    """1 for images (B, C, H, W), -1 for tokens (B, N, d); :class:`InputError` for any other number of dimensions."""
    if x.ndim == 4:
        return 1
    if x.ndim == 3:
        return -1
    raise InputError(f"samples must be images (B, C, H, W) or tokens (B, N, d), got shape {tuple(x.shape)}")


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of the schedule's arithmetic: float32, or float64 for float64 samples. bf16 would lose the last steps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_sample_mean(x: Tensor) -> Tensor:
    """(B, ...) -> (B,): the mean over all but the first dimension."""
    return x.flatten(1).mean(1)


def require_same_shape(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}, wanted that of the samples, {tuple(like.shape)}")


def require_times(t: Tensor, batch: int) -> None:
    if t.shape != (batch,):
        raise InputError(f"t has shape {tuple(t.shape)}, wanted one time for each of {batch} samples")
