"""``load`` and ``convert`` over all kinds, the command, and DiT in diffusers' layout, held to diffusers itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from soft_weights import HEADS, soft_weights
from torch import Tensor
from torch.nn import functional as F

from textok_fast import DiT, DiTConfig, InputError, TexTok, TexTokConfig, cli, interop, ops
from textok_fast.diffusion import GaussianDiffusion, build_process
from textok_fast.inference import Engine, Plan, SamplingOptions, load_pipeline
from textok_fast.interop import schedulers

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def awake(**overrides: Any) -> DiT:
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 4, "width": 32, "depth": 2, "heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    model = DiT(DiTConfig(**{**sizes, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# -- the table of kinds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dit_2d", "dit"), ("dit_1d", "dit-1d"), ("sit_1d", "sit-1d"), ("titok_vq", "titok"), ("tatitok_vq", "tatitok")],
)
def test_the_kind_is_guessed(golden: Callable[[str], Any], name: str, kind: str) -> None:
    assert interop.guess_kind(interop.read_weights(golden(name)[0])) == kind
    assert set(cli.WEIGHT_KINDS) == set(interop.KINDS)


@pytest.mark.parametrize("name", ["dit_2d", "dit_1d", "sit_1d"])
@torch.no_grad()
def test_generators_give_the_peers_output(golden: Callable[[str], Any], name: str, tmp_path: Path) -> None:
    weights, io, config = golden(name)
    torch.save({"ema": weights, "model": {}}, tmp_path / "public.pt")
    model = interop.load(None, tmp_path / "public.pt", heads=config["num_heads"])
    torch.testing.assert_close(model(io["x"], io["t"], io["y"]), io["out"], **CLOSE)
    engine = Engine(model, Plan())  # type: ignore[call-overload]
    torch.testing.assert_close(engine(io["x"], io["t"], io["y"]), io["out"], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_our_own_directories_are_loaded_as_what_they_say(tmp_path: Path) -> None:
    model = awake()  # over patches, whose tensors alone look like a DiT over 1-D tokens
    model.save_pretrained(tmp_path / "generator")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.tensor([1, 2])
    assert torch.equal(interop.load(None, tmp_path / "generator")(x, t, y), model(x, t, y))
    tokenizer = TexTok(TexTokConfig(image_size=64, width=32, encoder_depth=1, decoder_depth=1, heads=2, text_dim=8))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = interop.load(None, str(tmp_path / "tokenizer"))
    assert isinstance(loaded, TexTok) and loaded.config == tokenizer.config
    with pytest.raises(InputError, match="knows its sizes: leave out heads"):
        interop.load("dit", tmp_path / "generator", heads=2)


@torch.no_grad()
def test_our_own_directories_are_converted_as_what_they_say(golden: Callable[[str], Any], tmp_path: Path) -> None:
    model = awake(guided_channels=2, time_scale=3.0)  # over patches, whose tensors alone look like a DiT over 1-D tokens
    model.save_pretrained(tmp_path / "own")
    report = interop.convert(None, tmp_path / "own", tmp_path / "again")
    assert (report["kind"], report["class"], report["what"]) == ("own", "DiT", "a DiT in this library's format")
    assert DiT.from_pretrained(tmp_path / "again").config == model.config
    assert interop.convert("dit", tmp_path / "own", tmp_path / "said")["kind"] == "dit"
    with pytest.raises(InputError, match="own is a DiT in this library's format, not titok"):
        interop.convert("titok", tmp_path / "own", tmp_path / "no")
    with pytest.raises(InputError, match="is in this library's format: leave out heads"):
        interop.convert("dit", tmp_path / "own", tmp_path / "no", heads=2)
    # A generator and a tokenizer that were converted before become a pipeline; the generator does not say how it was trained.
    sit, _, config = golden("sit_1d")
    interop.convert("sit-1d", sit, tmp_path / "sit", heads=config["num_heads"])
    interop.convert("tatitok", golden("tatitok_vae")[0], tmp_path / "tatitok", heads=4)
    with pytest.raises(InputError, match="sit does not say how it was trained: give the kind it was"):
        interop.convert(None, tmp_path / "sit", tmp_path / "no", tmp_path / "tatitok")
    with pytest.raises(InputError, match="tatitok is in this library's format: leave out tokenizer.heads"):
        interop.convert("sit-1d", tmp_path / "sit", tmp_path / "no", tmp_path / "tatitok", tokenizer_options={"heads": 4})
    with pytest.raises(InputError, match="tatitok is a TexTok in this library's format, not sit-1d"):
        interop.convert("sit-1d", tmp_path / "tatitok", tmp_path / "no", tmp_path / "tatitok")
    assert not (tmp_path / "no").exists()
    report = interop.convert("sit-1d", tmp_path / "sit", tmp_path / "pipe", tmp_path / "tatitok")
    assert report["tokenizer"] == "a TiTok in this library's format"
    pipe = load_pipeline(tmp_path / "pipe")
    wanted = interop.load("sit-1d", sit, heads=config["num_heads"]).state_dict()
    assert pipe.objective == "flow" and all(
        torch.equal(value, wanted[key]) for key, value in pipe.generator.state_dict().items()
    )
    assert isinstance(interop.load(None, tmp_path / "pipe" / "tokenizer"), interop.TiTok)
    with pytest.raises(InputError, match="pipe is a pipeline of this library: name one of its parts, such as .*pipe/generator"):
        interop.convert(None, tmp_path / "pipe", tmp_path / "no")


def test_parts_of_our_own_pipeline_for_diffusers(golden: Callable[[str], Any], tmp_path: Path) -> None:
    """A flow, whose scheduler says nothing of a Gaussian generator's noise, and its names."""
    pytest.importorskip("diffusers")
    sit, _, config = golden("sit_1d")
    options: dict[str, Any] = {"heads": config["num_heads"], "tokenizer_options": {"heads": 4}}
    interop.convert("sit-1d", sit, tmp_path / "pipe", golden("tatitok_vae")[0], **options)
    pipe: Any = load_pipeline(tmp_path / "pipe")
    pipe.label_names = ["cow", "hen"]
    interop.TexTokPipeline.from_textok(pipe).save_pretrained(tmp_path / "saved")
    interop.convert("sit-1d", tmp_path / "saved" / "transformer", tmp_path / "again", tmp_path / "saved" / "vae")
    again: Any = load_pipeline(tmp_path / "again")
    assert (again.objective, again.label_names) == ("flow", ["cow", "hen"])
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler is a flow's"):
        interop.convert("dit-1d", tmp_path / "saved" / "transformer", tmp_path / "no", tmp_path / "saved" / "vae")


