"""The Inception network whose features FID is defined on, torchvision-free.

It is the classifier of TensorFlow's ``inception-2015-12-05`` archive, which FID (Heusel et al. 2017, arXiv 1706.08500), ADM's
evaluator and published FIDs use, in the layout of its PyTorch port (pytorch-fid, torch-fidelity): torchvision's Inception v3
with 1,008 classes, average pools that leave the border's zeros out, and a maximum pool in the last block.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textok_fast.data.storage import is_url
from textok_fast.errors import InputError
from textok_fast.evaluation.downloads import cached_path, download, file_sha256, require_sha256
from textok_fast.interop.weights import read_weights
from textok_fast.modeling.saving import load_state

PUBLISHED_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # torch-fidelity's file is the same
INPUT_SIZE = 299  # pixels
SPATIAL_CHANNELS = 7  # of mixed_6/conv, for sFID: 7 x 17 x 17 = 2,023 numbers, about as many as pool_3 has
NARROW = (1, 2, 4, 8, 16)  # the published network, and those that tests can afford

Channels = Callable[[int], int]  # the published number of channels -> this network's


class InceptionFeatures(NamedTuple):
    """What the metrics read of B pictures, float32."""

    pool: Tensor  # (B, 2048) pool_3: FID, precision, recall, and through ``logits`` the inception score
    spatial: Tensor  # (B, 2023) the first 7 channels of mixed_6/conv, row by row, channels last: sFID


class FIDInception(nn.Module):
    """Pictures -> :class:`InceptionFeatures`.

    Args:
        narrow: of :data:`NARROW`, divides all numbers of channels, and the classes; 1 is the published network.
    """

    def __init__(self, narrow: int = 1) -> None:
        super().__init__()
        if narrow not in NARROW:
            raise InputError(f"narrow must be one of {', '.join(map(str, NARROW))}, got {narrow}")

        def n(channels: int) -> int:
            return channels // narrow

        self.Conv2d_1a_3x3 = _Conv(3, n(32), 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(n(32), n(32), 3)
        self.Conv2d_2b_3x3 = _Conv(n(32), n(64), 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(n(64), n(80), 1)
        self.Conv2d_4a_3x3 = _Conv(n(80), n(192), 3)
        self.Mixed_5b = _BlockA(n, 192, 32)
        self.Mixed_5c = _BlockA(n, 256, 64)
        self.Mixed_5d = _BlockA(n, 288, 64)
        self.Mixed_6a = _BlockB(n, 288)
        self.Mixed_6b = _BlockC(n, 768, 128)
        self.Mixed_6c = _BlockC(n, 768, 160)
        self.Mixed_6d = _BlockC(n, 768, 160)
        self.Mixed_6e = _BlockC(n, 768, 192)
        self.Mixed_7a = _BlockD(n, 768)
        self.Mixed_7b = _BlockE(n, 1280, _average_pool)
        self.Mixed_7c = _BlockE(n, 2048, _maximum_pool)
        self.fc = nn.Linear(n(2048), n(1008))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> InceptionFeatures:
        """``pictures``: uint8, or float in [0, 255], (B, 3, H, W)."""
        x = resize_like_tensorflow(pictures.to(self.fc.weight.dtype), INPUT_SIZE)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6d(x)  # TensorFlow's mixed_6; its first branch, the first channels here, is mixed_6/conv
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7), as TensorFlow orders them
        x = self.Mixed_7a(self.Mixed_6e(x))
        x = self.Mixed_7c(self.Mixed_7b(x))
        return InceptionFeatures(x.mean(dim=(2, 3)).float(), spatial.float())

    @torch.no_grad()
    def logits(self, pool: Tensor) -> Tensor:
        """pool (B, 2048) -> (B, 1008), without the bias, as ADM's evaluator and torch-fidelity compute the inception score."""
        return F.linear(pool.to(self.fc.weight), self.fc.weight)


def resize_like_tensorflow(pictures: Tensor, size: int) -> Tensor:
    """(B, C, H, W) float -> (B, C, size, size) by TensorFlow 1's ``resize_bilinear``: row i is read at i H / size, not at pixel
    centres, and nothing is filtered when shrinking."""
    for dim in (3, 2):
        length = pictures.shape[dim]
        scale = torch.tensor(length, dtype=torch.float32) / size
        at = torch.arange(size, dtype=torch.float32, device=pictures.device) * scale.to(pictures.device)
        low = at.long().clamp_max(length - 1)
        high = (low + 1).clamp_max(length - 1)
        shape = [1, 1, 1, 1]
        shape[dim] = size
        share = (at - low).to(pictures.dtype).reshape(shape)
        first, second = pictures.index_select(dim, low), pictures.index_select(dim, high)
        pictures = first + (second - first) * share
    return pictures


# -- the blocks, by torchvision's names of their parts ----------------------------------------------------------------------


