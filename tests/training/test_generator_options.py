"""The generator's training with weights by time, times of other distributions, and alignment."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from textok_fast import InputError, TexTok
from textok_fast.config import AlignmentConfig, DataConfig, DiTConfig, GeneratorTrainConfig, OptimConfig, RunConfig
from textok_fast.diffusion import FlowMatching, GaussianDiffusion
from textok_fast.inference import load_pipeline
from textok_fast.training import train_generator
from textok_fast.training.checkpoints import list_checkpoints
from textok_fast.training.generator import GeneratorTask
from textok_fast.training.loop import StepRandom

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., TexTok], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(text="none").save_pretrained(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random DINOv2 on disk."""
    import transformers

    directory = tmp_path_factory.mktemp("dinov2")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=16, patch_size=8)).save_pretrained(directory)
    return str(directory)


def config_of(tokenizer: Path, out: Path, **changes: Any) -> GeneratorTrainConfig:
    run = {"steps": 30, "batch_size": 8, "log_every": 1, "checkpoint_every": 12, "sample_every": 100, "tensorboard": False}
    sizes = {"num_tokens": 3, "in_channels": 4, "width": 32, "depth": 2, "heads": 2, "learn_sigma": False}
    model = DiTConfig(**{**sizes, "num_classes": 8, **changes.pop("model", {})})
    return GeneratorTrainConfig(
        tokenizer=str(tokenizer),
        model=model,
        data=DataConfig(source="shapes", image_size=16, objects=8, held_out_objects=4, scene_objects=2),
        optim=OptimConfig(lr=1e-2, warmup_steps=2, ema_decay=0.9),
        run=RunConfig(output_dir=str(out), **run),  # type: ignore[arg-type]
        cache_images=64,
        **changes,
    )


def task_of(tokenizer: Path, **changes: Any) -> GeneratorTask:
    return GeneratorTask(config_of(tokenizer, Path("unused"), **changes), TexTok.from_pretrained(tokenizer))


def test_times_and_weights_are_those_of_the_settings(tokenizer: Path) -> None:
    def times(**changes: Any) -> tuple[torch.Tensor, torch.Tensor | None, GeneratorTask]:
        task = task_of(tokenizer, **changes)
        return *task.times(StepRandom(0, 0, 0, 0, 1, CPU), 4000), task

    t, weight, _ = times(objective="flow")
    assert weight is None and float(t.mean()) == pytest.approx(0.5, abs=0.02)
    t, weight, _ = times(objective="flow", times="logit-normal", logit_mean=0.4, logit_std=0.8)
    assert weight is None
    assert (float(t.logit().mean()), float(t.logit().std())) == pytest.approx((0.4, 0.8), abs=0.05)
    t, weight, _ = times(objective="flow", weighting="logit-normal", logit_mean=0.4)
    assert weight is not None and torch.equal(weight, FlowMatching("logit_normal", 0.4).logit_normal_density(t))
    t, weight, task = times(objective="gaussian")
    assert weight is None and t.dtype == torch.int64
    for prediction in ("epsilon", "v", "x0"):
        t, weight, task = times(objective="gaussian", prediction=prediction, weighting="min-snr", min_snr_gamma=3.0)
        assert isinstance(task.process, GaussianDiffusion) and task.process.prediction == prediction
        assert weight is not None and torch.equal(weight, task.process.min_snr_weight(t, 3.0))


def test_the_loss_is_weighted(tokenizer: Path) -> None:
    batch = {"tokens": torch.randn(32, 3, 4), "labels": torch.zeros(32, dtype=torch.int64)}
    for changes in ({"objective": "gaussian", "weighting": "min-snr"}, {"objective": "flow", "weighting": "logit-normal"}):
        task = task_of(tokenizer, **changes)
        rng = StepRandom(3, 0, 0, 0, 1, CPU)
        terms = task.loss(lambda x, t, y, text: torch.zeros_like(x), batch, rng)  # type: ignore[arg-type]
        assert terms["loss"] != terms["mse"]
        assert set(terms) == {"loss", "mse", *(["vb"] if changes["objective"] == "gaussian" else [])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "flow", "weighting": "min-snr"}, "weighting=min-snr is for objective=gaussian"),
        ({"objective": "gaussian", "times": "logit-normal"}, "are for objective=flow"),
        ({"objective": "gaussian", "weighting": "logit-normal"}, "are for objective=flow"),
        ({"objective": "flow", "times": "logit-normal", "weighting": "logit-normal"}, "choose one"),
        ({"objective": "flow", "logit_std": 0.0}, "logit_std must be above 0"),
        ({"objective": "flow", "alignment": AlignmentConfig(encoder="x", block=3)}, "behind the model's 2 blocks"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_of(tmp_path, tmp_path, **changes)


def test_an_aligned_run_learns_the_features_resumes_and_leaves_a_plain_generator(
    tokenizer: Path, vision: str, tmp_path: Path
) -> None:
    alignment = AlignmentConfig(encoder=vision, block=1, width=32)
    config = config_of(tokenizer, tmp_path / "run", objective="flow", alignment=alignment)
    result = train_generator(config, progress=False)
    told = [line["alignment"] for line in result.history]
    assert sum(told[-5:]) / 5 < sum(told[:5]) / 5 - 0.1  # nearer to the frozen features
    assert list_checkpoints(result.run)[0].exists()
    pipeline = load_pipeline(result.final)
    assert pipeline.generator.config == config.model
    final = load_file(result.final / "generator" / "model.safetensors")
    assert not [key for key in final if "head" in key]
    # Stopped after 24 steps and continued: the same run, the projection's weights among them.
    shutil.copytree(result.run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "final")
    shutil.rmtree(list_checkpoints(tmp_path / "again")[-1])
    again = dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(tmp_path / "again")))
    continued = train_generator(again, resume=True, progress=False)
    found = load_file(continued.final / "generator" / "model.safetensors")
    assert all(torch.equal(found[key], final[key]) for key in final)
    assert continued.history[-1]["alignment"] == told[-1]
    # Recomputed in the backward pass the run is the same, and what is saved are its averages again.
    config = config_of(tokenizer, tmp_path / "lean", objective="flow", alignment=alignment)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, activation_checkpointing=True))
    lean = load_file(train_generator(config, progress=False).final / "generator" / "model.safetensors")
    for key in final:
        torch.testing.assert_close(lean[key], final[key], rtol=1e-4, atol=1e-5)
    # Without alignment the same seed gives another generator: the projection's gradient had reached it.
    plain = config_of(tokenizer, tmp_path / "plain", objective="flow")
    other = load_file(train_generator(plain, progress=False).final / "generator" / "model.safetensors")
    assert other.keys() == final.keys() and not torch.equal(other["x_embedder.weight"], final["x_embedder.weight"])