def test_the_weights_themselves_are_not_overwritten(golden: Callable[[str], Any], tmp_path: Path) -> None:
    sit, titok = golden("sit_1d")[0], golden("tatitok_vae")[0]
    for name, weights in (("sit", sit), ("p/tokenizer", titok)):
        (tmp_path / name).mkdir(parents=True)
        save_file(weights, tmp_path / name / "model.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "sit")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    for source in (tmp_path / "sit", tmp_path / "sit" / "model.safetensors"):
        for out in (tmp_path / "sit", tmp_path / "link", tmp_path / "p" / ".." / "sit"):
            with pytest.raises(InputError, match="would overwrite files beside the weights in .*: choose another directory"):
                interop.convert("sit-1d", source, out, heads=4)
    with pytest.raises(InputError, match="p would overwrite files beside the weights in .*tokenizer"):
        interop.convert(
            "sit-1d", tmp_path / "sit", tmp_path / "p", tmp_path / "p" / "tokenizer", heads=4, tokenizer_options={"heads": 4}
        )
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("registers", [0, 1])
@torch.no_grad()
def test_a_maetok_keeps_its_calls(registers: int, tmp_path: Path) -> None:
    state = soft_weights(soft=False, registers=registers)
    if not registers:  # nor a class token: nothing in the model says that it is no TexTok
        for side in ("encoder", "decoder"):
            del state[f"{side}.model.cls_token"]
            state[f"{side}.model.pos_embed"] = state[f"{side}.model.pos_embed"][:, 1:]
    peer: Any = interop.load("maetok", state, heads=HEADS)
    assert interop.convert("maetok", state, tmp_path / "own", heads=HEADS)["class"] == "TexTok"
    interop.convert(None, tmp_path / "own", tmp_path / "again")
    images = torch.rand(1, 3, 12, 12) * 2 - 1
    for name in ("own", "again"):
        loaded: Any = interop.load(None, tmp_path / name)
        assert isinstance(loaded, interop.ContinuousTokenizer)
        assert torch.equal(loaded.decode(loaded.encode(images)[0]), peer.decode(peer.encode(images)[0]))
        assert TexTok.from_pretrained(tmp_path / name).config == peer.tokenizer.config


@pytest.mark.parametrize("kind", ["softvq", "maetok"])
@torch.no_grad()
def test_a_continuous_tokenizer_behind_its_generator(golden: Callable[[str], Any], tmp_path: Path, kind: str) -> None:
    """Pictures are the peers': samples x vq_std + vq_mean, decoded."""
    sit, _, config = golden("sit_1d")
    movq = {} if kind == "softvq" else {"rope": True, "decoder_class_token": False, "movq": True}
    (tmp_path / kind).mkdir()
    save_file(soft_weights(kind == "softvq", tokens=8, channels=6, **movq), tmp_path / kind / "model.safetensors")
    (tmp_path / kind / "config.json").write_text(json.dumps({"config": {"vq_mean": 0.25, "vq_std": 0.5}}))
    out = tmp_path / "pipe"
    interop.convert(None, sit, out, tmp_path / kind, heads=config["num_heads"], tokenizer_options={"heads": HEADS})
    peer: Any = interop.load(kind, tmp_path / kind, heads=HEADS)
    options = SamplingOptions("sde", steps=3, guidance_scale=1.75, guidance_interval=(0.0, 0.7))
    for plan in (None, Plan()):
        made = load_pipeline(out, plan=plan)([7, 8], seed=0, options=options, output="float")  # type: ignore[list-item]
        wanted = peer.decode(made.tokens * peer.vq_std + peer.vq_mean).clamp(-1, 1)
        torch.testing.assert_close(made.images, wanted, atol=1e-4, rtol=1e-4)
    assert isinstance(interop.load(None, out / "tokenizer"), interop.ContinuousTokenizer)


@torch.no_grad()
def test_a_converted_tokenizer_keeps_its_calls(golden: Callable[[str], Any], tmp_path: Path) -> None:
    weights = golden("titok_vq")[0]
    interop.convert("titok", weights, tmp_path / "titok", num_heads=4)
    loaded: Any = interop.load("titok", tmp_path / "titok")
    assert isinstance(loaded, interop.TiTok)
    peer: Any = interop.load("titok", weights, heads=4)
    assert torch.equal(
        loaded.decode_tokens(torch.zeros(1, 8, dtype=torch.long)), peer.decode_tokens(torch.zeros(1, 8, dtype=torch.long))
    )


def test_latents_of_titok_can_be_trained_on(golden: Callable[[str], Any]) -> None:
    tokenizer: Any = interop.load("titok", golden("titok_vq")[0], heads=4)
    size = tokenizer.tokenizer.config.image_size
    z, found = tokenizer.encode(torch.rand(2, 3, size, size))  # gradients are on, as everywhere by default
    assert tokenizer.decode_tokens(found["min_encoding_indices"]).shape == (2, 3, size, size)
    torch.nn.Linear(z.shape[-1], 1)(z).sum().backward()


def test_shapes_that_belong_to_nothing_are_an_error(golden: Callable[[str], Any]) -> None:
    for name, key in (("dit_2d", "final_layer.linear.bias"), ("titok_vq", "decoder.ffn.0.bias")):
        weights = dict(golden(name)[0])
        weights[key] = weights[key][:-1]
        with pytest.raises(InputError):
            interop.load(None, weights, heads=4)


@torch.no_grad()
def test_diffusers_own_file_of_our_model(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    model = awake(frequency_shift=0.0)
    interop.to_diffusers_dit(model).save_pretrained(tmp_path)  # type: ignore[operator]
    again = interop.load("diffusers-dit", tmp_path, frequency_shift=0)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 5])
    torch.testing.assert_close(again(x, t, y), model(x, t, y), **CLOSE)


