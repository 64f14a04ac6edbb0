from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from textok_fast import DiT, DiTConfig, InputError, TexTok
from textok_fast.config import TexTokConfig
from textok_fast.modeling.layers import drop_captions
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.modeling.tokenizer import Tokens, from_uint8, join_text, to_uint8

Make = Callable[..., TexTok]
BOTTLENECKS = ["none", "kl", "vq", "fsq"]
SIDES = ["both", "encoder", "decoder", "none"]
CAPTIONS = ["a red cow", "two green stars on sand"]


def uint8_images(count: int = 2, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)


def features_for(tokenizer: TexTok, captions: list[str], length: int, fill: float = 0.0) -> TextFeatures:
    """The captions' features padded to ``length``, with ``fill`` in the padding."""
    features, mask = tokenizer.text_encoder(captions)
    padded = torch.full((len(captions), length, features.shape[2]), fill)
    wide = torch.zeros(len(captions), length, dtype=torch.bool)
    padded[:, : features.shape[1]] = torch.where(mask.unsqueeze(-1), features, fill)
    wide[:, : mask.shape[1]] = mask
    return TextFeatures(padded, wide)


# -- text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", SIDES)
def test_the_caption_reaches_the_sides_it_should_and_no_other(make_tokenizer: Make, sides: str) -> None:
    tokenizer, images = make_tokenizer(text=sides), uint8_images()
    tokens = tokenizer.encode(images, CAPTIONS)
    other = tokenizer.encode(images, ["a blue cow", CAPTIONS[1]])
    assert torch.equal(tokens[0], other[0]) is (sides in ("decoder", "none"))
    assert torch.equal(tokens[1], other[1])  # its caption did not change
    pixels, changed = tokenizer.decode(tokens, CAPTIONS), tokenizer.decode(tokens, ["a blue cow", CAPTIONS[1]])
    assert torch.equal(pixels[0], changed[0]) is (sides in ("encoder", "none"))
    assert torch.equal(pixels[1], changed[1])


