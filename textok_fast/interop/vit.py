"""What the converters of other people's ViT tokenizers share."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor

from textok_fast.config import TexTokConfig
from textok_fast.modeling.saving import load_state
from textok_fast.modeling.tokenizer import TexTok


def config_of(encoder: tuple[int, int, int], decoder: tuple[int, int, int], options: dict[str, Any]) -> TexTokConfig:
    """The configuration of a tokenizer whose sides have (width, depth, heads)."""
    sizes: dict[str, Any] = {"width": encoder[0], "encoder_depth": encoder[1], "heads": encoder[2], "decoder_depth": decoder[1]}
    if decoder[0] != encoder[0] or decoder[2] != encoder[2]:
        sizes |= {"decoder_width": decoder[0], "decoder_heads": decoder[2]}
    return TexTokConfig(**sizes, **options)


def pixel_rows(values: Tensor, patch_size: int) -> Tensor:
    """Rows of a patch's numbers in the order row, column, channel (p p 3, ...) -> channel, row, column, as ours are."""
    return values.unflatten(0, (patch_size, patch_size, 3)).movedim(2, 0).flatten(0, 2)


def load_texttok(config: TexTokConfig, state: dict[str, Tensor]) -> TexTok:
    """A TexTok in eval mode and float32 with these values; InputError naming the keys that do not fit."""
    model = TexTok(config)
    load_state(model, {name: value.float().contiguous() for name, value in state.items()}, "the given state dict")
    return model.eval()


def core_of(tokenizer: Any) -> Any:
    """The TexTok itself, or the one inside an engine, whose encoder and decoder are the engine's."""
    return tokenizer if isinstance(tokenizer, TexTok) else tokenizer.model


def backends_of(tokenizer: Any) -> Any:
    """The context that the encoder and the decoder of :func:`core_of` run in."""
    return contextlib.nullcontext() if isinstance(tokenizer, TexTok) else tokenizer._backends()
