"""Samplers written as a table: one row a step, for a loop that reads nothing but the step's number from the host or the device.

:func:`textok_fast.ops.guided_step` runs such a row. DDPM, DDIM and Euler all have the form

    m = u + s (c - u);   x0 = kx x + km m;   result = a x0 + b x + n exp(lv / 2) noise

with c and u the conditional and unconditional outputs, and lv between a low and a high log-variance where the model learns it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from textok_fast.diffusion.flow import FlowMatching
from textok_fast.diffusion.gaussian import GaussianDiffusion
from textok_fast.diffusion.samplers import _time_grid
from textok_fast.errors import InputError

Row = tuple[float, float, float, float, float, float, float]  # all columns but the guidance scale


class StepTable(NamedTuple):
    """``table`` (T, 8) float32 and ``times`` (T,), in the order of use: row 0 is the first step from noise.

    Columns: 0 guidance scale s, 1 kx, 2 km, 3 a, 4 b, 5 log-variance low, 6 log-variance high, 7 noise factor n.
    ``times`` is what the model is called with: int64 training steps, or for flow matching float64 in [0, 1], which a sampler
    hands on as float32.
    """

    table: Tensor
    times: Tensor

    def to(self, device: torch.device | str) -> StepTable:
        """Both on ``device``."""
        return StepTable(self.table.to(device), self.times.to(device))


def step_table(
    diffusion: GaussianDiffusion | FlowMatching,
    sampler: str = "ddpm",
    guidance_scale: float | Sequence[float] | Tensor = 1.0,
    interval: tuple[float, float] | None = None,
    *,
    eta: float = 0.0,
    steps: int | str | None = None,
    t_start: float = 1.0,
    t_end: float = 0.0,
) -> StepTable:
    """The steps of a sampler of :data:`textok_fast.diffusion.SAMPLERS`, but for heun, which evaluates a step twice.

    Coefficients are computed in float64 and rounded once. The state must be kept in float32 between steps, or wider.

    Args:
        diffusion: the process that the model was trained with.
        sampler: "ddpm" or "ddim" for Gaussian diffusion, "euler" for flow matching.
        guidance_scale: one, or one for each step in the order of use, also as a tensor; 1 is the conditional output alone.
        interval: (low, high), inclusive, in the model's own time (arXiv 2404.07724): steps outside get scale 1.
        eta: of DDIM, in [0, 1]: 0 adds no noise.
        steps: how many, or a respacing of a Gaussian ``diffusion``; None takes that as it is. Euler needs a number.
        t_start, t_end: of Euler.

    Returns: :class:`StepTable` on the CPU.
    Raises: InputError for a sampler that does not suit the process, and impossible options.
    """
    if isinstance(diffusion, FlowMatching):
        if sampler != "euler":
            raise InputError(f"a table for flow matching takes the sampler 'euler', got {sampler!r}")
        if not isinstance(steps, int):
            raise InputError(f"sampler 'euler' takes a number of steps, got {steps!r}")
        grid = _time_grid(steps, t_start, t_end)
        rows = [_euler_row(t, t_next) for t, t_next in itertools.pairwise(grid)]
        times = torch.tensor(grid[:-1], dtype=torch.float64)  # (T,)
    else:
        if sampler not in ("ddpm", "ddim"):
            raise InputError(f"a table for Gaussian diffusion takes the sampler 'ddpm' or 'ddim', got {sampler!r}")
        if not 0 <= eta <= 1:
            raise InputError(f"eta must be in [0, 1], got {eta}")
        spaced = diffusion if steps is None else diffusion.respaced(steps)
        order = range(spaced.num_steps - 1, -1, -1)
        rows = [_ddpm_row(spaced, step) if sampler == "ddpm" else _ddim_row(spaced, step, eta) for step in order]
        times = torch.from_numpy(spaced.timestep_map[::-1].copy())  # (T,)
    scales = _scales(guidance_scale, interval, times.tolist())
    table = torch.tensor([(scale, *row) for scale, row in zip(scales, rows, strict=True)], dtype=torch.float64)  # (T, 8)
    return StepTable(table.float(), times)


def _scales(
    guidance_scale: float | Sequence[float] | Tensor, interval: tuple[float, float] | None, times: list[float]
) -> list[float]:
    try:
        given = torch.as_tensor(guidance_scale, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"guidance_scale must be a number, or one for each step, got {guidance_scale!r}") from None
    if given.ndim > 1:
        raise InputError(f"guidance_scale must be a number, or one for each step, got shape {tuple(given.shape)}")
    if given.ndim == 1 and len(given) != len(times):
        raise InputError(f"guidance_scale has {len(given)} entries, wanted {len(times)}, one for each step")
    scales: list[float] = given.expand(len(times)).tolist()
    if interval is None:
        return scales
    low, high = interval
    if not low <= high:
        raise InputError(f"a guidance interval is (low, high) with low <= high, got {interval}")
    return [scale if low <= time <= high else 1.0 for scale, time in zip(scales, times, strict=True)]


def _ddpm_row(diffusion: GaussianDiffusion, step: int) -> Row:
    """x0's and x_t's weights in the posterior's mean; noise at every step but the one to data."""
    low = float(diffusion.posterior_log_variance_clipped[step])
    high = math.log(diffusion.betas[step])
    if not diffusion.learn_sigma:
        low = high = high if step > 0 else low  # the fixed variance is beta, but at the step to data
    a, b = diffusion.posterior_mean_coef1, diffusion.posterior_mean_coef2
    noise = 1.0 if step > 0 else 0.0
    return (*_x0_weights(diffusion, step), float(a[step]), float(b[step]), low, high, noise)


def _ddim_row(diffusion: GaussianDiffusion, step: int, eta: float) -> Row:
    """sqrt(a_prev) x0 + k eps with k = sqrt(1 - a_prev - sigma^2), eps = (x - sqrt(a) x0) / sqrt(1 - a) put in."""
    alpha, alpha_prev = float(diffusion.alphas_cumprod[step]), float(diffusion.alphas_cumprod_prev[step])
    variance = eta**2 * float(diffusion.posterior_variance[step])
    b = math.sqrt(max(1 - alpha_prev - variance, 0.0) / (1 - alpha))
    a = math.sqrt(alpha_prev) - b * math.sqrt(alpha)
    # sigma is the noise factor and the log-variances are 0, so that a learned variance has no part in it.
    return (*_x0_weights(diffusion, step), a, b, 0.0, 0.0, math.sqrt(variance) if step > 0 else 0.0)


def _x0_weights(diffusion: GaussianDiffusion, step: int) -> tuple[float, float]:
    """(kx, km): the predicted data is kx x + km m."""
    alpha = float(diffusion.alphas_cumprod[step])
    if diffusion.prediction == "x0":
        return 0.0, 1.0
    if diffusion.prediction == "epsilon":
        return math.sqrt(1 / alpha), -math.sqrt(1 / alpha - 1)
    return math.sqrt(alpha), -math.sqrt(1 - alpha)


def _euler_row(t: float, t_next: float) -> Row:
    """x + (t_next - t) v, through the data that v points to, x0 = x - t v: (1 - t_next / t) x0 + (t_next / t) x."""
    return 1.0, -t, 1 - t_next / t, t_next / t, 0.0, 0.0, 0.0
