"""Tokens of a whole data set on disk: computed once, resumable, read by the generator's training and by ``decode``.

A directory holds index.json (what made the tokens) and tokens-00000.safetensors, tokens-00001.safetensors, ...: each with
``tokens`` (n, N, d) float32, ``labels`` (n,) int64, for discrete tokenizers ``indices`` (n, N) int64, and in its header the
keys and captions. A picture has a row for each of its captions that was encoded, one behind the other under the same key; or,
where the tokenizer's encoder reads no text, one row whose entry in captions is a list. A shard appears complete or not at all,
so an interrupted run goes on where it stopped. Beside a shard that lacks pictures because they are corrupt,
tokens-00000.skipped.json lists their keys.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from textok_fast.data.base import CaptionedImages, Draw, Example, collate
from textok_fast.data.columns import Strings
from textok_fast.data.files import draw_caption
from textok_fast.errors import InputError
from textok_fast.files import save_tensors, write_text

INDEX_NAME, SKIPPED_SUFFIX = "index.json", ".skipped.json"
_SHARD = re.compile(r"tokens-\d{5,}\.safetensors")


Read = TypeVar("Read")
EncodeFn = Callable[[Tensor, list[str]], dict[str, Tensor]]  # uint8 (B, S, S, 3), captions -> tokens and maybe indices


def write_token_shards(
    directory: Path,
    dataset: CaptionedImages,
    encode: EncodeFn,
    *,
    identity: dict[str, Any],
    count: int | None = None,
    seed: int | None = None,
    batch_size: int = 32,
    shard_size: int = 1024,
    captions: int = 1,
    reads_captions: bool = True,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Encodes ``count`` pictures of ``dataset`` (default: all) into ``directory``; returns how many shards were already there.

    Of more than ``count`` pictures the first are taken, or with ``seed`` those that it draws. ``identity`` says what the tokens
    are made of (tokenizer, data); a directory made of something else is refused. ``captions``: of a picture with several so
    many are encoded, 0 for all; ``reads_captions`` False: none changes the tokens. ``part`` (k, n): writes every n-th shard
    from the k-th on only, the others being other processes'. ``progress`` is called with (pictures done, pictures in all).
    """
    total = len(dataset) if count is None else min(count, len(dataset))
    seed = None if total == len(dataset) else seed
    rows = drawn_rows(len(dataset), total, seed)
    content = {"content": dataset.content_hash(), "count": total, "drawn_by_seed": seed, **captions_identity(dataset, captions)}
    directory.mkdir(parents=True, exist_ok=True)
    claim_index(directory, {**identity, **content, "shard_size": shard_size})
    reused = 0
    for number, first, last in shard_ranges(total, shard_size)[part[0] :: part[1]]:
        path = shard_path(directory, number)
        if is_complete(path):
            reused += 1
        else:
            advance = None if progress is None else functools.partial(_advance, progress, first, total)
            write_shard(path, encode_rows(dataset, encode, rows[first:last], batch_size, advance, captions, reads_captions))
        if progress is not None:
            progress(last, total)
    return reused


def captions_identity(dataset: CaptionedImages, captions: int) -> dict[str, Any]:
    """What the number of captions encoded of a picture adds to the description of the tokens: nothing where it changes none."""
    return {"captions": captions} if captions != 1 and dataset.several_captions else {}


def drawn_rows(length: int, count: int, seed: int | None) -> Sequence[int]:
    """The indices of the ``count`` of ``length`` pictures that :func:`write_token_shards` encodes, in its order."""
    if seed is None or count >= length:
        return range(min(count, length))
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist()


def shard_ranges(total: int, shard_size: int) -> list[tuple[int, int, int]]:
    """(number, first, last + 1) of each shard of ``total`` pictures."""
    return [(n, first, min(first + shard_size, total)) for n, first in enumerate(range(0, total, shard_size))]


def _advance(progress: Callable[[int, int], None], first: int, total: int, done: int) -> None:
    progress(first + done, total)


class EncodedRows(NamedTuple):
    """The tokens of some pictures, a row for each caption that changes them."""

    tensors: dict[str, Tensor]  # tokens, labels, maybe indices
    keys: list[str]  # of the rows: equal ones are neighbours
    captions: list[list[str]]  # of the rows, at least one each
    skipped: list[str]  # keys of pictures that turned out to be corrupt


