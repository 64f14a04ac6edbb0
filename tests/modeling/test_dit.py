from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from textok_fast import DiT, DiTConfig, InputError
from textok_fast.diffusion import classifier_free_guidance
from textok_fast.interop import load_dit
from textok_fast.modeling.dit import sincos_1d, sincos_2d, timestep_features
from textok_fast.modeling.text_encoders import TextFeatures

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Weights, inputs with outputs, and the peer's constructor arguments."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    return weights, {key.removeprefix("io."): value for key, value in tensors.items() if key.startswith("io.")}, config


def small(**overrides: Any) -> DiT:
    config = {"num_tokens": 4, "in_channels": 3, "width": 32, "depth": 2, "heads": 2, "num_classes": 5}
    return DiT(DiTConfig(**{**config, **overrides}))


def awake(**overrides: Any) -> DiT:
    """A small DiT whose zero-initialized parts are not zero."""
    model = small(**overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def text(batch: int = 2, length: int = 5, dim: int = 8) -> TextFeatures:
    return TextFeatures(torch.randn(batch, length, dim), torch.ones(batch, length, dtype=torch.bool))


# -- the peers' outputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit_2d", "dit_1d", "sit_1d"])
@torch.no_grad()
def test_a_peers_weights_give_the_peers_output(name: str) -> None:
    weights, io, config = golden(name)
    before = {key: value.clone() for key, value in weights.items()}
    model = load_dit(weights, heads=config["num_heads"])
    assert model.config.width == config["hidden_size"]
    assert model.config.depth == config["depth"]
    assert model.config.num_classes == config["num_classes"]
    assert model.config.learn_sigma is (name != "sit_1d")
    assert not model.training
    torch.testing.assert_close(model(io["x"], io["t"], io["y"]), io["out"], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(weights[key], value) for key, value in before.items())  # the caller's dictionary is as it was


@torch.no_grad()
def test_guidance_on_three_channels_is_the_published_one() -> None:
    weights, io, config = golden("dit_2d")
    model = load_dit(weights, heads=config["num_heads"])
    half = len(io["cfg_x"]) // 2
    # The peer runs the first half of x twice, with the labels and with the null labels.
    x = torch.cat([io["cfg_x"][:half]] * 2)
    conditional, unconditional = model(x, io["cfg_t"], io["cfg_y"]).chunk(2)
    out = classifier_free_guidance(conditional, unconditional, config["cfg_scale"], channels=config["cfg_channels"])
    torch.testing.assert_close(out[:, :3], io["cfg_out"][:half, :3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:, 3:], io["cfg_out"][:half, 3:], atol=1e-5, rtol=1e-5)


def test_state_dicts_that_are_no_dit_are_refused() -> None:
    weights, _, config = golden("dit_1d")
    heads = config["num_heads"]
    with pytest.raises(InputError, match="missing pos_embed"):
        load_dit({"weight": torch.zeros(1)}, heads)
    with pytest.raises(InputError, match="missing blocks.1.attn.proj.bias"):
        load_dit({key: value for key, value in weights.items() if key != "blocks.1.attn.proj.bias"}, heads)
    with pytest.raises(InputError, match="unexpected blocks.0.extra"):
        load_dit({**weights, "blocks.0.extra": torch.zeros(1)}, heads)
    with pytest.raises(InputError, match="blocks.0.attn.qkv.weight has the shape"):
        load_dit({**weights, "blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, heads)
    with pytest.raises(InputError, match="width 48: give heads"):
        load_dit(weights)
    mean_only = {key: value[:6] if "final_layer.linear" in key else value for key, value in weights.items()}
    with pytest.raises(InputError, match="learn_sigma=True"):
        load_dit(mean_only, heads, learn_sigma=True)


# -- the model ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shape", "out"),
    [
        ({}, (2, 4, 3), (2, 4, 6)),
        ({"learn_sigma": False}, (2, 4, 3), (2, 4, 3)),
        ({"num_tokens": 0, "input_size": 4, "patch_size": 2}, (2, 3, 4, 4), (2, 6, 4, 4)),
        ({"num_classes": 0, "text_dim": 8}, (2, 4, 3), (2, 4, 6)),
        ({"image_token_dim": 6, "num_image_tokens": 3}, (2, 4, 3), (2, 4, 6)),
    ],
)
def test_a_fresh_dit_gives_zero_and_each_block_is_the_identity(
    options: dict[str, Any], shape: tuple[int, ...], out: tuple[int, ...]
) -> None:
    model = small(**options)
    image_tokens = torch.randn(2, 3, 6) if "image_token_dim" in options else None
    result = model(torch.randn(shape), torch.tensor([1, 7]), image_tokens=image_tokens)
    assert result.shape == out
    assert not result.any()
    h, c = torch.randn(2, 4, 32), torch.randn(2, 32)
    tokens = None if model.text_embedder is None else model.text_embedder(text(), 2)
    modulation, following = model.modulation(c)[0], (torch.zeros(2, 32), torch.zeros(2, 32))
    after, hidden = model.blocks[0](h, torch.randn(2, 4, 32), modulation, following, tokens)
    assert torch.equal(after, h)
    torch.testing.assert_close(hidden, F.layer_norm(h, (32,), eps=1e-6))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": 0, "text_dim": 8},
        {"text_dim": 8, "image_token_dim": 6, "num_image_tokens": 3},
        {"num_tokens": 0, "input_size": 4, "patch_size": 2},
    ],
)
def test_every_parameter_gets_a_gradient_once_the_zeros_are_gone(options: dict[str, Any]) -> None:
    model = awake(**options).train()
    config = model.config
    x = torch.randn(2, 3, 4, 4) if config.input_size else torch.randn(2, 4, 3)
    labels = torch.tensor([0, config.num_classes]) if config.num_classes else None
    given = text() if config.text_dim else None
    if given is not None:
        given.mask[1] = False  # so that the null caption takes part
    image_tokens = torch.randn(2, 3, 6) if config.image_token_dim else None
    model(x, torch.rand(2), labels, given, image_tokens).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@torch.no_grad()
