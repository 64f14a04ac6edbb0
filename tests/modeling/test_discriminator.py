from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from textok_fast import InputError
from textok_fast.config import DiscriminatorConfig
from textok_fast.modeling.discriminator import (
    FrozenBackbone,
    FrozenFeatureDiscriminator,
    PatchDiscriminator,
    StyleGANDiscriminator,
    blur,
    build_discriminator,
    group_deviation,
)


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# -- StyleGAN2 ---------------------------------------------------------------------------------------------------------


def test_the_published_discriminator_has_24_million_parameters() -> None:
    with torch.device("meta"):
        network = build_discriminator(DiscriminatorConfig(), 256)
    widths = [64, 128, 256, 512, 512, 512, 512]  # at 256 px down to 4
    wanted = (3 + 1) * 64  # from RGB
    for a, b in itertools.pairwise(widths):
        wanted += (9 * a + 1) * a + (9 * a + 1) * b + a * b
    wanted += (9 * 513 + 1) * 512 + (16 * 512 + 1) * 512 + 512 + 1
    assert count(network) == wanted == 24_001_089


@pytest.mark.parametrize(("pad", "stride"), [(2, 1), (1, 2)])
def test_blur_is_a_convolution_with_1_3_3_1(pad: int, stride: int) -> None:
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    taps = np.array([1, 3, 3, 1]) / 8
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    height, width = (side + 2 * pad - 3 for side in (6, 8))
    wanted = np.zeros((2, 3, height, width))
    for i in range(4):
        for j in range(4):
            wanted += taps[i] * taps[j] * padded[:, :, i : i + height, j : j + width]
    np.testing.assert_allclose(blur(x, pad, stride).numpy(), wanted[:, :, ::stride, ::stride], atol=1e-12)


def test_the_group_deviation_of_consecutive_pictures() -> None:
    x = torch.randn(6, 4, 3, 3)
    found = group_deviation(x, 3)
    for group in range(2):
        part = x[3 * group : 3 * group + 3].double().numpy()
        wanted = np.sqrt(part.var(axis=0) + 1e-8).mean()
        np.testing.assert_allclose(found[3 * group : 3 * group + 3, 4].numpy(), wanted, rtol=1e-5)
    assert torch.equal(found[:, :4], x)
    with pytest.raises(InputError, match="6 pictures cannot be divided into groups of 4"):
        group_deviation(x, 4)


def test_stylegan_against_its_layers_written_out() -> None:
    network = StyleGANDiscriminator(8, channel_base=24, channel_max=6, stddev_group=2).double()
    weights = network.state_dict()
    pixels = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def scaled(name: str) -> torch.Tensor:
        weight = weights[f"{name}.weight"]
        return weight / math.sqrt(weight[0].numel())

    def act(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)

    def smooth(x: torch.Tensor, pad: int) -> torch.Tensor:
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
        kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(F.pad(x, [pad] * 4), kernel, groups=x.shape[1])

    x = act(F.conv2d(pixels, scaled("from_rgb"), weights["from_rgb.bias"]))
    block = "blocks.0"
    main = act(F.conv2d(x, scaled(f"{block}.conv1"), weights[f"{block}.conv1.bias"], padding=1))
    main = act(F.conv2d(smooth(main, 2), scaled(f"{block}.conv2"), weights[f"{block}.conv2.bias"], stride=2))
    side = F.conv2d(smooth(x, 1), scaled(f"{block}.skip"), stride=2)
    x = (main + side) / math.sqrt(2)
    assert x.shape == (4, 6, 4, 4)
    deviation = torch.stack([pair.var(0, unbiased=False).add(1e-8).sqrt().mean() for pair in x.split(2)])
    x = torch.cat([x, deviation.repeat_interleave(2).view(4, 1, 1, 1).expand(4, 1, 4, 4)], dim=1)
    x = act(F.conv2d(x, scaled("conv"), weights["conv.bias"], padding=1))
    x = act(x.flatten(1) @ scaled("hidden").T + weights["hidden.bias"])
    wanted = x @ scaled("to_logit").T + weights["to_logit.bias"]
    torch.testing.assert_close(network(pixels), wanted, atol=1e-6, rtol=1e-6)  # the deviation is taken in float32


@pytest.mark.parametrize("kind", ["stylegan", "patchgan"])
def test_logits_do_not_depend_on_other_groups_of_the_batch(kind: str) -> None:
    config = DiscriminatorConfig(kind=kind, channel_base=256, channels=4, layers=2)  # type: ignore[arg-type]
    network = build_discriminator(config, 32)
    pixels = torch.randn(8, 3, 32, 32)
    torch.testing.assert_close(network(pixels), torch.cat([network(part) for part in pixels.split(4)]))
    assert torch.autograd.grad(network(pixels).sum(), next(network.parameters()))[0].abs().sum() > 0


@pytest.mark.parametrize("side", [4, 100, 22])
def test_sides_that_do_not_come_down_to_a_few_pixels_are_refused(side: int) -> None:
    with pytest.raises(InputError, match=f"{side} px do not come there.*64, 96 or 256"):
        StyleGANDiscriminator(side, 64)


def test_sides_of_more_than_a_power_of_two() -> None:
    assert StyleGANDiscriminator(48, 128, 8)(torch.randn(4, 3, 48, 48)).shape == (4, 1)  # ends at 6 px


# -- PatchGAN ----------------------------------------------------------------------------------------------------------


