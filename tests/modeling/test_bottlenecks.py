from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from textok_fast.config import TexTokConfig
from textok_fast.modeling.bottlenecks import FSQBottleneck, KLBottleneck, VQBottleneck, build_bottleneck


def test_kl_is_the_divergence_and_the_sample_is_reparameterised() -> None:
    bottleneck = KLBottleneck(3).train()
    z = torch.randn(4, 5, 6, requires_grad=True)
    noise = torch.randn(4, 5, 3)
    out = bottleneck(z, noise)
    posterior = torch.distributions.Normal(z[..., :3], torch.exp(0.5 * z[..., 3:]))
    prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    wanted = torch.distributions.kl_divergence(posterior, prior).sum(dim=(1, 2)).mean()
    torch.testing.assert_close(out.losses["kl"], wanted)
    torch.testing.assert_close(out.latents, posterior.loc + posterior.scale * noise)
    (got,) = torch.autograd.grad(out.losses["kl"], z, retain_graph=True)
    (expected,) = torch.autograd.grad(wanted, z)
    torch.testing.assert_close(got, expected)


def test_kl_in_evaluation_is_the_mean_and_a_large_log_variance_stays_finite() -> None:
    bottleneck = KLBottleneck(2).eval()
    z = torch.cat([torch.randn(1, 3, 2), torch.full((1, 3, 2), 1e4)], dim=-1)
    out = bottleneck(z)
    assert torch.equal(out.latents, z[..., :2])
    assert torch.isfinite(out.losses["kl"])


def test_kl_draws_its_own_noise_when_none_is_given() -> None:
    bottleneck = KLBottleneck(2).train()
    z = torch.zeros(1, 2000, 4)
    latents = bottleneck(z).latents
    assert abs(float(latents.mean())) < 0.1
    assert abs(float(latents.std()) - 1) < 0.1


@pytest.mark.parametrize("normalize", [False, True])
def test_vq_is_straight_through_with_the_published_loss_terms(normalize: bool) -> None:
    bottleneck = VQBottleneck(4, 8, normalize).train()
    torch.nn.init.normal_(bottleneck.codebook)
    z = torch.randn(2, 5, 4, requires_grad=True)
    out = bottleneck(z)
    assert out.indices is not None
    compared = F.normalize(z, dim=-1) if normalize else z
    codes = F.normalize(bottleneck.codebook, dim=-1) if normalize else bottleneck.codebook
    quantized = codes[out.indices]
    torch.testing.assert_close(out.latents, quantized)
    # The decoder's gradient reaches z as if nothing had been quantized, and reaches no code.
    weights = torch.randn(2, 5, 4)
    got = torch.autograd.grad((out.latents * weights).sum(), z, retain_graph=True)[0]
    torch.testing.assert_close(got, torch.autograd.grad((compared * weights).sum(), z, retain_graph=True)[0])
    assert torch.autograd.grad(out.latents.sum(), bottleneck.codebook, retain_graph=True, allow_unused=True)[0] is None
    # Each loss term moves one of the two sides.
    distance = (quantized - compared).square().mean()
    torch.testing.assert_close(out.losses["codebook"], distance)
    torch.testing.assert_close(out.losses["commitment"], distance)
    for term, moved, still in (("codebook", bottleneck.codebook, z), ("commitment", z, bottleneck.codebook)):
        wanted = torch.autograd.grad(distance, moved, retain_graph=True)[0]
        found, nothing = torch.autograd.grad(out.losses[term], (moved, still), retain_graph=True, allow_unused=True)
        torch.testing.assert_close(found, wanted)
        assert nothing is None


@pytest.mark.parametrize("normalize", [False, True])
def test_every_code_of_a_vq_codebook_can_be_reached_and_read_back(normalize: bool) -> None:
    bottleneck = VQBottleneck(3, 50, normalize).eval()
    codes = bottleneck.codes().detach()
    out = bottleneck(codes[None] * (7 if normalize else 1))
    assert out.indices is not None
    assert out.indices[0].tolist() == list(range(50))
    assert bottleneck.codebook_size == 50
    assert torch.equal(bottleneck.latents_from_indices(out.indices), out.latents)


def test_the_training_of_vq_uses_the_whole_codebook_it_is_given() -> None:
    """Each code moves to one of as many clusters when the clusters are there from the start."""
    bottleneck = VQBottleneck(2, 4, normalize=False).train()
    with torch.no_grad():
        bottleneck.codebook.copy_(torch.tensor([[0.1, 0.1], [0.1, -0.1], [-0.1, 0.1], [-0.1, -0.1]]))
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    optimizer = torch.optim.SGD(bottleneck.parameters(), lr=1.0)
    for _ in range(50):
        out = bottleneck(corners[None])
        optimizer.zero_grad()
        out.losses["codebook"].backward()
        optimizer.step()
    torch.testing.assert_close(bottleneck.codebook.detach(), corners, atol=1e-3, rtol=0)


