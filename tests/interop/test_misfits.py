"""Weights that do not fit: whichever key is missing, too many or of another shape, the error names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from textok_fast import DiT, DiTConfig, InputError, interop
from textok_fast.interop.layout import Shape, count_blocks, read_sizes

Check = Callable[..., None]
CLASSES = {"y_embedder.embedding_table.weight": (0,)}


def test_dit(golden: Callable[[str], Any], names_each_key: Check) -> None:
    names_each_key("dit", golden("dit_2d")[0], CLASSES, heads=4)


@pytest.mark.parametrize(("name", "kind"), [("dit_1d", "dit-1d"), ("sit_1d", "sit-1d")])
def test_dit_over_tokens(golden: Callable[[str], Any], names_each_key: Check, name: str, kind: str) -> None:
    names_each_key(kind, golden(name)[0], {**CLASSES, "pos_embed": (1,)}, heads=4)


def test_dit_with_normalized_queries(names_each_key: Check) -> None:
    config = DiTConfig(num_tokens=3, in_channels=4, width=16, depth=2, heads=2, num_classes=5, qk_norm=True)
    names_each_key("dit-1d", dict(DiT(config).state_dict()), {**CLASSES, "pos_embed": (1,)})


def test_diffusers_dit(names_each_key: Check) -> None:
    pytest.importorskip("diffusers")
    config = DiTConfig(input_size=8, patch_size=2, in_channels=4, width=16, depth=2, heads=2, num_classes=5)
    peer: Any = interop.to_diffusers_dit(DiT(config))
    names_each_key("diffusers-dit", dict(peer.state_dict()), config=dict(peer.config))


@pytest.mark.parametrize("name", ["titok_vq", "tatitok_vq", "tatitok_vae"])
def test_titok(golden: Callable[[str], Any], names_each_key: Check, name: str) -> None:
    weights = golden(name)[0]
    told_alone: dict[str, tuple[int, ...]] = {"quantize.embedding.weight": (0,)} if "vq" in name else {}
    if "tatitok" in name:
        told_alone |= {"decoder.text_guidance_proj.weight": (1,), "decoder.text_guidance_positional_embedding": (0,)}
    weights = {key: value for key, value in weights.items() if key != "quantize.embed_prob"}  # which is not looked at
    names_each_key(name.split("_")[0], weights, told_alone, heads=4)


@pytest.mark.parametrize("old", [False, True])
def test_sd_vae(names_each_key: Check, old: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = {
        "block_out_channels": (8,), "layers_per_block": 1, "latent_channels": 2, "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",), "norm_num_groups": 4,
    }  # fmt: skip
    vae = diffusers.AutoencoderKL(**config)
    state = dict(vae.state_dict())
    if old:  # as older files name the attention's layers
        for new, former in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
            state = {key.replace(new, former): value for key, value in state.items()}
    names_each_key("sd-vae", state, config=dict(vae.config))


def test_what_most_tensors_tell_is_the_size() -> None:
    layout: dict[str, Shape] = {"a": ("D", "2 D"), "b": ("D",), "c": ("p p O", "1/2 D"), "d": (1, "G G"), "e": ("p", "p")}
    state = {
        "a": torch.zeros(4, 8),
        "b": torch.zeros(4),
        "c": torch.zeros(12, 2),
        "d": torch.zeros(1, 9),
        "e": torch.zeros(2, 2),
    }
    assert read_sizes(state, layout, "test") == {"D": 4, "p": 2, "O": 3, "G": 3}
    for key, value, message in (
        ("a", torch.zeros(5, 8), r"a has the shape \(5, 8\), wanted \(4, 8\)$"),
        ("d", torch.zeros(1, 8), r"d has the shape \(1, 8\), wanted \(1, G G\)"),
        ("d", torch.zeros(9), r"d has the shape \(9,\), wanted \(1, G G\)"),
        ("b", torch.zeros(()), r"b has the shape \(\), wanted \(4,\)"),
    ):
        with pytest.raises(InputError, match=f"these are not the weights of a test: {message}"):
            read_sizes({**state, key: value}, layout, "test")
    with pytest.raises(InputError, match=r"b has the shape \(5,\), wanted \(4,\) by a of shape \(4,\)$"):  # as many tell 5 as 4
        read_sizes({"a": torch.zeros(4), "b": torch.zeros(5)}, {"a": ("D",), "b": ("D",)}, "test")
    with pytest.raises(InputError, match="test: missing a; unexpected x$"):
        read_sizes({"x": torch.zeros(4)}, {"a": ("D",)}, "test")


def test_blocks_are_counted_by_what_most_of_them_hold() -> None:
    names = ("w", "b", "n")
    state = {f"blocks.{index}.{name}": torch.zeros(1) for index in range(12) for name in names}
    assert count_blocks(state, "blocks.", names) == 12
    del state["blocks.11.b"], state["blocks.3.w"], state["blocks.3.b"], state["blocks.3.n"]
    state |= {"blocks.12.w": torch.zeros(1), "blocks.x.b": torch.zeros(1), "blocks.99999999999.w": torch.zeros(1)}
    assert count_blocks(state, "blocks.", names) == 12 and count_blocks({}, "blocks.", names) == 1
