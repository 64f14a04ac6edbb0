"""Flow matching, and the order of its ODE samplers on an equation whose solution is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from textok_fast.diffusion import FlowMatching, sample, sample_euler, sample_heun
from textok_fast.errors import InputError


def test_path_ends_at_data_and_noise() -> None:
    flow = FlowMatching()
    x0, noise = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    assert torch.equal(flow.add_noise(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(flow.add_noise(x0, noise, torch.ones(2)), noise)
    t = torch.tensor([0.2, 0.9])
    x_t = flow.add_noise(x0, noise, t)
    torch.testing.assert_close(flow.predict_x0(x_t, flow.velocity(x0, noise), t), x0)
    # The velocity is the derivative of the path in t.
    later = flow.add_noise(x0.double(), noise.double(), t.double() + 1e-6)
    now = flow.add_noise(x0.double(), noise.double(), t.double())
    torch.testing.assert_close((later - now) / 1e-6, flow.velocity(x0, noise).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (3, 5, 6)])
def test_loss_is_zero_for_the_velocity_and_its_square_otherwise(shape: tuple[int, ...]) -> None:
    flow = FlowMatching()
    x0, noise = torch.randn(shape), torch.randn(shape)
    t = torch.rand(3)
    assert torch.equal(flow.training_losses(lambda x, t: noise - x0, x0, t, noise)["loss"], torch.zeros(3))
    off = flow.training_losses(lambda x, t: noise - x0 + 2, x0, t, noise)["loss"]
    torch.testing.assert_close(off, torch.full((3,), 4.0))


def test_draws_are_reproducible_and_of_the_named_distribution() -> None:
    x0 = torch.randn(4, 5, 6)
    first, second = (
        FlowMatching("logit_normal").training_losses(lambda x, t: x, x0, generator=torch.Generator().manual_seed(7))["loss"]
        for _ in range(2)
    )
    assert torch.equal(first, second)
    uniform = FlowMatching().sample_times(20_000, torch.Generator().manual_seed(0))
    assert uniform.min() >= 0 and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01) and uniform.var().item() == pytest.approx(1 / 12, abs=0.003)
    logits = FlowMatching("logit_normal", 0.4, 1.5).sample_times(20_000, torch.Generator().manual_seed(0)).logit()
    assert logits.mean().item() == pytest.approx(0.4, abs=0.05) and logits.std().item() == pytest.approx(1.5, abs=0.05)
    with pytest.raises(InputError, match="cosine"):
        FlowMatching("cosine")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="-1"):
        FlowMatching("logit_normal", logit_std=-1)


def test_output_of_the_wrong_shape() -> None:
    with pytest.raises(InputError, match=r"\(2, 5, 12\)"):
        FlowMatching().training_losses(lambda x, t: torch.cat((x, x), 2), torch.randn(2, 5, 6))
    with pytest.raises(InputError, match=r"\(2, 5, 12\)"):
        sample_euler(lambda x, t: torch.cat((x, x), 2), torch.randn(2, 5, 6), 4)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    """dx/dt = cos(3 t) x has x(0) = x(1) exp(-sin(3) / 3); halving the step divides the error by 2 to the order."""
    noise = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def field(x: Tensor, t: Tensor) -> Tensor:
        return torch.cos(3 * t).view(-1, 1, 1) * x

    exact = noise * math.exp(-math.sin(3) / 3)
    errors = [(sample(name, field, noise, steps, FlowMatching()) - exact).abs().max().item() for steps in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_a_straight_path_needs_one_step(sampler) -> None:  # type: ignore[no-untyped-def]
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for steps in (1, 5):
        torch.testing.assert_close(sampler(lambda x, t: noise - x0, noise, steps), x0, rtol=0, atol=1e-6)


def test_part_of_the_path_and_progress() -> None:
    x0, noise = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    flow, seen = FlowMatching(), []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == t.dtype == torch.float32 and t.shape == (2,)
        seen.append(t[0].item())
        return noise - x0

    told: list[tuple[int, int]] = []
    start = flow.add_noise(x0, noise, torch.full((2,), 0.75))
    result = sample_euler(model, start, 2, t_start=0.75, t_end=0.25, progress=lambda done, total: told.append((done, total)))
    torch.testing.assert_close(result, flow.add_noise(x0, noise, torch.full((2,), 0.25)))
    assert seen == [0.75, 0.5]
    assert told == [(1, 2), (2, 2)]


def test_impossible_times() -> None:
    noise = torch.randn(2, 5, 6)
    with pytest.raises(InputError, match="got 0"):
        sample("euler", lambda x, t: x, noise, 0)
    with pytest.raises(InputError, match=r"0\.2 to 0\.6"):
        sample("heun", lambda x, t: x, noise, 4, t_start=0.2, t_end=0.6)
    with pytest.raises(InputError, match="ddim50"):
        sample("heun", lambda x, t: x, noise, "ddim50")
    with pytest.raises(InputError, match="trained as flow; use euler, heun"):
        sample("ddpm", lambda x, t: x, noise, 4, FlowMatching())
