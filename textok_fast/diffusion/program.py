"""Samplers written as tables of numbers: for a loop that reads nothing but an evaluation's number from the host or the device.

Every sampler here is linear in what it keeps, in what the model's output says, and in fresh noise. With c and u the
conditional and unconditional outputs, each evaluation begins with

    m = u + s (c - u);   h = kx x + km m

where h is the predicted data (for a flow x - t m). DDPM, DDIM, Euler and the SDE then need no memory,

    x' = a h + b x + n exp(lv / 2) noise,

with lv between a low and a high log-variance where the model learns it: one row of :func:`textok_fast.ops.guided_step`. The
others keep S tensors, the first of which is x, and map them by a matrix: state' = mix @ [state, h, noise].
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from textok_fast.diffusion.flow import FlowMatching
from textok_fast.diffusion.gaussian import GaussianDiffusion
from textok_fast.diffusion.guidance import interval_bounds
from textok_fast.diffusion.schedule import FloatTable
from textok_fast.errors import InputError

# Which objective a model must have been trained with for a sampler.
SAMPLERS: dict[str, Literal["gaussian", "flow"]] = {
    "ddpm": "gaussian",
    "ddim": "gaussian",
    "dpmpp_2m": "gaussian",
    "unipc": "gaussian",
    "euler": "flow",
    "heun": "flow",
    "sde": "flow",
}
SDE_LAST_STEP = 0.04  # where the SDE's last step begins, the mean alone, as in SiT and REPA

Row: TypeAlias = tuple[float, float, float, float, float, float, float]  # a table's columns but the guidance scale


@dataclass(frozen=True)
class SamplerProgram:
    """A sampler over E evaluations of the model, in the order of use.

    Attributes:
        table: (E, 8) float32. Columns: 0 guidance scale s, 1 kx, 2 km, 3 a, 4 b, 5 log-variance low, 6 log-variance high,
            7 noise factor n. With ``mix``, a = 1 and b = n = 0, so that :func:`textok_fast.ops.guided_step` gives h.
        times: (E,), what the model is called with: int64 training steps, or for a flow float64 in [0, 1], which a sampler
            hands on as float32.
        mix: (E, S, S + 2) float32 over [state (S), h, noise], or None where x is all that is kept. The state begins as the
            initial noise and S - 1 zeros; its first tensor is x, where the model is evaluated, and at the end the sample. The
            column of the noise is 0 in all samplers so far.
        steps: how many steps the sampler takes; Heun's method evaluates 2 steps - 1 times.
        noisy: (E,), whether an evaluation adds fresh noise.
        guided: (E,), whether its guidance scale is not 1, so that it needs the unconditional output.

    The state must be kept in float32 between evaluations, or wider.
    """

    table: Tensor
    times: Tensor
    mix: Tensor | None
    steps: int
    noisy: tuple[bool, ...]
    guided: tuple[bool, ...]

    @property
    def evaluations(self) -> int:
        """E, how often the model is evaluated."""
        return len(self.noisy)

    @property
    def slots(self) -> int:
        """S, how many tensors of x's shape the state has."""
        return 1 if self.mix is None else self.mix.shape[1]

    def to(self, device: torch.device | str) -> SamplerProgram:
        """The same with its tensors on ``device``."""
        mix = None if self.mix is None else self.mix.to(device)
        return dataclasses.replace(self, table=self.table.to(device), times=self.times.to(device), mix=mix)


