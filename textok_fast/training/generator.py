"""Training of the DiT over cached tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from textok_fast.config import GeneratorTrainConfig, to_dict
from textok_fast.data import load_dataset
from textok_fast.data.token_cache import TokenDataset, collate_tokens, write_token_shards
from textok_fast.diffusion import FlowMatching, GaussianDiffusion
from textok_fast.errors import InputError
from textok_fast.files import write_atomically
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.encoding import encode_function, token_identity
from textok_fast.modeling.layers import drop_captions
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.modeling.tokenizer import TexTok
from textok_fast.training.loop import StepRandom, TrainResult, fit

CAPTIONS_PER_CLASS = 16  # held-out captions kept for the decoder of a class-conditional generator


class GeneratorTask:
    """Denoising of cached tokens, some of them without their label or caption so that guidance works."""

    def __init__(self, config: GeneratorTrainConfig, tokenizer: TexTok) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.model = DiT(config.model)
        self.process: GaussianDiffusion | FlowMatching
        if config.objective == "gaussian":
            self.process = GaussianDiffusion(learn_sigma=config.model.learn_sigma)
        elif config.model.learn_sigma:
            raise InputError("a flow has no learned variance: set model.learn_sigma=false, or objective=gaussian")
        else:
            self.process = FlowMatching()
        wanted = (tokenizer.config.num_tokens, tokenizer.config.latent_dim)
        if (config.model.num_tokens, config.model.in_channels) != wanted:
            raise InputError(
                f"the tokenizer gives {wanted[0]} tokens of {wanted[1]} channels; set model.num_tokens={wanted[0]} and "
                f"model.in_channels={wanted[1]} (got {config.model.num_tokens} and {config.model.in_channels})"
            )
        if config.model.text_dim:
            tokenizer.text_encoder  # noqa: B018 (loads it now, so that a missing one is reported before training)
            if tokenizer.config.text_dim != config.model.text_dim:
                raise InputError(
                    f"set model.text_dim={tokenizer.config.text_dim}, the width of {tokenizer.config.text_encoder}"
                )

    def loss(self, model: nn.Module, batch: dict[str, Any], rng: StepRandom) -> dict[str, Tensor]:
        x0 = batch["tokens"].to(rng.device)  # (B, N, d)
        drop = rng.uniform(len(x0)) < self.config.model.condition_dropout  # (B,)
        labels = text = None
        if self.config.model.num_classes:
            labels = torch.where(drop, self.config.model.num_classes, batch["labels"].to(rng.device))  # (B,)
        if self.config.model.text_dim:
            features, mask = self.tokenizer.text_encoder(batch["captions"])
            text = drop_captions(TextFeatures(features.to(rng.device), mask.to(rng.device)), drop)
        noise = rng.normal(*x0.shape)
        if isinstance(self.process, GaussianDiffusion):
            t = rng.integers(self.process.num_steps, len(x0))  # (B,)
        else:
            t = rng.uniform(len(x0))
        terms = self.process.training_losses(lambda x, time: model(x, time, labels, text).float(), x0, t, noise)
        return {name: value.mean() for name, value in terms.items()}

    def preview(self, rng: StepRandom) -> Image.Image | None:
        return None  # sampling needs a pipeline, which inference/ has: `textok-fast sample`

    def finish(self, directory: Path) -> None:
        """A directory that ``textok_fast.inference.load_pipeline`` reads: generator, tokenizer, and how they were trained."""
        self.model.save_pretrained(directory / "generator")
        self.tokenizer.save_pretrained(directory / "tokenizer")
        held_out = load_dataset(self.config.data, held_out_split(self.config))
        about = {
            "objective": self.config.objective,
            "label_names": held_out.label_names if self.config.model.num_classes else [],
            "captions": {str(k): v for k, v in held_out.captions_by_label(CAPTIONS_PER_CLASS).items()}
            if self.config.model.num_classes
            else {},
        }
        text = json.dumps(about, indent=1, ensure_ascii=False)
        write_atomically(directory / "pipeline.json", lambda path: path.write_text(text, encoding="utf-8"))


def held_out_split(config: GeneratorTrainConfig) -> str:
    """The split whose captions training has not seen."""
    return "validation" if config.data.source in ("folder", "webdataset") else "composition"


def train_generator(
    config: GeneratorTrainConfig,
    *,
    resume: bool = False,
    progress: bool = True,
    on_cache: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Caches the tokens of the training pictures, then trains a DiT over them; ``<output_dir>/final`` is a pipeline.

    ``on_cache`` is called with (pictures encoded, in all). See :func:`textok_fast.training.loop.fit`.
    """
    torch.manual_seed(config.run.seed)  # the initial weights
    tokenizer = TexTok.from_pretrained(config.tokenizer, device="cuda" if torch.cuda.is_available() else "cpu")
    task = GeneratorTask(config, tokenizer)
    directory = Path(config.token_cache or Path(config.run.output_dir) / "tokens")
    dataset = load_dataset(config.data, "train")
    identity = token_identity(tokenizer, to_dict(config.data))
    write_token_shards(
        directory,
        dataset,
        encode_function(tokenizer),
        identity=identity,
        count=config.cache_images,
        batch_size=64,
        progress=on_cache,
    )
    tokens = TokenDataset(directory)
    if config.model.num_classes and int(tokens.labels.max()) >= config.model.num_classes:
        raise InputError(
            f"the data has classes up to {int(tokens.labels.max())} ({len(dataset.label_names)} names); set "
            f"model.num_classes={max(len(dataset.label_names), int(tokens.labels.max()) + 1)}, got {config.model.num_classes}"
        )
    return fit(task, tokens, collate_tokens, config, resume=resume, progress=progress)
