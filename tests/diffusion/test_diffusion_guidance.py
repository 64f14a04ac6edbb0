"""Guidance runs the null condition exactly when it must; a picture depends on its seed and not on its batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from textok_fast.diffusion import (
    GaussianDiffusion,
    classifier_free_guidance,
    draw_noise,
    generators_for_seeds,
    guided,
    merge_conditions,
    sample,
)
from textok_fast.errors import InputError


class Recorder:
    """v = label x for tokens, and a record of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, list[float]]] = []

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.calls.append((float(t[0]), label.tolist()))
        return label.view(-1, 1, 1) * x


LABEL, NULL = torch.tensor([0.5, 0.8]), torch.tensor([0.1, 0.1])


def test_formula_and_channels() -> None:
    for shape, dim in (((2, 8, 3, 3), 1), ((2, 5, 8), 2)):
        c, u = torch.randn(shape), torch.randn(shape)
        torch.testing.assert_close(classifier_free_guidance(c, u, 4.0), u + 4 * (c - u))
        assert torch.equal(classifier_free_guidance(c, u, 0.0), u)
        first_three = classifier_free_guidance(c, u, 4.0, channels=3)
        torch.testing.assert_close(first_three.narrow(dim, 0, 3), (4 * c - 3 * u).narrow(dim, 0, 3))
        assert torch.equal(first_three.narrow(dim, 3, 5), c.narrow(dim, 3, 5))
    with pytest.raises(InputError, match="first 9 of 8"):
        classifier_free_guidance(c, u, 4.0, channels=9)
    with pytest.raises(InputError, match="differ in shape"):
        classifier_free_guidance(c, u[:1], 4.0)


def test_learned_sigma_comes_from_the_conditional_half() -> None:
    x, t = torch.randn(2, 4, 3, 3), torch.zeros(2)

    def model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return label.view(-1, 1, 1, 1) * torch.cat((x, x), 1)

    plain = model(x, t, LABEL)
    output = guided(model, LABEL, NULL, 3.0)(x, t)
    torch.testing.assert_close(output[:, :4], (NULL + 3 * (LABEL - NULL)).view(2, 1, 1, 1) * x)
    assert torch.equal(output[:, 4:], plain[:, 4:])
    quirk = guided(model, LABEL, NULL, 3.0, channels=3)(x, t)
    torch.testing.assert_close(quirk[:, :3], output[:, :3])
    assert torch.equal(quirk[:, 3:], plain[:, 3:])


@pytest.mark.parametrize("interval", [None, (0.0, 1.0)])
def test_scale_1_is_the_plain_model_and_never_sees_the_null_condition(interval: tuple[float, float] | None) -> None:
    recorder, noise = Recorder(), torch.randn(2, 5, 6)

    def forbidden(condition: Any, null: Any) -> Any:
        raise AssertionError("merged the null condition at scale 1")

    model = guided(recorder, LABEL, NULL, 1.0, interval, merge=forbidden)
    result = sample("heun", model, noise, 4)
    assert len(recorder.calls) == 7
    assert all(labels == LABEL.tolist() for _, labels in recorder.calls)
    assert torch.equal(result, sample("heun", lambda x, t: Recorder()(x, t, LABEL), noise, 4))
    model(noise, torch.full((2,), 0.5))
    assert recorder.calls[-1][1] == LABEL.tolist()


def test_pair_is_one_batch_merged_once() -> None:
    recorder, merges = Recorder(), []

    def merge(condition: Tensor, null: Tensor) -> Tensor:
        merges.append(1)
        return torch.cat((condition, null))

    noise = torch.randn(2, 5, 6)
    result = sample("euler", guided(recorder, LABEL, NULL, 2.5, merge=merge), noise, 5)
    assert len(merges) == 1
    assert [labels for _, labels in recorder.calls] == [LABEL.tolist() + NULL.tolist()] * 5
    label = NULL + 2.5 * (LABEL - NULL)
    torch.testing.assert_close(result, sample("euler", lambda x, t: label.view(2, 1, 1) * x, noise, 5))


