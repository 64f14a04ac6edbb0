"""The recipes: every one is a valid run, and the published ones build models of the published sizes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from textok_fast.cli import main
from textok_fast.config import (
    GENERATOR_SIZES,
    SECTIONS,
    GeneratorTrainConfig,
    TokenizerTrainConfig,
    from_mapping,
    load_config,
    read_recipe,
    recipe_about,
    recipe_names,
    recipe_path,
    recipe_sections,
    to_dict,
)
from textok_fast.data import Example, load_dataset, write_shards
from textok_fast.errors import InputError
from textok_fast.inference import ClassToImagePipeline, SuperResolutionPipeline, TextToImagePipeline, load_pipeline
from textok_fast.modeling import DiT, TexTok
from textok_fast.modeling.discriminator import build_discriminator
from textok_fast.training.loop import epochs

BUDGETS, SIZES = (32, 64, 128, 256), (256, 512)
PUBLISHED = [f"textok-{tokens}-{size}" for size in SIZES for tokens in BUDGETS]
SOURCED = [*PUBLISHED, "text-to-image-32-256", "super-resolution-32-256"]
ALL = [(cls, name) for cls in SECTIONS for name in recipe_names(cls)]


def parameters(kind: type, config: Any) -> float:
    """In millions."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in kind(config).parameters()) / 1e6


@pytest.mark.parametrize(("cls", "name"), ALL, ids=lambda value: value if isinstance(value, str) else SECTIONS[value])
def test_every_recipe_is_a_run_that_differs_from_the_defaults_and_builds_its_model(cls: Any, name: str) -> None:
    config = load_config(cls, name)
    assert config != cls()
    assert from_mapping(cls, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    assert SECTIONS[cls] in recipe_sections(name)
    assert recipe_about(name) and "\n" not in recipe_about(name)
    assert parameters(TexTok if cls is TokenizerTrainConfig else DiT, config.model) > 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", BUDGETS)
def test_the_published_recipes_have_the_published_sizes(tokens: int, size: int) -> None:
    name = f"textok-{tokens}-{size}"
    tokenizer, generator = load_config(TokenizerTrainConfig, name), load_config(GeneratorTrainConfig, name)
    assert (tokenizer.model.num_tokens, tokenizer.model.latent_dim, tokenizer.model.image_size) == (tokens, 8, size)
    assert (tokenizer.model.num_patches, tokenizer.model.text, tokenizer.data.image_size) == (1024, "both", size)
    wider = 2 * (4096 - 2048) * 768 / 1e6 if size == 512 else 0.0  # the two projections of T5-XXL's features
    assert parameters(TexTok, tokenizer.model) == pytest.approx(176 + wider, abs=1.0)
    assert (generator.model.num_tokens, generator.model.in_channels, generator.data.image_size) == (tokens, 8, size)
    assert (generator.model.depth, generator.model.width, generator.model.heads) == (28, 1152, 16)
    assert parameters(DiT, generator.model) == pytest.approx(675, abs=0.5)
    assert generator.model.learn_sigma and generator.objective == "gaussian"
    assert generator.tokenizer == f"{tokenizer.run.output_dir}/final"


@pytest.mark.parametrize("name", SOURCED)
def test_every_value_of_a_published_recipe_says_where_it_is_from(name: str) -> None:
    lines = recipe_path(name).read_text().splitlines()
    values = [line for line in lines if re.match(r"\s+\w+:\s*\S", line)]
    assert len(values) >= 4
    for line in values:
        assert re.search(r" # (published|chosen|of that encoder|of a flow)", line), line


def claimed_epochs(name: str, section: str) -> str:
    """What the comment on run.steps says of epochs, in the recipe or the nearest that it extends; "" for nothing."""
    text = recipe_path(name).read_text()
    for part in re.split(r"^(?=\w)", text, flags=re.MULTILINE):
        if part.startswith(f"{section}:") and (steps := re.search(r"^ +steps: \d+ #(.*)$", part, re.MULTILINE)):
            said = re.search(r"([\d.]+) epochs", steps[1])
            return said[1] if said else ""
    return claimed_epochs(yaml.safe_load(text)["extends"], section)


@pytest.mark.parametrize(
    ("name", "cls"), [(name, cls) for name in SOURCED for cls in SECTIONS if SECTIONS[cls] in recipe_sections(name)]
)
def test_steps_are_the_epochs_that_the_recipe_says(name: str, cls: Any, tmp_path: Path) -> None:
    """Of ImageNet's 1,281,167 training pictures, of which none is held out, in whole batches as the loop counts them."""
    config = load_config(cls, name)
    claim = claimed_epochs(name, SECTIONS[cls])
    if not config.data.path.startswith("data/imagenet/"):
        assert not claim  # of a data set whose size nobody knows
        return
    steps_of_an_epoch = 1_281_167 // config.run.batch_size
    digits = len(claim.partition(".")[2])
    assert round(config.run.steps / steps_of_an_epoch, digits) == float(claim)
    if cls is GeneratorTrainConfig:
        assert (claim, config.run.steps) == ("350", 350 * steps_of_an_epoch)  # published
    assert f"{float(claim):.4g} epochs of 1,281,167 pictures" in epochs(config.run, 1_281_167)

    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    data = {"image_size": 8}
    for field, count in (("path", 60), ("validation_path", 5)):
        place = tmp_path / Path(getattr(config.data, field)).name.partition("-")[0]
        write_shards((Example(pixels, f"{field} {k}", 0, str(k)) for k in range(count)), place, 30)
        data[field] = str(place)
    data_set = dataclasses.replace(config.data, **data)
    assert len(load_dataset(data_set, "train")) == 60 and len(load_dataset(data_set, "validation")) == 5


def test_a_recipe_extends_another_and_is_for_what_it_names_itself(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("about: mine\nextends: textok-64-512\ntokenizer:\n  model: {size: small}\n")
    config = load_config(TokenizerTrainConfig, str(file), overrides=["run.steps=3"])
    assert (config.model.num_tokens, config.model.image_size, config.run.steps) == (64, 512, 3)
    assert (config.model.width, config.model.encoder_depth) == (512, 8)  # a size replaces what it decides
    assert config.optim == load_config(TokenizerTrainConfig, "textok-32-256").optim
    with pytest.raises(InputError, match=r"is not for a generator; known: .*textok-32-256"):
        load_config(GeneratorTrainConfig, str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modl: {}\n", "has modl; a recipe has about, extends, generator, tokenizer"),
        ("tokenizer: 3\n", "tokenizer must hold a mapping of settings, found int"),
        ("tokenizer: {modl: 3}\n", "modl"),
        ("extends: nothing\ntokenizer:\n", "unknown recipe 'nothing'; known: demo"),
        ("extends: FILE\ntokenizer:\n", "recipes extend each other"),
    ],
)
def test_a_recipe_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("FILE", str(file)))
    with pytest.raises(InputError, match=message):
        load_config(TokenizerTrainConfig, str(file))


