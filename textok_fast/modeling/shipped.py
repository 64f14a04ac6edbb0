"""Weights that come with the package, by name: ``TexTok.from_pretrained("textok-mini")`` needs no network.

``textok_fast/pretrained/NAME`` is a pipeline's directory with its tokenizer and generator, a model card, and SHA256SUMS, by
which every file is checked before it is read.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from textok_fast.errors import InputError

ROOT = Path(__file__).resolve().parent.parent / "pretrained"
SUMS_NAME = "SHA256SUMS"  # as sha256sum writes and checks it


def shipped_names() -> list[str]:
    """The names of what is shipped."""
    return sorted(path.parent.name for path in ROOT.glob(f"*/{SUMS_NAME}"))


def find_model(source: str | Path) -> Path:
    """``source`` as a path; a shipped name, unless a directory of that name is here, as its directory, checked.

    Raises: InputError where one of the shipped files is missing or is not what was shipped.
    """
    path = Path(source).expanduser()
    if path.is_dir() or str(source) not in shipped_names():
        return path
    _check(ROOT / str(source))
    return ROOT / str(source)


@functools.cache
def _check(directory: Path) -> None:
    for line in (directory / SUMS_NAME).read_text(encoding="utf-8").splitlines():
        wanted, _, name = line.partition("  ")
        try:
            with (directory / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(
                f"cannot read {directory / name}, which comes with textok-fast: {error}; install it again"
            ) from None
        if found != wanted:
            raise InputError(
                f"{directory / name} is not the file that comes with textok-fast (sha256 {found[:12]}, wanted {wanted[:12]}); "
                "install it again"
            )


def write_sums(directory: Path) -> Path:
    """SHA256SUMS of all other files in ``directory``; returns its path."""
    from textok_fast.files import write_text

    lines = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SUMS_NAME):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(directory).as_posix()}\n")
    write_text(directory / SUMS_NAME, "".join(lines))
    return directory / SUMS_NAME
