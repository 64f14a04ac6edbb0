"""Pictures in and out with the calls of transformers' image processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from textok_fast.data.files import center_square
from textok_fast.errors import InputError
from textok_fast.modeling.saving import read_config
from textok_fast.modeling.tokenizer import TexTok, from_uint8, to_uint8


class TexTokImageProcessor(BaseImageProcessor):
    """Any pictures -> ``pixel_values`` for :class:`TexTok`, and its pictures -> PIL.

    Args:
        size: S; pictures become their center square of S x S.
        to_range: "signed" for [-1, 1], "bytes" for uint8 (B, S, S, 3), which a TexTok and its engines take as they are.
    """

    model_input_names = ("pixel_values",)

    def __init__(self, size: int = 256, to_range: str = "signed", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if to_range not in ("signed", "bytes"):
            raise InputError(f"to_range must be signed or bytes, got {to_range!r}")
        self.size, self.to_range = int(size), to_range

    @classmethod
    def of(cls, source: TexTok | str | Path, **kwargs: Any) -> TexTokImageProcessor:
        """For a tokenizer, its engine, or the directory that it was saved in."""
        path = source if isinstance(source, (str, Path)) else None
        given = vars(getattr(source, "config", object)) if path is None else read_config(Path(path))
        if "image_size" not in given:
            raise InputError(f"wanted a tokenizer or its directory, got {path or type(source).__name__}")
        return cls(given["image_size"], **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """PIL images, files or uint8 arrays (H, W, 3), one or several, of any size -> ``pixel_values``.

        Args:
            return_tensors: "pt" for a tensor, "np" for an array.

        Raises: InputError for something else than pictures.
        """
        single = isinstance(images, (Image.Image, str, Path)) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 3)
        many = [images] if single else list(images)
        if not many:
            raise InputError("got no pictures")
        pixels = torch.from_numpy(np.stack([center_square(_picture(each), self.size) for each in many]))  # (B, S, S, 3)
        values = pixels if self.to_range == "bytes" else from_uint8(pixels)
        if return_tensors not in (None, "pt", "np"):
            raise InputError(f"return_tensors must be pt or np, got {return_tensors!r}")
        return BatchFeature({"pixel_values": values.numpy() if return_tensors == "np" else values})

    def post_process(self, images: Tensor) -> list[Image.Image]:
        """What ``decode`` gives, float (B, 3, S, S) in [-1, 1] or uint8 (B, S, S, 3) -> PIL images."""
        images = torch.as_tensor(images)
        pictures = images if images.dtype == torch.uint8 else to_uint8(images)
        return [Image.fromarray(picture) for picture in pictures.cpu().numpy()]


def _picture(given: Any) -> Image.Image:
    if isinstance(given, Image.Image):
        return given
    if isinstance(given, (str, Path)):
        return Image.open(given)
    array = np.asarray(given)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise InputError(f"a picture is a PIL image or uint8 (H, W, 3), got {type(given).__name__} {array.dtype} {array.shape}")
    return Image.fromarray(array)
