from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textok_fast.config import (
    GENERATOR_SIZES,
    TOKENIZER_SIZES,
    DataConfig,
    DiTConfig,
    GeneratorTrainConfig,
    TexTokConfig,
    TokenizerTrainConfig,
    from_mapping,
    load_config,
    to_dict,
)
from textok_fast.errors import InputError
from textok_fast.modeling import DiT, TexTok


def millions(model_class: type, config: Any) -> float:
    with torch.device("meta"):
        model = model_class(config)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


# -- named sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text_encoder", "expected"),
    [("google/t5-v1_1-xl", 176.08), ("minilm", 173.5)],
)
def test_the_base_tokenizer_has_the_published_size(text_encoder: str, expected: float) -> None:
    config = TexTokConfig.named("base", image_size=512, num_tokens=32, latent_dim=8, text_encoder=text_encoder)
    assert (config.patch_size, config.num_patches) == (16, 1024)
    assert millions(TexTok, config) == pytest.approx(expected, abs=0.05)


def test_dit_xl_has_the_published_size_over_tokens_and_over_patches() -> None:
    assert millions(DiT, DiTConfig.named("XL", num_tokens=32, in_channels=8)) == pytest.approx(674.84, abs=0.01)
    patches = DiTConfig.named("XL", input_size=64, patch_size=2, in_channels=4)
    assert patches.sequence_length == 1024
    assert millions(DiT, patches) == pytest.approx(674.83, abs=0.01)


@pytest.mark.parametrize(("size", "expected"), [("S", 33), ("B", 130), ("L", 458)])
def test_the_other_dits_have_the_published_sizes(size: str, expected: int) -> None:
    config = DiTConfig.named(size, input_size=32, patch_size=2, in_channels=4)
    assert millions(DiT, config) == pytest.approx(expected, abs=0.7)


@pytest.mark.parametrize("size", TOKENIZER_SIZES)
@pytest.mark.parametrize("image_size", [64, 256])
def test_named_tokenizers_cut_the_picture_into_the_grid_of_their_size(size: str, image_size: int) -> None:
    config = TexTokConfig.named(size, image_size=image_size)
    assert config.grid == TOKENIZER_SIZES[size]["grid"]
    assert TexTokConfig.named(size, image_size=image_size, patch_size=4).grid == image_size // 4


def test_named_follows_a_listed_text_encoder_and_leaves_the_width_of_others_to_the_caller() -> None:
    assert TexTokConfig.named("tiny", text_encoder="google/t5-v1_1-xxl").text_dim == 4096
    assert TexTokConfig.named("tiny", text_encoder="google/t5-v1_1-xxl", text_dim=5).text_dim == 5
    assert TexTokConfig.named("tiny", text_encoder="someone/else", text_dim=7).text_dim == 7


@pytest.mark.parametrize("config_class", [TexTokConfig, DiTConfig])
def test_unknown_sizes_and_fields_are_named(config_class: type) -> None:
    with pytest.raises(InputError, match="unknown size 'giant'; known: tiny"):
        config_class.named("giant", num_tokens=4)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="has no field colour"):
        config_class.named("tiny", num_tokens=4, colour=1)  # type: ignore[attr-defined]


def test_fsq_levels_follow_the_latent_width() -> None:
    assert TexTokConfig(bottleneck="fsq", latent_dim=5).fsq_levels == (7, 5, 5, 5, 5)
    assert len(TexTokConfig(bottleneck="fsq", latent_dim=8).fsq_levels) == 8


# -- precedence -----------------------------------------------------------------------------------------------------------


