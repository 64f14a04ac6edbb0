from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from textok_fast import DiT, DiTConfig, InputError, TexTok
from textok_fast.inference import ClassToImagePipeline, TextToImagePipeline, load_pipeline
from textok_fast.inference.pipelines import SamplingOptions
from textok_fast.ops import seeded_normal

Make = Callable[..., TexTok]
PROMPTS = ["a red cow", "two green stars on the sand", "house"]
STEPS = SamplingOptions(steps=3)


def generator(**overrides: Any) -> DiT:
    torch.manual_seed(1)
    sizes = {"num_tokens": 3, "in_channels": 4, "width": 32, "depth": 2, "heads": 2, "num_classes": 0}
    model = DiT(DiTConfig(**{**sizes, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def by_text(make_tokenizer: Make) -> TextToImagePipeline:
    return TextToImagePipeline(generator(text_dim=8, learn_sigma=False, time_scale=1000.0), make_tokenizer(), "flow")


@pytest.fixture
def by_class(make_tokenizer: Make) -> ClassToImagePipeline:
    captions = {0: ["cow one", "cow two", "cow three"], 2: ["star"]}
    return ClassToImagePipeline(generator(num_classes=3), make_tokenizer(), "gaussian", ["cow", "dog", "star"], captions)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_the_same_seed_gives_the_same_picture(by_text: TextToImagePipeline, sampler: str) -> None:
    options = SamplingOptions(sampler, steps=3, guidance_scale=2.0)
    first, second = (by_text(PROMPTS, seed=7, options=options) for _ in range(2))
    assert first.images.shape == (3, 16, 16, 3)
    assert first.images.dtype == torch.uint8
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.tokens, second.tokens)
    assert (first.seeds, first.captions) == ([7, 8, 9], PROMPTS)
    assert not torch.equal(by_text(PROMPTS, seed=100, options=options).tokens, first.tokens)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_sample_does_not_depend_on_its_batch(by_text: TextToImagePipeline, scale: float) -> None:
    options = SamplingOptions(steps=3, guidance_scale=scale)
    together = by_text(PROMPTS, seed=[5, 50, 500], options=options, output="float")
    for i, seed in enumerate((5, 50, 500)):
        alone = by_text(PROMPTS[i], seed=seed, options=options, output="float")
        torch.testing.assert_close(alone.tokens[0], together.tokens[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.images[0], together.images[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_neither_does_one_of_a_sampler_that_draws_noise_at_every_step(
    by_class: ClassToImagePipeline, sampler: str, eta: float
) -> None:
    options = SamplingOptions(sampler, steps=4, guidance_scale=2.0, eta=eta)
    together = by_class([0, 2, 1], seed=3, options=options)
    alone = by_class("star", seed=4, options=options)
    torch.testing.assert_close(alone.tokens[0], together.tokens[1], atol=1e-4, rtol=1e-4)
    assert alone.captions == together.captions[1:2] == ["star"]


def test_guidance_of_one_is_no_guidance_and_an_interval_limits_it(by_text: TextToImagePipeline) -> None:
    calls: list[int] = []
    forward = by_text.generator.forward
    by_text.generator.forward = lambda x, *rest: (calls.append(len(x)), forward(x, *rest))[1]  # type: ignore[method-assign]
    plain = by_text(PROMPTS, options=SamplingOptions(steps=4, guidance_scale=1.0))
    assert calls == [3] * 4
    calls.clear()
    outside = by_text(PROMPTS, options=SamplingOptions(steps=4, guidance_scale=5.0, guidance_interval=(2.0, 3.0)))
    assert calls == [3] * 4
    assert torch.equal(outside.tokens, plain.tokens)
    calls.clear()
    guided = by_text(PROMPTS, options=SamplingOptions(steps=4, guidance_scale=5.0))
    assert calls == [6] * 4
    assert not torch.allclose(guided.tokens, plain.tokens, atol=1e-3)


@torch.no_grad()
def test_guidance_is_its_formula(by_text: TextToImagePipeline) -> None:
    """One Euler step from t = 1 to t = 0 written out."""
    made = by_text(PROMPTS, options=SamplingOptions("euler", steps=1, guidance_scale=3.0))
    noise = seeded_normal(torch.tensor([0, 1, 2]), torch.tensor(0), (3, 4))
    text = by_text.tokenizer.text_features(PROMPTS, 3)
    conditional = by_text.generator(noise, torch.ones(3), text=text)
    null = by_text.generator(noise, torch.ones(3))
    torch.testing.assert_close(made.tokens, noise - (null + 3 * (conditional - null)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.images, by_text.tokenizer.decode(made.tokens, PROMPTS, output="uint8"), atol=1, rtol=0)


def test_the_decoder_gets_a_held_out_caption_of_the_class(by_class: ClassToImagePipeline) -> None:
    made = by_class(["cow"] * 12 + ["dog", "star"], seed=0, options=STEPS)
    drawn = made.captions[:12]
    assert set(drawn) == set(by_class.captions[0])  # all of them in twelve draws
    assert made.captions[12:] == ["", "star"]
    assert by_class([0] * 12, seed=0, options=STEPS).captions == drawn
    given = by_class([0, 1], captions=["mine", "yours"], options=STEPS)
    assert given.captions == ["mine", "yours"]
    wanted = by_class.tokenizer.decode(given.tokens, ["mine", "yours"], output="uint8")
    assert torch.equal(given.images, wanted)


def test_labels_by_name_and_by_number_are_the_same(by_class: ClassToImagePipeline) -> None:
    assert torch.equal(by_class("star", options=STEPS).tokens, by_class(2, options=STEPS).tokens)
    assert not torch.equal(by_class("cow", options=STEPS).tokens, by_class(2, options=STEPS).tokens)


def test_a_class_named_by_a_number_wins_over_the_index(make_tokenizer: Make) -> None:
    by_number = ClassToImagePipeline(generator(num_classes=3), make_tokenizer(), "gaussian", ["2", "5", "10"])
    assert [by_number.label_index(label) for label in ("2", "5", "10", 2, "0")] == [0, 1, 2, 2, 0]
    with pytest.raises(InputError, match="no class '\u00b2'"):
        by_number.label_index("\u00b2")
    with pytest.raises(InputError, match=r"class 7 is outside \[0, 3\)"):
        by_number.label_index("7")


@torch.no_grad()
def test_the_output_is_read_as_the_prediction_says(make_tokenizer: Make) -> None:
    """One step from pure noise, at a = alphas_cumprod[-1]: x0 = sqrt(a) x - sqrt(1 - a) v for v."""
    model, tokenizer = generator(num_classes=3, learn_sigma=False), make_tokenizer()
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    noise = seeded_normal(torch.tensor([0]), torch.tensor(0), (3, 4))
    for prediction in ("epsilon", "v", "x0"):
        pipeline = ClassToImagePipeline(model, tokenizer, "gaussian", prediction=prediction)
        made = pipeline(1, options=SamplingOptions("ddim", steps=1))
        first = float(a[0])  # one step keeps the first training step, t = 0
        out = model(noise, torch.zeros(1, dtype=torch.int64), torch.tensor([1]))
        wanted = {
            "epsilon": (noise - (1 - first) ** 0.5 * out) / first**0.5,
            "v": first**0.5 * noise - (1 - first) ** 0.5 * out,
            "x0": out,
        }
        torch.testing.assert_close(made.tokens, wanted[prediction], atol=1e-4, rtol=1e-4)


def test_progress_is_reported(by_text: TextToImagePipeline) -> None:
    seen: list[tuple[int, int]] = []
    by_text(PROMPTS, options=STEPS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_mistakes_are_named(by_text: TextToImagePipeline, by_class: ClassToImagePipeline, make_tokenizer: Make) -> None:
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: by_text([]), "at least one prompt"),
        (lambda: by_text(["fine", " "]), "non-empty"),
        (lambda: by_text(PROMPTS, seed=[1, 2]), "2 seeds for 3"),
        (lambda: by_text(PROMPTS, seed=-2), r"from 0 to 2\*\*63 - 1, got -2"),
        (lambda: by_text("house", seed=2**63), "got 9223372036854775808"),
        (lambda: by_text(PROMPTS, options=SamplingOptions("ddim")), "ddim"),
        (lambda: by_text(PROMPTS, options=SamplingOptions(steps=0)), "at least 1 step"),
        (lambda: by_text(PROMPTS, options=SamplingOptions(guidance_scale=2, guidance_interval=(1, 0))), "interval"),
        (lambda: by_class([]), "at least one label"),
        (lambda: by_class("horse"), "no class 'horse'; known: cow, dog, star"),
        (lambda: by_class(3), r"outside \[0, 3\)"),
        (lambda: by_class(-1), r"outside \[0, 3\)"),
        (lambda: by_class([0, 1], captions=["one"]), "1 captions for 2"),
        (lambda: by_class(0, options=SamplingOptions("euler")), "euler"),
        (lambda: by_class(0, options=SamplingOptions(steps=2000)), "2000"),
        (lambda: TextToImagePipeline(generator(num_tokens=4, text_dim=8), make_tokenizer()), "not trained together"),
    ]
    for call, message in calls:
        with pytest.raises(InputError, match=message):
            call()


def save(pipeline: TextToImagePipeline | ClassToImagePipeline, directory: Path, **about: Any) -> Path:
    pipeline.generator.save_pretrained(directory / "generator")
    pipeline.tokenizer.save_pretrained(directory / "tokenizer")
    (directory / "pipeline.json").write_text(json.dumps(about))
    return directory


def test_a_directory_becomes_the_pipeline_it_holds(
    by_text: TextToImagePipeline, by_class: ClassToImagePipeline, loads_fake_text: Any, tmp_path: Path
) -> None:
    text = load_pipeline(save(by_text, tmp_path / "text", objective="flow", label_names=[], captions={}))
    assert isinstance(text, TextToImagePipeline)
    assert torch.equal(text(PROMPTS, options=STEPS).images, by_text(PROMPTS, options=STEPS).images)
    captions = {str(label): texts for label, texts in by_class.captions.items()}
    about = {"objective": "gaussian", "label_names": by_class.label_names, "captions": captions}
    labels = load_pipeline(save(by_class, tmp_path / "class", **about))
    assert isinstance(labels, ClassToImagePipeline)
    assert torch.equal(labels("cow", seed=4, options=STEPS).images, by_class("cow", seed=4, options=STEPS).images)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"objective": "edm"}, "objective must be gaussian or flow, got 'edm'"),
        ({"objective": "gaussian", "prediction": "score"}, "prediction must be one of epsilon, v, x0; got 'score'"),
        ({"objective": "flow"}, "no learned variance"),
    ],
)
def test_processes_that_do_not_exist_are_refused(
    by_class: ClassToImagePipeline, tmp_path: Path, about: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_pipeline(save(by_class, tmp_path, label_names=[], captions={}, **about))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "it has no pipeline.json"),
        ("{", "cannot read"),
        ("[]", "cannot read"),
        ("{}", "objective"),
        ('{"objective": "flow", "label_names": [], "captions": {"a": []}}', "cannot read"),
        ('{"objective": "flow", "label_names": [], "captions": {}}', "no model at"),
    ],
)
def test_directories_that_hold_no_pipeline_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "pipeline.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_pipeline(tmp_path)


