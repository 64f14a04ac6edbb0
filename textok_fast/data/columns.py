"""Tables of many pictures in few arrays: little memory, and nothing that a forked loader process would copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class Strings(Sequence[str]):
    """Strings end to end in one array. ``data``: uint8, UTF-8. ``ends``: int64 (n,), where each ends in it."""

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, values: Iterable[str]) -> Strings:
        encoded = [value.encode("utf-8", errors="surrogatepass") for value in values]
        ends = np.cumsum([len(value) for value in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    @classmethod
    def joined(cls, parts: Sequence[Strings]) -> Strings:
        """The strings of all parts, one after the other."""
        if not parts:
            return cls.of(())
        shifts = np.cumsum([0, *(len(part.data) for part in parts[:-1])], dtype=np.int64)
        ends = [part.ends + shift for part, shift in zip(parts, shifts, strict=True)]
        return cls(np.concatenate([part.data for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:  # a str for an int; slices are not needed
        start = 0 if index == 0 else int(self.ends[index - 1])
        return self.data[start : int(self.ends[index])].tobytes().decode("utf-8", errors="surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Record:
    """One picture that is not decoded yet. ``place`` tells the data set where its bytes are."""

    name: str  # distinct in the data set; the key is made from it
    captions: tuple[str, ...]  # of one line each; empty for none
    label: str  # "" for none
    place: Any


@dataclass(frozen=True)
class Records:
    """A table of :class:`Record`. ``captions`` has a picture's captions in one string, one a line."""

    names: Sequence[str]
    captions: Sequence[str]
    labels: Sequence[str]
    places: Any  # anything with [index]

    @classmethod
    def of(cls, rows: Iterable[Record]) -> Records:
        found = list(rows)
        return cls(
            Strings.of(row.name for row in found),
            Strings.of("\n".join(row.captions) for row in found),
            Strings.of(row.label for row in found),
            [row.place for row in found],
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Record:
        captions = self.captions[index]
        return Record(
            self.names[index], tuple(captions.split("\n")) if captions else (), self.labels[index], self.places[index]
        )
