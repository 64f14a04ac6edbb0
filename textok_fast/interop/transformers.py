"""Pictures in and out with the calls of transformers' image processors.

Once this module is imported, ``AutoImageProcessor.from_pretrained`` knows the class by the name in preprocessor_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, BatchFeature, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from textok_fast.data.files import center_square
from textok_fast.errors import InputError
from textok_fast.modeling.saving import read_config
from textok_fast.modeling.tokenizer import TexTok, from_uint8, to_uint8


class TexTokImageProcessor(BaseImageProcessor):
    """Any pictures -> ``pixel_values`` for :class:`TexTok`, and its pictures -> PIL.

    What it does is in the attributes by which transformers' processors tell: ``size`` {"height": S, "width": S},
    ``do_center_crop``, ``do_resize``, ``resample``, ``do_rescale`` by ``rescale_factor``, ``do_normalize`` by ``image_mean``
    and ``image_std``.

    Args:
        size: S, or {"height": S, "width": S}; pictures become their center square of S x S.
        to_range: "signed" for [-1, 1], "bytes" for uint8 (B, S, S, 3), which a TexTok and its engines take as they are.
    """

    model_input_names = ("pixel_values",)

    def __init__(self, size: int | Mapping[str, int] = 256, to_range: str = "signed", **kwargs: Any) -> None:
        if to_range not in ("signed", "bytes"):
            raise InputError(f"to_range must be signed or bytes, got {to_range!r}")
        scaled = to_range == "signed"
        steps: dict[str, Any] = {"do_convert_rgb": True, "do_center_crop": True, "do_resize": True, "do_rescale": scaled}
        steps |= {"do_normalize": scaled, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
        self._steps = {**steps, "resample": int(Image.Resampling.LANCZOS)}
        self._require_same(kwargs)
        super().__init__(**{**kwargs, **self._steps})
        self.size, self.to_range = _square(size), to_range

    def _require_same(self, options: Mapping[str, Any]) -> None:
        """InputError for a step that is asked for otherwise than it is done here."""
        for name, value in options.items():
            if name in self._steps and value is not None and value != self._steps[name]:
                raise InputError(f"a TexTok's pictures have {name} = {self._steps[name]}, asked for {value}")

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "_steps"}

    @classmethod
    def of(cls, source: TexTok | str | Path, **kwargs: Any) -> TexTokImageProcessor:
        """For a tokenizer, its engine, or the directory that it was saved in."""
        path = source if isinstance(source, (str, Path)) else None
        given = vars(getattr(source, "config", object)) if path is None else read_config(Path(path))
        if "image_size" not in given:
            raise InputError(f"wanted a tokenizer or its directory, got {path or type(source).__name__}")
        return cls(given["image_size"], **kwargs)

    def preprocess(
        self, images: Any, return_tensors: str | None = "pt", size: int | Mapping[str, int] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Pictures, one or several, of any size -> ``pixel_values``.

        Args:
            images: PIL images, files, or uint8 arrays or tensors (H, W, 3) or (3, H, W).
            return_tensors: "pt" for a tensor, "np" for an array.
            size: other than the processor's own.
            kwargs: transformers' options, as far as they ask for what is done.

        Raises: InputError for something else than pictures, and options that ask for something else.
        """
        self._require_same(kwargs)
        if kwargs.get("data_format", kwargs.get("input_data_format")) not in (None, "channels_first"):
            raise InputError("pixel_values are (B, 3, S, S): leave data_format out, or take to_range='bytes' for (B, S, S, 3)")
        if unknown := sorted(
            set(kwargs) - set(self._steps) - {"data_format", "input_data_format", "disable_grouping", "device"}
        ):
            raise InputError(f"unknown options {', '.join(unknown)}; known: return_tensors, size, {', '.join(self._steps)}")
        if return_tensors not in (None, "pt", "np"):
            raise InputError(f"return_tensors must be pt or np, got {return_tensors!r}")
        single = isinstance(images, (Image.Image, str, Path)) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 3)
        many = [images] if single else list(images)
        if not many:
            raise InputError("got no pictures")
        side = (self.size if size is None else _square(size))["height"]
        pixels = torch.from_numpy(np.stack([center_square(_picture(each), side) for each in many]))  # (B, S, S, 3)
        values = pixels if self.to_range == "bytes" else from_uint8(pixels)
        return BatchFeature({"pixel_values": values.numpy() if return_tensors == "np" else values})

    def post_process(self, images: Tensor) -> list[Image.Image]:
        """What ``decode`` gives, float (B, 3, S, S) in [-1, 1] or uint8 (B, S, S, 3) -> PIL images."""
        images = torch.as_tensor(images)
        pictures = images if images.dtype == torch.uint8 else to_uint8(images)
        return [Image.fromarray(picture) for picture in pictures.cpu().numpy()]


def _square(size: int | Mapping[str, int]) -> dict[str, int]:
    sides = set(size.values()) if isinstance(size, Mapping) else {int(size)}
    if len(sides) != 1 or (isinstance(size, Mapping) and not set(size) <= {"height", "width", "shortest_edge"}):
        raise InputError(f"size must be S or {{'height': S, 'width': S}}, got {size}")
    (side,) = sides
    return {"height": side, "width": side}


def _picture(given: Any) -> Image.Image:
    if isinstance(given, Image.Image):
        return given
    if isinstance(given, (str, Path)):
        return Image.open(given)
    array = np.asarray(given)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise InputError(f"a picture is a PIL image or uint8 (H, W, 3), got {type(given).__name__} {array.dtype} {array.shape}")
    return Image.fromarray(array)


class _Config(PreTrainedConfig):
    """transformers looks processors up by their model's configuration."""

    model_type = TexTok.model_type


AutoImageProcessor.register(_Config, slow_image_processor_class=TexTokImageProcessor, exist_ok=True)
