"""Draws docs/mini.png with textok-mini, a row for each of textok_fast.evaluation.mini.ROWS: ``python scripts/draw_mini.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from textok_fast.config import TokenizerTrainConfig, load_config
from textok_fast.data import load_dataset
from textok_fast.evaluation.mini import MINI, ROWS, demonstrate
from textok_fast.pictures import image_grid


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/mini.png")
    made = demonstrate(load_dataset(load_config(TokenizerTrainConfig, MINI).data, "composition"))
    pictures = np.concatenate([made.pictures[name] for name in ROWS])
    image_grid(torch.from_numpy(pictures), columns=len(made.captions)).save(out)
    print(f"wrote {out}. Rows: {'; '.join(ROWS.values())}")
    for caption, edited in zip(made.captions, made.edited, strict=True):
        print(f"  {caption}  ->  {edited.split('; ')[0]}")


if __name__ == "__main__":
    main()
