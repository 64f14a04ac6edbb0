"""WebDataset tar shards, local or by URL, read as a map-style data set, and written.

The ``webdataset`` library streams shards in order; a data set with a length and ``[index]``, of which a run can be continued
exactly, needs to know where each member starts: :mod:`textok_fast.data.shard_index`.
"""

from __future__ import annotations

import functools
import logging
import math
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from textok_fast.config import DataConfig
from textok_fast.data.base import Example, encode_png
from textok_fast.data.columns import Record, Records, Strings
from textok_fast.data.crops import Crop
from textok_fast.data.files import FileDataset
from textok_fast.data.shard_index import add_member, load_index, sidecar
from textok_fast.data.storage import Part, find_shards, in_threads, is_url, read_parts, stem, version, versions
from textok_fast.errors import InputError
from textok_fast.files import write_atomically

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where an image file lies in the shards."""

    shard: int
    offset: int  # bytes
    size: int  # bytes


class WebDataset(FileDataset):
    """Samples of tar shards: members that share a name up to the first dot belong together.

    A sample needs an image (.png, .jpg, .jpeg, .webp, .bmp, .gif, .tif) and, unless ``need_captions`` is False, captions: the
    lines of .txt (``caption_lines`` False: all of it is one), or "caption" or "captions" in .json, a string or a list; .cls or
    "label" in .json is its class. ``path`` is a file, a directory of .tar files, a glob, a brace pattern such as
    ``shards/{000..003}.tar``, or a URL of these (:func:`~textok_fast.data.storage.find_shards`).

    The samples stay in the order in which they lie in the shards, and :meth:`epoch_order` keeps reads together. Batches are
    read by ranges. The indices of shards are written beside them by ``textok-fast data pack``; else they are made by
    reading each shard once, and cached.

    Samples that lack a part, corrupt images and unreadable local shards are counted in ``skipped``; of a truncated shard the
    complete members are used. Raises :class:`InputError` when no shard matches, nothing is left, or a URL cannot be read.
    """

    source = "webdataset"

    def __init__(
        self,
        path: str | Path,
        split: str,
        crop: Crop,
        need_captions: bool = True,
        caption_lines: bool = True,
        shuffle_buffer: int = 4096,
        read_streams: int = 16,
        validation_share: float = DataConfig.validation_share,
    ) -> None:
        shards = find_shards(str(path))
        if not shards:
            raise InputError(
                f"no .tar shard matches data.path {str(path)!r}; it may be a file, directory, glob, brace pattern or URL"
            )
        self._shards, self._buffer, self._streams = shards, shuffle_buffer, read_streams
        remote = any(map(is_url, shards))
        beside = not is_url(shards[0]) or _is_there(sidecar(shards[0]))
        load = functools.partial(load_index, caption_lines=caption_lines)
        found = versions(shards)

        def index(number: int) -> Any:
            return load(shards[number], found[number], beside=beside or not is_url(shards[number]))

        numbers = range(len(shards))
        indices = in_threads(index, numbers) if remote else [index(number) for number in numbers]
        skipped: Counter[str] = Counter()
        for each, shard in zip(indices, shards, strict=True):
            skipped.update(each.skipped)
            if "unreadable shard" in each.skipped and is_url(shard):
                raise InputError(f"{shard} is no tar file, or is broken; leave it out or mend it")
        # The shard's own name keeps equal sample names of two shards apart without depending on where the shards lie.
        names = Strings.of(f"{stem(shard)}/{name}" for shard, each in zip(shards, indices, strict=True) for name in each.names)
        places = np.stack(
            [
                np.repeat(np.arange(len(shards)), [len(each.names) for each in indices]),
                np.concatenate([each.offsets for each in indices]),
                np.concatenate([each.sizes for each in indices]),
            ],
            axis=1,
        ).astype(np.int64)  # (n, 3): shard, offset, size
        captions, labels = (Strings.joined([getattr(each, name) for each in indices]) for name in ("captions", "labels"))
        records = Records(names, captions, labels, places)
        super().__init__(
            records,
            split,
            crop,
            skipped,
            str(path),
            need_captions,
            verify=not remote,
            by_key=False,
            validation_share=validation_share,
        )

    def _read(self, records: Sequence[Record]) -> list[bytes | Exception]:
        places = [Place(*map(int, record.place)) for record in records]
        parts = [Part(self._shards[place.shard], place.offset, place.offset + place.size) for place in places]
        try:
            return list(read_parts(parts))
        except OSError as error:  # of a local shard
            raise InputError(f"cannot read the shards of {self._where}: {error}") from None

    def epoch_order(self, seed: int, epoch: int, batch: int, rows: Sequence[int] | None = None) -> np.ndarray | None:
        """Shards in random order, cut into ``read_streams`` streams, each shuffled within windows of ``shuffle_buffer``.

        A batch has an equal share of every stream (of as many as divide it), so that it mixes pictures of distant places while
        each stream is read nearly in order. Depends on the arguments and the data alone: not on processes or loader workers.
        """
        shards = self._records.places[self._rows if rows is None else self._rows[np.asarray(rows)], 0]
        if len(shards) <= self._buffer:
            return None
        _, starts = np.unique(shards, return_index=True)  # the rows of a shard are neighbours
        rng = np.random.default_rng([2, seed, epoch])
        return order_by_runs(np.append(starts, len(shards)), rng, batch, self._buffer, self._streams)


def order_by_runs(bounds: np.ndarray, rng: np.random.Generator, batch: int, buffer: int, streams: int) -> np.ndarray:
    """Whole batches of the indices below ``bounds[-1]``, int64; ``bounds[i]`` to ``bounds[i + 1]`` - 1 are read in order."""
    runs = rng.permutation(len(bounds) - 1)
    sequence = np.concatenate([np.arange(bounds[run], bounds[run + 1]) for run in runs])
    streams = math.gcd(streams, batch)
    share, length = batch // streams, len(sequence) // streams
    lanes = sequence[: streams * length].reshape(streams, length)  # (streams, length)
    windows = np.arange(length) // buffer
    lanes = np.take_along_axis(lanes, np.argsort(windows + rng.random(lanes.shape), axis=1), axis=1)
    steps = length // share
    return lanes[:, : steps * share].reshape(streams, steps, share).transpose(1, 0, 2).reshape(-1).astype(np.int64)


def _is_there(url: str) -> bool:
    try:
        version(url)
    except (FileNotFoundError, PermissionError):
        return False
    return True


def write_shards(
    examples: Iterable[Example], directory: str | Path, shard_size: int = 1000, *, label_names: list[str] | None = None
) -> list[Path]:
    """Writes ``shard-000000.tar``, ... with key.png, key.txt and key.cls (the label's name, or its number) for each example.

    Each shard appears under its name when it is complete; equal examples give equal bytes. Raises :class:`InputError` when the
    directory has such shards already, which are not touched.
    """
    if shard_size < 1:
        raise InputError(f"shard_size must be at least 1, got {shard_size}")
    folder = Path(directory)
    if next(folder.glob("shard-*.tar"), None) is not None:
        raise InputError(f"{folder} has shards already; choose an empty directory")
    folder.mkdir(parents=True, exist_ok=True)
    remaining = iter(examples)
    written: list[Path] = []
    while chunk := list(islice(remaining, shard_size)):
        target = folder / f"shard-{len(written):06d}.tar"
        write_atomically(target, lambda path, chunk=chunk: _write_shard(path, chunk, label_names))  # type: ignore[misc]
        written.append(target)
    return written


def _write_shard(path: Path, examples: Sequence[Example], label_names: Sequence[str] | None) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for example in examples:
            label = label_names[example.label] if label_names else str(example.label)
            add_member(archive, f"{example.key}.png", encode_png(example.image))
            add_member(archive, f"{example.key}.txt", example.caption.encode())
            add_member(archive, f"{example.key}.cls", label.encode())