def dit_weights(patch: int, outputs: int, size: int = 8) -> dict[str, Tensor]:
    """A DiT of width 32, depth 2 and 4 channels in the authors' layout, of random numbers."""
    width, rows = 32, {"attn.qkv": 96, "attn.proj": 32, "mlp.fc1": 128, "mlp.fc2": 32, "adaLN_modulation.1": 192}
    shapes: dict[str, tuple[int, ...]] = {"x_embedder.proj": (width, 4, patch, patch)}
    shapes |= {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    shapes |= {"final_layer.linear": (patch**2 * outputs, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    for index in range(2):
        shapes |= {f"blocks.{index}.{name}": (out, 128 if name == "mlp.fc2" else width) for name, out in rows.items()}
    state = {f"{name}.weight": 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    state |= {f"{name}.bias": 0.1 * torch.randn(shape[0]) for name, shape in shapes.items()}
    return {
        **state,
        "pos_embed": torch.randn(1, (size // patch) ** 2, width),
        "y_embedder.embedding_table.weight": torch.randn(6, 32),
    }


def dit_formula(state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, heads: int = 4) -> Tensor:
    """x (B, 4, S, S) through the formula of DiT's paper and code, over their names, in float64."""
    state, x = {name: value.double() for name, value in state.items()}, x.double()

    def linear(value: Tensor, name: str) -> Tensor:
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    patch = state["x_embedder.proj.weight"].shape[-1]
    grid = x.shape[-1] // patch
    hidden = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    hidden = hidden.flatten(2).transpose(1, 2) + state["pos_embed"]
    angles = t.double().unsqueeze(1) * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    times = linear(F.silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    condition = F.silu(times + state["y_embedder.embedding_table.weight"][y])
    for index in range(2):
        block = f"blocks.{index}"
        values = linear(condition, f"{block}.adaLN_modulation.1").chunk(6, 1)
        q, k, v = (
            linear(modulated(hidden, *values[:2]), f"{block}.attn.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed = ((q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        hidden = hidden + values[2].unsqueeze(1) * linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        inner = F.gelu(linear(modulated(hidden, *values[3:5]), f"{block}.mlp.fc1"), approximate="tanh")
        hidden = hidden + values[5].unsqueeze(1) * linear(inner, f"{block}.mlp.fc2")
    out = linear(modulated(hidden, *linear(condition, "final_layer.adaLN_modulation.1").chunk(2, 1)), "final_layer.linear")
    out = out.unflatten(1, (grid, grid)).unflatten(-1, (patch, patch, -1))
    return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), -1, *x.shape[2:])


@pytest.mark.parametrize("outputs", [4, 8])  # without and with learned variance
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
@torch.no_grad()
def test_a_dit_of_each_patch_size_is_the_formula(patch: int, outputs: int) -> None:
    size = 2 * patch if patch > 2 else 8
    state = dit_weights(patch, outputs, size)
    x, t, y = torch.randn(2, 4, size, size), torch.tensor([5, 900]), torch.tensor([3, 5])
    wanted = dit_formula(state, x, t, y).float()
    assert wanted.shape == (2, outputs, size, size)
    model: Any = interop.load(None, state, heads=4)
    assert (model.config.patch_size, model.config.input_size, model.config.learn_sigma) == (patch, size, outputs == 8)
    torch.testing.assert_close(model(x, t, y), wanted, **CLOSE)
    torch.testing.assert_close(Engine(model, Plan())(x, t, y), wanted, atol=2e-5, rtol=1e-4)
    if outputs == 8:
        without: Any = interop.load("dit", state, heads=4, learn_sigma=False)
        torch.testing.assert_close(without(x, t, y), wanted[:, :4], **CLOSE)


@pytest.mark.parametrize("guided", [0, 3, 4])
@torch.no_grad()
def test_guided_channels_are_the_formula(guided: int) -> None:
    """e_u + s (e_c - e_u) in the first so many channels, in all of them for 0; the others, and variances, are the model's."""
    state = dit_weights(2, 8)
    x, labels, channels = torch.randn(2, 4, 8, 8), torch.tensor([1, 4]), guided or 4
    t, y = torch.full((4,), 500), torch.cat([labels, torch.full((2,), 5)])
    plain = dit_formula(state, torch.cat([x, x]), t, y)
    conditional, null = plain.chunk(2)
    wanted = plain.clone()
    wanted[:, :channels] = (null + 4.0 * (conditional - null)).repeat(2, 1, 1, 1)[:, :channels]
    assert (wanted - plain)[:2].abs().amax((0, 2, 3)).gt(1e-2).tolist() == [index < channels for index in range(8)]
    model: Any = interop.load("dit", state, heads=4, guided_channels=guided)
    torch.testing.assert_close(model.forward_with_cfg(torch.cat([x, x]), t, y, 4.0), wanted.float(), **CLOSE)
    # One step of DDIM from its only time, 0, in the engine: x0 = (x - sqrt(1 - a) e) / sqrt(a), a of that time.
    t = torch.zeros(4, dtype=torch.int64)
    conditional, null = dit_formula(state, torch.cat([x, x]), t, y)[:, :4].chunk(2)
    noise = conditional.clone()
    noise[:, :channels] = (null + 4.0 * (conditional - null))[:, :channels]
    a = 1 - 1e-4
    made = Engine(model, Plan()).sample(
        build_process("gaussian", True), labels=labels, noise=x, steps=1, guidance_scale=4.0, sampler="ddim", seeds=[0, 1]
    )
    torch.testing.assert_close(made, ((x - (1 - a) ** 0.5 * noise) / a**0.5).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [3, 4])
@torch.no_grad()
def test_guidance_on_as_many_channels_as_said(golden: Callable[[str], Any], channels: int) -> None:
    weights, io, config = golden("dit_2d")
    model: Any = interop.load("dit", weights, heads=config["num_heads"], guided_channels=channels)
    out = model.forward_with_cfg(io["cfg_x"], io["cfg_t"], io["cfg_y"], config["cfg_scale"])
    torch.testing.assert_close(out[:, :3], io["cfg_out"][:, :3], **CLOSE)
    assert torch.allclose(out[:, 3], io["cfg_out"][:, 3], atol=1e-5) is (channels == 3)
    torch.testing.assert_close(out[:, 4:], io["cfg_out"][:, 4:], **CLOSE)
    # The engine guides so by itself.
    process = build_process("gaussian", True)
    options: dict[str, Any] = {"labels": torch.tensor([1, 2]), "seeds": [3, 4], "steps": 3, "guidance_scale": 4.0}
    engine = Engine(model, Plan())
    assert torch.equal(engine.sample(process, **options), engine.sample(process, guided_channels=channels, **options))
    assert not torch.equal(engine.sample(process, **options), engine.sample(process, guided_channels=1, **options))


@pytest.mark.parametrize("tokens", [0, 6])
@torch.no_grad()
def test_normalized_queries_and_keys(tokens: int) -> None:
    """qk-norm: a peer's block written from the formula, our DiT and the engine over it."""
    sizes: dict[str, Any] = {"num_tokens": tokens, "input_size": 0, "patch_size": 1} if tokens else {}
    model = awake(**sizes, qk_norm=True, learn_sigma=False)
    state = dict(model.state_dict())
    assert "blocks.1.attn.k_norm.weight" in state
    if not tokens:
        state["x_embedder.proj.weight"] = state.pop("x_embedder.weight").unflatten(1, (4, 2, 2))
        state["x_embedder.proj.bias"] = state.pop("x_embedder.bias")
        for name in ("weight", "bias"):
            last = state[f"final_layer.linear.{name}"].unflatten(0, (4, 2, 2))
            state[f"final_layer.linear.{name}"] = last.movedim(0, 2).flatten(0, 2)
    again: Any = interop.load("sit-1d" if tokens else "dit", state, heads=2)
    x = torch.randn(2, tokens, 4) if tokens else torch.randn(2, 4, 8, 8)
    t, y = torch.tensor([0.1, 0.7]), torch.tensor([1, 5])
    torch.testing.assert_close(again(x, t, y), model(x, t, y), **CLOSE)
    for precision, bound in (("fp32", 1e-5), ("bf16", 0.03), ("int8", 0.05), ("fp8", 0.15)):
        out = Engine(again, Plan(precision))(x, t, y)  # type: ignore[arg-type]
        assert (out - model(x, t, y)).norm() / model(x, t, y).norm() < bound
    attention = model.blocks[0].attn
    hidden = torch.randn(2, 7, 32)
    q, k, v = attention.qkv(hidden).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)  # type: ignore[operator,union-attr]
    q, k = attention.q_norm(q), attention.k_norm(k)  # type: ignore[operator,union-attr]
    mixed = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
    wanted = attention.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[operator,union-attr]
    torch.testing.assert_close(attention(hidden), wanted, **CLOSE)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.to("meta"), "x_embedder.proj.weight is on the meta device, where it has no values"),
        (lambda value: value.long(), "x_embedder.proj.weight is int64, wanted floats"),
        (lambda value: value.to(torch.complex64), "x_embedder.proj.weight is complex64, wanted floats"),
        (lambda value: value * float("nan"), "x_embedder.proj.weight contains NaN or infinity"),
    ],
)
def test_values_that_are_no_weights_are_named(golden: Callable[[str], Any], change: Any, message: str) -> None:
    weights = golden("dit_2d")[0]
    key = "x_embedder.proj.weight"
    with pytest.raises(InputError, match=message):
        interop.load("dit", {**weights, key: change(weights[key])}, heads=4)
    half: Any = interop.load("dit", {name: value.half() for name, value in weights.items()}, heads=4)
    assert half.x_embedder.weight.dtype == torch.float32


def test_wrong_kinds_and_options_are_named(golden: Callable[[str], Any]) -> None:
    weights, _, config = golden("dit_2d")
    with pytest.raises(InputError, match="unknown kind of weights 'pixart'; known: dit, diffusers-dit"):
        interop.load("pixart", weights)
    with pytest.raises(InputError, match="looks like dit .*, not like titok"):
        interop.load("titok", weights)
    with pytest.raises(InputError, match="holds no model that is known here"):
        interop.load(None, {"w": torch.zeros(1)})
    with pytest.raises(InputError, match="dit has no option 'guided'; it has heads, guided_channels, learn_sigma, time_scale"):
        interop.load("dit", weights, heads=config["num_heads"], guided=3)
    with pytest.raises(InputError, match="learn_sigma=True, but final_layer.linear.weight makes as many channels"):
        interop.load("dit-1d", golden("sit_1d")[0], heads=4)
    for heads in (0, -2, 5, 1.5, "four", True):
        for kind, name in (("dit", "dit_2d"), ("sit-1d", "sit_1d"), ("titok", "titok_vq")):
            with pytest.raises(
                InputError, match=f"heads must be a whole number that divides the width .*, got heads={heads!r}"
            ):
                interop.load(kind, golden(name)[0], heads=heads)
    for nothing in (None, 3, [weights]):
        with pytest.raises(InputError, match="weights are a file, a directory, a Hub id or a mapping .*, got "):
            interop.load("dit", nothing)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sd-vae has no option 'heads'; it has image_size"):
        interop.load("sd-vae", {"decoder.mid_block.resnets.0.conv1.weight": torch.zeros(1)}, heads=2)
    for kind, name in (("titok", "tatitok_vq"), ("tatitok", "titok_vq")):
        with pytest.raises(InputError, match=f"looks like {name.split('_')[0]} .*, not like {kind}"):
            interop.load(kind, golden(name)[0], heads=4)
    with pytest.raises(InputError, match="heads and num_heads are the same: give one of them"):
        interop.load("dit", weights, heads=4, num_heads=2)
    for option, value, wanted in (
        ("guided_channels", "3", "a whole number"),
        ("guided_channels", True, "a whole number"),
        ("learn_sigma", "no", "true or false"),
        ("time_scale", "x", "a number"),
    ):
        with pytest.raises(InputError, match=f"^{option} is {wanted}, got {value!r}$"):
            interop.load("dit", weights, heads=4, **{option: value})
    with pytest.raises(InputError, match="normalize_codes is true or false, got 'false'"):
        interop.load("titok", golden("titok_vq")[0], heads=4, normalize_codes="false")
    with pytest.raises(InputError, match="the given state dict: .* missing y_embedder.embedding_table.weight"):
        interop.load("dit", {key: value for key, value in weights.items() if "y_embedder" not in key})


@torch.no_grad()
def test_a_sit_with_learned_variance_leaves_it_out(golden: Callable[[str], Any], tmp_path: Path) -> None:
    """Its code drops the second half of the channels: the same weights with the first half's rows only."""
    weights, io, config = golden("sit_1d")
    wide = dict(weights)
    for name in ("weight", "bias"):
        last = wide[f"final_layer.linear.{name}"]
        wide[f"final_layer.linear.{name}"] = torch.cat([last, torch.randn_like(last)])
    model: Any = interop.load("sit-1d", wide, heads=config["num_heads"])
    assert not model.config.learn_sigma
    torch.testing.assert_close(model(io["x"], io["t"], io["y"]), io["out"], **CLOSE)
    assert interop.guess_kind(interop.read_weights(wide)) == "dit-1d"  # nothing in it tells which
    both: Any = interop.load(None, wide, heads=config["num_heads"])
    torch.testing.assert_close(both(io["x"], io["t"], io["y"])[..., :6], io["out"], **CLOSE)
    interop.convert("sit-1d", wide, tmp_path / "own", heads=config["num_heads"])
    assert torch.equal(DiT.from_pretrained(tmp_path / "own")(io["x"], io["t"], io["y"]), model(io["x"], io["t"], io["y"]))


@torch.no_grad()
def test_heads_are_what_normalized_queries_tell() -> None:
    model = awake(num_tokens=6, input_size=0, patch_size=1, qk_norm=True, learn_sigma=False, heads=4)
    state = dict(model.state_dict())
    x, t, y = torch.randn(2, 6, 4), torch.tensor([0.1, 0.7]), torch.tensor([1, 5])
    torch.testing.assert_close(interop.load("sit-1d", state)(x, t, y), model(x, t, y), **CLOSE)
    with pytest.raises(InputError, match="heads=2 of width 32 have 16 channels each, but attn.q_norm.weight has 8"):
        interop.load("sit-1d", state, heads=2)


# -- diffusers -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("eps", [{}, {"norm_eps": 1e-6}, {"norm_eps": 0.1}])  # diffusers' default is 1e-5, DiT's 1e-6
def test_diffusers_dit_both_ways(tmp_path: Path, eps: dict[str, float]) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    peer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=5, **eps,
    ).eval()  # fmt: skip
    for block in peer.transformer_blocks[1:]:  # as the published weights were converted: one embedder, in every block
        block.norm1.emb.load_state_dict(peer.transformer_blocks[0].norm1.emb.state_dict())
    peer.save_pretrained(tmp_path / "peer")
    model: Any = interop.load("diffusers-dit", tmp_path / "peer", guided_channels=3)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.tensor([0, 5])
    wanted = peer(x, t, y, return_dict=False)[0]
    torch.testing.assert_close(model(x, t, y), wanted, **CLOSE)
    torch.testing.assert_close(Engine(model, Plan())(x, t, y), wanted, atol=2e-5, rtol=1e-4)
    assert model.config.guided_channels == 3 and model.config.mlp_norm_eps == peer.config.norm_eps
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(DiT.from_pretrained(tmp_path / "own")(x, t, y), model(x, t, y))
    back = interop.to_diffusers_dit(model)
    torch.testing.assert_close(back(x, t, y, return_dict=False)[0], wanted, **CLOSE)
    ours = awake()
    torch.testing.assert_close(interop.to_diffusers_dit(ours)(x, t, y, return_dict=False)[0], ours(x, t, y), **CLOSE)
    peer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.add_(1)
    peer.save_pretrained(tmp_path / "uneven")
    with pytest.raises(InputError, match=r"blocks.1.norm1.emb.class_embedder.embedding_table.weight differs from block 0's"):
        interop.load("diffusers-dit", tmp_path / "uneven")
    about = json.loads((tmp_path / "peer" / "config.json").read_text())
    for name, value in (("activation_fn", "gelu"), ("norm_type", "ada_norm")):
        (tmp_path / "peer" / "config.json").write_text(json.dumps({**about, name: value}))
        with pytest.raises(InputError, match=f"a DiT has {name} '.*', got '{value}'"):
            interop.load("diffusers-dit", tmp_path / "peer")
    with pytest.raises(InputError, match="2-D patches with class labels"):
        interop.to_diffusers_dit(awake(num_tokens=4, input_size=0, patch_size=1))
    with pytest.raises(InputError, match="no config.json"):
        interop.load("diffusers-dit", dict(peer.state_dict()))


@torch.no_grad()
def test_the_sd_vae_is_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    model: Any = interop.load(None, tmp_path / "vae")
    z, x = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 8, 8)
    assert torch.equal(model.decode(z).sample, vae.decode(z).sample)
    assert torch.equal(model.encode(x).latent_dist.mode(), vae.encode(x).latent_dist.mode())
    # Older files name the attention's layers otherwise, and as 1 x 1 convolutions.
    old = {}
    for name, value in vae.state_dict().items():
        for new, former in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
            if new in name and value.ndim == 2:
                value = value[:, :, None, None]
            name = name.replace(new, former)
        old[name] = value.contiguous()
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "old" / "config.json").write_text((tmp_path / "vae" / "config.json").read_text())
    again: Any = interop.load("sd-vae", tmp_path / "old")
    assert torch.equal(again.decode(z).sample, vae.decode(z).sample)


