"""Standard normal noise by seed, drawn where it is used. Backends: ``triton``, ``reference``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.ops.dispatch import REFERENCE, choose, describe, register
from textok_fast.ops.library import define, library, triton_runs_on

_MASK = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Salmon et al. (2011), table 2
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four random 32-bit numbers.

    ``counter`` four and ``key`` two int64 tensors that broadcast together, each in [0, 2**32); so are the results.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low halves of a product of 32-bit numbers. With factor - 2**32 it stays within int64, and x makes up for it."""
    product = x * (factor - 2**32)
    return (product >> 32) + x, product & _MASK


def seeded_normal_reference(seeds: Tensor, draw: Tensor, shape: Sequence[int]) -> Tensor:
    """:func:`seeded_normal` in PyTorch."""
    size = math.prod(shape)
    group = torch.arange((size + 3) // 4, device=seeds.device)  # (G,)
    zero = torch.zeros_like(group)
    seed = seeds[:, None]  # (B, 1)
    counter = (group, zero, (draw.reshape(1) & _MASK).expand_as(group), zero)
    random = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))  # 4 x (B, G)
    pairs = [part for i in (0, 2) for part in _box_muller(random[i], random[i + 1])]  # 4 x (B, G)
    return torch.stack(pairs, -1).flatten(1)[:, :size].reshape(len(seeds), *shape)  # (B, *shape)


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normal numbers from two uniform ones, (first + 1/2) / 2**32 and second / 2**32."""
    radius = torch.sqrt(-2 * torch.log(first.float() * 2**-32 + 2**-33))
    angle = second.float() * (2 * math.pi * 2**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def seeded_normal(seeds: Tensor, draw: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), float32: sample i depends on seeds[i], on ``draw`` and on nothing else in the batch.

    Element e of sample i is number e % 4 of Philox4x32-10 with the counter (e // 4, 0, draw, 0) and the lower and upper 32
    bits of seeds[i] as its key, numbers 0, 1 and 2, 3 turned to normal ones by Box and Muller: with u = (p + 1/2) / 2**32 of
    the first of the pair and v = q / 2**32 of the second, sqrt(-2 log u) cos(2 pi v) and sqrt(-2 log u) sin(2 pi v). So there
    is no state: equal arguments give equal numbers, on other devices but for the rounding of log, cos and sin.

    Args:
        seeds: (B,) int64, any 64 bits, read on the device.
        draw: one int64 of any shape with one element, read on the device, so that a captured loop can advance it; its lower
            32 bits count. In sampling 0 is the initial noise and e + 1 the noise of evaluation e.
        shape: of one sample, such as (N, d), with at most 2**26 elements.

    Returns: (B, *shape) float32 on the device of ``seeds``, without gradient.
    Raises: InputError for other dtypes and shapes, and for tensors on different devices.
    """
    shape = list(shape)
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise InputError(f"seeds must be int64 (B,), got {describe(seeds) if isinstance(seeds, Tensor) else repr(seeds)}")
    if not isinstance(draw, Tensor) or draw.dtype != torch.int64 or draw.numel() != 1:
        got = describe(draw) if isinstance(draw, Tensor) else repr(draw)
        raise InputError(f"draw must be a tensor of one int64, got {got}")
    if seeds.device != draw.device:
        raise InputError(f"seeds lie on {seeds.device} and draw on {draw.device}; put both on one device")
    if min(shape, default=1) < 0 or math.prod(shape) > 2**26:
        raise InputError(f"one sample has at most 2**26 elements, and no negative size; got the shape {tuple(shape)}")
    backend = choose("seeded_normal", seeds, draw, shape)
    if backend == REFERENCE:
        return seeded_normal_reference(seeds, draw, shape)
    result: Tensor = library(backend).seeded_normal(seeds, draw, shape)
    return result


def _triton_rule(seeds: Tensor, draw: Tensor, shape: list[int]) -> str:
    if reason := triton_runs_on(seeds):
        return reason
    count = len(seeds) * math.prod(shape)
    return "" if 1 <= count <= 2**31 - 1 else f"it draws 1 to 2**31 - 1 numbers, got {count}"


def _on_gpu(seeds: Tensor, *others: object) -> str:
    return "" if seeds.is_cuda else "interpreted kernels only check numbers"


register("seeded_normal", "triton", _triton_rule, default=_on_gpu)


def _fake(seeds: Tensor, draw: Tensor, shape: Sequence[int]) -> Tensor:
    return seeds.new_empty((seeds.shape[0], *shape), dtype=torch.float32)


define("seeded_normal", "(Tensor seeds, Tensor draw, SymInt[] shape) -> Tensor", _fake)
