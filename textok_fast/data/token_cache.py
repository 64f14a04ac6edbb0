"""Tokens of a whole data set on disk: computed once, resumable, read by the generator's training and by ``decode``.

A directory holds index.json (what made the tokens) and tokens-00000.safetensors, tokens-00001.safetensors, ...: each with
``tokens`` (n, N, d) float32, ``labels`` (n,) int64, for discrete tokenizers ``indices`` (n, N) int64, and in its header the
keys and captions. A shard appears complete or not at all, so an interrupted run goes on where it stopped. Beside a shard that
lacks pictures because they are corrupt, tokens-00000.skipped.json lists their keys.
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
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from textok_fast.data.base import CaptionedImages, Example, collate
from textok_fast.errors import InputError
from textok_fast.files import save_tensors, write_text

INDEX_NAME, SKIPPED_SUFFIX = "index.json", ".skipped.json"
_SHARD = re.compile(r"tokens-\d{5,}\.safetensors")


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
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Encodes ``count`` pictures of ``dataset`` (default: all) into ``directory``; returns how many shards were already there.

    Of more than ``count`` pictures the first are taken, or with ``seed`` those that it draws. ``identity`` says what the tokens
    are made of (tokenizer, data); a directory made of something else is refused. ``part`` (k, n): writes every n-th shard from
    the k-th on only, the others being other processes'. ``progress`` is called with (pictures done, pictures in all).
    """
    total = len(dataset) if count is None else min(count, len(dataset))
    seed = None if total == len(dataset) else seed
    rows = drawn_rows(len(dataset), total, seed)
    content = {"content": dataset.content_hash(), "count": total, "drawn_by_seed": seed}
    directory.mkdir(parents=True, exist_ok=True)
    claim_index(directory, {**identity, **content, "shard_size": shard_size})
    reused = 0
    for number, first, last in shard_ranges(total, shard_size)[part[0] :: part[1]]:
        path = shard_path(directory, number)
        if is_complete(path):
            reused += 1
        else:
            advance = None if progress is None else functools.partial(_advance, progress, first, total)
            write_shard(path, encode_rows(dataset, encode, rows[first:last], batch_size, advance))
        if progress is not None:
            progress(last, total)
    return reused


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
    """The tokens of some pictures."""

    tensors: dict[str, Tensor]  # tokens, labels, maybe indices
    keys: list[str]
    captions: list[str]
    skipped: list[str]  # keys of pictures that turned out to be corrupt


def encode_rows(
    dataset: CaptionedImages,
    encode: EncodeFn,
    rows: Sequence[int],
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> EncodedRows:
    """The pictures of these indices, each once or, if it is corrupt, not at all. A thread reads two batches ahead.

    ``advance`` is called with the number of pictures done. Raises InputError when none of them can be read.
    """
    parts: dict[str, list[Tensor]] = {}
    found = EncodedRows({}, [], [], [])
    done = 0
    for batch_rows, examples in read_ahead(dataset, rows, batch_size):
        found.skipped.extend(dataset.key(row) for row, each in zip(batch_rows, examples, strict=True) if each is None)
        if readable := [each for each in examples if each is not None]:
            batch = collate(readable)
            for name, value in {**encode(batch["images"], batch["captions"]), "labels": batch["labels"]}.items():
                parts.setdefault(name, []).append(value.cpu())
            found.keys.extend(batch["keys"])
            found.captions.extend(batch["captions"])
        done += len(batch_rows)
        if advance is not None:
            advance(done)
    if not parts:
        raise InputError(f"none of the pictures {dataset.key(rows[0])} to {dataset.key(rows[-1])} can be read")
    return found._replace(tensors={name: torch.cat(values).contiguous() for name, values in parts.items()})


def read_ahead(
    dataset: CaptionedImages, rows: Sequence[int], batch_size: int, ahead: int = 2
) -> Iterator[tuple[Sequence[int], list[Example | None]]]:
    """Batches of ``rows`` with their examples, of which a thread reads and decodes ``ahead`` before they are asked for.

    One thread, because a data set counts the corrupt pictures it meets: two would count them twice.
    """
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    thread = ThreadPoolExecutor(1, "textok-read")
    try:
        pending: deque[Future[list[Example | None]]] = deque()
        for number, batch in enumerate(batches):
            while len(pending) <= ahead and number + len(pending) < len(batches):
                pending.append(thread.submit(dataset.fetch, batches[number + len(pending)]))
            yield batch, pending.popleft().result()
    finally:
        thread.shutdown(wait=True, cancel_futures=True)


def shard_path(directory: Path, number: int) -> Path:
    """The shard of that number."""
    return directory / f"tokens-{number:05d}.safetensors"


def write_shard(path: Path, rows: EncodedRows) -> None:
    """A shard, and before it the list of the corrupt pictures that it lacks."""
    note_skipped(path, rows.skipped)
    save_tensors(rows.tensors, path, {"keys": json.dumps(rows.keys), "captions": json.dumps(rows.captions)})


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
    """The tokens of a directory of shards, in memory: {tokens (N, d), label, caption, key, indices (N,) or absent}."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        directory = Path(directory)
        self.index = read_index(directory)
        self.captions: list[str] = []
        self.keys: list[str] = []
        parts: dict[str, list[Tensor]] = {}
        for path in shard_paths(directory):
            try:
                with safe_open(path, "pt") as shard:
                    metadata = shard.metadata() or {}
                    self.captions += json.loads(metadata["captions"])
                    self.keys += json.loads(metadata["keys"])
                    for name in shard.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                        parts.setdefault(name, []).append(shard.get_tensor(name))
            except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
                raise InputError(f"cannot read the token shard {path}: {error}; remove it and encode again") from None
        try:
            tensors = {name: torch.cat(values) for name, values in parts.items()}
            self.tokens, self.labels, self.indices = tensors["tokens"], tensors["labels"], tensors.get("indices")
        except (KeyError, RuntimeError) as error:
            raise InputError(f"the token shards in {directory} do not fit together ({error}); encode again") from None
        if not len(self.tokens) == len(self.labels) == len(self.keys) == len(self.captions):
            raise InputError(f"the token shards in {directory} have not as many keys as tokens; encode again")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {
            "tokens": self.tokens[index],
            "label": self.labels[index],
            "caption": self.captions[index],
            "key": self.keys[index],
        }
        if self.indices is not None:
            item["indices"] = self.indices[index]
        return item


def collate_tokens(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of :class:`TokenDataset`: tokens (B, N, d), labels (B,), captions and keys as lists."""
    return {
        "tokens": torch.stack([item["tokens"] for item in items]),  # (B, N, d)
        "labels": torch.stack([item["label"] for item in items]),  # (B,)
        "captions": [item["caption"] for item in items],
        "keys": [item["key"] for item in items],
    }
