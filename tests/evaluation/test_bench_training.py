from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from textok_fast import InputError, config
from textok_fast.cli import main
from textok_fast.evaluation import training
from textok_fast.evaluation.roofline import Ceilings
from textok_fast.evaluation.training import TrainingConfig, TrainingResult, run_training, systems

SMALL = {"tokenizer": "tiny", "generator": "tiny", "tokenizer_batch": 2, "generator_batch": 3, "image_size": 16, "tokens": 4}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a second; the ceiling is not measured."""
    monkeypatch.setitem(config.TOKENIZER_SIZES, "tiny", {"width": 32, "depth": 1, "heads": 2, "grid": 2})
    monkeypatch.setitem(config.GENERATOR_SIZES, "tiny", {"width": 32, "depth": 2, "heads": 2})
    rates = iter([1e9, 2e9] * 9)
    monkeypatch.setattr(
        training, "measure_ceilings", lambda device, dtype: Ceilings(str(device), dtype, 1, next(rates), (1, 1, 1), 1.0, 1.0)
    )
    return {**SMALL, "rounds": 2, "text_length": 5}


def test_every_form_of_every_network_is_timed_beside_the_plain_one(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled, order = [], []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    time_call = training.time_call
    monkeypatch.setattr(training, "time_call", lambda step, device: order.append(step) or time_call(step, device))
    settings = [f"{name}={value}" for name, value in small.items()]
    forms = ["plain", "fused", "compile", "recompute"]
    arguments = ["bench", "training", "--out", str(tmp_path), *settings, f"forms={json.dumps(forms)}"]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "training.json").read_text())
    rows = result["rows"]
    assert [(row["precision"], row["system"], row["form"]) for row in rows] == [
        (dtype, system, form) for dtype in ("fp32", "bf16") for system in training.SYSTEMS for form in forms
    ]
    assert len(compiled) == 2 * (2 + 2 + 2)  # a tokenizer's encoder and decoder have a block each
    steps = order[:16]  # of each form two to warm up, then both rounds in turn
    assert steps[8:12] == steps[12:] == steps[0:8:2]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["wall"]["median"])
        assert row["utilisation"] == pytest.approx(row["flops"] / row["wall"]["median"] / 2e9)  # the better ceiling
        assert (row["ratio"] is None) == (row["form"] == "plain")
    text = (tmp_path / "training.md").read_text()
    assert text in capsys.readouterr().out
    names = ("TexTok-tiny, 4 tokens, 16 px", "TexTok-tiny, 4 tokens, 16 px, LPIPS and discriminator", "DiT-tiny over 4 tokens")
    assert all(text.count(f"| {name} |") == 8 for name in names)


def test_flops_of_a_step_are_three_times_those_of_the_products(small: dict[str, Any]) -> None:
    """Forward, and in the backward pass as much for the inputs and for the weights; attention has no weights but two inputs."""
    width, n, batch = 32, 4, 3
    per_token = 2 * (4 + 8) * width**2  # a block's products
    attention = 2 * 2 * n * n * width
    once = 2 * (6 * width**2) * 2 + 2 * (2 * width**2) + 2 * width * (256 + width)  # a picture's: adaLN, the time's
    ends = 2 * (8 * width + width * 16)  # a token's: 8 channels in, 16 out
    forward = batch * (2 * (n * per_token + attention) + once + n * ends)
    found = systems(TrainingConfig(**small))["generator"].flops()
    inputs_without_gradient = batch * (n * 2 * 8 * width + 2 * width * 256)  # of the first products
    assert found == 3 * forward - inputs_without_gradient


def test_a_step_trains(small: dict[str, Any]) -> None:
    settings = TrainingConfig(**{**small, "systems": ("generator",), "precisions": ("fp32",), "forms": ("fused",)})
    kept: list[TrainingResult] = []
    result = run_training(settings, progress=False, on_result=kept.append)
    assert kept == [result] and result.rows[0].ratio is None
    system, cpu = systems(settings)["generator"], torch.device("cpu")
    model, inputs = system.build(), system.inputs(cpu)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = training._step(system, model, "fused", "fp32", inputs, cpu)
    first = float(system.loss(model, inputs).detach())
    for _ in range(20):
        step()
    assert float(system.loss(model, inputs).detach()) < first
    assert not torch.equal(model.state_dict()["final_layer.linear.weight"], before["final_layer.linear.weight"])


def test_a_judged_step_trains_the_discriminator_too(small: dict[str, Any]) -> None:
    settings = TrainingConfig(**{**small, "precisions": ("fp32",), "forms": ("fused",)})
    found, cpu = systems(settings), torch.device("cpu")
    system = found["adversarial"]
    assert system.flops() > 2 * found["tokenizer"].flops()
    judges: list[training.Judge] = []
    build = training.Judge
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "Judge", lambda *arguments: judges.append(build(*arguments)) or judges[0])
        model = system.build()
        step = training._step(system, model, "fused", "fp32", system.inputs(cpu), cpu)
    networks = {"tokenizer": model, "discriminator": judges[0].critic.model.net}
    before = {name: [value.clone() for value in network.parameters()] for name, network in networks.items()}
    step()
    still = {
        name: [key for old, (key, new) in zip(before[name], network.named_parameters(), strict=True) if torch.equal(old, new)]
        for name, network in networks.items()
    }
    assert still["tokenizer"] == ["encoder.text.null", "decoder.text.null"]  # what stands for a caption that is not there
    last_bias = list(dict(networks["discriminator"].named_parameters()))[-1]
    assert still["discriminator"] in ([], [last_bias])  # where hinge is slanted for both, it is pulled both ways
    assert float(judges[0].critic.model.averages.left) < 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"forms": ("fast",)}, "forms must be of plain, fused, compile, recompute; got 'fast'"),
        ({"systems": ()}, "got none"),
        ({"generator": "XXL"}, "'XXL'"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"precisions": ("fp8",), "device": "cpu"}, "fp8 needs a GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingConfig(**given)
