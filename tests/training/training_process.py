"""One process of several: trains what its argument, a JSON list of :func:`train`'s arguments, says, one after the other."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast import DiT, DiTConfig
from textok_fast.config import AdamConfig, GeneratorTrainConfig, TokenizerTrainConfig, from_mapping
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.training import generator, parallel, tokenizer, train_generator, train_tokenizer
from textok_fast.training.loop import StepRandom, TrainResult, fit
from textok_fast.training.optim import ExponentialMovingAverage


class Critic:
    """Tells tokens from a model's by a linear map; counts its steps in a buffer."""

    start = 1

    def __init__(self) -> None:
        self.model = nn.Linear(4, 1)
        self.model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.optim = AdamConfig(lr=1e-2, warmup_steps=0)

    def loss(self, model: nn.Module, rng: StepRandom) -> dict[str, Tensor]:
        real, fake = self.pair
        return {"loss": F.softplus(model(fake)).mean() + F.softplus(-model(real)).mean()}

    def end_step(self) -> None:
        self.model.steps += 1


class Denoiser:
    """A DiT over random tokens, with classes and captions, and a critic against it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = {"width": 32, "depth": 2, "heads": 2, "num_tokens": 3, "in_channels": 4}
        self.model: nn.Module = DiT(DiTConfig(**sizes, num_classes=4, text_dim=8, learn_sigma=False))
        with torch.no_grad():
            for parameter in self.model.parameters():  # as initialised, most of it has no gradient
                parameter.add_(0.05 * torch.randn_like(parameter))
        self.critic = Critic()

    def loss(self, model: nn.Module, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        x0, noise, t = batch["x"], rng.normal(*batch["x"].shape), rng.uniform(len(batch["x"]))
        text = TextFeatures(batch["text"], torch.ones(batch["text"].shape[:2], dtype=torch.bool))
        mix = t[:, None, None]
        fake = model((1 - mix) * x0 + mix * noise, t, batch["y"], text).float()
        self.critic.pair = x0, fake.detach()
        judged = F.linear(fake, self.critic.model.weight.detach(), self.critic.model.bias.detach())
        return {"loss": F.mse_loss(fake, x0) + 0.1 * F.softplus(-judged).mean()}

    def preview(self, rng: StepRandom) -> Image.Image | None:
        assert type(self.model) is DiT and not self.model.training
        return None

    def finish(self, directory: Path) -> None:
        self.model.save_pretrained(directory)  # type: ignore[operator]


class Tokens:
    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.x, self.text = torch.randn(40, 3, 4, generator=draw), torch.randn(40, 5, 8, generator=draw)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "text": self.text[index], "y": torch.tensor(index % 4)}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def make_small(patch: pytest.MonkeyPatch, text_encoder: type) -> None:
    """Few pictures are measured, token shards hold 16, and whoever loads a text encoder gets one of ``text_encoder``."""
    patch.setattr(tokenizer, "STATISTICS_PICTURES", 64)
    patch.setattr(generator, "write_token_shards", functools.partial(generator.write_token_shards, shard_size=16))
    patch.setattr("textok_fast.modeling.tokenizer.load_text_encoder", lambda *args, **options: text_encoder())


def train(kind: str, config: dict[str, Any], resume: bool = False, die_at: int | None = None) -> TrainResult:
    """``kind``: "tokenizer", "generator" or "denoiser". ``die_at``: a step at whose end the process of the highest rank is
    killed."""
    if die_at is not None and int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"]):
        _die_at(die_at)
    if kind == "generator":
        return train_generator(from_mapping(GeneratorTrainConfig, config), resume=resume, progress=False)
    settings = from_mapping(TokenizerTrainConfig, config)
    if kind == "tokenizer":
        return train_tokenizer(settings, resume=resume, progress=False)
    return fit(Denoiser(), Tokens(), collate, settings, content={}, resume=resume, progress=False)


def _die_at(step: int) -> None:
    update = ExponentialMovingAverage.update

    def dying(self: ExponentialMovingAverage, model: nn.Module, done: int) -> None:
        update(self, model, done)
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    ExponentialMovingAverage.update = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    from conftest import FakeTextEncoder

    torch.set_num_threads(1)
    make_small(pytest.MonkeyPatch(), FakeTextEncoder)
    for job in json.loads(sys.argv[1]):
        try:
            train(**job)
        except ConnectionError as error:
            print(f"ConnectionError: {error}", file=sys.stderr)
            parallel.leave(1)
