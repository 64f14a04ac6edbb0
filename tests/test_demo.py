"""The demo at its smallest: every part runs, the report has them all, and a second call reuses what is finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from textok_fast.cli import main


@pytest.mark.slow
def test_quick_demo_ends_with_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("accelerate", "onnx", "onnxscript", "onnxruntime", "torchmetrics"):
        pytest.importorskip(module)
    out = tmp_path / "demo"
    assert main(["demo", "--quick", "--source", "shapes", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert str((out / "report.html").resolve()) in printed

    results = json.loads((out / "results.json").read_text())
    for split in ("compositions", "objects"):
        assert set(results["metrics"][split]) == {"with_text", "no_text", "shuffled", "null"}
        assert all(0 < row["psnr"] < 60 and -1 <= row["ssim"] <= 1 for row in results["metrics"][split].values())
    # The two tokenizers saw the same batches: the first logged loss of each is on the same pictures at the same step.
    assert [line[0] for line in results["losses"]["with text"]] == [line[0] for line in results["losses"]["no text"]]
    assert results["onnx"][0]["passed"] and (out / "decoder.onnx").stat().st_size > 100_000
    assert {row["tokens"] for row in results["speedup"]["rows"]} == {32, 256}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 2 * 4 + 1
    assert "93.5" in page and "--quick" in page

    finished = {path: path.stat().st_mtime_ns for path in out.rglob("final/**/model.safetensors")}
    assert len(finished) == 4  # two tokenizers, the generator, and the tokenizer beside it
    assert main(["demo", "--quick", "--source", "shapes", "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished

    assert main(["demo", "--quick", "--source", "shapes", "--steps", "7", "--out", str(out)]) == 2
    assert "other settings" in capsys.readouterr().err