def sampler_program(
    diffusion: GaussianDiffusion | FlowMatching,
    sampler: str = "ddpm",
    guidance_scale: float | Sequence[float] | Tensor = 1.0,
    interval: tuple[float, float] | None = None,
    *,
    steps: int | str | None = None,
    eta: float = 0.0,
    t_start: float = 1.0,
    t_end: float = 0.0,
) -> SamplerProgram:
    """The evaluations of a sampler of :data:`SAMPLERS`. Coefficients are computed in float64 and rounded once.

    ``dpmpp_2m`` is DPM-Solver++(2M) (arXiv 2211.01095) and ``unipc`` UniPC-2 with B(h) = e^h - 1 and its corrector (arXiv
    2302.04867), both on data predictions, of first order in the first step and in the last one, which goes to data. ``sde``
    is the Euler-Maruyama method on dx = (v - t score) dt + sqrt(2 t) dW (SiT, arXiv 2401.08740; REPA, arXiv 2410.06940): equal
    steps down to t = 0.04, then one without noise.

    Args:
        diffusion: the process that the model was trained with.
        guidance_scale: one, or one for each evaluation in the order of use, also as a tensor; 1 is no guidance.
        interval: (low, high), inclusive, in the model's own time (arXiv 2404.07724): evaluations outside get scale 1.
        steps: how many (an integer of any kind, or its digits), or a respacing of a Gaussian ``diffusion``; None takes that as
            it is. A number n means "solver{n}" to dpmpp_2m and unipc (:func:`respaced_timesteps`). A flow needs a number.
        eta: of ddim, in [0, 1]: 0 adds no noise.
        t_start, t_end: of a flow, from noise to data.

    Returns: :class:`SamplerProgram` on the CPU.
    Raises: InputError for a sampler that does not suit the process, impossible options, and options of another sampler.
    """
    exact = exact_program(diffusion, sampler, guidance_scale, interval, steps=steps, eta=eta, t_start=t_start, t_end=t_end)
    return dataclasses.replace(exact, table=exact.table.float(), mix=None if exact.mix is None else exact.mix.float())


def exact_program(
    diffusion: GaussianDiffusion | FlowMatching,
    sampler: str,
    guidance_scale: float | Sequence[float] | Tensor = 1.0,
    interval: tuple[float, float] | None = None,
    *,
    steps: int | str | None = None,
    eta: float = 0.0,
    t_start: float = 1.0,
    t_end: float = 0.0,
) -> SamplerProgram:
    """:func:`sampler_program` with ``table`` and ``mix`` in float64."""
    require_sampler(sampler, diffusion)
    steps = step_count(steps)
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be in [0, 1], got {eta}")
    if eta != 0 and sampler != "ddim":
        raise InputError(f"eta is ddim's, sampler {sampler!r} has none; got {eta}")
    mix: list[FloatTable] | None = None
    if isinstance(diffusion, FlowMatching):
        grid = time_grid(sampler, steps, t_start, t_end)
        if sampler == "heun":
            rows, mix, points = _heun(grid)
        else:
            row = _euler_row if sampler == "euler" else _sde_row
            rows, points = [row(t, t_next) for t, t_next in itertools.pairwise(grid)], grid[:-1]
            rows[-1] = (*rows[-1][:-1], 0.0)  # no noise in the step to data
        times = torch.tensor(points, dtype=torch.float64)  # (E,)
        count = len(grid) - 1
    else:
        if (t_start, t_end) != (1, 0):
            raise InputError(f"t_start and t_end are a flow's, sampler {sampler!r} has none; got {t_start} and {t_end}")
        if isinstance(steps, int) and sampler in ("dpmpp_2m", "unipc"):
            steps = f"solver{steps}"
        spaced = diffusion if steps is None else diffusion.respaced(steps)
        order = range(spaced.num_steps - 1, -1, -1)
        if sampler in ("ddpm", "ddim"):
            rows = [_ddpm_row(spaced, step) if sampler == "ddpm" else _ddim_row(spaced, step, eta) for step in order]
        else:
            rows = [(*_x0_weights(spaced, step), 1.0, 0.0, 0.0, 0.0, 0.0) for step in order]
            mix = _dpmpp_2m(spaced) if sampler == "dpmpp_2m" else _unipc(spaced)
        times = torch.from_numpy(spaced.timestep_map[::-1].copy())  # (E,)
        count = spaced.num_steps
    scales = _scales(guidance_scale, interval, times.tolist())
    return SamplerProgram(
        table=torch.tensor([(scale, *row) for scale, row in zip(scales, rows, strict=True)], dtype=torch.float64),  # (E, 8)
        times=times,
        mix=None if mix is None else torch.from_numpy(np.stack(mix)),  # (E, S, S + 2)
        steps=count,
        noisy=tuple(row[-1] != 0 for row in rows),
        guided=tuple(scale != 1 for scale in scales),
    )


