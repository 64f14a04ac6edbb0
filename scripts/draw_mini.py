"""Draws docs/mini.png with textok-mini: pictures, reconstructions with, without and with an edited caption, and samples.

python scripts/draw_mini.py [docs/mini.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from textok_fast.config import TokenizerTrainConfig, load_config
from textok_fast.data import collate, load_dataset
from textok_fast.data.scenes import PLACES
from textok_fast.inference import SamplingOptions, load_pipeline
from textok_fast.pictures import image_grid

COLUMNS = 8


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/mini.png")
    pipe = load_pipeline("textok-mini")
    tok = pipe.tokenizer
    dataset = load_dataset(load_config(TokenizerTrainConfig, "textok-mini").data, "composition")
    batch = collate([dataset[index] for index in range(COLUMNS)])
    images, captions = batch["images"], batch["captions"]
    edited = [_edit(caption, dataset.label_names, index) for index, caption in enumerate(captions)]
    tokens = tok.encode(images, captions)
    rows = [
        images,
        tok.decode(tokens, captions, output="uint8"),
        tok.decode(tok.encode(images, None), None, output="uint8"),
        tok.decode(tokens, edited, output="uint8"),
        pipe(captions, seed=0, options=SamplingOptions(steps=50, guidance_scale=2.0)).images,
    ]
    image_grid(torch.cat([torch.as_tensor(row) for row in rows]), columns=COLUMNS).save(out)
    print(
        f"wrote {out}. Rows: originals; with caption; no caption; the same tokens, caption edited; generated from the caption"
    )
    for caption, other in zip(captions, edited, strict=True):
        print(f"  {caption}  ->  {other.split('; ')[0]}")


def _edit(caption: str, names: list[str], index: int) -> str:
    """Another object in the place of the first."""
    first, *rest = caption.split("; ")
    place = next(place for place in PLACES if first.endswith(place))
    return "; ".join([f"{names[(7 * index + 3) % len(names)]} {place}", *rest])


if __name__ == "__main__":
    main()
