from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from textok_fast.data.fetch import _fetch_once


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No test writes to the user's cache or remembers another test's download."""
    _fetch_once.cache_clear()
    cache = tmp_path / "textok-cache"
    monkeypatch.setenv("TEXTOK_CACHE", str(cache))
    yield cache
    _fetch_once.cache_clear()


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """Writes a picture of one colour; returns its path."""

    def write(path: Path, color: tuple[int, ...] = (200, 30, 60), size: tuple[int, int] = (20, 12)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.broadcast_to(np.array(color, dtype=np.uint8), (size[1], size[0], len(color)))
        Image.fromarray(np.ascontiguousarray(pixels)).save(path)
        return path

    return write
