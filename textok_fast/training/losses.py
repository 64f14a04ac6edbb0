"""The tokenizer's loss terms, and the discriminator's. Every term is a mean over pictures, so that the terms of a batch are
the means of its parts' terms, but for the two that say otherwise (docs/training.md, "Losses")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast.config import LossConfig
from textok_fast.modeling.tokenizer import TexTokOutput
from textok_fast.training.perceptual import LPIPS

GanLoss = Literal["hinge", "non-saturating"]


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of ``value`` over the processes of the run, without its gradient."""
    value = value.detach()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


# -- terms of the tokenizer --------------------------------------------------------------------------------------------


def gradient_loss(reconstruction: Tensor, target: Tensor, scales: int = 3) -> Tensor:
    """Mean l1 distance between horizontal and vertical image gradients at ``scales`` scales, each half the one before.

    A stand-in for a perceptual loss that needs no network: it asks for edges where l2 settles for a blur.
    reconstruction, target: (B, C, H, W) -> scalar.
    """
    total = reconstruction.new_zeros(())
    difference = reconstruction - target  # gradients are linear, so the gradient of the difference is enough
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)  # (B, C, H / 2, W / 2)
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return total / (2 * scales)


def entropy_loss(affinities: Sequence[Tensor], temperature: float, diversity: float = 1.0) -> Tensor:
    """E[H(q)] - ``diversity`` H(E[q]) in nats, q = softmax(affinity / temperature): each latent should be sure of its code, and
    all latents together should use all codes (Yu et al. 2024, MAGVIT-v2, arXiv 2310.05737, equation 5).

    ``affinities``: (..., K) each. Several are independent choices, as of FSQ's channels: their entropies are summed, exact for
    the first term and an upper bound in the second (Zhao et al. 2024, arXiv 2406.07548, section 3.3).

    E[q] is over the batches of all processes; with gradient accumulation each micro-batch has its own.
    """
    total = affinities[0].new_zeros((), dtype=torch.float32)
    for affinity in affinities:
        logs = (affinity.float() / temperature).flatten(0, -2).log_softmax(dim=-1)  # (rows, K)
        shares = logs.exp()
        own = -(shares * logs).sum(-1).mean()
        mean = shares.mean(dim=0)  # (K,)
        # The value of all processes with the gradient of this one's part: their gradients' mean is the gradient of the whole.
        mean = mean + mean_over_processes(mean) - mean.detach()
        total = total + own + diversity * torch.special.xlogy(mean, mean.clamp_min(1e-20)).sum()
    return total


def balanced(
    reconstruction: Tensor, rebuilt: Tensor, opposed: Tensor, last_layer: Tensor, share: float, largest: float
) -> tuple[Tensor, Tensor]:
    """VQGAN's adaptive weight (Esser et al. 2021, arXiv 2012.09841, equation 7) and the balanced sum of two losses.

    weight = share x min(|d rebuilt / dL| / (|d opposed / dL| + 1e-4), largest), L the decoder's last layer, the norms those of
    the gradients' means over all processes, the constants those of the authors' code. With gradient accumulation each
    micro-batch has its own weight.

    Args:
        reconstruction: (B, 3, S, S), which the scalars ``rebuilt`` and ``opposed`` are computed from.

    Returns: the weight, and rebuilt + weight x opposed. The networks behind the two losses are passed backward here, once: the
        sum's gradient reaches ``reconstruction`` as a constant.
    """
    gradients = [torch.autograd.grad(loss, reconstruction)[0] for loss in (rebuilt, opposed)]
    norms = []
    for gradient in gradients:
        (found,) = torch.autograd.grad(reconstruction, last_layer, gradient, retain_graph=True)
        norms.append(torch.linalg.vector_norm(mean_over_processes(found.float())))
    weight = share * (norms[0] / (norms[1] + 1e-4)).clamp(max=largest)
    value = rebuilt.detach() + weight * opposed.detach()
    slope = (reconstruction * (gradients[0] + weight * gradients[1])).sum()
    return weight, value + slope - slope.detach()


