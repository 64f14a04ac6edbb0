"""What is held out of pictures in files: a share of them, nothing, or other pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from textok_fast.config import DataConfig
from textok_fast.data import CaptionedImages, Example, load_dataset, write_shards
from textok_fast.errors import InputError

SPLITS = ("train", "validation", "all")


@pytest.fixture(params=["folder", "webdataset"])
def place(request: pytest.FixtureRequest, tmp_path: Path, write_image: Callable[..., Path]) -> Callable[[str, int], DataConfig]:
    """``count`` captioned pictures at ``name``, as a folder or as shards."""

    def make(name: str, count: int) -> DataConfig:
        directory = tmp_path / name
        if request.param == "folder":
            for k in range(count):
                write_image(directory / f"{k}.png", (k, 0, 0), (8, 8)).with_suffix(".txt").write_text(f"{name} {k}")
        else:
            pixels = np.zeros((8, 8, 3), dtype=np.uint8)
            write_shards((Example(pixels, f"{name} {k}", 0, f"{k}") for k in range(count)), directory, 40)
        return DataConfig(source=request.param, path=str(directory), image_size=8)

    return make


def said(config: DataConfig, split: str, **settings: Any) -> set[str]:
    found: CaptionedImages = load_dataset(DataConfig(**{**vars(config), **settings}), split)
    captions = [found.captions(index)[0] for index in range(len(found))]
    assert captions == [example.caption for example in found]  # without decoding, the same
    return set(captions)


def test_a_share_of_nothing_trains_on_everything(place: Callable[[str, int], DataConfig]) -> None:
    config = place("pictures", 60)
    train, validation, everything = (said(config, split) for split in SPLITS)
    assert len(everything) == 60 and validation and train == everything - validation
    assert said(config, "train", validation_share=0.0) == everything == said(config, "all", validation_share=0.0)
    with pytest.raises(InputError, match=r"nothing of .*pictures is held out \(data\.validation_share=0\).*validation_path"):
        said(config, "validation", validation_share=0.0)
    half = said(config, "validation", validation_share=0.5)
    assert validation <= half and 15 <= len(half) <= 45  # a larger share holds out more, never others
    with pytest.raises(InputError, match=r"validation_share must be in \[0, 1\), got 1"):
        said(config, "train", validation_share=1.0)


def test_pictures_of_another_place_are_held_out_and_all_of_the_first_train(place: Callable[[str, int], DataConfig]) -> None:
    config, other = place("pictures", 40), place("held-out", 7)
    settings = {"validation_path": other.path}
    everything = {f"pictures {k}" for k in range(40)}
    assert said(config, "train", **settings) == said(config, "all", **settings) == everything
    assert said(config, "validation", **settings) == {f"held-out {k}" for k in range(7)}
    text = load_dataset(DataConfig(**{**vars(config), **settings}), "validation").describe()
    assert "7 captioned pictures (validation split" in text and other.path in text
    with pytest.raises(InputError, match=r"held-out pictures \(data\.validation_path\): .*nowhere"):
        said(config, "validation", validation_path="nowhere")