def test_what_is_read_of_a_recipe_is_the_callers_own() -> None:
    first = read_recipe(TokenizerTrainConfig, "demo")
    first["model"]["num_tokens"] = 99
    assert read_recipe(TokenizerTrainConfig, "demo")["model"]["num_tokens"] == 4


def test_super_resolution_reads_a_quarter_of_the_picture() -> None:
    tokenizer, generator = (load_config(cls, "super-resolution-32-256") for cls in SECTIONS)
    assert (tokenizer.model.num_tokens, tokenizer.model.latent_dim, tokenizer.model.bottleneck) == (32, 16, "kl")
    assert (tokenizer.model.max_text_tokens, tokenizer.model.text) == (77, "both")
    assert (generator.model.num_tokens, generator.model.in_channels) == (32, 16)
    assert generator.low_resolution.size(generator.data.image_size) == 64
    assert (generator.model.num_image_tokens, generator.model.image_token_dim) == (256, 48)
    assert generator.model.width == GENERATOR_SIZES["B"]["width"]  # and nothing of the DiT-XL that it extends
    assert generator.model.text_dim == tokenizer.model.text_dim


def test_the_published_losses_are_all_there() -> None:
    """l2, perceptual, GAN and LeCAM, with a discriminator of about 24 M of StyleGAN's type (arXiv 2412.05796)."""
    for name in PUBLISHED:
        config = load_config(TokenizerTrainConfig, name)
        assert min(config.loss.l2, config.loss.lpips, config.loss.gan, config.loss.lecam) > 0
        assert config.discriminator.kind == "stylegan"
        with torch.device("meta"):
            network = build_discriminator(config.discriminator, config.data.image_size)
        assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(24e6, rel=0.01)


# -- at work -----------------------------------------------------------------------------------------------------------------


def test_the_small_recipes_run(tmp_path: Path, loads_fake_text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps each, on drawn shapes: the tokenizer, and over its tokens text to image, classes and super-resolution."""
    monkeypatch.setattr(type(loads_fake_text), "dim", 384)  # minilm's
    monkeypatch.setattr("textok_fast.training.tokenizer.STATISTICS_PICTURES", 32)
    few = ["data.source=shapes", "run.steps=2", "run.batch_size=8", "run.tensorboard=false"]
    settings = [*few, f"run.output_dir={tmp_path / 'tokenizer'}"]
    assert main(["train", "tokenizer", "--recipe", "demo", *settings]) == 0
    kinds = {"demo": TextToImagePipeline, "demo-class": ClassToImagePipeline, "demo-super-resolution": SuperResolutionPipeline}
    for name, kind in kinds.items():
        settings = [*few, f"tokenizer={tmp_path / 'tokenizer' / 'final'}", f"run.output_dir={tmp_path / name}"]
        settings += ["cache_images=16", "run.workers=0"]
        assert main(["train", "generator", "--recipe", name, *settings]) == 0
        assert isinstance(load_pipeline(tmp_path / name / "final"), kind)
    small = tmp_path / "small"
    assert main(["data", "make", "--count", "2", "--out", str(small), "source=shapes", "image_size=16"]) == 0
    command = ["sample", "--model", str(tmp_path / "demo-super-resolution" / "final"), "--images", str(small), "--steps", "2"]
    assert main([*command, "--out", str(tmp_path / "large")]) == 0
    with Image.open(tmp_path / "large" / "00001.png") as picture:
        assert picture.size == (64, 64)


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name}\s", listed, re.MULTILINE) for name in recipe_names())
    assert main(["recipes", "demo-class"]) == 0
    assert capsys.readouterr().out == recipe_path("demo-class").read_text(encoding="utf-8")
    assert main(["recipes", "nothing"]) == 2
