"""A tokenizer and its discriminator, trained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from textok_fast import InputError, TexTok
from textok_fast.config import AdamConfig, DiscriminatorConfig, LossConfig, TokenizerTrainConfig, to_dict
from textok_fast.training import train_tokenizer
from textok_fast.training.checkpoints import list_checkpoints

TrainConfig = Callable[..., TokenizerTrainConfig]


@pytest.fixture
def gan_config(train_config: TrainConfig) -> TrainConfig:
    """Keywords: ``loss`` and ``discriminator`` as mappings, and those of ``train_config``."""

    def make(
        output_dir: Path, loss: dict[str, Any] | None = None, discriminator: dict[str, Any] | None = None, **others: Any
    ) -> TokenizerTrainConfig:
        config = train_config(output_dir, **others)
        config.loss = LossConfig(**{"gan": 0.1, **(loss or {})})
        optim = AdamConfig(lr=2e-3, betas=(0.0, 0.99), weight_decay=0.0, warmup_steps=0)
        sizes = {"channel_base": 128, "channel_max": 16, "stddev_group": 2, "optim": optim}
        config.discriminator = DiscriminatorConfig(**{**sizes, **(discriminator or {})})
        return config

    return make


def save_vit(directory: Path, seed: int = 1) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(seed)
    transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **size)).save_pretrained(directory)


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's tensors, of both networks and their optimizers."""
    newest = list_checkpoints(run)[-1]
    found = {}
    for name in ("model", "ema", "critic"):
        found |= {f"{name}.{key}": value for key, value in load_file(newest / f"{name}.safetensors").items()}
    for name in ("optimizer", "critic_optimizer"):
        for i, state in enumerate(torch.load(newest / f"{name}.pt", weights_only=True)):
            found |= {f"{name}.{i}.{k}.{key}": value for k, entry in state["state"].items() for key, value in entry.items()}
    return found


def log(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


EVERYTHING = {"gan_start": 2, "lecam": 0.01, "lecam_decay": 0.7, "r1": 0.1, "r1_interval": 3, "gan_loss": "non-saturating"}


def test_a_run_with_everything_resumes_bit_for_bit(gan_config: TrainConfig, tmp_path: Path) -> None:
    options = {"run": {"steps": 9, "gradient_accumulation": 2, "keep_checkpoints": 9}, "bottleneck": "fsq"}
    loss = {**EVERYTHING, "entropy": 0.1, "entropy_temperature": 0.1}
    whole = train_tokenizer(gan_config(tmp_path / "whole", loss, **options), progress=False)
    for at in (3, 6):
        run = tmp_path / str(at)
        run.mkdir()
        shutil.copytree(whole.run / f"checkpoint-{at:06d}", run / f"checkpoint-{at:06d}")
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole.history[:at]))
        train_tokenizer(gan_config(run, loss, **options), resume=True, progress=False)
        found, wanted = state_of(run), state_of(whole.run)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert log(run) == log(whole.run)
    assert wanted["critic.averages.left"] == pytest.approx(0.7**7)  # a step of two micro-batches is one update
    last = whole.history[-1]
    opposed = {"gan", "gan_weight", "critic_loss", "critic_real", "critic_fake", "critic_lecam", "critic_r1"}
    assert opposed <= set(last)
    assert last["critic_r1"] > 0 and last["critic_lecam"] != 0
    assert not opposed & set(whole.history[1])
    assert whole.history[2]["critic_lecam"] == 0  # no anchors yet


def test_the_discriminator_tells_reconstructions_of_a_model_that_stands_still(gan_config: TrainConfig, tmp_path: Path) -> None:
    config = gan_config(tmp_path, run={"steps": 32, "batch_size": 8})
    config.optim.lr, config.discriminator.optim.lr = 0.0, 0.01
    history = train_tokenizer(config, progress=False).history
    assert history[0]["critic_loss"] == pytest.approx(2.0, abs=0.1)  # a hinge at logits near 0
    assert np.mean([line["critic_loss"] for line in history[-5:]]) < 0.8
    assert history[-1]["critic_real"] > 0.5 > -0.5 > history[-1]["critic_fake"]


def test_the_tokenizer_learns_from_a_discriminator_that_stands_still(gan_config: TrainConfig, tmp_path: Path) -> None:
    """The reconstruction alone, and with the discriminator's opinion: only then its term falls, by far the more."""
    moved = {}
    for name, weight in (("without", 1e-9), ("with", 30.0)):
        loss = {"gan": weight, "gan_adaptive": False}
        optim = AdamConfig(lr=0.0, weight_decay=0.0)
        config = gan_config(tmp_path / name, loss, {"optim": optim}, run={"steps": 12, "batch_size": 8})
        history = train_tokenizer(config, progress=False).history
        moved[name] = history[-1]["gan"] - history[0]["gan"]
    assert moved["with"] < -0.2
    assert abs(moved["without"]) < 0.1