# -- the command ---------------------------------------------------------------------------------------------------------------


def test_convert_writes_our_own_format(
    golden: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, io, _ = golden("tatitok_vq")
    save_file(weights, tmp_path / "foreign.safetensors")
    command = ["convert", "--weights", str(tmp_path / "foreign.safetensors"), "--out", str(tmp_path / "own"), "heads=4"]
    assert cli.main(command) == 0
    assert "tatitok (TA-TiTok, VQ or KL)" in (out := capsys.readouterr().out) and f"wrote {tmp_path / 'own'}" in out
    tokenizer = TexTok.from_pretrained(tmp_path / "own")
    assert torch.equal(tokenizer.encode(2 * io["image"] - 1).indices, io["indices"].squeeze(1))  # type: ignore[arg-type]
    assert cli.main(["convert", "--from", "dit", *command[1:]]) == 2
    assert "looks like tatitok" in capsys.readouterr().err
    assert cli.main([*command, "colour"]) == 2
    assert "settings are key=value, or tokenizer.key=value, got 'colour'" in capsys.readouterr().err


def test_a_generator_and_its_tokenizer_become_a_pipeline(golden: Callable[[str], Any], tmp_path: Path) -> None:
    sit, _, config = golden("sit_1d")  # 8 tokens of 6 channels, as the tokenizer's
    titok, _, _ = golden("tatitok_vae")
    tokenizer = interop.convert_titok(titok, 4)
    with pytest.raises(InputError, match="no published model has width 32: give heads"):
        interop.convert("sit-1d", sit, tmp_path / "pipe", tokenizer=titok)
    save_file(sit, tmp_path / "sit.safetensors")
    report = interop.convert(
        "sit-1d",
        tmp_path / "sit.safetensors",
        tmp_path / "pipe",
        dict(titok),
        heads=config["num_heads"],
        tokenizer_options={"heads": 4},
    )
    assert report["kind"] == "sit-1d" and report["tokenizer"] == "TA-TiTok, VQ or KL"
    pipe = load_pipeline(tmp_path / "pipe", plan=Plan())
    made = pipe([7, 8], captions=["", ""], seed=0, options=SamplingOptions(steps=2, guidance_scale=2.0))  # type: ignore[call-arg]
    assert made.images.shape == (2, 32, 32, 3) and made.tokens.shape == (2, 8, 6)
    assert isinstance(tokenizer, TexTok)


def small_vae(**overrides: Any) -> Any:
    """An f2 autoencoder of diffusers."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    sizes |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**{**sizes, **overrides}).eval()


@pytest.mark.parametrize(("given", "wanted"), [([], 3), (["guided_channels=4"], 4), (["guided_channels=0"], 0)])
@torch.no_grad()
def test_a_dit_and_an_sd_vae_become_a_pipeline(
    golden: Callable[[str], Any], tmp_path: Path, given: list[str], wanted: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command to the pipeline, one to the pictures; the latents are those of DiT's authors' guided forward."""
    vae = small_vae(sample_size=256)
    vae.save_pretrained(tmp_path / "vae")
    weights, _, config = golden("dit_2d")
    torch.save({"ema": weights}, tmp_path / "DiT.pt")
    command = ["convert", "--from", "dit", "--weights", str(tmp_path / "DiT.pt"), "--tokenizer", str(tmp_path / "vae")]
    assert cli.main([*command, "--out", str(tmp_path / "pipe"), f"heads={config['num_heads']}", *given]) == 0
    assert "with Stable Diffusion's autoencoder f8, through diffusers, pictures of 16 px" in capsys.readouterr().out
    pipe: Any = load_pipeline(tmp_path / "pipe", plan=Plan())
    assert (pipe.generator.config.guided_channels, pipe.schedule, pipe.objective) == (wanted, "linear", "gaussian")
    options = SamplingOptions("ddim", steps=1, guidance_scale=config["cfg_scale"])
    made = pipe([1, 2], seed=0, options=options, output="float")
    assert made.tokens.shape == (2, 4, 8, 8) and made.images.shape == (2, 3, 16, 16)
    # One step of DDIM from noise at its only time, 0: x0 = (x - sqrt(1 - a) e) / sqrt(a).
    peer: Any = interop.load("dit", weights, heads=config["num_heads"], guided_channels=wanted)
    noise = ops.seeded_normal(torch.tensor([0, 1]), torch.tensor(0), (4, 8, 8))
    null = torch.full((2,), peer.config.num_classes)
    times, labels = torch.zeros(4, dtype=torch.int64), torch.cat([torch.tensor([1, 2]), null])
    out = peer.forward_with_cfg(torch.cat([noise, noise]), times, labels, config["cfg_scale"])
    a = 1 - 1e-4
    torch.testing.assert_close(made.tokens, (noise - (1 - a) ** 0.5 * out[:2, :4]) / a**0.5, atol=1e-4, rtol=1e-4)
    pictures = vae.decode(made.tokens / 0.18215).sample.clamp(-1, 1)
    torch.testing.assert_close(made.images, pictures, atol=1e-4, rtol=1e-4)
    sample = ["sample", "--model", str(tmp_path / "pipe"), "--label", "1", "--steps", "2", "--guidance", "4", "--device", "cpu"]
    assert cli.main([*sample, "--out", str(tmp_path / "pictures")]) == 0
    assert Image.open(tmp_path / "pictures" / "00000.png").size == (16, 16)
    diffusers_pipe = interop.TexTokPipeline.from_pretrained(tmp_path / "pipe")
    assert diffusers_pipe(class_labels=[1], num_inference_steps=2, guidance_scale=4.0).images[0].size == (16, 16)


@torch.no_grad()
def test_diffusers_own_pipeline_is_one_directory(tmp_path: Path) -> None:
    """As facebook/DiT-XL-2-512 is on the Hub: transformer/ and vae/, which are also given apart."""
    diffusers = pytest.importorskip("diffusers")
    vae, model = small_vae(), awake(frequency_shift=1)
    transformer: Any = interop.to_diffusers_dit(model)
    diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "hub")
    report = interop.convert(None, tmp_path / "hub", tmp_path / "whole")
    assert (report["kind"], report["image_size"]) == ("diffusers-dit", 16)
    parts = interop.convert("diffusers-dit", tmp_path / "hub" / "transformer", tmp_path / "parts", tmp_path / "hub" / "vae")
    assert {**parts, "out": ""} == {**report, "out": ""}
    whole, apart = load_pipeline(tmp_path / "whole"), load_pipeline(tmp_path / "parts")
    assert whole.generator.config.guided_channels == 3
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.tensor([0, 4])
    torch.testing.assert_close(whole.generator(x, t, y), transformer(x, t, y, return_dict=False)[0], **CLOSE)
    options = SamplingOptions(steps=2, guidance_scale=4.0)
    assert torch.equal(whole([1], options=options).images, apart([1], options=options).images)  # type: ignore[list-item]
    with pytest.raises(InputError, match="is a pipeline of diffusers: name one of its parts"):
        interop.load(None, tmp_path / "hub")


