"""The published recipes' losses on pixels in [-1, 1], against the formulas of MAGVIT's code on the same pixels in [0, 1].

Those formulas are videogvt/train_lib/losses.py and trainers/vqgan_trainer.py (google-research/magvit), with the weights of
configs/vqgan2d_ucf101_config.py: l2 1, GAN 0.1 (non-saturating), perceptual 0.1, R1 of cost 10 in every step; and LeCAM.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from textok_fast.config import TokenizerTrainConfig, load_config
from textok_fast.modeling.bottlenecks import BottleneckOutput
from textok_fast.modeling.tokenizer import TexTokOutput
from textok_fast.training.critic import GanCritic
from textok_fast.training.loop import StepRandom
from textok_fast.training.losses import generator_loss, lecam_loss, tokenizer_loss

MAGVIT = {"l2": 1.0, "gan": 0.1, "perceptual": 0.1, "r1": 10.0}
CPU = torch.device("cpu")


def cross_entropy(logits: Tensor, label: float) -> Tensor:
    """sigmoid_cross_entropy_with_logits, as it is written there, and its mean."""
    return (logits.relu() - logits * label + torch.log1p(torch.exp(-logits.abs()))).mean()


def lecam_of_means(real: Tensor, fake: Tensor, real_average: float, fake_average: float) -> Tensor:
    """lecam_reg: of the logits' means over the batch."""
    return (real.mean() - fake_average).relu().square() + (real_average - fake.mean()).relu().square()


class Judge(nn.Module):
    """A smooth discriminator of pictures in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 3 * 3, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body(pixels)


@pytest.fixture
def unit() -> tuple[Tensor, Tensor]:
    """Pictures in [0, 1] and their reconstructions, (4, 3, 8, 8)."""
    target = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    return target, (target + 0.2 * torch.randn_like(target)).clamp(0, 1)


def test_the_recipes_tokenizer_loss_is_magvits(unit: tuple[Tensor, Tensor]) -> None:
    weights = load_config(TokenizerTrainConfig, "textok-32-256").loss
    judge = Judge().double()
    target, rebuilt = unit

    def perceptual(a: Tensor, b: Tensor) -> Tensor:  # a network of [0, 1], which ours brings its [-1, 1] to
        return (((a + 1) / 2).sin() - ((b + 1) / 2).sin()).square().mean(dim=(1, 2, 3))

    ours = (2 * rebuilt - 1).requires_grad_()
    opposed = generator_loss(judge(ours), weights.gan_loss)
    bottleneck = BottleneckOutput(torch.zeros(1), {})
    found = tokenizer_loss(TexTokOutput(ours, bottleneck), 2 * target - 1, weights, perceptual, opposed)["loss"]  # type: ignore[arg-type]

    theirs = rebuilt.clone().requires_grad_()
    wanted = (
        MAGVIT["l2"] * (target - theirs).square().mean()
        + MAGVIT["gan"] * cross_entropy(judge(2 * theirs - 1), 1.0)
        + MAGVIT["perceptual"] * (theirs.sin() - target.sin()).square().mean()
    )
    torch.testing.assert_close(found, wanted)
    # The same function of the same picture: its slope by a pixel of [-1, 1] is half of that by one of [0, 1].
    slopes = [torch.autograd.grad(loss, x)[0] for loss, x in ((found, ours), (wanted, theirs))]
    torch.testing.assert_close(2 * slopes[0], slopes[1])


def documented_r1() -> list[str]:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (settings,) = re.findall(r"10 E\[\|dD\(x\) / dx\|\^2\] in every step \(here\s+`(r1=\S+ r1_interval=\S+)`\)", text)
    return [f"loss.{setting}" for setting in settings.split()]


@pytest.mark.parametrize("interval", [1, 4])
def test_the_discriminators_loss_with_the_documented_r1_is_magvits(unit: tuple[Tensor, Tensor], interval: int) -> None:
    """Also with the penalty in every fourth step only, in the mean over four."""
    settings = [*documented_r1(), *([f"loss.r1_interval={interval}"] if interval > 1 else []), "loss.lecam=0"]
    config = load_config(TokenizerTrainConfig, "textok-32-256", overrides=settings)
    assert config.loss.r1_interval == interval
    critic = GanCritic(config.loss, config.discriminator, 64)
    critic.model.net = judge = Judge().double()
    target, rebuilt = unit
    losses = []
    for step in range(interval):
        critic.pair = 2 * target - 1, 2 * rebuilt - 1
        # The network itself: what CriticNetwork adds is rounding to float32.
        losses.append(critic.loss(judge, StepRandom(0, step, 0, 0, 1, CPU))["loss"])
    found = torch.stack(losses).mean()

    theirs = target.clone().requires_grad_()
    real, fake = judge(2 * theirs - 1), judge(2 * rebuilt - 1)
    (gradient,) = torch.autograd.grad(real.sum(), theirs, create_graph=True)
    penalty = MAGVIT["r1"] * gradient.reshape(len(target), -1).square().sum(-1).mean()
    wanted = cross_entropy(real, 1.0) + cross_entropy(fake, 0.0) + penalty
    assert penalty.item() > 0.01 * wanted.item()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)  # the penalty is summed in float32
    parameters = list(judge.parameters())
    for mine, other in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-9)


def test_lecam_is_of_each_logit_and_magvits_of_their_mean() -> None:
    """LeCAM's paper and code square each picture's distance; MAGVIT and TA-TiTok that of the batch's mean. The same for one
    picture; for more ours has their variance on top, where all are beyond the averages."""
    real, fake = 2 + 0.3 * torch.rand(8, 1, dtype=torch.float64), -1 - 0.3 * torch.rand(8, 1, dtype=torch.float64)
    averages = torch.tensor(1.5, dtype=torch.float64), torch.tensor(-0.7, dtype=torch.float64)
    anchors = float(averages[0]), float(averages[1])
    torch.testing.assert_close(lecam_loss(real[:1], fake[:1], *averages), lecam_of_means(real[:1], fake[:1], *anchors))
    spread = real.var(correction=0) + fake.var(correction=0)
    torch.testing.assert_close(lecam_loss(real, fake, *averages), lecam_of_means(real, fake, *anchors) + spread)
