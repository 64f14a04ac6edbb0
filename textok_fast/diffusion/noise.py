"""Noise that belongs to a sample, not to a batch: a picture depends on its seed and on nothing else that is drawn with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from textok_fast.errors import InputError

# (draw, shape (B, ...)) -> standard normal noise of that shape. Draw 0 is the initial noise, and e + 1 that of the model's
# evaluation e, so that a source needs no state: what it returns depends on its arguments alone.
NoiseSource: TypeAlias = Callable[[int, Sequence[int]], Tensor]
# One generator for a whole batch, one for each sample, None for torch's global one, or a source.
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | NoiseSource | None

_MAX_SEED = 2**32 - 1  # torch's CPU generator reads 32 bits; a larger seed would silently repeat a smaller one


def generators_for_seeds(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each seed (0 to 2**32 - 1), as ``torch.Generator().manual_seed(seed)``.

    They are CPU generators on purpose: the same seed then gives the same noise on every device. Engines and pipelines draw by
    :func:`textok_fast.ops.seeded_normal` instead, whose seeds have 63 bits, and whose draws are numbered.
    """
    for seed in seeds:
        if isinstance(seed, bool) or not 0 <= seed <= _MAX_SEED:
            raise InputError(f"a seed is an integer from 0 to {_MAX_SEED}, got {seed!r}")
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def draw_noise(
    shape: Sequence[int], generator: Generators, device: torch.device | str, dtype: torch.dtype, draw: int = 0
) -> Tensor:
    """Standard normal noise of ``shape`` (B, ...). A list of B generators draws each sample from its own.

    ``draw`` is for a :data:`NoiseSource`; generators count for themselves.

    It is drawn in float32 on the generator's device (float64 if ``dtype`` is float64), then moved, so that neither the
    device nor the precision of the model changes it.
    """
    draw_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if generator is None:
        return torch.randn(tuple(shape), device=device, dtype=draw_dtype).to(dtype)
    if isinstance(generator, torch.Generator):
        noise = torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=draw_dtype)
        return noise.to(device=device, dtype=dtype)
    if callable(generator):
        noise = generator(draw, tuple(shape))
        if noise.shape != tuple(shape):
            raise InputError(f"the noise source gave {tuple(noise.shape)}, wanted {tuple(shape)}")
        return noise.to(device=device, dtype=dtype)
    if len(generator) != shape[0]:
        raise InputError(f"{len(generator)} generators for a batch of {shape[0]}; give one for each sample")
    if not generator:
        return torch.empty(tuple(shape), device=device, dtype=dtype)
    rows = [torch.randn(tuple(shape[1:]), generator=g, device=g.device, dtype=draw_dtype) for g in generator]
    return torch.stack(rows).to(device=device, dtype=dtype)  # (B, ...)
