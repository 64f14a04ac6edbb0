"""What a folder and WebDataset shards share: records of captioned image files, their split, and the decoding of one picture."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from textok_fast.data.base import CaptionedImages, Example, describe_skipped, stable_hash
from textok_fast.errors import InputError

log = logging.getLogger(__name__)

FILE_SPLITS = ("train", "validation", "all")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VALIDATION_SHARE = 0.05
# Above this many pictures they are not checked before the first is used; a corrupt one is then found when it is read.
VERIFY_AT_MOST = 20_000


@dataclass(frozen=True)
class Record:
    """One picture that is not decoded yet. ``place`` tells the data set where its bytes are."""

    name: str  # distinct in the data set; the key is made from it
    caption: str  # "" for none
    label: str  # "" for none
    place: Any


class FileDataset(CaptionedImages):
    """Captioned image files, center-cropped to a square and resized to ``image_size``.

    The split is decided by a hash of the key: about 5 % (at least one) are "validation", the others "train"; "all" is both.
    Pictures without a caption are counted in ``skipped``, unless ``need_captions`` is False; theirs is then "".
    A picture that turns out to be corrupt when it is read is counted in ``skipped`` and the next readable one takes its place.
    """

    source: str

    def __init__(
        self,
        records: Sequence[Record],
        split: str,
        image_size: int,
        skipped: Counter[str],
        where: str,
        need_captions: bool = True,
    ) -> None:
        if split not in FILE_SPLITS:
            raise InputError(f"{self.source} data have the splits {', '.join(FILE_SPLITS)}; got {split!r}")
        if image_size < 1:
            raise InputError(f"image_size must be at least 1, got {image_size}")
        if need_captions:
            skipped["missing caption"] += sum(not record.caption for record in records)
            records = [record for record in records if record.caption]
        if len(records) <= VERIFY_AT_MOST:
            kept = [record for record in records if self._is_readable(record)]
            skipped["corrupt image"] += len(records) - len(kept)
            records = kept
        if not records:
            raise InputError(f"{where} has no picture{' with a caption' * need_captions}{describe_skipped(skipped)}")
        self.image_size = image_size
        self.split = split
        self.skipped = {reason: count for reason, count in skipped.items() if count}
        self.label_names = sort_labels({record.label for record in records if record.label})
        self._label_index = {name: index for index, name in enumerate(self.label_names)}
        self._where = where
        keyed = sorted(zip(unique_keys([record.name for record in records]), records, strict=True), key=lambda pair: pair[0])
        hashes = [stable_hash("validation", key) for key, _ in keyed]
        limit = max(int(VALIDATION_SHARE * 2**64), min(hashes) + 1)
        in_validation = [value < limit for value in hashes]
        wanted = split == "validation"
        self._members = [pair for pair, held in zip(keyed, in_validation, strict=True) if split == "all" or held == wanted]
        if not self._members:
            raise InputError(f"the split {split!r} of {where} is empty: {len(records)} picture is too few for two splits")
        self._corrupt: set[int] = set()
        self.unlabelled = sum(not record.label for _, record in self._members) if self.label_names else 0

    @abstractmethod
    def _read(self, record: Record) -> bytes:
        """The bytes of a record's image file."""

    def _is_readable(self, record: Record) -> bool:
        try:
            check_image(self._read(record))
        except Exception as error:  # image decoders fail in many ways on a corrupt file
            log.warning("skipping %s: %s", record.name, error)
            return False
        return True

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Example:
        first = self._position(index)
        for position in (*range(first, len(self)), *range(first)):
            if position in self._corrupt:
                continue
            key, record = self._members[position]
            try:
                image = decode_image(self._read(record), self.image_size)
            except Exception as error:  # as above
                log.warning("skipping %s: %s", record.name, error)
                self._corrupt.add(position)
                self.skipped["corrupt image"] = self.skipped.get("corrupt image", 0) + 1
                continue
            return Example(image, record.caption, self._label_index.get(record.label, 0), key)
        raise InputError(f"no picture of {self._where} can be read any more{describe_skipped(self.skipped)}")

    def captions_by_label(self, limit: int) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for _, record in self._members:
            captions = found.setdefault(self._label_index.get(record.label, 0), [])
            if len(captions) < limit and record.caption not in captions:
                captions.append(record.caption)
        return dict(sorted(found.items()))

    def content_hash(self) -> str:
        """Of all keys, captions and labels; the pixels are not read."""
        digest = hashlib.blake2b(digest_size=16)
        for key, record in self._members:
            digest.update(json.dumps([key, record.caption, record.label]).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        classes = f", {len(self.label_names)} classes" if self.label_names else ""
        if self.unlabelled:
            classes += f", {self.unlabelled:,} without a label count as {self.label_names[0]!r}"
        return (
            f"{len(self):,} captioned pictures ({self.split} split, {self.image_size} px{classes}) of the {self.source} "
            f"{self._where}. Licence: the caller's own data{describe_skipped(self.skipped)}"
        )


def sort_labels(names: Iterable[str]) -> list[str]:
    """By number when all are whole numbers (2 before 10), else by spelling."""
    found = list(names)
    if all(name.isascii() and name.isdecimal() for name in found):
        return sorted(found, key=lambda name: (int(name), name))
    return sorted(found)


def normalize_caption(text: str) -> str:
    """One line, single spaces."""
    return " ".join(text.split())


def unique_keys(names: Sequence[str]) -> list[str]:
    """A key for each name that is safe as a file name and distinct; a name's key does not depend on its position.

    It has no dot, at which readers of WebDataset shards end a sample's name.
    """
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "_", re.sub(r"\.[A-Za-z0-9]{1,5}$", "", name))[:120] for name in names]
    often = Counter(key.lower() for key in plain)  # some file systems do not tell upper from lower case
    seen: Counter[str] = Counter()
    keys = []
    for name, key in zip(names, plain, strict=True):
        if not key or often[key.lower()] > 1:
            seen[name] += 1
            key = f"{key or 'picture'}-{stable_hash('key', name, seen[name]):016x}"
        keys.append(key)
    return keys


def check_image(data: bytes) -> None:
    """Raises an error of the decoder when ``data`` is no complete image, without decoding pixels where the format allows."""
    with Image.open(io.BytesIO(data)) as picture:
        kind = picture.format
        if kind == "PNG":
            picture.verify()  # the checksums of all chunks
            return
        # A JPEG that ends as it should is taken as complete; decoding every picture would take long.
        if kind != "JPEG" or b"\xff\xd9" not in data[-4096:]:
            picture.load()


def decode_image(data: bytes, size: int) -> np.ndarray:
    """:func:`center_square` of an image file."""
    with Image.open(io.BytesIO(data)) as file:
        return center_square(file, size)


def center_square(picture: Image.Image, size: int) -> np.ndarray:
    """The center square of a picture, turned upright, on white, resized: (S, S, 3) uint8 RGB."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        picture = Image.fromarray((np.asarray(picture).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.new("RGBA", layer.size, "white")
        picture.alpha_composite(layer)
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    resized = picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(resized).copy()
