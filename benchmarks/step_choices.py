"""Which backend of an operation makes a whole DiT step fastest: the engine's captured step, one choice changed at a time.

    python benchmarks/step_choices.py --size XL --tokens 32 --batch 1 8 64 --precision bf16 fp8 --out choices.json

All choices of one batch and precision are built first and take turns, round after round. Needs a CUDA device; ``--device cpu``
shows that it runs (without graphs).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from textok_fast.diffusion import build_process
from textok_fast.evaluation.provenance import provenance
from textok_fast.evaluation.speedup import time_advances
from textok_fast.evaluation.step_times import StepTimesConfig, build_networks, step_inputs
from textok_fast.inference import Engine, Plan

CHOICES: dict[str, dict[str, dict[str, str]]] = {
    "bf16": {
        "chosen": {},
        "linear_gelu=cublaslt": {"linear_gelu": "cublaslt"},
        "linear_gelu=reference": {"linear_gelu": "reference"},
        "linear_gelu=triton": {"linear_gelu": "triton"},
        "attention=sdpa": {"attention": "sdpa"},
        "attention=triton": {"attention": "triton"},
        "norm=triton": {"layer_norm_modulate": "triton", "gated_residual_layer_norm_modulate": "triton"},
    },
    "fp8": {
        "chosen": {},
        "fp8_linear=scaled_mm": {"fp8_linear": "scaled_mm", "fp8_linear_fp8": "scaled_mm"},
        "fp8_linear=triton": {"fp8_linear": "triton", "fp8_linear_fp8": "triton"},
        "fc1=scaled_mm": {"fp8_linear_fp8": "scaled_mm"},
        "fc1=triton": {"fp8_linear_fp8": "triton"},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="XL")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp8"], choices=list(CHOICES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.02, help="of steps in a sample")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for precision in args.precision:
            config = StepTimesConfig(size=args.size, tokens=(args.tokens,))
            model = build_networks(config, device, torch.bfloat16)[args.tokens].model
            for batch in args.batch:
                rows += measure(model, Plan.automatic(device, precision, batch), batch, precision, args)
    result = {**provenance(), "benchmark": "step_choices", "size": args.size, "tokens": args.tokens, "rows": rows}
    for row in rows:
        milliseconds = f"{row['ms']:.4f} ms" if "ms" in row else row["why"]
        print(f"{row['precision']:>5} batch {row['batch']:<4} {row['choice']:<24} {milliseconds}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(model: Any, plan: Plan, batch: int, precision: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds a step with a guidance pair, modulation ahead and the sampler's update included, by choice."""
    process = build_process("gaussian", model.config.learn_sigma, "epsilon")
    device = plan.torch_device
    labels = step_inputs(model.config, batch, device, torch.float32)[2]
    captured = dataclasses.replace(plan, capture="step" if device.type == "cuda" else "none")
    runs: dict[str, Any] = {}
    failed: dict[str, str] = {}
    began = time.perf_counter()
    for name, operations in CHOICES[precision].items():
        try:
            engine = Engine(model, dataclasses.replace(captured, ops=operations))
            runs[name] = engine.start(
                process, labels=labels, seeds=list(range(batch)), steps=1000, guidance_scale=1.5, sampler="ddpm"
            )
            for _ in range(3):
                runs[name].advance()
        except Exception as error:  # a choice that this GPU does not run is a result
            runs.pop(name, None)
            failed[name] = " ".join(str(error).split())[:200]
    print(f"{precision} batch {batch}: built in {time.perf_counter() - began:.0f} s", flush=True)
    first = next(iter(runs.values()))
    typical = statistics.median(wall for wall, _ in time_advances(first, 5, device))
    count = max(1, min(40, int(args.seconds / typical)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            if run.total - run.done > count:
                samples[name].append(statistics.median(wall for wall, _ in time_advances(run, count, device)))
    made = []
    for name in CHOICES[precision]:
        row: dict[str, Any] = {"precision": precision, "batch": batch, "choice": name, "why": failed.get(name, "")}
        if name in samples:
            row |= {"ms": 1e3 * statistics.median(samples[name]), "rounds_ms": [1e3 * each for each in samples[name]]}
        made.append(row)
    return made


if __name__ == "__main__":
    main()
