"""Tokens of a whole data set on disk: computed once, resumable, read by the generator's training and by ``decode``.

A directory holds index.json (what made the tokens) and tokens-00000.safetensors, tokens-00001.safetensors, ...: each with
``tokens`` (n, N, d) float32, ``labels`` (n,) int64, for discrete tokenizers ``indices`` (n, N) int64, and in its header the
keys and captions. A shard appears complete or not at all, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset, Subset

from textok_fast.data.base import CaptionedImages, Example, collate
from textok_fast.errors import InputError
from textok_fast.files import save_tensors, write_text

INDEX_NAME = "index.json"
_SHARD = re.compile(r"tokens-\d{5,}\.safetensors")


class Examples(Protocol):
    """Pictures by index."""

    def __getitem__(self, index: int, /) -> Example: ...


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
    pictures = drawn_pictures(dataset, total, seed)
    content = {"content": dataset.content_hash(), "count": total, "drawn_by_seed": seed}
    directory.mkdir(parents=True, exist_ok=True)
    claim_index(directory, {**identity, **content, "shard_size": shard_size})
    reused = 0
    for number, first, last in shard_ranges(total, shard_size)[part[0] :: part[1]]:
        path = directory / f"tokens-{number:05d}.safetensors"
        if is_complete(path):
            reused += 1
        else:
            tensors, keys, captions = encode_range(pictures, encode, first, last, batch_size, progress, total)
            metadata = {"keys": json.dumps(keys), "captions": json.dumps(captions)}
            save_tensors(tensors, path, metadata)
        if progress is not None:
            progress(last, total)
    return reused


def drawn_pictures(dataset: CaptionedImages, count: int, seed: int | None) -> Examples:
    """The ``count`` pictures of ``dataset`` that :func:`write_token_shards` encodes, in its order."""
    if seed is None or count >= len(dataset):
        return dataset
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
    return Subset(dataset, drawn.sort().values.tolist())  # type: ignore[arg-type]


def shard_ranges(total: int, shard_size: int) -> list[tuple[int, int, int]]:
    """(number, first, last + 1) of each shard of ``total`` pictures."""
    return [(n, first, min(first + shard_size, total)) for n, first in enumerate(range(0, total, shard_size))]


def encode_range(
    dataset: Examples,
    encode: EncodeFn,
    first: int,
    last: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    total: int,
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Pictures ``first`` to ``last`` - 1 as tensors (tokens, labels, maybe indices), keys and captions."""
    parts: dict[str, list[Tensor]] = {}
    keys: list[str] = []
    captions: list[str] = []
    for start in range(first, last, batch_size):
        batch = collate([dataset[i] for i in range(start, min(start + batch_size, last))])
        for name, value in {**encode(batch["images"], batch["captions"]), "labels": batch["labels"]}.items():
            parts.setdefault(name, []).append(value.cpu())
        keys += batch["keys"]
        captions += batch["captions"]
        if progress is not None:
            progress(min(start + batch_size, last), total)
    tensors = {name: torch.cat(values).contiguous() for name, values in parts.items()}
    return tensors, keys, captions


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
