"""Classifier-free guidance (arXiv 2207.12598), optionally on an interval of times only (arXiv 2404.07724)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from textok_fast.diffusion.tensors import ModelFn, channel_dim
from textok_fast.errors import InputError

Condition = TypeVar("Condition")

TIME_TOLERANCE = 1e-9  # of an interval's ends: times on a grid are rounded, 0.3 of ten steps is 0.30000000000000004


def interval_bounds(interval: tuple[float, float]) -> tuple[float, float]:
    """The ends of an inclusive guidance interval as times are compared with them, a little wider.

    Raises: InputError where no time is inside.
    """
    low, high = interval
    if not low <= high:
        raise InputError(f"a guidance interval is (low, high) with low <= high, got {interval}")
    return low - TIME_TOLERANCE, high + TIME_TOLERANCE


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """unconditional + scale (conditional - unconditional), of their shape: (B, C, H, W) or (B, N, d).

    Only the first ``channels`` channels are guided, ``None`` means all of them; the others, such as those of a learned
    variance, are the conditional ones. ``channels=3`` is what DiT published for its 4-channel latents.
    """
    if conditional.shape != unconditional.shape:
        raise InputError(
            f"conditional and unconditional outputs differ in shape: {tuple(conditional.shape)}, {tuple(unconditional.shape)}"
        )
    dim = channel_dim(conditional)
    total = conditional.shape[dim]
    if channels is None or channels == total:
        return unconditional + scale * (conditional - unconditional)  # (B, ...)
    if not 0 < channels < total:
        raise InputError(f"cannot guide the first {channels} of {total} channels")
    c, u = conditional.narrow(dim, 0, channels), unconditional.narrow(dim, 0, channels)
    rest = conditional.narrow(dim, channels, total - channels)
    return torch.cat((u + scale * (c - u), rest), dim)  # (B, ...)


def merge_conditions(conditional: Any, null: Any) -> Any:
    """Joins two conditions of B samples into one of 2B, the conditional half first.

    Tensors are concatenated; tuples, lists and mappings are merged entry by entry; ``None`` stays ``None`` where both are.
    """
    if conditional is None and null is None:
        return None
    if isinstance(conditional, Tensor) and isinstance(null, Tensor):
        if conditional.shape[1:] != null.shape[1:]:
            raise InputError(
                f"conditional and null condition differ in shape: {tuple(conditional.shape)}, {tuple(null.shape)}; "
                f"pad them to one length, or give your own merge"
            )
        return torch.cat((conditional, null))  # (2B, ...)
    if isinstance(conditional, Mapping) and isinstance(null, Mapping) and conditional.keys() == null.keys():
        return {key: merge_conditions(conditional[key], null[key]) for key in conditional}
    if isinstance(conditional, (tuple, list)) and isinstance(null, (tuple, list)) and len(conditional) == len(null):
        merged = [merge_conditions(c, u) for c, u in zip(conditional, null, strict=True)]
        if hasattr(conditional, "_fields"):  # a named tuple takes its fields one by one
            return type(conditional)(*merged)
        return tuple(merged) if isinstance(conditional, tuple) else merged
    raise InputError(
        f"cannot merge a condition of type {type(conditional).__name__} with a null condition of type {type(null).__name__}"
    )


class GuidedModel:
    """A :data:`ModelFn` with guidance; made by :func:`guided`. ``(x (B, ...), t (B,)) -> output (B, ...)``.

    Samplers ask for :meth:`at_time` with the time as a number, which decides about the interval without reading the
    device. Calling the object itself decides from the tensor ``t``, for each sample, and waits for the device to do so.
    """

    def __init__(
        self,
        conditional: ModelFn,
        pair: ModelFn | None,
        scale: float,
        interval: tuple[float, float] | None,
        channels: int | None,
    ) -> None:
        self._conditional, self._pair = conditional, pair
        self.scale, self.interval, self.channels = scale, interval, channels
        self._bounds = (-math.inf, math.inf) if interval is None else interval_bounds(interval)

    def at_time(self, time: float) -> ModelFn:
        """The function to call for a batch that is at ``time`` (the model's t) as a whole."""
        inside = self._bounds[0] <= time <= self._bounds[1]
        return self._guided if self._pair is not None and inside else self._conditional

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self._pair is None or self.interval is None:
            return self.at_time(0.0)(x, t)
        inside = (t >= self._bounds[0]) & (t <= self._bounds[1])  # (B,)
        if not inside.any():
            return self._conditional(x, t)
        conditional, unconditional = self._both(x, t)
        guided_output = self._combine(x, conditional, unconditional)  # (B, ...)
        return torch.where(inside.view(-1, *(1,) * (x.ndim - 1)), guided_output, conditional)  # (B, ...)

    def _guided(self, x: Tensor, t: Tensor) -> Tensor:
        return self._combine(x, *self._both(x, t))  # (B, ...)

    def _both(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        assert self._pair is not None
        conditional, unconditional = self._pair(torch.cat((x, x)), torch.cat((t, t))).chunk(2)  # 2 x (B, ...)
        return conditional, unconditional

    def _combine(self, x: Tensor, conditional: Tensor, unconditional: Tensor) -> Tensor:
        channels = x.shape[channel_dim(x)] if self.channels is None else self.channels
        return classifier_free_guidance(conditional, unconditional, self.scale, channels)  # (B, ...)


def guided(
    model: Callable[[Tensor, Tensor, Condition], Tensor],
    condition: Condition,
    null_condition: Condition,
    scale: float,
    interval: tuple[float, float] | None = None,
    channels: int | None = None,
    merge: Callable[[Condition, Condition], Condition] = merge_conditions,
) -> GuidedModel:
    """``model(x, t, condition)`` with guidance, as a function of (x, t) for the samplers.

    Args:
        model: ``(x (B, ...), t (B,), condition of B samples) -> output (B, ...)``.
        condition, null_condition: opaque here; both for B samples.
        scale: 1 is the plain conditional model, and then the null condition is never used.
        interval: (low, high), both inclusive, in the model's own t (training steps, or [0, 1] for flow). Outside, the
            conditional model runs alone; inside, both run as one batch of 2B, the conditional half first.
        channels: guide the first so many channels; None is all channels of x, so not those of a learned variance.
        merge: makes the condition of the batch of 2B, once, here.

    Raises: InputError for a scale that is not finite, and an interval whose low end is above its high one.
    """
    if not math.isfinite(scale):
        raise InputError(f"a guidance scale must be finite, got {scale}")
    if interval is not None:
        interval_bounds(interval)  # before anything is merged

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, condition)

    if scale == 1:
        return GuidedModel(conditional, None, scale, interval, channels)
    merged = merge(condition, null_condition)

    def pair(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, merged)

    return GuidedModel(conditional, pair, scale, interval, channels)
