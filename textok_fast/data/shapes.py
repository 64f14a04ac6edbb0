"""Drawn shapes in named colours: the objects that need nothing from outside, and the stand-in for the others."""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw

from textok_fast.data.sprites import PALETTE, Sprite

SIZE = 128  # pixels a side of a shape
_OVERSAMPLE = 4
_OUTLINE = (70, 70, 74)  # so that a shape shows on a background of its own colour

Points = list[tuple[float, float]]


def _regular(corners: int, turn: float = -90.0, inner: float | None = None) -> Points:
    """A regular polygon in the unit square, or a star when ``inner`` gives the radius of the corners in between."""
    count = corners if inner is None else 2 * corners
    points = []
    for k in range(count):
        radius = 0.48 if inner is None or k % 2 == 0 else inner
        angle = math.radians(turn + 360.0 * k / count)
        points.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return points


def _heart() -> Points:
    curve = [2 * math.pi * k / 96 for k in range(96)]
    return [
        (
            0.5 + 0.029 * 16 * math.sin(t) ** 3,
            0.46 - 0.029 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in curve
    ]


def _arc(radius: float, start: float, stop: float, center: tuple[float, float] = (0.5, 0.5)) -> Points:
    angles = [math.radians(start + (stop - start) * k / 48) for k in range(49)]
    return [(center[0] + radius * math.cos(a), center[1] + radius * math.sin(a)) for a in angles]


# Outlines in the unit square, y down.
SHAPES: dict[str, Points] = {
    "arrow": [(0.04, 0.36), (0.52, 0.36), (0.52, 0.12), (0.96, 0.5), (0.52, 0.88), (0.52, 0.64), (0.04, 0.64)],
    "circle": _arc(0.46, 0, 360),
    "crescent": _arc(0.46, 60, 300) + _arc(0.41, 285, 75, (0.62, 0.5)),
    "cross": [
        (0.35, 0.05),
        (0.65, 0.05),
        (0.65, 0.35),
        (0.95, 0.35),
        (0.95, 0.65),
        (0.65, 0.65),
        (0.65, 0.95),
        (0.35, 0.95),
        (0.35, 0.65),
        (0.05, 0.65),
        (0.05, 0.35),
        (0.35, 0.35),
    ],
    "diamond": [(0.5, 0.03), (0.85, 0.5), (0.5, 0.97), (0.15, 0.5)],
    "heart": _heart(),
    "hexagon": _regular(6),
    "house": [(0.5, 0.05), (0.95, 0.45), (0.82, 0.45), (0.82, 0.95), (0.18, 0.95), (0.18, 0.45), (0.05, 0.45)],
    "lightning bolt": [(0.58, 0.03), (0.2, 0.56), (0.45, 0.56), (0.36, 0.97), (0.8, 0.4), (0.52, 0.4)],
    "oval": [(x, 0.5 + 0.6 * (y - 0.5)) for x, y in _arc(0.48, 0, 360)],
    "pentagon": _regular(5),
    "rectangle": [(0.04, 0.25), (0.96, 0.25), (0.96, 0.75), (0.04, 0.75)],
    "ring": _arc(0.47, 0, 360) + _arc(0.25, 360, 0),
    "semicircle": _arc(0.47, 180, 360, (0.5, 0.7)),
    "square": [(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)],
    "star": _regular(5, inner=0.2),
    "triangle": _regular(3),
}


class ShapeLibrary:
    """Every shape of :data:`SHAPES` in every colour of the palette, named like "red triangle"."""

    left_out: ClassVar[dict[str, int]] = {}

    @property
    def names(self) -> list[str]:
        return sorted(f"{color} {shape}" for color in PALETTE for shape in SHAPES)

    def load(self, name: str) -> Sprite:
        return Sprite(name, _draw(*name.split(" ", 1)))


@functools.cache
def _draw(color: str, shape: str) -> np.ndarray:
    """(H, W, 4) uint8 RGBA, read-only."""
    side = SIZE * _OVERSAMPLE
    mask = Image.new("L", (side, side), 0)
    points = [(x * side, y * side) for x, y in SHAPES[shape]]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    picture = Image.new("RGBA", (side, side), (*PALETTE[color], 0))
    picture.paste(Image.new("RGBA", (side, side), (*PALETTE[color], 255)), mask=mask)
    # The seam between a ring's outer and inner circle must not be outlined.
    edges = [points[:49], points[49:]] if shape == "ring" else [[*points, points[0]]]
    for edge in edges:
        ImageDraw.Draw(picture).line(edge, fill=(*_OUTLINE, 255), width=side // 40, joint="curve")
    pixels = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX)).copy()
    pixels.setflags(write=False)
    return pixels
