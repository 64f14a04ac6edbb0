"""Any source of captioned pictures as WebDataset shards of bounded size: ``textok-fast data pack``.

A directory of shards holds shard-000000.tar, ... (key.jpg or another image suffix, key.txt with one caption a line, key.cls),
beside each its index (:mod:`textok_fast.data.shard_index`), and index.json: what was packed, and the name, pictures, bytes and
SHA-256 of each shard. A shard's index is written after the shard and names the pictures it ends before, so that an interrupted
run goes on behind the last complete shard; equal sources and settings give equal bytes. index.json is written last, after
every shard was read again and compared: where it is, the set is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from textok_fast.data.base import CaptionedImages, RawPicture
from textok_fast.data.columns import Strings
from textok_fast.data.crops import resize_short_side, upright
from textok_fast.data.shard_index import ShardIndex, add_member, read_sidecar, scan, sidecar
from textok_fast.errors import InputError
from textok_fast.files import only_writer, write_atomically, write_text

FORM = "textok-fast shards 1"
INDEX_NAME, SETTINGS_NAME = "index.json", "pack.json"
READ_AT_ONCE = 64  # pictures
# What readers of shards know; pictures of other kinds are stored as PNG.
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackOptions:
    """``shard_pictures`` and ``shard_bytes`` bound a shard; a single larger picture has a shard of its own.

    ``resize``: the short side of larger pictures is brought to so many pixels (:func:`resize_short_side`), and these are
    stored as JPEG of ``quality``, or as PNG if they were stored without loss; 0 stores every file as it is.
    """

    shard_pictures: int = 10_000
    shard_bytes: int = 256 * 2**20
    resize: int = 0
    quality: int = 95

    def __post_init__(self) -> None:
        for name, least, most in (
            ("shard_pictures", 1, 10**7),
            ("shard_bytes", 1, 2**40),
            ("resize", 0, 2**15),
            ("quality", 1, 100),
        ):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name.replace('_', '-')} must be in [{least}, {most}], got {getattr(self, name)}")


def pack(
    dataset: CaptionedImages,
    out: Path,
    options: PackOptions | None = None,
    progress: Progress | None = None,
    checked: Progress | None = None,
) -> dict[str, Any]:
    """Writes the pictures of ``dataset`` to shards in ``out``, goes on with an interrupted run, and checks the result.

    ``progress`` and then ``checked`` are called with (pictures done, pictures in all). Corrupt pictures are
    left out; their keys are in index.json. Raises InputError when ``out`` holds something else or is being written to, and
    when a shard on the disk is not what was written; running again then writes it anew.
    """
    options = options or PackOptions()
    with only_writer(out, ".shard-*"):
        return _pack(dataset, out, options, progress, checked)


def _pack(
    dataset: CaptionedImages, out: Path, options: PackOptions, progress: Progress | None, checked: Progress | None
) -> dict[str, Any]:
    total = len(dataset)
    settings = {"form": FORM, "content": dataset.content_hash(), "pictures": total, **vars(options)}
    _claim(out, settings)
    indices: list[ShardIndex] = []
    while (found := read_sidecar(str(_shard(out, len(indices))))) is not None and _is_next(indices, found, out):
        indices.append(found)
    reused = len(indices)
    done = int(indices[-1].about["last"]) if indices else 0
    for number in range(reused, _count(out)):  # incomplete ones, which are written again
        _shard(out, number).unlink(missing_ok=True)
        Path(sidecar(str(_shard(out, number)))).unlink(missing_ok=True)
    with ThreadPoolExecutor(os.cpu_count() or 1, "textok-pack") as threads:
        items = _Items(dataset, done, options, threads)
        while items.more():
            (out / INDEX_NAME).unlink(missing_ok=True)  # until everything was checked
            first = int(indices[-1].about["last"]) if indices else 0
            indices.append(_write_shard(_shard(out, len(indices)), first, items, progress))
    if not any(len(index.names) for index in indices):
        raise InputError(f"{out}: none of the {total} pictures can be read; nothing was packed")
    shards = _verify(out, indices, total, checked)
    skipped = sorted(key for index in indices for key in index.about["skipped"])
    about = {"pictures": sum(shard["pictures"] for shard in shards), "skipped": skipped}
    text = json.dumps({**settings, "source_pictures": total, **about, "shards": shards}, indent=1)
    write_text(out / INDEX_NAME, text + "\n")
    return {"out": str(out), **about, "shards": len(shards), "shards_reused": reused, "bytes": sum(s["bytes"] for s in shards)}


def _claim(out: Path, settings: dict[str, Any]) -> None:
    file = out / SETTINGS_NAME
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(path.name != ".lock" for path in out.iterdir()):
            raise InputError(
                f"{out} holds files that `textok-fast data pack` did not write; choose an empty directory"
            ) from None
        write_text(file, json.dumps(settings, indent=1) + "\n")
        return
    except ValueError as error:
        raise InputError(f"cannot read {file}: {error}") from None
    changed = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
    if changed:
        raise InputError(f"{out} holds shards made otherwise ({', '.join(changed)} differ); choose another directory")


def _shard(out: Path, number: int) -> Path:
    return out / f"shard-{number:06d}.tar"


def _count(out: Path) -> int:
    """One more than the highest number of a shard or index in ``out``."""
    return max((int(path.name[6:12]) + 1 for path in out.glob("shard-[0-9][0-9][0-9][0-9][0-9][0-9].*")), default=0)


def _is_next(indices: list[ShardIndex], found: ShardIndex, out: Path) -> bool:
    """Whether a shard continues those before it and is there in its full size."""
    shard = _shard(out, len(indices))
    first = int(indices[-1].about["last"]) if indices else 0
    return found.about.get("first") == first and shard.is_file() and shard.stat().st_size == found.size


class _Items:
    """The pictures from index ``first`` on with their image files as they will be stored; one can be looked at ahead."""

    def __init__(self, dataset: CaptionedImages, first: int, options: PackOptions, threads: ThreadPoolExecutor) -> None:
        self.total, self.options = len(dataset), options
        self.at = first  # the index behind what was taken
        self.skipped: list[str] = []  # keys of corrupt ones before ``at`` since the last shard
        self._dataset, self._threads = dataset, threads
        self._stream = self._read(first)
        self._next: tuple[int, RawPicture | None] | None = None

    def _read(self, first: int) -> Iterator[tuple[int, RawPicture | None]]:
        for start in range(first, self.total, READ_AT_ONCE):
            rows = range(start, min(start + READ_AT_ONCE, self.total))
            pictures = self._dataset.raw(rows)
            yield from zip(rows, self._threads.map(self._stored, pictures), strict=True)

    def _stored(self, picture: RawPicture | None) -> RawPicture | None:
        return None if picture is None else stored(picture, self.options)

    def peek(self) -> RawPicture | None:
        """The next picture that can be read, or None at the end."""
        while True:
            if self._next is None:
                self._next = next(self._stream, None)
            if self._next is None:
                return None
            index, picture = self._next
            if picture is not None:
                return picture
            self.skipped.append(self._dataset.key(index))
            self._next, self.at = None, index + 1

    def take(self) -> None:
        assert self._next is not None
        self.at, self._next = self._next[0] + 1, None

    def more(self) -> bool:
        """Whether a shard must still be written: for pictures, or to note that the last ones were corrupt."""
        return self.peek() is not None or bool(self.skipped)


def stored(picture: RawPicture, options: PackOptions) -> RawPicture | None:
    """``picture`` as it goes into a shard; None when it cannot be decoded where it has to be."""
    if picture.kind in SUFFIXES and not options.resize:
        return picture
    try:
        with Image.open(io.BytesIO(picture.data)) as file:
            if picture.kind in SUFFIXES and min(file.size) <= options.resize:
                return picture
            pixels = upright(file)
    except Exception:  # image decoders fail in many ways on a corrupt file
        return None
    if options.resize and min(pixels.size) > options.resize:
        pixels = resize_short_side(pixels, options.resize)
    kind = "JPEG" if picture.kind in ("JPEG", "MPO", "WEBP") else "PNG"
    buffer = io.BytesIO()
    if kind == "JPEG":
        pixels.save(buffer, kind, quality=options.quality, subsampling=0)
    else:
        pixels.save(buffer, kind)
    return picture._replace(data=buffer.getvalue(), kind=kind)


def _write_shard(shard: Path, first: int, items: _Items, progress: Progress | None) -> ShardIndex:
    """Writes the next shard, of the pictures from index ``first`` on, and then its index."""
    rows: list[tuple[str, str, str, int, int]] = []
    digest = ""

    def write(path: Path) -> None:
        nonlocal digest
        used = 0
        with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            while (picture := items.peek()) is not None:
                size = 4096 + len(picture.data)  # with headers and captions, nearly
                if rows and (len(rows) >= items.options.shard_pictures or used + size > items.options.shard_bytes):
                    break
                offset, length = add_member(archive, f"{picture.key}.{SUFFIXES[picture.kind]}", picture.data)
                captions = "\n".join(picture.captions)
                if captions:
                    add_member(archive, f"{picture.key}.txt", captions.encode())
                if picture.label:
                    add_member(archive, f"{picture.key}.cls", picture.label.encode())
                rows.append((picture.key, captions, picture.label, offset, length))
                used += size
                items.take()
                if progress is not None:
                    progress(items.at, items.total)
        digest = _sha256(path)

    write_atomically(shard, write)
    names, captions, labels = (Strings.of(str(row[k]) for row in rows) for k in range(3))
    offsets, sizes = (np.array([row[k] for row in rows], dtype=np.int64) for k in (3, 4))
    about = {"first": first, "last": items.at, "skipped": items.skipped, "sha256": digest}
    index = ShardIndex(names, captions, labels, offsets, sizes, shard.stat().st_size, {}, about)
    items.skipped = []
    data = index.to_bytes()
    write_atomically(Path(sidecar(str(shard))), lambda path: path.write_bytes(data))
    return index


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(out: Path, indices: list[ShardIndex], total: int, checked: Progress | None) -> list[dict[str, Any]]:
    """Reads every shard again; what index.json says of each. InputError when one is not as it was written."""
    shards = []
    seen: set[str] = set()
    expected = 0
    for number, index in enumerate(indices):
        shard = _shard(out, number)
        found = scan(str(shard), index.size) if _sha256(shard) == index.about["sha256"] else None
        columns = ("names", "captions", "labels")
        same = found is not None and all(
            [
                *(list(getattr(found, name)) == list(getattr(index, name)) for name in columns),
                np.array_equal(found.offsets, index.offsets),
                np.array_equal(found.sizes, index.sizes),
            ]
        )
        if not same:
            Path(sidecar(str(shard))).unlink()
            raise InputError(
                f"{shard} is not what was written to it (is the disk sound?); run the same command again to mend it"
            )
        names = list(index.names)
        if index.about["first"] != expected or seen & set(names) or len(set(names)) != len(names):
            raise AssertionError(f"{shard} does not continue the shards before it")
        seen.update(names)
        expected = int(index.about["last"])
        shards.append({"file": shard.name, "pictures": len(names), "bytes": index.size, "sha256": index.about["sha256"]})
        if checked is not None:
            checked(expected, total)
    if expected != total or len(seen) + sum(len(index.about["skipped"]) for index in indices) != total:
        raise AssertionError(f"{len(seen)} of {total} pictures were packed")
    return shards
