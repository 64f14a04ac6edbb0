"""DiT and SiT in the layouts of their authors (facebookresearch/DiT, also over 1-D tokens) and of diffusers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from textok_fast.config import DiTConfig
from textok_fast.errors import InputError
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.saving import load_state

# Attention heads by width in the published sizes; the shapes of a state dict do not tell.
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
TRAINING_ONLY = ("projectors.",)  # of REPA's loss, beside the network


def load_dit(
    state: dict[str, Tensor],
    heads: int | None = None,
    learn_sigma: bool | None = None,
    guided_channels: int = 0,
    time_scale: float = 1.0,
) -> DiT:
    """A :class:`DiT` in eval mode from a peer's state dict; sizes are read from the shapes.

    Args:
        state: the peer's tensors by name: 2-D patches (``x_embedder.proj.weight`` of 4 dimensions) or 1-D tokens.
        heads: attention heads; None for the published number at that width.
        learn_sigma: whether the output carries variance channels; None reads it from the shapes.
        guided_channels: of the sample, those that guidance changes: 3 in DiT's own code; 0 for all.
        time_scale: t is multiplied by it first; SiT's t in [0, 1] is taken as it is.

    Raises: InputError naming a missing, unexpected or misshapen key, or an unknown number of heads.
    """
    state = {key: value for key, value in state.items() if not key.startswith(TRAINING_ONLY)}
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
    except (ValueError, IndexError, RuntimeError) as error:
        raise InputError(f"this is not a DiT state dict: {error}") from None
    found = config["out_channels"] == 2 * config["in_channels"]
    if learn_sigma is not None and learn_sigma != found:
        raise InputError(f"learn_sigma={learn_sigma}, but the final layer has {config['out_channels']} channels")
    del config["out_channels"]
    given = {"learn_sigma": found, "guided_channels": guided_channels, "time_scale": time_scale}
    return _built(DiTConfig(**config, **given), state)


def _built(config: DiTConfig, state: dict[str, Tensor]) -> DiT:
    with torch.device("meta"):
        model = DiT(config)
    model = model.to_empty(device="cpu")
    load_state(model, {key: value.float() for key, value in state.items()}, "the given state dict")
    return model.eval()


def _read_config(state: dict[str, Tensor], heads: int | None) -> dict[str, Any]:
    width, positions = state["pos_embed"].shape[2], state["pos_embed"].shape[1]
    config: dict[str, Any] = {
        "width": width,
        "heads": published_heads(width, heads),
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "num_tokens": 0,
        "input_size": 0,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }
    outputs = state["final_layer.linear.weight"].shape[0]
    if "x_embedder.proj.weight" in state:
        _, channels, patch, _ = state["x_embedder.proj.weight"].shape
        config |= {"in_channels": channels, "patch_size": patch, "input_size": round(positions**0.5) * patch}
    else:
        channels, patch = state["x_embedder.weight"].shape[1], 1
        config |= {"in_channels": channels, "num_tokens": positions}
    return {**config, "out_channels": outputs // patch**2}


def published_heads(width: int, heads: int | None = None) -> int:
    """``heads``, or what the published model of this width has; InputError where there is none."""
    if heads is None:
        heads = PUBLISHED_HEADS.get(width)
        if heads is None:
            raise InputError(f"no published model has width {width}: give heads=...")
    return heads


# -- diffusers -----------------------------------------------------------------------------------------------------------------


def load_diffusers_dit(
    state: dict[str, Tensor], about: dict[str, Any], guided_channels: int = 0, frequency_shift: int = 1
) -> DiT:
    """A :class:`DiT` in eval mode from diffusers' DiTTransformer2DModel.

    Args:
        about: its config.json.
        frequency_shift: 1, diffusers' own sinusoids of t, gives what diffusers gives; 0 those of the authors' code, with which
            the published weights were trained.

    Raises: InputError naming a missing, unexpected or misshapen key, or embedders that differ from block to block.
    """
    state = dict(state)
    try:
        heads, p = int(about["num_attention_heads"]), int(about["patch_size"])
        width, channels = heads * int(about["attention_head_dim"]), int(about["in_channels"])
        size, depth = int(about["sample_size"]), int(about["num_layers"])
        c_out = int(about.get("out_channels") or channels)
        embedders = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
        taken = {
            "x_embedder.weight": state.pop("pos_embed.proj.weight").flatten(1),  # (D, C p p)
            "x_embedder.bias": state.pop("pos_embed.proj.bias"),
            "y_embedder.embedding_table.weight": _shared(state, depth, "class_embedder.embedding_table.weight"),
        }
        state.pop("pos_embed.pos_embed", None)
        for name in ("weight", "bias"):
            taken |= {f"{ours}.{name}": _shared(state, depth, f"{theirs}.{name}") for ours, theirs in embedders.items()}
            # A patch's numbers: theirs row, column, channel; ours channel, row, column.
            last = state.pop(f"proj_out_2.{name}").unflatten(0, (p, p, c_out))
            taken[f"final_layer.linear.{name}"] = last.movedim(2, 0).flatten(0, 2)
            taken[f"final_layer.adaLN_modulation.1.{name}"] = state.pop(f"proj_out_1.{name}")
            for index in range(depth):
                theirs, block = f"transformer_blocks.{index}", f"blocks.{index}"
                qkv = [state.pop(f"{theirs}.attn1.to_{part}.{name}") for part in "qkv"]
                taken[f"{block}.attn.qkv.{name}"] = torch.cat(qkv)
                taken |= {f"{block}.{ours}.{name}": state.pop(f"{theirs}.{key}.{name}") for ours, key in _DIFFUSERS.items()}
    except KeyError as error:
        raise InputError(f"this is not diffusers' DiTTransformer2DModel: {error.args[0]} is missing") from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"this is not diffusers' DiTTransformer2DModel: {error}") from None
    if state:
        raise InputError(f"unexpected {', '.join(list(state)[:3])} in the weights of a DiTTransformer2DModel")
    config = DiTConfig(
        input_size=size,
        patch_size=p,
        in_channels=channels,
        width=width,
        heads=heads,
        depth=depth,
        mlp_ratio=len(taken["blocks.0.mlp.fc1.bias"]) / width,
        num_classes=len(taken["y_embedder.embedding_table.weight"]) - 1,
        learn_sigma=c_out == 2 * channels,
        guided_channels=guided_channels,
        frequency_shift=frequency_shift,
    )
    with torch.device("meta"):
        positions = DiT(config).pos_embed.shape
    taken["pos_embed"] = torch.zeros(positions)
    model = _built(config, taken)
    model.pos_embed.copy_(DiT(DiTConfig(**{**vars(config), "depth": 1})).pos_embed)  # fixed sinusoids
    return model


# Ours -> diffusers', in a block
_DIFFUSERS = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


def _shared(state: dict[str, Tensor], depth: int, name: str) -> Tensor:
    """What diffusers keeps in every block and the published model once."""
    keys = [f"transformer_blocks.{index}.norm1.emb.{name}" for index in range(depth)]
    first, *others = (state.pop(key) for key in keys)
    if not all(torch.equal(first, each) for each in others):
        raise InputError(f"{name} differs from block to block: a DiT embeds time and class once for all of them")
    return first


def to_diffusers_dit(model: DiT) -> nn.Module:
    """diffusers' DiTTransformer2DModel with the values of ``model``, on its device and in its dtype.

    They share storage where the layouts agree, but for what diffusers has in every block: it could not be saved shared. The
    model's own sinusoids of t are set in the blocks; diffusers' ``save_pretrained`` does not keep them, and
    ``load_diffusers_dit(..., frequency_shift=0)`` has those of the published weights.

    Raises InputError for a DiT over 1-D tokens, one without classes or with text, and without diffusers.
    """
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError:
        raise InputError("a DiTTransformer2DModel needs diffusers: pip install 'textok-fast[bench]'") from None
    config = model.config
    if not config.input_size or model.y_embedder is None or config.text_dim or config.qk_norm:
        raise InputError("diffusers' DiTTransformer2DModel is over 2-D patches with class labels, without text")
    p, width = config.patch_size, config.width
    with torch.device("meta"):
        peer = DiTTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=width // config.heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            sample_size=config.input_size,
            patch_size=p,
            num_embeds_ada_norm=config.num_classes,
            norm_eps=1e-6,
        )
    ours = dict([*model.named_parameters(), *model.named_buffers()])
    rows = config.out_channels * p * p
    final = {name: ours[f"final_layer.linear.{name}"].unflatten(0, (config.out_channels, p, p)) for name in ("weight", "bias")}
    state = {
        "pos_embed.proj.weight": ours["x_embedder.weight"].unflatten(1, (config.in_channels, p, p)),
        "pos_embed.proj.bias": ours["x_embedder.bias"],
        # A patch's numbers: ours channel, row, column; theirs row, column, channel.
        **{f"proj_out_2.{name}": value.movedim(0, 2).reshape(rows, *value.shape[3:]) for name, value in final.items()},
    }
    for name in ("weight", "bias"):
        state[f"proj_out_1.{name}"] = ours[f"final_layer.adaLN_modulation.1.{name}"]
        for index in range(config.depth):
            theirs, block = f"transformer_blocks.{index}", f"blocks.{index}"
            for number, layer in enumerate((0, 2), start=1):
                state[f"{theirs}.norm1.emb.timestep_embedder.linear_{number}.{name}"] = ours[
                    f"t_embedder.mlp.{layer}.{name}"
                ].clone()
            q, k, v = ours[f"{block}.attn.qkv.{name}"].chunk(3)
            state |= {f"{theirs}.attn1.to_{part}.{name}": value for part, value in (("q", q), ("k", k), ("v", v))}
            state |= {f"{theirs}.{key}.{name}": ours[f"{block}.{mine}.{name}"] for mine, key in _DIFFUSERS.items()}
    table = ours["y_embedder.embedding_table.weight"]
    for index in range(config.depth):
        state[f"transformer_blocks.{index}.norm1.emb.class_embedder.embedding_table.weight"] = table.clone()
    peer.load_state_dict(state, strict=True, assign=True)
    peer.pos_embed.pos_embed = ours["pos_embed"]  # a buffer that is not in the state dict
    for block in peer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = config.frequency_shift
    return cast(nn.Module, peer.eval().requires_grad_(False))
