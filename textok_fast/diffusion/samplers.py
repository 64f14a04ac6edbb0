"""From noise to samples. :func:`sample` picks a sampler by name: a short loop, or :func:`run_program` over its numbers.

Times are known on the host, so that no loop reads from the device. The state is kept in float32 (float64 for the ODE samplers,
as SiT's), the model gets it in the dtype of ``noise``, and the result has the dtype of ``noise``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from textok_fast.diffusion.flow import FlowMatching
from textok_fast.diffusion.gaussian import GaussianDiffusion
from textok_fast.diffusion.noise import Generators, draw_noise
from textok_fast.diffusion.program import SAMPLERS, SamplerProgram, exact_program, require_sampler, step_count, time_grid
from textok_fast.diffusion.tensors import ModelFn, channel_dim, require_same_shape, work_dtype
from textok_fast.errors import InputError

Progress: TypeAlias = Callable[[int, int], None]  # (steps done, steps in all), called after every step
# (evaluation, its time as the model has it, x (B, ...) after it) -> x to go on with, or None for that one.
OnStep: TypeAlias = Callable[[int, float, Tensor], Tensor | None]


class StopSampling(Exception):
    """Raised by an :data:`OnStep`: ``sample`` (B, ...) is the result."""

    def __init__(self, sample: Tensor) -> None:
        super().__init__("sampling was ended early")
        self.sample = sample


def sample(
    name: str,
    model: ModelFn,
    noise: Tensor,
    steps: int | str | None,
    diffusion: GaussianDiffusion | FlowMatching | None = None,
    generator: Generators = None,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Tensor:
    """Samples of noise's shape (B, C, H, W) or (B, N, d) and dtype, with the sampler ``name`` of :data:`SAMPLERS`.

    Args:
        model: ``(x (B, ...), t (B,)) -> output``, possibly :func:`guided`; t is the training step, or in [0, 1] for flow.
        noise: standard normal.
        steps: how many (an integer of any kind, or its digits), or a respacing such as "ddim50" of the Gaussian ``diffusion``;
            None takes ``diffusion`` as it is.
        diffusion: the process the model was trained with; needed by the Gaussian samplers.
        generator: for noise during sampling (ddpm, sde; ddim with eta > 0): one, or one for each sample, other than those of
            ``noise``, or a :data:`NoiseSource`, which is asked for draw e + 1 at evaluation e.
        on_step: sees and may change x after each evaluation. Every sampler then runs by its numbers (:func:`run_program`): the
            same but for rounding, and ``progress`` counts evaluations.
        options: of the sampler: ``clip_denoised``, ``step_noise`` (all but euler and heun), ``eta`` (ddim), ``t_start``,
            ``t_end`` (flow).

    Raises:
        InputError: unknown sampler, one that does not suit the objective, or impossible steps.
    """
    require_sampler(name, diffusion)
    steps = step_count(steps)
    if SAMPLERS[name] == "flow":
        if not isinstance(steps, int):
            raise InputError(f"sampler {name!r} takes a number of steps, got {steps!r}")
        if name != "sde" and on_step is None:
            ode_sampler = sample_euler if name == "euler" else sample_heun
            return ode_sampler(model, noise, steps, progress=progress, **options)
        diffusion = FlowMatching() if diffusion is None else diffusion
    elif not isinstance(diffusion, GaussianDiffusion):
        raise InputError(f"sampler {name!r} needs diffusion=GaussianDiffusion(...), the process the model was trained with")
    elif name in ("ddpm", "ddim") and on_step is None:
        spaced = diffusion if steps is None else diffusion.respaced(steps)
        gaussian_sampler = sample_ddpm if name == "ddpm" else sample_ddim
        return gaussian_sampler(spaced, model, noise, generator=generator, progress=progress, **options)
    of_program = {key: options.pop(key) for key in ("t_start", "t_end", "eta") if key in options}
    program = exact_program(diffusion, name, steps=steps, **of_program)
    return run_program(program, model, noise, generator=generator, progress=progress, on_step=on_step, **options)


@torch.no_grad()
def run_program(
    program: SamplerProgram,
    model: ModelFn,
    noise: Tensor,
    *,
    generator: Generators = None,
    step_noise: Tensor | Sequence[Tensor] | None = None,
    clip_denoised: bool = False,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Any sampler from its numbers: samples of noise's shape (B, C, H, W) or (B, N, d) and dtype.

    ``model`` is guided by itself (:func:`guided`): the program's guidance scales are not used here. ``step_noise``
    (evaluations, B, ...), in the order used, replaces ``generator``; entries of evaluations that add no noise are not read.
    ``progress`` counts evaluations. What ``on_step`` returns takes x's place; a sampler's memory of earlier steps stays.
    """
    _require_step_noise(step_noise, program.evaluations, noise)
    state = [noise.to(work_dtype(noise.dtype))] + [torch.zeros_like(noise, dtype=work_dtype(noise.dtype))] * (program.slots - 1)
    times = program.times.tolist()
    time_dtype = torch.int64 if program.times.dtype == torch.int64 else work_dtype(noise.dtype)
    for index, row in enumerate(program.table.tolist()):
        output = _evaluate(model, state[0], times[index], time_dtype, noise.dtype)
        fresh = _step_noise(step_noise, index, generator, state[0]) if program.noisy[index] else None  # (B, ...)
        updated = _apply_row(row, output, state[0], fresh, clip_denoised)  # (B, ...)
        if program.mix is None:
            state = [updated]
        else:
            state = [_mixture(weights, [*state, updated]) for weights in program.mix[index, :, :-1].tolist()]
        if on_step is not None:
            try:
                changed = on_step(index, times[index], state[0])
            except StopSampling as stopped:
                return stopped.sample.to(noise.dtype)
            state[0] = state[0] if changed is None else changed.detach().to(state[0])
            require_same_shape("what on_step returned", state[0], noise)
        if progress is not None:
            progress(index + 1, program.evaluations)
    return state[0].to(noise.dtype)


