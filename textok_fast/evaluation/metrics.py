"""How close a reconstruction is to its original: PSNR and SSIM.

Both are computed image by image on pixels scaled to [0, 1] (data range 1, which is 2 for images in [-1, 1] and 255 for
uint8) and averaged over the images, as reconstruction tables of tokenizers are. Needs torchmetrics (extra ``eval``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textok_fast.errors import InputError

SSIM_WINDOW = 11  # pixels; the Gaussian window of Wang et al. (2004), sigma 1.5. The same for 64 px pictures as for 512 px ones
SSIM_SIGMA = 1.5
CHUNK = 64  # images at a time: SSIM keeps five filtered copies of them

Images = Tensor | np.ndarray


def psnr(original: Images, reconstruction: Images) -> float:
    """Peak signal-to-noise ratio in dB, the mean over the images of ``-10 log10(MSE of the image)`` at data range 1.

    ``original``, ``reconstruction``: uint8 (B, H, W, 3) or (B, 3, H, W), or float (B, 3, H, W) in [-1, 1]; the two may differ
    in form. What a reconstruction has outside [-1, 1] is clipped, as it is when a picture is written. Equal images give
    ``inf``. Raises :class:`InputError` for another shape, dtype or range, NaN, or two batches of different size.
    """
    return float(torch.cat([_psnr(a, b) for a, b in _chunks(original, reconstruction)]).mean())


def ssim(original: Images, reconstruction: Images) -> float:
    """Structural similarity (Wang et al. 2004), the mean over the images; 1 for equal ones.

    Gaussian window of 11 x 11 pixels with sigma 1.5, k1 = 0.01, k2 = 0.03, colour channels averaged, only windows that lie
    inside the image, as in the authors' code. The window does not shrink with the picture, so at 64 px it sees a larger part
    of the scene than at 256 px: compare values of one resolution only. Images as for :func:`psnr`, at least 11 px on each side.
    """
    return float(torch.cat([_ssim(a, b) for a, b in _chunks(original, reconstruction, smallest=SSIM_WINDOW)]).mean())


def reconstruction_metrics(original: Images, reconstruction: Images) -> dict[str, float]:
    """``{"psnr": dB, "ssim": 0..1, "images": B}`` of :func:`psnr` and :func:`ssim`."""
    each = picture_metrics(original, reconstruction)
    return {"psnr": float(each["psnr"].mean()), "ssim": float(each["ssim"].mean()), "images": len(each["psnr"])}


def picture_metrics(original: Images, reconstruction: Images) -> dict[str, Tensor]:
    """``psnr`` and ``ssim`` (B,) float32 of each picture, of which :func:`psnr` and :func:`ssim` are the means."""
    pairs = [(_psnr(a, b), _ssim(a, b)) for a, b in _chunks(original, reconstruction, smallest=SSIM_WINDOW)]
    peak, structure = zip(*pairs, strict=True)
    return {"psnr": torch.cat(peak), "ssim": torch.cat(structure)}


def _psnr(original: Tensor, reconstruction: Tensor) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(reconstruction, original, data_range=1.0, reduction="none", dim=(1, 2, 3))  # (B,)


def _ssim(original: Tensor, reconstruction: Tensor) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, every_pixel = structural_similarity_index_measure(
        reconstruction,
        original,
        sigma=SSIM_SIGMA,
        kernel_size=SSIM_WINDOW,
        reduction="none",
        data_range=1.0,
        return_full_image=True,
    )  # (B, 3, H, W)
    # torchmetrics mirrors the picture at its borders and averages those windows too, which moves a 64 px picture's value a lot.
    margin = SSIM_WINDOW // 2
    return every_pixel[..., margin:-margin, margin:-margin].mean(dim=(1, 2, 3))  # (B,)


def _chunks(original: Images, reconstruction: Images, smallest: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Checked pairs of float32 (<=CHUNK, 3, H, W) in [0, 1], on the CPU."""
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise InputError(f"PSNR and SSIM need torchmetrics: pip install 'textok-fast[eval]' ({error})") from None
    first, second = _tensor(original, "original"), _tensor(reconstruction, "reconstruction")
    shape, other = _channels_first(first).shape, _channels_first(second).shape
    if shape != other:
        raise InputError(f"original and reconstruction must have the same (B, 3, H, W), got {tuple(shape)} and {tuple(other)}")
    if min(shape[2:]) < smallest:
        raise InputError(f"SSIM needs pictures of at least {smallest} x {smallest} px, got {shape[2]} x {shape[3]}")
    for start in range(0, shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        yield _unit(first[part], "original", limit=1.0), _unit(second[part], "reconstruction", limit=10.0)


def _tensor(images: Any, name: str) -> Tensor:
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
    if not isinstance(images, Tensor):
        raise InputError(f"{name} must be a tensor or an array of images, got {type(images).__name__}")
    is_bytes = images.dtype == torch.uint8
    if not (is_bytes or images.is_floating_point()):
        raise InputError(f"{name} must be uint8, or float in [-1, 1], got {images.dtype}")
    channel_places = (1, 3) if is_bytes else (1,)
    if images.ndim != 4 or 0 in images.shape or all(images.shape[place] != 3 for place in channel_places):
        wanted = "(B, H, W, 3)" if is_bytes else "(B, 3, H, W)"
        raise InputError(f"{name} must be {wanted} with at least one image for {images.dtype}, got {tuple(images.shape)}")
    return images.detach()


def _channels_first(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2) if images.dtype == torch.uint8 and images.shape[3] == 3 else images  # (B, 3, H, W)


def _unit(images: Tensor, name: str, limit: float) -> Tensor:
    """float32 (B, 3, H, W) in [0, 1]. ``limit``: the largest absolute float value that is taken for a picture in [-1, 1]."""
    pixels = _channels_first(images).to("cpu", torch.float32)  # (B, 3, H, W)
    if images.dtype == torch.uint8:
        return pixels / 255
    if not torch.isfinite(pixels).all():
        raise InputError(f"{name} has NaN or infinite pixels")
    largest = float(pixels.abs().max())
    if largest > limit + 1e-3:
        raise InputError(f"{name} must be float in [-1, 1], found {largest:.4g}; give pictures in 0..255 as uint8")
    return (pixels.clamp(-1, 1) + 1) / 2
