"""Noise schedules of Gaussian diffusion, and which of their steps a shorter sampling run keeps."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from textok_fast.errors import InputError

Schedule = Literal["linear", "cosine"]
FloatTable = npt.NDArray[np.float64]


def betas_for(schedule: str, num_steps: int) -> FloatTable:
    """Variances beta_t of the forward steps, float64 (num_steps,).

    ``linear``: 1e-4 to 0.02 at 1,000 steps, scaled by 1000 / num_steps (Ho et al. 2020). ``cosine``: alpha_bar(u) =
    cos^2(pi/2 (u + 0.008) / 1.008), beta at most 0.999 (Nichol & Dhariwal 2021). :class:`InputError` for any other name,
    and for so few steps that a variance of the linear schedule would reach 1.
    """
    if num_steps < 1:
        raise InputError(f"num_train_steps must be at least 1, got {num_steps}")
    if schedule == "linear":
        scale = 1000 / num_steps
        if scale * 0.02 >= 1:
            raise InputError(f"the linear schedule needs more than 20 training steps, got {num_steps}; use more, or 'cosine'")
        return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)
    if schedule == "cosine":
        u = np.arange(num_steps + 1, dtype=np.float64) / num_steps
        alpha_bar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas: FloatTable = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
        return betas
    raise InputError(f"unknown noise schedule {schedule!r}; known: linear, cosine")


def respaced_timesteps(num_steps: int, respacing: str | int | None) -> list[int]:
    """Training steps that a sampling run keeps, ascending; the notation is that of guided-diffusion, but for ``solver``.

    ``None`` or ``""`` keeps all. ``250`` spreads 250 steps over the first to the last. ``"10,15,20"`` divides the schedule
    into three equal sections and spreads 10, 15 and 20 steps over them. ``"ddim50"`` takes the integer stride that gives
    exactly 50 steps, from step 0. ``"solver20"`` spreads 21 steps over the first to the last and leaves out the first: from
    step 0, which has almost no noise, multistep solvers would extrapolate too far. :class:`InputError` when there are not
    enough steps, or no such stride.
    """
    if respacing is None or respacing == "":
        return list(range(num_steps))
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        return _strided(num_steps, respacing)
    if isinstance(respacing, str) and respacing.startswith("solver"):
        return _without_the_first(num_steps, respacing)
    try:
        counts = [int(count) for count in str(respacing).split(",")]
    except ValueError:
        raise InputError(f"respacing {respacing!r} is not understood; write 250, '10,15,20', 'ddim50' or 'solver20'") from None
    if min(counts) < 0 or sum(counts) < 1:
        raise InputError(f"respacing {respacing!r} must keep at least one step, and no section fewer than 0")
    section_size, left_over = divmod(num_steps, len(counts))
    kept: list[int] = []
    start = 0
    for index, count in enumerate(counts):
        size = section_size + (index < left_over)
        if count > size:
            raise InputError(f"respacing {respacing!r} asks for {count} of {size} training steps; ask for at most {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Adding the stride up, not multiplying, decides exact halves as the published samplers do.
        positions = itertools.accumulate(itertools.repeat(stride, count - 1), initial=0.0) if count else ()
        kept += [start + round(position) for position in positions]
        start += size
    return kept


def _strided(num_steps: int, respacing: str) -> list[int]:
    try:
        wanted = int(respacing.removeprefix("ddim"))
    except ValueError:
        raise InputError(f"respacing {respacing!r} is not understood; write 'ddim' and a number, as 'ddim50'") from None
    lengths = {len(range(0, num_steps, stride)): stride for stride in range(max(num_steps - 1, 1), 0, -1)}
    if wanted not in lengths:
        near = sorted(sorted(lengths, key=lambda length: abs(length - wanted))[:2])
        raise InputError(
            f"respacing {respacing!r}: no integer stride over {num_steps} training steps gives {wanted} steps; "
            f"near ones: {', '.join(f'ddim{length}' for length in near)}"
        )
    return list(range(0, num_steps, lengths[wanted]))


def _without_the_first(num_steps: int, respacing: str) -> list[int]:
    count = respacing.removeprefix("solver")
    if not count.isdecimal() or not 1 <= int(count) < num_steps:
        raise InputError(f"respacing {respacing!r}: 'solver' takes a number of steps from 1 to {num_steps - 1}, as 'solver20'")
    kept: list[int] = np.linspace(0, num_steps - 1, int(count) + 1).round().astype(int)[1:].tolist()
    return kept
