"""Caption features on disk: one SQLite file per text encoder, shared by processes, safe to kill, never fatal.

Features are kept in the encoder's own precision (float32 unless it computes in bfloat16 or float16), so that what is read
back is bit for bit what was computed. Rounding a float32 encoder's features to float16 would halve the file and lose that.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS features (
    key BLOB NOT NULL, cut INTEGER NOT NULL, tokens INTEGER NOT NULL, crc INTEGER NOT NULL, data BLOB NOT NULL,
    UNIQUE (key, cut))
"""
_BUSY_SECONDS = 10.0
_KEYS_PER_QUERY = 500  # below SQLite's oldest limit of 999 variables
# A connection opened before a fork must be neither used nor closed by the child; it is kept here so that nothing closes it.
_ABANDONED: list[sqlite3.Connection] = []


class Entry(NamedTuple):
    """Features (n, D) of one text, on the CPU, in the encoder's precision. ``cut``: the text was longer than was encoded."""

    features: Tensor
    cut: bool


class FeatureStore:
    """Features (n, ``dim``) of ``dtype`` by text, in the SQLite file ``path``.

    Write-ahead logging with ``synchronous=NORMAL``: a process killed at any moment leaves every committed entry readable.
    Rows carry a checksum, and one that does not match counts as absent. A corrupt file is moved aside to
    ``<path>.corrupt``; a file that cannot be written is only read; one that cannot be opened is ignored. Each of these
    logs one line, and none raises.
    """

    def __init__(self, path: Path, dim: int, dtype: torch.dtype) -> None:
        self.path, self.dim, self.dtype = path, dim, dtype
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self._readable = self._writable = True
        self._recovered = False
        self._pid = os.getpid()
        self._lock = threading.RLock()

    @staticmethod
    def key(text: str, mode: str) -> bytes:
        """SHA-256 of the text and of how it is encoded; independent of ``max_tokens``."""
        return hashlib.sha256(f"{mode}\0{text}".encode()).digest()

    def get(self, texts: Sequence[str], mode: str, max_tokens: int) -> dict[str, Tensor]:
        """The features (n, D) of those ``texts`` that are stored: whole with n <= ``max_tokens``, or cut at ``max_tokens``."""
        found: dict[str, Tensor] = {}
        with self._guard():
            try:
                for key_text, features in self._select({self.key(text, mode): text for text in texts}, max_tokens):
                    found[key_text] = features
            except (sqlite3.Error, OSError) as error:
                self._failed(error, "read")
        return found

    def put(self, entries: Mapping[str, Entry], mode: str, max_tokens: int) -> None:
        """Stores ``entries`` in one transaction, committed on return."""
        rows = []
        for text, entry in entries.items():
            data = entry.features.contiguous().view(torch.uint8).numpy().tobytes()
            cut = max_tokens if entry.cut else 0
            rows.append((self.key(text, mode), cut, entry.features.shape[0], zlib.crc32(data), data))
        with self._guard():
            for _ in range(2):  # once more when the file was corrupt and is now a fresh one
                if not self._writable:
                    return
                try:
                    connection = self._connect()
                    if connection is None or not self._writable:
                        return
                    with connection:  # commits, or rolls back
                        connection.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?, ?)", rows)
                    return
                except (sqlite3.Error, OSError) as error:
                    self._failed(error, "write")

    def close(self) -> None:
        """Closes the file; the next call opens it again."""
        with self._guard():
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _guard(self) -> threading.RLock:
        if self._pid != os.getpid():  # forked, as data-loader workers are: another thread may have held the lock
            if self._connection is not None:
                _ABANDONED.append(self._connection)
            self._connection, self._lock, self._pid = None, threading.RLock(), os.getpid()
        return self._lock

    def _select(self, wanted: Mapping[bytes, str], max_tokens: int) -> Iterator[tuple[str, Tensor]]:
        connection = self._connect()
        if connection is None:
            return
        for keys in _chunks(list(wanted), _KEYS_PER_QUERY):
            # Ascending: where a text exactly as long as the limit has both rows, the one stored for this limit wins, always.
            rows = connection.execute(
                f"SELECT key, tokens, crc, data FROM features WHERE key IN ({','.join('?' * len(keys))}) "
                "AND (cut = ? OR (cut = 0 AND tokens <= ?)) ORDER BY cut",
                (*keys, max_tokens, max_tokens),
            ).fetchall()
            for key, tokens, crc, data in rows:
                if len(data) == tokens * self.dim * self.dtype.itemsize and zlib.crc32(data) == crc:
                    yield wanted[key], self._tensor(data, tokens)

    def _tensor(self, data: bytes, tokens: int) -> Tensor:
        if not tokens:
            return torch.zeros(0, self.dim, dtype=self.dtype)  # (0, D)
        return torch.frombuffer(bytearray(data), dtype=self.dtype).view(tokens, self.dim)  # (n, D)

    def _connect(self) -> sqlite3.Connection | None:
        if self._connection is None and self._readable:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._connection = self._open(str(self.path))
                self._inode = self.path.stat().st_ino
            except (sqlite3.Error, OSError) as error:
                if _is_corrupt(error):
                    self._inode = self.path.stat().st_ino
                    raise
                self._open_to_read(error)
        return self._connection

    def _open(self, path: str) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
        try:
            deadline = time.monotonic() + _BUSY_SECONDS
            while True:
                try:
                    # Stays in effect for the file. A file system without shared memory keeps the rollback journal instead.
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.execute("PRAGMA synchronous = NORMAL")
                    with connection:
                        connection.execute(_SCHEMA)
                    return connection
                except sqlite3.OperationalError as error:
                    # Two processes that create the file at once: this lock does not wait for the busy timeout.
                    if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
        except BaseException:
            connection.close()
            raise

    def _open_to_read(self, cause: Exception) -> None:
        """What other processes or an administrator left in a place that this process may not write to."""
        self._writable = False
        if self.path.is_file():
            # "immutable" needs no -shm file beside the database, which a read-only directory cannot get.
            for option in ("mode=ro", "mode=ro&immutable=1"):
                try:
                    uri = f"{self.path.absolute().as_uri()}?{option}"
                    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, check_same_thread=False)
                    connection.execute("SELECT count(*) FROM (SELECT 1 FROM features LIMIT 1)").fetchone()
                except sqlite3.Error:
                    continue
                self._connection = connection
                log.warning("The text cache %s is read-only (%s); new captions are not kept.", self.path, _line(cause))
                return
        self._readable = False
        log.warning("The text cache %s cannot be used (%s); captions are encoded anew in each run.", self.path, _line(cause))

    def _failed(self, error: Exception, action: str) -> None:
        connection, self._connection = self._connection, None
        if action == "write" and self._readable and not _is_corrupt(error):  # a full disk, a lock held too long: keep reading
            self._connection, self._writable = connection, False
            log.warning("The text cache %s takes no more entries (%s); new captions are not kept.", self.path, _line(error))
            return
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()
        if _is_corrupt(error) and not self._recovered:
            self._recovered = True
            self._move_aside(error)
            return
        self._readable = self._writable = False
        log.warning("The text cache %s cannot be used (%s); captions are encoded anew in each run.", self.path, _line(error))

    def _move_aside(self, error: Exception) -> None:
        aside = self.path.with_name(self.path.name + ".corrupt")
        try:
            if self.path.stat().st_ino != self._inode:
                return  # another process has already put a fresh file in its place
            os.replace(self.path, aside)
            for suffix in ("-wal", "-shm"):  # they belong to the file that was moved
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            log.warning("The text cache %s is corrupt (%s); moved to %s and started anew.", self.path, _line(error), aside.name)
        except FileNotFoundError:
            pass
        except OSError as failure:
            self._readable = self._writable = False
            log.warning(
                "The text cache %s is corrupt and cannot be moved aside (%s); it is ignored.", self.path, _line(failure)
            )


def _is_corrupt(error: Exception) -> bool:
    # SQLITE_ERROR here: a valid database whose table is not ours, "no such column".
    codes = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR)
    return isinstance(error, sqlite3.Error) and _code(error) in codes


def _code(error: sqlite3.Error) -> int:
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF  # the low byte is the primary code


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _chunks(keys: Sequence[bytes], size: int) -> Iterable[Sequence[bytes]]:
    return (keys[start : start + size] for start in range(0, len(keys), size))
