"""Discriminators: networks that tell pictures from their reconstructions. Pixels (B, 3, S, S) in [-1, 1] -> logits (B, M).

A picture's logits depend on no other picture of the batch but in StyleGAN2's groups, which are of consecutive pictures: so a
batch may be cut into parts of whole groups, for several processes, and the logits stay the same.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from textok_fast.config import DiscriminatorConfig
from textok_fast.errors import InputError

_LEAKY_GAIN = math.sqrt(2)  # keeps the variance through a leaky ReLU, as in StyleGAN2
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_discriminator(config: DiscriminatorConfig, image_size: int) -> nn.Module:
    """The network that ``config.kind`` names, for pictures of ``image_size`` x ``image_size``."""
    if config.kind == "patchgan":
        return PatchDiscriminator(image_size, config.channels, config.layers)
    if config.kind == "frozen":
        return FrozenFeatureDiscriminator(config.backbone, image_size, config.feature_layers, config.head_kernel)
    return StyleGANDiscriminator(image_size, config.channel_base, config.channel_max, config.stddev_group)


# -- StyleGAN2 ---------------------------------------------------------------------------------------------------------


class _EqualConv(nn.Module):
    """A convolution whose weights are N(0, 1) and scaled by 1 / sqrt(fan-in) when used (Karras et al. 2018, section 4.1)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale, self.stride = 1 / math.sqrt(in_channels * kernel**2), stride

    def forward(self, x: Tensor, padding: int = 0) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, padding)


class _EqualLinear(nn.Module):
    """A linear layer with weights of the same kind."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = 1 / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * _LEAKY_GAIN


def blur(x: Tensor, pad: int, stride: int = 1) -> Tensor:
    """(B, C, H, W) with the kernel [1, 3, 3, 1] x [1, 3, 3, 1] / 64 after ``pad`` zeros on every side."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8  # (4,)
    # Over channels, not over pictures and channels as one batch, which oneDNN does much slower.
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, stride=stride, padding=pad, groups=x.shape[1])


class _ResidualDown(nn.Module):
    """Two 3 x 3 convolutions, the second over every other pixel, beside a 1 x 1 one; blurred before they skip pixels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _EqualConv(in_channels, in_channels, 3)
        self.conv2 = _EqualConv(in_channels, out_channels, 3, stride=2)
        self.skip = _EqualConv(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / 2, W / 2)."""
        main = _leaky(self.conv2(blur(_leaky(self.conv1(x, padding=1)), pad=2)))
        return (main + self.skip(blur(x, pad=1, stride=2))) / math.sqrt(2)


def group_deviation(x: Tensor, group: int) -> Tensor:
    """(B, C, H, W) -> (B, C + 1, H, W): the standard deviation over each ``group`` of consecutive pictures, averaged over
    channels and pixels, as a further channel (Karras et al. 2018, section 3). B is a multiple of ``group``.

    StyleGAN2's groups take every (B / group)-th picture instead.
    """
    if len(x) % group:
        raise InputError(f"{len(x)} pictures cannot be divided into groups of {group}")
    groups = x.float().unflatten(0, (-1, group))  # (G, group, C, H, W)
    deviation = (groups.var(dim=1, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (G,)
    channel = deviation.repeat_interleave(group).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, channel.to(x.dtype)], dim=1)


