"""A loop over a step table gives the samples that the samplers give."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from textok_fast.diffusion import (
    FlowMatching,
    GaussianDiffusion,
    StepTable,
    guided,
    sample_ddim,
    sample_ddpm,
    sample_euler,
    step_table,
)
from textok_fast.diffusion.gaussian import Prediction
from textok_fast.errors import InputError
from textok_fast.ops.guided import guided_step

SHAPES = [(2, 5, 4), (2, 4, 3, 3)]  # tokens and images of 4 channels


class FakeModel:
    """A smooth function of x, t and a condition (B,), with a variance in [-1, 1] in twice the channels where it is learned."""

    def __init__(self, learned: bool) -> None:
        self.learned = learned

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        rows = (-1,) + (1,) * (x.ndim - 1)
        output = torch.sin(x * condition.view(rows) + t.to(x.dtype).view(rows) / 300)
        return torch.cat((output, output.cos() * 2 - 1), 1 if x.ndim == 4 else 2) if self.learned else output


def loop(
    steps: StepTable,
    model: FakeModel,
    noise: Tensor,
    step_noise: Tensor | None,
    pair: bool,
    channels: int | None,
    clip: bool,
) -> Tensor:
    """What a captured loop does: the model, then one step with the row that a counter says."""
    condition, null = torch.tensor([0.5, 1.5]), torch.tensor([0.9, 0.9])
    merged = torch.cat((condition, null)) if pair else condition
    x = noise
    for row, time in enumerate(steps.times):
        both = torch.cat((x, x)) if pair else x
        output = model(both, time.expand(len(both)), merged.to(x.dtype))
        fresh = None if step_noise is None else step_noise[row].to(x.dtype)
        x = guided_step(output, x, steps.table, torch.tensor(row), fresh, guided_channels=channels, clip_denoised=clip)
    return x


def sampler_model(model: FakeModel, scale: float, interval: Any, channels: int | None, dtype: torch.dtype) -> Any:
    condition, null = torch.tensor([0.5, 1.5], dtype=dtype), torch.tensor([0.9, 0.9], dtype=dtype)
    return guided(model, condition, null, scale, interval, channels)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """To float32: in it, or in float64 with a table of float32."""
    torch.testing.assert_close(found, wanted, atol=2e-5 * max(1.0, wanted.abs().max().item()), rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim eta"])
def test_gaussian(prediction: Prediction, learned: bool, shape: tuple[int, ...], sampler: str) -> None:
    diffusion = GaussianDiffusion(respacing="7", prediction=prediction, learn_sigma=learned)
    eta = 0.7 if sampler == "ddim eta" else 0.0
    model = FakeModel(learned)
    every = itertools.product((False, True), (None, 3), (None, (200, 700)), (1.0, 2.5), (torch.float32, torch.float64))
    for clip, channels, interval, scale, dtype in every:
        # Float32 loses what a step of eps from almost pure noise multiplies by 157, unless it is clamped.
        if dtype == torch.float32 and not clip and prediction == "epsilon":
            continue
        noise, step_noise = torch.randn(shape, dtype=dtype), torch.randn(7, *shape)
        plain = sampler_model(model, scale, interval, channels, dtype)
        options: dict[str, Any] = {"step_noise": step_noise, "clip_denoised": clip}
        if sampler == "ddpm":
            wanted = sample_ddpm(diffusion, plain, noise, **options)
        else:
            wanted = sample_ddim(diffusion, plain, noise, eta=eta, **options)
        steps = step_table(diffusion, sampler[:4], scale, interval, eta=eta)
        assert steps.table.shape == (7, 8) and steps.table.dtype == torch.float32 and steps.times.dtype == torch.int64
        fresh = None if sampler == "ddim" else step_noise
        assert_same(loop(steps, model, noise, fresh, scale != 1, channels, clip), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("t_start", "t_end"), [(1.0, 0.0), (0.9, 0.2)])
def test_euler(shape: tuple[int, ...], t_start: float, t_end: float) -> None:
    model = FakeModel(False)
    for channels, interval, dtype in itertools.product((None, 3), (None, (0.3, 0.6)), (torch.float32, torch.float64)):
        noise = torch.randn(shape, dtype=dtype)
        plain = sampler_model(model, 2.5, interval, channels, dtype)
        wanted = sample_euler(plain, noise, 6, t_start=t_start, t_end=t_end)
        steps = step_table(FlowMatching(), "euler", 2.5, interval, steps=6, t_start=t_start, t_end=t_end)
        assert_same(loop(steps, model, noise, None, True, channels, False), wanted)


def test_rows_are_in_the_order_of_use() -> None:
    diffusion = GaussianDiffusion(respacing="5")
    steps = step_table(diffusion, "ddpm", [5.0, 4.0, 3.0, 2.0, 1.5])
    assert steps.times.tolist() == diffusion.timestep_map[::-1].tolist()
    assert steps.table[:, 0].tolist() == [5.0, 4.0, 3.0, 2.0, 1.5]
    assert steps.table[:, 7].tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert steps.table[-1, 3:5].tolist() == [1.0, 0.0]  # the last step gives the predicted data
    respaced = step_table(GaussianDiffusion(), "ddpm", [5.0, 4.0, 3.0, 2.0, 1.5], steps="5")
    assert torch.equal(respaced.table, steps.table) and torch.equal(respaced.times, steps.times)
    moved = steps.to("cpu")
    assert isinstance(moved, StepTable) and torch.equal(moved.table, steps.table)


def test_scales_as_a_tensor() -> None:
    diffusion, scales = GaussianDiffusion(respacing="3"), [3.0, 2.5, 2.0]
    for given in (torch.tensor(scales), torch.tensor(scales, requires_grad=True), [torch.tensor(scale) for scale in scales]):
        assert torch.equal(step_table(diffusion, "ddpm", given).table, step_table(diffusion, "ddpm", scales).table)
    assert torch.equal(step_table(diffusion, "ddpm", torch.tensor(2)).table, step_table(diffusion, "ddpm", 2).table)


def test_outside_the_interval_the_scale_is_1() -> None:
    steps = step_table(FlowMatching(), "euler", 3.0, (0.25, 0.75), steps=8)
    assert steps.times.tolist() == [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert steps.table[:, 0].tolist() == [1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 1.0]


def test_a_step_beyond_the_table_is_nan() -> None:
    steps = step_table(GaussianDiffusion(respacing="3", learn_sigma=False))
    x = torch.randn(2, 5, 4)
    for index in (-1, 3):
        assert guided_step(x, x, steps.table, torch.tensor(index), x).isnan().all()
    assert guided_step(x, x, steps.table, torch.tensor(2), x * math.nan).isfinite().all()  # the step to data adds no noise


@pytest.mark.parametrize("respacing", ["1", "2"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_few_steps(respacing: str, sampler: str) -> None:
    diffusion = GaussianDiffusion(respacing=respacing, prediction="v")
    steps = step_table(diffusion, sampler, eta=1.0 if sampler == "ddim" else 0.0)
    assert steps.table.isfinite().all() and len(steps.table) == len(steps.times) == int(respacing)


def test_what_does_not_fit_is_refused() -> None:
    gaussian, flow = GaussianDiffusion(respacing="4"), FlowMatching()
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (gaussian, {"sampler": "euler"}, "takes the sampler 'ddpm' or 'ddim', got 'euler'"),
        (flow, {"sampler": "heun", "steps": 4}, "takes the sampler 'euler', got 'heun'"),
        (flow, {"sampler": "euler"}, "'euler' takes a number of steps, got None"),
        (flow, {"sampler": "euler", "steps": 0}, "at least 1 step, got 0"),
        (flow, {"sampler": "euler", "steps": 2, "t_end": 1.0}, "times run from t_start down to t_end"),
        (gaussian, {"sampler": "ddim", "eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
        (gaussian, {"guidance_scale": [1.0, 2.0]}, "guidance_scale has 2 entries, wanted 4, one for each step"),
        (gaussian, {"guidance_scale": torch.ones(3)}, "guidance_scale has 3 entries, wanted 4, one for each step"),
        (gaussian, {"guidance_scale": torch.ones(4, 1)}, r"a number, or one for each step, got shape \(4, 1\)"),
        (gaussian, {"guidance_scale": "strong"}, "a number, or one for each step, got 'strong'"),
        (gaussian, {"guidance_scale": None}, "a number, or one for each step, got None"),
        (gaussian, {"interval": (3, 1)}, r"a guidance interval is \(low, high\) with low <= high"),
    ]
    for diffusion, options, message in wrong:
        with pytest.raises(InputError, match=message):
            step_table(diffusion, **options)
