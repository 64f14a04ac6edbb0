"""DiT and SiT in the layouts of their authors (facebookresearch/DiT, also over 1-D tokens) and of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from textok_fast.config import DiTConfig
from textok_fast.errors import InputError
from textok_fast.interop.layout import Shape, count_blocks, holds, read_sizes, shape_of
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.saving import load_state

# Attention heads by width in the published sizes; the shapes of a state dict do not tell.
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
TRAINING_ONLY = ("projectors.",)  # of REPA's loss, beside the network


_BLOCK: dict[str, Shape] = {
    "attn.qkv.weight": ("3 D", "D"),
    "attn.qkv.bias": ("3 D",),
    "attn.proj.weight": ("D", "D"),
    "attn.proj.bias": ("D",),
    "mlp.fc1.weight": ("M", "D"),
    "mlp.fc1.bias": ("M",),
    "mlp.fc2.weight": ("D", "M"),
    "mlp.fc2.bias": ("D",),
    "adaLN_modulation.1.weight": ("6 D", "D"),
    "adaLN_modulation.1.bias": ("6 D",),
}
_QK_NORM: dict[str, Shape] = {f"attn.{each}_norm.{name}": ("H",) for each in "qk" for name in ("weight", "bias")}


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
        heads: attention heads; None for the number that qk-norm tells, else the published one at that width.
        learn_sigma: whether the output carries variance channels; None reads it from the shapes, False leaves out those that
            the weights have, as SiT's own code does in its forward.
        guided_channels: of the sample, those that guidance changes: 3 in DiT's own code; 0 for all.
        time_scale: t is multiplied by it first; SiT's t in [0, 1] is taken as it is.

    Raises: InputError naming a missing, unexpected or misshapen key, or an unknown number of heads.
    """
    state = {key: value for key, value in state.items() if not key.startswith(TRAINING_ONLY)}
    patches = any(key.startswith("x_embedder.proj.") for key in state)
    embedder = "x_embedder.proj" if patches else "x_embedder"
    depth = count_blocks(state, "blocks.", _BLOCK)
    qk_norm = holds(state, (f"blocks.{index}.{name}" for index in range(depth) for name in _QK_NORM))
    layout: dict[str, Shape] = {
        f"{embedder}.weight": ("D", "C", "p", "p") if patches else ("D", "C"),
        f"{embedder}.bias": ("D",),
        "pos_embed": (1, "G G" if patches else "N", "D"),
        "t_embedder.mlp.0.weight": ("D", 256),
        "t_embedder.mlp.0.bias": ("D",),
        "t_embedder.mlp.2.weight": ("D", "D"),
        "t_embedder.mlp.2.bias": ("D",),
        "y_embedder.embedding_table.weight": ("K", "D"),
        "final_layer.linear.weight": ("p p O" if patches else "O", "D"),
        "final_layer.linear.bias": ("p p O" if patches else "O",),
        "final_layer.adaLN_modulation.1.weight": ("2 D", "D"),
        "final_layer.adaLN_modulation.1.bias": ("2 D",),
    }
    block = {**_BLOCK, **(_QK_NORM if qk_norm else {})}
    layout |= {f"blocks.{index}.{name}": shape for index in range(depth) for name, shape in block.items()}
    sizes = read_sizes(state, layout, "DiT over patches" if patches else "DiT over 1-D tokens")
    width, channels, outputs, p = sizes["D"], sizes["C"], sizes["O"], sizes.get("p", 1)
    if outputs not in (channels, 2 * channels):
        raise InputError(
            f"{shape_of(state, 'final_layer.linear.weight')} makes {outputs} channels, wanted {channels}, or {2 * channels} "
            f"with learned variance: {shape_of(state, f'{embedder}.weight')} takes {channels}"
        )
    if learn_sigma and outputs == channels:
        raise InputError(f"learn_sigma=True, but final_layer.linear.weight makes as many channels as there are: {channels}")
    keep = outputs if learn_sigma is None or learn_sigma else channels
    if patches:
        state["x_embedder.weight"] = state.pop("x_embedder.proj.weight").flatten(1)  # (D, C p p)
        state["x_embedder.bias"] = state.pop("x_embedder.proj.bias")
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        # The peer writes a patch as row, column, channel; ours is channel, row, column, as in the embedding.
        state[key] = state[key].unflatten(0, (p, p, outputs)).movedim(2, 0)[:keep].flatten(0, 2)
    config = DiTConfig(
        width=width,
        heads=published_heads(width, heads, head_dim=sizes.get("H")),
        depth=depth,
        mlp_ratio=mlp_ratio(sizes["M"], width),
        num_classes=sizes["K"] - 1,
        num_tokens=sizes.get("N", 0),
        input_size=sizes["G"] * p if patches else 0,
        patch_size=p,
        in_channels=channels,
        qk_norm=qk_norm,
        learn_sigma=keep == 2 * channels,
        guided_channels=guided_channels,
        time_scale=time_scale,
    )
    return _built(config, state)