def require_sampler(sampler: str, diffusion: GaussianDiffusion | FlowMatching | None) -> None:
    """Raises InputError unless ``sampler`` is known and suits the process, where that is given."""
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    if diffusion is not None and diffusion.objective != SAMPLERS[sampler]:
        suitable = ", ".join(known for known, objective in SAMPLERS.items() if objective == diffusion.objective)
        raise InputError(
            f"sampler {sampler!r} needs a {SAMPLERS[sampler]} model, this one was trained as {diffusion.objective}; "
            f"use {suitable}"
        )


def step_count(steps: int | str | None) -> int | str | None:
    """``steps`` with a number as an int: from any integer type, such as NumPy's, and from digits. Respacings stay as they are.

    Raises: InputError for what is neither of the two, nor None.
    """
    if steps is None or isinstance(steps, str):
        return int(steps) if steps is not None and steps.strip().isdecimal() else steps
    try:
        if isinstance(steps, bool):
            raise TypeError
        return operator.index(steps)
    except TypeError:
        raise InputError(f"steps must be an integer or a respacing such as 'ddim50', got {steps!r}") from None


def time_grid(sampler: str, steps: int | str | None, t_start: float, t_end: float) -> list[float]:
    """The times of a flow's sampler from ``t_start`` to ``t_end``: steps + 1 of them, the sample's own last."""
    steps = step_count(steps)
    if not isinstance(steps, int):
        raise InputError(f"sampler {sampler!r} takes a number of steps, got {steps!r}")
    if steps < 1:
        raise InputError(f"sampling takes at least 1 step, got {steps}")
    if not 0 <= t_end < t_start <= 1:
        raise InputError(f"times run from t_start down to t_end within [0, 1], got {t_start} to {t_end}")
    if sampler != "sde":
        grid: list[float] = torch.linspace(t_start, t_end, steps + 1, dtype=torch.float64).tolist()
        return grid
    if not t_end < SDE_LAST_STEP < t_start:
        raise InputError(f"the last step of sampler 'sde' begins at {SDE_LAST_STEP}, which is not within {t_end} to {t_start}")
    return [*torch.linspace(t_start, SDE_LAST_STEP, steps, dtype=torch.float64).tolist(), t_end]


def _scales(
    guidance_scale: float | Sequence[float] | Tensor, interval: tuple[float, float] | None, times: list[float]
) -> list[float]:
    try:
        given = torch.as_tensor(guidance_scale, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"guidance_scale must be a number, or one for each evaluation, got {guidance_scale!r}") from None
    if given.ndim > 1:
        raise InputError(f"guidance_scale must be a number, or one for each evaluation, got shape {tuple(given.shape)}")
    if given.ndim == 1 and len(given) != len(times):
        raise InputError(f"guidance_scale has {len(given)} entries, wanted {len(times)}, one for each evaluation")
    if not given.isfinite().all():
        raise InputError(f"guidance_scale must be finite, got {guidance_scale}")
    scales: list[float] = given.expand(len(times)).tolist()
    if interval is None:
        return scales
    low, high = interval_bounds(interval)
    return [scale if low <= time <= high else 1.0 for scale, time in zip(scales, times, strict=True)]


# -- Gaussian diffusion --------------------------------------------------------------------------------------------------------


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


def _exponential_steps(diffusion: GaussianDiffusion) -> list[tuple[float, float, float]]:
    """(cx, cd, h) of each step: with the data prediction D held fixed, x' = cx x + cd D solves the diffusion ODE exactly.

    cx = sigma' / sigma, cd = alpha' (1 - e^-h), and h is the step in log(alpha / sigma): infinite in the last one, to data.
    """
    points = [(math.sqrt(a), math.sqrt(1 - a)) for a in diffusion.alphas_cumprod[::-1]]  # (alpha, sigma)
    found = []
    for (alpha, sigma), (alpha_next, sigma_next) in itertools.pairwise(points):
        h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
        found.append((sigma_next / sigma, -alpha_next * math.expm1(-h), h))
    return [*found, (0.0, 1.0, math.inf)]


def _dpmpp_2m(diffusion: GaussianDiffusion) -> list[FloatTable]:
    """State (x, last D). D is extrapolated to the middle of the step: (1 + w) h - w last, w = h / (2 last h)."""
    steps = _exponential_steps(diffusion)
    mix = []
    for i, (cx, cd, _) in enumerate(steps):
        w = _extrapolation(steps, i)
        mix.append(np.array([[cx, -cd * w, cd * (1 + w), 0.0], [0.0, 0.0, 1.0, 0.0]]))  # (2, 4)
    return mix


