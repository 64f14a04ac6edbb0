"""Where each picture of a tar shard lies, and its captions: what makes shards a data set with a length and ``[index]``.

An index is a safetensors file: ``names``, ``captions`` and ``labels`` (uint8, strings end to end) with ``*_ends`` (int64, where
each ends), ``offsets`` and ``sizes`` (int64) of the image files in the shard, and in its header the shard's size and what was
left out. `textok-fast data pack` writes one beside each shard, NAME.index.safetensors; for other shards it is made once, by
reading the shard, and cached.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load, save

from textok_fast import paths
from textok_fast.data.columns import Strings
from textok_fast.data.storage import Version, filesystem, is_url, read, retried, short_hash
from textok_fast.errors import InputError
from textok_fast.files import write_atomically

log = logging.getLogger(__name__)

FORM = "textok-fast shard index 1"
SUFFIX = ".index.safetensors"
IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
TEXTS = ("txt", "json", "cls")
_STRINGS = ("names", "captions", "labels")


@dataclass(frozen=True)
class ShardIndex:
    """Of one shard, its samples in the order of their first members."""

    names: Strings  # up to the first dot
    captions: Strings  # a picture's in one string, one a line
    labels: Strings
    offsets: np.ndarray  # int64 (n,), bytes from the shard's start
    sizes: np.ndarray  # int64 (n,)
    size: int  # of the shard, in bytes
    skipped: dict[str, int] = field(default_factory=dict)  # samples left out, by reason
    about: dict[str, Any] = field(default_factory=dict)  # what the writer wants to remember

    def to_bytes(self) -> bytes:
        tensors = {"offsets": self.offsets.astype(np.int64), "sizes": self.sizes.astype(np.int64)}
        for name in _STRINGS:
            column = getattr(self, name)
            tensors |= {name: column.data, f"{name}_ends": column.ends}
        header = {"form": FORM, "size": self.size, "skipped": self.skipped, "about": self.about}
        # One entry, because safetensors writes several in any order, and equal indices should be equal bytes.
        metadata = {"index": json.dumps(header)}
        data: bytes = save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, metadata)
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> ShardIndex:
        """ValueError for anything else than what :meth:`to_bytes` gives."""
        try:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["index"])
            if header["form"] != FORM:
                raise ValueError(f"its form is {header['form']!r}, wanted {FORM!r}")
            tensors = load(data)
            columns = {name: Strings(tensors[name], tensors[f"{name}_ends"]) for name in _STRINGS}
            found = cls(
                **columns,
                offsets=tensors["offsets"],
                sizes=tensors["sizes"],
                size=int(header["size"]),
                skipped=header["skipped"],
                about=header["about"],
            )
        except (SafetensorError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"no shard index: {error!r}") from None
        if {len(found.offsets), len(found.sizes)} != {len(column) for column in columns.values()}:
            raise ValueError("no shard index: its columns have different lengths")
        return found


def sidecar(shard: str) -> str:
    """Where the index of a shard lies, if it has one."""
    base, query, rest = shard.partition("?") if is_url(shard) else (shard, "", "")
    return f"{base.removesuffix('.tar')}{SUFFIX}{query}{rest}"


def load_index(shard: str, version: Version, caption_lines: bool = True, beside: bool = True) -> ShardIndex:
    """The index of a shard: the file beside it, the cached one, or a new one, which is then cached.

    ``version``: the shard's own. ``caption_lines``: whether each line of a .txt is a caption. ``beside``: whether to look for
    an index beside the shard, which costs a request for a URL. An index of a shard of another size is not used.
    """
    if beside and (found := read_sidecar(shard)) is not None:
        if found.size == version.size:
            return found
        log.warning("the index beside %s is of a shard of %d bytes, it has %d: not used", shard, found.size, version.size)
    where = shard if is_url(shard) else str(Path(shard).resolve())
    cached = paths.cache_dir() / "shards" / f"{short_hash(where, version.size, version.tag, caption_lines)}{SUFFIX}"
    if (found := _read_cached(cached)) is not None:
        return found
    with contextlib.suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(cached.parent, os.W_OK):
        log.warning("the index of %s is not cached: %s cannot be written to", shard, cached.parent)
        return scan(shard, version.size, caption_lines)
    with FileLock(f"{cached}.lock"):  # of a run's processes one reads the shard, the others wait
        if (found := _read_cached(cached)) is not None:
            return found
        made = scan(shard, version.size, caption_lines)
        if "unreadable shard" not in made.skipped:
            data = made.to_bytes()
            try:
                write_atomically(cached, lambda path: path.write_bytes(data))
            except OSError as error:  # a full disk
                log.warning("the index of %s is not cached: %s", shard, error)
    Path(f"{cached}.lock").unlink(missing_ok=True)
    return made


def _read_cached(cached: Path) -> ShardIndex | None:
    try:
        return ShardIndex.from_bytes(cached.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("the cached index %s is made again: %s", cached, error)
        return None


def read_sidecar(shard: str) -> ShardIndex | None:
    """The index beside a shard, or None where there is none that can be read."""
    try:
        return ShardIndex.from_bytes(read(sidecar(shard)))
    except (FileNotFoundError, PermissionError):
        return None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        log.warning("the index beside %s is not used: %s", shard, error)
        return None


def scan(shard: str, size: int, caption_lines: bool = True) -> ShardIndex:
    """Reads a shard's headers and captions, from its beginning to its end. Of a truncated one the complete members count."""
    if not is_url(shard):
        with open(shard, "rb") as file:
            return _scan(file, shard, size, caption_lines)
    fs, path = filesystem(shard)

    def over_the_network() -> ShardIndex:
        with fs.open(path, "rb", block_size=4 * 2**20, cache_type="readahead") as file:
            return _scan(file, shard, size, caption_lines)

    return retried(shard, over_the_network)