def test_interval_on_flow_and_on_training_steps() -> None:
    recorder = Recorder()
    sample("euler", guided(recorder, LABEL, NULL, 2.0, (0.25, 0.75)), torch.randn(2, 5, 6), 8)
    assert {t: len(labels) for t, labels in recorder.calls} == {
        1.0: 2, 0.875: 2, 0.75: 4, 0.625: 4, 0.5: 4, 0.375: 4, 0.25: 4, 0.125: 2
    }  # fmt: skip
    recorder = Recorder()
    diffusion = GaussianDiffusion(learn_sigma=False)
    sample("ddim", guided(recorder, LABEL, NULL, 2.0, (100, 300)), torch.randn(2, 5, 6), "ddim10", diffusion)
    assert [t for t, labels in recorder.calls if len(labels) == 4] == [300.0, 200.0, 100.0]
    with pytest.raises(InputError, match="low <= high"):
        guided(recorder, LABEL, NULL, 2.0, (0.9, 0.1))


def test_interval_decided_by_each_samples_own_time() -> None:
    recorder, x = Recorder(), torch.randn(2, 5, 6)
    model = guided(recorder, LABEL, NULL, 2.0, (0.4, 0.6))
    mixed = model(x, torch.tensor([0.5, 0.9]))
    torch.testing.assert_close(mixed[0], (2 * 0.5 - 0.1) * x[0])
    torch.testing.assert_close(mixed[1], 0.8 * x[1])
    model(x, torch.tensor([0.1, 0.9]))
    assert len(recorder.calls[-1][1]) == 2  # nobody inside: no null branch


def test_merging_of_structured_conditions() -> None:
    features, mask = torch.randn(2, 3, 4), torch.ones(2, 3)
    merged = merge_conditions({"text": (features, mask), "image": None}, {"text": (0 * features, mask), "image": None})
    assert merged["text"][0].shape == (4, 3, 4) and merged["text"][1].shape == (4, 3) and merged["image"] is None
    assert torch.equal(merged["text"][0][:2], features)
    with pytest.raises(InputError, match="pad them"):
        merge_conditions(features, features[:, :1])
    with pytest.raises(InputError, match="NoneType"):
        merge_conditions(features, None)


# -- seeds --------------------------------------------------------------------------------------------------------------


def noise_for_seeds(seeds: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return draw_noise((len(seeds), 5, 6), generators_for_seeds(seeds), "cpu", dtype)


def test_noise_of_a_seed_does_not_depend_on_its_batch() -> None:
    together = noise_for_seeds([3, 1, 4, 1])
    assert together.shape == (4, 5, 6)
    for row, seed in enumerate([3, 1, 4, 1]):
        assert torch.equal(together[row], noise_for_seeds([seed])[0])
    assert torch.equal(together[1], together[3]) and not torch.equal(together[0], together[1])
    assert torch.equal(noise_for_seeds([3], torch.bfloat16), together[:1].bfloat16())
    assert noise_for_seeds([]).shape == (0, 5, 6)
    # A seed means what it means to torch.
    assert torch.equal(together[0], torch.randn(5, 6, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddim", {"eta": 0.5})])
def test_picture_of_a_seed_does_not_depend_on_its_batch(name: str, options: dict[str, float]) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat((0.4 * x, torch.zeros_like(x)), 2)

    def run(seeds: list[int]) -> Tensor:
        noise, others = noise_for_seeds(seeds), generators_for_seeds([1000 + seed for seed in seeds])
        return sample(name, model, noise, 10, GaussianDiffusion(), others, **options)

    together = run([11, 12, 13])
    for row, seed in enumerate([11, 12, 13]):
        assert torch.equal(together[row], run([seed])[0])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_is_finite(scale: float) -> None:
    with pytest.raises(InputError, match="a guidance scale must be finite"):
        guided(lambda x, t, condition: x, None, None, scale)


def test_bad_seeds_and_generators() -> None:
    for seed in (-1, 2**32):
        with pytest.raises(InputError, match=str(seed)):
            generators_for_seeds([seed])
    with pytest.raises(InputError, match="2 generators for a batch of 3"):
        draw_noise((3, 5, 6), generators_for_seeds([1, 2]), "cpu", torch.float32)
    # Why 2**32 is refused: torch's CPU generator would repeat seed 0.
    a, b = (torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 2**32))
    assert torch.equal(a, b)
