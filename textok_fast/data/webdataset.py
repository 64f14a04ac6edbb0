"""WebDataset tar shards, read as a map-style data set, and written.

The ``webdataset`` library streams shards in order; a data set with a length and ``[index]`` needs to know where each member
starts, so the tar headers are read once and the members by offset.
"""

from __future__ import annotations

import glob
import io
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from textok_fast.data.base import Example
from textok_fast.data.files import FileDataset, Record, normalize_caption
from textok_fast.errors import InputError
from textok_fast.files import write_atomically

log = logging.getLogger(__name__)

_IMAGES = ("png", "jpg", "jpeg", "webp")


class WebDataset(FileDataset):
    """Samples of tar shards: members that share a name up to the first dot belong together.

    A sample needs an image (.png, .jpg, .jpeg or .webp) and, unless ``need_captions`` is False, a caption (.txt, or "caption"
    in .json); .cls or "label" in .json is its class. ``path`` is a file, a directory of .tar files, a glob or a brace pattern
    such as ``shards/{000..003}.tar``.
    Samples that lack a part, corrupt images and unreadable shards are counted in ``skipped``; of a truncated shard the complete
    members are used. Raises :class:`InputError` when no shard matches or nothing is left.
    """

    source = "webdataset"

    def __init__(self, path: str | Path, split: str, image_size: int, need_captions: bool = True) -> None:
        shards = find_shards(str(path))
        if not shards:
            raise InputError(
                f"no .tar shard matches data.path {str(path)!r}; it may be a file, a directory, a glob or a brace pattern"
            )
        skipped: Counter[str] = Counter()
        records = [record for shard in shards for record in _shard_records(shard, skipped)]
        super().__init__(records, split, image_size, skipped, str(path), need_captions)

    def _read(self, record: Record) -> bytes:
        shard, offset, size = record.place
        with open(shard, "rb") as file:  # opened anew: a shared handle would not survive a fork into loader processes
            file.seek(offset)
            return file.read(size)


def find_shards(pattern: str) -> list[str]:
    """The files that a path, directory, glob or brace pattern stands for, sorted, each once."""
    if not pattern:
        return []
    found: set[str] = set()
    for path in _expand_braces(pattern):
        if os.path.isdir(path):
            found.update(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        elif os.path.isfile(path):
            found.add(path)
        else:
            found.update(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    return sorted(found)


def _expand_braces(pattern: str) -> Iterator[str]:
    """Expands "a{00..02}.tar" and "{train,extra}.tar" as a shell does; several in one pattern multiply."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        width = max(len(span[1]), len(span[2])) if "0" in (span[1][0], span[2][0]) else 0
        choices = [f"{number:0{width}d}" for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _shard_records(shard: str, skipped: Counter[str]) -> Iterator[Record]:
    images: dict[str, tuple[str, int, int]] = {}
    texts: dict[str, dict[str, bytes]] = {}
    order: dict[str, None] = {}
    try:
        length = os.path.getsize(shard)
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile() or member.offset_data + member.size > length:
                    skipped["truncated member"] += member.isfile()
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if not stem or not dot:
                    continue
                name = f"{folder}/{stem}" if folder else stem
                suffix = suffix.lower()
                if suffix in _IMAGES:
                    order[name] = None
                    images[name] = (shard, member.offset_data, member.size)
                elif suffix in ("txt", "json", "cls"):
                    order[name] = None
                    reader = archive.extractfile(member)
                    texts.setdefault(name, {})[suffix] = reader.read() if reader else b""
    except (OSError, tarfile.TarError, EOFError) as error:
        log.warning("%s cannot be read to its end: %s", shard, error)
        skipped["unreadable shard"] += 1
    for name in order:
        if name not in images:
            skipped["missing image"] += 1
            continue
        caption, label = _caption_and_label(texts.get(name, {}))
        # The shard's own name keeps equal sample names of two shards apart without depending on where the shards lie.
        yield Record(f"{Path(shard).stem}/{name}", caption, label, images[name])


def _caption_and_label(texts: dict[str, bytes]) -> tuple[str, str]:
    """A caption from .txt before .json, a label from .cls before .json; "" for what is missing or malformed."""
    try:
        values = json.loads(texts.get("json", b"{}"))
    except ValueError:
        values = {}
    if not isinstance(values, dict):
        values = {}
    caption = texts["txt"].decode("utf-8", errors="replace") if "txt" in texts else values.get("caption")
    label = texts["cls"].decode("utf-8", errors="replace") if "cls" in texts else values.get("label")
    return normalize_caption(caption) if isinstance(caption, str) else "", "" if label is None else str(label).strip()


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
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for example in examples:
            label = label_names[example.label] if label_names else str(example.label)
            _add(archive, f"{example.key}.png", encode_png(example))
            _add(archive, f"{example.key}.txt", example.caption.encode())
            _add(archive, f"{example.key}.cls", label.encode())


def encode_png(example: Example) -> bytes:
    """The example's picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(example.image).save(buffer, "PNG")
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time stays 0
    member.size = len(data)
    member.mode = 0o644
    archive.addfile(member, io.BytesIO(data))
