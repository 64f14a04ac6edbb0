"""Training of TexTok on captioned pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from textok_fast.config import TokenizerTrainConfig
from textok_fast.data import collate, load_dataset
from textok_fast.data.files import FILE_SOURCES
from textok_fast.data.token_cache import drawn_rows
from textok_fast.errors import InputError
from textok_fast.modeling.encoding import fingerprint
from textok_fast.modeling.layers import drop_captions
from textok_fast.modeling.text_encoders import TextFeatures, trim_padding
from textok_fast.modeling.tokenizer import TexTok, from_uint8, to_uint8
from textok_fast.pictures import image_grid
from textok_fast.training.critic import GanCritic
from textok_fast.training.loop import StepRandom, TrainResult, announce, epochs, fit
from textok_fast.training.losses import tokenizer_loss
from textok_fast.training.parallel import check_run, join_processes
from textok_fast.training.perceptual import load_lpips

STATISTICS_PICTURES = 1024  # for the latents' mean and deviation; the same ones whatever the batch size
STATISTICS_BATCH = 64


class TokenizerTask:
    """Reconstruction of the training pictures, some of them without their caption."""

    def __init__(self, config: TokenizerTrainConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.model = TexTok(config.model).to(device)
        self.model.bottleneck.with_affinities = config.loss.entropy > 0
        self.dataset = load_dataset(config.data, "train")
        # Loaded now, so that a missing one is reported before training, and to the model's device.
        self.encoder = None if config.model.text == "none" else self.model.text_encoder
        weights = config.loss
        self.perceptual = load_lpips(weights.lpips_weights, weights.lpips_heads).to(device) if weights.lpips else None
        self.critic = GanCritic(weights, config.discriminator, config.model.image_size) if weights.gan else None

    def text(self, captions: list[str], device: torch.device) -> TextFeatures | None:
        return None if self.encoder is None else trim_padding(self.encoder(captions)).to(device)

    def loss(self, model: nn.Module, batch: dict[str, Any], rng: StepRandom) -> dict[str, Tensor]:
        pixels = from_uint8(batch["images"].to(rng.device))  # (B, 3, S, S)
        text = self.text(batch["captions"], rng.device)
        if text is not None and self.config.caption_dropout:
            text = drop_captions(text, rng.uniform(len(pixels)) < self.config.caption_dropout)
        noise = rng.normal(len(pixels), self.config.model.num_tokens, self.config.model.latent_dim)  # read by KL only
        output = model(pixels, text, noise)
        opposition = None
        if self.critic is not None and rng.step >= self.critic.start:
            opposition = self.critic.oppose(pixels, output.reconstruction)
        return tokenizer_loss(output, pixels, self.config.loss, self.perceptual, opposition, self.model.last_layer)

    def frozen(self) -> dict[str, str]:
        """Hashes of the networks that the loss reads and nobody trains, where there are any."""
        backbone = None if self.critic is None else self.critic.backbone
        networks = {"lpips": self.perceptual, "backbone": backbone}
        return {name: fingerprint(network) for name, network in networks.items() if network is not None}

    def preview(self, rng: StepRandom) -> Image.Image:
        """Eight training pictures above their reconstructions."""
        batch = collate([self.dataset[index] for index in drawn_rows(len(self.dataset), 8, self.config.data.seed)])
        with torch.no_grad():
            pixels = from_uint8(batch["images"].to(rng.device))
            output = self.model(pixels, self.text(batch["captions"], rng.device)).reconstruction
        return image_grid(torch.cat([batch["images"], to_uint8(output).cpu()]), columns=len(batch["images"]))

    def finish(self, directory: Path) -> None:
        measure_latent_statistics(self)
        self.model.save_pretrained(directory)


@torch.no_grad()
def measure_latent_statistics(task: TokenizerTask) -> None:
    """Stores the mean and standard deviation of each latent channel over pictures of the training set, captions included.

    The pictures are drawn by ``data.seed``: the first ones of a sorted folder may all be of one class.
    """
    rows = drawn_rows(len(task.dataset), STATISTICS_PICTURES, task.config.data.seed)
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    task.model.eval()
    for first in range(0, len(rows), STATISTICS_BATCH):
        batch = collate([task.dataset[row] for row in rows[first : first + STATISTICS_BATCH]])
        pixels = from_uint8(batch["images"].to(task.model.device))
        output = task.model.bottleneck(task.model.encoder(pixels, task.text(batch["captions"], task.model.device)))
        latents = (output.latents if output.mean is None else output.mean).double().cpu().flatten(0, 1)  # (B N, d)
        count, total, squares = count + len(latents), total + latents.sum(0), squares + latents.square().sum(0)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    # A channel that never changes would divide by zero: it is left as it is.
    task.model.set_latent_statistics(mean.float(), torch.where(std > 1e-6, std, 1.0).float())


def train_tokenizer(config: TokenizerTrainConfig, *, resume: bool = False, progress: bool = True) -> TrainResult:
    """Trains a TexTok; the finished model is in ``<output_dir>/final``. See :func:`textok_fast.training.loop.fit`."""
    processes = join_processes(config.run.timeout)
    check_run(config.run, processes.device, processes.num_processes)
    part = config.run.batch_size // (processes.num_processes * config.run.gradient_accumulation)
    group = config.discriminator.stddev_group
    if config.loss.gan and config.discriminator.kind == "stylegan" and group and part % group:
        raise InputError(
            f"each of {processes.num_processes} processes passes {part} pictures at once, which is no multiple of "
            f"discriminator.stddev_group {group}: change run.batch_size, run.gradient_accumulation or the number of processes"
        )
    torch.manual_seed(config.run.seed)  # the initial weights
    task = TokenizerTask(config, processes.device)
    announce(processes, task.dataset.describe())
    if config.data.source in FILE_SOURCES:  # generated scenes do not come again
        announce(processes, epochs(config.run, len(task.dataset)))
    content = {"content": task.dataset.content_hash(), **task.frozen()}
    return fit(task, task.dataset, collate, config, content=content, resume=resume, progress=progress)
