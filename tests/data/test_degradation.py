from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from textok_fast.data import degradation
from textok_fast.data.degradation import _Wear, degrade, filtered, gaussian_kernel, halved, resized, shifted
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


def test_a_degradation_is_its_seeds_epochs_and_indexs_alone(picture: np.ndarray) -> None:
    made = degrade(picture, 4, seed=3, index=7)
    assert made.shape == (16, 16, 3) and made.dtype == np.uint8
    np.random.seed(0)
    torch.manual_seed(1)
    assert np.array_equal(made, degrade(picture, 4, seed=3, index=7))
    assert not np.array_equal(made, degrade(picture, 4, seed=3, index=8))
    assert not np.array_equal(made, degrade(picture, 4, seed=4, index=7))
    assert not np.array_equal(made, degrade(picture, 4, seed=3, epoch=1, index=7))


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


def test_a_filter_is_a_convolution_of_the_mirrored_picture() -> None:
    """As scipy.ndimage.convolve, which BSRGAN takes; also of a picture smaller than the kernel."""
    rng = np.random.default_rng(0)
    for side, size in ((20, 5), (6, 25), (1, 3)):
        image, kernel = rng.random((side, side + 1)), rng.random((size, size))
        kernel /= kernel.sum()
        expected = ndimage.convolve(image, kernel, mode="mirror")
        made = filtered(torch.from_numpy(image)[None, None], torch.from_numpy(kernel))[0, 0]
        np.testing.assert_allclose(made, expected, atol=1e-12)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_every_nth_pixel_of_a_shifted_kernel_is_the_middle_of_n(scale: int) -> None:
    kernel = gaussian_kernel(25, np.full(2, 2.0), 0.0)
    moved = shifted(kernel, scale)
    place = torch.arange(25.0) - 12
    for axis in (0, 1):
        assert float((moved.sum(1 - axis) * place).sum()) == pytest.approx(-(scale - 1) / 2, abs=1e-4)
    ramp = torch.arange(64.0).expand(64, 64)[None, None]
    small = filtered(ramp, moved)[0, 0, ::scale, ::scale]
    inside = slice(16 // scale, -16 // scale)
    middle = torch.arange(0, 64, scale) + (scale - 1) / 2
    torch.testing.assert_close(small[0, inside], middle[inside], rtol=0, atol=1e-3)


def test_area_averages_what_a_pixel_covers() -> None:
    x = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    fine = x.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)  # 24: four pieces a pixel
    for size in (2, 3, 4, 8, 12):
        expected = F.avg_pool2d(fine, 24 // size)
        torch.testing.assert_close(resized(x, (size, size), "area"), expected)


def test_halving_is_matlabs() -> None:
    """imresize: a cubic with a = -0.5 over twice as many pixels, the picture mirrored with its last pixel."""
    x = torch.rand(1, 1, 10, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    distance = np.abs(np.arange(8) - 3.5) / 2
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance <= 1, near, far)
    weights /= weights.sum()
    padded = np.pad(x[0, 0].numpy(), 3, mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8))[::2, ::2]
    expected = np.einsum("hwij,i,j->hw", windows, weights, weights).clip(0, 1)
    np.testing.assert_allclose(halved(x)[0, 0], expected, atol=1e-7)


# -- what the branches do, and how often ------------------------------------------------------------------------------------


@pytest.fixture
def branches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[np.ndarray, tuple[str, ...]]]:
    """Degrades without noise and JPEG, and tells which resamplings were taken: "halved", or "to 32 by area"; "every 4th"."""
    taken: list[str] = []
    original = {name: getattr(degradation, name) for name in ("halved", "resized", "shifted")}

    def noted(name: str, *args: Any) -> torch.Tensor:
        taken.append({"halved": "halved", "shifted": f"every {args[-1]}th"}.get(name) or f"to {args[1]} by {args[-1]}")
        return cast(torch.Tensor, original[name](*args))

    for name in original:
        monkeypatch.setattr(degradation, name, functools.partial(noted, name))
    monkeypatch.setattr(_Wear, "noise", lambda self, x: x)
    monkeypatch.setattr(_Wear, "jpeg", lambda self, x: x)

    def run(image: np.ndarray, **draw: Any) -> tuple[np.ndarray, tuple[str, ...]]:
        taken.clear()
        return degrade(image, **draw), tuple(taken)

    return run


