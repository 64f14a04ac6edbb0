"""Fréchet distance, inception score, precision and recall against closed forms and second implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from textok_fast.errors import InputError
from textok_fast.evaluation import fidelity
from textok_fast.evaluation.fidelity import (
    Gaussian,
    codebook_use,
    frechet_distance,
    gaussian,
    inception_score,
    precision_recall,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covariance(size: int, seed: int, rank: int = 0) -> np.ndarray:
    factor = np.random.default_rng(seed).standard_normal((size, rank or 2 * size))
    return factor @ factor.T / factor.shape[1]


# -- Fréchet distance -------------------------------------------------------------------------------------------------------


def test_gaussian_is_numpys() -> None:
    features = normal(5000, 7) * 3 + 100  # more rows than are taken at once, and far from zero
    found = gaussian(features)
    np.testing.assert_allclose(found.mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-10)


def test_frechet_distance_of_known_gaussians() -> None:
    rng = np.random.default_rng(0)
    mean, other = rng.standard_normal((2, 6))
    turn, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    a, b = rng.uniform(0.1, 4, (2, 6))
    # Covariances that commute: the distance of the means and, by axis, of the standard deviations.
    first, second = (Gaussian(m, turn * v @ turn.T) for m, v in ((mean, a), (other, b)))
    expected = np.square(mean - other).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-10)
    # A covariance and its multiple: (1 - c)^2 of its trace.
    sigma = covariance(6, 1)
    scaled = frechet_distance(Gaussian(mean, sigma), Gaussian(mean, 2.5**2 * sigma))
    assert scaled == pytest.approx(1.5**2 * np.trace(sigma), rel=1e-10)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_samples_approaches_that_of_their_gaussians() -> None:
    a, b = normal(40000, 3) * torch.tensor([1.0, 2.0, 0.5]), normal(40000, 3, seed=1) + 1.0
    assert frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(3 + 0 + 1 + 0.25, rel=0.02)


@pytest.mark.parametrize("rank", [0, 3])  # of full rank, and singular
def test_frechet_distance_is_that_of_the_matrix_root(rank: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    first, second = (Gaussian(np.full(8, float(seed)), covariance(8, seed, rank)) for seed in (1, 2))
    jitter = 1e-10 * np.eye(8) if rank else 0  # as ADM's evaluator does for singular products, which sqrtm cannot take
    root = linalg.sqrtm((first.covariance + jitter) @ (second.covariance + jitter)).real
    expected = 8 + np.trace(first.covariance + second.covariance - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-4 if rank else 1e-9)


def test_frechet_distance_is_torchmetrics() -> None:
    image = pytest.importorskip("torchmetrics.image.fid")
    identity = nn.Identity()
    identity.num_features = 12
    metric = image.FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    real, fake = normal(300, 12).double() ** 2, normal(200, 12, seed=1).double() * 2
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert frechet_distance(gaussian(real), gaussian(fake)) == pytest.approx(float(metric.compute()), rel=1e-8)


def test_features_that_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="at least two pictures"):
        gaussian(normal(1, 4))
    with pytest.raises(InputError, match="NaN"):
        gaussian(torch.full((3, 4), math.nan))
    with pytest.raises(InputError, match="of 4 and of 5 numbers"):
        frechet_distance(gaussian(normal(9, 4)), gaussian(normal(9, 5)))


# -- inception score --------------------------------------------------------------------------------------------------------


def confident(classes: list[int], among: int) -> Tensor:
    return 1000.0 * nn.functional.one_hot(torch.tensor(classes), among)


def test_inception_score_of_known_answers() -> None:
    assert inception_score(confident([0, 1, 2, 3, 4] * 8, 10)).mean == pytest.approx(5, rel=1e-9)  # sure, five kinds
    assert inception_score(confident([7] * 9, 10)).mean == pytest.approx(1, rel=1e-9)  # sure, one kind
    assert inception_score(torch.zeros(9, 10)).mean == pytest.approx(1, rel=1e-9)  # no idea
    # Half sure of one class of two: p = (3/4, 1/4), the mean p(y) = (1/2, 1/2).
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]] * 4)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert inception_score(logits).mean == pytest.approx(math.exp(kl), rel=1e-6)
    # By parts: two kinds, then four, then (the rest) one.
    parts = inception_score(torch.cat([confident([0, 1] * 4, 9), confident([0, 1, 2, 3] * 2, 9), confident([5], 9)]), split=8)
    assert (parts.mean, parts.splits) == (pytest.approx(7 / 3, rel=1e-9), 3)
    assert parts.std == pytest.approx(np.std([2, 4, 1]), rel=1e-9)
    with pytest.raises(InputError):
        inception_score(torch.zeros(0, 10))


def test_inception_score_is_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("torchmetrics.image.inception")
    logits = 3 * normal(60, 20)
    metric = image.InceptionScore(feature=nn.Identity(), splits=3)
    metric.update(logits)
    monkeypatch.setattr(torch, "randperm", torch.arange)  # theirs shuffles; published scores are of the order as sampled
    mean, std = metric.compute()
    found = inception_score(logits, split=20)
    assert found.mean == pytest.approx(float(mean), rel=1e-5)
    assert found.std * math.sqrt(3 / 2) == pytest.approx(float(std), rel=1e-3)  # theirs divides by n - 1


# -- precision and recall ---------------------------------------------------------------------------------------------------


def by_hand(manifold: Tensor, points: Tensor, k: int) -> float:
    """The share of ``points`` within the k-th-neighbour ball of any point of ``manifold``, pair by pair."""

    def distance(a: Tensor, b: Tensor) -> float:
        return math.sqrt(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)))

    radii = []
    for i, point in enumerate(manifold):
        others = sorted(distance(point, other) for j, other in enumerate(manifold) if j != i)
        radii.append(others[k - 1])
    inside = [
        any(distance(point, centre) <= radius for centre, radius in zip(manifold, radii, strict=True)) for point in points
    ]
    return sum(inside) / len(inside)


@pytest.mark.parametrize(("seed", "k"), [(0, 3), (1, 1), (2, 2)])
def test_precision_and_recall_pair_by_pair(monkeypatch: pytest.MonkeyPatch, seed: int, k: int) -> None:
    monkeypatch.setattr(fidelity, "ROWS", 11)  # several blocks of distances, the last not full
    reference, samples = normal(40, 3, seed=seed), normal(50, 3, seed=seed + 9) + torch.tensor([2.0, 0.5, 0.0])
    found = precision_recall(reference, samples, k)
    assert found == (pytest.approx(by_hand(reference, samples, k)), pytest.approx(by_hand(samples, reference, k)))
    assert 0.1 < found.precision < 0.95 and 0.1 < found.recall < 0.95  # not the same by saturation
    assert found.precision != found.recall


def test_precision_and_recall_of_known_sets() -> None:
    points = normal(30, 4)
    assert precision_recall(points, points.clone()) == (1.0, 1.0)
    assert precision_recall(points, points + 1000) == (0.0, 0.0)
    # One of two modes: all samples are plausible, and half of the reference is covered.
    two_modes = torch.cat([points, points + 100])
    assert precision_recall(two_modes, points.clone()) == (1.0, 0.5)
    assert precision_recall(points.clone(), two_modes) == (0.5, 1.0)
    with pytest.raises(InputError, match="more than 3 pictures"):
        precision_recall(points, points[:3])


# -- codebooks --------------------------------------------------------------------------------------------------------------


def test_codebook_use() -> None:
    even = codebook_use(torch.arange(8).repeat(5).reshape(4, 10), 32)
    assert even == (pytest.approx(0.25), pytest.approx(8), 32)
    uneven = codebook_use(torch.tensor([[0, 0, 0, 1]]), 2)
    assert uneven.perplexity == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert uneven.share == 1.0
    for indices in (torch.tensor([4]), torch.tensor([-1]), torch.zeros(0, dtype=torch.int64)):
        with pytest.raises(InputError):
            codebook_use(indices, 4)
