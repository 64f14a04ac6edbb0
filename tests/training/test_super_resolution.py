"""Super-resolution from beginning to end: training, the pipeline, its engine, the command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from textok_fast import InputError, TexTok
from textok_fast.config import (
    DataConfig,
    DiTConfig,
    GeneratorTrainConfig,
    LowResolutionConfig,
    OptimConfig,
    RunConfig,
    from_mapping,
    to_dict,
)
from textok_fast.data import collate, load_dataset
from textok_fast.data.base import Draw
from textok_fast.data.degradation import degrade
from textok_fast.data.token_cache import TokenDataset, drawn_rows
from textok_fast.data.token_pictures import TokensAndPictures, collate_tokens_and_pictures, small_picture
from textok_fast.inference import Plan, SuperResolutionPipeline, TextToImagePipeline, load_pipeline
from textok_fast.inference.folders import sample_to_folder
from textok_fast.inference.pipelines import SamplingOptions
from textok_fast.modeling.dit import DiT
from textok_fast.training import train_generator
from textok_fast.training.generator import GeneratorTask
from textok_fast.training.loop import StepBatches

DATA = DataConfig(source="shapes", image_size=16, objects=8, held_out_objects=4, scene_objects=2)
LOW = LowResolutionConfig(scale=4, patch_size=2, strength=0.3)  # 4 x 4 pixels: four tokens of twelve numbers
STEPS = 150


@pytest.fixture(scope="module")
def tokenizer_directory(make_tokenizer: Callable[..., TexTok], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that nobody trained gives tokens that depend on the picture all the same; of unit variance, as trained
    ones."""
    tokenizer = make_tokenizer(text="none")
    dataset = load_dataset(DATA, "train")
    batch = collate([dataset[index] for index in range(64)])
    tokens = tokenizer.encode(batch["images"], batch["captions"]).mode().flatten(0, 1)
    tokenizer.set_latent_statistics(tokens.mean(0), tokens.std(0))
    return tokenizer.save_pretrained(tmp_path_factory.mktemp("tokenizer"))


