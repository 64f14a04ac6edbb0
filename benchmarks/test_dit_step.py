"""One denoising step of the DiT: ``pytest benchmarks/test_dit_step.py``, with and without our operations, to follow from commit
to commit. The headline ratio, with its spread and the machine's ceilings, is ``textok-fast bench steps``, that of whole systems
``textok-fast bench speedup``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from alternating import Contender, Work, compare

from textok_fast.evaluation.roofline import resolve_device, torch_dtype
from textok_fast.evaluation.step_times import StepTimesConfig, build_networks, step_flops, step_inputs

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of a whole step


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [32, 256])
@pytest.mark.parametrize("size", ["tiny", "S"])
def test_dit_step(benchmark: Any, size: str, tokens: int, dtype: str, batch: int) -> None:
    device = resolve_device("auto")
    network = build_networks(StepTimesConfig(size=size, tokens=(tokens,)), device, torch_dtype(dtype))[tokens]
    inputs = step_inputs(network.config, batch, device, torch_dtype(dtype))

    def step() -> torch.Tensor:
        out = network.model(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return out

    benchmark.extra_info.update(network=network.name, gflop=step_flops(size, tokens, batch) / 1e9, device=str(device))
    with torch.inference_mode():
        out = benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dit_xl_step_with_and_without_operations(
    benchmark: Any, device: torch.device, rounds: int, smoke: bool, dtype: str, batch: int
) -> None:
    """DiT-XL over 32 tokens: every operation its reference (``eager``) against what is chosen. ``triton`` and ``native``: these
    wherever an operation has them. Batch 2 is one sample with guidance. The bytes are the weights', read once a step."""
    size, tokens = "tiny" if smoke else "XL", 32
    kind = torch_dtype(dtype)
    network = build_networks(StepTimesConfig(size=size, tokens=(tokens,)), device, kind)[tokens]
    inputs = step_inputs(network.config, batch, device, kind)
    contenders = {"eager": Contender(network.model, {"*": "reference"})}
    if device.type == "cuda":
        contenders |= {name: Contender(network.model, {"*": name}) for name in ("native", "triton")}
    contenders["chosen"] = Contender(network.model)
    tables = sum(m.weight.numel() for m in network.model.modules() if isinstance(m, torch.nn.Embedding))
    weights = sum(p.numel() for p in network.model.parameters()) - tables
    work = Work(bytes=weights * kind.itemsize, flops=step_flops(size, tokens, batch))
    measured = compare(contenders, [inputs], device=device, dtype=dtype, work=work, rounds=rounds, tolerance=TOLERANCE[dtype])
    case = {"operation": "DiT step", "shape": {"network": network.name, "B": batch, "N": tokens}, "dtype": dtype}
    benchmark.extra_info.update(case, device=device.type, inputs="memory", bytes=work.bytes, flops=work.flops, **measured)

    def step() -> torch.Tensor:
        out = network.model(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return out

    with torch.inference_mode():
        benchmark.pedantic(step, rounds=rounds, warmup_rounds=1)
