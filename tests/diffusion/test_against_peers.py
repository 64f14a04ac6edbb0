"""Every sampler against diffusers' scheduler of its name on the same outputs of a model, and the SDE against its formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from textok_fast.diffusion import FlowMatching, GaussianDiffusion, run_program, sample, sampler_program
from textok_fast.diffusion.gaussian import Prediction

SHAPE = (2, 3, 4, 4)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def model(x: Tensor, t: Tensor) -> Tensor:
    """Nonlinear in x and t, near enough to a denoiser's output that x0 stays small."""
    time = t.to(x.dtype).view(-1, 1, 1, 1) / 1000
    return x * (0.2 + 0.79 * time) + 0.1 * torch.sin(3 * x + 5 * time)


def learned(x: Tensor, t: Tensor) -> Tensor:
    output = model(x, t)
    return torch.cat((output, torch.cos(4 * output)), 1)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def run(scheduler: Any, noise: Tensor, network: Any = model, **options: Any) -> Tensor:
    x = noise
    for time in scheduler.timesteps:
        x = scheduler.step(network(x, time.expand(len(x))), time, x, return_dict=False, **options)[0]
    return x


def both(
    name: str, network: Any, noise: Tensor, diffusion: GaussianDiffusion, steps: int | str | None = None, **options: Any
) -> Iterator[Tensor]:
    """The sampler, and its program in float32 as an engine has it."""
    yield sample(name, network, noise, steps, diffusion, **options)
    program = sampler_program(diffusion, name, steps=steps, eta=options.pop("eta", 0.0))
    yield run_program(program, network, noise, **options)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Both in float32, and diffusers keeps its sigmas in it too."""
    torch.testing.assert_close(found, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_dpmpp_2m(noise: Tensor, steps: int, prediction: Prediction) -> None:
    diffusion = GaussianDiffusion(prediction=prediction, learn_sigma=False)
    scheduler = DPMSolverMultistepScheduler(
        **LINEAR, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type=PREDICTIONS[prediction]
    )
    scheduler.set_timesteps(steps)
    wanted = run(scheduler, noise)
    for found in both("dpmpp_2m", model, noise, diffusion, steps):
        assert_close(found, wanted)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_unipc(noise: Tensor, steps: int, prediction: Prediction) -> None:
    diffusion = GaussianDiffusion(prediction=prediction, learn_sigma=False)
    scheduler = UniPCMultistepScheduler(**LINEAR, solver_order=2, solver_type="bh2", prediction_type=PREDICTIONS[prediction])
    scheduler.set_timesteps(steps)
    wanted = run(scheduler, noise)
    for found in both("unipc", model, noise, diffusion, steps):
        assert_close(found, wanted)


@pytest.mark.parametrize("respacing", ["7", "3,10,2"])
def test_unequal_steps(noise: Tensor, respacing: str) -> None:
    """Steps of one's own: UniPC takes none, so they are put in, with their sigma = sqrt((1 - a) / a), and 0 at the end."""
    spaced = GaussianDiffusion(respacing=respacing, learn_sigma=False)  # to a sampler "7" would be 7, that is "solver7"
    alphas = spaced.alphas_cumprod[::-1]
    schedulers = {"dpmpp_2m": DPMSolverMultistepScheduler(**LINEAR), "unipc": UniPCMultistepScheduler(**LINEAR)}
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(spaced.num_steps)
        scheduler.timesteps = torch.from_numpy(spaced.timestep_map[::-1].copy())
        scheduler.sigmas = torch.from_numpy(np.append(np.sqrt((1 - alphas) / alphas), 0.0)).float()
        wanted = run(scheduler, noise)
        for found in both(name, model, noise, spaced):
            assert_close(found, wanted)


