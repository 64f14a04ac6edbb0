"""Frozen vision encoders from disk, with the loading code that real ones go through, and the alignment with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from textok_fast.config import DiTConfig
from textok_fast.errors import InputError
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.modeling.vision_encoders import AlignedDiT, AlignmentHead, VisionEncoder, alignment_loss

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_channels": 3}


def saved(kind: str, directory: Path) -> Any:
    """A small random model of a published layout, on disk."""
    import transformers

    if kind == "clip":
        vision = {**SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 8}
        text = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
    elif kind == "dinov2":
        sizes = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=2, image_size=32, patch_size=8))
    elif kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=32, patch_size=8))
    else:
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        model = transformers.ResNetModel(transformers.ResNetConfig(**sizes))
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize(("kind", "patches"), [("dinov2", 16), ("vit", 16), ("clip", 16), ("resnet", 16)])
def test_patch_features_of_every_layout(tmp_path: Path, kind: str, patches: int) -> None:
    model = saved(kind, tmp_path)
    encoder = VisionEncoder.load(str(tmp_path), image_size=64 if kind == "resnet" else 0)
    assert (encoder.patches, encoder.dim) == ((64, 16) if kind == "resnet" else (patches, 16))
    pixels = torch.rand(2, 3, encoder.size, encoder.size) * 2 - 1
    features = encoder(pixels)
    assert features.shape == (2, encoder.patches, 16) and not features.requires_grad
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        hidden = getattr(model, "vision_model", model)(pixel_values=((pixels + 1) / 2 - mean) / std).last_hidden_state
    expected = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden[:, 1:]  # without the class token
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    # A smaller size is a smaller grid, and pictures of any size are brought to it.
    other = VisionEncoder.load(str(tmp_path), image_size=16 if kind != "resnet" else 32)
    assert other(torch.zeros(1, 3, 40, 40)).shape == (1, 4 if kind != "resnet" else 16, 16)


def test_pictures_are_prepared_as_the_preprocessor_says(tmp_path: Path) -> None:
    saved("vit", tmp_path)
    plain = VisionEncoder.load(str(tmp_path))
    about = {"crop_size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    told = VisionEncoder.load(str(tmp_path))
    assert (plain.size, told.size) == (32, 16)
    seen: list[torch.Tensor] = []
    told.model.register_forward_pre_hook(lambda module, args, options: seen.append(options["pixel_values"]), with_kwargs=True)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    told(pixels)
    torch.testing.assert_close(seen[0], pixels)  # (x / 2 + 0.5 - 0.5) / 0.5


def test_what_is_no_vision_encoder_is_refused(tmp_path: Path) -> None:
    import transformers

    with pytest.raises(InputError, match="cannot load the vision encoder"):
        VisionEncoder.load(str(tmp_path / "nothing"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="reads no pictures"):
        VisionEncoder.load(str(tmp_path))


# -- alignment -----------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_negative_cosine() -> None:
    features = torch.randn(3, 5, 7)
    torch.testing.assert_close(alignment_loss(2.5 * features, features), -torch.ones(3))
    torch.testing.assert_close(alignment_loss(-features, features), torch.ones(3))
    told = torch.randn(3, 5, 7)
    by_hand = -(F.normalize(told, dim=-1) * F.normalize(features, dim=-1)).sum(-1).mean(1)
    torch.testing.assert_close(alignment_loss(told, features), by_hand)
    with pytest.raises(InputError, match=r"\(3, 4, 7\)"):
        alignment_loss(told, features[:, :4])


@pytest.mark.parametrize("block", [1, 2, 3])
def test_an_aligned_dit_is_the_dit_with_a_word_on_its_tokens(block: int) -> None:
    config = DiTConfig(
        num_tokens=3,
        in_channels=4,
        width=32,
        depth=3,
        heads=2,
        num_classes=5,
        text_dim=8,
        image_token_dim=6,
        num_image_tokens=4,
    )
    dit = DiT(config).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    aligned = AlignedDiT(dit, block, 12, 9, 7)
    text = TextFeatures(torch.randn(2, 4, 8), torch.tensor([[True, True, False, False], [True] * 4]))
    x, t, y, image = torch.randn(2, 3, 4), torch.tensor([3, 500]), torch.tensor([1, 5]), torch.randn(2, 4, 6)
    seen: list[torch.Tensor] = []
    hook = dit.blocks[block - 1].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    output, told = aligned(x, t, y, text, image)
    hook.remove()
    torch.testing.assert_close(output, dit(x, t, y, text, image))
    assert told.shape == (2, 9, 7)
    torch.testing.assert_close(told, aligned.head(seen[0][:, :3]))  # the picture's tokens are not asked
    (told.square().sum()).backward()
    later = [parameter.grad for module in dit.blocks[block:] for parameter in module.parameters()]
    assert all(grad is None or not grad.any() for grad in later)
    assert dit.x_embedder.weight.grad is not None and dit.x_embedder.weight.grad.abs().sum() > 0


def test_the_head_tells_places_apart_and_can_learn_what_it_is_to_tell() -> None:
    """Tokens that are a mixture of patch features, each feature asked for at its place."""
    torch.manual_seed(0)
    mix = torch.randn(3, 4, 16) / 2
    head = AlignmentHead(16, 2, 64, 4, 5)
    lift = torch.randn(5, 16) / 2
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.randn(64, 4, 5)
        tokens = torch.einsum("bmd,nmd->bnd", features @ lift, mix)  # (B, 3, 16)
        return tokens, features

    for _ in range(200):
        tokens, features = batch()
        loss = alignment_loss(head(tokens), features).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, features = batch()
    with torch.no_grad():
        right = alignment_loss(head(tokens), features).mean()
        elsewhere = alignment_loss(head(tokens), features.roll(1, dims=1)).mean()
    assert right < -0.5 < -0.2 < elsewhere
