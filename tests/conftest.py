"""What the tests share: small models, a text encoder that costs nothing, and a cache that is not the user's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels then run on the CPU

from textok_fast.config import DataConfig, OptimConfig, RunConfig, TexTokConfig, TokenizerTrainConfig
from textok_fast.modeling.text_encoders import TextFeatures, pad_features
from textok_fast.modeling.tokenizer import TexTok

TEXT_DIM = 8
_users_cache = os.environ.get("TEXTOK_CACHE")


class FakeTextEncoder:
    """Features that depend on each word alone: (B, N_t, 8), as many tokens as words, padded to ``multiple``."""

    name, dim = "fake", TEXT_DIM

    def __init__(self, multiple: int = 1) -> None:
        self.multiple = multiple
        self.calls: list[list[str]] = []

    def __call__(self, captions: Sequence[str]) -> TextFeatures:
        self.calls.append(list(captions))
        rows = [[self.word(word) for word in caption.split()] for caption in captions]
        return pad_features([torch.stack(row) if row else torch.zeros(0, self.dim) for row in rows], multiple=self.multiple)

    def word(self, word: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
        return torch.from_numpy(np.random.default_rng(seed).standard_normal(self.dim)).float()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache unless it asks for ``users_cache``."""
    os.environ["TEXTOK_CACHE"] = str(tmp_path_factory.mktemp("textok-cache"))
    yield
    os.environ.pop("TEXTOK_CACHE")
    if _users_cache is not None:
        os.environ["TEXTOK_CACHE"] = _users_cache


@pytest.fixture
def users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that want what is fetched once and is too large to fetch again, such as the emoji."""
    if _users_cache is None:
        monkeypatch.delenv("TEXTOK_CACHE", raising=False)
    else:
        monkeypatch.setenv("TEXTOK_CACHE", _users_cache)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fake_text_class() -> type[FakeTextEncoder]:
    return FakeTextEncoder


@pytest.fixture
def fake_text() -> FakeTextEncoder:
    return FakeTextEncoder()


@pytest.fixture
def loads_fake_text(monkeypatch: pytest.MonkeyPatch) -> FakeTextEncoder:
    """Whoever loads a text encoder gets this one."""
    encoder = FakeTextEncoder()
    monkeypatch.setattr("textok_fast.modeling.tokenizer.load_text_encoder", lambda *args, **options: encoder)
    return encoder


def _config(**overrides: Any) -> TexTokConfig:
    sizes = {"image_size": 16, "patch_size": 8, "num_tokens": 3, "latent_dim": 4}
    network = {"width": 32, "encoder_depth": 2, "decoder_depth": 2, "heads": 2, "mlp_ratio": 2.0, "text_dim": TEXT_DIM}
    return TexTokConfig(**{**sizes, **network, "codebook_size": 16, **overrides})


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., TexTokConfig]:
    """A TexTok of 16 px, 4 patches, 3 tokens of 4 channels, with any field overridden."""
    return _config


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., TexTok]:
    """A TexTok of ``tiny_config`` in eval mode with seeded weights, larger than at the start of training."""

    def make(seed: int = 0, **overrides: Any) -> TexTok:
        torch.manual_seed(seed)
        tokenizer = TexTok(_config(**overrides))
        with torch.no_grad():
            for parameter in tokenizer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        tokenizer.text_encoder = FakeTextEncoder()  # type: ignore[assignment]
        return tokenizer.eval()

    return make


@pytest.fixture(scope="session")
def train_config() -> Callable[..., TokenizerTrainConfig]:
    """A tokenizer's training on drawn shapes. Keywords: ``run`` and ``data`` as mappings, the others are the model's."""

    def make(output_dir: Path, run: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **model: Any) -> Any:
        shapes = {"source": "shapes", "image_size": 16, "objects": 8, "held_out_objects": 4, "scene_objects": 2}
        every = {"log_every": 1, "checkpoint_every": 3, "sample_every": 1000, "tensorboard": False}
        return TokenizerTrainConfig(
            model=_config(**{"text": "none", **model}),
            data=DataConfig(**{**shapes, **(data or {})}),
            optim=OptimConfig(lr=2e-3, warmup_steps=2, ema_decay=0.9),
            run=RunConfig(**{"output_dir": str(output_dir), "steps": 8, "batch_size": 4, **every, **(run or {})}),
        )

    return make