def _apply_row(row: list[float], output: Tensor, x: Tensor, noise: Tensor | None, clip_denoised: bool) -> Tensor:
    """What :func:`textok_fast.ops.guided_step` computes for an output that is guided already, (B, ...)."""
    _, kx, km, a, b, low, high, factor = row
    dim, output = channel_dim(x), output.to(x.dtype)
    channels = x.shape[dim]
    learned = output.shape[dim] == 2 * channels
    prediction = output.narrow(dim, 0, channels) if learned else output  # (B, ...)
    require_same_shape("the model's output", prediction, x)
    h = kx * x + km * prediction  # (B, ...)
    if clip_denoised:
        h = h.clamp(-1, 1)
    result = a * h + b * x  # (B, ...)
    if noise is None:
        return result
    if not learned:
        return result + factor * math.exp(0.5 * high) * noise
    fraction = (output.narrow(dim, channels, channels) + 1) / 2  # (B, ...)
    return result + factor * torch.exp(0.5 * (fraction * high + (1 - fraction) * low)) * noise


def _mixture(weights: list[float], tensors: list[Tensor]) -> Tensor:
    """The sum of those tensors whose weight is not 0, (B, ...); zeros where all are."""
    terms = [weight * tensor for weight, tensor in zip(weights, tensors, strict=True) if weight != 0]
    return functools.reduce(torch.add, terms) if terms else torch.zeros_like(tensors[0])


