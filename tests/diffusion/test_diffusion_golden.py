"""The peers' published numbers: DiT's diffusion package, and SiT's ODE samplers over 1-D tokens."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from textok_fast.diffusion import (
    FlowMatching,
    GaussianDiffusion,
    ddim_step,
    guided,
    run_program,
    sample_ddim,
    sample_ddpm,
    sample_euler,
    sample_heun,
    sampler_program,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def dit() -> dict[str, Tensor]:
    return load_file(GOLDEN / "gaussian_diffusion.safetensors")


@pytest.fixture(scope="module")
def sit() -> dict[str, Tensor]:
    return load_file(GOLDEN / "sit_1d.safetensors")


def linear_model(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat((0.3 * x, torch.zeros_like(x)), 1)


@pytest.mark.parametrize("respacing", ["1000", "250", "50", "ddim50"])
def test_tables(dit: dict[str, Tensor], respacing: str) -> None:
    diffusion = GaussianDiffusion(respacing=respacing)
    assert diffusion.timestep_map.tolist() == dit[f"{respacing}.timestep_map"].tolist()
    for name in ("alphas_cumprod", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"):
        table = getattr(diffusion, name)
        assert table.dtype == np.float64
        np.testing.assert_allclose(table, dit[f"{respacing}.{name}"].numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("index", [0, 1, 25, 49])
def test_one_reverse_step(dit: dict[str, Tensor], index: int) -> None:
    diffusion = GaussianDiffusion(respacing="50")
    x, output = dit["pmv.x"], dit["pmv.model_output"]
    for t in (index, torch.full((2,), index)):
        step = diffusion.mean_variance(output, x, t)
        for field, name in zip(step._fields, ("mean", "variance", "log_variance", "pred_xstart"), strict=True):
            torch.testing.assert_close(getattr(step, field), dit[f"pmv.{index}.{name}"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ddim_step(diffusion, output, x, index), dit[f"ddim.{index}.sample"], rtol=0, atol=1e-5)


def test_whole_ddim_loop(dit: dict[str, Tensor]) -> None:
    result = sample_ddim(GaussianDiffusion(respacing="50"), linear_model, dit["ddim_loop.noise"])
    torch.testing.assert_close(result, dit["ddim_loop.sample"], rtol=1e-5, atol=1e-5)


def test_whole_ddpm_loop_with_recorded_noise(dit: dict[str, Tensor]) -> None:
    result = sample_ddpm(
        GaussianDiffusion(respacing="50"), linear_model, dit["ddim_loop.noise"], step_noise=dit["ddpm_loop.step_noise"]
    )
    torch.testing.assert_close(result, dit["ddpm_loop.sample"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_whole_loops_from_their_programs(dit: dict[str, Tensor], name: str) -> None:
    program = sampler_program(GaussianDiffusion(), name, steps=50)
    result = run_program(program, linear_model, dit["ddim_loop.noise"], step_noise=dit["ddpm_loop.step_noise"])
    torch.testing.assert_close(result, dit[f"{name}_loop.sample"], rtol=1e-5, atol=1e-5)


def test_training_terms(dit: dict[str, Tensor]) -> None:
    diffusion = GaussianDiffusion()
    x0, noise, t = dit["train.x0"], dit["train.noise"], dit["train.t"]
    torch.testing.assert_close(diffusion.add_noise(x0, noise, t), dit["train.x_t"], rtol=0, atol=1e-6)

    def model(x: Tensor, times: Tensor) -> Tensor:
        torch.testing.assert_close(x, dit["train.x_t"])
        assert times.tolist() == [10, 700]
        return dit["train.model_output"]

    losses = diffusion.training_losses(model, x0, t, noise)
    for name in ("loss", "mse", "vb"):
        torch.testing.assert_close(losses[name], dit[f"train.{name}"], rtol=1e-5, atol=1e-6)


class ReferenceSiT:
    """SiT over 1-D tokens written from the paper for this test only: 2 adaLN-Zero blocks, width 32, 4 heads."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.w = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
        self.batches: list[tuple[float, int]] = []  # (t, batch) of every evaluation

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def modulated(self, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(h, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.batches.append((t[0].item(), x.shape[0]))
        h = self.linear("x_embedder", x) + self.w["pos_embed"]  # (B, N, D)
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)  # (B, 128)
        embedded = torch.cat((angles.cos(), angles.sin()), -1)  # (B, 256)
        c = self.linear("t_embedder.mlp.2", F.silu(self.linear("t_embedder.mlp.0", embedded)))  # (B, D)
        c = F.silu(c + self.w["y_embedder.embedding_table.weight"][y])  # (B, D)
        for block in ("blocks.0", "blocks.1"):
            shift1, scale1, gate1, shift2, scale2, gate2 = self.linear(f"{block}.adaLN_modulation.1", c).chunk(6, -1)
            qkv = self.linear(f"{block}.attn.qkv", self.modulated(h, shift1, scale1))  # (B, N, 3D)
            q, k, v = qkv.unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)  # 3 x (B, 4, N, 8)
            attended = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v  # (B, 4, N, 8)
            h = h + gate1[:, None] * self.linear(f"{block}.attn.proj", attended.transpose(1, 2).flatten(2))
            hidden = self.linear(f"{block}.mlp.fc1", self.modulated(h, shift2, scale2))  # (B, N, 4D)
            h = h + gate2[:, None] * self.linear(f"{block}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
        shift, scale = self.linear("final_layer.adaLN_modulation.1", c).chunk(2, -1)
        return self.linear("final_layer.linear", self.modulated(h, shift, scale))  # (B, N, d)


def test_reference_sit_is_the_peers(sit: dict[str, Tensor]) -> None:
    out = ReferenceSiT(sit)(sit["io.x"], sit["io.t"], sit["io.y"])
    torch.testing.assert_close(out, sit["io.out"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "scale", "interval", "evaluations"),
    [
        ("euler", 1.0, None, [2] * 8),
        ("heun", 1.0, None, [2] * 15),
        ("euler_cfg", 2.0, None, [4] * 8),
        # The recorded run is reproduced by guiding t = 0.625 down to 0.125, and by no other set of the eight steps, so
        # its bounds lie in low <= 0.125 and 0.625 <= high < 0.75.
        ("euler_cfg_interval", 2.0, (0.0, 0.7), [2] * 3 + [4] * 5),
    ],
)
def test_sit_samplers(
    sit: dict[str, Tensor], name: str, scale: float, interval: tuple[float, float] | None, evaluations: list[int]
) -> None:
    reference = ReferenceSiT(sit)
    y = sit["io.sampler.y"]
    model = guided(reference, y, torch.full_like(y, 1000), scale, interval)
    sampler = sample_heun if name == "heun" else sample_euler
    result = sampler(model, sit["io.sampler.z"], 8)
    torch.testing.assert_close(result.double(), sit[f"io.sampler.{name}"], rtol=0, atol=1e-6)
    assert [batch for _, batch in reference.batches] == evaluations
    # The same from the sampler's numbers, with the state in float32.
    program = sampler_program(FlowMatching(), name.split("_")[0], scale, interval, steps=8)
    assert program.guided == tuple(batch == 4 for batch in evaluations)
    found = run_program(program, model, sit["io.sampler.z"])
    torch.testing.assert_close(found.double(), sit[f"io.sampler.{name}"], rtol=0, atol=1e-5)


def test_the_interval_is_identified(sit: dict[str, Tensor]) -> None:
    """One guided step more or less misses the recorded run by far more than the tolerance above."""
    y, z = sit["io.sampler.y"], sit["io.sampler.z"]
    for interval in ((0.0, 0.75), (0.0, 0.6), (0.2, 0.7)):
        model = guided(ReferenceSiT(sit), y, torch.full_like(y, 1000), 2.0, interval)
        error = (sample_euler(model, z, 8).double() - sit["io.sampler.euler_cfg_interval"]).abs().max()
        assert error > 1e-4
