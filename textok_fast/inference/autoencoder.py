"""Stable Diffusion's autoencoder run by a plan: diffusers' AutoencoderKL, with its own calls.

Its time goes into convolutions: weights and activations lie channels-last where that is faster, the plan's precision is
theirs, and networks are compiled and captured as the plan says. int8 and fp8 are forms of a transformer's products, of which it
has next to none: in such plans it runs in what they compute all else in, float32 and bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from textok_fast.errors import InputError
from textok_fast.inference.execution import CapturedByShape, compiled, own_modes
from textok_fast.inference.memory import MemoryEstimate, available_memory, require_fits, weights_estimate
from textok_fast.inference.plan import Plan
from textok_fast.inference.precision import Precision, prepare, weight_bytes
from textok_fast.inference.tokenizer import upload
from textok_fast.ops.device import resolve_device

PRECISION: dict[Precision, Precision] = {"fp32": "fp32", "bf16": "bf16", "int8": "fp32", "fp8": "bf16"}  # plan -> networks
# Feature maps alive at the worst moment, of a picture's size and as many channels as the last but one level has: what enters a
# residual block, its norm before and after the activation; around an upsampling convolution what it reads and writes; to spare.
_LIVE_MAPS = 6


class AutoencoderEngine:
    """An AutoencoderKL as a plan says: ``encode(x).latent_dist`` and ``decode(z).sample``, on the plan's device.

    Results are the model's but for rounding. The model stays as it was. A batch always runs in as many parts as memory asks
    for, because one picture fills a machine; tiling and slicing, which diffusers has for that, are not used.

    Args:
        model: diffusers' AutoencoderKL, on any device.

    Raises: InputError for a plan that this machine cannot follow.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.plan = plan.require_machine()
        self.config: Any = model.config
        self.device, precision = resolve_device(plan.device), PRECISION[plan.precision]
        estimate = weights_estimate(model, precision, self.device, packs=False, limit=plan.memory_limit)
        other = "another precision" if precision == "fp32" else "another device"
        require_fits(estimate, f"the autoencoder in {precision}", f"use {other}")
        self.model: Any = prepare(model, precision, device=self.device, products="reference")
        # On an H200 the uncompiled decoder took longer with channels last than without: 27 ms against 22 for a picture of 512
        # px, 966 against 675 for 64 (benchmarks/results/speedup-xl-bf16-h200-2026-11-27). Compiled it was not measured there.
        plain = self.device.type == "cuda" and plan.compile == "none"
        self._layout = torch.contiguous_format if plain else torch.channels_last
        for layer in self.model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=self._layout)
        self.dtype: torch.dtype = next(self.model.parameters()).dtype
        self._weights = weight_bytes(self.model)
        self._encode, self._decode = self._form(self._moments), self._form(self._pixels)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """x (B, 3, S, S) in [-1, 1] -> ``.latent_dist``, of mean and deviation (B, C, h, w), not scaled."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        found = DiagonalGaussianDistribution(self._run(self._encode, x, 1))
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Any:
        """z (B, C, h, w), not scaled -> ``.sample`` (B, 3, S, S), not clamped. ``generator`` is not used, as in the model."""
        pixels = self._run(self._decode, z, self.factor)
        if not return_dict:
            return (pixels,)
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=pixels)

    @property
    def factor(self) -> int:
        """Pixels of a latent's side."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    def memory(self, batch: int, height: int, width: int | None = None) -> MemoryEstimate:
        """What encoding or decoding ``batch`` pictures at once takes, the larger of both; ``width`` None is the height."""
        pixels = batch * height * (height if width is None else width)
        state = pixels * 3 * self.dtype.itemsize * (1 if self.plan.capture == "none" else 2)
        available = available_memory(self.device, self._weights, self.plan.memory_limit)
        return MemoryEstimate(self._weights, 0, activation_bytes(self.config, pixels, self.dtype), state, available)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _form(self, network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        run = compiled(network, self.plan)
        return run if self.plan.capture == "none" else CapturedByShape(run, "the autoencoder")

    def _moments(self, x: Tensor) -> Tensor:
        found = self.model.encoder(x.contiguous(memory_format=self._layout))
        last = self.model.quant_conv
        moments: Tensor = found if last is None else last(found)  # (B, 2 C, h, w)
        return moments

    def _pixels(self, z: Tensor) -> Tensor:
        first = self.model.post_quant_conv
        z = z.contiguous(memory_format=self._layout)
        pixels: Tensor = self.model.decoder(z if first is None else first(z))  # (B, 3, S, S)
        return pixels

    def _run(self, network: Callable[[Tensor], Tensor], given: Tensor, scale: int) -> Tensor:
        """``network`` over (B, ...), in equal parts that fit; ``scale``: pixels of one of its places' sides."""
        if given.ndim != 4 or not given.is_floating_point():
            raise InputError(f"an autoencoder takes float (B, C, H, W), got {given.dtype} {tuple(given.shape)}")
        with ExitStack() as stack:
            stack.enter_context(own_modes(self.device))
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            size = self._room(len(given), *(scale * side for side in given.shape[2:]))
            given = upload(given.detach(), self.device, self.dtype)
            parts = [network(part) for part in given.split(size)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _room(self, batch: int, height: int, width: int) -> int:
        size = batch
        while size > 1 and not self.memory(size, height, width).fits:
            size = math.ceil(size / 2)
        require_fits(self.memory(size, height, width), f"one picture of {width} x {height}", "use another precision or device")
        return max(size, 1)


def activation_bytes(config: Any, pixels: int, dtype: torch.dtype) -> int:
    """What the decoder of an AutoencoderKL holds at the worst moment, for so many pixels in all; its encoder holds less."""
    return int(pixels * max(config.block_out_channels[:2]) * _LIVE_MAPS * dtype.itemsize)