def test_the_null_class_is_the_last_and_the_default() -> None:
    model, x, t = awake(), torch.randn(2, 4, 3), torch.tensor([3, 9])
    null = model(x, t, torch.tensor([5, 5]))
    assert torch.equal(model(x, t), null)
    assert not torch.allclose(model(x, t, torch.tensor([0, 1])), null, atol=1e-4)
    mixed = model(x, t, torch.tensor([0, 5]))
    torch.testing.assert_close(mixed[1], null[1])


@torch.no_grad()
def test_a_batch_is_its_single_calls() -> None:
    model = awake(text_dim=8)
    x, t, y, given = torch.randn(3, 4, 3), torch.rand(3), torch.tensor([0, 4, 5]), text(3)
    together = model(x, t, y, given)
    for i in range(3):
        row = slice(i, i + 1)
        alone = model(x[row], t[row], y[row], TextFeatures(given.features[row], given.mask[row]))
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fill", [0.0, 1e4, float("nan")])
@torch.no_grad()
def test_text_padding_never_changes_a_result(fill: float) -> None:
    model, x, t, given = awake(num_classes=0, text_dim=8), torch.randn(2, 4, 3), torch.rand(2), text()
    given.mask[1, 3:] = False
    wanted = model(x, t, text=given)
    features = torch.full((2, 12, 8), fill)
    features[:, :5] = torch.where(given.mask.unsqueeze(-1), given.features, fill)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, :5] = given.mask
    torch.testing.assert_close(model(x, t, text=TextFeatures(features, mask)), wanted, atol=1e-5, rtol=1e-5)
    other = TextFeatures(given.features + given.mask.unsqueeze(-1), given.mask)
    assert not torch.allclose(model(x, t, text=other), wanted, atol=1e-4)


