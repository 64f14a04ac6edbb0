"""Gets the pictures: from the system where they are installed, else from Debian's archive into the cache, without root.

Where neither can be had the drawn shapes stand in, and the result says so.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from textok_fast import paths
from textok_fast.data.emoji import EmojiLibrary
from textok_fast.data.shapes import ShapeLibrary
from textok_fast.data.sprites import SpriteLibrary
from textok_fast.data.stamps import StampLibrary
from textok_fast.errors import InputError

log = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT = 900  # seconds for one apt-get
_APT_OPTIONS = ["-o", "Acquire::http::Timeout=20", "-o", "Acquire::https::Timeout=20", "-o", "Acquire::Retries=1"]


@dataclass(frozen=True)
class FetchedSource:
    """Where a source's pictures are. ``name`` is "shapes" when they stand in, and ``note`` then says for what and why."""

    name: str
    directory: Path | None  # None: drawn, nothing on disk
    licence: str
    pictures: int
    note: str

    def library(self) -> SpriteLibrary:
        """The named pictures."""
        return _PACKAGES[self.name].read(self.directory) if self.directory is not None else ShapeLibrary()


@dataclass(frozen=True)
class _Package:
    """A Debian package and what is kept of it."""

    name: str
    licence: str
    installed: Path  # directory of the pictures below the root of the file system or of the unpacked package
    suffixes: tuple[str, ...]  # the kinds of files that are kept
    read: Callable[[Path], SpriteLibrary]


def _read_emoji(directory: Path) -> SpriteLibrary:
    return EmojiLibrary(directory / "NotoColorEmoji.ttf")


_PACKAGES = {
    "emoji": _Package(
        "fonts-noto-color-emoji",
        "SIL Open Font License 1.1 (Noto Color Emoji, Google Inc.)",
        Path("usr/share/fonts/truetype/noto"),
        ("NotoColorEmoji.ttf",),
        _read_emoji,
    ),
    "stamps": _Package(
        "tuxpaint-stamps-default",
        "GNU General Public License 2 (Tux Paint stamps, Bill Kendrick and contributors)",
        Path("usr/share/tuxpaint/stamps"),
        (".png", ".txt"),
        StampLibrary,
    ),
}
SYSTEM_ROOT = Path("/")
SHAPES_LICENCE = "Apache-2.0 (drawn by textok-fast)"


def fetch(source: str, cache_dir: Path | None = None, force: bool = False) -> FetchedSource:
    """Makes a source's pictures available.

    Args:
        source: "emoji", "stamps" or "shapes".
        cache_dir: where downloads are kept; default :func:`textok_fast.paths.cache_dir`.
        force: download again even where the system or the cache has the pictures.

    A failed download is not an error: the drawn shapes stand in and ``note`` gives the reason. Two processes may call this at
    once, and a killed one leaves nothing that the next mistakes for complete. Raises :class:`InputError` for an unknown source.
    """
    if source not in ("emoji", "stamps", "shapes"):
        raise InputError(f"source must be emoji, stamps or shapes; got {source!r}")
    if source == "shapes":
        return _shapes("drawn by textok-fast, nothing downloaded")
    cache = Path(cache_dir) if cache_dir is not None else paths.cache_dir()
    if force:
        _fetch_once.cache_clear()
    return _fetch_once(source, cache, force)


def _shapes(note: str) -> FetchedSource:
    return FetchedSource("shapes", None, SHAPES_LICENCE, len(ShapeLibrary().names), note)


@functools.cache  # a process without network should wait for the failing download once only
def _fetch_once(source: str, cache: Path, force: bool) -> FetchedSource:
    package = _PACKAGES[source]
    if not force:
        installed = _open(source, SYSTEM_ROOT / package.installed, "installed on this system")
        if installed is not None:
            return installed
        cached = _open(source, cache / source, "from the cache")
        if cached is not None:
            return cached
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{source}.lock"):
            cached = None if force else _open(source, cache / source, "from the cache")  # another process may have finished
            if cached is not None:
                return cached
            _download(package, source, cache)
        fetched = _open(source, cache / source, f"Debian package {package.name}")
        if fetched is None:
            raise OSError(f"the package {package.name} has no pictures that can be read")
        return fetched
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:300]
        log.warning("%s cannot be had (%s): the drawn shapes stand in", source, reason)
        return _shapes(f"stand-in for {source}, which cannot be had here: {reason}")


def _open(source: str, directory: Path, note: str) -> FetchedSource | None:
    if not directory.is_dir():
        return None
    package = _PACKAGES[source]
    try:
        count = len(package.read(directory).names)
    except Exception as error:  # a font reader fails in many ways on a file that is no such font
        log.debug("%s is not usable: %s", directory, error)
        return None
    return FetchedSource(source, directory, package.licence, count, note) if count else None


def _download(package: _Package, source: str, cache: Path) -> None:
    """Puts the package's pictures and its copyright file at ``cache / source``. The lock is held."""
    for name in ("apt-get", "dpkg-deb"):
        if shutil.which(name) is None:
            raise OSError(f"{name} is not on this system")
    for leftover in cache.glob(f".{source}.partial-*"):  # of a killed run: we hold the lock, so nobody else uses it
        shutil.rmtree(leftover, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{source}.partial-", dir=cache))
    try:
        log.info("downloading the Debian package %s", package.name)
        _apt_download(package.name, partial)
        archive = next(iter(partial.glob("*.deb")), None)
        if archive is None:
            raise OSError(f"apt-get download {package.name} left no package")
        _run(["dpkg-deb", "-x", str(archive), str(partial / "root")], partial)
        complete = partial / "complete"
        pictures = partial / "root" / package.installed
        for file in sorted(path for path in pictures.rglob("*") if path.name.endswith(package.suffixes) and path.is_file()):
            target = complete / file.relative_to(pictures)
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy_durably(file, target)
        copyright_file = partial / "root" / "usr/share/doc" / package.name / "copyright"
        if copyright_file.is_file():
            _copy_durably(copyright_file, complete / "copyright")
        if _open(source, complete, "") is None:
            raise OSError(f"the package {archive.name} has no pictures that can be read")
        record = {"package": package.name, "file": archive.name, "licence": package.licence}
        (complete / "source.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if (cache / source).exists():
            os.replace(cache / source, partial / "old")
        os.replace(complete, cache / source)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_durably(source: Path, target: Path) -> None:
    """Copies and waits for the disk, so that a complete directory is complete after a power cut too."""
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer)
        writer.flush()
        os.fsync(writer.fileno())


def _apt_download(package: str, directory: Path) -> None:
    """``apt-get download`` into ``directory``; with package lists of our own where the system has none."""
    try:
        _run(["apt-get", *_APT_OPTIONS, "download", package], directory)
        return
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("apt-get download failed, trying with fresh package lists: %s", error)
    state = directory / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    private = [*_APT_OPTIONS, "-o", f"Dir::State::Lists={state / 'lists'}", "-o", f"Dir::Cache={state / 'cache'}"]
    _run(["apt-get", *private, "update"], directory)
    _run(["apt-get", *private, "download", package], directory)


def _run(command: list[str], directory: Path) -> None:
    """Runs a command quietly; ``OSError`` with its last line of output when it fails."""
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=DOWNLOAD_TIMEOUT,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise OSError(f"{Path(command[0]).name} ended with status {done.returncode}: {lines[-1] if lines else 'no output'}")
