"""Step times over token counts: what is counted, recorded and written. No test looks at a speed."""

from __future__ import annotations

import json
import math
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from textok_fast.config import DiTConfig
from textok_fast.errors import InputError
from textok_fast.evaluation import (
    StepTimesConfig,
    StepTimesResult,
    console_table,
    load,
    markdown_table,
    roofline,
    run_step_times,
    save,
    step_flops,
    step_times,
    step_times_svg,
)
from textok_fast.evaluation.step_times import Spread, network_config


@pytest.fixture(scope="module")
def result() -> StepTimesResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "CPU_SHAPES", ((32, 32, 32),))
        patch.setattr(roofline, "CPU_COPY_BYTES", 2**20)
        config = StepTimesConfig(size="tiny", tokens=(16, 4), rounds=4, threads=1, device="cpu", seed=3)
        return run_step_times(config, command="textok-fast bench steps", progress=False)


@pytest.mark.parametrize(("tokens", "gflop"), [(32, 29.1), (64, 58.1), (128, 116.7), (256, 237.2), (1024, 1049), (4096, 5817)])
def test_flops_of_dit_xl_are_the_published_counts(tokens: int, gflop: float) -> None:
    assert step_flops("XL", tokens) / 1e9 == pytest.approx(gflop, rel=0.01)


def test_flops_by_arithmetic() -> None:
    n, batch, config = 16, 3, DiTConfig.named("tiny", num_tokens=16, in_channels=8)
    d, depth = config.width, config.depth
    block = 2 * n * (3 * d * d + d * d + 2 * 4 * d * d) + 2 * (2 * n * n * d) + 2 * d * 6 * d  # products, attention, adaLN
    ends = 2 * n * 8 * d + 2 * n * d * 16 + 2 * d * 2 * d  # embedding in, projection out, its adaLN
    embedder = 2 * 256 * d + 2 * d * d
    assert step_flops("tiny", n, batch) == batch * (depth * block + ends + embedder)


@pytest.mark.parametrize(
    ("tokens", "name", "sequence", "grid"),
    [
        (32, "TexTok-32 + DiT-XL", 32, 0),
        (256, "TexTok-256 + DiT-XL", 256, 0),
        (1024, "DiT-XL/2 at 512 px", 1024, 64),
        (4096, "DiT-XL/1 at 512 px", 4096, 64),
        (100, "DiT-XL over 100 1-D tokens", 100, 0),
    ],
)
def test_the_network_of_a_token_count(tokens: int, name: str, sequence: int, grid: int) -> None:
    found, config = network_config("XL", tokens)
    assert (found, config.sequence_length, config.input_size) == (name, sequence, grid)
    assert config.in_channels == (4 if grid else 8)


def test_every_row_is_complete_and_consistent(result: StepTimesResult) -> None:
    assert [(row.tokens, row.dtype) for row in result.rows] == [(4, "fp32"), (16, "fp32"), (4, "bf16"), (16, "bf16")]
    ceilings = {entry.dtype: entry for entry in result.ceilings}
    for row in result.rows:
        assert row.rounds == len(row.round_wall) == len(row.round_processor) == 4
        assert row.steps >= row.rounds
        for spread in (row.wall, row.processor):
            assert spread.min <= spread.p25 <= spread.median <= spread.p75 <= spread.max
        assert row.flops == step_flops("tiny", row.tokens)
        assert row.flops_per_s == pytest.approx(row.flops / row.wall.median)
        assert row.peak_share == pytest.approx(row.flops_per_s / ceilings[row.dtype].matmul_flops)
        assert row.read_share == pytest.approx(row.weight_bytes_per_s / ceilings[row.dtype].read_bytes)
        table = 1001 * 256  # the label embedding: a step reads one row of it
        assert row.weight_bytes == (row.parameters - table) * (4 if row.dtype == "fp32" else 2)
    assert result.threads == result.machine["threads"] == 1


def test_ratios_follow_from_the_rows(result: StepTimesResult) -> None:
    assert [(r.dtype, r.base_tokens, r.tokens) for r in result.ratios] == [("fp32", 4, 16), ("bf16", 4, 16)]
    for ratio in result.ratios:
        slow, fast = result.row(16, ratio.dtype, 1), result.row(4, ratio.dtype, 1)
        assert ratio.wall == pytest.approx(slow.wall.median / fast.wall.median)
        paired = [a / b for a, b in zip(slow.round_wall, fast.round_wall, strict=True)]
        assert ratio.wall_by_round.median == pytest.approx(statistics.median(paired))
        assert (ratio.wall_by_round.min, ratio.wall_by_round.max) == pytest.approx((min(paired), max(paired)))
        assert ratio.flops == pytest.approx(slow.flops / fast.flops)
        assert math.isfinite(ratio.processor)


