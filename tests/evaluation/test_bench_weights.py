"""``bench weights``: somebody's weights as their authors run them, and in the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from textok_fast import InputError, cli
from textok_fast.evaluation.weights import WeightsConfig, run_weights

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(
    ("name", "heads", "calls"),
    [
        ("dit_2d", 4, {"forward"}),
        ("sit_1d", 4, {"forward"}),
        ("titok_vq", 4, {"encode", "decode"}),
        ("tatitok_vae", 4, {"encode", "decode"}),
    ],
)
def test_every_call_in_every_form(name: str, heads: int, calls: set[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    stored = load_file(GOLDEN / f"{name}.safetensors")
    weights = {key[8:]: value for key, value in stored.items() if key.startswith("weights.")}
    save_file(weights, tmp_path / "foreign.safetensors")
    config = WeightsConfig(
        weights=str(tmp_path / "foreign.safetensors"),
        heads=heads,
        precisions=("fp32", "bf16", "int8"),
        batch=(1, 2),
        rounds=2,
        text_tokens=7,
        device="cpu",
    )
    result = run_weights(config, command="test", progress=False)
    found = {(row.call, row.form, row.precision, row.batch) for row in result.rows}
    assert found == {
        (call, form, precision, batch)
        for call in calls
        for batch in (1, 2)
        for form, precision in (
            ("authors'", "fp32"),
            ("engine", "fp32"),
            ("authors'", "bf16"),
            ("engine", "bf16"),
            ("engine", "int8"),
        )
    }
    for row in result.rows:
        limit = {"fp32": 1e-4, "bf16": 0.1, "int8": 0.2}[row.precision]
        quantized = name == "titok_vq" and row.call == "encode"  # rounding may choose another code
        assert row.error < (2 if quantized and row.precision != "fp32" else limit)
        assert row.ratio is not None and (row.form != "engine" or row.ratio == 1) and row.wall.median > 0
    assert len(json.loads(json.dumps(result.to_dict()))["rows"]) == len(result.rows)
    assert all(f"| {call} | 2 | int8 | engine |" in result.to_markdown() for call in calls)


def test_bad_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="give the weights"):
        WeightsConfig()
    with pytest.raises(InputError, match="unknown precision 'fp4'"):
        WeightsConfig("x", precisions=("fp4",))
    assert cli.main(["bench", "weights", f"weights={tmp_path / 'no.pt'}"]) == 2
    assert "no weights at" in capsys.readouterr().err
