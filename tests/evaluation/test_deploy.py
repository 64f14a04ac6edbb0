"""``bench deploy`` times every artifact of every directory beside PyTorch and the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from textok_fast import DiT, DiTConfig, InputError, TexTok
from textok_fast.cli import main
from textok_fast.evaluation.deploy import DeployConfig, run_deploy

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from textok_fast.export import Manifest, Source, export


def test_every_artifact_is_timed_in_turn(make_tokenizer: Callable[..., TexTok], tmp_path: Path, capsys: Any) -> None:
    tokenizer = make_tokenizer(text="none", encoder_depth=1, decoder_depth=1)
    tokenizer.save_pretrained(tmp_path / "model")
    for precision in ("fp32", "int8"):
        export(Source(tokenizer), tmp_path / precision, what="all", precision=precision, pictures=2)
    out = tmp_path / "deploy.json"
    directories = [str(tmp_path / "fp32"), str(tmp_path / "int8")]
    options = ["--model", str(tmp_path / "model"), "--batch", "1", "3", "--rounds", "2", "--device", "cpu", "--out", str(out)]
    assert main(["bench", "deploy", *directories, *options]) == 0
    times = json.loads(out.read_text())["times"]
    assert {(each["task"], each["batch"]) for each in times} == {(t, b) for t in ("encoder", "decoder") for b in (1, 3)}
    names = {each["contestant"] for each in times}
    assert {"PyTorch fp32", "engine fp32", f"onnx fp32 ({directories[0]})", f"onnx int8 ({directories[1]})"} <= names
    assert all(each["median"] >= each["best"] > 0 and each["rounds"] == 2 for each in times)
    assert "| decoder | 3 | PyTorch fp32 |" in capsys.readouterr().out and out.with_suffix(".md").is_file()
    # What cannot be run here is listed with the reason.
    manifest = Manifest.read(tmp_path / "int8")
    manifest.to = "coreml"
    manifest.write(tmp_path / "int8")
    result = run_deploy(DeployConfig((directories[1],), str(tmp_path / "model"), rounds=1, device="cpu"))
    (row,) = [each for each in result.times if each.task == "decoder" and each.contestant.startswith("coreml")]
    assert row.median is None and "is not timed here" in row.reason and row.reason in result.to_markdown()


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no export.json"):
        run_deploy(DeployConfig((str(tmp_path),), "model", device="cpu"))
    with pytest.raises(InputError, match="at least one exported directory"):
        DeployConfig((), "model")
    with pytest.raises(InputError, match="rounds must be at least 1"):
        DeployConfig(("x",), "model", rounds=0)


def test_a_generators_graphs_are_timed(tmp_path: Path) -> None:
    sizes = {"width": 32, "depth": 1, "heads": 2, "num_tokens": 3, "in_channels": 4, "num_classes": 5}
    model = DiT(DiTConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", pictures=1)
    result = run_deploy(DeployConfig((str(tmp_path / "out"),), str(tmp_path / "model"), rounds=1, device="cpu"))
    assert {each.task for each in result.times} == {"modulation", "step", "forward", "sampler"}
    assert all(each.median is not None for each in result.times), result.to_markdown()