def encode_rows(
    dataset: CaptionedImages,
    encode: EncodeFn,
    rows: Sequence[int],
    batch_size: int,
    advance: Callable[[int], None] | None = None,
    captions: int = 1,
    reads_captions: bool = True,
) -> EncodedRows:
    """The pictures of these indices, each with its first ``captions`` captions (0: all) or, if it is corrupt, not at all. A
    thread reads two batches ahead. Captions that ``encode`` does not read share a row.

    ``advance`` is called with the number of pictures done. Raises InputError when none of them can be read.
    """
    several = captions != 1 and dataset.several_captions

    def read(batch: Sequence[int]) -> list[list[tuple[Example, list[str]]]]:
        """Of each picture its rows, none of a corrupt one: with the first caption to encode it with, and all to keep."""
        read_rows: list[list[tuple[Example, list[str]]]] = []
        for row, example in zip(batch, dataset.fetch(batch), strict=True):
            if example is None:
                read_rows.append([])
                continue
            told = list(dataset.captions(row)[: captions or None]) if several else []
            told = told or [example.caption]
            of_rows = [[text] for text in told] if reads_captions else [told]
            read_rows.append([(example._replace(caption=texts[0]), texts) for texts in of_rows])
        return read_rows

    parts: dict[str, list[Tensor]] = {}
    found = EncodedRows({}, [], [], [])
    done = 0
    for batch_rows, read_rows in read_ahead(read, rows, batch_size):
        found.skipped.extend(dataset.key(row) for row, each in zip(batch_rows, read_rows, strict=True) if not each)
        examples = [each for of_picture in read_rows for each in of_picture]
        for start in range(0, len(examples), batch_size):
            batch = collate([example for example, _ in examples[start : start + batch_size]])
            for name, value in {**encode(batch["images"], batch["captions"]), "labels": batch["labels"]}.items():
                parts.setdefault(name, []).append(value.cpu())
            found.keys.extend(batch["keys"])
        found.captions.extend(texts for _, texts in examples)
        done += len(batch_rows)
        if advance is not None:
            advance(done)
    if not parts:
        raise InputError(f"none of the pictures {dataset.key(rows[0])} to {dataset.key(rows[-1])} can be read")
    return found._replace(tensors={name: torch.cat(values).contiguous() for name, values in parts.items()})


def read_ahead(
    read: Callable[[Sequence[int]], Read], rows: Sequence[int], batch_size: int, ahead: int = 2
) -> Iterator[tuple[Sequence[int], Read]]:
    """Batches of ``rows`` with what ``read`` gives of them, of which a thread reads ``ahead`` before they are asked for.

    One thread, because a data set counts the corrupt pictures it meets: two would count them twice.
    """
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    thread = ThreadPoolExecutor(1, "textok-read")
    try:
        pending: deque[Future[Read]] = deque()
        for number, batch in enumerate(batches):
            while len(pending) <= ahead and number + len(pending) < len(batches):
                pending.append(thread.submit(read, batches[number + len(pending)]))
            yield batch, pending.popleft().result()
    finally:
        thread.shutdown(wait=True, cancel_futures=True)


def shard_path(directory: Path, number: int) -> Path:
    """The shard of that number."""
    return directory / f"tokens-{number:05d}.safetensors"


def write_shard(path: Path, rows: EncodedRows) -> None:
    """A shard, and before it the list of the corrupt pictures that it lacks."""
    note_skipped(path, rows.skipped)
    captions = [texts[0] if len(texts) == 1 else texts for texts in rows.captions]
    save_tensors(rows.tensors, path, {"keys": json.dumps(rows.keys), "captions": json.dumps(captions)})


def note_skipped(path: Path, keys: list[str]) -> None:
    """Leaves a list of corrupt pictures beside a shard that lacks them; no file for none."""
    if keys:
        write_text(path.with_suffix(SKIPPED_SUFFIX), json.dumps(keys) + "\n")


def read_skipped(directory: Path) -> list[str]:
    """The keys of all corrupt pictures that the shards of a directory lack."""
    found: list[str] = []
    for path in sorted(directory.glob(f"tokens-*{SKIPPED_SUFFIX}")):
        found += json.loads(path.read_text(encoding="utf-8"))
    return found


def claim_index(directory: Path, index: dict[str, Any], what: str = "tokens") -> None:
    """Writes index.json, or checks that the one there says the same of ``what`` it holds; InputError when it does not."""
    path = directory / INDEX_NAME
    if path.exists():
        found = read_index(directory)
        if found != index:
            changed = [key for key in {*found, *index} if found.get(key) != index.get(key)]
            raise InputError(
                f"{directory} holds {what} made otherwise ({', '.join(sorted(changed))} differ); choose another directory"
            )
        return
    write_text(path, json.dumps(index, indent=2) + "\n")


def read_index(directory: Path) -> dict[str, Any]:
    """The contents of index.json; InputError when the directory holds no tokens."""
    try:
        index = json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{directory} holds no tokens: there is no {INDEX_NAME}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {directory / INDEX_NAME}: {error}") from None
    if not isinstance(index, dict):
        raise InputError(f"{directory / INDEX_NAME} is not a mapping")
    return index