def hub_pipeline(directory: Path, scheduler: Any, names: dict[str, str] | None = None) -> Path:
    """A directory that diffusers' DiTPipeline saved, of a small model."""
    diffusers = pytest.importorskip("diffusers")
    transformer: Any = interop.to_diffusers_dit(awake(frequency_shift=1))
    diffusers.DiTPipeline(transformer, small_vae(), scheduler, names).save_pretrained(directory)
    if names is not None:  # as facebook/DiT-XL-2-256 has them
        index = json.loads((directory / "model_index.json").read_text())
        (directory / "model_index.json").write_text(json.dumps({**index, "id2label": names}))
    return directory


@pytest.mark.parametrize("by_parts", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("DDIMScheduler", {}, ("epsilon", "linear")),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}, ("v", "linear")),
        ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}, ("x0", "cosine")),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, ("epsilon", "linear")),  # its sampling is not ours
    ],
)
def test_a_pipelines_scheduler_says_how_it_was_trained(
    tmp_path: Path, name: str, options: dict[str, Any], wanted: tuple[str, str], by_parts: bool
) -> None:
    diffusers = pytest.importorskip("diffusers")
    hub = hub_pipeline(tmp_path / "hub", getattr(diffusers, name)(**options))
    weights, tokenizer = (hub / "transformer", hub / "vae") if by_parts else (hub, None)
    interop.convert(None, weights, tmp_path / "own", tokenizer)
    pipe = load_pipeline(tmp_path / "own")
    assert (pipe.prediction, pipe.schedule) == wanted
    interop.convert(None, weights, tmp_path / "said", tokenizer, schedule="cosine")
    assert load_pipeline(tmp_path / "said").schedule == "cosine"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DDIMScheduler", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "got scaled_linear"),
        ("DDIMScheduler", {"beta_end": 0.012}, "from 0.0001 to 0.012"),
        ("DDIMScheduler", {"num_train_timesteps": 500}, "got linear in 500"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "with rescale_betas_zero_snr"),
        ("DDPMScheduler", {"trained_betas": [0.1] * 1000}, "with trained_betas"),
        ("FlowMatchEulerDiscreteScheduler", {}, "FlowMatchEulerDiscreteScheduler is a flow's"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, "is a flow's"),
    ],
)
def test_noise_that_is_not_known_is_refused(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    (tmp_path / "hub" / "transformer").mkdir(parents=True)
    getattr(diffusers, name)(**options).save_pretrained(tmp_path / "hub" / "scheduler")
    hub = tmp_path / "hub"
    with pytest.raises(InputError, match=message):
        schedulers.gaussian_noise(schedulers.read_scheduler(hub) or {})
    if name == "DDIMScheduler":
        model: Any = interop.to_diffusers_dit(awake(frequency_shift=1))
        model.save_pretrained(hub / "transformer")
        small_vae().save_pretrained(hub / "vae")
        (hub / "model_index.json").write_text("{}")
        with pytest.raises(InputError, match=message):
            interop.convert(None, hub, tmp_path / "no")
        assert not (tmp_path / "no").exists()
    (hub / "scheduler" / "scheduler_config.json").write_text("<html>")
    with pytest.raises(InputError, match="cannot read .*scheduler_config.json"):
        schedulers.read_scheduler(hub)


@torch.no_grad()
def test_the_names_of_classes_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    names = {"0": "tench, Tinca tinca", "1": "crane", "3": "crane, heron", "4": "hen"}
    hub = hub_pipeline(tmp_path / "hub", diffusers.DDIMScheduler(), names)
    theirs = diffusers.DiTPipeline.from_pretrained(hub)
    interop.convert(None, hub, tmp_path / "own")
    pipe: Any = load_pipeline(tmp_path / "own")
    assert pipe.label_names == ["tench, Tinca tinca", "crane", "2", "crane, heron", "hen"]
    for name in ("tench", "Tinca tinca", "hen", "heron"):
        assert [pipe.label_index(name)] == theirs.get_label_ids([name])
    assert pipe.label_index("tench, Tinca tinca") == 0 and pipe.label_index("crane") == 1 and pipe.label_index("2") == 2
    sample = ["sample", "--model", str(tmp_path / "own"), "--label", "Tinca tinca", "--steps", "2", "--device", "cpu"]
    assert cli.main([*sample, "--out", str(tmp_path / "pictures")]) == 0
    assert cli.main([*sample[:4], "cod", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "more")]) == 2
    assert "no class 'cod'; known: tench, Tinca tinca, crane" in capsys.readouterr().err
    pipe.label_names = ["crane, machine", "crane, bird"]
    with pytest.raises(InputError, match="the classes 0, 1 are called 'crane': give an index"):
        pipe.label_index("crane")