def test_the_result_survives_its_file(result: StepTimesResult, tmp_path: Path) -> None:
    written = save(result, tmp_path / "deep" / "run.json")
    assert [path.name for path in written] == ["run.json", "run.md", "run.svg"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["run.json", "run.md", "run.svg"]
    assert load(written[0]) == result
    values = json.loads(written[0].read_text())
    assert values["command"] == "textok-fast bench steps"
    assert values["config"]["tokens"] == [4, 16]
    ElementTree.fromstring(written[2].read_text())
    (tmp_path / "other.json").write_text('{"rows": []}')
    for path in (tmp_path / "missing.json", tmp_path / "other.json"):
        with pytest.raises(InputError):
            load(path)


def test_tables_and_plot_name_every_network(result: StepTimesResult) -> None:
    for text in (console_table(result), markdown_table(result)):
        for row in result.rows:
            assert row.network in text
        assert "93.5x" in text
    head, rule, *lines = console_table(result).splitlines()
    assert {len(line) for line in (head, rule, *lines[:4])} == {len(head)}
    svg = ElementTree.fromstring(step_times_svg(result, standalone=True))
    texts = [element.text or "" for element in svg.iter() if element.tag.endswith("text")]
    assert any("published 93.5x" in text for text in texts)
    assert {"4", "16", "transformer tokens N"} <= set(texts)


def test_networks_share_their_blocks_and_no_weight_is_zero() -> None:
    config = StepTimesConfig(size="tiny", tokens=(4, 16))
    networks = step_times.build_networks(config, torch.device("cpu"), torch.float32)
    small, large = networks[4].model, networks[16].model
    first, second = small.get_parameter("blocks.0.mlp.fc1.weight"), large.get_parameter("blocks.0.mlp.fc1.weight")
    assert first.data_ptr() == second.data_ptr()
    for parameter in large.parameters():
        assert (parameter != 0).float().mean() > 0.99
    x, t, y = step_times.step_inputs(networks[16].config, 2, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        out = large(x, t, y)
    assert out.shape == (2, 16, 16)
    assert out.std() > 0
    assert torch.isfinite(out).all()


def test_guidance_doubles_the_batch_and_rounds_adapt_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "CPU_SHAPES", ((32, 32, 32),))
    monkeypatch.setattr(roofline, "CPU_COPY_BYTES", 2**20)
    config = StepTimesConfig(
        size="tiny",
        tokens=(4,),
        batch=(2,),
        dtypes=("fp32",),
        guidance=True,
        threads=1,
        device="cpu",
        rounds=50,
        time_budget_s=1e-6,
    )
    row = run_step_times(config, progress=False).rows[0]
    assert (row.batch, row.model_batch, row.rounds) == (2, 4, config.min_rounds)  # nothing of the budget left: the least
    assert row.flops == step_flops("tiny", 4, 4)


def test_spread() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(1.0, 2.0, 3.0, 4.0, 5.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"size": "XXL"}, "XXL"),
        ({"tokens": ()}, "tokens"),
        ({"tokens": (0, 4)}, "tokens"),
        ({"batch": (0,)}, "batch"),
        ({"dtypes": ("int8",)}, "int8"),
        ({"dtypes": ()}, "dtypes"),
        ({"rounds": 2}, "min_rounds"),
        ({"threads": 0}, "threads"),
        ({"time_budget_s": 0.0}, "time_budget_s"),
    ],
)
def test_a_wrong_configuration_is_named(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        StepTimesConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = run_step_times(StepTimesConfig(size="tiny", tokens=(4, 16), device="cuda"), progress=False)
    assert found.device.startswith("cuda")
    assert all(row.wall.min > 0 for row in found.rows)


def test_ctrl_c_leaves_the_rounds_that_were_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "CPU_SHAPES", ((32, 32, 32),))
    monkeypatch.setattr(roofline, "CPU_COPY_BYTES", 2**20)
    config = StepTimesConfig(size="tiny", tokens=(4, 8), batch=(1, 2), dtypes=("fp32",), rounds=3, threads=1, device="cpu")
    seen: list[StepTimesResult] = []
    complete = run_step_times(config, progress=False, on_result=lambda result: seen.append(result))
    assert [[(row.batch, row.tokens) for row in result.rows] for result in seen] == [
        [(1, 4), (1, 8)],
        [(1, 4), (1, 8), (2, 4), (2, 8)],
        [(1, 4), (1, 8), (2, 4), (2, 8)],
    ]
    assert seen[-1] == complete

    time_call, finished = step_times.time_call, 0

    def interrupted(call: Any, device: torch.device) -> tuple[float, float]:
        if finished == 2:  # in the second batch's second round
            raise KeyboardInterrupt
        return time_call(call, device)

    def say(line: str) -> None:
        nonlocal finished
        finished += line.startswith("fp32 batch 2: round ")
        finished += line.startswith("fp32 batch 1: round 3")

    monkeypatch.setattr(step_times, "time_call", interrupted)
    monkeypatch.setattr(step_times, "reporter", lambda progress: say)
    path = tmp_path / "run.json"
    with pytest.raises(KeyboardInterrupt):
        run_step_times(config, progress=False, on_result=lambda result: save(result, path))
    kept = load(path)
    assert [(row.batch, row.tokens, row.rounds) for row in kept.rows] == [(1, 4, 3), (1, 8, 3), (2, 4, 1), (2, 8, 1)]
    assert len(kept.ratios) == 2
