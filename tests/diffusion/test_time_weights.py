"""Weights of the loss by time, against their formulas and against what they are meant to do."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from textok_fast.diffusion import FlowMatching, GaussianDiffusion
from textok_fast.errors import InputError

STEPS = torch.tensor([0, 3, 40, 250, 500, 777, 999])


def snr(diffusion: GaussianDiffusion, t: Tensor) -> Tensor:
    a = torch.from_numpy(diffusion.alphas_cumprod)[t]
    return a / (1 - a)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_has_its_formula_for_each_prediction(gamma: float) -> None:
    """min(SNR, gamma) of the data, over SNR for the noise, over SNR + 1 for v."""
    for prediction, divided_by in (("x0", lambda s: 1), ("epsilon", lambda s: s), ("v", lambda s: s + 1)):
        diffusion = GaussianDiffusion(prediction=prediction, learn_sigma=False)  # type: ignore[arg-type]
        ratio = snr(diffusion, STEPS)
        expected = torch.minimum(ratio, torch.tensor(gamma, dtype=torch.float64)) / divided_by(ratio)
        torch.testing.assert_close(diffusion.min_snr_weight(STEPS, gamma), expected)


def test_min_snr_weighs_the_same_error_of_the_data_alike_whatever_is_predicted() -> None:
    """Three models that are wrong about the same data by the same amount have the same weighted loss."""
    x0, noise, wrong = (torch.randn(7, 3, 4, dtype=torch.float64) for _ in range(3))
    losses = []
    for prediction in ("x0", "epsilon", "v"):
        diffusion = GaussianDiffusion(prediction=prediction, learn_sigma=False)  # type: ignore[arg-type]
        a = torch.from_numpy(diffusion.alphas_cumprod)[STEPS].view(-1, 1, 1)
        x_t = diffusion.add_noise(x0, noise, STEPS)
        believed = x0 + wrong
        output = {
            "x0": believed,
            "epsilon": (x_t - a.sqrt() * believed) / (1 - a).sqrt(),
            "v": (a.sqrt() * x_t - believed) / (1 - a).sqrt(),
        }[prediction]
        weight = diffusion.min_snr_weight(STEPS)
        terms = diffusion.training_losses(lambda x, t, out=output: out, x0, STEPS, noise, weight=weight)  # type: ignore[misc]
        assert torch.equal(terms["loss"], weight * terms["mse"])
        losses.append(terms["loss"])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-8, atol=1e-12)


def test_min_snr_leaves_the_variance_s_own_loss_as_it_is() -> None:
    diffusion = GaussianDiffusion(learn_sigma=True)
    x0, noise, output = torch.randn(7, 3, 4), torch.randn(7, 3, 4), torch.randn(7, 3, 8)
    plain = diffusion.training_losses(lambda x, t: output, x0, STEPS, noise)
    weight = diffusion.min_snr_weight(STEPS)
    weighted = diffusion.training_losses(lambda x, t: output, x0, STEPS, noise, weight=weight)
    assert torch.equal(weighted["vb"], plain["vb"]) and torch.equal(weighted["mse"], plain["mse"])
    torch.testing.assert_close(weighted["loss"], weight.float() * plain["mse"] + plain["vb"])
    with pytest.raises(InputError, match="above 0, got 0"):
        diffusion.min_snr_weight(STEPS, 0.0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (0.8, 1.4)])
def test_logit_normal_density_is_that_of_its_times(mean: float, std: float) -> None:
    flow = FlowMatching("logit_normal", mean, std)
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    density = flow.logit_normal_density(t)
    assert density[0] == density[-1] == 0
    assert float(torch.trapezoid(density, t)) == pytest.approx(1, abs=1e-6)
    # Its integral is the normal distribution function of (logit(t) - mean) / std.
    for end in (0.1, 0.5, 0.9):
        below = float(torch.trapezoid(torch.where(t <= end, density, 0), t))
        z = (math.log(end / (1 - end)) - mean) / std
        assert below == pytest.approx(0.5 * (1 + math.erf(z / math.sqrt(2))), abs=1e-4)
    drawn = flow.logit_normal(torch.randn(40_000, generator=torch.Generator().manual_seed(0))).double().numpy()
    counts, edges = np.histogram(drawn, bins=10, range=(0, 1))
    middle = [float(torch.trapezoid(torch.where((t > a) & (t <= b), density, 0), t)) for a, b in itertools.pairwise(edges)]
    assert counts / 40_000 == pytest.approx(middle, abs=0.01)


def test_weights_at_uniform_times_have_the_expectation_of_logit_normal_times() -> None:
    flow = FlowMatching("logit_normal", 0.3, 1.2)
    x0, noise = (torch.randn(1, 2, 3, dtype=torch.float64).expand(100_000, 2, 3) for _ in range(2))

    def model(x: Tensor, t: Tensor) -> Tensor:  # an error that depends on the time
        return noise - x0 + (1 + t.double().view(-1, 1, 1)) ** 2

    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(100_000, generator=generator, dtype=torch.float64)
    weighted = flow.training_losses(model, x0, uniform, noise, weight=flow.logit_normal_density(uniform))
    assert torch.equal(weighted["loss"], flow.logit_normal_density(uniform) * weighted["mse"])
    drawn = flow.training_losses(model, x0, flow.logit_normal(torch.randn(100_000, generator=generator)), noise)
    assert float(weighted["loss"].mean()) == pytest.approx(float(drawn["loss"].mean()), rel=0.01)
    assert float(weighted["mse"].mean()) != pytest.approx(float(drawn["loss"].mean()), rel=0.01)