@torch.no_grad()
def sample_ddpm(
    diffusion: GaussianDiffusion,
    model: ModelFn,
    noise: Tensor,
    *,
    generator: Generators = None,
    step_noise: Tensor | Sequence[Tensor] | None = None,
    clip_denoised: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over all steps of ``diffusion``.

    ``step_noise`` (num_steps, B, ...), in the order used, replaces ``generator``; its last entry is not used, since the step
    to data adds no noise.
    """
    _require_step_noise(step_noise, diffusion.num_steps, noise)
    x = noise.to(work_dtype(noise.dtype))  # (B, ...)
    for done, index in enumerate(reversed(range(diffusion.num_steps))):
        output = _evaluate(model, x, int(diffusion.timestep_map[index]), torch.int64, noise.dtype)
        fresh = _step_noise(step_noise, done, generator, x) if index > 0 else None  # (B, ...)
        x = ddpm_step(diffusion, output, x, index, fresh, clip_denoised)  # (B, ...)
        if progress is not None:
            progress(done + 1, diffusion.num_steps)
    return x.to(noise.dtype)


def ddpm_step(
    diffusion: GaussianDiffusion, output: Tensor, x: Tensor, index: int, noise: Tensor | None, clip_denoised: bool = False
) -> Tensor:
    """x_{t-1} ~ p(x_{t-1} | x_t), (B, ...), in float32; without ``noise`` its mean."""
    step = diffusion.mean_variance(output, x, index, clip_denoised)
    return step.mean if noise is None else step.mean + torch.exp(0.5 * step.log_variance) * noise  # (B, ...)


@torch.no_grad()
def sample_ddim(
    diffusion: GaussianDiffusion,
    model: ModelFn,
    noise: Tensor,
    *,
    eta: float = 0.0,
    generator: Generators = None,
    step_noise: Tensor | Sequence[Tensor] | None = None,
    clip_denoised: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """DDIM (arXiv 2010.02502) over all steps of ``diffusion``. ``eta`` 0 draws nothing; 1 has the posterior's variance.

    ``step_noise`` as in :func:`sample_ddpm`, read only when ``eta`` > 0.
    """
    _require_step_noise(step_noise, diffusion.num_steps, noise)
    x = noise.to(work_dtype(noise.dtype))  # (B, ...)
    for done, index in enumerate(reversed(range(diffusion.num_steps))):
        output = _evaluate(model, x, int(diffusion.timestep_map[index]), torch.int64, noise.dtype)
        fresh = _step_noise(step_noise, done, generator, x) if index > 0 and eta > 0 else None  # (B, ...)
        x = ddim_step(diffusion, output, x, index, eta, fresh, clip_denoised)  # (B, ...)
        if progress is not None:
            progress(done + 1, diffusion.num_steps)
    return x.to(noise.dtype)


def ddim_step(
    diffusion: GaussianDiffusion,
    output: Tensor,
    x: Tensor,
    index: int,
    eta: float = 0.0,
    noise: Tensor | None = None,
    clip_denoised: bool = False,
) -> Tensor:
    """One DDIM step (equation 12), (B, ...), in float32: sqrt(a_prev) x0 + sqrt(1 - a_prev - sigma^2) eps + sigma noise, with
    sigma = eta sqrt((1 - a_prev) / (1 - a) (1 - a / a_prev)). Without ``noise`` its last term is left out."""
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be in [0, 1], got {eta}")
    x = x.to(work_dtype(x.dtype))
    pred_x0 = diffusion.mean_variance(output, x, index, clip_denoised).pred_x0  # (B, ...)
    eps = diffusion.predict_noise(pred_x0, x, index)  # (B, ...), again from pred_x0, which may have been clamped
    a_prev = float(diffusion.alphas_cumprod_prev[index])
    variance = eta**2 * float(diffusion.posterior_variance[index])
    mean = math.sqrt(a_prev) * pred_x0 + math.sqrt(max(1 - a_prev - variance, 0.0)) * eps  # (B, ...)
    return mean if noise is None else mean + math.sqrt(variance) * noise  # (B, ...)


@torch.no_grad()
def sample_euler(
    model: ModelFn,
    noise: Tensor,
    steps: int,
    *,
    t_start: float = 1.0,
    t_end: float = 0.0,
    progress: Progress | None = None,
) -> Tensor:
    """The probability flow dx/dt = v(x, t) from ``t_start`` (noise) to ``t_end`` (data) in equal Euler steps."""
    grid = time_grid("euler", steps, t_start, t_end)
    steps = len(grid) - 1
    x = noise.double()  # (B, ...)
    for done, (t, t_next) in enumerate(itertools.pairwise(grid), start=1):
        x = x + (t_next - t) * _velocity(model, x, t, noise)  # (B, ...)
        if progress is not None:
            progress(done, steps)
    return x.to(noise.dtype)


@torch.no_grad()
def sample_heun(
    model: ModelFn,
    noise: Tensor,
    steps: int,
    *,
    t_start: float = 1.0,
    t_end: float = 0.0,
    progress: Progress | None = None,
) -> Tensor:
    """As :func:`sample_euler` by Heun's second-order method: 2 steps - 1 evaluations of the model.

    The last step is an Euler step, as in EDM (arXiv 2206.00364) and the samplers of REPA and SoftVQ-VAE: a model is not
    trained on data without noise. The order stays 2, since one Euler step's error is of second order.
    """
    grid = time_grid("heun", steps, t_start, t_end)
    steps = len(grid) - 1
    x = noise.double()  # (B, ...)
    for done, (t, t_next) in enumerate(itertools.pairwise(grid), start=1):
        slope = _velocity(model, x, t, noise)  # (B, ...)
        if done < steps:
            ahead = _velocity(model, x + (t_next - t) * slope, t_next, noise)  # (B, ...)
            slope = 0.5 * (slope + ahead)  # (B, ...)
        x = x + (t_next - t) * slope  # (B, ...)
        if progress is not None:
            progress(done, steps)
    return x.to(noise.dtype)


def _velocity(model: ModelFn, x: Tensor, time: float, noise: Tensor) -> Tensor:
    velocity = _evaluate(model, x, time, work_dtype(noise.dtype), noise.dtype)  # (B, ...)
    require_same_shape("the velocity", velocity, x)
    return velocity.double()


def _evaluate(model: ModelFn, x: Tensor, time: float, time_dtype: torch.dtype, x_dtype: torch.dtype) -> Tensor:
    """The model at a time that is the same for the batch. A model with ``at_time`` first chooses how to run there."""
    at_time = getattr(model, "at_time", None)
    step_model: ModelFn = model if at_time is None else at_time(time)
    t = torch.full((x.shape[0],), time, dtype=time_dtype, device=x.device)  # (B,)
    return step_model(x.to(x_dtype), t)


def _step_noise(step_noise: Tensor | Sequence[Tensor] | None, done: int, generator: Generators, x: Tensor) -> Tensor:
    if step_noise is not None:
        return step_noise[done].to(device=x.device, dtype=x.dtype)  # (B, ...)
    return draw_noise(x.shape, generator, x.device, x.dtype, done + 1)  # (B, ...)


def _require_step_noise(step_noise: Tensor | Sequence[Tensor] | None, steps: int, noise: Tensor) -> None:
    if step_noise is None:
        return
    if len(step_noise) != steps:
        raise InputError(f"step_noise has {len(step_noise)} entries, wanted {steps}, one for each step")
    require_same_shape("step_noise[0]", step_noise[0], noise)
