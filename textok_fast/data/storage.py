"""Parts of local files and of URLs: whatever fsspec opens, such as https://, s3:// and hf://.

A read that fails is tried again, longer and longer apart, and then is an error that stops the run: data that cannot be reached
are never taken for data that are corrupt or not there.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from textok_fast.errors import InputError

log = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_WAIT = 0.5  # seconds before the second attempt; doubled before each further one
# Parts of one file that lie this near to each other are read at once: a request costs more than these bytes.
GAP, AT_ONCE = 64 * 1024, 16 * 1024 * 1024
CONNECTIONS = 16  # files looked at at once

T = TypeVar("T")


class Part(NamedTuple):
    """Bytes ``start`` to ``stop`` - 1 of a file or URL."""

    file: str
    start: int
    stop: int


class Version(NamedTuple):
    """What tells a file from an earlier one of the same name. ``tag``: ETag or time of change, "" where nothing is known."""

    size: int
    tag: str


def is_url(path: str) -> bool:
    """Whether ``path`` is for fsspec: "https://...", "s3://...", also chained as in "simplecache::s3://..."."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(//|:)", path) is not None


def stem(path: str) -> str:
    """The file's name without its last suffix, and without what follows "?" in a URL."""
    name = (path.split("?")[0] if is_url(path) else path).rstrip("/").rpartition("/")[2]
    return os.path.splitext(name)[0]


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the URL's path in it. InputError when what it needs is not installed."""
    import fsspec

    try:
        # Asked for anew by every caller: fsspec keeps its own, and after a fork makes another.
        found, path = fsspec.core.url_to_fs(url)
        return found, path
    except (ImportError, ValueError) as error:
        extra = "data,s3" if "s3:" in url else "data"
        raise InputError(f"cannot open {url}: {error}; pip install 'textok-fast[{extra}]'") from None


def retried(what: str, call: Callable[[], T]) -> T:
    """``call()``, again after a passing failure; InputError after the last. What is not there or forbidden is not retried."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except (FileNotFoundError, PermissionError, InputError):
            raise
        except Exception as error:  # each file system fails in its own ways
            if attempt + 1 == ATTEMPTS:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise InputError(f"cannot read {what} after {ATTEMPTS} attempts: {reason[:300]}") from error
            log.info("reading %s failed (%r): trying again", what, error)
            time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError


def version(file: str) -> Version:
    """Of a file or URL. FileNotFoundError when it is not there; InputError when a server does not tell the size."""
    if not is_url(file):
        found = os.stat(file)
        return Version(found.st_size, str(found.st_mtime_ns))
    fs, path = filesystem(file)
    info = retried(file, lambda: fs.info(path))
    if info.get("size") is None:
        raise InputError(f"the server of {file} does not tell its size; shards are read in parts, which needs it")
    tags = (info.get(name) for name in ("ETag", "Last-Modified", "LastModified", "mtime", "created", "blob_id"))
    return Version(int(info["size"]), str(next((tag for tag in tags if tag), "")))


def versions(files: Sequence[str]) -> list[Version]:
    """:func:`version` of each; InputError names the first that is not there."""

    def of(file: str) -> Version:
        try:
            return version(file)
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"{file} cannot be read ({type(error).__name__}): is it there, and may you read it?") from None

    return in_threads(of, files) if any(map(is_url, files)) else [of(file) for file in files]


def in_threads(call: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """``call`` of each, for calls that wait for a network."""
    with ThreadPoolExecutor(CONNECTIONS, "textok-look") as threads:
        return list(threads.map(call, items))


def read(file: str) -> bytes:
    """All of a file or URL. FileNotFoundError when it is not there."""
    if not is_url(file):
        with open(file, "rb") as local:
            return local.read()
    fs, path = filesystem(file)
    data: bytes = retried(file, lambda: fs.cat_file(path))
    return data


def read_parts(parts: Sequence[Part]) -> list[bytes]:
    """The bytes of each part. Near ones of a file are read at once, and URLs' side by side.

    Raises InputError when a URL cannot be read or its server sends other parts than asked for, OSError for local files.
    """
    spans = _joined(parts)
    remote = [span for span in spans if is_url(span.file)]
    data = dict(zip(remote, _read_remote(remote), strict=True)) if remote else {}
    data |= {span: _read_local(span) for span in spans if span not in data}
    found: list[bytes] = []
    of_file: dict[str, list[Part]] = {}
    for span in spans:
        of_file.setdefault(span.file, []).append(span)
    for part in parts:
        span = next(s for s in of_file[part.file] if s.start <= part.start and part.stop <= s.stop)
        found.append(data[span][part.start - span.start : part.stop - span.start])
    return found


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Spans that cover all parts, each part within one."""
    spans: list[Part] = []
    for part in sorted(set(parts)):
        last = spans[-1] if spans else None
        near = last is not None and last.file == part.file and part.start - last.stop <= GAP
        if last is not None and near and (part.stop <= last.stop or part.stop - last.start <= AT_ONCE):
            spans[-1] = Part(part.file, last.start, max(last.stop, part.stop))
        else:
            spans.append(part)
    return spans


