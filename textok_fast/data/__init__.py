"""Captioned pictures: scenes composed of emoji, stamps or drawn shapes; a folder; WebDataset shards."""

from __future__ import annotations

from textok_fast.config import DataConfig
from textok_fast.data.base import CaptionedImages, Example, collate
from textok_fast.data.fetch import FetchedSource, fetch
from textok_fast.data.files import FILE_SPLITS
from textok_fast.data.folder import FolderDataset
from textok_fast.data.preview import contact_sheet, materialize
from textok_fast.data.scenes import SCENE_SPLITS, SceneDataset, load_scenes
from textok_fast.data.webdataset import WebDataset, write_shards
from textok_fast.errors import InputError
from textok_fast.paths import cache_dir

__all__ = [
    "FILE_SPLITS",
    "SCENE_SPLITS",
    "CaptionedImages",
    "Example",
    "FetchedSource",
    "FolderDataset",
    "SceneDataset",
    "WebDataset",
    "cache_dir",
    "collate",
    "contact_sheet",
    "fetch",
    "load_dataset",
    "load_scenes",
    "materialize",
    "write_shards",
]


def load_dataset(config: DataConfig, split: str, length: int | None = None, need_captions: bool = True) -> CaptionedImages:
    """The captioned pictures of a configuration, a map-style data set of :class:`Example`.

    Args:
        config: where the pictures come from.
        split: one of :data:`SCENE_SPLITS` for scenes ("emoji", "stamps", "shapes"), of :data:`FILE_SPLITS` for files.
        length: how many scenes; they are generated when asked for, so any number is free. Not for files.
        need_captions: whether files without a caption are left out; else theirs is "".

    Raises :class:`InputError` for an unknown source or split, and for a source with nothing to read.
    """
    if config.source in ("emoji", "stamps", "shapes"):
        return load_scenes(config, split, length)
    if config.source not in ("folder", "webdataset"):
        raise InputError(f"data.source must be emoji, stamps, shapes, folder or webdataset; got {config.source!r}")
    if not config.path:
        raise InputError(f"data.source={config.source} needs data.path")
    if length is not None:
        raise InputError(f"length is for generated scenes; data.source={config.source} has the pictures it has")
    reader = FolderDataset if config.source == "folder" else WebDataset
    return reader(config.path, split, config.image_size, need_captions)
