"""Frozen vision encoders of transformers, and what a generator's tokens are aligned with them by."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast.errors import InputError
from textok_fast.modeling.dit import DiT, image_positions
from textok_fast.modeling.layers import CrossAttention
from textok_fast.modeling.text_encoders import TextFeatures

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionEncoder:
    """Patch features of pictures by a frozen model: pixels (B, 3, S, S) in [-1, 1] -> (B, M, D) float32, row by row.

    ``size``: the side that pictures are resized to. Class and register tokens before the patches' are left out.
    """

    def __init__(self, model: nn.Module, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.model, self.size = model.eval().requires_grad_(False), size
        device = next(model.parameters()).device
        self._mean, self._std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
        takes = inspect.signature(model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        self.patches, self.dim = self(torch.zeros(1, 3, size, size, device=device)).shape[1:]

    @classmethod
    def load(cls, source: str, image_size: int = 0, device: str | torch.device = "cpu") -> VisionEncoder:
        """A transformers model (DINOv2, ViT, CLIP or SigLIP, ...) from a directory or the Hub; ``image_size`` 0 is its own.

        Resized and normalized as its preprocessor_config.json says; without one by ImageNet's mean and deviation.
        Raises: InputError when it cannot be loaded, or is not a vision model.
        """
        from transformers import AutoModel
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            model = AutoModel.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load the vision encoder {source}: {str(error).splitlines()[0]}") from None
        try:
            given, _ = ImageProcessingMixin.get_image_processor_dict(source)
        except OSError:
            given = {}
        model = getattr(model, "vision_model", model)  # of CLIP and SigLIP
        if "pixel_values" not in inspect.signature(model.forward).parameters:
            raise InputError(f"{source} is a {type(model).__name__}, which reads no pictures")
        crop = given.get("crop_size") or given.get("size") or {}
        own = crop if isinstance(crop, int) else crop.get("height") or crop.get("shortest_edge")
        size: Any = image_size or own or getattr(model.config, "image_size", 224)
        mean, std = given.get("image_mean") or IMAGENET_MEAN, given.get("image_std") or IMAGENET_STD
        return cls(model.to(device), int(size), tuple(mean), tuple(std))

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        resized = F.interpolate(
            pixels.float(), size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False
        )
        x = ((resized.clamp(-1, 1) + 1) / 2 - self._mean) / self._std
        hidden: Tensor = self.model(pixel_values=x, **self._options).last_hidden_state  # (B, T, D), or (B, D, h, w)
        if hidden.ndim == 4:
            return hidden.flatten(2).transpose(1, 2).float()  # (B, h w, D)
        patch = getattr(self.model.config, "patch_size", None)
        count = (self.size // patch) ** 2 if isinstance(patch, int) else hidden.shape[1]
        return hidden[:, -count:].float() if count <= hidden.shape[1] else hidden.float()  # windows merge patches: all are left


class AlignmentHead(nn.Module):
    """1-D tokens (B, N, D) -> what they tell of M patches' features, (B, M, D_f).

    REPA (arXiv 2410.06940) projects the token at a place onto the feature of that place. 1-D tokens have no place: so a query
    for each patch, with the patch's position, reads them by cross-attention, as the tokenizer's decoder reads pixels out of
    them, and REPA's projection follows. Averages of tokens and features would need no attention, and say nothing of where
    things are.
    """

    def __init__(self, width: int, heads: int, hidden: int, patches: int, feature_dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(image_positions(width, patches))  # (M, D)
        self.norm = nn.LayerNorm(width)
        self.read = CrossAttention(width, heads)
        self.mlp = nn.Sequential(
            *(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, feature_dim))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        queries = self.queries.to(tokens.dtype).expand(len(tokens), -1, -1)  # (B, M, D)
        return self.mlp(queries + self.read(queries, self.norm(tokens), None))  # the sum, or the projection would know no place


class AlignedDiT(nn.Module):
    """A DiT in training, with an :class:`AlignmentHead` on its tokens after ``block`` blocks.

    Called as the DiT is; returns its output, and what the head makes of the tokens (B, M, D_f).
    """

    def __init__(self, dit: DiT, block: int, hidden: int, patches: int, feature_dim: int) -> None:
        super().__init__()
        self.dit, self.block = dit, block
        self.head = AlignmentHead(dit.config.width, dit.config.heads, hidden, patches, feature_dim)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        text: TextFeatures | None = None,
        image_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        dit = self.dit
        dit._check(x, t, y, text, image_tokens)
        tokens = None if dit.text_embedder is None else dit.text_embedder(text, len(x))
        modulations = dit.modulation(dit.condition(t, y))
        h, hidden = dit.run_blocks(dit.embed(x, image_tokens), modulations, tokens, stop=self.block)  # (B, N + M, D)
        told = self.head(h[:, : dit.config.sequence_length])
        if self.block < len(dit.blocks):
            _, hidden = dit.run_blocks(h, modulations, tokens, start=self.block)
        return dit.project(hidden), told


def alignment_loss(told: Tensor, features: Tensor) -> Tensor:
    """- cos(told, feature), the mean over patches: both (B, M, D_f) -> (B,) in [-1, 1] (REPA, arXiv 2410.06940, section
    3.2)."""
    if told.shape != features.shape or not math.prod(features.shape):
        raise InputError(
            f"features must be (B, M, D) as what is told of them, got {tuple(features.shape)}, {tuple(told.shape)}"
        )
    return -F.cosine_similarity(told.float(), features, dim=-1).mean(dim=1)
