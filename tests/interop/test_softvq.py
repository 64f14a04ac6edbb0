"""SoftVQ-VAE and MAETok against their formulas, written here over their own names: ViTs of DINOv2's form."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from soft_weights import CHANNELS, DEPTH, GRID, HEADS, PATCH, TOKENS, WIDTH
from soft_weights import soft_weights as weights
from torch import Tensor
from torch.nn import functional as F

from textok_fast import InputError, TexTok, interop
from textok_fast.inference import Engine, Plan
from textok_fast.interop import ContinuousTokenizer
from textok_fast.interop.softvq import TRAINING_ONLY

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def normalized(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    there = f"{name}.weight" in state
    weight, bias = (state[f"{name}.{part}"].double() if there else None for part in ("weight", "bias"))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)


def blocks(
    state: dict[str, Tensor], side: str, x: Tensor, prefix: int, z: Tensor | None = None, axial_theta: float = 0.0
) -> Tensor:
    """x (B, prefix + hw + N, D) through the blocks and the last norm; patches turn by their places where the state says so, or
    by axes; z (B, N, C) modulates the latents' rows."""
    width = x.shape[-1]
    for index in range(DEPTH):
        block = f"{side}.model.blocks.{index}"

        def linear(x: Tensor, name: str, block: str = block) -> Tensor:
            return x @ state[f"{block}.{name}.weight"].double().T + state[f"{block}.{name}.bias"].double()

        def norm(x: Tensor, name: str, block: str = block) -> Tensor:
            x = normalized(state, f"{block}.{name}", x)
            if f"{block}.adaLN_modulation.1.weight" in state:
                assert z is not None
                values = linear(F.silu(z), "adaLN_modulation.1", block)  # (B, N, 4 D)
                shift, scale = values.chunk(4, dim=-1)[:2] if name == "norm1" else values.chunk(4, dim=-1)[2:]
                x[:, -TOKENS:] = x[:, -TOKENS:] * scale + shift
            return x

        def scaled(x: Tensor, name: str, block: str = block) -> Tensor:
            return x * state[f"{block}.{name}.gamma"].double() if f"{block}.{name}.gamma" in state else x

        q, k, v = linear(norm(x, "norm1"), "attn.qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        if f"{side}.freqs" in state or axial_theta:
            if axial_theta:
                dim = width // HEADS
                magnitude = axial_theta ** (-torch.arange(0, dim, 4).double() / dim)
                freqs = torch.zeros(2, HEADS, dim // 2, dtype=torch.float64)
                freqs[0, :, : dim // 4], freqs[1, :, dim // 4 :] = magnitude, magnitude
            else:
                freqs = state[f"{side}.freqs"][:, index].double().unflatten(-1, (HEADS, -1))  # (2, H, d / 2)
            places = torch.arange(GRID**2)
            angles = torch.einsum("n,hf->hnf", (places % GRID).double(), freqs[0])
            angles = angles + torch.einsum("n,hf->hnf", (places // GRID).double(), freqs[1])
            turn = torch.polar(torch.ones_like(angles), angles)  # (H, hw, d / 2)
            there = slice(prefix, prefix + GRID**2)
            for part in (q, k):
                pairs = torch.view_as_complex(part[:, :, there].unflatten(-1, (-1, 2)).contiguous())
                part[:, :, there] = torch.view_as_real(pairs * turn).flatten(-2)
        attended = ((q @ k.transpose(-1, -2)) / math.sqrt(width // HEADS)).softmax(-1) @ v
        x = x + scaled(linear(attended.transpose(1, 2).flatten(2), "attn.proj"), "ls1")
        x = x + scaled(linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2"), "ls2")
    return normalized(state, f"{side}.model.norm", x)


def prefixes(state: dict[str, Tensor], side: str) -> list[Tensor]:
    return [state[f"{side}.model.{name}"].double() for name in ("cls_token", "reg_token") if f"{side}.model.{name}" in state]


def placed(state: dict[str, Tensor], side: str, prefix: list[Tensor], patches: Tensor) -> Tensor:
    """[prefix, patches] (B, R + hw, D) with positions, which may be for the patches only."""
    places = state[f"{side}.model.pos_embed"].double()
    own = [each.expand(len(patches), -1, -1) for each in prefix]
    if places.shape[1] == GRID**2:
        return torch.cat([*own, patches + places], dim=1)
    return torch.cat([*own, patches], dim=1) + places


def encoded(state: dict[str, Tensor], images: Tensor, axial_theta: float = 0.0, l2_norm: bool = True) -> Tensor:
    place = "encoder.model.patch_embed.proj"
    patches = F.conv2d(images.double(), state[f"{place}.weight"].double(), state[f"{place}.bias"].double(), stride=PATCH)
    own = prefixes(state, "encoder")
    x = placed(state, "encoder", own, patches.flatten(2).transpose(1, 2))
    latents = (state["encoder.latent_tokens"] + state["encoder.latent_pos_embed"]).double().expand(len(images), -1, -1)
    count = sum(each.shape[1] for each in own)
    x = blocks(state, "encoder", torch.cat([x, latents], dim=1), count, axial_theta=axial_theta)[:, -TOKENS:]
    z = x @ state["quant_conv.weight"].double().T + state["quant_conv.bias"].double()
    if "quantize.embedding" not in state:
        return z
    codes, out = state["quantize.embedding"].double(), []
    codes, z = (F.normalize(codes, dim=-1), F.normalize(z, dim=-1)) if l2_norm else (codes, z)
    for book, part in zip(codes, z.chunk(len(codes), dim=1), strict=True):
        out.append((part @ book.T / 0.07).softmax(-1) @ book)
    return torch.cat(out, dim=1)


def decoded(state: dict[str, Tensor], z: Tensor, axial_theta: float = 0.0) -> Tensor:
    own = prefixes(state, "decoder")
    x = state["decoder.mask_token"].double().expand(len(z), GRID**2, -1)
    if "decoder.freqs" not in state and not axial_theta:
        x = placed(state, "decoder", own, x)
    else:
        x = torch.cat([*(each.expand(len(z), -1, -1) for each in own), x], dim=1)
    latents = z.double() @ state["post_quant_conv.weight"].double().T + state["post_quant_conv.bias"].double()
    x = torch.cat([x, latents + state["decoder.latent_pos_embed"].double()], dim=1)
    count = sum(each.shape[1] for each in own)
    x = blocks(state, "decoder", x, count, z.double(), axial_theta)[:, count : count + GRID**2]
    x = x @ state["decoder.to_pixel.model.weight"].double().T + state["decoder.to_pixel.model.bias"].double()
    x = x.reshape(len(z), GRID, GRID, PATCH, PATCH, 3)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(z), 3, GRID * PATCH, GRID * PATCH)


FORMS: list[dict[str, Any]] = [
    {"soft": True},
    {"soft": True, "registers": 4, "scale": False},
    {"soft": False},
    {"soft": False, "rope": True, "decoder_class_token": False},
    {"soft": True, "rope": True},
    {"soft": True, "registers": 4, "placed_prefix": False},
    {"soft": False, "rope": True, "decoder_class_token": False, "movq": True},  # as MAETok is released
    {"soft": False, "registers": 1, "movq": True},
]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_is_the_formula(form: dict[str, Any]) -> None:
    state = weights(**form)
    kind = "softvq" if form["soft"] else "maetok"
    assert interop.guess_kind(interop.read_weights(state)) == kind
    model = interop.load(kind, state, heads=HEADS)
    assert isinstance(model, ContinuousTokenizer)
    images = torch.rand(2, 3, GRID * PATCH, GRID * PATCH) * 2 - 1
    wanted = encoded(state, images)
    z, *_ = model.encode(images)
    torch.testing.assert_close(z.double(), wanted, **CLOSE)
    wanted = decoded(state, z)  # as theirs, beyond [-1, 1] too
    assert wanted.abs().max() > 1
    torch.testing.assert_close(model.decode(z).double(), wanted, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@torch.no_grad()
def test_runs_in_the_engine(form: dict[str, Any], precision: Any) -> None:
    state = weights(**form)
    model = interop.load(None, state, heads=HEADS)
    fast = ContinuousTokenizer(Engine(model.tokenizer, Plan(precision)))
    images = torch.rand(2, 3, GRID * PATCH, GRID * PATCH) * 2 - 1
    bound = {"fp32": 1e-5, "bf16": 0.05, "fp8": 0.25}[precision]
    z = model.encode(images)[0]
    pictures, *nothing = fast(images)
    assert nothing == [None, None] and torch.equal(pictures, fast.decode(fast.encode(images)[0]))
    for mine, exact in ((fast.encode(images)[0], z), (fast.decode(z), model.decode(z))):
        assert (mine.double() - exact.double()).norm() / exact.double().norm() < bound
    bytes_ = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    one, other = fast.tokenizer.encode(bytes_), model.tokenizer.encode(bytes_)
    assert (one.mode().double() - other.mode().double()).norm() / other.mode().double().norm() < bound
    picture, wanted = fast.tokenizer.decode(other, output="uint8"), model.tokenizer.decode(other, output="uint8")
    if precision == "fp32":
        assert (picture.int() - wanted.int()).abs().max() <= 1


def test_sides_of_other_sizes_and_statistics() -> None:
    """The "BL" models: a base encoder and a large decoder; tokens are normalised by what config.json says."""
    state = weights(soft=True)
    wide = {key: value for key, value in state.items() if not key.startswith(("decoder.", "post_quant_conv."))}
    sides = weights(soft=True, width=64).items()
    wide |= {key: value for key, value in sides if key.startswith(("decoder.", "post_quant_conv."))}
    found = interop.Weights(wide, {"config": {"vq_mean": 0.25, "vq_std": 0.5}}, "test")
    tokenizer = interop.convert_softvq(found.state, found.config, HEADS)
    z = torch.randn(2, TOKENS, CHANNELS)
    wanted = decoded(wide, z)
    assert (tokenizer.config.width, tokenizer.config.decoder_width) == (48, 64)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.decode((z - 0.25) / 0.5).double(), wanted.clamp(-1, 1), **CLOSE)
        engine = Engine(tokenizer, Plan())
        torch.testing.assert_close(engine.decode((z - 0.25) / 0.5).double(), wanted.clamp(-1, 1), **CLOSE)


@torch.no_grad()
def test_rotary_positions_by_axes() -> None:
    """Of which the weights hold nothing: config.json tells, or the caller."""
    state = weights(soft=False)
    images = torch.rand(2, 3, GRID * PATCH, GRID * PATCH) * 2 - 1
    for tokenizer in (
        interop.convert_softvq(state, {"config": {"use_rope": True, "rope_mixed": False, "rope_theta": 100.0}}, HEADS),
        interop.load("maetok", state, heads=HEADS, axial_theta=100.0).tokenizer,
    ):
        z = tokenizer.encode(images)  # type: ignore[operator,union-attr]
        torch.testing.assert_close(z.mode().double(), encoded(state, images, 100.0), **CLOSE)
        wanted = decoded(state, z.mode(), 100.0).clamp(-1, 1)
        torch.testing.assert_close(tokenizer.decode(z).double(), wanted, **CLOSE)  # type: ignore[operator,union-attr]
        assert not torch.allclose(wanted, decoded(state, z.mode(), 50.0).clamp(-1, 1), atol=1e-3)
    with pytest.raises(InputError, match="learned, mixed ones"):
        interop.load("maetok", weights(soft=False, rope=True), heads=HEADS, axial_theta=100.0)


def test_the_temperature_is_what_config_json_says() -> None:
    state = weights(soft=True)
    assert interop.convert_softvq(state, {"tau": 0.5}, HEADS).config.soft_temperature == 0.5
    assert interop.convert_softvq(state, {"tau": 0.5}, HEADS, temperature=0.25).config.soft_temperature == 0.25
    assert interop.convert_softvq(state, {}, HEADS).config.soft_temperature == 0.07


@torch.no_grad()
def test_codes_are_of_norm_1_unless_config_json_says_otherwise(tmp_path: Path) -> None:
    state = weights(soft=True)
    images = torch.rand(2, 3, GRID * PATCH, GRID * PATCH) * 2 - 1
    wanted = encoded(state, images, l2_norm=False)
    assert not torch.allclose(wanted, encoded(state, images), atol=1e-2)
    tokenizer = interop.convert_softvq(state, {"config": {"codebook_l2_norm": False}}, HEADS)
    tokenizer.save_pretrained(tmp_path)
    for model in (tokenizer, TexTok.from_pretrained(tmp_path), Engine(tokenizer, Plan())):
        torch.testing.assert_close(model.encode(images).mode().double(), wanted, **CLOSE)


def test_the_peers_attributes_and_calls() -> None:
    """Code that samples normalises by these; latents of another form are refused."""
    state = weights(soft=False)
    config = {"vq_mean": 0.25, "vq_std": 0.5}
    model = ContinuousTokenizer(interop.convert_softvq(state, config, HEADS))
    assert (model.vq_mean, model.vq_std, model.num_latent_tokens, model.codebook_embed_dim) == (0.25, 0.5, TOKENS, CHANNELS)
    images = torch.rand(1, 3, GRID * PATCH, GRID * PATCH) * 2 - 1
    torch.testing.assert_close((model.encode(images)[0] - 0.25) / 0.5, model.tokenizer.encode(images).mode(), **CLOSE)
    plain = ContinuousTokenizer(interop.convert_softvq(state, {}, HEADS))
    assert (plain.vq_mean, plain.vq_std) == (0.0, 1.0)
    z = torch.randn(1, TOKENS, CHANNELS)
    for wrong, message in (
        (z[:, 1:], r"tokens must be float \(B, 6, 5\), got torch.float32 \(1, 5, 5\)"),
        (z.long(), "got torch.int64"),
        (z.tolist(), "must be a tensor, got list"),
        (z * math.nan, "contain NaN"),
    ):
        with pytest.raises(InputError, match=message):
            model.decode(wrong)


def test_numbers_that_are_none_are_named() -> None:
    state = weights(soft=True)
    for about, message in (
        ({"vq_mean": "x"}, "config.json: vq_mean must be a number, got 'x'"),
        ({"vq_std": [1.0]}, r"config.json: vq_std must be a number, got \[1.0\]"),
        ({"vq_std": 0}, "config.json: vq_std must be above 0, got 0.0"),
        ({"tau": None}, "config.json: tau must be a number, got None"),
        ({"tau": 0}, "soft_temperature must be above 0, got 0.0"),
        ({"codebook_l2_norm": "false"}, "config.json: codebook_l2_norm is true or false, got 'false'"),
        ({"use_rope": True, "rope_theta": "x"}, "config.json: rope_theta must be a number, got 'x'"),
    ):
        with pytest.raises(InputError, match=message):
            interop.convert_softvq(state, {"config": about}, HEADS)
    for name in ("temperature", "axial_theta"):
        for value in (0, -1.0, "x", True, math.nan):
            with pytest.raises(InputError, match=f"{name} must be a number above 0, got {value!r}"):
                interop.load("softvq", state, heads=HEADS, **{name: value})


@pytest.mark.parametrize("form", FORMS)
def test_each_key_that_does_not_fit_is_named(form: dict[str, Any], names_each_key: Callable[..., None]) -> None:
    state = {key: value for key, value in weights(**form).items() if not key.startswith(TRAINING_ONLY)}
    told_alone: dict[str, tuple[int, ...]] = {"quantize.embedding": (0, 1)} if form["soft"] else {}
    optional: tuple[str, ...] = ()
    if form.get("rope"):  # then nothing looks at the decoder's absolute positions
        told_alone["decoder.model.pos_embed"] = (1,)
        optional = ("decoder.model.cls_token",) if form.get("decoder_class_token", True) else ()
    if not form.get("placed_prefix", True):
        optional = ("encoder.model.cls_token", "decoder.model.cls_token")
        told_alone |= {f"{side}.model.reg_token": (1,) for side in ("encoder", "decoder")}
    if form["soft"]:  # without it, what a MAETok is
        optional = (*optional, "quantize.embedding")
    names_each_key("softvq" if form["soft"] else "maetok", state, told_alone, optional, heads=HEADS)


def test_what_is_not_supported_says_so() -> None:
    state = weights(soft=True)
    wrong = {**state, "decoder.to_pixel.model.weight": torch.zeros(75, WIDTH), "decoder.to_pixel.model.bias": torch.zeros(75)}
    for changed, message in (
        ({**state, "encoder.more": torch.zeros(1)}, "these are not the weights of a SoftVQ-VAE: unexpected encoder.more"),
        ({key: value for key, value in state.items() if key != "quant_conv.bias"}, "missing quant_conv.bias"),
        (wrong, r"decoder.to_pixel.model.weight of shape \(75, 48\)"),
        ({**state, "encoder.freqs": torch.zeros(2, DEPTH, WIDTH // 2)}, "missing decoder.freqs"),
    ):
        with pytest.raises(InputError, match=message):
            interop.load("softvq", changed, heads=HEADS)