@pytest.mark.parametrize("kind", ["stylegan", "patchgan", "frozen"])
def test_training_with_each_kind_still_lowers_the_reconstruction(gan_config: TrainConfig, tmp_path: Path, kind: str) -> None:
    save_vit(tmp_path / "vit")
    discriminator = {"kind": kind, "channels": 4, "layers": 2, "backbone": str(tmp_path / "vit")}
    config = gan_config(tmp_path / "run", {"lecam": 0.001}, discriminator, run={"steps": 20, "batch_size": 4})
    result = train_tokenizer(config, progress=False)
    l2 = [line["l2"] for line in result.history]
    assert np.mean(l2[-5:]) < 0.8 * np.mean(l2[:2])
    assert all(np.isfinite(line["critic_loss"]) and 0 < line["gan_weight"] <= 1e4 for line in result.history)
    critic = load_file(list_checkpoints(result.run)[-1] / "critic.safetensors")
    assert all("backbone" not in key for key in critic)
    assert not any(key.startswith("critic") for key in load_file(result.final / "model.safetensors"))
    TexTok.from_pretrained(result.final)


def test_anchors_and_terms_do_not_depend_on_how_a_batch_is_cut(gan_config: TrainConfig, tmp_path: Path) -> None:
    runs = []
    for parts in (1, 2):
        run = {"steps": 4, "batch_size": 8 // parts, "gradient_accumulation": parts}
        loss = {"gan_adaptive": False, "lecam": 0.5, "lecam_decay": 0.5, "r1": 1.0, "r1_interval": 2}
        config = gan_config(tmp_path / str(parts), loss, run=run)
        config.optim.lr = config.discriminator.optim.lr = 1e-4
        runs.append(train_tokenizer(config, progress=False))
    critics = [load_file(list_checkpoints(result.run)[-1] / "critic.safetensors") for result in runs]
    for key, value in critics[0].items():
        torch.testing.assert_close(critics[1][key], value, atol=2e-5, rtol=1e-4, msg=key)
    for one, other in zip(*(result.history for result in runs), strict=True):
        for name in ("loss", "gan", "critic_loss", "critic_lecam"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5)


def test_the_frozen_network_may_move_and_not_change(gan_config: TrainConfig, tmp_path: Path) -> None:
    def config(place: str) -> TokenizerTrainConfig:
        return gan_config(tmp_path / "run", None, {"kind": "frozen", "backbone": str(tmp_path / place)}, run={"steps": 4})

    save_vit(tmp_path / "vit")
    train_tokenizer(config("vit"), progress=False)
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    (tmp_path / "vit").rename(tmp_path / "moved")
    train_tokenizer(config("moved"), resume=True, progress=False)
    save_vit(tmp_path / "other", seed=2)
    with pytest.raises(InputError, match=r"content\.backbone.*resume with the same settings"):
        train_tokenizer(config("other"), resume=True, progress=False)


def test_bf16(gan_config: TrainConfig, tmp_path: Path) -> None:
    config = gan_config(tmp_path, EVERYTHING, run={"steps": 4, "mixed_precision": "bf16"})
    result = train_tokenizer(config, progress=False)
    assert all(
        value.dtype == torch.float32 for value in load_file(list_checkpoints(tmp_path)[-1] / "critic.safetensors").values()
    )
    assert result.history[-1]["critic_r1"] > 0


def test_lpips_without_its_weights_is_refused_before_anything_is_trained(gan_config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"loss\.lpips_weights="):
        train_tokenizer(gan_config(tmp_path / "run", {"lpips": 0.1}), progress=False)
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.slow
def test_two_processes_train_what_one_trains_with_twice_the_batch(gan_config: TrainConfig, tmp_path: Path) -> None:
    """With every term that is no mean over pictures: the adaptive weight, the entropy, LeCAM's anchors, the groups."""
    loss = {**EVERYTHING, "gan_start": 1, "entropy": 0.1, "entropy_temperature": 0.1}
    configs = []
    for name, size in (("two", 4), ("one", 8)):
        run = {"steps": 6, "batch_size": size, "gradient_accumulation": 2}
        configs.append(gan_config(tmp_path / name, loss, run=run, bottleneck="fsq"))
        configs[-1].optim.lr = configs[-1].discriminator.optim.lr = 1e-4
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(to_dict(configs[0])))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "textok_fast"]
    command = [sys.executable, *launch, "train", "tokenizer", "--config", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    train_tokenizer(configs[1], progress=False)
    found, wanted = (load_file(list_checkpoints(tmp_path / name)[-1] / "critic.safetensors") for name in ("two", "one"))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=2e-5, rtol=1e-4, msg=key)
    for two, one in zip(log(tmp_path / "two"), log(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