@pytest.mark.parametrize("variance", ["learned_range", "fixed_large"])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_ddpm(noise: Tensor, prediction: Prediction, variance: str) -> None:
    network = learned if variance == "learned_range" else model
    diffusion = GaussianDiffusion(respacing=10, prediction=prediction, learn_sigma=network is learned)
    scheduler = DDPMScheduler(
        **LINEAR,
        variance_type=variance,
        clip_sample=False,
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(timesteps=diffusion.timestep_map[::-1].tolist())
    step_noise = torch.randn(10, *SHAPE, generator=torch.Generator().manual_seed(1))
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", side_effect=list(step_noise)) as drawn:
        wanted = run(scheduler, noise, network)
    assert drawn.call_count == 9  # the step to data adds none
    for found in both("ddpm", network, noise, diffusion, step_noise=step_noise):
        assert_close(found, wanted)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_ddim(noise: Tensor, prediction: Prediction, eta: float) -> None:
    diffusion = GaussianDiffusion(respacing="ddim10", prediction=prediction, learn_sigma=False)
    scheduler = DDIMScheduler(
        **LINEAR, clip_sample=False, set_alpha_to_one=True, prediction_type=PREDICTIONS[prediction], timestep_spacing="leading"
    )
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == diffusion.timestep_map[::-1].tolist()
    step_noise = torch.randn(10, *SHAPE, generator=torch.Generator().manual_seed(1))
    # diffusers adds noise in the step to data too, of variance 0.
    with mock.patch("diffusers.schedulers.scheduling_ddim.randn_tensor", side_effect=list(step_noise)):
        wanted = run(scheduler, noise, eta=eta)
    for found in both("ddim", model, noise, diffusion, eta=eta, step_noise=step_noise):
        assert_close(found, wanted)


@pytest.mark.parametrize(
    ("name", "scheduler_class"), [("euler", FlowMatchEulerDiscreteScheduler), ("heun", FlowMatchHeunDiscreteScheduler)]
)
def test_flow(noise: Tensor, name: str, scheduler_class: Any) -> None:
    scheduler = scheduler_class(num_train_timesteps=1000, shift=1.0)
    sigmas = torch.linspace(1, 0, 9)
    if name == "euler":
        scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    else:  # which takes no sigmas of one's own, and has each in the middle twice
        scheduler.set_timesteps(8)
        scheduler.sigmas = torch.cat((sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]))
        scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
    wanted = run(scheduler, noise)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return model(x, 1000 * t)

    for found in (
        sample(name, network, noise, 8, FlowMatching()),
        run_program(sampler_program(FlowMatching(), name, steps=8), network, noise),
    ):
        assert_close(found, wanted)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_sde(noise: Tensor, steps: int) -> None:
    """Euler-Maruyama on dx = (v - w score / 2) dt + sqrt(w) dW (SiT, arXiv 2401.08740) with w = 2 t as in REPA, from t = 1 to
    0.04, and then one step of the drift alone."""
    times = [*np.linspace(1, 0.04, steps), 0.0]
    step_noise = torch.randn(steps, *SHAPE, generator=torch.Generator().manual_seed(1))
    x = noise.double()
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        velocity = model(x, torch.full((2,), 1000 * t, dtype=torch.float64))
        alpha, sigma, d_alpha, d_sigma = 1 - t, t, -1.0, 1.0
        # SiT's score from the velocity, for any path alpha x0 + sigma eps.
        score = (alpha * velocity - d_alpha * x) / (sigma * (d_alpha * sigma - alpha * d_sigma))
        x = x + (velocity - 0.5 * (2 * t) * score) * (t_next - t)
        if i < steps - 1:
            x = x + math.sqrt(2 * t * abs(t_next - t)) * step_noise[i].double()

    def network(x: Tensor, t: Tensor) -> Tensor:
        return model(x, 1000 * t)

    exact = sample("sde", network, noise.double(), steps, FlowMatching(), step_noise=step_noise)
    torch.testing.assert_close(exact, x, rtol=0, atol=1e-10)
    assert_close(
        run_program(sampler_program(FlowMatching(), "sde", steps=steps), network, noise, step_noise=step_noise), x.float()
    )


# -- what they are good for ----------------------------------------------------------------------------------------------------


def test_second_order_samplers_need_fewer_steps() -> None:
    """For a mixture of three normal distributions the exact output is known; the ODE's solution is DDIM's over all steps."""
    full = GaussianDiffusion(learn_sigma=False)
    alphas = torch.from_numpy(full.alphas_cumprod)
    means, std = torch.tensor([-0.8, 0.3, 1.2], dtype=torch.float64), 0.15

    def network(x: Tensor, t: Tensor) -> Tensor:
        a = alphas[t].view(-1, 1, 1, 1)
        away, variance = x[..., None] - a.sqrt() * means, a * std**2 + 1 - a
        return ((1 - a).sqrt() * away / variance * (-(away**2) / (2 * variance)).softmax(-1)).sum(-1)

    noise = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = sample("ddim", network, noise, None, full)

    def error(name: str, steps: int) -> float:
        return float((sample(name, network, noise, steps, full) - exact).square().mean().sqrt())

    for name in ("dpmpp_2m", "unipc"):
        assert error(name, 10) < 0.75 * error("ddim", 10)
        assert error(name, 50) < 0.75 * error("ddim", 50)


def test_the_sde_keeps_the_distribution() -> None:
    """For data N(m, s^2) the exact velocity is known; the statistical error of 10,000 numbers is 0.003 in the mean."""
    mean, std = 0.5, 0.3

    def network(x: Tensor, t: Tensor) -> Tensor:
        t = t.view(-1, 1, 1)
        total = ((1 - t) * std) ** 2 + t**2
        return -mean + (t - (1 - t) * std**2) / total * (x - (1 - t) * mean)

    noise = torch.randn(4, 50, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = sample("sde", network, noise, 400, FlowMatching(), torch.Generator().manual_seed(1))
    assert x.mean().item() == pytest.approx(mean, abs=0.012) and x.std().item() == pytest.approx(std, abs=0.012)
