from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import MultivariateNormal

from textok_fast.data.degradation import _Wear, degrade, filtered, gaussian_kernel
from textok_fast.errors import InputError


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Smooth colours with edges, (64, 64, 3)."""
    y, x = np.mgrid[0:64, 0:64] / 63
    image = np.stack([x, y, (x + y) / 2], axis=-1)
    image[16:40, 20:48] = (0.9, 0.2, 0.1)
    return (image * 255).astype(np.uint8)


def bicubic(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BICUBIC))


def test_a_degradation_is_its_seeds_and_indexs_alone(picture: np.ndarray) -> None:
    made = degrade(picture, 4, seed=3, index=7)
    assert made.shape == (16, 16, 3) and made.dtype == np.uint8
    np.random.seed(0)
    torch.manual_seed(1)
    assert np.array_equal(made, degrade(picture, 4, seed=3, index=7))
    assert not np.array_equal(made, degrade(picture, 4, seed=3, index=8))
    assert not np.array_equal(made, degrade(picture, 4, seed=4, index=7))


def test_strength_runs_from_bicubic_to_the_published_ranges(picture: np.ndarray) -> None:
    assert np.array_equal(degrade(picture, 4, strength=0), bicubic(picture))
    target = bicubic(picture).astype(float)
    error = [
        np.mean([np.abs(degrade(picture, 4, index=i, strength=strength) - target).mean() for i in range(24)])
        for strength in (0.1, 0.5, 1.0)
    ]
    assert error[0] < error[1] < error[2]
    assert error[2] < 40  # worn, and still that picture


def test_the_order_is_random_and_every_step_comes(picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def noting(name: str) -> None:
        original = getattr(_Wear, name)

        def step(self: _Wear, x: torch.Tensor) -> torch.Tensor:
            seen[-1].append(name)
            return original(self, x)

        monkeypatch.setattr(_Wear, name, step)

    for name in ("blur", "resample", "finish", "noise", "maybe_jpeg"):
        noting(name)
    for index in range(40):
        seen.append([])
        degrade(picture, 4, index=index)
    assert all(sorted(order) == ["blur", "blur", "finish", "maybe_jpeg", "noise", "resample"] for order in seen)
    assert all(order.index("resample") < order.index("finish") for order in seen)
    assert len({tuple(order) for order in seen}) > 20
    assert {order[0] for order in seen} > {"blur", "noise", "maybe_jpeg"}


def test_the_kernel_is_the_density_of_a_gaussian() -> None:
    variances, angle = np.array([4.0, 0.7]), 0.6
    kernel = gaussian_kernel(15, variances, angle)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    place = torch.arange(15.0) - 7
    grid = torch.stack(torch.meshgrid(place, place, indexing="xy"), dim=-1)
    covariance = turn @ torch.diag(torch.tensor([4.0, 0.7])) @ turn.T
    density = MultivariateNormal(torch.zeros(2), covariance).log_prob(grid).exp()
    torch.testing.assert_close(kernel, density / density.sum(), rtol=1e-4, atol=1e-7)
    assert float(gaussian_kernel(7, np.zeros(2), 0.3)[3, 3]) == 1


def test_a_filter_keeps_a_flat_picture_and_spreads_a_point() -> None:
    kernel = gaussian_kernel(5, np.array([1.0, 2.0]), 0.4)
    torch.testing.assert_close(filtered(torch.full((1, 3, 8, 9), 0.3), kernel), torch.full((1, 3, 8, 9), 0.3))
    point = torch.zeros(1, 1, 9, 9)
    point[0, 0, 4, 4] = 1
    torch.testing.assert_close(filtered(point, kernel)[0, 0, 2:7, 2:7], kernel.flip(0, 1))


def bad() -> Iterator[tuple[np.ndarray, int, float, str]]:
    yield np.zeros((8, 8, 3), dtype=np.float32), 4, 1.0, "float32"
    yield np.zeros((8, 8), dtype=np.uint8), 4, 1.0, r"\(8, 8\)"
    yield np.zeros((9, 8, 3), dtype=np.uint8), 4, 1.0, "8 x 9"
    yield np.zeros((8, 8, 3), dtype=np.uint8), 4, 1.5, "1.5"


@pytest.mark.parametrize(("image", "scale", "strength", "message"), list(bad()))
def test_what_cannot_be_degraded_is_named(image: np.ndarray, scale: int, strength: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        degrade(image, scale, strength=strength)