def tokenizer_loss(
    output: TexTokOutput,
    target: Tensor,
    weights: LossConfig,
    perceptual: LPIPS | None = None,
    opposition: Tensor | None = None,
    last_layer: Tensor | None = None,
) -> dict[str, Tensor]:
    """All terms by name, and their weighted sum as "loss". A weight of 0 skips its term.

    Args:
        target: (B, 3, S, S) in [-1, 1].
        perceptual: for ``weights.lpips``.
        opposition: what :func:`generator_loss` says of the reconstruction; None before the discriminator starts.
        last_layer: the decoder's, for ``weights.gan_adaptive``.
    """
    terms: dict[str, Tensor] = {"l2": F.mse_loss(output.reconstruction, target)}
    if weights.gradient:
        terms["gradient"] = gradient_loss(output.reconstruction, target)
    if weights.lpips and perceptual is not None:
        terms["lpips"] = perceptual(output.reconstruction, target).mean()
    rebuilt = sum((getattr(weights, name) * terms[name] for name in terms), torch.zeros((), device=target.device))
    if opposition is not None:
        terms["gan"] = opposition
        if weights.gan_adaptive and last_layer is not None:
            terms["gan_weight"], rebuilt = balanced(
                output.reconstruction, rebuilt, opposition, last_layer, weights.gan, weights.gan_adaptive_max
            )
        else:
            rebuilt = rebuilt + weights.gan * opposition
    others = dict(output.bottleneck.losses)
    if weights.entropy:
        others["entropy"] = entropy_loss(output.bottleneck.affinities, weights.entropy_temperature, weights.entropy_diversity)
    total = rebuilt
    for name, value in others.items():
        total = total + getattr(weights, name) * value
    return {"loss": total, **terms, **others}


# -- the discriminator's -----------------------------------------------------------------------------------------------


def generator_loss(fake: Tensor, kind: GanLoss) -> Tensor:
    """What pulls the reconstructions' logits (B, M) up. Hinge: -E[D] (Lim & Ye 2017, arXiv 1705.02894); non-saturating:
    E[-log sigmoid(D)] (Goodfellow et al. 2014, section 3)."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanLoss) -> Tensor:
    """What parts the logits (B, M). Hinge: E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))]; non-saturating:
    E[-log sigmoid(D(real))] + E[-log sigmoid(-D(fake))]. VQGAN's code halves both."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def lecam_loss(real: Tensor, fake: Tensor, real_anchor: Tensor, fake_anchor: Tensor) -> Tensor:
    """LeCAM (Tseng et al. 2021, arXiv 2104.03310, equation 4): E[max(0, D(real) - fake_anchor)^2] +
    E[max(0, real_anchor - D(fake))^2], the anchors being moving averages of the logits; max(0, .) as in the authors' code."""
    return F.relu(real - fake_anchor).square().mean() + F.relu(real_anchor - fake).square().mean()


def r1_penalty(real: Tensor, pixels: Tensor) -> Tensor:
    """E[|dD / d pixels|^2] on real pictures (Mescheder et al. 2018, arXiv 1801.04406, equation 9), D the mean of a picture's
    logits. real (B, M) comes from pixels (B, 3, S, S), which require gradients; differentiable itself."""
    (gradient,) = torch.autograd.grad(real.mean(dim=1).sum(), pixels, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3)).mean()


class LogitAverages(nn.Module):
    """LeCAM's anchors: moving averages of the logits of real pictures and of reconstructions, their start at 0 made up for as
    in Adam. Buffers, so that checkpoints keep them."""

    sums: Tensor
    left: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("sums", torch.zeros(2))  # of real and fake
        self.register_buffer("left", torch.ones(()))  # decay to the power of the updates: what the start at 0 still counts

    def update(self, means: Tensor) -> None:
        """means (2,): of real and fake, over the whole global batch."""
        self.sums.lerp_(means, 1 - self.decay)
        self.left.mul_(self.decay)

    def anchors(self) -> Tensor:
        """(2,) for real and fake; 0 before the first update."""
        return self.sums / (1 - self.left).clamp_min(1e-20)
