from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from textok_fast.config import DataConfig
from textok_fast.data.crops import Crop, adm_square, random_square, resize_short_side
from textok_fast.errors import InputError


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("width", "height", "size"), [(50, 37, 16), (200, 131, 16), (16, 16, 16), (10, 40, 16), (64, 33, 32)])
def test_the_center_crop_is_adms(width: int, height: int, size: int) -> None:
    """Against the steps written out: halve by exact 2 x 2 means while 2 x size is left, bicubic to the short side, cut."""
    picture = noise(width, height)
    pixels = np.asarray(picture).astype(np.float64)
    while min(pixels.shape[:2]) >= 2 * size:
        rows, columns = pixels.shape[0] // 2, pixels.shape[1] // 2
        if pixels.shape[0] % 2 or pixels.shape[1] % 2:  # Pillow's box filter then has windows that are no 2 x 2
            halved = Image.fromarray(pixels.astype(np.uint8)).resize((columns, rows), Image.Resampling.BOX)
            pixels = np.asarray(halved).astype(np.float64)
        else:
            pixels = np.floor(pixels.reshape(rows, 2, columns, 2, 3).mean((1, 3)) + 0.5)
    scale = size / min(pixels.shape[:2])
    wide, high = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
    small = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize((wide, high), Image.Resampling.BICUBIC))
    top, left = (high - size) // 2, (wide - size) // 2
    found = adm_square(picture, size)
    assert found.shape == (size, size, 3)
    assert np.abs(found.astype(int) - small[top : top + size, left : left + size]).max() <= 1


def test_the_aspect_is_kept() -> None:
    assert resize_short_side(noise(90, 60), 20).size == (30, 20)
    assert resize_short_side(noise(7, 21), 14).size == (14, 42)


def test_a_random_square_lies_anywhere_and_in_any_scale() -> None:
    # Columns tell their place: the value is the share of the width.
    ramp = np.broadcast_to(np.linspace(0, 255, 300).astype(np.uint8)[None, :, None], (100, 300, 3))
    picture = Image.fromarray(np.ascontiguousarray(ramp))
    rng = np.random.default_rng(3)
    squares = [random_square(picture, 40, 0.5, rng) for _ in range(200)]
    spans = np.array([(int(square[0, 0, 0]), int(square[0, -1, 0])) for square in squares])
    assert spans[:, 0].min() < 15 and spans[:, 1].max() > 240
    widths = (spans[:, 1] - spans[:, 0]) / 255 * 300 / 100  # in short sides
    assert 0.45 < widths.min() < 0.6 and 0.9 < widths.max() < 1.05
    whole = {random_square(noise(40, 40), 40, 1.0, rng).tobytes() for _ in range(3)}
    assert whole == {np.asarray(noise(40, 40)).tobytes()}
    assert math.ceil(40 / 0.8) == 50


def test_mirrored_half_of_the_time() -> None:
    picture, crop = noise(16, 16), Crop(16, "adm", flip=True)
    plain = crop(picture, None)
    found = [crop(picture, np.random.default_rng(k)) for k in range(60)]
    mirrored = [np.array_equal(each, plain[:, ::-1]) for each in found]
    assert all(np.array_equal(each, plain) for each, is_mirrored in zip(found, mirrored, strict=True) if not is_mirrored)
    assert 15 < sum(mirrored) < 45


@pytest.mark.parametrize("settings", [{"crop_min": 0.0}, {"crop_min": 1.5}, {"shuffle_buffer": 0}, {"read_streams": 0}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        DataConfig(**settings)  # type: ignore[arg-type]