def _scan(file: BinaryIO, shard: str, size: int, caption_lines: bool) -> ShardIndex:
    images: dict[str, tuple[int, int]] = {}
    texts: dict[str, dict[str, bytes]] = {}
    order: dict[str, None] = {}
    skipped: Counter[str] = Counter()
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isfile() or member.offset_data + member.size > size:
                    skipped["truncated member"] += member.isfile()
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if not stem or not dot:
                    continue
                name = f"{folder}/{stem}" if folder else stem
                suffix = suffix.lower()
                if suffix in IMAGES:
                    order[name] = None
                    images[name] = (member.offset_data, member.size)
                elif suffix in TEXTS:
                    order[name] = None
                    reader = archive.extractfile(member)
                    texts.setdefault(name, {})[suffix] = reader.read() if reader else b""
    except (tarfile.TarError, EOFError) as error:
        log.warning("%s cannot be read to its end: %s", shard, error)
        skipped["unreadable shard"] += 1
    skipped["missing image"] += sum(name not in images for name in order)
    names = [name for name in order if name in images]
    said = [captions_and_label(texts.get(name, {}), caption_lines) for name in names]
    places = np.array([images[name] for name in names], dtype=np.int64).reshape(-1, 2)  # (n, 2)
    return ShardIndex(
        Strings.of(names),
        Strings.of("\n".join(captions) for captions, _ in said),
        Strings.of(label for _, label in said),
        places[:, 0],
        places[:, 1],
        size,
        {reason: count for reason, count in skipped.items() if count},
    )


def captions_and_label(texts: Mapping[str, bytes], caption_lines: bool) -> tuple[tuple[str, ...], str]:
    """Captions from .txt before .json, a label from .cls before .json; nothing for what is missing or malformed."""
    try:
        values = json.loads(texts.get("json", b"{}"))
    except ValueError:
        values = {}
    if not isinstance(values, dict):
        values = {}
    if "txt" in texts:
        captions = captions_of_text(texts["txt"].decode("utf-8", errors="replace"), caption_lines)
    else:
        captions = captions_of(values)
    label = texts["cls"].decode("utf-8", errors="replace") if "cls" in texts else values.get("label")
    return captions, "" if label is None else normalize(str(label))


def normalize(text: str) -> str:
    """One line, single spaces."""
    return " ".join(text.split())


def captions_of_text(text: str, lines: bool) -> tuple[str, ...]:
    """The captions in a text file: each line that is not empty, or the whole text as one."""
    return captions_of({"caption": text.splitlines() if lines else text})


def captions_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions in "caption" and then "captions" of a row, each a string or a list; empty and equal ones left out."""
    found: dict[str, None] = {}
    for value in (row.get("caption"), row.get("captions")):
        for text in [value] if isinstance(value, str) else value if isinstance(value, (list, tuple, np.ndarray)) else ():
            if isinstance(text, str) and (caption := normalize(text)):
                found[caption] = None
    return tuple(found)


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Adds a file of time 0, so that equal contents give equal bytes; (offset, size) of its data."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    start = archive.offset  # the position of the header that comes next
    archive.addfile(member, io.BytesIO(data))
    header = len(member.tobuf(archive.format, archive.encoding, archive.errors))
    return start + header, len(data)