@pytest.mark.parametrize("scale", [2, 4])
def test_no_branch_moves_the_picture(branches: Callable[..., Any], scale: int) -> None:
    """A spot's centre of mass lies where it was, in pixels of the large picture."""
    y, x = np.mgrid[0:96, 0:96]
    off: dict[str, list[float]] = {}
    for index in range(120):
        rng = np.random.default_rng(index)
        where = rng.uniform(40, 56, 2)
        spot = np.exp(-((y - where[0]) ** 2 + (x - where[1]) ** 2) / (2 * 6**2))
        small, taken = branches((np.repeat(spot[..., None], 3, -1) * 255).round().astype(np.uint8), scale=scale, index=index)
        weight = small[..., 0].astype(float)
        place = np.arange(96 // scale) * scale + (scale - 1) / 2
        centre = [(weight.sum(1 - axis) * place).sum() / weight.sum() for axis in (0, 1)]
        for way in taken:
            off.setdefault(way.split(" by ")[-1], []).append(float(np.abs(np.subtract(centre, where)).max()))
    wanted = {"bilinear", "bicubic", "area", "every 2th"} | ({"halved", "every 4th"} if scale == 4 else set())
    assert off.keys() == wanted
    assert max(np.mean(values) for values in off.values()) < 0.2
    assert max(max(values) for values in off.values()) < 0.7  # pixels between which a spot is seen are 8 wide at most


def test_branches_come_as_often_as_published(branches: Callable[..., Any]) -> None:
    """At scale 4 a quarter is halved first, half of these by MATLAB's cubic; a quarter takes every n-th pixel, where n is 2 for
    the halved. At other scales nothing is halved first."""
    count, flat = 1200, np.full((8, 8, 3), 128, dtype=np.uint8)
    ways = [branches(flat, scale=4, index=index)[1] for index in range(count)]
    # Of the steps' two resamplings the last is to the final 2 x 2; "downsample1" comes before them.
    first = [way[0] if len(way) == 3 else "" for way in ways]
    nth = [way[-2] if way[-2].startswith("every") else "" for way in ways]

    def close(found: int, of: int, share: float) -> bool:
        return abs(found - of * share) < 4 * math.sqrt(of * share * (1 - share))

    halved_first = sum(map(bool, first))
    assert close(halved_first, count, 0.25)
    assert close(first.count("halved"), halved_first, 0.5)
    for mode in ("bilinear", "bicubic", "area"):
        assert close(first.count(f"to (4, 4) by {mode}"), halved_first, 1 / 6)
        assert close(sum(way[-1] == f"to (2, 2) by {mode}" for way in ways), count, 1 / 3)
    assert close(sum(map(bool, nth)), count, 0.25)
    assert {(bool(a), b) for a, b in zip(first, nth, strict=True) if b} == {(False, "every 4th"), (True, "every 2th")}
    assert all(len(branches(flat, scale=2, index=index)[1]) == 2 for index in range(100))


def test_noise_of_colours_is_correlated_as_published() -> None:
    """The third kind of noise: its covariance is L^2 |U^T D U|, all of whose entries are at least 0."""
    flat = torch.full((1, 3, 64, 64), 0.5)
    kinds = {"alike": 0, "each": 0, "correlated": 0}
    for seed in range(60):
        added = (_Wear(4, (16, 16), 1.0, np.random.default_rng(seed)).noise(flat) - flat)[0].flatten(1)
        correlation = torch.corrcoef(added)[[0, 0, 1], [1, 2, 2]]
        assert float(correlation.min()) > -0.08
        kind = (
            "alike" if float(correlation.min()) > 0.9999 else "each" if float(correlation.abs().max()) < 0.08 else "correlated"
        )
        kinds[kind] += 1
    assert kinds["alike"] > 12 and kinds["each"] > 12 and kinds["correlated"] > 4


def bad() -> Iterator[tuple[np.ndarray, int, float, str]]:
    yield np.zeros((8, 8, 3), dtype=np.float32), 4, 1.0, "float32"
    yield np.zeros((8, 8), dtype=np.uint8), 4, 1.0, r"\(8, 8\)"
    yield np.zeros((9, 8, 3), dtype=np.uint8), 4, 1.0, "8 x 9"
    yield np.zeros((8, 8, 3), dtype=np.uint8), 4, 1.5, "1.5"


@pytest.mark.parametrize(("image", "scale", "strength", "message"), list(bad()))
def test_what_cannot_be_degraded_is_named(image: np.ndarray, scale: int, strength: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        degrade(image, scale, strength=strength)
