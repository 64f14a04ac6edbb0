"""The tokenizer as the token shards want it: a function that encodes, and a description of who encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from textok_fast.config import to_dict
from textok_fast.modeling.autoencoder import LatentTokenizer
from textok_fast.modeling.tokenizer import TexTok


def encode_function(tokenizer: TexTok | LatentTokenizer) -> Callable[[Tensor, list[str]], dict[str, Tensor]]:
    """uint8 pictures and captions -> {tokens (B, N, d) or (B, C, h, w) float32, indices (B, N) for VQ and FSQ}."""

    def encode(images: Tensor, captions: list[str]) -> dict[str, Tensor]:
        tokens = tokenizer.encode(images, captions)
        out = {"tokens": tokens.as_subclass(Tensor).float()}
        return out if tokens.indices is None else {**out, "indices": tokens.indices}

    return encode


def reads_captions(tokenizer: Any) -> bool:
    """Whether captions change a tokenizer's tokens."""
    return isinstance(tokenizer, TexTok) and tokenizer.config.text_in_encoder


def token_identity(tokenizer: TexTok | LatentTokenizer, data: dict[str, Any]) -> dict[str, Any]:
    """What a directory of tokens records about its making: the tokenizer's weights by hash, its configuration, the data.

    Which of the pictures they are is told by the hash of these, so the settings that hold some out are left out.
    """
    data = {name: value for name, value in data.items() if not name.startswith("validation_")}
    if isinstance(options := data.get("huggingface"), dict):
        data["huggingface"] = {name: value for name, value in options.items() if name != "validation_split"}
    return {"tokenizer": fingerprint(tokenizer), "tokenizer_config": to_dict(tokenizer.config), "data": data}


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