def test_what_an_sd_vae_does_not_decode_is_refused(golden: Callable[[str], Any], tmp_path: Path) -> None:
    dit, sit, titok = golden("dit_2d")[0], golden("sit_1d")[0], golden("titok_vq")[0]
    small_vae().save_pretrained(tmp_path / "vae")
    small_vae(latent_channels=8).save_pretrained(tmp_path / "other")
    out, heads = tmp_path / "pipe", {"heads": 4}
    with pytest.raises(
        InputError, match="makes 8 tokens of 6 channels, the tokenizer decodes latents of 4 channels and 16 x 16"
    ):
        interop.convert("sit-1d", sit, out, tmp_path / "vae", **heads)
    with pytest.raises(
        InputError, match="makes latents of 4 channels and 8 x 8, the tokenizer decodes latents of 8 channels and"
    ):
        interop.convert("dit", dit, out, tmp_path / "other", **heads)
    with pytest.raises(InputError, match="makes latents of 4 channels and 8 x 8, the tokenizer decodes 8 tokens of 4"):
        interop.convert("dit", dit, out, titok, **heads, tokenizer_options=heads)
    with pytest.raises(InputError, match="a pipeline decodes with a tokenizer, got DiT over 2-D patches"):
        interop.convert("dit", dit, out, dit, **heads, tokenizer_options=heads)
    with pytest.raises(InputError, match="have a multiple of 2 pixels, got image_size=15"):
        interop.load("sd-vae", tmp_path / "vae", image_size=15)
    with pytest.raises(InputError, match="image_size is a whole number of pixels, got 'big'"):
        interop.load("sd-vae", tmp_path / "vae", image_size="big")
    with pytest.raises(InputError, match="the generator says of which size its pictures are: leave tokenizer.image_size out"):
        interop.convert("dit", dit, out, tmp_path / "vae", **heads, tokenizer_options={"image_size": 48})
    for given, options in (("schedule", {"schedule": "linear"}), ("tokenizer.heads", {"tokenizer_options": heads})):
        with pytest.raises(InputError, match=f"^{given} is for a pipeline: give the tokenizer"):
            interop.convert("dit", dit, out, **heads, **options)
    about = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**about, "down_block_types": ["NoBlock2D"] * 2}))
    with pytest.raises(InputError, match="this is no configuration of an AutoencoderKL: .*NoBlock2D"):
        interop.load("sd-vae", tmp_path / "other")
    assert not out.exists()
    assert interop.convert(None, tmp_path / "vae", out, image_size=48)["kind"] == "sd-vae"
    assert json.loads((out / "config.json").read_text())["sample_size"] == 48


