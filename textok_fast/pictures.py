"""Sheets of pictures with their captions, for training runs, data sets and reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from textok_fast.errors import InputError


def image_grid(images: Any, columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """Pictures side by side, ``columns`` a row, on white; captions, if given, below each, wrapped and cut to three lines.

    ``images``: uint8 (B, H, W, 3) array or tensor, or float (B, 3, H, W) in [-1, 1] (clipped). Raises
    :class:`InputError` for another form, no picture, or another number of captions.
    """
    pictures = as_uint8(images, "images")
    if columns < 1:
        raise InputError(f"columns must be at least 1, got {columns}")
    if captions is not None and len(captions) != len(pictures):
        raise InputError(f"{len(pictures)} pictures need as many captions, got {len(captions)}")
    count, height, width, _ = pictures.shape
    columns, gap, line = min(columns, count), 4, 11
    texts: list[list[str]] = []
    if captions is not None:
        font = ImageFont.load_default(size=9)
        texts = [_wrap(caption, width, font, lines=3) for caption in captions]
    below = max((len(lines) for lines in texts), default=0) * line + (2 if texts else 0)
    rows = math.ceil(count / columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + below + gap) + gap), "white")
    draw = ImageDraw.Draw(grid)
    for index, picture in enumerate(pictures):
        x, y = gap + index % columns * (width + gap), gap + index // columns * (height + below + gap)
        grid.paste(Image.fromarray(picture), (x, y))
        for number, text in enumerate(texts[index] if texts else []):
            draw.text((x, y + height + 2 + number * line), text, fill="black", font=font)
    return grid


def _wrap(text: str, width: int, font: Any, lines: int) -> list[str]:
    """Words of ``text`` in at most ``lines`` lines of ``width`` px, an ellipsis where some are left out."""
    wrapped: list[str] = []
    for word in text.split():
        longer = f"{wrapped[-1]} {word}" if wrapped else word
        if wrapped and font.getlength(longer) <= width:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    wrapped = [_cut(line, width, font) for line in wrapped]
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], _cut(wrapped[lines - 1] + " " + wrapped[lines], width, font, always=True)]
    return wrapped


def _cut(text: str, width: int, font: Any, always: bool = False) -> str:
    if not always and font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def as_uint8(images: Any, name: str) -> np.ndarray:
    """(B, H, W, 3) uint8 of uint8 (B, H, W, 3) or float (B, 3, H, W) in [-1, 1]."""
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu()
        images = images.float() if images.is_floating_point() else images  # numpy has no bfloat16
    array = np.asarray(images)
    if array.ndim == 4 and array.shape[1] == 3 and array.dtype.kind == "f" and np.isfinite(array).all():
        array = np.round((array.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)  # (B, H, W, 3)
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        wanted = "uint8 (B, H, W, 3), or finite float (B, 3, H, W) in [-1, 1]"
        raise InputError(f"{name} must be {wanted}, got {array.dtype} {tuple(array.shape)}")
    return np.ascontiguousarray(array)
