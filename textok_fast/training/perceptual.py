"""LPIPS over VGG16, from public weights, without torchvision."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast.errors import InputError
from textok_fast.interop.weights import read_weights
from textok_fast.modeling.saving import misfit

# VGG16's stages (Simonyan & Zisserman 2015, configuration D): channels and the numbers of their convolutions in torchvision's
# ``features``; a max-pooling stands between two stages, and a stage's last ReLU is read.
VGG16_CHANNELS = (64, 128, 256, 512, 512)
VGG16_CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's, whose name begins the hash
VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # lpips' ScalingLayer: ImageNet's statistics for [-1, 1]
_CONVOLUTION = re.compile(r"(?:(?:net\.)?slice\d\.|features\.)?(\d+)\.(weight|bias)")
_HEAD = re.compile(r"lin(\d)\.model\.\d\.weight")  # behind a Dropout (model.1), or without one (model.0)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924, equation 1), version 0.1, frozen.

    The features of each stage are normalised over channels; their squared differences are weighed by channel, averaged over
    pixels and summed over stages. Division by sqrt(1e-8 + sum of squares), as in torchmetrics: lpips' own norm has no gradient
    where all of a pixel's features are 0.

    Args:
        channels: of the stages; others than VGG16's are no LPIPS and serve tests.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, channels: tuple[int, ...] = VGG16_CHANNELS) -> None:
        super().__init__()
        self.channels = channels
        self.convolutions = nn.ModuleList()
        before = 3
        for width, numbers in zip(channels, VGG16_CONVOLUTIONS, strict=True):
            for _ in numbers:
                self.convolutions.append(nn.Conv2d(before, width, 3, padding=1))
                before = width
        self.heads = nn.ParameterList(torch.zeros(width) for width in channels)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the five stages' features (B, C, h, w), float32, of norm 1 over C."""
        x, found, layers = (pixels - self.shift) / self.scale, [], iter(self.convolutions)
        for i, numbers in enumerate(VGG16_CONVOLUTIONS):
            if i:
                x = F.max_pool2d(x, 2)
            for _ in numbers:
                x = F.relu(next(layers)(x))
            values = x.float()
            found.append(values / (values.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """(B, 3, H, W) twice, in [-1, 1], at least 16 px -> distances (B,)."""
        if min(pixels.shape[-2:]) < 16:
            raise InputError(f"LPIPS halves pictures four times: at least 16 x 16 px, got {tuple(pixels.shape[-2:])}")
        with torch.no_grad():
            wanted = self.features(target)
        total = torch.zeros(len(pixels), device=pixels.device)
        for found, other, head in zip(self.features(pixels), wanted, self.heads, strict=True):
            total = total + ((found - other).square() * head[:, None, None]).sum(1).mean(dim=(1, 2))
        return total


def load_lpips(weights: str, heads: str = "", channels: tuple[int, ...] = VGG16_CHANNELS) -> LPIPS:
    """LPIPS from files, as :func:`textok_fast.interop.weights.read_weights` reads them.

    Args:
        weights: VGG16's: ``features.N.weight`` (torchvision, timm), or a whole LPIPS (``net.sliceK.N.weight``). The classifier
            behind the features is not read.
        heads: ``linK.model.1.weight`` (lpips' ``weights/v0.1/vgg.pth``); empty: those in ``weights``, else torchmetrics' copy.

    Raises: InputError without a file, and for one that lacks a tensor or holds it in another shape, by its name.
    """
    if not weights:
        raise InputError(
            "loss.lpips needs VGG16's weights for ImageNet: loss.lpips_weights=<file, directory or Hub id>, such as "
            "torchvision's vgg16-397923af.pth or timm/vgg16.tv_in1k; or set loss.lpips=0"
        )
    read = read_weights(weights)
    state, problems = _named(read.state, channels)
    if not any(key.startswith("heads.") for key in state):
        file = heads or _torchmetrics_heads()
        state |= {
            key: value for key, value in _named(read_weights(file).state, channels)[0].items() if key.startswith("heads.")
        }
    elif heads:
        raise InputError(f"{read.source} has LPIPS' heads itself: leave loss.lpips_heads empty, got {heads}")
    model = LPIPS(channels)
    for key, value in model.named_parameters():
        if key not in state:
            source = (heads or read.source) if key.startswith("heads.") else read.source
            problems.append(f"{source} lacks {_public_name(key)}")
        elif state[key].shape != value.shape:
            problems.append(f"{_public_name(key)} has the shape {tuple(state[key].shape)}, wanted {tuple(value.shape)}")
    if problems:
        raise misfit("these are not LPIPS' weights over VGG16", problems)
    model.load_state_dict({**model.state_dict(), **{key: value.float() for key, value in state.items()}})
    return model


def _numbers() -> list[int]:
    return [number for stage in VGG16_CONVOLUTIONS for number in stage]


def _named(state: dict[str, Tensor], channels: tuple[int, ...]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under this module's names, and what is no VGG16: convolutions with other numbers, as VGG19's."""
    places = {number: place for place, number in enumerate(_numbers())}
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, value in state.items():
        if match := _HEAD.fullmatch(key):
            found[f"heads.{match[1]}"] = value.flatten() if int(match[1]) < len(channels) else value
        elif match := _CONVOLUTION.fullmatch(key):
            if int(match[1]) in places:
                found[f"convolutions.{places[int(match[1])]}.{match[2]}"] = value
            else:
                problems.append(f"unexpected {key}")
    return found, problems


def _public_name(key: str) -> str:
    kind, place, *rest = key.split(".")
    return f"lin{place}.model.1.weight" if kind == "heads" else f"features.{_numbers()[int(place)]}.{rest[0]}"


def _torchmetrics_heads() -> str:
    found = importlib.util.find_spec("torchmetrics")
    file = (
        None if found is None or found.origin is None else Path(found.origin).parent / "functional/image/lpips_models/vgg.pth"
    )
    if file is None or not file.is_file():
        raise InputError(
            "loss.lpips needs the linear heads: loss.lpips_heads=<lpips' weights/v0.1/vgg.pth>, or "
            "pip install 'textok-fast[eval]', whose torchmetrics brings them"
        )
    return str(file)
