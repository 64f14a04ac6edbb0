"""From a picture file to a square of pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps


@dataclass(frozen=True)
class Crop:
    """How a picture becomes ``size`` x ``size``; the fields are those of :class:`textok_fast.config.DataConfig`."""

    size: int
    kind: Literal["center", "adm", "random"] = "center"
    least: float = 0.8
    flip: bool = False

    def __call__(self, picture: Image.Image, rng: np.random.Generator | None) -> np.ndarray:
        """(S, S, 3) uint8 RGB. Without ``rng`` nothing is random: "random" is "adm", and nothing is mirrored."""
        if self.kind == "center":
            pixels = center_square(picture, self.size)
        elif self.kind == "adm" or rng is None:
            pixels = adm_square(upright(picture), self.size)
        else:
            pixels = random_square(upright(picture), self.size, self.least, rng)
        if self.flip and rng is not None and rng.random() < 0.5:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        return pixels


def upright(picture: Image.Image) -> Image.Image:
    """RGB, turned as its EXIF says, transparency on white, 16-bit gray brought to 8 bits."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        picture = Image.fromarray((np.asarray(picture).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.new("RGBA", layer.size, "white")
        picture.alpha_composite(layer)
    return picture.convert("RGB")


def center_square(picture: Image.Image, size: int) -> np.ndarray:
    """The center square of a picture, turned upright, on white, resized: (S, S, 3) uint8 RGB."""
    picture = upright(picture)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    resized = picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(resized).copy()


def resize_short_side(picture: Image.Image, side: int) -> Image.Image:
    """``picture`` with its short side at ``side``: halved by averaging while twice that is left, then bicubic.

    The steps of ADM's data loader (Dhariwal & Nichol 2021, guided_diffusion/image_datasets.py), for parity with the numbers
    published on pictures prepared so.
    """
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = side / min(picture.size)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)


def adm_square(picture: Image.Image, size: int) -> np.ndarray:
    """ADM's center crop: :func:`resize_short_side`, then the center square. (S, S, 3) uint8."""
    picture = resize_short_side(picture, size)
    return _square(picture, (picture.width - size) // 2, (picture.height - size) // 2, size)


def random_square(picture: Image.Image, size: int, least: float, rng: np.random.Generator) -> np.ndarray:
    """ADM's random crop: the short side at a uniform size up to ``size`` / ``least``, then a uniform square of it."""
    picture = resize_short_side(picture, int(rng.integers(size, math.ceil(size / least), endpoint=True)))
    left, top = (int(rng.integers(0, side - size, endpoint=True)) for side in picture.size)
    return _square(picture, left, top, size)


def _square(picture: Image.Image, left: int, top: int, size: int) -> np.ndarray:
    return np.asarray(picture.crop((left, top, left + size, top + size))).copy()
