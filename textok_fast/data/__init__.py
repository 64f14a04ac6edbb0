"""Captioned pictures: scenes composed of emoji, stamps or drawn shapes; a folder; WebDataset shards; Hugging Face data sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from textok_fast.config import DataConfig
from textok_fast.data.base import CaptionedImages, Draw, Example, RawPicture, collate
from textok_fast.data.crops import Crop
from textok_fast.data.fetch import FetchedSource, fetch
from textok_fast.data.files import FILE_SOURCES, FILE_SPLITS, IMAGE_SUFFIXES
from textok_fast.data.folder import FolderDataset
from textok_fast.data.huggingface import load_huggingface
from textok_fast.data.pack import PackOptions, pack
from textok_fast.data.preview import contact_sheet, materialize
from textok_fast.data.scenes import SCENE_SPLITS, SceneDataset, load_scenes
from textok_fast.data.storage import is_url
from textok_fast.data.webdataset import WebDataset, write_shards
from textok_fast.errors import InputError
from textok_fast.paths import cache_dir

__all__ = [
    "FILE_SPLITS",
    "SCENE_SPLITS",
    "CaptionedImages",
    "Draw",
    "Example",
    "FetchedSource",
    "FolderDataset",
    "PackOptions",
    "RawPicture",
    "SceneDataset",
    "WebDataset",
    "cache_dir",
    "collate",
    "contact_sheet",
    "data_of",
    "fetch",
    "load_dataset",
    "load_scenes",
    "materialize",
    "pack",
    "write_shards",
]


def load_dataset(config: DataConfig, split: str, length: int | None = None, need_captions: bool = True) -> CaptionedImages:
    """The captioned pictures of a configuration, a map-style data set of :class:`Example`.

    Args:
        config: where the pictures come from.
        split: one of :data:`SCENE_SPLITS` for scenes ("emoji", "stamps", "shapes"), of :data:`FILE_SPLITS` for files; of these
            "validation" is a share of ``config.path``, or what lies at ``config.held_out_at``.
        length: how many scenes; they are generated when asked for, so any number is free. Not for files.
        need_captions: whether files without a caption are left out; else theirs is "".

    Raises :class:`InputError` for an unknown source or split, and for a source with nothing to read.
    """
    if config.source in ("emoji", "stamps", "shapes"):
        return load_scenes(config, split, length)
    if config.source not in FILE_SOURCES:
        raise InputError(f"data.source must be emoji, stamps, shapes, folder, webdataset or huggingface; got {config.source!r}")
    if not config.path:
        raise InputError(f"data.source={config.source} needs data.path")
    if length is not None:
        raise InputError(f"length is for generated scenes; data.source={config.source} has the pictures it has")
    kind = "adm" if config.crop == "random" and split != "train" else config.crop
    crop = Crop(config.image_size, kind, config.crop_min, config.flip and split == "train")
    if not config.held_out_at:
        return _load_files(config, split, crop, need_captions, config.validation_share)
    if split != "validation":  # all of the one place trains, all of the other validates
        return _load_files(config, split, crop, need_captions, 0.0)
    if config.source == "huggingface":
        other = dataclasses.replace(config.huggingface, split=config.held_out_at, length=0)
        setting, config = "data.huggingface.validation_split", dataclasses.replace(config, huggingface=other)
    else:
        setting, config = "data.validation_path", dataclasses.replace(config, path=config.held_out_at)
    try:
        return _load_files(config, split, crop, need_captions, 1.0)
    except InputError as error:
        raise InputError(f"of the held-out pictures ({setting}): {error}") from None


def _load_files(config: DataConfig, split: str, crop: Crop, need_captions: bool, share: float) -> CaptionedImages:
    """``share`` of the pictures at ``config.path`` are "validation"."""
    if config.source == "folder":
        return FolderDataset(config.path, split, crop, need_captions, config.caption_lines, share)
    windows = {"shuffle_buffer": config.shuffle_buffer, "read_streams": config.read_streams}
    if config.source == "webdataset":
        return WebDataset(config.path, split, crop, need_captions, config.caption_lines, **windows, validation_share=share)
    return load_huggingface(config, split, crop, need_captions, share)


def data_of(images: str, **settings: Any) -> DataConfig:
    """The configuration of the pictures at ``images``: a folder of pictures or .tar shards, a pattern of shards, or a URL."""
    folder = Path(images)
    if folder.is_dir():
        tars = any(folder.glob("*.tar"))
        is_shards = tars and not any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*"))
    else:
        is_shards = images.endswith((".tar", "/index.json")) or is_url(images)
        if not is_shards:
            raise InputError(f"no folder {images}; wanted a folder of captioned pictures or WebDataset shards (*.tar)")
    return DataConfig(**{**settings, "source": "webdataset" if is_shards else "folder", "path": images})
