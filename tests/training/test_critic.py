"""The loop's part of training a critic against a model, on a model of one number a channel."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from textok_fast import InputError
from textok_fast.config import AdamConfig, TokenizerTrainConfig
from textok_fast.training.checkpoints import list_checkpoints
from textok_fast.training.loop import StepRandom, TrainResult, fit

TrainConfig = Callable[..., TokenizerTrainConfig]


class MeanCritic:
    """Tells 3 channels of data from the model's by a linear map; counts the steps in a buffer."""

    def __init__(self, start: int) -> None:
        self.model = nn.Linear(3, 1)
        self.model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.optim = AdamConfig(lr=0.05, warmup_steps=3, weight_decay=0.0)
        self.start = start
        self.pair: tuple[Tensor, Tensor] | None = None
        self.seen: list[int] = []

    def loss(self, model: nn.Module, rng: StepRandom) -> dict[str, Tensor]:
        assert self.pair is not None
        self.seen.append(rng.step)
        real, fake = self.pair
        difference = model(fake).mean() - model(real).mean()
        return {"loss": difference, "square": difference.detach().square()}

    def end_step(self) -> None:
        self.model.steps += 1


class ShiftTask:
    """An affine map of the data, led by what the critic says alone."""

    def __init__(self, start: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 3, bias=True)
        self.critic = MeanCritic(start)

    def loss(self, model: nn.Module, batch: dict[str, Any], rng: StepRandom) -> dict[str, Tensor]:
        fake = model(batch["x"])
        self.critic.pair = batch["x"], fake.detach()
        if rng.step < self.critic.start:
            return {"loss": fake.square().mean()}
        weight = self.critic.model.weight.detach()
        return {"loss": -(fake @ weight.T).mean()}

    def preview(self, rng: StepRandom) -> Image.Image | None:
        return None

    def finish(self, directory: Path) -> None:
        torch.save(self.model.state_dict(), directory / "model.pt")


DATA = torch.randn(64, 3, generator=torch.Generator().manual_seed(1)) + torch.tensor([1.0, -2.0, 0.5])


def train(config: TokenizerTrainConfig, start: int = 2, resume: bool = False) -> tuple[ShiftTask, TrainResult]:
    task = ShiftTask(start)
    result = fit(
        task,
        DATA,  # type: ignore[arg-type]
        lambda rows: {"x": torch.stack(rows)},
        config,
        content={},
        resume=resume,
        progress=False,
    )
    return task, result


def test_the_critic_begins_at_its_step_with_its_own_rate_and_is_logged(train_config: TrainConfig, tmp_path: Path) -> None:
    task, result = train(train_config(tmp_path, {"steps": 6}), start=3)
    assert task.critic.seen == [3, 4, 5]
    assert int(task.critic.model.steps) == 3
    assert ["critic_loss" in line for line in result.history] == [False] * 3 + [True] * 3
    assert result.history[-1]["critic_square"] == pytest.approx(result.history[-1]["critic_loss"] ** 2, rel=1e-5)
    moments = torch.load(list_checkpoints(tmp_path)[-1] / "critic_optimizer.pt", weights_only=True)
    (group,) = moments[0]["param_groups"][:1]
    assert group["lr"] == pytest.approx(0.05)  # its warm-up of three steps ends here
    assert torch.stack([state["step"] for state in moments[0]["state"].values()]).tolist() == [3, 3]


def test_model_and_critic_change_in_turn(train_config: TrainConfig, tmp_path: Path) -> None:
    """One step by hand: AdamW's first step is lr x sign(gradient)."""
    config = train_config(tmp_path, {"steps": 1})
    config.optim.warmup_steps = config.optim.weight_decay = 0
    before = ShiftTask(0)
    task, result = train(config, start=0)
    assert result.history[0]["loss"] != 0
    fake, real = task.critic.pair[1], task.critic.pair[0]  # type: ignore[index]
    gradient = fake.mean(0) - real.mean(0)  # of the critic's loss in its weight
    moved = task.critic.model.weight - before.critic.model.weight
    torch.testing.assert_close(moved, -0.05 / 3 * gradient.sign()[None], atol=1e-5, rtol=0)
    pull = -before.critic.model.weight[0]  # of the model's loss in its bias, by the critic as it was before its step
    torch.testing.assert_close(
        load_file(list_checkpoints(tmp_path)[-1] / "model.safetensors")["bias"] - before.model.bias,
        -config.optim.lr * pull.sign(),
        atol=1e-5,
        rtol=0,
    )


def test_a_run_with_a_critic_resumes_bit_for_bit(train_config: TrainConfig, tmp_path: Path) -> None:
    run = {"steps": 9, "gradient_accumulation": 2, "keep_checkpoints": 9}
    _, whole = train(train_config(tmp_path / "whole", run))
    for name in ("checkpoint-000003", "checkpoint-000006"):
        shutil.copytree(tmp_path / "whole" / name, tmp_path / name / name)
        _, resumed = train(train_config(tmp_path / name, run), resume=True)
        last = ["checkpoint-000009/critic.safetensors", "checkpoint-000009/model.safetensors"]
        for file in last:
            found, wanted = load_file(resumed.run / file), load_file(whole.run / file)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        optimizers = [torch.load(r.run / "checkpoint-000009/critic_optimizer.pt", weights_only=True) for r in (resumed, whole)]
        for a, b in zip(*(list(o[0]["state"].values()) for o in optimizers), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in b)


def test_accumulated_micro_batches_are_one_batch(train_config: TrainConfig, tmp_path: Path) -> None:
    tasks = []
    for parts in (1, 2):
        run = {"steps": 4, "batch_size": 8, "gradient_accumulation": parts}
        tasks.append(train(train_config(tmp_path / str(parts), run))[0])
    assert [task.critic.seen for task in tasks] == [[2, 3], [2, 2, 3, 3]]
    assert [int(task.critic.model.steps) for task in tasks] == [2, 2]
    torch.testing.assert_close(tasks[0].critic.model.weight, tasks[1].critic.model.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(tasks[0].model.weight, tasks[1].model.weight, atol=1e-5, rtol=0)


def test_a_checkpoint_without_its_critic_is_refused(train_config: TrainConfig, tmp_path: Path) -> None:
    run = {"steps": 4}
    train(train_config(tmp_path, run))
    shutil.rmtree(tmp_path / "final")
    (list_checkpoints(tmp_path)[-1] / "critic.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot read the checkpoint .*critic\.safetensors.*remove it"):
        train(train_config(tmp_path, run), resume=True)