def test_a_file_wins_over_the_recipe_and_an_override_over_both(tmp_path: Path) -> None:
    recipe = load_config(TokenizerTrainConfig, "demo")
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: 0.5, warmup_steps: 7}\nmodel: {num_tokens: 9}\n")
    loaded = load_config(TokenizerTrainConfig, "demo", file, ["optim.lr=0.25"])
    assert (loaded.optim.lr, loaded.optim.warmup_steps, loaded.model.num_tokens) == (0.25, 7, 9)
    # What neither names is the recipe's.
    assert loaded.optim.ema_decay == recipe.optim.ema_decay
    assert loaded.model.image_size == recipe.model.image_size
    assert loaded.data == recipe.data


def test_a_nested_size_takes_its_row_of_the_table() -> None:
    config = load_config(TokenizerTrainConfig, overrides=["model.size=small", "model.image_size=64", "model.heads=4"])
    assert (config.model.width, config.model.encoder_depth, config.model.heads) == (512, 8, 4)
    assert config.model.patch_size == 2
    generator = load_config(GeneratorTrainConfig, overrides=["model.size=B", "model.num_tokens=16", "model.text_dim=0"])
    assert (generator.model.width, generator.model.depth) == (GENERATOR_SIZES["B"]["width"], GENERATOR_SIZES["B"]["depth"])


def test_a_size_given_on_the_command_line_replaces_the_recipes_size() -> None:
    config = load_config(TokenizerTrainConfig, "demo", overrides=["model.size=base"])
    assert (config.model.width, config.model.encoder_depth, config.model.heads) == (768, 12, 12)
    for overrides in (["model.size=base", "model.encoder_depth=3"], ["model.encoder_depth=3", "model.size=base"]):
        assert load_config(TokenizerTrainConfig, "demo", overrides=overrides).model.encoder_depth == 3
    assert config.model.patch_size == load_config(TokenizerTrainConfig, "demo").model.patch_size  # the recipe names it


def test_strings_on_the_command_line_become_the_fields_types() -> None:
    overrides = ["optim.lr=3e-4", "run.tensorboard=false", "optim.betas=[0.8, 0.9]", "data.path=123", "run.steps=5"]
    config = load_config(TokenizerTrainConfig, overrides=overrides[:3] + overrides[4:])
    assert (config.optim.lr, config.run.tensorboard, config.optim.betas, config.run.steps) == (3e-4, False, (0.8, 0.9), 5)


@pytest.mark.parametrize("as_file", [False, True])
def test_words_and_numbers_that_yaml_would_take_for_something_else(tmp_path: Path, as_file: bool) -> None:
    given = {"run": {"mixed_precision": "no", "tensorboard": "no", "output_dir": "2024"}, "optim": {"lr": "1e-3"}}
    text = "\n".join(f"{part}: {{{', '.join(f'{key}: {value}' for key, value in row.items())}}}" for part, row in given.items())
    (tmp_path / "run.yaml").write_text(text)
    overrides = [f"{part}.{key}={value}" for part, row in given.items() for key, value in row.items()]
    source: dict[str, Any] = {"file": tmp_path / "run.yaml"} if as_file else {"overrides": overrides}
    config = load_config(TokenizerTrainConfig, **source)
    assert (config.run.mixed_precision, config.run.tensorboard, config.run.output_dir) == ("no", False, "2024")
    assert config.optim.lr == 1e-3


@pytest.mark.parametrize("path", ["runs/demo #1", "007", "2024-01-02", "a: b", "null", "true", "~", "[a", "*x"])
def test_a_path_arrives_as_it_was_typed(path: str) -> None:
    assert load_config(TokenizerTrainConfig, overrides=[f"run.output_dir={path}"]).run.output_dir == path
    assert load_config(TokenizerTrainConfig, overrides=[f'run.output_dir="{path}"']).run.output_dir == path


# -- errors ---------------------------------------------------------------------------------------------------------------