class StyleGANDiscriminator(nn.Module):
    """StyleGAN2's residual discriminator (Karras et al. 2020, arXiv 1912.04958, figure 7c): M = 1.

    Channels at resolution r are ``min(channel_base / r, channel_max)``. With 16,384, which StyleGAN2-ADA takes at 256 px
    (its configuration "paper256": half of 32,768), they are 64 at 256 px, 128, 256, and 512 from 32 px on: 24.0 M parameters.

    Raises: InputError for a side that is not 4 to 7 times a power of two.
    """

    def __init__(self, image_size: int, channel_base: int = 16384, channel_max: int = 512, stddev_group: int = 4) -> None:
        super().__init__()

        def width(resolution: int) -> int:
            return max(1, min(channel_base // resolution, channel_max))

        self.stddev_group = stddev_group
        self.from_rgb = _EqualConv(3, width(image_size), 1)
        blocks, side = [], image_size
        while side > 7 and side % 2 == 0:
            blocks.append(_ResidualDown(width(side), width(side // 2)))
            side //= 2
        if not blocks or not 4 <= side <= 7:
            raise InputError(
                f"discriminator.kind=stylegan halves pictures until 4 to 7 px are left, and {image_size} px do not come there; "
                "wanted a side such as 64, 96 or 256"
            )
        self.blocks = nn.Sequential(*blocks)
        channels = width(side)
        self.conv = _EqualConv(channels + bool(stddev_group), channels, 3)
        self.hidden = _EqualLinear(channels * side**2, channels)
        self.to_logit = _EqualLinear(channels, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.blocks(_leaky(self.from_rgb(pixels)))  # (B, C, s, s), s from 4 to 7
        if self.stddev_group:
            x = group_deviation(x, self.stddev_group)
        x = _leaky(self.conv(x, padding=1))
        return self.to_logit(_leaky(self.hidden(x.flatten(1))))


# -- PatchGAN ----------------------------------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv 1611.07004), as in VQGAN: a logit for each of M patches.

    ``layers`` 4 x 4 convolutions of stride 2 and two of stride 1. Normalised over each picture by itself, which is what
    pix2pix's batch norm is at its batch size of 1.
    """

    def __init__(self, image_size: int, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        sides = [image_size // 2 ** (i + 1) for i in range(layers)]
        if sides[-1] < 3:  # one pixel has no deviation, and the last convolution would have nothing left
            raise InputError(
                f"discriminator.layers={layers} leaves {sides[-1]} px of {image_size} px, wanted at least 3: lower it"
            )
        widths = [min(channels * 2**i, channels * 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 2 if i < layers - 1 else 1
            parts.append(nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False))
            parts += [nn.InstanceNorm2d(after, affine=True), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for part in self.main:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.main(pixels).flatten(1)


# -- frozen features ---------------------------------------------------------------------------------------------------


class FrozenBackbone(nn.Module):
    """A vision model of transformers whose hidden states are read: a plain ViT (DINO, DINOv2, CLIP's vision tower) or a
    convolutional one (ResNet, ConvNeXt). Never trained, in no state dict.

    Pictures are resized to the model's own size, averaged where they shrink and bicubic where they grow.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, source: str, image_size: int) -> None:
        super().__init__()
        if not source:
            raise InputError(
                "discriminator.kind=frozen needs a vision model: discriminator.backbone=<directory or Hub id>, such as "
                "facebook/dino-vits16"
            )
        from transformers import AutoModel

        try:
            model = AutoModel.from_pretrained(source)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"discriminator.backbone={source} cannot be loaded: {str(error).splitlines()[0]}") from None
        model = getattr(model, "vision_model", model)  # of models with two towers
        self.model = model.eval().requires_grad_(False)
        size = getattr(model.config, "image_size", None)
        self.size = size if isinstance(size, int) else image_size
        self.patch = getattr(model.config, "patch_size", None)
        mean, std = _pixel_statistics(source)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """pixels (B, 3, S, S) in [-1, 1] -> hidden states (B, C, T): of a ViT the patches', each plus the class token's, as
        StyleGAN-T reads them."""
        x = pixels
        if x.shape[-1] != self.size:
            x = F.interpolate(x, self.size, mode="area" if x.shape[-1] > self.size else "bicubic")
        states = self.model((x * 0.5 + 0.5 - self.mean) / self.std, output_hidden_states=True).hidden_states
        return [self._rows(state) for state in states]

    def _rows(self, state: Tensor) -> Tensor:
        if state.ndim == 4:
            return state.flatten(2)
        patches = (self.size // self.patch) ** 2 if isinstance(self.patch, int) else 0
        before = state.shape[1] - patches  # the class token and the registers
        if not patches or before < 0:
            raise InputError(f"{type(self.model).__name__} is neither a plain ViT nor convolutional: its features are not read")
        rows = state[:, before:]  # (B, T, C)
        return (rows + state[:, :1] if before else rows).transpose(1, 2)


def _pixel_statistics(source: str) -> tuple[Any, Any]:
    """Mean and standard deviation of the pixels, as the model's preprocessor_config.json says; ImageNet's without one."""
    from transformers.utils import cached_file

    try:
        found = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        values = {} if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = {}
    return values.get("image_mean", _IMAGENET_MEAN), values.get("image_std", _IMAGENET_STD)


class FrozenFeatureDiscriminator(nn.Module):
    """Small heads on a frozen network's hidden states, a logit for each token of each layer (Sauer et al. 2023, StyleGAN-T,
    arXiv 2301.09515, section 3.2; the discriminator of VAR's tokenizer): M is the tokens of all layers together.

    A head: a 1 x 1 convolution, a residual one of ``kernel`` tokens, and one to the logit, with spectral norms. GroupNorm takes
    the place of StyleGAN-T's batch norm over eight pictures. No random crops, no differentiable augmentation.

    Args:
        layers: hidden states by number; empty: the embedding and those at each quarter of the depth.
    """

    def __init__(self, backbone: str, image_size: int, layers: tuple[int, ...] = (), kernel: int = 9) -> None:
        super().__init__()
        # In a tuple, so that nn.Module neither saves nor trains it; _apply moves it along.
        self._backbone = (FrozenBackbone(backbone, image_size),)
        with torch.no_grad():
            states = self.backbone(torch.zeros(1, 3, image_size, image_size))
        last = len(states) - 1
        self.layers = layers or tuple(sorted({round(last * quarter / 4) for quarter in range(5)}))
        if strange := [layer for layer in self.layers if not 0 <= layer <= last]:
            raise InputError(f"discriminator.feature_layers: {backbone} has hidden states 0 to {last}, got {strange[0]}")
        self.heads = nn.ModuleList(_Head(states[layer].shape[1], kernel) for layer in self.layers)

    @property
    def backbone(self) -> FrozenBackbone:
        return self._backbone[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenFeatureDiscriminator:
        self.backbone._apply(fn)
        super()._apply(fn, recurse)
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        states = self.backbone(pixels)
        return torch.cat([head(states[layer]) for head, layer in zip(self.heads, self.layers, strict=True)], dim=1)


class _Head(nn.Module):
    """(B, C, T) -> logits (B, T)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()

        def block(size: int) -> nn.Sequential:
            conv = nn.Conv1d(channels, channels, size, padding=size // 2, padding_mode="circular")
            return nn.Sequential(spectral_norm(conv), nn.GroupNorm(math.gcd(32, channels), channels), nn.LeakyReLU(0.2))

        self.first, self.second = block(1), block(kernel)
        self.to_logit = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.to_logit((x + self.second(x)) / math.sqrt(2)).squeeze(1)
