"""Reconstruction by trained tokenizers on scenes that training never saw: own, shuffled and no captions.

``python benchmarks/reconstruction.py runs/a/final runs/b/final --out FILE.json data.objects=1600 data.held_out_objects=200``
The settings are those of ``textok-fast train tokenizer --recipe demo``; give the ones the tokenizers were trained with.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor

from textok_fast.config import TokenizerTrainConfig, load_config
from textok_fast.data import CaptionedImages, collate, load_dataset
from textok_fast.evaluation import machine_info, reconstruction_metrics
from textok_fast.files import write_atomically
from textok_fast.modeling import TexTok


def evaluate(tokenizer: TexTok, dataset: CaptionedImages, count: int) -> dict[str, dict[str, float]]:
    """PSNR and SSIM of ``count`` pictures under each kind of caption."""
    original: list[Tensor] = []
    decoded: dict[str, list[Tensor]] = {"own": [], "shuffled": [], "null": []}
    for start in range(0, count, 64):
        batch = collate([dataset[i] for i in range(start, min(start + 64, count))])
        images, own = batch["images"], batch["captions"]
        original.append(images)
        for name, captions in {"own": own, "shuffled": own[1:] + own[:1], "null": None}.items():
            decoded[name].append(tokenizer.decode(tokenizer.encode(images, captions), captions, output="uint8"))
    return {name: reconstruction_metrics(torch.cat(original), torch.cat(parts)) for name, parts in decoded.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+", help="directories that `train tokenizer` wrote, then key=value settings")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=512, help="pictures of each split")
    args = parser.parse_args()
    directories = [item for item in args.tokenizers if "=" not in item]
    config = load_config(TokenizerTrainConfig, "demo", overrides=[item for item in args.tokenizers if "=" in item])
    rows = []
    for directory in directories:
        tokenizer = TexTok.from_pretrained(directory)
        for split in ("composition", "object"):
            found = evaluate(tokenizer, load_dataset(config.data, split), args.count)
            rows.append({"tokenizer": directory, "text": tokenizer.config.text, "split": split, **found})
            print(f"{directory} {split}: " + ", ".join(f"{name} {row['psnr']:.2f} dB" for name, row in found.items()))
    result = {"command": shlex.join(["python", *sys.argv]), "machine": machine_info(), "rows": rows}
    write_atomically(args.out, lambda path: path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