def test_noise_negative_prompts_and_pictures_at_once(by_text: TextToImagePipeline, by_class: ClassToImagePipeline) -> None:
    noise = torch.randn(3, 3, 4)
    options = SamplingOptions(steps=1, guidance_scale=3.0)
    made = by_text(PROMPTS, options=options, noise=noise, negative_prompts=["no", "nothing at all in it or on it", ""])
    with torch.no_grad():
        for index, negative in enumerate(["no", "nothing at all in it or on it", None]):
            c, u = (
                by_text.generator(noise[index : index + 1], torch.ones(1), text=by_text.tokenizer.text_features([text], 1))
                for text in (PROMPTS[index], negative)
            )
            wanted = noise[index] - (u + 3 * (c - u))[0]  # one Euler step from 1 to 0
            torch.testing.assert_close(made.tokens[index], wanted, atol=2e-5, rtol=2e-5)
    plain = by_text(PROMPTS, options=options, noise=noise, output="float")
    assert torch.equal(plain.tokens, by_text(PROMPTS, seed=9, options=options, noise=noise).tokens)  # Euler draws nothing else
    by_text.decode_batch = 2
    torch.testing.assert_close(by_text(PROMPTS, options=options, noise=noise, output="float").images, plain.images)
    for pipeline, given, extra, message in (
        (by_text, PROMPTS, {"noise": noise[:1]}, r"noise must be \(3, 3, 4\)"),
        (by_text, PROMPTS, {"negative_prompts": ["x"]}, "got 1 negative prompts for 3"),
        (by_class, [0], {"negative_prompts": ["x"]}, "reads no text"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline(given, options=STEPS, **extra)
