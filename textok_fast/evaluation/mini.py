"""What the weights in the box do, in seconds: with a caption, without, with an edited one, and from a caption alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from textok_fast.data import CaptionedImages, collate
from textok_fast.data.scenes import PLACES
from textok_fast.inference import SamplingOptions, load_pipeline

MINI = "textok-mini"
# Of Demonstration.pictures, in their order, with what they are called.
ROWS = {
    "original": "original",
    "with": "with its caption",
    "without": "without a caption",
    "edited": "the same tokens, caption edited",
    "generated": "generated from the caption",
}


@dataclass
class Demonstration:
    """``pictures``: (B, S, S, 3) uint8 for each of :data:`ROWS`; ``edited``: the captions with another first object."""

    captions: list[str]
    edited: list[str]
    pictures: dict[str, np.ndarray]


def demonstrate(scenes: CaptionedImages, count: int = 8) -> Demonstration:
    """:data:`MINI` on the first ``count`` of ``scenes``, whose captions are those of :mod:`textok_fast.data.scenes`."""
    pipe = load_pipeline(MINI)
    tokenizer = pipe.tokenizer
    batch = collate([scenes[index] for index in range(count)])
    images, captions = batch["images"], batch["captions"]
    edited = [_edit(caption, scenes.label_names, index) for index, caption in enumerate(captions)]
    tokens = tokenizer.encode(images, captions)
    rows = {
        "original": images,
        "with": tokenizer.decode(tokens, captions, output="uint8"),
        "without": tokenizer.decode(tokenizer.encode(images, None), None, output="uint8"),
        "edited": tokenizer.decode(tokens, edited, output="uint8"),
        "generated": pipe(captions, seed=0, options=SamplingOptions(steps=50, guidance_scale=2.0)).images,
    }
    return Demonstration(captions, edited, {name: torch.as_tensor(row).cpu().numpy() for name, row in rows.items()})


def _edit(caption: str, names: list[str], index: int) -> str:
    """Another object in the place of the first."""
    first, *rest = caption.split("; ")
    place = next(place for place in PLACES if first.endswith(place))
    others = [name for name in names if name != first.removesuffix(f" {place}")]
    return "; ".join([f"{others[(7 * index + 3) % len(others)]} {place}", *rest])
