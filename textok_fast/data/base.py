"""What every source of captioned pictures looks like to the rest of the library."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class Example(NamedTuple):
    """One captioned picture."""

    image: np.ndarray  # (S, S, 3) uint8 RGB
    caption: str
    label: int  # class, an index into label_names; 0 when the source has no classes
    key: str  # unique in its data set, stable, safe as a file name


class RawPicture(NamedTuple):
    """One picture as it is stored, with all its captions."""

    key: str
    data: bytes  # an image file
    kind: str  # its format, as Pillow calls it
    captions: tuple[str, ...]
    label: str  # "" for none


class Draw(int):
    """An index together with what draws its caption and its crop: the run's seed and the number of the epoch.

    Everything random about an example is a function of these two and its key, so that a resumed run sees the same examples.
    """

    seed: int
    epoch: int

    def __new__(cls, index: int, seed: int, epoch: int) -> Draw:
        made = super().__new__(cls, index)
        made.seed, made.epoch = seed, epoch
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Draw, (int(self), self.seed, self.epoch)

    def at(self, index: int) -> Draw:
        """The same draw of another picture."""
        return Draw(index, self.seed, self.epoch)


class CaptionedImages(ABC):
    """A map-style data set of :class:`Example`; works with ``torch.utils.data.DataLoader`` and :func:`collate`.

    Attributes:
        label_names: names of the classes; empty when the source has none.
        skipped: how many pictures were left out, by reason.
        several_captions: whether a picture may have more than one.
    """

    label_names: list[str]
    skipped: dict[str, int]
    several_captions: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    @abstractmethod
    def captions_by_label(self, limit: int) -> dict[int, list[str]]:
        """At most ``limit`` distinct captions for each class, without rendering or decoding a picture.

        A class for which this split has no caption is left out.
        """

    @abstractmethod
    def describe(self) -> str:
        """One paragraph: where the pictures come from, their licence and how many there are."""

    @abstractmethod
    def content_hash(self) -> str:
        """A hash of what the examples are made of, so that tokens and checkpoints of other pictures are told apart."""

    def fetch(self, indices: Sequence[int]) -> list[Example | None]:
        """Several at once, each its own: None for a picture that turns out to be corrupt, where ``[index]`` gives the next."""
        return [self[index] for index in indices]

    def key(self, index: int) -> str:
        """The key of an example."""
        return self[index].key

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions of a picture, none for one without; the first is that of ``[index]``."""
        caption = self[index].caption
        return (caption,) if caption else ()

    def raw(self, indices: Sequence[int]) -> list[RawPicture | None]:
        """Pictures as they are stored, for `textok-fast data pack`; None for a corrupt one."""
        found: list[RawPicture | None] = []
        for example in self.fetch(indices):
            label = self.label_names[example.label] if example is not None and self.label_names else ""
            captions = (example.caption,) if example is not None and example.caption else ()
            found.append(
                None if example is None else RawPicture(example.key, encode_png(example.image), "PNG", captions, label)
            )
        return found

    def epoch_order(self, seed: int, epoch: int, batch: int, rows: Sequence[int] | None = None) -> np.ndarray | None:
        """The indices of an epoch, int64, cut into batches of ``batch`` by who asks; None: in any random order.

        ``rows``: of the pictures of these indices, ascending; the order is then of places in ``rows``.
        """
        return None

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def _position(self, index: int) -> int:
        """``index`` with Python's negative indices resolved; ``IndexError`` outside the data set."""
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)}")
        return int(position)


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """A batch: ``images`` uint8 (B, S, S, 3), ``captions`` list of str, ``labels`` int64 (B,), ``keys`` list of str."""
    import torch  # here, so that fetching and looking at pictures starts at once

    return {
        "images": torch.from_numpy(np.stack([example.image for example in examples])),  # (B, S, S, 3)
        "captions": [example.caption for example in examples],
        "labels": torch.tensor([example.label for example in examples], dtype=torch.int64),  # (B,)
        "keys": [example.key for example in examples],
    }


def encode_png(image: np.ndarray) -> bytes:
    """(S, S, 3) uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def stable_hash(*parts: object) -> int:
    """64 bits that depend on ``parts`` only: the same in every process, on every machine and under every library version."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def describe_skipped(skipped: dict[str, int]) -> str:
    """The counts in words, like "; skipped: 2 corrupt image, 1 missing caption", or nothing."""
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()) if count)
    return f"; skipped: {counts}" if counts else ""