def _read_local(span: Part) -> bytes:
    with open(span.file, "rb") as file:  # opened anew: a shared handle would not survive a fork into loader processes
        file.seek(span.start)
        return file.read(span.stop - span.start)


def _read_remote(spans: Sequence[Part]) -> list[bytes]:
    found: list[bytes | None] = [None] * len(spans)

    def attempt() -> None:
        wanted = [i for i, data in enumerate(found) if data is None]
        fs, _ = filesystem(spans[wanted[0]].file)
        paths = [filesystem(spans[i].file)[1] for i in wanted]
        answers = fs.cat_ranges(paths, [spans[i].start for i in wanted], [spans[i].stop for i in wanted], on_error="return")
        failure: BaseException | None = None
        for i, answer in zip(wanted, answers, strict=True):
            size = spans[i].stop - spans[i].start
            if isinstance(answer, BaseException):
                failure = answer
            elif len(answer) > size:
                raise InputError(f"the server of {spans[i].file} sends whole files where parts are asked for (no ranges)")
            elif len(answer) < size:
                failure = OSError(f"{len(answer)} of {size} bytes came")
            else:
                found[i] = bytes(answer)
        if failure is not None:
            raise failure

    try:
        retried(spans[0].file, attempt)
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"{spans[0].file} can no longer be read ({type(error).__name__}: {error})") from None
    return [data for data in found if data is not None]


def find_shards(pattern: str) -> list[str]:
    """The .tar files that a path, directory, glob, brace pattern or URL stands for, sorted, each once.

    URLs: of a .tar file; a directory or glob where the server lists its files (S3, the Hub); or index.json of shards that
    ``textok-fast data pack`` wrote, which any server can have. A single http(s) URL need not end in .tar.
    """
    found: set[str] = set()
    for path in expand_braces(pattern) if pattern else ():
        if is_url(path):
            found.update(_find_remote(path))
        elif os.path.isdir(path):
            found.update(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        elif os.path.basename(path) == "index.json" and os.path.isfile(path):
            found.update(_listed(path))
        elif os.path.isfile(path):
            found.add(path)
        else:
            found.update(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    return sorted(found)


def _find_remote(url: str) -> list[str]:
    plain = url.split("?")[0] if url.startswith("http") else url
    if plain.endswith("/index.json"):
        return _listed(url)
    if plain.endswith((".tar", ".TAR")) and "*" not in url:
        return [url]
    fs, path = filesystem(url)
    if "*" not in path and url.startswith("http"):
        return [url]
    wanted = path if "*" in path else f"{path.rstrip('/')}/*.tar"
    return [fs.unstrip_protocol(each) for each in retried(url, lambda: fs.glob(wanted))]


def _listed(file: str) -> list[str]:
    """The shards that an index.json names, beside it."""
    try:
        shards = json.loads(read(file))["shards"]
        names = [str(shard["file"]) for shard in shards]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no index of shards as `textok-fast data pack` writes it ({error!r})") from None
    if any(name != os.path.basename(name) or not name.endswith(".tar") for name in names):
        raise InputError(f"{file} names shards that do not lie beside it")
    return [f"{file.rpartition('/')[0]}/{name}" if "/" in file else name for name in names]


def expand_braces(pattern: str) -> Iterator[str]:
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
        yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def short_hash(*parts: object) -> str:
    """A name for a cached file of these."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).hexdigest()
