"""Captioned pictures of the ``datasets`` library: by name from the Hub, or from a directory, downloaded first or streamed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from textok_fast import paths
from textok_fast.config import DataConfig, HuggingFaceConfig, to_dict
from textok_fast.data.base import CaptionedImages, Example, RawPicture, describe_skipped
from textok_fast.data.columns import Record, Records, Strings
from textok_fast.data.crops import Crop
from textok_fast.data.files import FILE_SPLITS, FileDataset, check_image, draw_example, empty_split, unique_keys
from textok_fast.data.shard_index import captions_of
from textok_fast.data.storage import read, short_hash
from textok_fast.data.webdataset import order_by_runs
from textok_fast.errors import InputError
from textok_fast.files import write_text

log = logging.getLogger(__name__)

CAPTION_COLUMNS = ("caption", "captions", "text")
HELD_OUT_OF_STREAM = 1024  # pictures at a stream's beginning for validation, or data.validation_share of it where that is less


class Columns(NamedTuple):
    """The columns that are read, "" for none, and the classes' names where the data set has them."""

    image: str
    caption: str
    label: str
    label_names: list[str]

    def captions(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return captions_of({"caption": row[self.caption]}) if self.caption else ()

    def label_of(self, row: Mapping[str, Any]) -> str:
        value = row[self.label] if self.label else None
        if value is None or (self.label_names and value == -1):  # -1: the label of a test set
            return ""
        return self.label_names[value] if self.label_names else str(value).strip()


def load_huggingface(
    config: DataConfig,
    split: str,
    crop: Crop,
    need_captions: bool = True,
    validation_share: float = DataConfig.validation_share,
) -> CaptionedImages:
    """The data set that ``config`` names. Raises :class:`InputError` when it, its split or a column cannot be had."""
    options = config.huggingface
    rows = _open(config.path, options)
    if isinstance(rows, Mapping):
        if options.split not in rows:
            raise InputError(
                f"{config.path} has the splits {', '.join(rows)}; set data.huggingface.split (got {options.split})"
            )
        rows = rows[options.split]
    columns = _columns(rows, config.path, options)
    where = f"{config.path} ({options.split})"
    if options.streaming:
        return HuggingFaceStream(rows, columns, config, split, crop, where, need_captions, validation_share)
    windows = (config.shuffle_buffer, config.read_streams)
    return HuggingFaceDataset(rows, columns, split, crop, where, need_captions, *windows, validation_share)


def _open(path: str, options: HuggingFaceConfig) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError("data.source=huggingface needs datasets: pip install 'textok-fast[data]'") from None
    try:
        folder = Path(path)
        if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(path)
            if not options.streaming:
                return found
            found = found[options.split] if isinstance(found, Mapping) and options.split in found else found
            return found if isinstance(found, Mapping) else found.to_iterable_dataset()
        given = {"split": options.split, "revision": options.revision or None, "streaming": options.streaming}
        return datasets.load_dataset(path, options.subset or None, **given)
    except Exception as error:  # of the Hub, of a missing script, of a parser
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot load the data set {path!r} ({options.split}): {reason}") from error


def _columns(rows: Any, path: str, options: HuggingFaceConfig) -> Columns:
    import datasets

    features = rows.features
    if features is None:
        raise InputError(f"{path} does not say what its columns are when streamed; load it with huggingface.streaming=false")

    def chosen(what: str, given: str, candidates: Sequence[str]) -> str:
        if given and given not in features:
            raise InputError(f"{path} has no column {given!r} for data.huggingface.{what}; it has {', '.join(features)}")
        return given or next((name for name in candidates if name in features), "")

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = chosen("image_column", options.image_column, images)
    if not image or image not in images:
        raise InputError(f"{path} has no column of images ({', '.join(f'{n}: {f}' for n, f in features.items())[:300]})")
    label = chosen("label_column", options.label_column, ("label",))
    names = list(features[label].names) if label and isinstance(features[label], datasets.ClassLabel) else []
    return Columns(image, chosen("caption_column", options.caption_column, CAPTION_COLUMNS), label, names)


def _undecoded(rows: Any, columns: Columns) -> Any:
    """``rows`` with the files of the pictures instead of the pictures, and nothing else that is not read."""
    import datasets

    wanted = [name for name in (columns.image, columns.caption, columns.label) if name]
    return rows.select_columns(wanted).cast_column(columns.image, datasets.Image(decode=False))


def _file(value: Any) -> bytes | Exception:
    """The image file in a cell: its bytes, or what lies where it says."""
    try:
        if value is None:
            return ValueError("the cell is empty")
        data: bytes = value["bytes"] if value.get("bytes") else read(value["path"])
        return data
    except OSError as error:
        return error


class HuggingFaceDataset(FileDataset):
    """A data set that lies on this machine as Arrow files. A picture's key is its split and row."""

    source = "Hugging Face data set"

    def __init__(
        self,
        rows: Any,
        columns: Columns,
        split: str,
        crop: Crop,
        where: str,
        need_captions: bool,
        shuffle_buffer: int,
        read_streams: int,
        validation_share: float,
    ) -> None:
        undecoded = _undecoded(rows, columns)
        self._images = undecoded.select_columns([columns.image])
        self._image, self._buffer, self._streams = columns.image, shuffle_buffer, read_streams
        said: list[tuple[str, str]] = []
        others = [name for name in (columns.caption, columns.label) if name]
        if others:
            for batch in undecoded.select_columns(others).iter(1000):
                for values in zip(*(batch[name] for name in others), strict=True):
                    row = dict(zip(others, values, strict=True))
                    said.append(("\n".join(columns.captions(row)), columns.label_of(row)))
        else:
            said = [("", "")] * len(rows)
        name = where.rpartition("(")[2].rstrip(")")
        names = Strings.of(f"{name}/{row:09d}" for row in range(len(rows)))
        captions, labels = (Strings.of(each[k] for each in said) for k in (0, 1))
        records = Records(names, captions, labels, range(len(rows)))
        super().__init__(records, split, crop, Counter(), where, need_captions, validation_share=validation_share)

    def _read(self, records: Sequence[Record]) -> list[bytes | Exception]:
        if not records:
            return []
        return [_file(value) for value in self._images[[record.place for record in records]][self._image]]


class HuggingFaceStream(CaptionedImages):
    """A streamed data set, in windows of ``data.shuffle_buffer`` pictures that are read in order and kept, two at a time.

    An index is a place in the stream, so that a run is a function of its seed and step as on any data; what that costs is
    that windows keep their order in every epoch (only pictures within one are shuffled), that the number of pictures must be
    known, and that a reader that goes back, or a run that is continued, reads the stream again up to where it was: from the
    nearest place that a run on this machine has noted, which it does for a fixed ``revision`` and for directories.
    Each loader worker and each process reads the whole stream.

    The first 1,024 pictures, or ``validation_share`` of all where that is less, are "validation". Pictures without a caption
    and corrupt ones give way to the next of their window.
    """

    def __init__(
        self,
        rows: Any,
        columns: Columns,
        config: DataConfig,
        split: str,
        crop: Crop,
        where: str,
        need_captions: bool = True,
        validation_share: float = DataConfig.validation_share,
    ) -> None:
        if split not in FILE_SPLITS:
            raise InputError(f"Hugging Face data have the splits {', '.join(FILE_SPLITS)}; got {split!r}")
        known = (rows.info.splits or {}).get(config.huggingface.split)
        count = config.huggingface.length or (known.num_examples if known is not None else 0)
        if not count:
            raise InputError(f"{where} does not say how many pictures it has: set data.huggingface.length")
        held = int(count * validation_share)
        if 0 < validation_share < 1:
            held = max(1, min(HELD_OUT_OF_STREAM, held))
        self._first, self._length = {"train": (held, count - held), "validation": (0, held), "all": (0, count)}[split]
        if self._length < 1:
            raise empty_split(split, where, count, validation_share)
        self._rows, self._columns, self.crop, self._where, self.split = rows, columns, crop, where, split
        self._undecoded = _undecoded(rows, columns)
        self._need_captions, self._buffer = need_captions, config.shuffle_buffer
        self._key_prefix = config.huggingface.split
        self.label_names = columns.label_names
        self.skipped: dict[str, int] = {}
        self._states = _states_directory(config)
        options = {name: value for name, value in to_dict(config.huggingface).items() if name != "validation_split"}
        self._identity = {"path": config.path, **options, "count": count, "split": split}
        if validation_share != DataConfig.validation_share:
            self._identity["held_out"] = held
        self._windows: OrderedDict[int, list[Mapping[str, Any]]] = OrderedDict()
        self._stream: Iterator[Mapping[str, Any]] | None = None
        self._at = 0  # the place in the stream that comes next
        self._bad: set[int] = set()
        told = rows.features.get(columns.caption) if columns.caption else None
        self.several_captions = told is not None and getattr(told, "dtype", "") not in ("string", "large_string")

    def __getstate__(self) -> dict[str, Any]:  # another process opens the stream for itself
        return {**self.__dict__, "_windows": OrderedDict(), "_stream": None, "_at": 0}

    def __len__(self) -> int:
        return self._length

    def epoch_order(self, seed: int, epoch: int, batch: int, rows: Sequence[int] | None = None) -> np.ndarray | None:
        rng = np.random.default_rng([2, seed, epoch])
        if rows is not None:  # windows of the stream, of which ``rows`` may skip much
            order = np.argsort(np.asarray(rows) // self._buffer + rng.random(len(rows)))
            return order[: len(order) // batch * batch].astype(np.int64)
        return order_by_runs(np.array([0, len(self)]), rng, batch, self._buffer, streams=1)

    def _window(self, number: int) -> list[Mapping[str, Any]]:
        """The rows of indices ``number`` x buffer on."""
        if number in self._windows:
            return self._windows[number]
        begin = self._first + number * self._buffer
        if self._stream is None or self._at > begin:
            self._seek(begin)
        count = min(self._buffer, len(self) - number * self._buffer)
        for passed in range(self._at, begin):
            if self._states is not None and (passed - self._first) % self._buffer == 0:
                self._note_state()
            self._next_row()
        if self._states is not None:
            self._note_state()
        self._windows[number] = [self._next_row() for _ in range(count)]
        while len(self._windows) > 2:
            self._windows.popitem(last=False)
        return self._windows[number]

    def _next_row(self) -> Mapping[str, Any]:
        assert self._stream is not None
        row = next(self._stream, None)
        if row is None:
            raise InputError(f"{self._where} ended after {self._at} pictures: set data.huggingface.length={self._at}")
        self._at += 1
        return row

    def _seek(self, place: int) -> None:
        """Opens the stream at the nearest noted place before ``place``, or at its beginning."""
        noted = {int(path.stem): path for path in self._states.glob("*.json")} if self._states is not None else {}
        self._at = max((at for at in noted if at <= place), default=0)
        state = json.loads(noted[self._at].read_text(encoding="utf-8")) if self._at else None
        if state is None:
            self._undecoded = _undecoded(self._rows, self._columns)
        else:
            self._undecoded.load_state_dict(state)
        log.info("%s is read from picture %d on, for %d", self._where, self._at, place)
        self._stream = iter(self._undecoded)

    def _note_state(self) -> None:
        assert self._states is not None
        file = self._states / f"{self._at}.json"
        if self._at and not file.exists():
            write_text(file, json.dumps(self._undecoded.state_dict()))

    def _row(self, position: int) -> Mapping[str, Any]:
        return self._window(position // self._buffer)[position % self._buffer]

    def key(self, index: int) -> str:
        return unique_keys([f"{self._key_prefix}/{self._first + self._position(index):09d}"])[0]

    def captions(self, index: int) -> tuple[str, ...]:
        return self._columns.captions(self._row(self._position(index)))

    def fetch(self, indices: Sequence[int]) -> list[Example | None]:
        found: dict[int, Example | None] = {}
        for at in sorted(range(len(indices)), key=lambda at: indices[at]):  # the stream is read forwards
            position = self._position(indices[at])
            row = self._row(position)
            captions, label = self._columns.captions(row), self._columns.label_of(row)
            number = self.label_names.index(label) if label in self.label_names else 0
            try:
                if self._need_captions and not captions:
                    raise LookupError("missing caption")
                data = _file(row[self._columns.image])
                if isinstance(data, Exception):
                    raise data
                found[at] = draw_example(indices[at], self.key(position), data, captions, number, self.crop)
            except InputError:
                raise
            except Exception as error:  # image decoders fail in many ways on a corrupt file
                self._note_bad(position, error)
                found[at] = None
        return [found[at] for at in range(len(indices))]

    def _note_bad(self, position: int, error: Exception) -> None:
        if position not in self._bad:
            self._bad.add(position)
            log.warning("skipping %s: %s", self.key(position), error)
            reason = "missing caption" if isinstance(error, LookupError) else "corrupt image"
            self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        found = self.fetch(indices)
        return [self._next(index) if each is None else each for index, each in zip(indices, found, strict=True)]

    def _next(self, index: int) -> Example:
        """The next picture of the window that can be used."""
        position = self._position(index)
        first = position - position % self._buffer
        count = len(self._window(position // self._buffer))
        for step in range(1, count):
            other = first + (position - first + step) % count
            (example,) = self.fetch([index.at(other) if hasattr(index, "at") else other])
            if example is not None:
                return example
        raise InputError(
            f"no picture of {self._where} from {first} to {first + count} can be used{describe_skipped(self.skipped)}"
        )

    def raw(self, indices: Sequence[int]) -> list[RawPicture | None]:
        found: list[RawPicture | None] = []
        for index in indices:
            position = self._position(index)
            row = self._row(position)
            data, captions = _file(row[self._columns.image]), self._columns.captions(row)
            try:
                if self._need_captions and not captions:
                    raise LookupError("missing caption")
                if isinstance(data, Exception):
                    raise data
                kind = check_image(data)
                found.append(RawPicture(self.key(position), data, kind, captions, self._columns.label_of(row)))
            except Exception as error:  # as above
                self._note_bad(position, error)
                found.append(None)
        return found

    def captions_by_label(self, limit: int) -> dict[int, list[str]]:
        """Of the first window: the others are not read for it."""
        found: dict[int, list[str]] = {}
        for row in self._window(0):
            label = self._columns.label_of(row)
            captions = found.setdefault(self.label_names.index(label) if label in self.label_names else 0, [])
            captions += [each for each in self._columns.captions(row) if each not in captions][: limit - len(captions)]
        return dict(sorted(found.items()))

    def describe(self) -> str:
        classes = f", {len(self.label_names)} classes" if self.label_names else ""
        return (
            f"{len(self):,} pictures ({self.split} split, {self.crop.size} px{classes}) streamed from {self._where}, shuffled "
            f"within {self._buffer:,}. Licence: the data set's{describe_skipped(self.skipped)}"
        )

    def content_hash(self) -> str:
        """Of what names the data set: its contents are not read for it."""
        return hashlib.blake2b(json.dumps(self._identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def _states_directory(config: DataConfig) -> Path | None:
    """Where the places in a stream are noted; None where it may change without our knowing."""
    folder, options = Path(config.path), config.huggingface
    if folder.is_dir():
        tag = max((f"{path.stat().st_mtime_ns}" for path in folder.rglob("*") if path.is_file()), default="")
    elif options.revision:
        tag = options.revision
    else:
        return None
    name = short_hash(folder.resolve() if folder.is_dir() else config.path, tag, options.subset, options.split)
    return paths.cache_dir() / "streams" / name
