"""Flow matching on the straight path between data and noise."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from textok_fast.diffusion.noise import Generators, draw_noise
from textok_fast.diffusion.tensors import ModelFn, per_sample_mean, require_same_shape, require_times, work_dtype
from textok_fast.errors import InputError


class FlowMatching:
    """x_t = (1 - t) x0 + t eps, velocity dx/dt = eps - x0; t = 0 is data and t = 1 is noise (SiT, arXiv 2401.08740).

    ``times``: how training draws t. ``uniform`` on [0, 1), or ``logit_normal``, the sigmoid of a normal with
    ``logit_mean`` and ``logit_std``, which spends more of training on the middle (SD3, arXiv 2403.03206).
    """

    objective: Literal["flow"] = "flow"

    def __init__(
        self, times: Literal["uniform", "logit_normal"] = "uniform", logit_mean: float = 0.0, logit_std: float = 1.0
    ) -> None:
        if times not in ("uniform", "logit_normal"):
            raise InputError(f"times must be 'uniform' or 'logit_normal', got {times!r}")
        if logit_std <= 0:
            raise InputError(f"logit_std must be positive, got {logit_std}")
        self.times, self.logit_mean, self.logit_std = times, logit_mean, logit_std

    def sample_times(self, batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Times for a training batch, float32 (B,) in [0, 1], drawn on the generator's device."""
        source = generator.device if generator is not None else device
        if self.times == "uniform":
            t = torch.rand(batch, generator=generator, device=source)  # (B,)
        else:
            t = self.logit_normal(torch.randn(batch, generator=generator, device=source))  # (B,)
        return t.to(device)

    def logit_normal(self, normal: Tensor) -> Tensor:
        """Standard normal numbers (B,) -> logit-normal times in [0, 1]: sigmoid(mean + std normal) (SD3, section 3.1)."""
        return torch.sigmoid(normal * self.logit_std + self.logit_mean)  # (B,)

    def logit_normal_density(self, t: Tensor) -> Tensor:
        """The density of :meth:`logit_normal` at ``t`` (B,) in [0, 1] -> (B,) (SD3, arXiv 2403.03206, section 3.1), 0 at the
        ends.

        As a weight of the loss at uniform times it has the expectation that unweighted logit-normal times have.
        """
        t = t.to(work_dtype(t.dtype))
        inside = (t > 0) & (t < 1)
        safe = torch.where(inside, t, 0.5)
        z = (torch.logit(safe) - self.logit_mean) / self.logit_std
        density = torch.exp(-z.square() / 2) / (self.logit_std * math.sqrt(2 * math.pi) * safe * (1 - safe))
        return torch.where(inside, density, 0.0)  # (B,)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, of x0's shape (B, ...), in float32 (float64 for float64). t is (B,) in [0, 1]."""
        require_same_shape("noise", noise, x0)
        time = _broadcast(t, x0)  # (B, 1, ...)
        return (1 - time) * x0.to(time.dtype) + time * noise.to(time.dtype)  # (B, ...)

    def velocity(self, x0: Tensor, noise: Tensor) -> Tensor:
        """What the model learns: eps - x0, (B, ...)."""
        return noise - x0

    def predict_x0(self, x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """The data that a velocity at ``t`` points to: x_t - t v, (B, ...)."""
        time = _broadcast(t, x_t)  # (B, 1, ...)
        return x_t.to(time.dtype) - time * velocity.to(time.dtype)  # (B, ...)

    def training_losses(
        self,
        model: ModelFn,
        x0: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``loss`` (B,): the mean squared error of the velocity for each sample, times ``weight`` (B,) if given; then the
        error itself is ``mse``.

        ``t`` (B,) and ``noise`` (B, ...) are drawn from ``generator`` unless given. The model gets x_t in x0's dtype.
        """
        if t is None:
            t = self.sample_times(x0.shape[0], generator, x0.device)  # (B,)
        source: Generators = generator
        noise = draw_noise(x0.shape, source, x0.device, work_dtype(x0.dtype)) if noise is None else noise  # (B, ...)
        x_t = self.add_noise(x0, noise, t)  # (B, ...)
        output = model(x_t.to(x0.dtype), t)  # (B, ...)
        require_same_shape("the model's output", output, x0)
        target = self.velocity(x0.to(x_t.dtype), noise.to(x_t.dtype))  # (B, ...)
        mse = per_sample_mean((output.to(x_t.dtype) - target) ** 2)  # (B,)
        return {"loss": mse} if weight is None else {"loss": weight.to(mse) * mse, "mse": mse}


def _broadcast(t: Tensor, x: Tensor) -> Tensor:
    require_times(t, x.shape[0])
    return t.to(device=x.device, dtype=work_dtype(x.dtype)).view(-1, *(1,) * (x.ndim - 1))  # (B, 1, ...)
