"""Small, worn pictures out of good ones, as super-resolution trains on them: ``degradation_bsrgan`` of BSRGAN (Zhang et al.
2021, "Designing a Practical Degradation Model for Deep Blind Image Super-Resolution", arXiv 2103.14006; utils_blindsr.py of
its code).

At scale 4 a quarter of the pictures are first halved and go on at scale 2 ("downsample1"). Then blur (twice), resampling
("downsample2"), the step to the final size ("downsample3"), noise and JPEG come in a random order, in which resampling is
before the final size; JPEG at the final size ends it. Of the original there is all but the camera's sensor noise, which needs a
learned ISP, and the crop. None of it moves the picture: pixel i of the small one lies at the middle of its ``scale`` pixels.
"""

from __future__ import annotations

import functools
import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from textok_fast.errors import InputError

JPEG_QUALITY = (30, 95)
NOISE_LEVEL = (2, 25)  # of 255
HALVED_FIRST = 0.25  # of the pictures that get 4 times smaller
RESAMPLING = ("bilinear", "bicubic", "area")


def degrade(
    image: np.ndarray, scale: int, *, seed: int = 0, epoch: int = 0, index: int = 0, strength: float = 1.0
) -> np.ndarray:
    """``image`` (S, S, 3) uint8, worn and ``scale`` times smaller: (S / scale, S / scale, 3) uint8.

    What happens to it is drawn from (``seed``, ``epoch``, ``index``) alone. ``strength`` in [0, 1] takes the widths of blurs,
    the factors of resampling, the noise and the losses of JPEG down in proportion; 0 is bicubic resampling alone.

    Raises: InputError for another form of picture, a side that ``scale`` does not divide, or another strength.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"a picture is (S, S, 3) uint8, got {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    if scale < 1 or height % scale or width % scale:
        raise InputError(f"a picture of {width} x {height} does not get {scale} times smaller")
    if not 0 <= strength <= 1:
        raise InputError(f"strength must be in [0, 1], got {strength}")
    size = (height // scale, width // scale)
    if strength == 0:
        return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return _Wear(scale, size, strength, np.random.default_rng([seed, epoch, index]))(image)


class _Wear:
    """One draw of the degradations. Pictures inside are (1, 3, h, w) float32 in [0, 1]."""

    def __init__(self, scale: int, size: tuple[int, int], strength: float, rng: np.random.Generator) -> None:
        self.scale, self.size, self.strength, self.rng = scale, size, strength, rng

    def __call__(self, image: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1).unsqueeze(0)
        if self.scale == 4 and self.rng.random() < HALVED_FIRST:
            x, self.scale = self.halve(x), 2
        steps = [self.blur, self.blur, self.resample, self.finish, self.noise, self.maybe_jpeg]
        order = self.rng.permutation(len(steps)).tolist()
        first, last = order.index(2), order.index(3)
        if first > last:
            order[first], order[last] = order[last], order[first]
        for step in order:
            x = steps[step](x)
        return _as_uint8(self.jpeg(x))

    def halve(self, x: Tensor) -> Tensor:
        """By any resampling, or by MATLAB's bicubic one."""
        if self.rng.random() < 0.5:
            return resized(x, (x.shape[2] // 2, x.shape[3] // 2), self.resampling())
        return halved(x)

    def blur(self, x: Tensor) -> Tensor:
        """By a Gaussian, round or not, of a random size of kernel."""
        size = 2 * int(self.rng.integers(2, 12)) + 3
        if self.rng.random() < 0.5:
            variances = (4.0 + self.scale) * self.rng.random(2)
        else:
            variances = np.full(2, ((2.0 + 0.2 * self.scale) * self.rng.random()) ** 2)
        return filtered(x, gaussian_kernel(size, variances * self.strength**2, math.pi * self.rng.random()))

    def resample(self, x: Tensor) -> Tensor:
        """To a size between this one and half the final one; a quarter of the time by a Gaussian and every n-th pixel."""
        if self.rng.random() < 0.75:
            factor = 1 + self.strength * (self.rng.uniform(1, 2 * self.scale) - 1)
            return resized(x, self._sides(x, factor), self.resampling())
        sigma = self.strength * self.rng.uniform(0.1, 0.6 * self.scale)
        kernel = gaussian_kernel(25, np.full(2, sigma**2), 0.0)
        return filtered(x, shifted(kernel, self.scale))[:, :, :: self.scale, :: self.scale].clamp(0, 1)

    def finish(self, x: Tensor) -> Tensor:
        return resized(x, self.size, self.resampling())

    def resampling(self) -> str:
        return str(self.rng.choice(RESAMPLING))

    def noise(self, x: Tensor) -> Tensor:
        """Gaussian: of each colour for itself, of all alike, or correlated."""
        kind, level = self.rng.random(), self.strength * self.rng.integers(NOISE_LEVEL[0], NOISE_LEVEL[1] + 1) / 255
        shape = (*x.shape[2:], 3)
        if kind > 0.6:
            noise = level * self.rng.standard_normal(shape)
        elif kind < 0.4:
            noise = level * self.rng.standard_normal((*shape[:2], 1)).repeat(3, axis=2)
        else:
            axes = np.linalg.svd(self.rng.random((3, 3)))[0]
            covariance = np.abs(axes.T @ np.diag(self.rng.random(3)) @ axes)  # of colours
            top = self.strength * NOISE_LEVEL[1] / 255
            # By the root that is unique: another LAPACK's noise is the same.
            noise = top * self.rng.standard_normal(shape) @ np.linalg.cholesky(covariance + 1e-9 * np.eye(3)).T
        return (x + torch.from_numpy(noise.astype(np.float32)).permute(2, 0, 1)).clamp(0, 1)

    def maybe_jpeg(self, x: Tensor) -> Tensor:
        return self.jpeg(x) if self.rng.random() < 0.9 else x

    def jpeg(self, x: Tensor) -> Tensor:
        quality = int(self.rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1))
        buffer = io.BytesIO()
        Image.fromarray(_as_uint8(x)).save(buffer, format="JPEG", quality=round(100 - self.strength * (100 - quality)))
        read = np.asarray(Image.open(buffer).convert("RGB"), dtype=np.float32) / 255
        return torch.from_numpy(read).permute(2, 0, 1).unsqueeze(0)

    def _sides(self, x: Tensor, factor: float) -> tuple[int, int]:
        height, width = (max(1, int(side / factor)) for side in x.shape[2:])
        return height, width


def gaussian_kernel(size: int, variances: np.ndarray, angle: float) -> Tensor:
    """(size, size), summing to 1: the density of a Gaussian with ``variances`` (2,), in pixels squared, along axes at
    ``angle``.

    A variance of 0 is a sharp axis, which leaves the pixels where they are.
    """
    axes = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    precision = axes @ np.diag(1 / np.maximum(variances, 1e-6)) @ axes.T
    place = np.arange(size) - (size - 1) / 2
    grid = np.stack(np.meshgrid(place, place, indexing="xy"), axis=-1)  # (size, size, 2): x, y
    density = np.exp(-0.5 * np.einsum("hwi,ij,hwj->hw", grid, precision, grid))
    return torch.from_numpy((density / density.sum()).astype(np.float32))


def shifted(kernel: Tensor, scale: int) -> Tensor:
    """``kernel`` (k, k) moved up and left by (scale - 1) / 2 pixels, between pixels linearly; sums to 1.

    With it :func:`filtered` has at pixel ``scale`` * i what lies in the middle of the pixels from there to ``scale`` * (i + 1).
    """
    place = np.arange(len(kernel))
    there = np.minimum(place + (scale - 1) / 2, place[-1])
    moved = kernel.numpy().astype(np.float64)
    for axis in (0, 1):
        moved = np.apply_along_axis(lambda line: np.interp(there, place, line), axis, moved)
    return torch.from_numpy((moved / moved.sum()).astype(np.float32))


def filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """x (1, C, h, w) convolved with an odd ``kernel`` (k, k); beyond the border the picture is mirrored at the last pixel.

    Through numpy's Fourier transform: of 25 x 25 pixels at 256 px that is many times faster than a sum, and the same in a
    loader's worker as in a process of more threads.
    """
    edge = len(kernel) - 1
    rows, columns = (_mirrored(side, edge // 2) for side in x.shape[2:])
    padded = x[:, :, rows][..., columns].numpy()
    size = padded.shape[2:]
    spectrum = np.fft.rfft2(padded) * np.fft.rfft2(kernel.numpy(), s=size)
    # Convolved around the edges: what comes before all of the kernel fits into the picture is dropped.
    return torch.from_numpy(np.fft.irfft2(spectrum, s=size)[..., edge:, edge:]).to(x.dtype)


def _mirrored(side: int, margin: int) -> Tensor:
    """The pixels of a side with ``margin`` more at both ends, however few there are: of 3 and 2: 2 1 0 1 2 1 0."""
    there = torch.arange(-margin, side + margin)
    period = max(1, 2 * (side - 1))
    there = there % period
    return torch.minimum(there, period - there) if side > 1 else torch.zeros_like(there)


def resized(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """x (1, C, h, w) to ``size``, as OpenCV does: without a filter against aliasing but for "area", which averages what a pixel
    covers."""
    if mode == "area":
        rows, columns = (_covering(old, new) for old, new in zip(x.shape[2:], size, strict=True))
        return (rows @ x @ columns.T).clamp(0, 1)
    return F.interpolate(x, size=size, mode=mode, align_corners=False).clamp(0, 1)


@functools.lru_cache(maxsize=256)
def _covering(old: int, new: int) -> Tensor:
    """(new, old): the share of pixel i of ``new`` ones that lies on pixel j of ``old`` ones."""
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    left, right = edges[:-1, None], edges[1:, None]
    pixel = torch.arange(old, dtype=torch.float64)
    overlap = (torch.minimum(right, pixel + 1) - torch.maximum(left, pixel)).clamp(min=0)
    return (overlap * new / old).float()


def halved(x: Tensor) -> Tensor:
    """x (1, C, h, w) with half its sides, by MATLAB's ``imresize``: bicubic over twice as many pixels; beyond the border the
    picture is mirrored with its last pixel."""
    margin = 4  # pixels that the widened cubic reaches beyond the border, and so 2 of the result
    rows, columns = (_mirrored_whole(side, margin) for side in x.shape[2:])
    padded = x[:, :, rows][..., columns]
    size = (padded.shape[2] // 2, padded.shape[3] // 2)
    made = F.interpolate(padded, size=size, mode="bicubic", antialias=True, align_corners=False)
    return made[:, :, margin // 2 : -margin // 2, margin // 2 : -margin // 2].clamp(0, 1)


def _mirrored_whole(side: int, margin: int) -> Tensor:
    """As :func:`_mirrored`, the last pixel being there twice: of 3 and 2: 1 0 0 1 2 2 1."""
    there = torch.arange(-margin, side + margin) % (2 * side)
    return torch.minimum(there, 2 * side - 1 - there)


def _as_uint8(x: Tensor) -> np.ndarray:
    levels: np.ndarray = (x[0].permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return levels
