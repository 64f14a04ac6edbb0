"""Tux Paint's stamps: photographs and drawings (PNG with transparency) with an English caption in the .txt beside each."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image

from textok_fast.data.sprites import MAX_WORDS, Sprite

_LONGEST = 256  # pixels; some files are above 2,000
_CUT = re.compile(r"[.!?;:\u2013\u2014\u2026]|\s(?:is|are|was|that|which|who|means|can|has|have|used)\s")


class StampLibrary:
    """The distinctly named stamps below one directory.

    ``left_out`` counts pictures without a usable caption, by reason.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.left_out: dict[str, int] = {"missing caption": 0, "caption too long": 0, "repeated caption": 0}
        self._files: dict[str, Path] = {}
        for picture in sorted(directory.rglob("*.png")):
            try:
                text = picture.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
            except OSError:
                self.left_out["missing caption"] += 1
                continue
            name = stamp_name(text.partition("\n")[0])
            if name is None:
                self.left_out["caption too long" if text.strip() else "missing caption"] += 1
            elif name in self._files:
                self.left_out["repeated caption"] += 1
            else:
                self._files[name] = picture

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def load(self, name: str) -> Sprite:
        with Image.open(self._files[name]) as file:
            picture = file.convert("RGBA")
        box = picture.getchannel("A").getbbox()
        if box is None:
            raise ValueError(f"{self._files[name]} is transparent everywhere")
        picture = picture.crop(box)
        if max(picture.size) > _LONGEST:
            scale = _LONGEST / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            picture = picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
        return Sprite(name, np.asarray(picture).copy())


def stamp_name(caption: str) -> str | None:
    """Makes "brown potato" of "A brown potato. It grows..."; None when that leaves nothing, or more than six words."""
    text = re.sub(r"\([^)]*\)", " ", caption.strip().lower().replace("\u2019", "'"))
    text = re.sub(r"^\s*(?:an?|the)\s+", "", text)
    text = _CUT.split(text, maxsplit=1)[0]
    if len(text.split()) > MAX_WORDS:
        text = text.partition(",")[0]
    text = " ".join(re.sub(r"[^\w' -]", " ", text).split())
    return text if 0 < len(text.split()) <= MAX_WORDS else None
