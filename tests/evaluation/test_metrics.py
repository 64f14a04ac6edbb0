"""PSNR and SSIM against their formulas in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from textok_fast.errors import InputError
from textok_fast.evaluation import psnr, reconstruction_metrics, ssim

pytest.importorskip("torchmetrics")


def pictures(count: int, size: int = 24, seed: int = 0) -> torch.Tensor:
    """uint8 (B, H, W, 3) with some structure: a ramp, a disc and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    base = np.stack([x, y, (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1], axis=-1)
    return torch.from_numpy((255 * (0.7 * base + 0.3 * rng.random((count, size, size, 3)))).astype(np.uint8))


def as_float(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def reference_psnr(a: np.ndarray, b: np.ndarray) -> float:
    per_image = [10 * math.log10(255**2 / np.mean((x.astype(np.float64) - y) ** 2)) for x, y in zip(a, b, strict=True)]
    return float(np.mean(per_image))


def reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. (2004), equation 13, window by window."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, values = 0.01**2, 0.03**2, []
    for x, y in zip(a / 255.0, b / 255.0, strict=True):
        for channel in range(3):
            for i in range(x.shape[0] - 10):
                for j in range(x.shape[1] - 10):
                    p, q = x[i : i + 11, j : j + 11, channel], y[i : i + 11, j : j + 11, channel]
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_both_follow_their_formulas() -> None:
    a, b = pictures(2, seed=0), pictures(2, seed=1)
    b[1] = b[1] // 2  # two images of very different quality: a PSNR of the pooled error would differ
    assert psnr(a, b) == pytest.approx(reference_psnr(a.numpy(), b.numpy()), abs=1e-4)
    assert ssim(a, b) == pytest.approx(reference_ssim(a.numpy(), b.numpy()), abs=1e-4)
    assert reconstruction_metrics(a, b) == {"psnr": pytest.approx(psnr(a, b)), "ssim": pytest.approx(ssim(a, b)), "images": 2}


def test_a_known_error() -> None:
    a = torch.zeros(1, 3, 16, 16)
    assert psnr(a, a + 0.2) == pytest.approx(20.0, abs=1e-4)  # 0.2 of a range of 2: one tenth of the range, 20 dB


@pytest.mark.parametrize("form", ["float", "channels first", "numpy", "bfloat16"])
def test_the_form_of_the_pictures_does_not_matter(form: str) -> None:
    a, b = pictures(3, seed=0), pictures(3, seed=1)
    forms: dict[str, torch.Tensor | np.ndarray] = {
        "float": as_float(b),
        "channels first": b.permute(0, 3, 1, 2),
        "numpy": b.numpy(),
        "bfloat16": as_float(b).bfloat16(),
    }
    other = forms[form]
    tolerance = 0.02 if form == "bfloat16" else 1e-4
    assert psnr(a, other) == pytest.approx(psnr(a, b), abs=tolerance)
    assert ssim(as_float(a), other) == pytest.approx(ssim(a, b), abs=tolerance)


def test_equal_pictures_and_chunks() -> None:
    a, b = pictures(70, size=12, seed=0), pictures(70, size=12, seed=1)
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1.0)
    assert psnr(a, b) == pytest.approx(np.mean([psnr(a[i : i + 1], b[i : i + 1]) for i in range(70)]), abs=1e-4)


def test_a_reconstruction_beyond_the_range_is_clipped() -> None:
    original = torch.ones(1, 3, 16, 16) * 0.5
    assert psnr(original, torch.full_like(original, 1.7)) == pytest.approx(psnr(original, torch.ones_like(original)))


@pytest.mark.parametrize(
    ("original", "reconstruction", "says"),
    [
        (torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16), "same"),
        (torch.zeros(2, 16, 16, 3), torch.zeros(2, 16, 16, 3), r"\(B, 3, H, W\)"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), r"\(B, 3, H, W\)"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), "at least one"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), torch.zeros(1, 3, 16, 16), "int64"),
        (torch.full((1, 3, 16, 16), math.nan), torch.zeros(1, 3, 16, 16), "NaN"),
        (torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), math.inf), "infinite"),
        (torch.full((1, 3, 16, 16), 1.5), torch.zeros(1, 3, 16, 16), "1.5"),
        (torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 200.0), "uint8"),
        (torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16), "11 x 11"),
        ("pictures", torch.zeros(1, 3, 16, 16), "str"),
    ],
)
def test_unusable_pictures_are_named(original: torch.Tensor, reconstruction: torch.Tensor, says: str) -> None:
    with pytest.raises(InputError, match=says):
        reconstruction_metrics(original, reconstruction)