# -- FSQ ------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.integers(2, 40), st.sampled_from([1000, 1001, 1500, 2000])))
def test_an_fsq_channel_has_exactly_its_levels(level: int) -> None:
    bottleneck = FSQBottleneck((level,)).eval()
    z = torch.linspace(-12, 12, 40 * level + 1001).reshape(1, -1, 1)
    out = bottleneck(z)
    assert out.indices is not None
    digits = out.indices[0]
    assert (int(digits.min()), int(digits.max())) == (0, level - 1)
    assert bool((digits.diff() >= 0).all())
    if level <= 40:
        assert len(digits.unique()) == level
    values = out.latents.unique()
    assert float(values.min()) == -(level // 2) / (level // 2)
    assert float(values.max()) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsq_rounds_at_the_thresholds_of_its_formula(dtype: torch.dtype) -> None:
    """z = 0 is an exact level for odd and even numbers of levels above 2 alike; far out lie the outermost ones."""
    bottleneck = FSQBottleneck((2, 3, 4, 5, 8)).eval()
    out = bottleneck(torch.tensor([[[0.0] * 5, [50.0] * 5, [-50.0] * 5]], dtype=dtype))
    assert out.latents.dtype == dtype
    wanted = [[0, 0, 0, 0, 0], [0, 1, 0.5, 1, 0.75], [-1] * 5]
    assert out.latents[0].float().tolist() == wanted


def test_untrained_inputs_use_every_level() -> None:
    """Inputs of unit variance, as a fresh encoder gives them, reach each level of each channel."""
    out = FSQBottleneck((2, 3, 4, 5, 8)).eval()(torch.randn(1, 4000, 5))
    for channel, level in enumerate((2, 3, 4, 5, 8)):
        values, count = out.latents[0, :, channel].unique(return_counts=True)
        assert len(values) == level
        assert int(count.min()) > 4000 / level / 20


def test_the_indices_of_fsq_are_a_bijection_over_the_whole_codebook() -> None:
    levels = (2, 3, 4, 5)
    bottleneck = FSQBottleneck(levels).eval()
    assert bottleneck.codebook_size == 120
    every = torch.arange(120).reshape(1, 120)
    latents = bottleneck.latents_from_indices(every)
    assert len(latents[0].unique(dim=0)) == 120
    # First channel least significant.
    digits = np.stack(np.unravel_index(np.arange(120), levels[::-1])[::-1], axis=-1)
    half = np.array(levels) // 2
    np.testing.assert_array_equal(latents[0].numpy(), ((digits - half) / half).astype(np.float32))
    # From the latents of a code the encoder's side comes back to its index.
    out = bottleneck(4 * torch.randn(1, 20_000, 4))
    assert out.indices is not None
    assert set(out.indices.flatten().tolist()) == set(range(120))
    assert torch.equal(bottleneck.latents_from_indices(out.indices), out.latents)


def test_fsq_is_straight_through() -> None:
    levels = torch.tensor([2, 4, 5], dtype=torch.float64)
    bottleneck = FSQBottleneck((2, 4, 5)).train()
    z = torch.randn(2, 6, 3, requires_grad=True)
    out = bottleneck(z)
    weights = torch.randn(2, 6, 3)
    (got,) = torch.autograd.grad((out.latents * weights).sum(), z)
    # d/dz of tanh(z + shift) half / floor(L / 2) written out, shift = atanh(offset / half) but 0 for 2 levels.
    half = (levels - 1) / 2 + 5e-4
    shift = np.where(levels > 2, np.arctanh(np.where(levels % 2 == 0, 0.5, 0.0) / half.numpy()), 0.0)
    slope = (1 - np.tanh(z.detach().double().numpy() + shift) ** 2) * half.numpy() / (levels // 2).numpy()
    np.testing.assert_allclose(got.numpy(), weights.numpy() * slope, rtol=1e-3, atol=1e-5)
    assert float(got.abs().mean()) > 0.1  # nowhere near a dead channel
    # And forward it is quantized: training and evaluation agree.
    torch.testing.assert_close(out.latents, bottleneck.eval()(z).latents)


def test_the_configuration_chooses_the_bottleneck(tiny_config: Callable[..., TexTokConfig]) -> None:
    for kind, width, size in (("none", 4, 0), ("kl", 8, 0), ("vq", 4, 16), ("fsq", 4, 8 * 5 * 5 * 5)):
        bottleneck = build_bottleneck(tiny_config(bottleneck=kind))
        assert (bottleneck.in_dim, bottleneck.codebook_size) == (width, size)
        if not size:
            with pytest.raises(TypeError, match="continuous"):
                bottleneck.latents_from_indices(torch.zeros(1, 3, dtype=torch.int64))
    z = torch.randn(1, 3, 4)
    assert torch.equal(build_bottleneck(tiny_config())(z).latents, z)