def is_complete(path: Path) -> bool:
    """Whether a shard is there and its header can be read."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def shard_paths(directory: Path) -> list[Path]:
    """The directory's token shards in order; InputError when there are none."""
    paths = sorted(path for path in directory.glob("tokens-*.safetensors") if _SHARD.fullmatch(path.name))
    if not paths:
        raise InputError(f"{directory} holds no token shards (tokens-00000.safetensors, ...)")
    return paths


class TokenDataset(Dataset[dict[str, Any]]):
    """The tokens of a directory of shards, an item a picture: {tokens (N, d), label, caption, key, indices (N,) or absent}.

    Of a picture with several captions a :class:`~textok_fast.data.base.Draw` gets the caption that its seed, its epoch and the
    key draw, and the tokens encoded with it; a plain index gets the first caption's.

    Tokens and indices stay in their files, mapped: of a large set only what is asked for is read, and processes share it. Keys
    and captions are in memory, in few arrays. Raises: InputError for shards that cannot be read or do not fit together.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.index = read_index(self.directory)
        self._paths = shard_paths(self.directory)
        captions, keys, labels, first = [], [], [], []
        self._shapes: dict[str, list[int]] = {}  # of a row
        rows = 0
        bounds = [0]
        for path in self._paths:
            try:
                with safe_open(path, "pt") as shard:
                    metadata = shard.metadata() or {}
                    said = [text if isinstance(text, str) else "\0".join(text) for text in json.loads(metadata["captions"])]
                    named: list[str] = json.loads(metadata["keys"])
                    shapes = {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118 (no mapping)
                    labels.append(shard.get_tensor("labels").clone())
            except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
                raise InputError(f"cannot read the token shard {path}: {error}; remove it and encode again") from None
            if "tokens" not in shapes or not len(named) == len(said) == len(labels[-1]):
                raise InputError(f"the token shard {path} has not as many keys as tokens; encode again")
            if any(shape[0] != len(named) for shape in shapes.values()):
                raise InputError(f"the token shard {path} has not as many keys as tokens; encode again")
            found = {name: shape[1:] for name, shape in shapes.items()}
            self._shapes = self._shapes or found
            if found != self._shapes:
                raise InputError(
                    f"the token shards in {self.directory} do not fit together ({found}, {self._shapes}); encode again"
                )
            first += [rows + row for row, key in enumerate(named) if not row or key != named[row - 1]]
            captions.append(Strings.of(said))
            keys.append(Strings.of(named))
            rows += len(named)
            bounds.append(rows)
        # The captions of a row are one string; none has a NUL.
        self._captions, self._keys, self._labels = Strings.joined(captions), Strings.joined(keys), torch.cat(labels)
        self._first = np.array([*first, rows], dtype=np.int64)  # (n + 1,): the rows of picture i are from [i] to before [i + 1]
        self._bounds = np.array(bounds, dtype=np.int64)  # of the shards, in rows
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:  # another process maps the files for itself
        return {**self.__dict__, "_mapped": {}}

    def __len__(self) -> int:
        return len(self._first) - 1

    @property
    def keys(self) -> list[str]:
        """Of all pictures."""
        return [self._keys[int(row)] for row in self._first[:-1]]

    @property
    def captions(self) -> list[str]:
        """Of all pictures, the first of each."""
        return [self._captions[int(row)].partition("\0")[0] for row in self._first[:-1]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside tokens of {len(self)} pictures")
        first, after = (int(bound) for bound in self._first[int(index) % len(self) :][:2])
        key = self._keys[first]
        choices = [(row, text) for row in range(first, after) for text in self._captions[row].split("\0")]
        row, caption = choices[draw_caption(index, key, len(choices)) if isinstance(index, Draw) else 0]
        item = {name: self._row(name, row) for name in self._shapes if name != "labels"}
        return {**item, "label": self._labels[row], "caption": caption, "key": key}

    def _row(self, name: str, row: int) -> Tensor:
        """A row of a tensor, in its file."""
        shard = int(np.searchsorted(self._bounds, row, side="right")) - 1
        if shard not in self._mapped:
            try:
                with safe_open(self._paths[shard], "pt") as file:  # of which get_tensor maps the file: nothing is read yet
                    self._mapped[shard] = {name: file.get_tensor(name) for name in self._shapes if name != "labels"}
            except (OSError, SafetensorError) as error:
                raise InputError(f"cannot read the token shard {self._paths[shard]} any more: {error}") from None
        return self._mapped[shard][name][row - int(self._bounds[shard])]


def collate_tokens(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of :class:`TokenDataset`: tokens (B, N, d), labels (B,), captions and keys as lists."""
    return {
        "tokens": torch.stack([item["tokens"] for item in items]),  # (B, N, d)
        "labels": torch.stack([item["label"] for item in items]),  # (B,)
        "captions": [item["caption"] for item in items],
        "keys": [item["key"] for item in items],
    }