BAD_TOKENIZER = {
    "nope=1": "nope",
    "model.nope=1": "model.nope",
    "optim.lr=fast": "optim.lr",
    "optim.betas=[0.9]": "optim.betas",
    "model=3": "model",
    "model.text=left": "model.text",
    "run.mixed_precision=fp16": "run.mixed_precision",
    "run.steps=1.5": "run.steps",
    "model.image_size=63": "image_size 63",
    "model.width=100": "width 100",
    "model.num_tokens=0": "num_tokens",
    "model.mlp_ratio=-1": "mlp_ratio",
    "model.codebook_size=0": "codebook_size",
    "model.text_dim=0": "text_dim",
    "model.latent_mean=[1]": "latent_mean",
    "model.size=huge": "huge",
    "model.size=tiny model.image_size=big": "image_size",
    "model.bottleneck=fsq model.fsq_levels=[8,5]": "fsq_levels",
    "model.bottleneck=fsq model.latent_dim=2 model.fsq_levels=[8,1]": "fsq_levels",
    "data.image_size=32": "data.image_size 32 and model.image_size 64",
    "run.batch_size=0": "batch_size",
    "run.log_every=0": "log_every",
    "run.checkpoint_every=0": "checkpoint_every",
    "run.gradient_accumulation=0": "gradient_accumulation",
    "run.seed=-1": "seed",
    "run.keep_checkpoints=0": "keep_checkpoints",
    "optim.lr=-1": "lr",
    "optim.warmup_steps=-1": "warmup_steps",
    "optim.final_lr=-1": "final_lr",
    "optim.grad_clip=-1": "grad_clip",
    "loss.gradient=-0.5": "gradient",
    "loss.kl=.nan": "kl",
    "optim.ema_decay=2": "ema_decay",
    "caption_dropout=2": "caption_dropout",
    "model": "key=value",
    "=3": "key=value",
}
BAD_GENERATOR = {
    "model.num_tokens=-1": "num_tokens",
    "model.input_size=8": "input_size=8",
    "model.num_classes=-1": "num_classes",
    "model.patch_size=2": "patch_size",
    "model.condition_dropout=1": "condition_dropout",
    "model.image_token_dim=4": "image_token_dim",
    "model.size=S model.num_tokens=a": "num_tokens",
    "objective=x": "objective",
    "cache_images=-1": "cache_images",
    "prediction=noise": "prediction",
    "prediction=v": "objective=gaussian",
}