def _built(config: DiTConfig, state: dict[str, Tensor]) -> DiT:
    with torch.device("meta"):
        model = DiT(config)
    model = model.to_empty(device="cpu")
    load_state(model, {key: value.float() for key, value in state.items()}, "the given state dict")
    return model.eval()


def published_heads(width: int, heads: int | None, others: Mapping[int, int] | None = None, head_dim: int | None = None) -> int:
    """``heads``; for None what heads of ``head_dim`` channels make, or what the published model of this width has, one of
    ``others`` before a DiT.

    Raises: InputError where there is none, or it does not divide the width or contradicts ``head_dim``.
    """
    if heads is None:
        heads = width // head_dim if head_dim else {**PUBLISHED_HEADS, **(others or {})}.get(width)
    if heads is None:
        raise InputError(f"no published model has width {width}: give heads=...")
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise InputError(f"heads must be a whole number that divides the width {width}, got heads={heads!r}")
    if head_dim and heads * head_dim != width:
        raise InputError(
            f"heads={heads} of width {width} have {width // heads} channels each, but attn.q_norm.weight has {head_dim}"
        )
    return heads


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio of which int(width * ratio) is ``hidden``."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


# -- diffusers -----------------------------------------------------------------------------------------------------------------


def load_diffusers_dit(
    state: dict[str, Tensor], about: dict[str, Any], guided_channels: int = 0, frequency_shift: int = 1
) -> DiT:
    """A :class:`DiT` in eval mode from diffusers' DiTTransformer2DModel.

    Args:
        about: its config.json, with diffusers' defaults for what it does not say: ``norm_eps`` 1e-5.
        frequency_shift: 1, diffusers' own sinusoids of t, gives what diffusers gives; 0 those of the authors' code, with which
            the published weights were trained.

    Raises: InputError naming a missing, unexpected or misshapen key, embedders that differ from block to block, or a
        ``norm_type`` or ``activation_fn`` that a DiT does not have.
    """
    state = dict(state)
    for name, wanted in (("norm_type", "ada_norm_zero"), ("activation_fn", "gelu-approximate")):
        if (found := about.get(name, wanted)) != wanted:
            raise InputError(f"config.json: a DiT has {name} {wanted!r}, got {found!r}")
    try:
        heads, p, channels = int(about["num_attention_heads"]), int(about["patch_size"]), int(about["in_channels"])
        width, size, depth = heads * int(about["attention_head_dim"]), int(about["sample_size"]), int(about["num_layers"])
        c_out, eps = int(about.get("out_channels") or channels), float(about.get("norm_eps", 1e-5))
    except KeyError as error:
        raise InputError(f"config.json is not diffusers' DiTTransformer2DModel's: {error.args[0]} is missing") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"config.json is not diffusers' DiTTransformer2DModel's: {error}") from None
    if c_out not in (channels, 2 * channels):
        raise InputError(f"config.json: out_channels {c_out} is neither in_channels {channels} nor twice as many")
    if min(heads, p, channels, width, size, depth) < 1:
        raise InputError("config.json: the sizes of a DiTTransformer2DModel are at least 1")
    state.pop("pos_embed.pos_embed", None)  # fixed sinusoids, which some versions save
    layout: dict[str, Shape] = {
        "pos_embed.proj.weight": ("D", "C", "p", "p"),
        "pos_embed.proj.bias": ("D",),
        "proj_out_1.weight": ("2 D", "D"),
        "proj_out_1.bias": ("2 D",),
        "proj_out_2.weight": ("p p O", "D"),
        "proj_out_2.bias": ("p p O",),
    }
    layout |= {f"transformer_blocks.{i}.{key}": shape for i in range(depth) for key, shape in _DIFFUSERS_BLOCK.items()}
    sizes = read_sizes(state, layout, "DiTTransformer2DModel", {"D": width, "C": channels, "p": p, "O": c_out})
    taken = {
        "x_embedder.weight": state["pos_embed.proj.weight"].flatten(1),  # (D, C p p)
        "x_embedder.bias": state["pos_embed.proj.bias"],
        "y_embedder.embedding_table.weight": _shared(state, depth, "class_embedder.embedding_table.weight"),
    }
    for name in ("weight", "bias"):
        for layer, number in ((0, 1), (2, 2)):
            taken[f"t_embedder.mlp.{layer}.{name}"] = _shared(state, depth, f"timestep_embedder.linear_{number}.{name}")
        # A patch's numbers: theirs row, column, channel; ours channel, row, column.
        last = state[f"proj_out_2.{name}"].unflatten(0, (p, p, c_out))
        taken[f"final_layer.linear.{name}"] = last.movedim(2, 0).flatten(0, 2)
        taken[f"final_layer.adaLN_modulation.1.{name}"] = state[f"proj_out_1.{name}"]
        for index in range(depth):
            theirs, block = f"transformer_blocks.{index}", f"blocks.{index}"
            taken[f"{block}.attn.qkv.{name}"] = torch.cat([state[f"{theirs}.attn1.to_{part}.{name}"] for part in "qkv"])
            taken |= {f"{block}.{ours}.{name}": state[f"{theirs}.{key}.{name}"] for ours, key in _DIFFUSERS.items()}
    config = DiTConfig(
        input_size=size,
        patch_size=p,
        in_channels=channels,
        width=width,
        heads=heads,
        depth=depth,
        mlp_ratio=mlp_ratio(sizes["M"], width),
        num_classes=sizes["K"] - 1,
        learn_sigma=c_out == 2 * channels,
        guided_channels=guided_channels,
        frequency_shift=frequency_shift,
        mlp_norm_eps=eps,
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
_DIFFUSERS_BLOCK: dict[str, Shape] = {
    **{f"attn1.to_{part}.weight": ("D", "D") for part in ("q", "k", "v", "out.0")},
    **{f"attn1.to_{part}.bias": ("D",) for part in ("q", "k", "v", "out.0")},
    "ff.net.0.proj.weight": ("M", "D"),
    "ff.net.0.proj.bias": ("M",),
    "ff.net.2.weight": ("D", "M"),
    "ff.net.2.bias": ("D",),
    "norm1.linear.weight": ("6 D", "D"),
    "norm1.linear.bias": ("6 D",),
    "norm1.emb.timestep_embedder.linear_1.weight": ("D", 256),
    "norm1.emb.timestep_embedder.linear_1.bias": ("D",),
    "norm1.emb.timestep_embedder.linear_2.weight": ("D", "D"),
    "norm1.emb.timestep_embedder.linear_2.bias": ("D",),
    "norm1.emb.class_embedder.embedding_table.weight": ("K", "D"),
}


def _shared(state: dict[str, Tensor], depth: int, name: str) -> Tensor:
    """What diffusers keeps in every block and the published model once."""
    keys = [f"transformer_blocks.{index}.norm1.emb.{name}" for index in range(depth)]
    for key in keys[1:]:
        if not torch.equal(state[keys[0]], state[key]):
            raise InputError(f"{key} differs from block 0's: a DiT embeds time and class once for all of its blocks")
    return state[keys[0]]


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
            norm_eps=config.mlp_norm_eps,
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
