"""Cut-out pictures on transparency, the objects that scenes are composed of."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

# Named colours of backgrounds and of the drawn shapes.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (243, 145, 33),
    "yellow": (250, 218, 70),
    "green": (58, 160, 72),
    "teal": (32, 178, 170),
    "blue": (52, 110, 219),
    "purple": (132, 70, 178),
    "pink": (246, 150, 190),
    "brown": (130, 84, 48),
    "gray": (140, 140, 140),
    "black": (28, 28, 30),
    "white": (248, 248, 246),
}
MAX_WORDS = 6  # of an object's name


class Sprite(NamedTuple):
    """One object: its name and its picture, (H, W, 4) uint8 RGBA, not premultiplied."""

    name: str
    image: np.ndarray


class SpriteLibrary(Protocol):
    """A set of distinctly named objects whose pictures are decoded one at a time."""

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        ...

    @property
    def left_out(self) -> dict[str, int]:
        """How many pictures the source has that are not in the library, by reason."""
        ...

    def load(self, name: str) -> Sprite:
        """The picture of one name; ``OSError`` or ``ValueError`` when its file is corrupt."""
        ...


def premultiplied(sprite: Sprite, size: int) -> np.ndarray:
    """The sprite with its longer side resized to ``size`` pixels: (h, w, 4) uint8, colours multiplied by alpha.

    Resizing after the multiplication keeps the colour of invisible pixels out of the edges.
    """
    height, width = sprite.image.shape[:2]
    longest = max(height, width)
    target = (max(1, round(size * width / longest)), max(1, round(size * height / longest)))
    resized = Image.fromarray(sprite.image).convert("RGBa").resize(target, Image.Resampling.LANCZOS)
    pixels = np.frombuffer(resized.tobytes(), dtype=np.uint8).reshape(target[1], target[0], 4).copy()  # (h, w, 4)
    # The filter overshoots at edges; a colour above its alpha would overflow when it is laid over a background.
    np.minimum(pixels[..., :3], pixels[..., 3:], out=pixels[..., :3])
    return pixels
