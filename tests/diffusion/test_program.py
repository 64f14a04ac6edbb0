"""A loop over a sampler's numbers gives the samples that the samplers give."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from textok_fast.diffusion import (
    SAMPLERS,
    FlowMatching,
    GaussianDiffusion,
    SamplerProgram,
    StopSampling,
    guided,
    run_program,
    sample,
    sampler_program,
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
    program: SamplerProgram,
    model: FakeModel,
    noise: Tensor,
    step_noise: Tensor,
    channels: int | None = None,
    clip: bool = False,
) -> Tensor:
    """What an engine does: the model, alone where nothing is guided, then one row, then the mixture of what is kept."""
    condition, null = torch.tensor([0.5, 1.5]), torch.tensor([0.9, 0.9])
    state = torch.stack([noise, *[torch.zeros_like(noise)] * (program.slots - 1)])  # (S, B, ...)
    for index, time in enumerate(program.times):
        pair = program.guided[index]
        x = torch.cat((state[0], state[0])) if pair else state[0]
        output = model(x, time.expand(len(x)), (torch.cat((condition, null)) if pair else condition).to(x.dtype))
        fresh = step_noise[index].to(x.dtype) if program.noisy[index] else None
        row = torch.tensor(index)
        h = guided_step(output, state[0], program.table, row, fresh, guided_channels=channels, clip_denoised=clip)
        if program.mix is None:
            state = h[None]
        else:
            parts = torch.cat((state, h[None], step_noise[index].to(x.dtype)[None]))  # (S + 2, B, ...)
            state = torch.tensordot(program.mix[index].to(x.dtype), parts, 1)  # (S, B, ...)
    return state[0]


def sampler_model(model: FakeModel, scale: float, interval: Any, channels: int | None, dtype: torch.dtype) -> Any:
    condition, null = torch.tensor([0.5, 1.5], dtype=dtype), torch.tensor([0.9, 0.9], dtype=dtype)
    return guided(model, condition, null, scale, interval, channels)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """To float32: in it, or in float64 with a table of float32."""
    torch.testing.assert_close(found, wanted, atol=2e-5 * max(1.0, wanted.abs().max().item()), rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim eta", "dpmpp_2m", "unipc"])
def test_gaussian(prediction: Prediction, learned: bool, shape: tuple[int, ...], name: str) -> None:
    respacing = "solver7" if name in ("dpmpp_2m", "unipc") else "7"
    diffusion = GaussianDiffusion(respacing=respacing, prediction=prediction, learn_sigma=learned)
    model, sampler, eta = FakeModel(learned), name.split()[0], 0.7 if name == "ddim eta" else 0.0
    extra: dict[str, Any] = {"eta": eta} if sampler == "ddim" else {}
    guidance = [(1.0, None, None), (2.5, None, 3), (2.5, (200, 700), None)]
    for clip, (scale, interval, channels), dtype in itertools.product((False, True), guidance, (torch.float32, torch.float64)):
        # Float32 loses what a step of eps from almost pure noise multiplies by 157, unless it is clamped.
        if dtype == torch.float32 and not clip and prediction == "epsilon":
            continue
        noise, step_noise = torch.randn(shape, dtype=dtype), torch.randn(7, *shape)
        plain = sampler_model(model, scale, interval, channels, dtype)
        wanted = sample(sampler, plain, noise, None, diffusion, step_noise=step_noise, clip_denoised=clip, **extra)
        program = sampler_program(diffusion, sampler, scale, interval, eta=eta)
        assert program.table.shape == (7, 8) and program.table.dtype == torch.float32 and program.times.dtype == torch.int64
        assert_same(loop(program, model, noise, step_noise, channels, clip), wanted)
        if sampler in ("ddpm", "ddim"):  # whose samplers are loops of their own
            assert_same(run_program(program, plain, noise, step_noise=step_noise, clip_denoised=clip), wanted)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("t_start", "t_end"), [(1.0, 0.0), (0.9, 0.02)])
def test_flow(sampler: str, shape: tuple[int, ...], t_start: float, t_end: float) -> None:
    model, times = FakeModel(False), {"t_start": t_start, "t_end": t_end}
    for channels, interval, dtype in itertools.product((None, 3), (None, (0.3, 0.6)), (torch.float32, torch.float64)):
        noise, step_noise = torch.randn(shape, dtype=dtype), torch.randn(11, *shape)
        plain = sampler_model(model, 2.5, interval, channels, dtype)
        program = sampler_program(FlowMatching(), sampler, 2.5, interval, steps=6, **times)
        assert (program.steps, program.evaluations) == (6, 11 if sampler == "heun" else 6)
        step_noise = step_noise[: program.evaluations]
        extra: dict[str, Any] = {"step_noise": step_noise} if sampler == "sde" else {}
        wanted = sample(sampler, plain, noise, 6, FlowMatching(), **times, **extra)
        assert_same(loop(program, model, noise, step_noise, channels), wanted)
        assert_same(run_program(program, plain, noise, step_noise=step_noise), wanted)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_what_a_program_says_of_itself(sampler: str) -> None:
    flow = SAMPLERS[sampler] == "flow"
    program = sampler_program(FlowMatching() if flow else GaussianDiffusion(), sampler, steps=4)
    count = 7 if sampler == "heun" else 4
    assert program.steps == 4 and program.evaluations == count
    assert program.table.shape == (count, 8) and program.times.shape == (count,)
    assert program.slots == {"dpmpp_2m": 2, "unipc": 3, "heun": 2}.get(sampler, 1)
    if program.mix is not None:
        assert program.mix.shape == (count, program.slots, program.slots + 2) and program.mix.dtype == torch.float32
        assert program.table[:, 3:].tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]] * count  # so that a row gives the predicted data
        assert not program.mix[0, :, 1 : program.slots].any()  # nothing is read that no evaluation wrote
    assert program.noisy == ((True, True, True, False) if sampler in ("ddpm", "sde") else (False,) * count)
    assert program.guided == (False,) * count
    moved = program.to("cpu")
    assert torch.equal(moved.table, program.table) and moved.noisy == program.noisy


def test_rows_are_in_the_order_of_use() -> None:
    diffusion = GaussianDiffusion(respacing="5")
    program = sampler_program(diffusion, "ddpm", [5.0, 4.0, 3.0, 1.0, 1.5])
    assert program.times.tolist() == diffusion.timestep_map[::-1].tolist()
    assert program.table[:, 0].tolist() == [5.0, 4.0, 3.0, 1.0, 1.5]
    assert program.guided == (True, True, True, False, True)
    assert program.table[:, 7].tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert program.table[-1, 3:5].tolist() == [1.0, 0.0]  # the last step gives the predicted data
    respaced = sampler_program(GaussianDiffusion(), "ddpm", [5.0, 4.0, 3.0, 1.0, 1.5], steps="5")
    assert torch.equal(respaced.table, program.table) and torch.equal(respaced.times, program.times)


def test_scales_as_a_tensor() -> None:
    diffusion, scales = GaussianDiffusion(respacing="3"), [3.0, 2.5, 2.0]
    for given in (torch.tensor(scales), torch.tensor(scales, requires_grad=True), [torch.tensor(scale) for scale in scales]):
        assert torch.equal(sampler_program(diffusion, "ddpm", given).table, sampler_program(diffusion, "ddpm", scales).table)
    assert torch.equal(sampler_program(diffusion, "ddpm", torch.tensor(2)).table, sampler_program(diffusion, "ddpm", 2).table)


def test_outside_the_interval_the_scale_is_1() -> None:
    program = sampler_program(FlowMatching(), "euler", 3.0, (0.25, 0.75), steps=8)
    assert program.times.tolist() == [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert program.table[:, 0].tolist() == [1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 1.0]
    assert program.guided == (False, False, True, True, True, True, True, False)
    heun = sampler_program(FlowMatching(), "heun", 3.0, (0.25, 0.5), steps=4)
    assert heun.times.tolist() == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert heun.guided == (False, False, False, True, True, True, True)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_an_intervals_ends_are_inside_though_times_are_rounded(sampler: str) -> None:
    program = sampler_program(FlowMatching(), sampler, 3.0, (0.1, 0.3), steps=10)
    times = program.times.tolist()
    if sampler != "sde":
        assert 0.3 < max(time for time in times if time < 0.35) < 0.3 + 1e-9  # rounded up
    assert program.guided == tuple(0.0999 < time < 0.3001 for time in times)
    model = guided(lambda x, t, of: of.view(-1, 1, 1).expand_as(x), torch.ones(1), torch.zeros(1), 3.0, (0.1, 0.3))
    x = torch.zeros(1, 2, 4)
    for time, inside in zip(times, program.guided, strict=True):  # what samplers ask, and what anybody may ask
        assert float(model.at_time(time)(x, torch.tensor([time])).max()) == (3.0 if inside else 1.0)
        for dtype in (torch.float32, torch.float64):
            assert float(model(x, torch.tensor([time], dtype=dtype)).max()) == (3.0 if inside else 1.0)
    assert float(model(x, torch.tensor([0.3001])).max()) == 1.0


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_number_of_steps_is_a_number_in_any_form(sampler: str) -> None:
    diffusion = FlowMatching() if SAMPLERS[sampler] == "flow" else GaussianDiffusion(learn_sigma=False)
    noise, step_noise = torch.randn(2, 5, 4), torch.randn(7, 2, 5, 4)
    model, told = lambda x, t: 0.3 * torch.sin(x), list[tuple[int, int]]()
    extra: dict[str, Any] = {} if sampler in ("euler", "heun") else {"step_noise": step_noise}
    program = sampler_program(diffusion, sampler, steps=7)
    wanted = sample(sampler, model, noise, 7, diffusion, **extra)
    for steps in (np.int64(7), np.uint8(7), "7", " 07", torch.tensor(7)):
        found = sampler_program(diffusion, sampler, steps=steps)  # type: ignore[arg-type]
        assert torch.equal(found.times, program.times) and torch.equal(found.table, program.table)
        assert found.steps == 7 and type(found.steps) is int
        assert torch.equal(sample(sampler, model, noise, steps, diffusion, **extra), wanted)  # type: ignore[arg-type]
    sample(sampler, model, noise, np.int64(7), diffusion, progress=lambda *of: told.append(of), **extra)  # type: ignore[arg-type]
    assert [type(number) for number in told[-1]] == [int, int] and told[-1][0] == told[-1][1]


def test_a_step_beyond_the_table_is_nan() -> None:
    program = sampler_program(GaussianDiffusion(respacing="3", learn_sigma=False))
    x = torch.randn(2, 5, 4)
    for index in (-1, 3):
        assert guided_step(x, x, program.table, torch.tensor(index), x).isnan().all()
    assert guided_step(x, x, program.table, torch.tensor(2), x * math.nan).isfinite().all()  # no noise in the step to data


@pytest.mark.parametrize("steps", [1, 2, 999])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_few_steps_and_many(steps: int, sampler: str) -> None:
    diffusion = FlowMatching() if SAMPLERS[sampler] == "flow" else GaussianDiffusion(prediction="v")
    program = sampler_program(diffusion, sampler, steps=steps, eta=1.0 if sampler == "ddim" else 0.0)
    assert program.table.isfinite().all() and (program.mix is None or program.mix.isfinite().all())
    if sampler == "sde":  # whose last step goes to a mean that still has some of the noise
        return
    # Where the model knows the data, every other sampler ends there.
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    index_of = {time: index for index, time in enumerate(program.times.float().tolist())}

    def knows(x: Tensor, t: Tensor) -> Tensor:
        _, kx, km = program.table[index_of[t[0].item()], :3]  # the first of two evaluations at one time has the same numbers
        output = (x0 - kx * x) / km
        return output if SAMPLERS[sampler] == "flow" else torch.cat((output, output), 2)

    torch.testing.assert_close(run_program(program, knows, noise), x0, atol=1e-3, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    gaussian, flow = GaussianDiffusion(respacing="4"), FlowMatching()
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (gaussian, {"sampler": "dpm"}, "unknown sampler 'dpm'; known: ddpm, ddim, dpmpp_2m, unipc, euler, heun, sde"),
        (gaussian, {"sampler": "euler"}, "'euler' needs a flow model, .* trained as gaussian; use ddpm, ddim, dpmpp_2m, unipc"),
        (flow, {"sampler": "unipc", "steps": 4}, "'unipc' needs a gaussian model, .* use euler, heun, sde"),
        (flow, {"sampler": "euler"}, "'euler' takes a number of steps, got None"),
        (flow, {"sampler": "euler", "steps": 0}, "at least 1 step, got 0"),
        (flow, {"sampler": "euler", "steps": 2, "t_end": 1.0}, "times run from t_start down to t_end"),
        (flow, {"sampler": "sde", "steps": 2, "t_end": 0.04}, "last step of sampler 'sde' begins at 0.04, .* 0.04 to 1.0"),
        (gaussian, {"sampler": "ddim", "eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
        (gaussian, {"guidance_scale": [1.0, 2.0]}, "guidance_scale has 2 entries, wanted 4, one for each evaluation"),
        (gaussian, {"guidance_scale": torch.ones(3)}, "guidance_scale has 3 entries, wanted 4, one for each evaluation"),
        (gaussian, {"guidance_scale": torch.ones(4, 1)}, r"a number, or one for each evaluation, got shape \(4, 1\)"),
        (gaussian, {"guidance_scale": "strong"}, "a number, or one for each evaluation, got 'strong'"),
        (gaussian, {"guidance_scale": None}, "a number, or one for each evaluation, got None"),
        (gaussian, {"guidance_scale": math.nan}, "guidance_scale must be finite, got nan"),
        (gaussian, {"guidance_scale": [1.0, 2.0, math.inf, 1.0]}, "guidance_scale must be finite, got .*inf"),
        (gaussian, {"interval": (3, 1)}, r"a guidance interval is \(low, high\) with low <= high"),
        (gaussian, {"sampler": "ddpm", "eta": 0.5}, "eta is ddim's, sampler 'ddpm' has none; got 0.5"),
        (flow, {"sampler": "sde", "steps": 4, "eta": 0.5}, "eta is ddim's, sampler 'sde' has none"),
        (gaussian, {"sampler": "dpmpp_2m", "t_start": 0.5}, "t_start and t_end are a flow's, sampler 'dpmpp_2m' has none"),
        (gaussian, {"t_end": 0.1}, "t_start and t_end are a flow's, sampler 'ddpm' has none; got 1.0 and 0.1"),
        (gaussian, {"sampler": "unipc", "steps": 3.0}, "steps must be an integer or a respacing such as 'ddim50', got 3.0"),
        (gaussian, {"steps": True}, "steps must be an integer or a respacing .* got True"),
        (flow, {"sampler": "euler", "steps": True}, "steps must be an integer or a respacing .* got True"),
        (flow, {"sampler": "euler", "steps": "ddim4"}, "'euler' takes a number of steps, got 'ddim4'"),
    ]
    for diffusion, options, message in wrong:
        with pytest.raises(InputError, match=message):
            sampler_program(diffusion, **options)
    noise, program = torch.randn(2, 5, 4), sampler_program(flow, "sde", steps=3)
    with pytest.raises(InputError, match="2 entries, wanted 3"):
        run_program(program, lambda x, t: x, noise, step_noise=torch.randn(2, 2, 5, 4))
    with pytest.raises(InputError, match=r"the model's output has shape \(2, 5, 3\)"):
        run_program(program, lambda x, t: x[..., :3], noise)


# -- noise ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm", "ddim", "sde"])
def test_a_source_is_asked_for_the_draw_of_each_evaluation(name: str) -> None:
    asked: list[tuple[int, tuple[int, ...]]] = []

    def source(draw: int, shape: Any) -> Tensor:
        asked.append((draw, tuple(shape)))
        return torch.randn(shape, generator=torch.Generator().manual_seed(draw))

    diffusion = FlowMatching() if name == "sde" else GaussianDiffusion(learn_sigma=False, prediction="v")
    noise, extra = source(0, (2, 5, 4)), {"eta": 0.5} if name == "ddim" else {}
    found = sample(name, lambda x, t: 0.3 * torch.sin(x), noise, 4, diffusion, source, **extra)
    assert asked == [(draw, (2, 5, 4)) for draw in range(4)]
    step_noise = torch.stack([source(draw, (2, 5, 4)) for draw in range(1, 5)])
    again = sample(name, lambda x, t: 0.3 * torch.sin(x), noise, 4, diffusion, step_noise=step_noise, **extra)
    assert torch.equal(found, again)
    with pytest.raises(InputError, match=r"the noise source gave \(3,\), wanted \(2, 5, 4\)"):
        sample(name, lambda x, t: x, noise, 4, diffusion, lambda draw, shape: torch.zeros(3), **extra)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_steps_can_be_seen_changed_and_ended(sampler: str) -> None:
    learned = SAMPLERS[sampler] == "gaussian"
    diffusion: Any = GaussianDiffusion() if learned else FlowMatching()
    model = sampler_model(FakeModel(learned), 2.0, None, None, torch.float64)
    noise = torch.randn(SHAPES[0], dtype=torch.float64)
    options: dict[str, Any] = {"diffusion": diffusion, "step_noise": torch.randn(7, *SHAPES[0], dtype=torch.float64)}
    if sampler in ("euler", "heun"):
        del options["step_noise"]
    program = sampler_program(diffusion, sampler, steps=4)
    if "step_noise" in options:
        options["step_noise"] = options["step_noise"][: program.evaluations]
    seen: list[tuple[int, float, Tensor]] = []
    wanted = sample(sampler, model, noise, 4, **options)
    found = sample(sampler, model, noise, 4, on_step=lambda *at: seen.append(at), **options)
    torch.testing.assert_close(found, wanted)
    assert [index for index, *_ in seen] == list(range(program.evaluations))
    assert [time for _, time, _ in seen] == program.times.tolist() and torch.equal(seen[-1][2], found)

    def add_in_the_end(index: int, time: float, x: Tensor) -> Tensor | None:
        return x + 1 if index == program.evaluations - 1 else None

    torch.testing.assert_close(sample(sampler, model, noise, 4, on_step=add_in_the_end, **options), wanted + 1)
    far = sample(sampler, model, noise, 4, on_step=lambda index, time, x: x + 1 if index == 0 else x, **options)
    assert (far - wanted).abs().max() > 1e-3

    def stop(index: int, time: float, x: Tensor) -> None:
        if index == 1:
            raise StopSampling(x)

    torch.testing.assert_close(sample(sampler, model, noise, 4, on_step=stop, **options), seen[1][2])
    with pytest.raises(InputError, match="what on_step returned has shape"):
        sample(sampler, model, noise, 4, on_step=lambda index, time, x: x[:1], **options)