def test_patchgan_is_pix2pixs() -> None:
    """70 x 70 patches: 30 x 30 logits of 256 px, 2.77 M parameters with norms that have weights."""
    with torch.device("meta"):
        network = PatchDiscriminator(256)
        assert network(torch.randn(1, 3, 256, 256)).shape == (1, 30 * 30)
    assert count(network) == 2_765_633
    small = PatchDiscriminator(96, channels=2)
    pixels = torch.randn(1, 3, 96, 96, requires_grad=True)
    logits = small.main[:1](pixels)
    for layer in small.main[1:]:
        if not isinstance(layer, torch.nn.InstanceNorm2d):  # which sees the whole picture
            logits = layer(logits)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], pixels)
    seen = gradient[0].abs().sum(0) > 0
    assert (int(seen.any(0).sum()), int(seen.any(1).sum())) == (70, 70)


def test_a_patchgan_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"layers=3 leaves 2 px of 16 px.*lower it"):
        PatchDiscriminator(16)
    assert PatchDiscriminator(16, 4, layers=2)(torch.randn(2, 3, 16, 16)).shape == (2, 4)


# -- frozen features ---------------------------------------------------------------------------------------------------

_VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 16}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random models of the public layouts, saved as theirs are."""
    root = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}  # as none must be used
    models = {
        "vit": transformers.ViTModel(transformers.ViTConfig(patch_size=8, **_VIT, **dropout)),
        "dinov2": transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(patch_size=4, mlp_ratio=2, num_register_tokens=3, **_VIT)
        ),
        "clip": transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config={"patch_size": 8, **_VIT},
                text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9},
            )
        ),
        "resnet": transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        "swin": transformers.SwinModel(
            transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    (root / "vit" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return root


@pytest.mark.parametrize(("name", "tokens"), [("vit", 5 * 4), ("dinov2", 5 * 16), ("clip", 5 * 4), ("resnet", 64 + 64 + 16)])
def test_heads_on_frozen_features(backbones: Path, name: str, tokens: int) -> None:
    network = FrozenFeatureDiscriminator(str(backbones / name), 32).train()
    pixels = torch.rand(3, 3, 32, 32, requires_grad=True)
    assert network(pixels).shape == (3, tokens)
    assert not any("backbone" in key for key in network.state_dict())
    (gradient,) = torch.autograd.grad(network(pixels).sum(), pixels)
    assert gradient.abs().sum() > 0
    backbone = network.backbone
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    before = backbone.mean.clone()
    network.double()
    assert backbone.mean.dtype == torch.float64  # moves and casts reach the backbone
    torch.testing.assert_close(backbone.mean.float(), before)


def test_features_are_patches_plus_class_token_of_normalised_pixels(backbones: Path) -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    found = FrozenBackbone(str(backbones / "vit"), 32)(pixels)
    model = transformers.ViTModel.from_pretrained(backbones / "vit").eval()
    halved = pixels.unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean(dim=(3, 5))  # to the model's 16 px
    states = model((halved / 2 + 0.5 - 0.5) / 0.25, output_hidden_states=True).hidden_states
    assert len(found) == len(states) == 5
    for mine, state in zip(found, states, strict=True):
        torch.testing.assert_close(mine, (state[:, 1:] + state[:, :1]).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_a_head_written_out(backbones: Path) -> None:
    network = FrozenFeatureDiscriminator(str(backbones / "vit"), 16, layers=(2,), kernel=3).eval()
    head, state = network.heads[0], network.backbone(torch.rand(2, 3, 16, 16))[2]  # (2, 32, 4)

    def conv(x: torch.Tensor, layer: torch.nn.Module, kernel: int) -> torch.Tensor:
        weight = layer.parametrizations.weight.original  # type: ignore[union-attr, index]
        flat = weight.flatten(1)
        u, v = (getattr(layer.parametrizations.weight[0], name) for name in ("_u", "_v"))  # type: ignore[index]
        x = torch.cat([x[..., -(kernel // 2) :], x, x[..., : kernel // 2]], dim=-1) if kernel > 1 else x
        return F.conv1d(x, weight / (u @ flat @ v), layer.bias)  # type: ignore[arg-type]

    def block(x: torch.Tensor, part: torch.nn.Module, kernel: int) -> torch.Tensor:
        return F.leaky_relu(part[1](conv(x, part[0], kernel)), 0.2)  # type: ignore[index, operator]

    x = block(state, head.first, 1)  # type: ignore[arg-type]
    x = (x + block(x, head.second, 3)) / math.sqrt(2)  # type: ignore[arg-type]
    wanted = conv(x, head.to_logit, 1).squeeze(1)  # type: ignore[arg-type]
    torch.testing.assert_close(head(state), wanted, atol=1e-5, rtol=1e-4)


def test_backbones_that_do_not_serve_are_refused(backbones: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"discriminator\.backbone=<directory or Hub id>.*facebook/dino-vits16"):
        build_discriminator(DiscriminatorConfig(kind="frozen"), 32)
    with pytest.raises(InputError, match=rf"discriminator\.backbone={tmp_path} cannot be loaded"):
        FrozenFeatureDiscriminator(str(tmp_path), 32)
    with pytest.raises(InputError, match="SwinModel is neither a plain ViT nor convolutional"):
        FrozenFeatureDiscriminator(str(backbones / "swin"), 32)
    with pytest.raises(InputError, match="feature_layers: .*hidden states 0 to 4, got 5"):
        FrozenFeatureDiscriminator(str(backbones / "vit"), 32, layers=(1, 5))
