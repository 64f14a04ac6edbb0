"""SoftVQ-VAE and MAETok against their formulas, written here over their own names: ViTs of DINOv2's form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from textok_fast import InputError, interop
from textok_fast.inference import Engine, Plan
from textok_fast.interop import ContinuousTokenizer
from textok_fast.interop.softvq import TRAINING_ONLY

WIDTH, HEADS, DEPTH, GRID, PATCH, TOKENS, CHANNELS, CODES = 48, 4, 2, 3, 4, 6, 5, 11
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def weights(
    soft: bool,
    rope: bool = False,
    registers: int = 0,
    decoder_class_token: bool = True,
    scale: bool = True,
    movq: bool = False,
    placed_prefix: bool = True,
) -> dict[str, Tensor]:
    """A state dict as that code saves it, of random numbers. ``placed_prefix``: whether the class token and the registers have
    positions; ``movq``: the decoder's LayerNorms have no weights, and the latents modulate them."""
    torch.manual_seed(0)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape)

    state: dict[str, Tensor] = {}
    for side in ("encoder", "decoder"):
        has_class = side == "encoder" or decoder_class_token
        prefix = has_class + registers
        state[f"{side}.model.pos_embed"] = normal(1, GRID**2 + prefix * placed_prefix, WIDTH)
        modulated = movq and side == "decoder"
        if has_class:
            state[f"{side}.model.cls_token"] = normal(1, 1, WIDTH)
        if registers:
            state[f"{side}.model.reg_token"] = normal(1, registers, WIDTH)
        state[f"{side}.model.patch_embed.proj.weight"] = normal(WIDTH, 3, PATCH, PATCH, size=0.2)
        state[f"{side}.model.patch_embed.proj.bias"] = normal(WIDTH)
        for index in range(DEPTH):
            block = f"{side}.model.blocks.{index}"
            if modulated:
                state[f"{block}.adaLN_modulation.1.weight"] = normal(4 * WIDTH, CHANNELS, size=CHANNELS**-0.5)
                state[f"{block}.adaLN_modulation.1.bias"] = normal(4 * WIDTH)
            for norm in () if modulated else ("norm1", "norm2"):
                state[f"{block}.{norm}.weight"], state[f"{block}.{norm}.bias"] = (
                    1 + normal(WIDTH, size=0.1),
                    normal(WIDTH, size=0.1),
                )
            for name, shape in (
                ("attn.qkv", (3 * WIDTH, WIDTH)),
                ("attn.proj", (WIDTH, WIDTH)),
                ("mlp.fc1", (4 * WIDTH, WIDTH)),
                ("mlp.fc2", (WIDTH, 4 * WIDTH)),
            ):
                state[f"{block}.{name}.weight"] = normal(*shape, size=shape[1] ** -0.5)
                state[f"{block}.{name}.bias"] = normal(shape[0], size=0.1)
            if scale and not modulated:
                state[f"{block}.ls1.gamma"], state[f"{block}.ls2.gamma"] = normal(WIDTH), normal(WIDTH)
        if modulated:
            state[f"{side}.model.norm.adaLN_modulation.1.weight"] = normal(2 * WIDTH, CHANNELS)
            state[f"{side}.model.norm.adaLN_modulation.1.bias"] = normal(2 * WIDTH)
        else:
            state[f"{side}.model.norm.weight"] = 1 + normal(WIDTH, size=0.1)
            state[f"{side}.model.norm.bias"] = normal(WIDTH, size=0.1)
        state[f"{side}.latent_pos_embed"] = normal(1, TOKENS, WIDTH)
        if rope:
            state[f"{side}.freqs"] = normal(2, DEPTH, WIDTH // 2)
            state[f"{side}.freqs_t_x"] = torch.arange(GRID**2) % GRID
    state["encoder.latent_tokens"], state["decoder.mask_token"] = normal(1, TOKENS, WIDTH), normal(1, 1, WIDTH)
    state["decoder.to_pixel.model.weight"] = normal(3 * PATCH**2, WIDTH, size=0.05)
    state["decoder.to_pixel.model.bias"] = normal(3 * PATCH**2, size=0.1)
    state["quant_conv.weight"], state["quant_conv.bias"] = normal(CHANNELS, WIDTH, size=WIDTH**-0.5), normal(CHANNELS)
    state["post_quant_conv.weight"], state["post_quant_conv.bias"] = normal(WIDTH, CHANNELS), normal(WIDTH)
    if soft:
        state["quantize.embedding"] = normal(2, CODES, CHANNELS)
        state["quantize.codebook_used"] = torch.zeros(2, 65536)
    state["repa_model.norm.weight"] = torch.ones(3)
    return state


def normalized(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    there = f"{name}.weight" in state
    weight, bias = (state[f"{name}.{part}"].double() if there else None for part in ("weight", "bias"))
    return F.layer_norm(x, (WIDTH,), weight, bias, eps=1e-6)


def blocks(
    state: dict[str, Tensor], side: str, x: Tensor, prefix: int, z: Tensor | None = None, axial_theta: float = 0.0
) -> Tensor:
    """x (B, prefix + hw + N, D) through the blocks and the last norm; patches turn by their places where the state says so, or
    by axes; z (B, N, C) modulates the latents' rows."""
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
                dim = WIDTH // HEADS
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
        attended = ((q @ k.transpose(-1, -2)) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
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


def encoded(state: dict[str, Tensor], images: Tensor, axial_theta: float = 0.0) -> Tensor:
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
    codes, out = F.normalize(state["quantize.embedding"].double(), dim=-1), []
    for book, part in zip(codes, z.chunk(len(codes), dim=1), strict=True):
        out.append((F.normalize(part, dim=-1) @ book.T / 0.07).softmax(-1) @ book)
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
    torch.testing.assert_close(model.decode(z).double(), decoded(state, z).clamp(-1, 1), **CLOSE)


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
    torch.manual_seed(1)
    global WIDTH
    narrow, WIDTH = WIDTH, 64
    try:
        wide |= {key: value for key, value in weights(soft=True).items() if key.startswith(("decoder.", "post_quant_conv."))}
        found = interop.Weights(wide, {"config": {"vq_mean": 0.25, "vq_std": 0.5}}, "test")
        tokenizer = interop.convert_softvq(found.state, found.config, HEADS)
        z = torch.randn(2, TOKENS, CHANNELS)
        wanted = decoded(wide, z)
    finally:
        WIDTH = narrow
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
