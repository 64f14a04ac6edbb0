"""The profile command's trace and table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from textok_fast.errors import InputError
from textok_fast.evaluation.profile import ProfileConfig, run_profile
from textok_fast.ops.library import has_native


def _config(tmp_path: Path, **fields: Any) -> ProfileConfig:
    small = {"size": "tiny", "tokens": 8, "tokenizer_size": "tiny", "image_size": 32, "threads": 1, "device": "cpu"}
    return ProfileConfig(**(small | {"steps": 2, "warmup": 1, "top": 3, "out": str(tmp_path / "new" / "profile")} | fields))


def test_a_step_is_traced_and_tabulated(tmp_path: Path) -> None:
    result = run_profile(_config(tmp_path, form="reference"), command="textok-fast bench profile")
    trace = json.loads(Path(result.trace).read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::addmm", "aten::native_layer_norm"} <= names
    rows = {row.name: row for row in result.rows}
    # DiT-tiny has 6 blocks of qkv, proj, fc1, fc2 and adaLN, two products for the time, one in and two out.
    assert rows["aten::addmm"].calls == 6 * 5 + 2 + 1 + 2
    assert rows["aten::native_layer_norm"].calls == 6 * 2 + 1
    assert sum(row.share for row in result.rows) == pytest.approx(1)
    assert [row.milliseconds for row in result.rows] == sorted((row.milliseconds for row in result.rows), reverse=True)
    assert result.recorded_seconds == pytest.approx(sum(row.milliseconds for row in result.rows) / 1e3)
    table = Path(result.table).read_text()
    assert table == result.to_markdown() and f"{len(result.rows) - 3} others" in table and "bench profile" in table
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("part", "form", "precision"),
    [("step", "engine", "bf16"), ("encode", "engine", "fp32"), ("decode", "engine", "int8"), ("encode", "reference", "bf16")],
)
def test_parts_and_forms(tmp_path: Path, part: str, form: str, precision: str) -> None:
    result = run_profile(_config(tmp_path, part=part, form=form, precision=precision))
    assert result.rows and result.seconds > 0
    ours = [row.name for row in result.rows if row.name.startswith("textok_fast")]
    assert bool(ours) == (form == "engine") or part == "decode"
    assert f"{form}, {precision}" in result.to_markdown()
    if part == "step" and has_native("packed_block"):
        assert not any("packed_block" in name for name in ours)  # what it is made of instead
        assert any("packed_linear" in name for name in ours) and any("attention" in row.name for row in result.rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"part": "train"}, "part must be"),
        ({"form": "fast"}, "form must be"),
        ({"steps": 0}, "steps must be"),
        ({"form": "compile", "precision": "int8"}, "int8 is of the engine"),
        ({"form": "engine", "precision": "fp16"}, "no fp16"),
    ],
)
def test_wrong_configurations(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _config(tmp_path, **fields)