@pytest.mark.parametrize("overrides", BAD_TOKENIZER)
def test_impossible_tokenizer_settings_name_the_key(overrides: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(TokenizerTrainConfig, overrides=overrides.split(" "))
    assert BAD_TOKENIZER[overrides] in str(caught.value)


@pytest.mark.parametrize("overrides", BAD_GENERATOR)
def test_impossible_generator_settings_name_the_key(overrides: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(GeneratorTrainConfig, overrides=overrides.split(" "))
    assert BAD_GENERATOR[overrides] in str(caught.value)


@pytest.mark.parametrize(
    ("config_class", "override", "message"),
    [
        (TokenizerTrainConfig, "data.pth=x", r"TokenizerTrainConfig has no setting data\.pth; did you mean data\.path\?"),
        (TokenizerTrainConfig, "batch_size=8", r"no setting batch_size; did you mean run\.batch_size\?"),
        (GeneratorTrainConfig, "modle.size=XL", r"no setting modle; did you mean model\?"),
        (GeneratorTrainConfig, "model.sise=XL", r"no setting model\.sise; did you mean model\.size\?"),
        (DataConfig, "sourc=emoji", r"DataConfig has no setting sourc; did you mean source\?"),
        (DataConfig, "xyzzy=1", r"no setting xyzzy; known: source, path, image_size, .*read_streams, huggingface$"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(config_class: Any, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(config_class, overrides=[override])


@pytest.mark.parametrize(("objective", "scale"), [("flow", 1000.0), ("gaussian", 1.0)])
def test_the_time_scale_follows_the_objective(objective: Any, scale: float) -> None:
    model = DiTConfig.named("tiny", num_tokens=4, learn_sigma=False)
    for time_scale in (1.0, 1000.0):
        given = dataclasses.replace(model, time_scale=time_scale)
        assert GeneratorTrainConfig(model=given, objective=objective).model.time_scale == scale
        assert given.time_scale == time_scale  # the caller's is as it was
    assert load_config(GeneratorTrainConfig, overrides=[f"objective={objective}"]).model.time_scale == scale


@pytest.mark.parametrize(
    ("contents", "named"),
    [("a: [", "not valid YAML"), ("- 1", "mapping"), ("1: 2", "1"), ("size: base", "no named sizes"), ("\ufffe: \x00", "YAML")],
)
def test_files_that_hold_no_settings_are_refused(tmp_path: Path, contents: str, named: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(contents)
    with pytest.raises(InputError, match=named):
        load_config(TokenizerTrainConfig, file=file)


def test_a_missing_file_an_undecodable_one_and_an_unknown_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml"):
        load_config(TokenizerTrainConfig, file=tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"latin\.yaml"):
        load_config(TokenizerTrainConfig, file=tmp_path / "latin.yaml")
    with pytest.raises(InputError, match="unknown recipe 'x'; known: .*demo"):
        load_config(TokenizerTrainConfig, "x")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(TokenizerTrainConfig, file=tmp_path / "empty.yaml") == TokenizerTrainConfig()


# -- round trip -----------------------------------------------------------------------------------------------------------

counts = st.integers(1, 64)
floats = st.floats(-1e6, 1e6, allow_nan=False)


@st.composite
def tokenizer_configs(draw: st.DrawFn) -> TexTokConfig:
    d, heads, patch = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 8))
    statistics = st.one_of(st.just(()), st.tuples(*[floats] * d))
    return TexTokConfig(
        image_size=patch * draw(st.integers(1, 8)),
        patch_size=patch,
        num_tokens=draw(counts),
        latent_dim=d,
        text=draw(st.sampled_from(["both", "encoder", "decoder", "none"])),
        bottleneck=draw(st.sampled_from(["none", "kl", "vq", "fsq"])),
        width=heads * draw(st.integers(1, 16)),
        heads=heads,
        text_encoder=draw(st.text(max_size=12)),
        text_split=draw(st.text(max_size=3)),
        fsq_levels=draw(st.one_of(st.just(()), st.tuples(*[st.integers(2, 9)] * d))),
        latent_mean=draw(statistics),
        latent_std=draw(statistics),
    )


@settings(max_examples=60, deadline=None)
@given(tokenizer_configs())
def test_a_tokenizer_configuration_survives_json(config: TexTokConfig) -> None:
    assert from_mapping(TexTokConfig, json.loads(json.dumps(to_dict(config)))) == config


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        DiTConfig,
        num_tokens=counts,
        in_channels=counts,
        width=st.just(48),
        heads=st.sampled_from([1, 2, 4, 6]),
        num_classes=st.integers(0, 1000),
        condition_dropout=st.floats(0, 0.99),
        learn_sigma=st.booleans(),
        text_dim=st.integers(0, 64),
    )
)
def test_a_generator_configuration_survives_json(config: DiTConfig) -> None:
    assert from_mapping(DiTConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_defaults_survive_too() -> None:
    for kind in (TokenizerTrainConfig, GeneratorTrainConfig, DataConfig):
        assert from_mapping(kind, to_dict(kind())) == kind()
        assert [item.name for item in dataclasses.fields(kind)] == list(to_dict(kind()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("soft_temperature", 0, "soft_temperature must be above 0, got 0"),
        ("soft_temperature", -0.5, "soft_temperature must be above 0, got -0.5"),
        ("mlp_ratio", float("inf"), "mlp_ratio must be above 0, got inf"),
        ("num_tokens", 0, "num_tokens must be at least 1, got 0"),
        ("num_tokens", True, "num_tokens must be a number, got True"),
    ],
)
def test_numbers_say_what_they_may_be(name: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TexTokConfig(**{name: value})
