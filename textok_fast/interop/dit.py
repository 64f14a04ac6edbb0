"""Weights of the public DiT and of SiT/DiT over 1-D tokens (the layout of facebookresearch/DiT's state dict)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from textok_fast.config import DiTConfig
from textok_fast.errors import InputError
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.saving import load_state

# Attention heads by width in the published sizes; the shapes of a state dict do not tell.
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


def load_dit(state: dict[str, Tensor], heads: int | None = None, learn_sigma: bool | None = None) -> DiT:
    """A :class:`DiT` in eval mode from a peer's state dict; sizes are read from the shapes.

    Args:
        state: the peer's tensors by name: 2-D patches (``x_embedder.proj.weight`` of 4 dimensions) or 1-D tokens.
        heads: attention heads; None for the published number at that width.
        learn_sigma: whether the output carries variance channels; None reads it from the shapes.

    Raises: InputError naming a missing, unexpected or misshapen key, or an unknown number of heads.
    """
    state = dict(state)
    try:
        config = _read_config(state, heads)
        if config["input_size"]:
            p, c_out = config["patch_size"], len(state["final_layer.linear.bias"]) // config["patch_size"] ** 2
            state["x_embedder.weight"] = state.pop("x_embedder.proj.weight").flatten(1)  # (D, C p p)
            state["x_embedder.bias"] = state.pop("x_embedder.proj.bias")
            for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
                # The peer writes a patch as row, column, channel; ours is channel, row, column, as in the embedding.
                state[key] = state[key].unflatten(0, (p, p, c_out)).movedim(2, 0).flatten(0, 2)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"this is not a DiT state dict: {error.args[0]} is missing") from None
    except (ValueError, IndexError) as error:
        raise InputError(f"this is not a DiT state dict: {error}") from None
    found = config["out_channels"] == 2 * config["in_channels"]
    if learn_sigma is not None and learn_sigma != found:
        raise InputError(f"learn_sigma={learn_sigma}, but the final layer has {config['out_channels']} channels")
    del config["out_channels"]
    with torch.device("meta"):
        model = DiT(DiTConfig(**config, learn_sigma=found))
    model = model.to_empty(device="cpu")
    load_state(model, state, "the given state dict")
    return model.eval()


def _read_config(state: dict[str, Tensor], heads: int | None) -> dict[str, Any]:
    width, positions = state["pos_embed"].shape[2], state["pos_embed"].shape[1]
    if heads is None:
        heads = PUBLISHED_HEADS.get(width)
        if heads is None:
            raise InputError(f"no published DiT has width {width}: give heads=...")
    config: dict[str, Any] = {
        "width": width,
        "heads": heads,
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "num_tokens": 0,
        "input_size": 0,
    }
    outputs = state["final_layer.linear.weight"].shape[0]
    if "x_embedder.proj.weight" in state:
        _, channels, patch, _ = state["x_embedder.proj.weight"].shape
        config |= {"in_channels": channels, "patch_size": patch, "input_size": round(positions**0.5) * patch}
    else:
        channels, patch = state["x_embedder.weight"].shape[1], 1
        config |= {"in_channels": channels, "num_tokens": positions}
    return {**config, "out_channels": outputs // patch**2}