@pytest.mark.parametrize(("given", "wanted"), [(None, "cosine"), ("linear", "linear")])
def test_a_gaussian_generator_keeps_its_noise_schedule(
    golden: Callable[[str], Any], tmp_path: Path, given: str | None, wanted: str
) -> None:
    titok = golden("tatitok_vae")[0]
    model = awake(input_size=0, patch_size=1, num_tokens=8, in_channels=6, learn_sigma=True)
    state = dict(model.state_dict())
    interop.convert("dit-1d", state, tmp_path / "p", titok, heads=2, schedule=given, tokenizer_options={"heads": 4})
    pipe = load_pipeline(tmp_path / "p")
    assert isinstance(pipe.process, GaussianDiffusion) and pipe.process.schedule == wanted == pipe.schedule
    pipe.save_pretrained(tmp_path / "again")
    assert load_pipeline(tmp_path / "again").schedule == wanted
    with pytest.raises(InputError, match="unknown noise schedule 'sine'"):
        interop.convert("dit-1d", state, tmp_path / "no", titok, heads=2, schedule="sine", tokenizer_options={"heads": 4})
    assert not (tmp_path / "no").exists()


def test_tokens_that_do_not_fit_are_refused(golden: Callable[[str], Any], tmp_path: Path) -> None:
    sit, titok = golden("sit_1d")[0], golden("titok_vq")[0]
    with pytest.raises(InputError, match="makes 8 tokens of 6 channels, the tokenizer decodes 8 tokens of 4"):
        interop.convert("sit-1d", sit, tmp_path / "pipe", titok, heads=4, tokenizer_options={"heads": 4})
    with pytest.raises(InputError, match="a tokenizer goes with a generator"):
        interop.convert("titok", titok, tmp_path / "pipe", titok, heads=4)
    assert not (tmp_path / "pipe").exists()
