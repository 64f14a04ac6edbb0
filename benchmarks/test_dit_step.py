"""One denoising step of the reference DiT: ``pytest benchmarks/test_dit_step.py``. The headline ratio, with its spread and the
machine's ceilings, is ``textok-fast bench speedup``; this one follows single steps from commit to commit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from textok_fast.evaluation.roofline import resolve_device, torch_dtype
from textok_fast.evaluation.speedup import SpeedupConfig, build_networks, step_flops, step_inputs


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [32, 256])
@pytest.mark.parametrize("size", ["tiny", "S"])
def test_dit_step(benchmark: Any, size: str, tokens: int, dtype: str, batch: int) -> None:
    device = resolve_device("auto")
    network = build_networks(SpeedupConfig(size=size, tokens=(tokens,)), device, torch_dtype(dtype))[tokens]
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
