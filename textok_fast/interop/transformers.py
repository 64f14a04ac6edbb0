"""Pictures in and out with the calls of transformers' image processors.

Once this module is imported, ``AutoImageProcessor.from_pretrained`` knows the class by the name in preprocessor_config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, BatchFeature, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from textok_fast.data.crops import center_square
from textok_fast.errors import InputError
from textok_fast.modeling.saving import read_config
from textok_fast.modeling.shipped import find_model
from textok_fast.modeling.tokenizer import TexTok, from_uint8, to_uint8


class TexTokImageProcessor(BaseImageProcessor):
    """Any pictures -> ``pixel_values`` for :class:`TexTok`, and its pictures -> PIL.

    What it does is in the attributes by which transformers' processors tell: ``size`` {"height": S, "width": S},
    ``do_center_crop``, ``do_resize``, ``resample``, ``do_rescale`` by ``rescale_factor``, ``do_normalize`` by ``image_mean``
    and ``image_std``.

    Args:
        size: S, or {"height": S, "width": S}; pictures become their center square of S x S.
        to_range: "signed" for [-1, 1], "unit" for [0, 1], in which TiTok's calls have their pictures, "bytes" for uint8
            (B, S, S, 3), which a TexTok and its engines take as they are.
    """

    model_input_names = ("pixel_values",)

    def __init__(self, size: int | Mapping[str, int] = 256, to_range: str = "signed", **kwargs: Any) -> None:
        if to_range not in ("signed", "unit", "bytes"):
            raise InputError(f"to_range must be signed, unit or bytes, got {to_range!r}")
        steps: dict[str, Any] = {"do_convert_rgb": True, "do_center_crop": True, "do_resize": True}
        steps |= {"do_rescale": to_range != "bytes", "do_normalize": to_range == "signed"}
        steps |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
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
    def of(cls, source: Any, **kwargs: Any) -> TexTokImageProcessor:
        """For a tokenizer, its engine, what has one as ``tokenizer`` (a :class:`TiTok`, whose range it then has, a pipeline),
        or the directory that a TexTok was saved in, or a pipeline with one, or the name of what comes with the package."""
        if isinstance(source, (str, Path)):
            size = read_config(TexTok.within(find_model(source))).get("image_size")
        else:
            size = getattr(getattr(getattr(source, "tokenizer", source), "config", None), "image_size", None)
        if size is None:
            got = source if isinstance(source, (str, Path)) else type(source).__name__
            raise InputError(f"wanted a tokenizer or its directory, got {got}")
        return cls(size, **{"to_range": getattr(source, "picture_range", "signed"), **kwargs})

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
        if not single and not isinstance(images, Iterable):
            raise InputError(f"wanted pictures, one or several, got {type(images).__name__}")
        many = [images] if single else list(images)
        if not many:
            raise InputError("got no pictures")
        side = (self.size if size is None else _square(size))["height"]
        pixels = torch.from_numpy(np.stack([center_square(_picture(each), side) for each in many]))  # (B, S, S, 3)
        values = pixels if self.to_range == "bytes" else from_uint8(pixels)
        if self.to_range == "unit":
            values = (values + 1) / 2
        return BatchFeature({"pixel_values": values.numpy() if return_tensors == "np" else values})

    def post_process(self, images: Any) -> list[Image.Image]:
        """What ``decode`` gives, float (B, 3, H, W) in [-1, 1], by "unit" in [0, 1], or uint8 (B, H, W, 3), or one of these
        without its batch -> PIL images. Numbers beyond the range are clamped to it.

        Raises: InputError for another shape or dtype.
        """
        if not isinstance(images, (Tensor, np.ndarray)):
            raise InputError(f"wanted a tensor or an array of pictures, got {type(images).__name__}")
        given = torch.as_tensor(images).detach()
        batch = given.unsqueeze(0) if given.ndim == 3 else given
        channels = -1 if given.dtype == torch.uint8 else 1
        known = given.dtype == torch.uint8 or given.is_floating_point()
        if not known or batch.ndim != 4 or batch.shape[channels] != 3:
            raise InputError(
                f"pictures are float (B, 3, H, W) or uint8 (B, H, W, 3), or one of them, got {given.dtype} {tuple(given.shape)}"
            )
        if given.dtype != torch.uint8:
            batch = to_uint8(2 * batch.float() - 1 if self.to_range == "unit" else batch)
        return [Image.fromarray(picture) for picture in batch.cpu().numpy()]


def _square(size: int | Mapping[str, int]) -> dict[str, int]:
    sides = list(size.values()) if isinstance(size, Mapping) else [size]
    numbers = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    named = not isinstance(size, Mapping) or set(size) <= {"height", "width", "shortest_edge"}
    if not numbers or not named or len(set(sides)) != 1:
        raise InputError(f"size must be S or {{'height': S, 'width': S}} with S of at least 1 pixel, got {size!r}")
    return {"height": sides[0], "width": sides[0]}


def _picture(given: Any) -> Image.Image:
    if isinstance(given, Image.Image):
        return given
    if isinstance(given, (str, Path)):
        try:
            with Image.open(given) as picture:
                picture.load()
                return picture
        except (OSError, ValueError, Image.DecompressionBombError) as error:  # UnidentifiedImageError is an OSError
            raise InputError(f"cannot read {given} as a picture: {error}") from None
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