@pytest.mark.parametrize("sides", ["encoder", "decoder", "none"])
def test_a_side_without_text_does_not_ask_for_features(make_tokenizer: Make, sides: str) -> None:
    tokenizer = make_tokenizer(text=sides)
    asked = tokenizer.text_encoder.calls  # type: ignore[attr-defined]
    tokens = tokenizer.encode(uint8_images(), CAPTIONS)
    assert len(asked) == (sides == "encoder")
    tokenizer.decode(tokens, CAPTIONS)
    assert len(asked) == (sides != "none")


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("fill", [0.0, 1e4, float("nan"), float("inf")])
@pytest.mark.parametrize("length", [5, 6, 16, 40])
def test_padding_never_changes_a_result(make_tokenizer: Make, length: int, fill: float, positions: bool) -> None:
    tokenizer, images = make_tokenizer(text_positions=positions, max_text_tokens=40), uint8_images()
    tokens = tokenizer.encode(images, CAPTIONS)
    pixels = tokenizer.decode(tokens, CAPTIONS)
    text = features_for(tokenizer, CAPTIONS, length, fill)
    torch.testing.assert_close(tokenizer.encode(images, text).mode(), tokens.mode(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(tokenizer.decode(tokens, text), pixels, atol=2e-6, rtol=1e-5)


def test_nothing_in_the_padding_receives_a_gradient(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer().train()
    features, mask = features_for(tokenizer, CAPTIONS, 9)
    features.requires_grad_()
    tokenizer(torch.rand(2, 3, 16, 16), TextFeatures(features, mask)).reconstruction.square().sum().backward()
    assert features.grad is not None
    assert bool((features.grad[mask].abs().sum(-1) > 0).all())
    assert not features.grad[~mask].any()


@pytest.mark.parametrize("positions", [False, True])
def test_every_way_to_give_no_caption_is_the_null_caption(make_tokenizer: Make, positions: bool) -> None:
    tokenizer, images = make_tokenizer(text_positions=positions), uint8_images()
    tokens = tokenizer.encode(images, None)
    pixels = tokenizer.decode(tokens, None)
    empty = TextFeatures(torch.full((2, 7, 8), torch.nan), torch.zeros(2, 7, dtype=torch.bool))
    for captions in (["", ""], [None, ""], ["  ", "\n"], empty, tuple(empty), torch.zeros(2, 0, 8)):
        torch.testing.assert_close(tokenizer.encode(images, captions).mode(), tokens.mode(), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(tokenizer.decode(tokens, captions), pixels, atol=2e-6, rtol=1e-5)
    # In a batch with a real caption, too, and there the real one counts.
    mixed = tokenizer.encode(images, ["", CAPTIONS[1]])
    torch.testing.assert_close(mixed.mode()[0], tokens.mode()[0], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(mixed.mode()[1], tokens.mode()[1], atol=1e-3)


def test_the_null_caption_is_learned_and_is_what_dropout_gives(make_tokenizer: Make) -> None:
    tokenizer, images = make_tokenizer(), uint8_images()
    text = tokenizer.text_features(CAPTIONS, 2)
    assert text is not None
    dropped = tokenizer.encode(images, drop_captions(text, torch.tensor([True, False]))).mode()
    torch.testing.assert_close(dropped[0], tokenizer.encode(images, None).mode()[0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(dropped[1], tokenizer.encode(images, CAPTIONS).mode()[1], atol=2e-6, rtol=1e-5)
    before = tokenizer.encode(images, None).mode()
    with torch.no_grad():
        tokenizer.encoder.text.null.normal_()  # type: ignore[union-attr]
    assert not torch.allclose(tokenizer.encode(images, None).mode(), before, atol=1e-3)


def test_features_without_a_mask_are_all_real(make_tokenizer: Make) -> None:
    tokenizer, images = make_tokenizer(), uint8_images()
    features = torch.randn(2, 4, 8)
    masked = tokenizer.encode(images, (features, torch.ones(2, 4, dtype=torch.bool)))
    assert torch.equal(tokenizer.encode(images, features), masked)


# -- the picture side -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_a_batch_is_its_single_calls(make_tokenizer: Make, bottleneck: str) -> None:
    tokenizer, images = make_tokenizer(bottleneck=bottleneck), uint8_images(3)
    captions = [*CAPTIONS, ""]
    tokens = tokenizer.encode(images, captions)
    pixels = tokenizer.decode(tokens, captions)
    for i in range(3):
        single = tokenizer.encode(images[i : i + 1], captions[i : i + 1])
        torch.testing.assert_close(single.mode(), tokens.mode()[i : i + 1], atol=2e-6, rtol=1e-5)
        if tokens.indices is not None:
            assert single.indices is not None
            assert torch.equal(single.indices, tokens.indices[i : i + 1])
        torch.testing.assert_close(
            tokenizer.decode(tokens[i : i + 1], captions[i : i + 1]), pixels[i : i + 1], atol=2e-6, rtol=1e-5
        )


def test_every_form_of_a_picture_gives_the_same_tokens(make_tokenizer: Make) -> None:
    tokenizer, images = make_tokenizer(), uint8_images()
    tokens = tokenizer.encode(images, CAPTIONS)
    floats = images.permute(0, 3, 1, 2).double() / 127.5 - 1
    pictures = [Image.fromarray(image.numpy()) for image in images]
    for form in (
        images.numpy(),
        np.asfortranarray(images.numpy()),
        pictures,
        tuple(pictures),
        floats.float(),
        from_uint8(images),
    ):
        torch.testing.assert_close(tokenizer.encode(form, CAPTIONS).mode(), tokens.mode(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(tokenizer.encode(floats, CAPTIONS).mode(), tokens.mode(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokenizer.encode(pictures[0], CAPTIONS[0])[0], tokens[0], atol=2e-6, rtol=1e-5)
    rgba = [picture.convert("RGBA") for picture in pictures]
    assert torch.equal(tokenizer.encode(rgba, CAPTIONS), tokens)


def test_uint8_pixels_survive_the_conversion_to_float_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    assert from_uint8(every).aminmax() == (-1.0, 1.0)


def test_decode_gives_floats_in_range_or_the_same_as_uint8(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    tokens = 5 * torch.randn(2, 3, 4)
    pixels = tokenizer.decode(tokens, CAPTIONS)
    assert (pixels.shape, pixels.dtype) == ((2, 3, 16, 16), torch.float32)
    assert float(pixels.abs().max()) <= 1
    bytes_ = tokenizer.decode(tokens, CAPTIONS, output="uint8")
    assert (bytes_.shape, bytes_.dtype) == ((2, 16, 16, 3), torch.uint8)
    wanted = np.rint((pixels.double().numpy() + 1) * 127.5).clip(0, 255)
    assert np.abs(bytes_.numpy() - wanted.transpose(0, 2, 3, 1)).max() <= 1e-9


def pre_norm_vit(blocks: Any, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """All rows of every block, as the ViT paper has it."""
    for block in blocks:
        x = x + block.attn(block.norm1(x), mask)
        x = x + block.mlp(block.norm2(x))
    return x


def test_the_last_blocks_skip_only_what_nobody_reads(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    pixels, latents = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 4)
    text = tokenizer.text_features(CAPTIONS, 2)
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    with torch.no_grad():
        patches = torch.stack([pixels[:, :, r : r + 8, c : c + 8].flatten(1) for r in (0, 8) for c in (0, 8)], dim=1)
        x = torch.cat([encoder.patch_embed(patches) + encoder.patch_positions, encoder.latents.expand(2, -1, -1)], dim=1)
        x, mask = join_text(x, encoder.text(text, 2))  # type: ignore[misc]
        assert x.shape == (2, 4 + 3 + 5, 32)
        x = pre_norm_vit(encoder.blocks, x, mask)
        wanted = encoder.to_latents(encoder.norm(x))[:, 4:7]
        torch.testing.assert_close(encoder(pixels, text), wanted)

        x = torch.cat([decoder.queries.expand(2, -1, -1), decoder.from_latents(latents) + decoder.latent_positions], dim=1)
        x, mask = join_text(x, decoder.text(text, 2))  # type: ignore[misc]
        x = pre_norm_vit(decoder.blocks, x, mask)
        blocks = decoder.to_pixels(decoder.norm(x))[:, :4].reshape(2, 2, 2, 3, 8, 8)
        picture = torch.cat([torch.cat(list(row.unbind(1)), dim=-1) for row in blocks.unbind(1)], dim=-2)
        torch.testing.assert_close(decoder(latents, text), picture)


# -- tokens -----------------------------------------------------------------------------------------------------------------


def test_stored_statistics_normalise_the_tokens_and_decode_undoes_it(make_tokenizer: Make) -> None:
    tokenizer, images = make_tokenizer(bottleneck="kl"), uint8_images(8)
    raw = tokenizer.encode(images, None).mode()
    pixels = tokenizer.decode(raw)
    generator = torch.Generator().manual_seed(1)
    drawn = tokenizer.encode(images, None).sample(generator)
    mean, std = raw.flatten(0, 1).mean(0), raw.flatten(0, 1).std(0, correction=0)
    tokenizer.set_latent_statistics(mean, std)
    tokens = tokenizer.encode(images, None)
    torch.testing.assert_close(tokens.mode().flatten(0, 1).mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.mode().flatten(0, 1).std(0, correction=0), torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.mode() * std + mean, raw, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tokenizer.decode(tokens), pixels, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.sample(generator.manual_seed(1)) * std + mean, drawn, atol=1e-5, rtol=1e-5)
    assert tokenizer.config.latent_mean == tuple(mean.tolist())


def test_statistics_belong_to_one_model(tiny_config: Callable[..., TexTokConfig], tmp_path: Path) -> None:
    config = tiny_config()
    first, second = TexTok(config), TexTok(config)
    first.set_latent_statistics(torch.full((4,), 3.0), torch.full((4,), 2.0))
    assert config.latent_mean == second.config.latent_mean == ()
    assert torch.equal(TexTok.from_pretrained(second.save_pretrained(tmp_path)).latent_mean, torch.zeros(4))


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_tokens_carry_what_their_bottleneck_knows(make_tokenizer: Make, bottleneck: str) -> None:
    tokenizer = make_tokenizer(bottleneck=bottleneck)
    images = uint8_images()
    tokens = tokenizer.encode(images, CAPTIONS)
    assert isinstance(tokens, Tokens)
    assert (tokens.shape, tokens.dtype) == ((2, 3, 4), torch.float32)
    assert torch.equal(tokens.mode(), tokens.as_subclass(torch.Tensor))
    for plain in (tokens + 1, tokens[0], tokens.mode(), tokens.sample(), tokens.float() * 2, torch.cat([tokens, tokens])):
        assert type(plain) is torch.Tensor
    if bottleneck == "kl":
        first, second = (tokens.sample(torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(first, tokens.mode())
        samples = torch.stack([tokens.sample() for _ in range(400)])
        with torch.no_grad():
            logvar = tokenizer.encoder(from_uint8(images), tokenizer.text_features(CAPTIONS, 2))[..., 4:]
        std = torch.exp(0.5 * logvar)
        assert float(((samples.mean(0) - tokens.mode()) / std).abs().max()) < 5 / 400**0.5
        torch.testing.assert_close(samples.std(0), std, atol=0, rtol=0.2)
    else:
        assert torch.equal(tokens.sample(), tokens.mode())
    if bottleneck in ("vq", "fsq"):
        assert tokens.indices is not None
        assert (tokens.indices.shape, tokens.indices.dtype) == ((2, 3), torch.int64)
        torch.testing.assert_close(tokenizer.decode(tokens.indices, CAPTIONS), tokenizer.decode(tokens, CAPTIONS))
        tokenizer.set_latent_statistics(torch.randn(4), torch.rand(4) + 0.5)
        again = tokenizer.encode(images, CAPTIONS)
        assert again.indices is not None
        torch.testing.assert_close(
            tokenizer.decode(again.indices, CAPTIONS), tokenizer.decode(again, CAPTIONS), atol=1e-5, rtol=1e-5
        )
    else:
        assert tokens.indices is None


def test_encode_is_the_same_in_training_mode(make_tokenizer: Make) -> None:
    for bottleneck in BOTTLENECKS:
        tokenizer, images = make_tokenizer(bottleneck=bottleneck), uint8_images()
        wanted = tokenizer.encode(images, CAPTIONS).mode()
        torch.testing.assert_close(tokenizer.train().encode(images, CAPTIONS).mode(), wanted)


# -- training ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
@pytest.mark.parametrize("sides", SIDES)
def test_a_training_step_gives_every_parameter_a_gradient(make_tokenizer: Make, bottleneck: str, sides: str) -> None:
    tokenizer = make_tokenizer(bottleneck=bottleneck, text=sides).train()
    pixels = from_uint8(uint8_images(3))
    text = tokenizer.text_features([*CAPTIONS, ""], 3)  # the empty one, so that the null caption takes part
    out = tokenizer(pixels, text if sides != "none" else None)
    assert out.reconstruction.shape == pixels.shape
    ((out.reconstruction - pixels).square().mean() + sum(out.bottleneck.losses.values())).backward()
    without = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_the_text_encoder_is_no_part_of_the_model(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    network = torch.nn.Linear(3, 3)
    tokenizer.text_encoder.network = network  # type: ignore[misc]
    names = set(tokenizer.state_dict())
    assert not any("text_encoder" in name for name in names)
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}
    assert all(p is not network.weight for p in tokenizer.parameters())


def test_a_text_encoder_of_another_width_is_refused(make_tokenizer: Make, fake_text: Any) -> None:
    tokenizer = make_tokenizer()
    fake_text.dim = 5
    with pytest.raises(InputError, match="width 5.*text_dim=8"):
        tokenizer.text_encoder = fake_text


# -- saving -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_a_saved_model_is_bit_equal(make_tokenizer: Make, tmp_path: Path, bottleneck: str) -> None:
    tokenizer, images = make_tokenizer(bottleneck=bottleneck, text_split="; "), uint8_images()
    tokenizer.set_latent_statistics(torch.randn(4) / 3, torch.rand(4) + 0.1)
    loaded = TexTok.from_pretrained(tokenizer.save_pretrained(tmp_path / "a" / "b"))
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    assert loaded.config == tokenizer.config
    assert not loaded.training
    for key, value in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert torch.equal(loaded.latent_mean, tokenizer.latent_mean)
    assert torch.equal(loaded.latent_std, tokenizer.latent_std)
    loaded.text_encoder = tokenizer.text_encoder
    tokens = tokenizer.encode(images, CAPTIONS)
    assert torch.equal(loaded.encode(images, CAPTIONS), tokens)
    assert torch.equal(loaded.decode(tokens, CAPTIONS), tokenizer.decode(tokens, CAPTIONS))


def test_directories_that_hold_no_such_model_are_refused(make_tokenizer: Make, tmp_path: Path) -> None:
    good = make_tokenizer(bottleneck="vq").save_pretrained(tmp_path / "good")

    def spoiled(name: str, spoil: Callable[[Path], object]) -> Path:
        copy = tmp_path / name
        shutil.copytree(good, copy)
        spoil(copy)
        return copy

    def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
        def spoil(path: Path) -> None:
            values = json.loads((path / "config.json").read_text())
            change(values)
            (path / "config.json").write_text(json.dumps(values))

        return spoil

    def reweigh(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
        def spoil(path: Path) -> None:
            state = load_file(path / "model.safetensors")
            change(state)
            save_file(state, path / "model.safetensors")

        return spoil

    bias = "decoder.to_pixels.bias"
    cases: list[tuple[Path, str]] = [
        (tmp_path / "nowhere", "no model at"),
        (good / "config.json", "no model at"),
        (spoiled("no_config", lambda p: (p / "config.json").unlink()), "has no config.json"),
        (spoiled("not_json", lambda p: (p / "config.json").write_text("{")), "cannot read"),
        (spoiled("not_text", lambda p: (p / "config.json").write_bytes(b"\xff\xfe")), "cannot read"),
        (spoiled("list", lambda p: (p / "config.json").write_text("[1]")), "type None"),
        (spoiled("foreign", rewrite(lambda v: v.update(model_type="bert"))), "type 'bert', wanted 'textok'"),
        (spoiled("unknown_key", rewrite(lambda v: v.update(colour=1))), "colour"),
        (spoiled("bad_value", rewrite(lambda v: v.update(width="wide"))), "width"),
        (spoiled("other_size", rewrite(lambda v: v.update(width=64))), r"shape \(.*32.*\), wanted \(.*64.*\)"),
        (spoiled("no_weights", lambda p: (p / "model.safetensors").unlink()), r"has no model\.safetensors"),
        (spoiled("empty", lambda p: (p / "model.safetensors").write_bytes(b"")), "cannot read"),
        (spoiled("cut", lambda p: (p / "model.safetensors").write_bytes(b"\0" * 100)), "cannot read"),
        (spoiled("missing", reweigh(lambda s: s.pop(bias))), f"missing {bias}"),
        (spoiled("unexpected", reweigh(lambda s: s.update(extra=torch.zeros(1)))), "unexpected extra"),
    ]
    for path, message in cases:
        with pytest.raises(InputError, match=message):
            TexTok.from_pretrained(path)
    dit = DiT(DiTConfig(num_tokens=3, in_channels=4, width=32, depth=1, heads=2)).save_pretrained(tmp_path / "dit")
    with pytest.raises(InputError, match="'textok-dit', wanted 'textok'"):
        TexTok.from_pretrained(dit)


def test_a_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match="someone/else.*no connection") as caught:
        TexTok.from_pretrained("someone/else")
    assert "\n" not in str(caught.value)


def test_a_model_comes_from_the_hub_by_its_id(make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    tokenizer = make_tokenizer()
    snapshot = tokenizer.save_pretrained(tmp_path / "snapshot")
    asked: list[tuple[object, ...]] = []

    def download(name: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        asked.append((name, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = TexTok.from_pretrained("someone/textok", revision="v1")
    assert asked == [("someone/textok", "v1", ["config.json", "model.safetensors"])]
    assert torch.equal(loaded.decoder.queries, tokenizer.decoder.queries)


# -- wrong inputs -------------------------------------------------------------------------------------------------------------

FLOAT = torch.zeros(2, 3, 16, 16)
WRONG_IMAGES: list[tuple[str, Any, str]] = [
    ("size", torch.zeros(1, 32, 32, 3, dtype=torch.uint8), r"\(B, 16, 16, 3\), got \(1, 32, 32, 3\)"),
    ("not square", torch.zeros(1, 16, 32, 3, dtype=torch.uint8), r"\(1, 16, 32, 3\)"),
    ("channels first uint8", torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"\(1, 3, 16, 16\)"),
    ("no batch", torch.zeros(16, 16, 3, dtype=torch.uint8), r"\(16, 16, 3\)"),
    ("grey", torch.zeros(1, 16, 16, 1, dtype=torch.uint8), r"\(1, 16, 16, 1\)"),
    ("channels last float", torch.zeros(1, 16, 16, 3), r"\(B, 3, 16, 16\), got \(1, 16, 16, 3\)"),
    ("int", torch.zeros(1, 16, 16, 3, dtype=torch.int64), "int64"),
    ("uint16", np.zeros((1, 16, 16, 3), dtype=np.uint16), "uint16"),
    ("objects", np.array([[None]], dtype=object), "object"),
    ("range", FLOAT + 2, r"\[-1, 1\]"),
    ("0 to 255", FLOAT.add(255), "255"),
    ("nan", FLOAT.index_fill(0, torch.tensor([1]), torch.nan), "nan"),
    ("inf", FLOAT.index_fill(0, torch.tensor([1]), -torch.inf), "inf"),
    ("empty", FLOAT[:0], "empty"),
    ("empty uint8", torch.zeros(0, 16, 16, 3, dtype=torch.uint8), "empty"),
    ("empty list", [], "empty"),
    ("paths", ["a.png"], "item 0 is str"),
    ("one path", "a.png", "item 0 is str"),
    ("nothing", None, "NoneType"),
    ("number", 5, "int"),
    ("two sizes", [Image.new("RGB", (16, 16)), Image.new("RGB", (16, 8))], "item 1"),
    ("PIL size", Image.new("RGB", (20, 16)), r"\(1, 16, 20, 3\)"),
]


@pytest.mark.parametrize(("images", "message"), [case[1:] for case in WRONG_IMAGES], ids=[case[0] for case in WRONG_IMAGES])
def test_wrong_pictures_are_refused(make_tokenizer: Make, images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_tokenizer().encode(images, None)


MASK = torch.ones(2, 5, dtype=torch.bool)
WRONG_CAPTIONS: list[tuple[str, Any, str]] = [
    ("too few", ["one"], "1 captions for 2"),
    ("one string", "one", "1 captions for 2"),
    ("too many", ["a", "b", "c"], "3 captions for 2"),
    ("no string", ["a", 3], "int"),
    ("width", (torch.zeros(2, 5, 7), MASK), r"\(2, N_t, 8\), got \(2, 5, 7\)"),
    ("batch", (torch.zeros(3, 5, 8), MASK), r"\(3, 5, 8\)"),
    ("dimensions", torch.zeros(2, 8), r"\(2, 8\)"),
    ("mask dtype", (torch.zeros(2, 5, 8), MASK.long()), "bool"),
    ("mask shape", (torch.zeros(2, 5, 8), MASK[:, :4]), r"\(2, 5\)"),
    ("mask kind", (torch.zeros(2, 5, 8), None), "bool"),
]


@pytest.mark.parametrize(
    ("captions", "message"), [case[1:] for case in WRONG_CAPTIONS], ids=[case[0] for case in WRONG_CAPTIONS]
)
def test_wrong_captions_are_refused(make_tokenizer: Make, captions: Any, message: str) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(InputError, match=message):
        tokenizer.encode(uint8_images(), captions)
    with pytest.raises(InputError, match=message):
        tokenizer.decode(torch.zeros(2, 3, 4), captions)


def test_features_longer_than_the_learned_positions_are_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(text_positions=True, max_text_tokens=4)
    with pytest.raises(InputError, match="max_text_tokens"):
        tokenizer.encode(uint8_images(), torch.zeros(2, 5, 8))


WRONG_TOKENS: list[tuple[str, Any, str]] = [
    ("tokens", torch.zeros(2, 4, 4), r"\(B, 3, 4\) or int64 indices \(B, 3\), got .*\(2, 4, 4\)"),
    ("channels", torch.zeros(2, 3, 5), r"\(2, 3, 5\)"),
    ("no batch", torch.zeros(3, 4), r"\(3, 4\)"),
    ("nan", torch.full((2, 3, 4), torch.nan), "NaN"),
    ("inf", torch.full((2, 3, 4), torch.inf), "infinity"),
    ("list", [[0, 1, 2]], "list"),
    ("index count", torch.zeros(2, 4, dtype=torch.int64), r"\(B, 3\) int64, got \(2, 4\)"),
    ("index dtype", torch.zeros(2, 3, dtype=torch.int32), "int32"),
    ("index too large", torch.tensor([[0, 1, 16]]), r"\[0, 16\), got 0 to 16"),
    ("index negative", torch.tensor([[0, -1, 5]]), "got -1 to 5"),
]


@pytest.mark.parametrize(("tokens", "message"), [case[1:] for case in WRONG_TOKENS], ids=[case[0] for case in WRONG_TOKENS])
def test_wrong_tokens_are_refused(make_tokenizer: Make, tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_tokenizer(bottleneck="vq").decode(tokens, None)


def test_indices_for_a_continuous_tokenizer_and_an_unknown_output_are_refused(make_tokenizer: Make) -> None:
    with pytest.raises(InputError, match=r"float \(B, 3, 4\), got torch.int64"):
        make_tokenizer().decode(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="'png'"):
        make_tokenizer().decode(torch.zeros(2, 3, 4), output="png")  # type: ignore[arg-type]


def test_tokens_keep_their_indices_when_moved_and_copied(make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bottleneck="fsq")
    size = tokenizer.config.image_size
    tokens = tokenizer.encode(torch.zeros(2, 3, size, size), None)
    for other in (tokens.to(torch.float64), tokens.cpu(), copy.deepcopy(tokens)):
        assert torch.equal(other.indices, tokens.indices) and other.indices.dtype == torch.int64
    assert tokens.to(torch.float64).dtype == torch.float64
    assert tokens[0:1].indices is None or not isinstance(tokens[0:1].indices, torch.Tensor)
    torch.save(tokens, tmp_path / "tokens.pt")
    assert torch.equal(torch.load(tmp_path / "tokens.pt", weights_only=True), tokens.mode())


def test_precomputed_features_with_nan_at_a_real_token_are_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    size, dim = tokenizer.config.image_size, tokenizer.config.text_dim
    features, mask = torch.zeros(1, 3, dim), torch.ones(1, 3, dtype=torch.bool)
    features[0, 1, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        tokenizer.encode(torch.zeros(1, 3, size, size), (features, mask))
    with pytest.raises(InputError, match="float"):
        tokenizer.encode(torch.zeros(1, 3, size, size), (torch.zeros(1, 3, dim, dtype=torch.int64), mask))
