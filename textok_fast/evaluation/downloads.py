"""Weights by URL, each with the SHA-256 it must have: downloaded once into the cache, and never used unchecked."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from tqdm import tqdm

from textok_fast.errors import InputError
from textok_fast.paths import cache_dir

TIMEOUT = 60  # seconds without a byte
CHUNK = 1 << 20  # bytes


def cached_path(url: str, sha256: str, folder: str) -> Path:
    """Where :func:`download` keeps the file of a URL, below ``folder`` of the cache. InputError without a whole hash."""
    if not sha256:
        raise InputError(f"give the sha256 of {url}: what is downloaded is not used unchecked")
    name = unquote(urlsplit(url).path).rsplit("/", 1)[-1]  # without ?download=true and the like: its suffix says what it is
    return cache_dir() / folder / f"{_digits(sha256)[:16]}-{name}"


def download(url: str, sha256: str, folder: str) -> Path:
    """The file of a URL, fetched where an earlier call has not, with a bar on a terminal's stderr.

    Processes that ask at once fetch it once. What a killed one left is gone on with, where the server sends ranges, and only a
    whole file with this hash comes to its place. InputError for what cannot be had, and for another hash.
    """
    path = cached_path(url, sha256, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        with FileLock(path.with_name(f"{path.name}.lock")):
            if not path.is_file():  # another process may have just fetched it
                _fetch(url, path, _digits(sha256))
    return require_sha256(path, sha256)


def require_sha256(path: Path, sha256: str) -> Path:
    """``path``; InputError where it has another hash. "" asks for none."""
    if sha256 and (found := file_sha256(path)) != _digits(sha256):
        raise InputError(f"{path} has the sha256 {found}, wanted {_digits(sha256)}: it is not the file that was meant")
    return path


def file_sha256(path: Path) -> str:
    """Of its contents, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digits(sha256: str) -> str:
    found = sha256.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{64}", found):
        raise InputError(f"a sha256 has 64 hexadecimal digits, got {sha256!r}")
    return found


def _fetch(url: str, path: Path, sha256: str) -> None:
    """Under the lock: to a file beside ``path``, which takes its place once its hash is right."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        _receive(url, partial)
    except (OSError, ValueError, http.client.HTTPException) as error:  # no network, cut off; no URL; no HTTP
        raise InputError(f"cannot download {url}: {' '.join(str(error).split()) or type(error).__name__}") from None
    if (found := file_sha256(partial)) != sha256:
        partial.unlink()  # going on with it would never end well
        raise InputError(f"cannot download {url}: what came has the sha256 {found}, wanted {sha256}")
    partial.replace(path)


def _receive(url: str, partial: Path) -> None:
    """Appends what ``partial`` lacks, or writes it anew where the server sends no ranges. OSError where the end is missing."""
    there = partial.stat().st_size if partial.is_file() else 0
    ranges = {"Range": f"bytes={there}-"} if there else {}
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(url, headers={"User-Agent": "textok-fast", **ranges}), timeout=TIMEOUT
        )
    except urllib.error.HTTPError as error:
        if there and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is lacking: it was stopped before it was moved, or else its hash says so
        raise
    with answer:
        if getattr(answer, "status", None) != http.HTTPStatus.PARTIAL_CONTENT:  # file:// has no status
            there = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else there + int(length)
        with (
            partial.open("ab" if there else "wb") as file,
            tqdm(total=total, initial=there, desc=partial.stem, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while data := answer.read(CHUNK):
                file.write(data)
                bar.update(len(data))
            file.flush()
            os.fsync(file.fileno())
            came = file.tell()
    if total is not None and came < total:
        raise OSError(f"it ended after {came:,} of {total:,} bytes; the same command goes on from there")