@torch.no_grad()
def test_no_caption_is_the_null_caption() -> None:
    model, x, t, given = awake(num_classes=0, text_dim=8), torch.randn(2, 4, 3), torch.rand(2), text()
    null = model(x, t)
    given.mask[0] = False
    mixed = model(x, t, text=given)
    torch.testing.assert_close(mixed[0], null[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed[1], null[1], atol=1e-4)


@torch.no_grad()
def test_image_tokens_condition_the_sample() -> None:
    model = awake(image_token_dim=6, num_image_tokens=3)
    x, t, image_tokens = torch.randn(2, 4, 3), torch.rand(2), torch.randn(2, 3, 6)
    out = model(x, t, image_tokens=image_tokens)
    assert out.shape == (2, 4, 6)
    changed = image_tokens.clone()
    changed[0] += 1
    other = model(x, t, image_tokens=changed)
    assert not torch.allclose(other[0], out[0], atol=1e-4)
    assert torch.equal(other[1], out[1])
    assert not torch.allclose(model(x, t, image_tokens=image_tokens.flip(1)), out, atol=1e-4)  # their places count


@torch.no_grad()
def test_time_is_scaled() -> None:
    flow, x = awake(time_scale=1000.0), torch.randn(2, 4, 3)
    gaussian = small()
    gaussian.load_state_dict(flow.state_dict())
    torch.testing.assert_close(flow(x, torch.tensor([0.25, 0.5])), gaussian.eval()(x, torch.tensor([250, 500])))


def test_embeddings_against_their_formulas() -> None:
    t = torch.tensor([0.0, 1.0, 999.0])
    features = timestep_features(t, 6)
    for row, time in enumerate(t.tolist()):
        angles = [time * 10_000 ** (-i / 3) for i in range(3)]
        wanted = [torch.tensor(a, dtype=torch.float64).cos().item() for a in angles]
        wanted += [torch.tensor(a, dtype=torch.float64).sin().item() for a in angles]
        assert features[row].tolist() == pytest.approx(wanted, abs=1e-4)
    assert sincos_1d(4, torch.tensor([0]))[0].tolist() == [0, 0, 1, 1]
    grid = sincos_2d(8, 3)
    assert torch.equal(grid[1 * 3 + 2], torch.cat([sincos_1d(4, torch.tensor([2])), sincos_1d(4, torch.tensor([1]))], dim=1)[0])


def test_a_saved_generator_is_bit_equal(tmp_path: Path) -> None:
    for model in (awake(text_dim=8), awake(num_tokens=0, input_size=4, patch_size=2)):
        loaded = DiT.from_pretrained(model.save_pretrained(tmp_path))
        assert loaded.config == model.config
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


X, T = torch.zeros(2, 4, 3), torch.zeros(2)
WRONG: list[tuple[str, dict[str, Any], Callable[[DiT], Any], str]] = [
    ("tokens", {}, lambda m: m(X[:, :3], T), r"x must be \(B, 4, 3\), got \(2, 3, 3\)"),
    ("dimensions", {}, lambda m: m(X[0], T), r"got \(4, 3\)"),
    ("grid", {"num_tokens": 0, "input_size": 4}, lambda m: m(torch.zeros(2, 3, 4, 5), T), r"\(B, 3, 4, 4\)"),
    ("time", {}, lambda m: m(X, torch.zeros(3)), r"t must be \(2,\)"),
    ("time number", {}, lambda m: m(X, torch.tensor(1.0)), r"t must be \(2,\)"),
    ("labels", {}, lambda m: m(X, T, torch.zeros(1, dtype=torch.int64)), r"y must be \(2,\)"),
    ("no classes", {"num_classes": 0}, lambda m: m(X, T, torch.zeros(2, dtype=torch.int64)), "num_classes=0"),
    ("no text", {}, lambda m: m(X, T, text=text()), "text_dim=0"),
    ("text width", {"text_dim": 9}, lambda m: m(X, T, text=text()), r"\(2, N_t, 9\), got \(2, 5, 8\)"),
    ("text batch", {"text_dim": 8}, lambda m: m(X, T, text=text(3)), r"\(3, 5, 8\)"),
    ("text mask", {"text_dim": 8}, lambda m: m(X, T, text=TextFeatures(text()[0], torch.ones(2, 5))), "bool"),
    ("image tokens missing", {"image_token_dim": 6, "num_image_tokens": 3}, lambda m: m(X, T), "image_tokens"),
    ("image tokens unasked", {}, lambda m: m(X, T, image_tokens=torch.zeros(2, 3, 6)), "image_tokens"),
    (
        "image tokens' shape",
        {"image_token_dim": 6, "num_image_tokens": 3},
        lambda m: m(X, T, image_tokens=torch.zeros(2, 4, 6)),
        r"\(2, 3, 6\), got \(2, 4, 6\)",
    ),
]


@pytest.mark.parametrize(("options", "call", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_inputs_are_refused(options: dict[str, Any], call: Callable[[DiT], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(small(**options))
