"""The parity report measures what it says: errors put in by hand come out."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from textok_fast import DiT, DiTConfig, TexTok
from textok_fast.errors import InputError
from textok_fast.evaluation import parity
from textok_fast.evaluation.parity import ParityConfig, ParityResult, psnr_db, relative_error, run_parity


def _config(**fields: Any) -> ParityConfig:
    given = {"size": "tiny", "tokens": 8, "batch": 1, "steps": 3, "threads": 1, "device": "cpu", "step_caches": (2,)}
    return ParityConfig(**(given | fields))


@pytest.fixture(scope="module")
def result() -> ParityResult:
    return run_parity(_config(precisions=("fp32", "bf16", "int8", "fp8")), command="textok-fast bench parity", progress=False)


def test_every_precision_is_measured_against_float64(result: ParityResult) -> None:
    engine = {row.precision: row for row in result.forwards if row.how.startswith("engine")}
    assert list(engine) == ["fp32", "bf16", "int8", "fp8"] and result.skipped == []
    assert engine["fp32"].worst < 1e-5 < engine["bf16"].worst < engine["fp8"].worst < 0.2
    for row in result.forwards:
        assert 0 < row.mean <= row.worst
        assert row.met == (None if row.target is None else row.worst <= row.target)
    assert (engine["bf16"].target, engine["fp8"].target, engine["int8"].target) == (1e-2, 4e-2, None)
    assert [row.precision for row in result.forwards if row.how.startswith("PyTorch")] == ["fp32", "bf16"]


def test_bf16_meets_its_target_where_all_blocks_count() -> None:
    config, cpu = ParityConfig(size="S", precisions=("bf16",), threads=1), torch.device("cpu")
    (engine, eager), skipped = parity._forwards(config, parity._random(config, cpu), cpu, lambda text: None)
    assert not skipped and engine.met and engine.worst <= parity.FORWARD_TARGETS["bf16"]
    assert engine.mean < 0.8 * eager.mean  # PyTorch's, whose residual stream is bfloat16


def test_samples_are_compared_with_float32(result: ParityResult) -> None:
    samples = {row.precision: row for row in result.samples}
    assert samples["fp32"].tokens > 90 and samples["bf16"].tokens > 30 and samples["bf16"].met
    assert samples["bf16"].target == 30.0 and samples["fp32"].target is None
    assert samples["fp32"].tokens > samples["bf16"].tokens > samples["fp8"].tokens
    assert all(row.pictures is not None and row.pictures > 10 for row in result.samples)
    assert [row.name for row in result.options] == ["guidance in [0.1, 0.7] only", "step cache, interval 2"]
    assert all(row.relative > 1e-4 for row in result.options)  # they do change the sample


def test_report(result: ParityResult) -> None:
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["config"]["precisions"] == ["fp32", "bf16", "int8", "fp8"]
    text = result.to_markdown()
    assert "at most 1e-02" in text and "above 30 dB" in text and f"{result.token_peak:.4g}" in text
    assert "textok-fast bench parity" in text


def test_a_trained_generator_of_captions(make_tokenizer: Callable[..., TexTok], loads_fake_text: Any, tmp_path: Path) -> None:
    sizes = {"num_tokens": 3, "in_channels": 4, "width": 32, "depth": 2, "heads": 2, "num_classes": 0, "text_dim": 8}
    model = DiT(DiTConfig(**sizes, learn_sigma=False, time_scale=1000.0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "generator")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    about = {"objective": "flow", "prediction": "velocity", "label_names": [], "captions": {}}
    (tmp_path / "pipeline.json").write_text(json.dumps(about))
    found = run_parity(_config(model=str(tmp_path), batch=2, precisions=("fp32",)), progress=False)
    assert found.skipped == [] and found.samples[0].tokens > 80
    assert all(row.relative > 1e-4 for row in found.options)  # guidance and its interval count


def test_an_error_in_the_engine_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parity.Engine

    def broken(model: Any, plan: Any) -> Any:
        wrong = copy.deepcopy(model)
        wrong.final_layer.linear.weight.mul_(1.25)
        wrong.final_layer.linear.bias.mul_(1.25)
        return whole(wrong, plan)

    monkeypatch.setattr(parity, "Engine", broken)
    found = run_parity(_config(precisions=("fp32",), step_caches=(), guidance_scale=1.0, weights="normal"), progress=False)
    engine, eager = found.forwards
    assert engine.worst == pytest.approx(0.25, rel=1e-3) and eager.worst < 1e-5
    assert found.samples[0].relative > 1e-2
    assert found.options == []  # neither guidance nor a cache to leave out


def test_what_a_machine_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parity.Engine

    def without_int8(model: Any, plan: Any) -> Any:
        if plan.precision == "int8":
            raise InputError("no integers here")
        return whole(model, plan)

    monkeypatch.setattr(parity, "Engine", without_int8)
    found = run_parity(_config(precisions=("int8",), step_caches=(), guidance_scale=1.0), progress=False)
    assert found.forwards == [] and found.samples == []
    assert found.skipped == ["forward in int8: no integers here", "sample, engine in int8: no integers here"]
    assert "no integers here" in found.to_markdown()


def test_measures() -> None:
    wanted = torch.tensor([3.0, 4.0])
    assert relative_error(wanted + torch.tensor([0.0, 0.5]), wanted) == pytest.approx(0.1)
    assert psnr_db(torch.tensor([0.0, 0.2]), torch.zeros(2), 2.0) == pytest.approx(10 * math.log10(4 / 0.02))
    assert math.isinf(psnr_db(wanted, wanted, 2.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "XS"}, "unknown size"),
        ({"weights": "odd"}, "weights must be"),
        ({"precisions": ("fp64",)}, "unknown precision"),
        ({"precisions": ()}, "precisions must name"),
        ({"steps": 0}, "steps must be"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval"),
        ({"step_caches": (1,)}, "interval"),
    ],
)
def test_wrong_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _config(**fields)