def _extrapolation(steps: list[tuple[float, float, float]], i: int) -> float:
    """How far step i goes beyond its own D, away from the last one; 0, first order, in the first step and in the last."""
    return 0.0 if i in (0, len(steps) - 1) else steps[i][2] / (2 * steps[i - 1][2])


def _unipc(diffusion: GaussianDiffusion) -> list[FloatTable]:
    """State (x, q, last D): x is the predictor's, where D is found, and q + c D what the corrector puts in x's place.

    The predictor is DPM-Solver++(2M)'s. The corrector takes the step again from its beginning, where D was D0, with rho_1 (D1 -
    D0) / r + rho_2 (D - D0) added to D0: D1 is the one of the step before, at r = -last h / h in units of this step, and D the
    new one, at 1. One order more than the predictor's needs rho_2 = 1/2 after a first-order step, and else
    rho_1 + rho_2 = b_1 and r rho_1 + rho_2 = b_2, with b_k = k! phi_(k+1)(z) z / (e^z - 1) and z = -h.
    """
    x, q, last, new, _ = np.eye(5)  # what a row of the mixture is made of: the state, D, noise
    steps = _exponential_steps(diffusion)
    mix = []
    corrector = 0.0
    for i, (cx, cd, h) in enumerate(steps):
        corrected = x if i == 0 else q + corrector * new
        w = _extrapolation(steps, i)
        predicted = cx * corrected + cd * ((1 + w) * new - w * last)
        if i == len(steps) - 1:
            mix.append(np.stack((predicted, np.zeros(5), np.zeros(5))))  # (3, 5)
            break
        if i == 0:
            corrector, before = 0.5 * cd, np.zeros(5)
        else:
            z, r = -h, -steps[i - 1][2] / h
            phi1 = math.expm1(z) / z
            phi2 = (phi1 - 1) / z
            phi3 = (phi2 - 0.5) / z
            b1, b2 = phi2 / phi1, 2 * phi3 / phi1
            rho = (b1 - b2) / (1 - r)
            corrector, before = cd * (b1 - rho), cd * rho / r * (last - new)
        again = cx * corrected + (cd - corrector) * new + before
        mix.append(np.stack((predicted, again, new)))  # (3, 5)
    return mix


# -- flows ---------------------------------------------------------------------------------------------------------------------


def _euler_row(t: float, t_next: float) -> Row:
    """x + (t_next - t) v, through the data that v points to, x0 = x - t v: (1 - t_next / t) x0 + (t_next / t) x."""
    return 1.0, -t, 1 - t_next / t, t_next / t, 0.0, 0.0, 0.0


def _sde_row(t: float, t_next: float) -> Row:
    """x + dt (v - t score) + sqrt(2 t |dt|) noise with score = -(x + (1 - t) v) / t and v = (x - x0) / t put in."""
    dt = t_next - t
    return 1.0, -t, -dt * (2 - t) / t, 1 + dt * (2 / t), 0.0, 0.0, math.sqrt(-2 * t * dt)


def _heun(grid: list[float]) -> tuple[list[Row], list[FloatTable], list[float]]:
    """State (x, half): Euler's point, and the step's beginning plus half of its first slope, for half of the second to join.

    The slope is (x - x0) / t. The last step is an Euler step (EDM, arXiv 2206.00364), so that no evaluation is at t = 0.
    """
    mix, points = [], []
    for t, t_next in itertools.pairwise(grid):
        step, last = (t_next - t) / t, t_next == grid[-1]
        points.append(t)
        half = [0.0] * 4 if last else [1 + 0.5 * step, 0.0, -0.5 * step, 0.0]
        mix.append(np.array([[1 + step, 0.0, -step, 0.0], half]))  # (2, 4)
        if not last:
            step = 0.5 * (t_next - t) / t_next
            points.append(t_next)
            mix.append(np.array([[step, 1.0, -step, 0.0], [0.0] * 4]))
    rows: list[Row] = [(1.0, -t, 1.0, 0.0, 0.0, 0.0, 0.0) for t in points]
    return rows, mix, points
