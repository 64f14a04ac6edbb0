"""The discriminator as the loop trains it: its network, its loss, and what it remembers between steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from textok_fast.config import DiscriminatorConfig, LossConfig
from textok_fast.modeling.discriminator import FrozenFeatureDiscriminator, build_discriminator
from textok_fast.training.loop import StepRandom
from textok_fast.training.losses import (
    LogitAverages,
    discriminator_loss,
    generator_loss,
    lecam_loss,
    mean_over_processes,
    r1_penalty,
)


class CriticNetwork(nn.Module):
    """A discriminator with what belongs into its checkpoint beside its weights."""

    r1: Tensor

    def __init__(self, net: nn.Module, lecam_decay: float) -> None:
        super().__init__()
        self.net = net
        self.averages = LogitAverages(lecam_decay)
        self.register_buffer("r1", torch.zeros(()))  # the penalty when it was last computed, for the log

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> logits (B, M), float32."""
        return self.net(pixels).float()


class GanCritic:
    """A :class:`textok_fast.training.loop.Critic` of a tokenizer's reconstructions, as ``weights`` and ``config`` say.

    In each micro-batch :meth:`oppose` judges the reconstructions and keeps them for :meth:`loss`.
    """

    def __init__(self, weights: LossConfig, config: DiscriminatorConfig, image_size: int) -> None:
        self.weights, self.optim, self.start = weights, config.optim, weights.gan_start
        self.model = CriticNetwork(build_discriminator(config, image_size), weights.lecam_decay)
        self.pair: tuple[Tensor, Tensor] | None = None
        self.means: list[Tensor] = []  # of a step's micro-batches: the logits' means (2,)
        self.penalties: list[Tensor] = []  # and the penalties of a step that has them

    @property
    def backbone(self) -> nn.Module | None:
        """The frozen network of a discriminator that has one."""
        net = self.model.net
        return net.backbone if isinstance(net, FrozenFeatureDiscriminator) else None

    def oppose(self, pixels: Tensor, reconstruction: Tensor) -> Tensor:
        """The generator's loss of the reconstructions (B, 3, S, S); the network's weights get no gradient from it."""
        self.pair = pixels, reconstruction.detach()
        with _frozen(self.model):
            return generator_loss(self.model(reconstruction), self.weights.gan_loss)

    def loss(self, model: nn.Module, rng: StepRandom) -> dict[str, Tensor]:
        """ "loss", the logits' means "real" and "fake", and "lecam" and "r1" where they count."""
        if self.pair is None:
            raise RuntimeError("oppose() comes before loss()")
        real, fake = self.pair
        self.pair = None
        penalised = self.weights.r1 > 0 and (rng.step - self.start) % self.weights.r1_interval == 0
        real = real.detach().requires_grad_(penalised)
        # One pass for both: a wrapper for several processes then sees one forward before each backward.
        logits_real, logits_fake = model(torch.cat([real, fake.to(real.dtype)])).chunk(2)
        terms = {"real": logits_real.mean().detach(), "fake": logits_fake.mean().detach()}
        total = discriminator_loss(logits_real, logits_fake, self.weights.gan_loss)
        if self.weights.lecam:
            averages = self.model.averages
            lecam = lecam_loss(logits_real, logits_fake, *averages.anchors())
            terms["lecam"] = torch.where(averages.left < 1, lecam, 0.0)  # no anchors before the first step's end
            total = total + self.weights.lecam * terms["lecam"]
            self.means.append(torch.stack([terms["real"], terms["fake"]]))
        if self.weights.r1:
            terms["r1"] = self.model.r1.clone()
            if penalised:
                terms["r1"] = r1_penalty(logits_real, real)
                total = total + self.weights.r1 / 2 * self.weights.r1_interval * terms["r1"]
                self.penalties.append(terms["r1"].detach())
        return {"loss": total, **terms}

    def end_step(self) -> None:
        """The anchors take in the step's logits, of all micro-batches and processes together."""
        if self.means:
            self.model.averages.update(mean_over_processes(torch.stack(self.means).mean(dim=0)))
        if self.penalties:
            self.model.r1.copy_(mean_over_processes(torch.stack(self.penalties).mean()))
        self.means, self.penalties = [], []


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters require no gradients."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
