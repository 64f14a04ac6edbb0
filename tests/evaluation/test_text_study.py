"""The study of what text is worth: every tokenizer once, numbers from all seeds, and the verdicts either way."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from textok_fast.cli import main
from textok_fast.errors import InputError
from textok_fast.evaluation.text_study import StudyConfig, findings, gains, means, plot, table
from textok_fast.training.checkpoints import list_checkpoints
from textok_fast.training.loop import read_history

TINY = ["data.source=shapes", "data.image_size=16", "data.objects=8", "data.held_out_objects=4", "model.image_size=16",
    "model.patch_size=8", "model.width=32", "model.heads=2", "model.decoder_depth=1", "model.encoder_depth=1",
    "model.latent_dim=4", "run.steps=3", "run.batch_size=8", "optim.warmup_steps=1"]  # fmt: skip
OPTIONS = ["--tokens", "2", "--text", "both", "none", "--seeds", "0", "1", "--pictures", "8"]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study")
    assert main(["evaluate", "study", "--out", str(out), *OPTIONS, *TINY]) == 0
    return out


def test_every_tokenizer_is_trained_and_measured(study):
    result = json.loads((study / "study.json").read_text())
    assert {(run["tokens"], run["text"], run["seed"]) for run in result["runs"]} == {
        (n, text, seed) for n in (2,) for text in ("both", "none") for seed in (0, 1)
    }
    for run in result["runs"]:
        kinds = {"own", "shuffled"} if run["text"] == "both" else {"own"}
        assert set(run["composition"]) == set(run["object"]) == kinds
    row = next(r for r in result["means"] if (r["split"], r["tokens"], r["text"]) == ("object", 2, "shuffled"))
    values = [run["object"]["shuffled"]["psnr"] for run in result["runs"] if (run["tokens"], run["text"]) == (2, "both")]
    assert row["psnr"] == pytest.approx(statistics.fmean(values))
    assert row["psnr_std"] == pytest.approx(statistics.stdev(values))
    assert "held-out objects" in (study / "study.md").read_text().lower()
    assert (study / "study-object.svg").read_text().startswith("<svg")


def test_again_trains_nothing_and_says_the_same(study):
    before = json.loads((study / "study.json").read_text())
    times = {path: path.stat().st_mtime_ns for path in study.glob("*/final/*")}
    assert main(["evaluate", "study", "--out", str(study), *OPTIONS, *TINY]) == 0
    after = json.loads((study / "study.json").read_text())
    assert after["runs"] == before["runs"]
    assert times == {path: path.stat().st_mtime_ns for path in study.glob("*/final/*")}


def test_a_killed_study_takes_its_trainings_along_and_goes_on(tmp_path):
    """SIGKILL in a training: that ends by itself, with a checkpoint, and the same command finishes the study."""
    out = tmp_path / "study"
    options = ["--tokens", "2", "--text", "none", "--seeds", "0", "--pictures", "4", *TINY, "run.steps=100000"]
    options += ["run.checkpoint_every=100000", "run.log_every=1"]
    command = [sys.executable, "-m", "textok_fast", "evaluate", "study", "--out", str(out), *options]
    run = out / "002-none-0"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as study:
        _wait(lambda: read_history(run))
        study.kill()
    _wait(lambda: list_checkpoints(run))
    last = list_checkpoints(run)[-1].name
    with FileLock(run / ".lock", timeout=60):  # nobody trains any more
        pass
    assert int(last.split("-")[1]) < 100000 and not (out / "study.json").exists()


def _wait(found, seconds=300):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_other_settings_are_refused(study, capsys):
    assert main(["evaluate", "study", "--out", str(study), *OPTIONS, *TINY, "run.steps=4"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_what_the_study_varies_is_no_setting():
    with pytest.raises(InputError, match="--tokens"):
        StudyConfig(Path("x"), overrides=["model.num_tokens=3"])
    with pytest.raises(InputError, match="different values"):
        StudyConfig(Path("x"), seeds=[1, 1])


def rows(few_gain: float, many_gain: float, spread: float) -> list[dict]:
    made = []
    for seed in (0, 1, 2):
        shift = spread * (seed - 1)
        for tokens, gain in ((4, few_gain), (32, many_gain)):
            for text, value in (("none", 15.0), ("both", 15.0 + gain + shift)):
                found = {"own": {"psnr": value, "ssim": value / 30}}
                made.append({"tokens": tokens, "text": text, "seed": seed, "composition": found, "object": found})
    return made


@pytest.mark.parametrize(
    ("few", "many", "spread", "word"),
    [(4.0, 1.0, 0.1, ": confirmed"), (1.0, 4.0, 0.1, "the opposite"), (2.0, 1.9, 0.5, "neither")],
)
def test_the_verdict_is_what_was_found(few, many, spread, word):
    made = rows(few, many, spread)
    said = findings({"tokens": [4, 32], "gains": gains(made), "means": means(made)})
    assert len(said) == 2
    assert all(word in each for each in said)
    assert f"{few:+.2f} dB at 4 tokens" in said[0]


def test_error_bars_are_as_long_as_the_deviation():
    made = rows(4.0, 1.0, 0.5)
    result = {"means": means(made), "tokens": [4, 32]}
    assert plot(result, "object").count("h8") == 2 * 2  # two ends on each of text's two points; none where there is no spread
    model = dict.fromkeys(("image_size", "latent_dim", "width", "encoder_depth", "decoder_depth"), 1)
    about = {
        "training": {"run": {"steps": 1, "batch_size": 1}, "model": model},
        "machine": {"cpu": "c", "git_commit": "g"},
        "command": "x",
        "date": "2026-11-27",
        "pictures": 1,
        "seeds": [0, 1, 2],
        "data": {"composition": "", "object": ""},
        "gains": gains(made),
    }
    assert "19.00 ± 0.50" in table({**result, **about})
