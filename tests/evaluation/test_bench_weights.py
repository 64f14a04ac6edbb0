"""``bench weights``: somebody's weights as their authors run them, and in the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from soft_weights import HEADS, soft_weights

from textok_fast import InputError, cli
from textok_fast.evaluation import weights
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


def test_what_is_diffusers_is_timed_against_diffusers_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(**sizes, **blocks).save_pretrained(tmp_path / "vae")
    dit = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    dit |= {"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5}
    diffusers.DiTTransformer2DModel(**dit, norm_eps=1e-6).save_pretrained(tmp_path / "dit")
    called: list[str] = []
    vae, transformer = diffusers.AutoencoderKL, diffusers.DiTTransformer2DModel
    for cls, call in ((vae, "encode"), (vae, "decode"), (transformer, "forward")):
        inside = getattr(cls, call)
        monkeypatch.setattr(cls, call, lambda *a, call=call, inside=inside, **k: (called.append(call), inside(*a, **k))[1])

    common: dict[str, Any] = {"precisions": ("fp32", "bf16", "int8"), "rounds": 2, "device": "cpu"}

    result = run_weights(WeightsConfig(str(tmp_path / "vae"), image_size=16, **common), command="test", progress=False)
    assert result.what.startswith("Autoencoder of 16 px and latents of 4 x 8 x 8")
    assert result.skipped == ["engine, int8, batch 1: an autoencoder has no form in int8: its engine would run in fp32"]
    assert "- diffusers: diffusers' own AutoencoderKL, eager PyTorch" in result.to_markdown()
    assert {(row.call, row.form, row.precision) for row in result.rows} == {
        (call, form, precision)
        for call in ("encode", "decode") for form in ("diffusers", "engine") for precision in ("fp32", "bf16")
    }  # fmt: skip
    assert all(row.error < (1e-4 if row.precision == "fp32" else 0.1) for row in result.rows)
    # For each call and precision its warm-up and two rounds, and once for what errors are measured against; the engine's own
    # encode and decode are not diffusers'.
    assert sorted(called) == ["decode"] * 7 + ["encode"] * 7
    called.clear()

    result = run_weights(WeightsConfig(str(tmp_path / "dit"), **common), command="test", progress=False)
    assert [(row.form, row.precision) for row in result.rows] == [
        ("diffusers", "fp32"), ("engine", "fp32"), ("diffusers", "bf16"), ("engine", "bf16"), ("engine", "int8"),
    ]  # fmt: skip
    assert result.forms["diffusers"] == "diffusers' own DiTTransformer2DModel, eager PyTorch" and called == ["forward"] * 7
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    result = run_weights(WeightsConfig(str(tmp_path / "dit"), **common), command="test", progress=False)
    assert set(result.forms) == {"authors'", "engine"} and result.rows[0].form == "authors'" and len(called) == 7


def test_bad_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="give the weights"):
        WeightsConfig()
    with pytest.raises(InputError, match="unknown precision 'fp4'"):
        WeightsConfig("x", precisions=("fp4",))
    assert cli.main(["bench", "weights", f"weights={tmp_path / 'no.pt'}"]) == 2
    assert "no weights at" in capsys.readouterr().err
    (tmp_path / "pipe" / "generator").mkdir(parents=True)
    (tmp_path / "pipe" / "pipeline.json").write_text("{}")
    assert cli.main(["bench", "weights", f"weights={tmp_path / 'pipe'}"]) == 2
    assert f"name one of its parts, such as {tmp_path / 'pipe'}/generator" in capsys.readouterr().err


def test_what_weights_do_not_tell_is_a_setting(tmp_path: Path) -> None:
    save_file(soft_weights(soft=True), tmp_path / "soft.safetensors")
    common: dict[str, Any] = {"heads": HEADS, "rounds": 1, "precisions": ("fp32",), "device": "cpu"}
    told = {"temperature": 0.5, "axial_theta": 100.0}
    result = run_weights(WeightsConfig(str(tmp_path / "soft.safetensors"), **common, **told), command="test", progress=False)
    assert {(row.call, row.form) for row in result.rows} == {
        (call, form) for call in ("encode", "decode") for form in ("authors'", "engine")
    }
    with pytest.raises(InputError, match="temperature must be a number above 0, got 0"):
        run_weights(WeightsConfig(str(tmp_path / "soft.safetensors"), **common, temperature=0), progress=False)
