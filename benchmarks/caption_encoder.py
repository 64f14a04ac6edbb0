"""Which default text encoder: frozen MiniLM features, or words embedded by a table trained with the tokenizer?

The demo's tokenizer is trained twice from the same seed on the same batches, once with each, and both reconstruct the held-out
compositions and the held-out objects. The table has one row for each word of the training captions and one for unknown words,
plus the positions of the word in its clause and of the clause in the caption; everything else is the same.

``python benchmarks/caption_encoder.py --out FILE.json``
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from textok_fast.config import TokenizerTrainConfig, load_config
from textok_fast.data import CaptionedImages, collate, load_dataset
from textok_fast.evaluation import machine_info, reconstruction_metrics
from textok_fast.files import write_atomically
from textok_fast.modeling import TextFeatures, TexTok
from textok_fast.modeling.layers import drop_captions
from textok_fast.modeling.tokenizer import from_uint8, to_uint8
from textok_fast.training.loop import StepBatches, StepRandom
from textok_fast.training.losses import tokenizer_loss
from textok_fast.training.optim import ExponentialMovingAverage, build_optimizers, learning_rate
from textok_fast.training.tokenizer import TokenizerTask

POSITIONS, CLAUSES = 16, 8  # words a clause, clauses a caption


class TrainedWords(nn.Module):
    """Captions -> (B, N_t, D_t): word embedding + its position in the clause + the clause's position in the caption."""

    def __init__(self, words: list[str], dim: int) -> None:
        super().__init__()
        self.index = {word: i + 1 for i, word in enumerate(words)}  # 0: a word that training did not have
        self.words = nn.Embedding(len(words) + 1, dim)
        self.positions = nn.Embedding(POSITIONS, dim)
        self.clauses = nn.Embedding(CLAUSES, dim)  # what belongs together: MiniLM's features know it from their context

    def forward(self, captions: list[str]) -> TextFeatures:
        rows = [
            [
                (self.index.get(word, 0), min(i, POSITIONS - 1), min(c, CLAUSES - 1))
                for c, clause in enumerate(caption.split("; "))
                for i, word in enumerate(clause.split())
            ]
            for caption in captions
        ]
        length = max(map(len, rows))
        ids = torch.zeros(len(rows), length, 3, dtype=torch.int64)  # (B, N_t, 3)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)  # (B, N_t)
        for row, triples in enumerate(rows):
            ids[row, : len(triples)] = torch.tensor(triples)
            mask[row, : len(triples)] = True
        word, position, clause = ids.unbind(-1)  # each (B, N_t)
        return TextFeatures(self.words(word) + self.positions(position) + self.clauses(clause), mask)


class Both(nn.Module):
    """The tokenizer and, if it is trained, the table: one set of parameters for the optimizer and the average."""

    def __init__(self, tokenizer: TexTok, table: TrainedWords | None) -> None:
        super().__init__()
        self.tokenizer, self.table = tokenizer, table


@torch.no_grad()
def evaluate(model: Both, frozen: Any, dataset: CaptionedImages, count: int) -> dict[str, dict[str, float]]:
    """PSNR and SSIM with the pictures' own captions and with shuffled ones."""
    pictures: dict[str, list[Tensor]] = {"original": [], "own": [], "shuffled": []}
    for start in range(0, count, 64):
        batch = collate([dataset[i] for i in range(start, start + 64)])
        pixels, own = from_uint8(batch["images"]), batch["captions"]
        pictures["original"].append(batch["images"])
        for name, captions in {"own": own, "shuffled": own[1:] + own[:1]}.items():
            text = frozen(captions) if model.table is None else model.table(captions)
            pictures[name].append(to_uint8(model.tokenizer(pixels, text).reconstruction))
    joined = {name: torch.cat(parts) for name, parts in pictures.items()}
    return {name: reconstruction_metrics(joined["original"], joined[name]) for name in ("own", "shuffled")}


def train(kind: str, config: TokenizerTrainConfig, count: int) -> dict[str, Any]:
    torch.manual_seed(config.run.seed)
    task = TokenizerTask(config)
    table = None
    if kind == "trained words":
        captions = (task.dataset[i].caption for i in range(20_000))
        table = TrainedWords(
            sorted({word for caption in captions for word in caption.replace(";", "").split()}), config.model.text_dim
        )
    model = Both(task.model, table).train()
    optimizers, ema = build_optimizers(model, config.optim), ExponentialMovingAverage(model, config.optim.ema_decay)
    steps, size, device = config.run.steps, config.run.batch_size, torch.device("cpu")
    start = time.process_time()
    for step, indices in enumerate(StepBatches(len(task.dataset), size, config.run.seed, 0, steps, 0, 1)):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, steps, config.optim)
        batch, rng = collate([task.dataset[i] for i in indices]), StepRandom(config.run.seed, step, 0, 0, 1, device)
        text = task.text(batch["captions"], device) if table is None else table(batch["captions"])
        assert text is not None
        text = drop_captions(text, rng.uniform(size) < config.caption_dropout)
        pixels = from_uint8(batch["images"])
        loss = tokenizer_loss(task.model(pixels, text), pixels, config.loss)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update(model, step)
        if step % 50 == 49:
            print(f"{kind}: step {step + 1}, loss {loss.item():.4f}", file=sys.stderr, flush=True)
    seconds = time.process_time() - start
    ema.copy_to(model)
    model.eval()
    found = {
        split: evaluate(model, task.encoder, load_dataset(config.data, split), count) for split in ("composition", "object")
    }
    return {"encoder": kind, "processor_seconds": seconds, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=512, help="held-out pictures a split")
    parser.add_argument("--encoder", nargs="+", default=["minilm", "trained words"], choices=["minilm", "trained words"])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of `train tokenizer --recipe demo`")
    args = parser.parse_args()
    config = load_config(TokenizerTrainConfig, "demo", overrides=args.overrides)
    rows = [train(kind, config, args.count) for kind in args.encoder]
    result = {"command": shlex.join(["python", *sys.argv]), "machine": machine_info(), "steps": config.run.steps, "rows": rows}
    write_atomically(args.out, lambda path: path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))
    for row in rows:
        for split in ("composition", "object"):
            own, shuffled = (row[split][name]["psnr"] for name in ("own", "shuffled"))
            print(f"{row['encoder']:<14} {split:<12} {own:6.2f} dB, captions shuffled {shuffled:6.2f} dB")


if __name__ == "__main__":
    main()
