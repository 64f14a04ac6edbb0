"""Properties of Gaussian diffusion that hold for any weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from textok_fast.diffusion import GaussianDiffusion, ddim_step, ddpm_step, respaced_timesteps, sample, sample_ddim, sample_ddpm
from textok_fast.errors import InputError

SHAPES = [(3, 2, 4, 4), (3, 5, 6)]  # images (B, C, H, W), tokens (B, N, d)


def channel(x: Tensor) -> int:
    return 1 if x.ndim == 4 else 2


def perfect_model(diffusion: GaussianDiffusion, x0: Tensor):  # type: ignore[no-untyped-def]
    """The model that knows the data: every prediction type says the same about it."""
    alphas = torch.from_numpy(diffusion.alphas_cumprod)
    index_of = {int(step): index for index, step in enumerate(diffusion.timestep_map)}

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = torch.stack([alphas[index_of[int(step)]] for step in t]).view(-1, *(1,) * (x.ndim - 1))
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        out = {"epsilon": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[diffusion.prediction]
        return torch.cat((out, torch.zeros_like(out)), channel(x)) if diffusion.learn_sigma else out

    return model


# -- schedules and respacing ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.data())
def test_respacing_of_any_sections(num_steps: int, data: st.DataObject) -> None:
    sections = data.draw(st.integers(1, min(num_steps, 6)))
    sizes = [len(part) for part in np.array_split(np.arange(num_steps), sections)]
    counts = [data.draw(st.integers(0, size)) for size in sizes]
    if not sum(counts):
        counts[0] = 1
    kept = respaced_timesteps(num_steps, ",".join(map(str, counts)))
    assert kept == sorted(set(kept))
    edges = np.cumsum([0, *sizes])
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        inside = [step for step in kept if start <= step < end]
        assert len(inside) == count
        if count > 1:  # spread from the section's first step to its last, as evenly as whole numbers allow
            assert (inside[0], inside[-1]) == (start, end - 1)
            assert np.ptp(np.diff(inside)) <= 1
        elif count == 1:
            assert inside == [start]


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("1001", "1001"),
        (2000, "2000"),
        ("10,400,20", "400"),
        ("ddim300", "ddim300"),
        ("ddimfifty", "ddimfifty"),
        ("solver1000", "from 1 to 999"),
        ("solver0", "solver0"),
        ("solver", "'solver'"),
        ("fast", "fast"),
        ("0", "'0'"),
        ("-5", "-5"),
    ],
)
def test_impossible_schedules_are_named(respacing: str | int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GaussianDiffusion(respacing=respacing)


def test_ddim_error_offers_strides_that_exist() -> None:
    with pytest.raises(InputError) as error:
        respaced_timesteps(1000, "ddim300")
    offered = [word.strip(" ;,") for word in str(error.value).split("near ones:")[1].split()]
    assert len(offered) == 2
    for respacing in offered:
        assert len(respaced_timesteps(1000, respacing)) == int(respacing.removeprefix("ddim"))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", [None, "37", "10,15,20", "ddim50", "solver20", "1"])
def test_respacing_keeps_the_noise_level(schedule: str, respacing: str | None) -> None:
    full = GaussianDiffusion(schedule=schedule)
    spaced = full.respaced(respacing)
    np.testing.assert_allclose(spaced.alphas_cumprod, full.alphas_cumprod[spaced.timestep_map], rtol=1e-9)
    assert (np.diff(spaced.alphas_cumprod) < 0).all()
    assert (spaced.betas > 0).all() and (spaced.betas <= 1).all()
    assert np.isfinite(spaced.posterior_log_variance_clipped).all()
    # The posterior's mean of a noiseless x_t = sqrt(a_t) x0 is the noiseless x_{t-1} = sqrt(a_{t-1}) x0.
    a, a_prev = spaced.alphas_cumprod, spaced.alphas_cumprod_prev
    np.testing.assert_allclose(
        spaced.posterior_mean_coef1 + spaced.posterior_mean_coef2 * np.sqrt(a), np.sqrt(a_prev), rtol=1e-9
    )


def test_cosine_schedule_follows_its_formula() -> None:
    alphas = GaussianDiffusion(schedule="cosine").alphas_cumprod

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    for step in (0, 100, 500, 900):
        assert alphas[step] == pytest.approx(alpha_bar((step + 1) / 1000) / alpha_bar(0), rel=1e-9)


@pytest.mark.parametrize(
    "arguments", [{"schedule": "sqrt"}, {"num_train_steps": 0}, {"num_train_steps": 20}, {"prediction": "score"}]
)
def test_bad_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError, match=str(next(iter(arguments.values())))):
        GaussianDiffusion(**arguments)  # type: ignore[arg-type]


# -- predictions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_perfect_model_has_no_error_in_any_prediction(shape: tuple[int, ...], prediction: str, learn_sigma: bool) -> None:
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(prediction=prediction, learn_sigma=learn_sigma)  # type: ignore[arg-type]
    x0, noise = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    t = torch.tensor([0, 400, 999])
    model = perfect_model(diffusion, x0)
    assert diffusion.training_losses(model, x0, t, noise)["mse"].max() < 1e-15
    x_t = diffusion.add_noise(x0, noise, t)
    step = diffusion.mean_variance(model(x_t, t), x_t, t)
    torch.testing.assert_close(step.pred_x0, x0)
    torch.testing.assert_close(diffusion.predict_noise(step.pred_x0, x_t, t), noise)
    for sampler in (sample_ddpm, sample_ddim):
        torch.testing.assert_close(sampler(diffusion.respaced(10), perfect_model(diffusion.respaced(10), x0), noise), x0)


def test_time_as_number_and_as_tensor_agree() -> None:
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(respacing=20, prediction="v")
    x, output = torch.randn(3, 5, 6), torch.randn(3, 5, 12)
    times = torch.tensor([0, 7, 19])
    together = diffusion.mean_variance(output, x, times, clip_denoised=True)
    for row, index in enumerate(times.tolist()):
        alone = diffusion.mean_variance(output[row : row + 1], x[row : row + 1], index, clip_denoised=True)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[row])
    assert together.pred_x0.abs().max() == 1  # clipped


def test_fixed_variance_is_beta() -> None:
    diffusion = GaussianDiffusion(learn_sigma=False, respacing=25)
    x = torch.randn(1, 5, 6)
    for index in (1, 24):
        step = diffusion.mean_variance(x, x, index)
        torch.testing.assert_close(step.variance, torch.full_like(x, diffusion.betas[index]))
        torch.testing.assert_close(step.log_variance.exp(), step.variance)


def test_learned_variance_lies_between_its_bounds() -> None:
    diffusion = GaussianDiffusion(respacing=25)
    x = torch.randn(1, 5, 6)
    for value, expected in ((-1.0, diffusion.posterior_variance[10]), (1.0, diffusion.betas[10])):
        output = torch.cat((x, torch.full_like(x, value)), 2)
        torch.testing.assert_close(diffusion.mean_variance(output, x, 10).variance, torch.full_like(x, expected))


def test_wrong_shapes_are_named() -> None:
    diffusion = GaussianDiffusion()
    x = torch.randn(2, 5, 6)
    with pytest.raises(InputError, match=r"\(2, 5, 6\), wanted \(2, 5, 12\)"):
        diffusion.mean_variance(x, x, 3)
    with pytest.raises(InputError, match=r"\(2, 6\)"):
        GaussianDiffusion(learn_sigma=False).mean_variance(x[:, 0], x[:, 0], 3)
    with pytest.raises(InputError, match="t has shape"):
        diffusion.add_noise(x, x, torch.tensor([3]))
    with pytest.raises(InputError, match="noise has shape"):
        diffusion.add_noise(x, x[:1], 3)


# -- losses -------------------------------------------------------------------------------------------------------------


def test_vb_is_the_kl_of_torch_distributions() -> None:
    torch.manual_seed(1)
    diffusion = GaussianDiffusion(respacing=100)
    x0, noise, output = torch.randn(2, 5, 6).double(), torch.randn(2, 5, 6).double(), torch.randn(2, 5, 12).double()
    t = torch.tensor([1, 60])
    x_t = diffusion.add_noise(x0, noise, t)
    step = diffusion.mean_variance(output, x_t, t)
    truth = diffusion.posterior_mean(x0, x_t, t)
    sigma = torch.from_numpy(diffusion.posterior_variance)[t].sqrt().view(2, 1, 1)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(truth, sigma), torch.distributions.Normal(step.mean, step.variance.sqrt())
    )
    vb = diffusion.training_losses(lambda x, t: output, x0, t, noise)["vb"]
    torch.testing.assert_close(vb, kl.mean((1, 2)) / math.log(2))


def test_vb_at_the_last_step_is_the_likelihood_of_a_bin() -> None:
    torch.manual_seed(2)
    diffusion = GaussianDiffusion()
    x0 = (torch.rand(4, 5, 6).double() * 2 - 1).round(decimals=2)
    x0[0, 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    t, noise = torch.zeros(4, dtype=torch.int64), torch.randn_like(x0)
    x_t = diffusion.add_noise(x0, noise, t)
    output = torch.cat((noise + 0.2 * torch.randn_like(noise), torch.rand_like(noise) * 2 - 1), 2)
    step = diffusion.mean_variance(output, x_t, t)
    sigma = step.variance.sqrt()
    upper = torch.special.ndtr((x0 + 1 / 255 - step.mean) / sigma).where(x0 < 0.999, torch.ones_like(x0))
    lower = torch.special.ndtr((x0 - 1 / 255 - step.mean) / sigma).where(x0 > -0.999, torch.zeros_like(x0))
    bits = -(upper - lower).log2().mean((1, 2))
    # The loss uses DiT's tanh approximation of the normal distribution, off by less than 3e-4.
    torch.testing.assert_close(diffusion.variational_bound(output, x0, x_t, t), bits, rtol=0, atol=2e-3)


def test_vb_teaches_only_the_variance() -> None:
    torch.manual_seed(3)
    diffusion = GaussianDiffusion()
    x0 = torch.randn(2, 5, 6)
    output = torch.randn(2, 5, 12, requires_grad=True)
    losses = diffusion.training_losses(lambda x, t: output, x0, torch.tensor([0, 500]), torch.randn_like(x0))
    (gradient,) = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
    assert gradient[..., :6].abs().max() == 0
    assert gradient[..., 6:].abs().amax((1, 2)).min() > 0
    (gradient,) = torch.autograd.grad(losses["mse"].sum(), output)
    assert gradient[..., 6:].abs().max() == 0
    assert gradient[..., :6].abs().max() > 0


def test_losses_draw_reproducibly_and_without_sigma_have_no_vb() -> None:
    diffusion = GaussianDiffusion(learn_sigma=False)
    x0 = torch.randn(4, 5, 6)
    first, second = (
        diffusion.training_losses(lambda x, t: 0.5 * x, x0, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first["loss"], second["loss"])
    assert torch.equal(first["vb"], torch.zeros(4)) and torch.equal(first["loss"], first["mse"])
    assert first["loss"].shape == (4,)


def test_bf16_batches_compute_in_float32() -> None:
    diffusion = GaussianDiffusion(learn_sigma=False)
    x0 = torch.randn(2, 5, 6).bfloat16()

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16
        return x

    assert diffusion.training_losses(model, x0, torch.tensor([5, 900]))["loss"].dtype == torch.float32
    assert sample("ddpm", model, x0, 4, diffusion).dtype == torch.bfloat16


# -- samplers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [1, 10, 24])
def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance(index: int) -> None:
    torch.manual_seed(4)
    diffusion = GaussianDiffusion(respacing=25)
    x, eps, noise = (torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(3))
    output = torch.cat((eps, torch.full_like(eps, -1.0)), 2)  # -1: the posterior's variance
    ddim = ddim_step(diffusion, output, x, index, eta=1.0, noise=noise)
    torch.testing.assert_close(ddim, ddpm_step(diffusion, output, x, index, noise))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_has_the_paper_s_variance(eta: float) -> None:
    """Equations 12 and 16 of arXiv 2010.02502, written out for one step with a model whose eps is known."""
    diffusion = GaussianDiffusion(respacing=25, learn_sigma=False)
    x, eps, noise = (torch.randn(1, 5, 6, dtype=torch.float64) for _ in range(3))
    a, a_prev = float(diffusion.alphas_cumprod[10]), float(diffusion.alphas_cumprod[9])
    sigma = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
    pred_x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    expected = math.sqrt(a_prev) * pred_x0 + math.sqrt(1 - a_prev - sigma**2) * eps + sigma * noise
    torch.testing.assert_close(ddim_step(diffusion, eps, x, 10, eta, noise), expected)


def test_samplers_recover_a_gaussian() -> None:
    """For data N(m, s^2) the exact eps is known, so that with many steps samples have that mean and deviation: the samplers'
    own error falls with the number of steps, the statistical one of 10,000 numbers is 0.003."""
    mean, std = 0.5, 0.3
    diffusion = GaussianDiffusion(learn_sigma=False)
    alphas = torch.from_numpy(diffusion.alphas_cumprod)

    def exact(x: Tensor, t: Tensor) -> Tensor:
        a = alphas[t].view(-1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)

    noise = torch.randn(4, 50, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, options in (("ddpm", {}), ("ddim", {}), ("ddim", {"eta": 0.7})):
        x = sample(name, exact, noise, 400, diffusion, torch.Generator().manual_seed(1), **options)
        assert x.mean().item() == pytest.approx(mean, abs=0.012)
        assert x.std().item() == pytest.approx(std, abs=0.012)


def test_model_gets_training_steps_in_falling_order_and_progress_is_told() -> None:
    seen: list[int] = []
    told: list[tuple[int, int]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,) and t.dtype == torch.int64
        seen.append(int(t[0]))
        return torch.cat((x, x), 2)

    progress = lambda done, total: told.append((done, total))  # noqa: E731
    sample("ddim", model, torch.randn(2, 5, 6), "ddim10", GaussianDiffusion(), progress=progress)
    assert seen == list(range(900, -1, -100))
    assert told == [(done, 10) for done in range(1, 11)]


def test_entry_point_names_what_is_wrong() -> None:
    noise, gaussian = torch.randn(2, 5, 6), GaussianDiffusion()
    with pytest.raises(InputError, match=r"'dpm'.*ddpm, ddim, dpmpp_2m, unipc, euler, heun, sde"):
        sample("dpm", lambda x, t: x, noise, 5, gaussian)
    with pytest.raises(InputError, match="use ddpm, ddim"):
        sample("euler", lambda x, t: x, noise, 5, gaussian)
    with pytest.raises(InputError, match="needs diffusion"):
        sample("ddim", lambda x, t: x, noise, 5)
    with pytest.raises(InputError, match="1500"):
        sample("ddim", lambda x, t: x, noise, 1500, gaussian)
    with pytest.raises(InputError, match="eta"):
        sample("ddim", lambda x, t: torch.cat((x, x), 2), noise, 5, gaussian, eta=2.0)
    with pytest.raises(InputError, match="3 entries, wanted 5"):
        sample("ddpm", lambda x, t: x, noise, 5, gaussian, step_noise=torch.randn(3, 2, 5, 6))
