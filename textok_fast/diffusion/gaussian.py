"""Gaussian diffusion: the forward process, what a model's output says about the reverse step, and the training losses."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from textok_fast.diffusion.noise import draw_noise
from textok_fast.diffusion.schedule import FloatTable, betas_for, respaced_timesteps
from textok_fast.diffusion.tensors import (
    ModelFn,
    channel_dim,
    per_sample_mean,
    require_same_shape,
    require_times,
    work_dtype,
)
from textok_fast.errors import InputError

Prediction = Literal["epsilon", "v", "x0"]


class MeanVariance(NamedTuple):
    """The reverse step p(x_{t-1} | x_t) that a model's output describes; each of the sample's shape (B, ...)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_x0: Tensor


class GaussianDiffusion:
    """q(x_t | x0) = N(sqrt(a_t) x0, (1 - a_t) I), with a_t = prod (1 - beta) (DDPM, arXiv 2006.11239; learned variance and
    respacing: arXiv 2102.09672).

    ``respacing`` keeps some of the ``num_train_steps`` training steps (:func:`respaced_timesteps`); the others merge, so that
    the kept ones have the same a_t. Everywhere below ``t`` is an index into the kept steps, (B,) int64, or one int for
    the whole batch; models are called with ``timestep_map[t]``, the training step.

    ``prediction`` is what the model's sample channels mean: the noise, the data, or v = sqrt(a) eps - sqrt(1 - a) x0
    (arXiv 2202.00512). With ``learn_sigma`` the output has twice the channels, and the second half w in [-1, 1]
    interpolates the log-variance between the posterior's and beta's. Without, the variance is beta, as in DiT.

    Tables (float64 numpy, one entry a kept step): ``betas``, ``alphas_cumprod`` (a_t), ``alphas_cumprod_prev`` (a_{t-1}),
    ``posterior_variance``, ``posterior_log_variance_clipped``, ``posterior_mean_coef1`` (of x0) and
    ``posterior_mean_coef2`` (of x_t); ``timestep_map`` (int64).
    """

    objective: Literal["gaussian"] = "gaussian"

    def __init__(
        self,
        num_train_steps: int = 1000,
        schedule: str = "linear",
        respacing: str | int | None = None,
        prediction: Prediction = "epsilon",
        learn_sigma: bool = True,
    ) -> None:
        if prediction not in ("epsilon", "v", "x0"):
            raise InputError(f"prediction must be 'epsilon', 'v' or 'x0', got {prediction!r}")
        self.num_train_steps, self.schedule, self.respacing = num_train_steps, schedule, respacing
        self.prediction, self.learn_sigma = prediction, learn_sigma

        train_alphas_cumprod: FloatTable = np.cumprod(1 - betas_for(schedule, num_train_steps), dtype=np.float64)
        self.timestep_map = np.array(respaced_timesteps(num_train_steps, respacing), dtype=np.int64)
        kept: FloatTable = train_alphas_cumprod[self.timestep_map]
        self.betas: FloatTable = 1 - kept / np.append(np.ones(1), kept[:-1])
        self.alphas_cumprod: FloatTable = np.cumprod(1 - self.betas, dtype=np.float64)
        self.alphas_cumprod_prev: FloatTable = np.append(np.ones(1), self.alphas_cumprod[:-1])
        a, a_prev, beta = self.alphas_cumprod, self.alphas_cumprod_prev, self.betas

        # q(x_{t-1} | x_t, x0), Ho et al. (2020), equations 6 and 7.
        self.posterior_variance: FloatTable = beta * (1 - a_prev) / (1 - a)
        self.posterior_mean_coef1: FloatTable = beta * np.sqrt(a_prev) / (1 - a)
        self.posterior_mean_coef2: FloatTable = (1 - a_prev) * np.sqrt(1 - beta) / (1 - a)
        # The variance of the last step to data is 0; its logarithm borrows the one of the step before.
        clipped = self.posterior_variance.copy()
        clipped[0] = clipped[1] if len(clipped) > 1 else beta[0]
        self.posterior_log_variance_clipped: FloatTable = np.log(clipped)

        self._tables: dict[str, FloatTable] = {
            "log_beta": np.log(beta),
            "fixed_variance": np.append(clipped[:1], beta[1:]),
            "sqrt_a": np.sqrt(a),
            "sqrt_1_minus_a": np.sqrt(1 - a),
            "sqrt_recip_a": np.sqrt(1 / a),
            "sqrt_recip_a_minus_1": np.sqrt(1 / a - 1),
            "posterior_log_variance_clipped": self.posterior_log_variance_clipped,
            "posterior_mean_coef1": self.posterior_mean_coef1,
            "posterior_mean_coef2": self.posterior_mean_coef2,
        }
        self._on_device: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def num_steps(self) -> int:
        """Kept steps."""
        return len(self.timestep_map)

    def respaced(self, respacing: str | int | None) -> GaussianDiffusion:
        """The same process over other steps of the same training schedule."""
        return GaussianDiffusion(self.num_train_steps, self.schedule, respacing, self.prediction, self.learn_sigma)

    def sample_times(self, batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Step indices for a training batch, uniform, int64 (B,), drawn on the generator's device."""
        source = generator.device if generator is not None else device
        return torch.randint(self.num_steps, (batch,), generator=generator, device=source).to(device)  # (B,)

    def model_times(self, t: Tensor) -> Tensor:
        """Training steps that a model is called with, int64 (B,), for indices ``t`` (B,)."""
        key = ("timestep_map", t.device, torch.int64)
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(self.timestep_map).to(t.device)  # (num_steps,)
        return self._on_device[key][t]  # (B,)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, of x0's shape (B, ...), in float32 (float64 for float64)."""
        require_same_shape("noise", noise, x0)
        dtype = work_dtype(x0.dtype)
        scale, sigma = self._at("sqrt_a", t, x0), self._at("sqrt_1_minus_a", t, x0)
        return scale * x0.to(dtype) + sigma * noise.to(dtype)  # (B, ...)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """What the model's sample channels should be at ``t``, (B, ...): noise, x0 or v."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        return self._at("sqrt_a", t, x0) * noise - self._at("sqrt_1_minus_a", t, x0) * x0  # (B, ...)

    def mean_variance(self, model_output: Tensor, x: Tensor, t: Tensor | int, clip_denoised: bool = False) -> MeanVariance:
        """The reverse step from x_t. ``model_output`` has x's channels, or twice as many with ``learn_sigma``.

        ``clip_denoised`` clamps the predicted data to [-1, 1] first. Computed in float32 (float64 for float64).
        """
        dtype = work_dtype(x.dtype)
        prediction, interpolation = self._split(model_output.to(dtype), x)
        x = x.to(dtype)
        if interpolation is not None:
            fraction = (interpolation + 1) / 2  # (B, ...)
            low, high = self._at("posterior_log_variance_clipped", t, x), self._at("log_beta", t, x)
            log_variance = fraction * high + (1 - fraction) * low  # (B, ...)
            variance = log_variance.exp()  # (B, ...)
        else:
            variance = torch.zeros_like(x) + self._at("fixed_variance", t, x)  # (B, ...)
            log_variance = variance.log()  # (B, ...)
        pred_x0 = self._predict_x0(prediction, x, t)  # (B, ...)
        if clip_denoised:
            pred_x0 = pred_x0.clamp(-1, 1)
        return MeanVariance(self.posterior_mean(pred_x0, x, t), variance, log_variance, pred_x0)

    def posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor | int) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x0), (B, ...)."""
        return self._at("posterior_mean_coef1", t, x) * x0 + self._at("posterior_mean_coef2", t, x) * x  # (B, ...)

    def predict_noise(self, pred_x0: Tensor, x: Tensor, t: Tensor | int) -> Tensor:
        """The noise that lies between x_t and the predicted data, (B, ...)."""
        return (self._at("sqrt_recip_a", t, x) * x - pred_x0) / self._at("sqrt_recip_a_minus_1", t, x)  # (B, ...)

    def training_losses(
        self,
        model: ModelFn,
        x0: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``loss`` = ``mse`` + ``vb``, each (B,); ``weight`` (B,), such as :meth:`min_snr_weight`, multiplies ``mse`` there.

        ``mse`` is the error of the model's sample channels. ``vb`` (with ``learn_sigma``, else 0) is the variational bound
        of this step in bits per dimension, through which only the variance learns: the mean is held fixed (Nichol &
        Dhariwal 2021, L_hybrid; not rescaled by the number of steps, as in DiT). ``t`` (B,) and ``noise`` (B, ...) are drawn
        from ``generator`` unless given. The model gets x_t in x0's dtype.
        """
        if t is None:
            t = self.sample_times(x0.shape[0], generator, x0.device)  # (B,)
        dtype = work_dtype(x0.dtype)
        noise = draw_noise(x0.shape, generator, x0.device, dtype) if noise is None else noise.to(dtype)  # (B, ...)
        x_t = self.add_noise(x0, noise, t)  # (B, ...)
        output = model(x_t.to(x0.dtype), self.model_times(t)).to(dtype)  # (B, ...), with learn_sigma twice the channels
        x0 = x0.to(dtype)
        prediction, interpolation = self._split(output, x0)
        mse = per_sample_mean((self.target(x0, noise, t) - prediction) ** 2)  # (B,)
        if interpolation is None:
            vb = torch.zeros_like(mse)  # (B,)
        else:
            frozen = torch.cat((prediction.detach(), interpolation), channel_dim(x0))  # (B, ...), twice the channels
            vb = self.variational_bound(frozen, x0, x_t, t)  # (B,)
        weighted = mse if weight is None else weight.to(mse) * mse  # (B,)
        return {"loss": weighted + vb, "mse": mse, "vb": vb}

    def min_snr_weight(self, t: Tensor, gamma: float = 5.0) -> Tensor:
        """Min-SNR-gamma's weight of the squared error at ``t`` (B,) -> (B,) float64 (Hang et al. 2023, arXiv 2303.09556).

        With SNR = a_t / (1 - a_t) it is min(SNR, gamma) for a model of the data. The same weight of the data's error is, for a
        model of the noise, min(SNR, gamma) / SNR; for one of v, min(SNR, gamma) / (SNR + 1).
        """
        if gamma <= 0:
            raise InputError(f"min_snr_gamma must be above 0, got {gamma}")
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)  # (num_steps,)
        per_data_error = {"x0": 1.0, "epsilon": snr, "v": snr + 1}[self.prediction]
        table = torch.from_numpy(np.minimum(snr, gamma) / per_data_error)
        return table.to(t.device)[t]

    def variational_bound(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """One term of the variational bound in bits per dimension, (B,): KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), and at
        index 0 the negative log-likelihood of x0 in bins of width 2/255 on [-1, 1]."""
        true_mean = self.posterior_mean(x0, x_t, t)  # (B, ...)
        true_log_variance = self._at("posterior_log_variance_clipped", t, x_t)  # (B, 1, ...)
        step = self.mean_variance(model_output, x_t, t)
        divergence = _gaussian_kl(true_mean, true_log_variance, step.mean, step.log_variance)  # (B, ...)
        likelihood = _discretized_log_likelihood(x0, step.mean, step.log_variance / 2)  # (B, ...)
        bits = torch.where(t == 0, per_sample_mean(-likelihood), per_sample_mean(divergence))  # (B,)
        return bits / math.log(2)

    def _predict_x0(self, prediction: Tensor, x: Tensor, t: Tensor | int) -> Tensor:
        if self.prediction == "x0":
            return prediction
        if self.prediction == "epsilon":
            return self._at("sqrt_recip_a", t, x) * x - self._at("sqrt_recip_a_minus_1", t, x) * prediction  # (B, ...)
        return self._at("sqrt_a", t, x) * x - self._at("sqrt_1_minus_a", t, x) * prediction  # (B, ...)

    def _split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sample channels, and with ``learn_sigma`` the variance channels."""
        dim = channel_dim(x)
        wanted = list(x.shape)
        wanted[dim] *= 2 if self.learn_sigma else 1
        if list(output.shape) != wanted:
            raise InputError(
                f"the model's output has shape {tuple(output.shape)}, wanted {tuple(wanted)} (learn_sigma={self.learn_sigma})"
            )
        if not self.learn_sigma:
            return output, None
        prediction, interpolation = output.chunk(2, dim)
        return prediction, interpolation

    def _at(self, name: str, t: Tensor | int, x: Tensor) -> Tensor | float:
        """A table at ``t``: a number for an int, else (B, 1, ...) on x's device, in the precision of the arithmetic."""
        if isinstance(t, int):
            return float(self._tables[name][t])
        require_times(t, x.shape[0])
        key = (name, x.device, work_dtype(x.dtype))
        if key not in self._on_device:
            # Kept on the device: copying a table at every call would wait for the device.
            self._on_device[key] = torch.from_numpy(self._tables[name]).to(device=x.device, dtype=key[2])  # (num_steps,)
        return self._on_device[key][t].view(-1, *(1,) * (x.ndim - 1))  # (B, 1, ...)


def _gaussian_kl(mean1: Tensor, log_variance1: Tensor | float, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) for each element, in nats."""
    ratio = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of the bin of width 2/255 around x under N(mean, exp(log_scale)^2), for each element; the first and the last bin
    are open. The normal distribution function is Page's tanh approximation (1977), which DiT's loss uses."""

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centered, inverse_scale = x - mean, torch.exp(-log_scale)
    above, below = cdf(inverse_scale * (centered + 1 / 255)), cdf(inverse_scale * (centered - 1 / 255))
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp_min(1e-12).log()
