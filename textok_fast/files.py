"""Writing files so that they are complete or not there, and so that a disk that is full is an OSError whoever writes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from textok_fast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` with a temporary path beside ``path`` and moves the finished file into place.

    Raises OSError, naming ``path``, when the place cannot be written or the disk is full, whatever library ``write`` uses.
    """
    path = Path(path)
    with _failed_writes(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """UTF-8 text by :func:`write_atomically`; makes the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))


def replace_directory(new: Path, directory: Path) -> None:
    """Moves a finished directory into the place of ``directory``, which may be there; both lie on one file system."""
    if directory.is_dir():
        old = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
        directory.replace(old)  # an empty directory gives way
        new.replace(directory)
        shutil.rmtree(old)
    else:
        new.replace(directory)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file by :func:`write_atomically`, the same bytes for the same contents.

    ``tensors`` must be contiguous and share no memory.
    """
    from safetensors.torch import save_file

    about = None if metadata is None else dict(metadata)

    def write(target: Path) -> None:
        save_file(dict(tensors), target, metadata=about)
        if about is not None and len(about) > 1:
            _sort_metadata(target)

    write_atomically(path, write)


def _sort_metadata(path: Path) -> None:
    """Brings a safetensors header's metadata, which the library writes in any order, into the order of its names."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        if len(data) == length:  # a header of another length would move the tensors
            file.seek(8)
            file.write(data)


def save_state(state: Any, path: Path) -> None:
    """``torch.save`` by :func:`write_atomically`. Numbers, strings, containers and tensors are read ``weights_only``."""
    import torch

    def write(target: Path) -> None:
        with target.open("wb") as file:  # a path would hide the cause of a failed write from us
            torch.save(state, file)

    write_atomically(path, write)


@contextlib.contextmanager
def only_writer(directory: Path, leftovers: str) -> Iterator[None]:
    """Inside, no other process holds this directory, which is made, and the files that a killed one left half are gone.

    ``leftovers``: a glob of these. Raises InputError when another process holds it (on file systems that lock).
    """
    from filelock import FileLock, Timeout

    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"{directory} is being written to by another process; wait for it or stop it") from None
    try:
        for leftover in directory.glob(leftovers):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        (directory / ".lock").unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def _failed_writes(path: Path) -> Iterator[None]:
    """What safetensors and torch raise for a failed write becomes the OSError that caused it, with the name of ``path``."""
    try:
        yield
    except OSError as error:
        is_ours = error.filename is None or Path(os.fsdecode(error.filename)).name.startswith(f".{path.name}.")
        if error.errno is None or not is_ours:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or cause.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO):
            raise
        raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