class _Conv(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _across(inputs: int, outputs: int, length: int) -> _Conv:
    return _Conv(inputs, outputs, (1, length), padding=(0, length // 2))


def _down(inputs: int, outputs: int, length: int) -> _Conv:
    return _Conv(inputs, outputs, (length, 1), padding=(length // 2, 0))


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class _BlockA(nn.Module):
    def __init__(self, n: Channels, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(n(inputs), n(64), 1)
        self.branch5x5_1 = _Conv(n(inputs), n(48), 1)
        self.branch5x5_2 = _Conv(n(48), n(64), 5, padding=2)
        self.branch3x3dbl_1 = _Conv(n(inputs), n(64), 1)
        self.branch3x3dbl_2 = _Conv(n(64), n(96), 3, padding=1)
        self.branch3x3dbl_3 = _Conv(n(96), n(96), 3, padding=1)
        self.branch_pool = _Conv(n(inputs), n(pooled), 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average_pool(x))], dim=1)


class _BlockB(nn.Module):
    def __init__(self, n: Channels, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(n(inputs), n(384), 3, stride=2)
        self.branch3x3dbl_1 = _Conv(n(inputs), n(64), 1)
        self.branch3x3dbl_2 = _Conv(n(64), n(96), 3, padding=1)
        self.branch3x3dbl_3 = _Conv(n(96), n(96), 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class _BlockC(nn.Module):
    def __init__(self, n: Channels, inputs: int, middle: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(n(inputs), n(192), 1)
        self.branch7x7_1 = _Conv(n(inputs), n(middle), 1)
        self.branch7x7_2 = _across(n(middle), n(middle), 7)
        self.branch7x7_3 = _down(n(middle), n(192), 7)
        self.branch7x7dbl_1 = _Conv(n(inputs), n(middle), 1)
        self.branch7x7dbl_2 = _down(n(middle), n(middle), 7)
        self.branch7x7dbl_3 = _across(n(middle), n(middle), 7)
        self.branch7x7dbl_4 = _down(n(middle), n(middle), 7)
        self.branch7x7dbl_5 = _across(n(middle), n(192), 7)
        self.branch_pool = _Conv(n(inputs), n(192), 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average_pool(x))], dim=1)


class _BlockD(nn.Module):
    def __init__(self, n: Channels, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(n(inputs), n(192), 1)
        self.branch3x3_2 = _Conv(n(192), n(320), 3, stride=2)
        self.branch7x7x3_1 = _Conv(n(inputs), n(192), 1)
        self.branch7x7x3_2 = _across(n(192), n(192), 7)
        self.branch7x7x3_3 = _down(n(192), n(192), 7)
        self.branch7x7x3_4 = _Conv(n(192), n(192), 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class _BlockE(nn.Module):
    def __init__(self, n: Channels, inputs: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.branch1x1 = _Conv(n(inputs), n(320), 1)
        self.branch3x3_1 = _Conv(n(inputs), n(384), 1)
        self.branch3x3_2a = _across(n(384), n(384), 3)
        self.branch3x3_2b = _down(n(384), n(384), 3)
        self.branch3x3dbl_1 = _Conv(n(inputs), n(448), 1)
        self.branch3x3dbl_2 = _Conv(n(448), n(384), 3, padding=1)
        self.branch3x3dbl_3a = _across(n(384), n(384), 3)
        self.branch3x3dbl_3b = _down(n(384), n(384), 3)
        self.branch_pool = _Conv(n(inputs), n(192), 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))]
        return torch.cat(parts, dim=1)


# -- weights ----------------------------------------------------------------------------------------------------------------


class InceptionWeights(NamedTuple):
    """A network and where it comes from. Only ``published`` ones give what may be called FID."""

    network: FIDInception
    sha256: str  # of the file
    published: bool


def find_inception(source: str = "", sha256: str = "") -> Path:
    """The file of Inception's weights; InputError, saying what to do, where there is none.

    Args:
        source: a file; an http(s) URL, or "published" for :data:`PUBLISHED_URL`, downloaded once into the cache; "" for the one
            that an earlier download left there.
        sha256: what the file must have. A URL needs it, but for the published one, whose is known.
    """
    if source and source != "published" and not is_url(source):
        path = Path(source).expanduser()
        if not path.is_file():
            raise InputError(f"no file {source}: give Inception's weights, or 'published' to download them")
        return require_sha256(path, sha256)
    url = PUBLISHED_URL if source in ("", "published") else source
    wanted = sha256 or (PUBLISHED_SHA256 if url == PUBLISHED_URL else "")
    if not source and not cached_path(url, wanted, "inception").is_file():
        raise InputError(
            f"Inception's weights are not here: --inception published downloads them once (95 MB, {PUBLISHED_URL}), "
            "--inception FILE takes a copy"
        )
    return download(url, wanted, "inception")


def load_inception(path: str | Path, device: str | torch.device = "cpu") -> InceptionWeights:
    """Reads a state dict, as :func:`textok_fast.interop.weights.read_weights` does; the width is that of its shapes.

    Raises InputError, naming the key, for other weights, such as torchvision's own Inception.
    """
    path = Path(path)
    state = read_weights(path).state
    first = state.get("Conv2d_1a_3x3.conv.weight")
    if first is None or first.ndim != 4 or 32 // first.shape[0] not in NARROW:
        raise InputError(f"{path} has no Conv2d_1a_3x3.conv.weight (32, 3, 3, 3): it is no Inception in pytorch-fid's layout")
    network = FIDInception(32 // first.shape[0])
    own = network.state_dict()
    # The published file was written before batch norms counted batches, and nothing reads the count.
    state = {**{key: value for key, value in own.items() if key.endswith("num_batches_tracked")}, **state}
    load_state(network, state, str(path))
    digest = file_sha256(path)
    return InceptionWeights(network.to(device).eval(), digest, digest == PUBLISHED_SHA256)
