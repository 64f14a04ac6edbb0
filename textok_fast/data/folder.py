"""A folder of images with captions: a .txt beside each image, or one captions.jsonl, captions.csv or captions.parquet."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from textok_fast.config import DataConfig
from textok_fast.data.columns import Record, Records
from textok_fast.data.crops import Crop
from textok_fast.data.files import IMAGE_SUFFIXES, FileDataset
from textok_fast.data.shard_index import captions_of, captions_of_text
from textok_fast.errors import InputError

log = logging.getLogger(__name__)

CAPTION_FILES = ("captions.jsonl", "captions.csv", "captions.parquet")


class FolderDataset(FileDataset):
    """The images below a folder.

    With a caption file each row has ``file_name`` (relative to the folder), ``caption`` (in .jsonl and .parquet a string or a
    list of them, also as ``captions``) and optionally ``label``; without one the captions are the lines of the .txt file beside
    the image, or with ``caption_lines`` False the whole of it is one. Rows and images that lack their other half, empty
    captions (unless ``need_captions`` is False) and corrupt images are counted in ``skipped``. Raises :class:`InputError` when
    nothing is left, and for a folder or caption file that cannot be read.
    """

    source = "folder"

    def __init__(
        self,
        path: str | Path,
        split: str,
        crop: Crop,
        need_captions: bool = True,
        caption_lines: bool = True,
        validation_share: float = DataConfig.validation_share,
    ) -> None:
        self._root = Path(path)
        if not self._root.is_dir():
            raise InputError(f"data.path {str(path)!r} is not a directory; give a folder of images with captions")
        skipped: Counter[str] = Counter()
        tables = [self._root / name for name in CAPTION_FILES if (self._root / name).is_file()]
        if len(tables) > 1:
            log.warning("%s has %s: only %s is read", path, ", ".join(table.name for table in tables), tables[0].name)
        found = self._table_records(tables[0], skipped) if tables else self._text_records(skipped, caption_lines)
        super().__init__(Records.of(found), split, crop, skipped, str(path), need_captions, validation_share=validation_share)

    def _read(self, records: Sequence[Record]) -> list[bytes | Exception]:
        found: list[bytes | Exception] = []
        for record in records:
            try:
                found.append((self._root / record.place).read_bytes())
            except OSError as error:
                found.append(error)
        return found

    def _image_names(self) -> list[str]:
        """All image files, relative to the folder."""
        files = (path for path in self._root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        return sorted(path.relative_to(self._root).as_posix() for path in files)

    def _text_records(self, skipped: Counter[str], caption_lines: bool) -> Iterator[Record]:
        for name in self._image_names():
            file = self._root / name
            try:
                captions = captions_of_text(file.with_suffix(".txt").read_text(encoding="utf-8-sig"), caption_lines)
            except FileNotFoundError:
                captions = ()
            except (OSError, UnicodeDecodeError):
                skipped["unreadable caption"] += 1
                continue
            yield Record(name, captions, "", name)

    def _table_records(self, table: Path, skipped: Counter[str]) -> Iterator[Record]:
        listed: set[str] = set()
        for row in read_table(table, skipped):
            name = str(row.get("file_name") or "").strip()
            # Normalised by text, not on disk: a link below the folder may lead out of it, ".." may not.
            name = os.path.normpath(name).replace(os.sep, "/") if name else ""
            if not name or name.startswith(("../", "/")) or name == ".." or not (self._root / name).is_file():
                skipped["missing image"] += 1
                continue
            listed.add(name)
            label = row.get("label")
            yield Record(name, captions_of(row), "" if label is None or label != label else str(label).strip(), name)
        for name in self._image_names():
            if name not in listed:
                yield Record(name, (), "", name)


def read_table(table: Path, skipped: Counter[str]) -> Iterator[Mapping[str, Any]]:
    """The rows of a caption file by its suffix: .jsonl, .csv or .parquet. A malformed JSON line is counted in ``skipped``."""
    try:
        if table.suffix == ".jsonl":
            yield from _read_jsonl(table, skipped)
        elif table.suffix == ".csv":
            with table.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                _require_columns(table, reader.fieldnames or ())
                yield from reader
        else:
            yield from _read_parquet(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the captions in {table}: {' '.join(str(error).split())}") from None


def _read_jsonl(table: Path, skipped: Counter[str]) -> Iterator[Mapping[str, Any]]:
    with table.open(encoding="utf-8-sig") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            else:
                skipped["malformed row"] += 1


def _read_parquet(table: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"reading {table.name} needs pyarrow (pip install pyarrow); captions.jsonl does not") from None
    try:
        with parquet.ParquetFile(table) as file:
            names = file.schema_arrow.names
            _require_columns(table, names)
            columns = [name for name in ("file_name", "caption", "captions", "label") if name in names]
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"cannot read the captions in {table}: {' '.join(str(error).split())}") from None


def _require_columns(table: Path, names: Any) -> None:
    missing = [name for name in ("file_name", "caption") if name not in names]
    if "captions" in names and "caption" in missing:
        missing.remove("caption")
    if missing:
        raise InputError(f"{table} has the columns {', '.join(names) or 'none'}; it lacks {' and '.join(missing)}")
