"""The demo at its smallest: every part runs, the report has them all, and a second call reuses what is finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from textok_fast import demo as demo_module
from textok_fast.cli import main
from textok_fast.config import TokenizerTrainConfig, load_config
from textok_fast.demo import QUICK, _Demo
from textok_fast.errors import InputError

# In a trainer's place: writes what it was called with, then how many interrupts it got within half a second of the first.
TRAINER = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
count = 0
def interrupted(*_):
    global count
    count += 1
signal.signal(signal.SIGINT, interrupted)
out = Path(os.environ["TRAINER_OUT"]) / str(os.getpid())
out.with_suffix(".started").write_text(json.dumps([os.getsid(0), sys.argv[1:]]))
while not count:
    time.sleep(0.02)
until = time.monotonic() + 0.5
while time.monotonic() < until:
    time.sleep(0.02)
out.with_suffix(".ended").write_text(str(count))
"""


@pytest.fixture
def small_demo(tmp_path: Path) -> _Demo:
    out = tmp_path / "a demo #1: [no]"
    out.mkdir()
    return _Demo(out, "shapes", QUICK)


@pytest.mark.skipif(sys.platform == "win32", reason="sessions and signals of POSIX")
def test_an_interrupt_reaches_each_trainer_once(small_demo: _Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tmp_path / "trainer"
    trainer.write_text(TRAINER.format(python=sys.executable))
    trainer.chmod(0o755)
    monkeypatch.setenv("TRAINER_OUT", str(tmp_path))
    monkeypatch.setattr(demo_module.sys, "executable", str(trainer))
    monkeypatch.setattr(demo_module.os, "cpu_count", lambda: 2)

    def watch(running: dict[str, subprocess.Popen[bytes]], *_: Any) -> None:
        while len(list(tmp_path.glob("*.started"))) < 2:
            time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(small_demo, "_watch", watch)
    with pytest.raises(KeyboardInterrupt):
        small_demo._train_tokenizers()
    # The terminal's own interrupt goes to our session, which is not theirs.
    started = [json.loads(path.read_text()) for path in tmp_path.glob("*.started")]
    assert len({session for session, _ in started} | {os.getsid(0)}) == 3
    assert [path.read_text() for path in tmp_path.glob("*.ended")] == ["1", "1"]
    # What the trainers were told arrives as it was meant, whatever the path looks like.
    for _, arguments in started:
        overrides = arguments[arguments.index("--resume") + 1 :]
        config = load_config(TokenizerTrainConfig, "demo", overrides=overrides)
        assert Path(config.run.output_dir).parent == small_demo.out
        assert config.data.source == "shapes"


def test_the_durations_of_an_interrupted_part_add_up(small_demo: _Demo) -> None:
    for name, resumes in (("training", True), ("evaluation", False)):
        small_demo.durations[name] = 100.0
        with pytest.raises(KeyboardInterrupt), small_demo._part(name, resumes):
            raise KeyboardInterrupt
    again = _Demo(small_demo.out, "shapes", QUICK)
    assert 100 < again.durations["training"] < 110
    assert again.durations["evaluation"] < 10
    (small_demo.out / "durations.json").write_text("[]")
    assert _Demo(small_demo.out, "shapes", QUICK).durations == {}


def test_what_stands_in_for_the_pictures_stands_in_for_every_part(small_demo: _Demo) -> None:
    demo = _Demo(small_demo.out, "emoji", QUICK)
    demo._use("shapes")
    assert demo.config.data.source == "shapes"
    assert "data.source=shapes" in demo._job_overrides(demo.out / "x", "both")
    assert not [item for item in demo.overrides if "emoji" in item]


def small_pipeline(make_tokenizer: Any, directory: Path) -> Path:
    from textok_fast import DiT, DiTConfig
    from textok_fast.inference.pipelines import ClassToImagePipeline

    torch.manual_seed(0)
    generator = DiT(DiTConfig(num_tokens=3, in_channels=4, width=16, depth=1, heads=2, num_classes=5)).eval()
    tokenizer = make_tokenizer(encoder_depth=1, decoder_depth=1, text="none")
    return ClassToImagePipeline(generator, tokenizer).save_pretrained(directory)


def test_the_report_has_a_row_for_each_runtime(small_demo: _Demo, make_tokenizer: Any, tmp_path: Path) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    from textok_fast.evaluation import DemoResults, render_report

    results = DemoResults(command="", date="", machine={})
    small_demo._export(results, small_pipeline(make_tokenizer, tmp_path / "pipeline"))
    rows = {row["runtime"]: row for row in results.onnx}
    exact, rough = rows["ONNX Runtime, fp32"], rows["ONNX Runtime, int8"]
    assert exact["passed"] and exact["relative_error_of_samples"] < 1e-4 < rough["relative_error"] and rough["passed"]
    for row in (exact, rough):  # whose pipeline runs from where the report says
        assert (Path(row["directory"]) / "sampler.onnx").is_file()
    engine = next(row for row in results.onnx if row["runtime"].startswith("TensorRT-RTX"))
    assert engine["reason"] or engine["passed"]
    page = render_report(results)
    assert all(text in page for text in ("ONNX Runtime, int8", "TensorRT-RTX", "AOTInductor", "--to aoti"))


def test_an_export_that_differs_costs_no_report(
    small_demo: _Demo, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import textok_fast.export

    def export(*_: object, **__: object) -> None:
        raise InputError("nothing was written: decoder's pixels differ")

    monkeypatch.setattr(textok_fast.export, "export", export)
    from textok_fast.evaluation import DemoResults, render_report

    results = DemoResults(command="", date="", machine={})
    small_demo._export(results, small_pipeline(make_tokenizer, tmp_path / "pipeline"))
    assert results.onnx[0]["passed"] is False
    assert "pixels differ" in render_report(results)


def test_what_is_lacking_is_said_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_module.importlib.util, "find_spec", lambda name: None if name == "torchmetrics" else object())
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert capsys.readouterr().err == "error: the demo needs torchmetrics: pip install 'textok-fast[train,eval,export]'\n"
    assert not (tmp_path / "demo").exists()


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
    assert [row["passed"] for row in results["onnx"][:2]] == [True, True]
    assert (out / "export" / "onnx-fp32" / "decoder.onnx").stat().st_size > 100_000
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