def config_of(tokenizer: Path, out: Path, low: LowResolutionConfig, steps: int = STEPS) -> GeneratorTrainConfig:
    return GeneratorTrainConfig(
        tokenizer=str(tokenizer),
        model=DiTConfig(
            num_tokens=3, in_channels=4, width=32, depth=2, heads=2, num_classes=0, text_dim=8, learn_sigma=False
        ),
        data=DATA,
        optim=OptimConfig(lr=4e-3, warmup_steps=5, ema_decay=0.9),
        run=RunConfig(
            output_dir=str(out), steps=steps, batch_size=16, log_every=10, checkpoint_every=1000, sample_every=1000,
            tensorboard=False,
        ),
        low_resolution=low,
        cache_images=256,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fake_text_everywhere(fake_text_class: type) -> Any:
    patched = pytest.MonkeyPatch()
    patched.setattr("textok_fast.modeling.tokenizer.load_text_encoder", lambda *args, **options: fake_text_class())
    yield
    patched.undo()


@pytest.fixture(scope="module")
def trained(fake_text_everywhere: None, tokenizer_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One generator that looks at the small picture, and one that reads the caption alone."""
    out = tmp_path_factory.mktemp("runs")
    configs = {"looks": config_of(tokenizer_directory, out / "looks", LOW)}
    configs["blind"] = config_of(tokenizer_directory, out / "blind", LowResolutionConfig())
    return {name: (config, train_generator(config, progress=False)) for name, config in configs.items()}


@pytest.fixture(scope="module")
def held_out() -> dict[str, Any]:
    """48 pictures that training has not seen, and these made small."""
    dataset = load_dataset(DATA, "composition")
    examples = [dataset[index] for index in range(48)]
    batch = collate(examples)
    small = torch.stack([small_picture(example.image, LOW, index) for index, example in enumerate(examples)])
    return {**batch, "small": small}


def test_looking_at_the_small_picture_beats_not_looking(trained: dict[str, Any], held_out: dict[str, Any]) -> None:
    """Of pictures never seen: the tokens sampled are nearer to the true ones than those of the generator without pictures, and
    than those for somebody else's small picture."""
    looks, blind = (load_pipeline(trained[name][1].final) for name in ("looks", "blind"))
    assert isinstance(looks, SuperResolutionPipeline) and isinstance(blind, TextToImagePipeline)
    captions, small = held_out["captions"], held_out["small"]
    true = looks.tokenizer.encode(held_out["images"], captions).mode()  # type: ignore[union-attr]
    options = SamplingOptions("euler", 8)

    def error(tokens: torch.Tensor) -> float:
        return float((tokens - true).square().mean())

    right = error(looks(small, captions, options=options).tokens)
    wrong = error(looks(small.roll(1, 0), captions, options=options).tokens)
    without = error(blind(captions, options=options).tokens)
    assert right < 0.85 * without
    assert right < 0.85 * wrong


def test_the_pipeline_is_what_was_trained_and_takes_every_form_of_picture(
    trained: dict[str, Any], held_out: dict[str, Any], tmp_path: Path
) -> None:
    config, result = trained["looks"]
    pipeline = load_pipeline(result.final)
    assert isinstance(pipeline, SuperResolutionPipeline)
    assert (pipeline.size, pipeline.patch_size) == (4, 2)
    assert pipeline.generator.config == config.model
    assert (config.model.image_token_dim, config.model.num_image_tokens) == (12, 4)
    small, captions = held_out["small"][:3], held_out["captions"][:3]
    options = SamplingOptions("euler", 3, guidance_scale=2.0)
    made = pipeline(small, captions, seed=5, options=options)
    assert made.images.shape == (3, 16, 16, 3) and made.images.dtype == torch.uint8
    pictures = [Image.fromarray(picture) for picture in small.numpy()]
    floats = small.permute(0, 3, 1, 2).float() / 127.5 - 1
    for given in (small.numpy(), pictures, floats):
        torch.testing.assert_close(pipeline(given, captions, seed=5, options=options).tokens, made.tokens)
    alone = pipeline(small[1:2], captions[1:2], seed=6, options=options)
    torch.testing.assert_close(alone.tokens, made.tokens[1:2], rtol=1e-4, atol=1e-5)
    # Guidance is by the caption: without one there is nothing to lead to.
    plain, led = (pipeline(small, seed=5, options=SamplingOptions("euler", 3, guidance_scale=g)).tokens for g in (1.0, 4.0))
    torch.testing.assert_close(plain, led, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pipeline(small, captions, seed=5, options=SamplingOptions("euler", 3)).tokens, made.tokens)
    again = load_pipeline(pipeline.save_pretrained(tmp_path / "copy"))
    assert torch.equal(again(small, captions, seed=5, options=options).images, made.images)  # type: ignore[operator]


def test_the_engine_makes_the_same(trained: dict[str, Any], held_out: dict[str, Any]) -> None:
    final = trained["looks"][1].final
    small, captions = held_out["small"][:3], held_out["captions"][:3]
    options = SamplingOptions("euler", 4, guidance_scale=2.0)
    plain, engine = load_pipeline(final), load_pipeline(final, plan=Plan())
    expected = plain(small, captions, seed=1, options=options)  # type: ignore[operator]
    made = engine(small, captions, seed=1, options=options)  # type: ignore[operator]
    torch.testing.assert_close(made.tokens, expected.tokens, rtol=1e-4, atol=1e-4)
    assert (made.images.int() - expected.images.int()).abs().max() <= 1


def test_the_last_sheet_has_small_pictures_samples_and_what_can_be_reached(trained: dict[str, Any]) -> None:
    sheet = Image.open(trained["looks"][1].run / "samples" / f"{STEPS:06d}.png")
    assert sheet.size == (8 * 20 + 4, 3 * 20 + 4)


def test_pictures_that_do_not_fit_are_refused(trained: dict[str, Any], held_out: dict[str, Any], tmp_path: Path) -> None:
    final = trained["looks"][1].final
    pipeline: Any = load_pipeline(final)
    with pytest.raises(InputError, match=r"\(B, 4, 4, 3\)"):
        pipeline(held_out["images"])
    with pytest.raises(InputError, match="1 captions for 3 pictures"):
        pipeline(held_out["small"][:3], ["one"])
    with pytest.raises(InputError, match="SuperResolutionPipeline"):
        TextToImagePipeline(pipeline.generator, pipeline.tokenizer, "flow")
    pytest.importorskip("diffusers")
    from textok_fast.interop import TexTokPipeline

    with pytest.raises(InputError, match="takes classes or prompts, no pictures"):
        TexTokPipeline.from_textok(pipeline)
    with pytest.raises(InputError, match="the generator reads 4 of 12"):
        SuperResolutionPipeline(pipeline.generator, pipeline.tokenizer, "flow", size=8, patch_size=2)
    about = json.loads((final / "pipeline.json").read_text())
    assert about["low_resolution"] == {"size": 4, "patch_size": 2, "strength": 0.3}
    broken = pipeline.save_pretrained(tmp_path / "broken")
    for sizes in ({}, {"low_resolution": {"size": 4}}, {"low_resolution": {"size": "a", "patch_size": 2}}):
        (broken / "pipeline.json").write_text(json.dumps({**{k: about[k] for k in about if k != "low_resolution"}, **sizes}))
        with pytest.raises(InputError, match="does not say which pictures the generator reads"):
            load_pipeline(broken)


def test_sampling_a_folder_of_small_pictures_goes_on_where_it_stopped(
    trained: dict[str, Any], held_out: dict[str, Any], tmp_path: Path
) -> None:
    final, folder = str(trained["looks"][1].final), tmp_path / "small"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(held_out["small"][index].numpy()).save(folder / f"{index}.png")
    (folder / "1.txt").write_text(held_out["captions"][1])
    run: dict[str, Any] = {"count": 2, "steps": 2, "batch_size": 2, "images": str(folder)}
    report = sample_to_folder(final, [], [], tmp_path / "out", **run)
    assert [item["for"] for item in report["samples"]] == ["0", "0", "1", "1", "2", "2"]
    assert [item["caption"] for item in report["samples"]] == ["", "", *[held_out["captions"][1]] * 2, "", ""]
    (tmp_path / "out" / "00003.png").unlink()
    assert sample_to_folder(final, [], [], tmp_path / "out", **run)["new"] == 3
    prompted = sample_to_folder(final, ["a", "b", "c"], [], tmp_path / "other", **run)
    assert [item["caption"] for item in prompted["samples"]] == list("aabbcc")
    with pytest.raises(InputError, match="give --images"):
        sample_to_folder(final, ["a"], [], tmp_path / "third")
    with pytest.raises(InputError, match="one --prompt for each picture, or none; got 2 for 3"):
        sample_to_folder(final, ["a", "b"], [], tmp_path / "third", **run)
    with pytest.raises(InputError, match="reads no --images"):
        sample_to_folder(str(trained["blind"][1].final), ["a"], [], tmp_path / "third", images=str(folder))
    with pytest.raises(InputError, match=r"give --images, not --label"):
        sample_to_folder(final, [], ["a"], tmp_path / "third", **run)


# -- what training is given ------------------------------------------------------------------------------------------------


def test_tokens_and_pictures_belong_together(trained: dict[str, Any]) -> None:
    tokens = TokenDataset(trained["looks"][1].run / "tokens")
    dataset = load_dataset(DATA, "train")
    rows = drawn_rows(len(dataset), 256, DATA.seed)
    both = TokensAndPictures(tokens, dataset, rows, LOW)
    item = both[7]
    assert np.array_equal(item["image"].numpy(), dataset[rows[7]].image)
    assert np.array_equal(item["small"].numpy(), degrade(item["image"].numpy(), 4, seed=0, index=7, strength=0.3))
    later = both[Draw(7, 1, 5)]
    assert torch.equal(later["image"], item["image"])  # the picture that was encoded, whatever the epoch
    assert np.array_equal(later["small"], degrade(item["image"].numpy(), 4, seed=0, epoch=5, index=7, strength=0.3))
    with pytest.raises(InputError, match="the data have changed"):
        TokensAndPictures(tokens, dataset, [row + 1 for row in rows], LOW)[7]
    with pytest.raises(InputError, match="256 pictures, and 3 pictures"):
        TokensAndPictures(tokens, dataset, rows[:3], LOW)


def test_every_epoch_sees_other_small_pictures_and_a_resumed_run_the_same(trained: dict[str, Any]) -> None:
    """Whatever the number of the loader's workers, and of the processes that a step's pictures are shared among."""
    tokens, dataset = TokenDataset(trained["looks"][1].run / "tokens"), load_dataset(DATA, "train")
    both = TokensAndPictures(tokens, dataset, drawn_rows(len(dataset), 256, DATA.seed), LOW)
    steps, per_epoch = 8, 4  # of 64 pictures: two epochs of 256

    def seen(start: int = 0, workers: int = 0, rank: int = 0, world: int = 1) -> list[dict[str, torch.Tensor]]:
        """Of each step the small pictures by key."""
        batches = StepBatches(len(both), 64 // world, 3, start, steps, rank, world)
        loader = DataLoader(both, batch_sampler=batches, collate_fn=collate_tokens_and_pictures, num_workers=workers)
        return [dict(zip(batch["keys"], batch["small"], strict=True)) for batch in loader]

    def same(ones: list[dict[str, torch.Tensor]], others: list[dict[str, torch.Tensor]]) -> bool:
        pairs = zip(ones, others, strict=True)
        return all(one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one) for one, other in pairs)

    whole = seen()
    assert same(seen(start=5), whole[5:])
    assert same(seen(workers=2), whole)
    halves = zip(seen(rank=0, world=2), seen(rank=1, world=2), strict=True)
    assert same([first | second for first, second in halves], whole)
    epochs = [{key: small for step in part for key, small in step.items()} for part in (whole[:per_epoch], whole[per_epoch:])]
    assert epochs[0].keys() == epochs[1].keys() and len(epochs[0]) == 256
    assert sum(torch.equal(small, epochs[1][key]) for key, small in epochs[0].items()) < 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low_resolution": LowResolutionConfig(scale=4, patch_size=3)}, "16 must be a multiple of 12"),
        ({"low_resolution": LowResolutionConfig(scale=5)}, "16 must be a multiple of 20"),
        ({"model": DiTConfig(num_tokens=3, image_token_dim=12, num_image_tokens=4)}, r"set low_resolution\.scale"),
    ],
)
def test_sizes_that_do_not_come_out_even_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = config_of(tmp_path, tmp_path, LowResolutionConfig())
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, **change)
    with pytest.raises(InputError, match="2 or more"):
        LowResolutionConfig(scale=1)


def test_a_configuration_survives_being_written(tmp_path: Path) -> None:
    config = config_of(tmp_path, tmp_path, LOW)
    assert from_mapping(GeneratorTrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_pictures_are_measured_by_the_tokenizer(fake_text_everywhere: None, tokenizer_directory: Path, tmp_path: Path) -> None:
    config = config_of(tokenizer_directory, tmp_path, LOW)
    config = dataclasses.replace(config, data=dataclasses.replace(DATA, image_size=32))
    with pytest.raises(InputError, match=r"data\.image_size=16"):
        GeneratorTask(config, TexTok.from_pretrained(tokenizer_directory))


def test_image_tokens_start_with_their_places() -> None:
    dit = DiT(DiTConfig(num_tokens=3, width=32, depth=1, heads=2, image_token_dim=12, num_image_tokens=4, num_classes=0))
    assert dit.image_positions is not None
    assert len(torch.unique(dit.image_positions.detach(), dim=0)) == 4
