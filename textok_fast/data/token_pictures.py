"""Cached tokens beside the pictures they are of, for trainings that look at both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from textok_fast.config import LowResolutionConfig
from textok_fast.data.base import CaptionedImages, Draw, Example
from textok_fast.data.degradation import degrade
from textok_fast.data.token_cache import TokenDataset, collate_tokens
from textok_fast.errors import InputError


class TokensAndPictures(Dataset[dict[str, Any]]):
    """Items of a :class:`TokenDataset` with ``image`` (S, S, 3) uint8, its picture, and with ``low_resolution`` also
    ``small``, that picture worn and made small (:func:`~textok_fast.data.degradation.degrade`): anew in every epoch of a
    :class:`~textok_fast.data.base.Draw`, by the config's seed, the epoch and the item's index, so that a resumed run, and one
    on other processes, sees the same. ``rows``: which pictures of ``dataset`` the tokens are of, one each.

    The pictures are read again whenever they are asked for, a batch at once, by the loader's workers: of a million, even small
    ones would fill a machine's memory. Raises: InputError for a picture that is not the one the tokens were made of.
    """

    def __init__(
        self,
        tokens: TokenDataset,
        dataset: CaptionedImages,
        rows: Sequence[int],
        low_resolution: LowResolutionConfig | None = None,
    ) -> None:
        if len(rows) != len(tokens):
            raise InputError(f"there are tokens of {len(tokens)} pictures, and {len(rows)} pictures: remove the token cache")
        self.tokens, self.dataset, self.rows, self.low_resolution = tokens, dataset, rows, low_resolution

    def __len__(self) -> int:
        return len(self.tokens)

    def epoch_order(self, seed: int, epoch: int, batch: int) -> np.ndarray | None:
        """As of the pictures: those of shards are read by ranges, nearly in order."""
        return self.dataset.epoch_order(seed, epoch, batch, self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        # Plain numbers, not draws: the crop is to be the one that was encoded. The caption is the one drawn.
        examples = self.dataset.fetch([self.rows[int(index)] for index in indices])
        return [self._joined(index, example) for index, example in zip(indices, examples, strict=True)]

    def _joined(self, index: int, example: Example | None) -> dict[str, Any]:
        item = self.tokens[index]
        if example is None or example.key != item["key"]:
            now = "cannot be read" if example is None else f"is {example.key!r}"
            raise InputError(
                f"picture {int(index)} {now} now, and its tokens are of {item['key']!r}: the data have changed; "
                "remove the token cache and train anew"
            )
        item["image"] = torch.from_numpy(example.image.copy())  # (S, S, 3)
        if self.low_resolution is not None:
            epoch = index.epoch if isinstance(index, Draw) else 0
            item["small"] = small_picture(example.image, self.low_resolution, int(index), epoch)
        return item


def small_picture(image: np.ndarray, config: LowResolutionConfig, index: int, epoch: int = 0) -> torch.Tensor:
    """``image`` (S, S, 3) uint8 as a super-resolution model is given it: (s, s, 3) uint8."""
    small = degrade(image, config.scale, seed=config.seed, epoch=epoch, index=index, strength=config.strength)
    return torch.from_numpy(small.copy())


def collate_tokens_and_pictures(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """:func:`collate_tokens` with ``images`` (B, S, S, 3) and, where items have it, ``small`` (B, s, s, 3), both uint8."""
    batch = {**collate_tokens(items), "images": torch.stack([item["image"] for item in items])}
    return {**batch, "small": torch.stack([item["small"] for item in items])} if "small" in items[0] else batch
