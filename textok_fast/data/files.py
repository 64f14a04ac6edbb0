"""What folders, shards and Hugging Face data sets share: records of captioned image files, their split, and their decoding."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from textok_fast.config import DataConfig
from textok_fast.data.base import CaptionedImages, Draw, Example, RawPicture, describe_skipped, stable_hash
from textok_fast.data.columns import Record, Records, Strings
from textok_fast.data.crops import Crop, center_square
from textok_fast.errors import InputError

log = logging.getLogger(__name__)

FILE_SOURCES = ("folder", "webdataset", "huggingface")
FILE_SPLITS = ("train", "validation", "all")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Above this many pictures they are not checked before the first is used; a corrupt one is then found when it is read.
VERIFY_AT_MOST = 20_000


class FileDataset(CaptionedImages):
    """Captioned image files, each brought to a square of ``crop.size``.

    The split is decided by a hash of the key: about ``validation_share`` of them are "validation", the others "train"; "all" is
    both. Of a share between 0 and 1 at least one is "validation".
    Pictures without a caption are counted in ``skipped``, unless ``need_captions`` is False; theirs is then "".
    A picture that turns out to be corrupt when it is read is counted in ``skipped`` and the next readable one takes its place;
    :meth:`fetch` leaves the place empty instead. A place that cannot be reached is an error.

    Of a picture with several captions, and of a random crop, a :class:`~textok_fast.data.base.Draw` gets one that depends on
    its seed, its epoch and the key; a plain index gets the first caption and the center.
    """

    source: str

    def __init__(
        self,
        records: Records,
        split: str,
        crop: Crop,
        skipped: Counter[str],
        where: str,
        need_captions: bool = True,
        verify: bool = True,
        by_key: bool = True,
        validation_share: float = DataConfig.validation_share,
    ) -> None:
        """``verify``: look at each picture now if they are few. ``by_key``: sorted by key; else in the records' order."""
        if split not in FILE_SPLITS:
            raise InputError(f"{self.source} data have the splits {', '.join(FILE_SPLITS)}; got {split!r}")
        if crop.size < 1:
            raise InputError(f"image_size must be at least 1, got {crop.size}")
        self._records = records
        rows = list(range(len(records)))
        if need_captions:
            captioned = [row for row in rows if records.captions[row]]
            skipped["missing caption"] += len(rows) - len(captioned)
            rows = captioned
        if verify and len(rows) <= VERIFY_AT_MOST:
            kept = [row for row in rows if self._is_readable(records[row])]
            skipped["corrupt image"] += len(rows) - len(kept)
            rows = kept
        if not rows:
            raise InputError(f"{where} has no picture{' with a caption' * need_captions}{describe_skipped(skipped)}")
        self.crop, self.image_size = crop, crop.size
        self.split = split
        self.skipped = {reason: count for reason, count in skipped.items() if count}
        self.label_names = sort_labels({label for row in rows if (label := records.labels[row])})
        self._label_index = {name: index for index, name in enumerate(self.label_names)}
        self._where = where
        keys = unique_keys([records.names[row] for row in rows])
        order = sorted(range(len(rows)), key=keys.__getitem__) if by_key else range(len(rows))
        if split != "all":
            hashes = [stable_hash("validation", key) for key in keys]
            limit = int(validation_share * 2**64)
            if 0 < validation_share < 1:
                limit = max(limit, min(hashes) + 1)
            order = [i for i in order if (hashes[i] < limit) == (split == "validation")]
        if not order:
            raise empty_split(split, where, len(rows), validation_share)
        self._keys = Strings.of(keys[i] for i in order)
        self._rows = np.array([rows[i] for i in order], dtype=np.int64)  # (n,) into the records
        self._corrupt: set[int] = set()
        self.unlabelled = sum(not records.labels[row] for row in self._rows) if self.label_names else 0

    @abstractmethod
    def _read(self, records: Sequence[Record]) -> list[bytes | Exception]:
        """The bytes of the records' image files, or why there are none. Raises InputError when they cannot be reached."""

    def _is_readable(self, record: Record) -> bool:
        (data,) = self._read([record])
        try:
            check_image(_bytes(data))
        except Exception as error:  # image decoders fail in many ways on a corrupt file
            log.warning("skipping %s: %s", record.name, error)
            return False
        return True

    def __len__(self) -> int:
        return len(self._rows)

    def _record(self, position: int) -> Record:
        return self._records[int(self._rows[position])]

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Several at once, as loaders ask: what lies near to each other is read at once."""
        found = self.fetch(indices)
        return [self._next(index) if each is None else each for index, each in zip(indices, found, strict=True)]

    def _next(self, index: int) -> Example:
        """The first readable picture behind a corrupt one."""
        first = self._position(index)
        for position in (*range(first + 1, len(self)), *range(first)):
            (example,) = self.fetch([index.at(position) if isinstance(index, Draw) else position])
            if example is not None:
                return example
        raise InputError(f"no picture of {self._where} can be read any more{describe_skipped(self.skipped)}")

    def fetch(self, indices: Sequence[int]) -> list[Example | None]:
        positions = [self._position(index) for index in indices]
        examples: list[Example | None] = []
        for index, position, data in zip(indices, positions, self._read_at(positions), strict=True):
            record = self._record(position)
            key = self._keys[position]
            label = self._label_index.get(record.label, 0)
            try:
                examples.append(draw_example(index, key, _bytes(data), record.captions, label, self.crop))
            except Exception as error:  # as above
                self._note_corrupt(position, record, error)
                examples.append(None)
        return examples

    def _read_at(self, positions: Sequence[int]) -> list[bytes | Exception]:
        wanted = [position for position in dict.fromkeys(positions) if position not in self._corrupt]
        data = dict(zip(wanted, self._read([self._record(position) for position in wanted]), strict=True))
        return [data.get(position, ValueError("known to be corrupt")) for position in positions]

    def _note_corrupt(self, position: int, record: Record, error: Exception) -> None:
        if position not in self._corrupt:
            log.warning("skipping %s: %s", record.name, error)
            self._corrupt.add(position)
            self.skipped["corrupt image"] = self.skipped.get("corrupt image", 0) + 1

    def key(self, index: int) -> str:
        found: str = self._keys[self._position(index)]
        return found

    @functools.cached_property
    def several_captions(self) -> bool:  # type: ignore[override]
        return any("\n" in self._records.captions[row] for row in self._rows)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._record(self._position(index)).captions

    def raw(self, indices: Sequence[int]) -> list[RawPicture | None]:
        """The files as they are; None for a corrupt one."""
        positions = [self._position(index) for index in indices]
        found: list[RawPicture | None] = []
        for position, data in zip(positions, self._read_at(positions), strict=True):
            record = self._record(position)
            try:
                kind = check_image(_bytes(data))
            except Exception as error:  # as above
                self._note_corrupt(position, record, error)
                found.append(None)
                continue
            found.append(RawPicture(self._keys[position], _bytes(data), kind, record.captions, record.label))
        return found

    def captions_by_label(self, limit: int) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for position in range(len(self)):
            record = self._record(position)
            captions = found.setdefault(self._label_index.get(record.label, 0), [])
            captions += [each for each in (record.captions or ("",)) if each not in captions][: limit - len(captions)]
        return dict(sorted(found.items()))

    def content_hash(self) -> str:
        """Of all keys, captions and labels; the pixels are not read."""
        digest = hashlib.blake2b(digest_size=16)
        for key, row in zip(self._keys, self._rows, strict=True):
            digest.update(json.dumps([key, self._records.captions[row], self._records.labels[row]]).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        classes = f", {len(self.label_names)} classes" if self.label_names else ""
        if self.unlabelled:
            classes += f", {self.unlabelled:,} without a label count as {self.label_names[0]!r}"
        return (
            f"{len(self):,} captioned pictures ({self.split} split, {self.image_size} px{classes}) of the {self.source} "
            f"{self._where}. Licence: the caller's own data{describe_skipped(self.skipped)}"
        )


def empty_split(split: str, where: str, count: int, validation_share: float) -> InputError:
    """Why there is nothing in a split of ``count`` pictures."""
    if split == "validation" and not validation_share:
        return InputError(
            f"nothing of {where} is held out (data.validation_share=0): name other pictures by data.validation_path, or of a "
            "Hugging Face data set by data.huggingface.validation_split, or hold out a share"
        )
    return InputError(f"the split {split!r} of {where} is empty: {count} picture is too few for two splits")


def draw_example(index: int, key: str, data: bytes, captions: Sequence[str], label: int, crop: Crop) -> Example:
    """The example of an index that may be a :class:`~textok_fast.data.base.Draw`; an error of the decoder if it is corrupt."""
    rng, caption = None, captions[0] if captions else ""
    if isinstance(index, Draw):
        rng = _draws(index, key)
        if len(captions) > 1:
            caption = captions[int(rng.integers(len(captions)))]
    return Example(decode_image(data, crop, rng), caption, label, key)


def draw_caption(index: Draw, key: str, count: int) -> int:
    """Which of ``count`` captions of a picture :func:`draw_example` takes."""
    return int(_draws(index, key).integers(count)) if count > 1 else 0


def _draws(index: Draw, key: str) -> np.random.Generator:
    return np.random.default_rng(stable_hash("draw", index.seed, index.epoch, key))


def _bytes(data: bytes | Exception) -> bytes:
    if isinstance(data, Exception):
        raise data
    return data


def sort_labels(names: Iterable[str]) -> list[str]:
    """By number when all are whole numbers (2 before 10), else by spelling."""
    found = list(names)
    if all(name.isascii() and name.isdecimal() for name in found):
        return sorted(found, key=lambda name: (int(name), name))
    return sorted(found)


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


def check_image(data: bytes) -> str:
    """The kind of an image file, as Pillow calls it ("PNG", "JPEG", ...).

    Raises an error of the decoder when ``data`` is no complete image, without decoding pixels where the format allows.
    """
    with Image.open(io.BytesIO(data)) as picture:
        kind = str(picture.format)
        if kind == "PNG":
            picture.verify()  # the checksums of all chunks
        # A JPEG that ends as it should is taken as complete; decoding every picture would take long.
        elif kind != "JPEG" or b"\xff\xd9" not in data[-4096:]:
            picture.load()
        return kind


def decode_image(data: bytes, crop: Crop | int, rng: np.random.Generator | None = None) -> np.ndarray:
    """An image file brought to a square: (S, S, 3) uint8 RGB. A number is :func:`~textok_fast.data.crops.center_square`'s."""
    with Image.open(io.BytesIO(data)) as file:
        return center_square(file, crop) if isinstance(crop, int) else crop(file, rng)
