"""The study of what text is worth: every tokenizer once, numbers from all seeds, and the verdicts either way."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from scipy import stats

from textok_fast.cli import main
from textok_fast.config import TokenizerTrainConfig, load_config
from textok_fast.data import collate, load_dataset
from textok_fast.errors import InputError
from textok_fast.evaluation.features import load_networks
from textok_fast.evaluation.fidelity import frechet_distance, gaussian
from textok_fast.evaluation.metrics import psnr
from textok_fast.evaluation.text_study import STUDENT_T, StudyConfig, findings, gains, means, plot, table, text_study
from textok_fast.modeling import TexTok
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
    for name in ("study-object.svg", "study-composition-frechet.svg"):
        assert (study / name).read_text().startswith("<svg")


def test_numbers_are_those_of_evaluate(study):
    """A Fréchet distance over random features and over pixels, as ``evaluate reconstruction`` gives it for the same model."""
    measured = json.loads((study / "002-none-1" / "study.json").read_text())["object"]["own"]
    data = load_config(TokenizerTrainConfig, "study", overrides=TINY).data
    pictures = collate([load_dataset(data, "object")[index] for index in range(8)])["images"]
    tokenizer = TexTok.from_pretrained(study / "002-none-1" / "final", device="cpu")
    made = tokenizer.decode(tokenizer.encode(pictures, None), None, output="uint8")
    for network in load_networks(["random", "pixels"])[0]:
        one, two = (gaussian(network(np.asarray(part))["pool"]) for part in (pictures, made))
        assert measured[f"frechet_distance/{network.label}"] == pytest.approx(frechet_distance(one, two), rel=1e-4)
    assert measured["psnr"] == pytest.approx(psnr(pictures, torch.as_tensor(made)), abs=1e-3)


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


def test_what_cannot_be_measured_is_told_before_anything_is_trained(tmp_path):
    out = tmp_path / "study"
    with pytest.raises(InputError, match="have 2048 pictures; 3000 were to be compared"):
        text_study(StudyConfig(out, pictures=3000, overrides=TINY))
    with pytest.raises(InputError, match="no features inception"):
        text_study(StudyConfig(out, features=["inception"]))
    assert not out.exists()


def rows(few_gain: float, many_gain: float, spread: float) -> list[dict]:
    """Of three seeds: text in both with these gains in PSNR at 4 and 32 tokens, and a distance that falls by as much."""
    made = []
    for seed in (0, 1, 2):
        shift = spread * (seed - 1)
        for tokens, gain in ((4, few_gain), (32, many_gain)):
            gains_of = {"none": 0.0, "both": gain + shift * (tokens == 4), "encoder": gain, "decoder": gain / 2 + shift}
            for text, value in gains_of.items():
                found = {"psnr": 15 + value, "ssim": 0.5, "frechet_distance/random": 9 - value}
                kinds = {"own": found} | ({"shuffled": {**found, "psnr": 14.0}} if text == "both" else {})
                made.append({"tokens": tokens, "text": text, "seed": seed, "composition": kinds, "object": kinds})
    return made


def finding(found: list[dict], question: str, metric: str, tokens: int | None = None) -> dict:
    keys = ("composition", metric, tokens)
    return next(f for f in found if question in f["question"] and (f["split"], f["metric"], f["tokens"]) == keys)


@pytest.mark.parametrize(
    ("few", "many", "spread", "verdict"),
    [(4.0, 1.0, 0.1, "confirmed"), (1.0, 4.0, 0.1, "the opposite was found"), (2.0, 1.9, 0.5, "undecided")],
)
@pytest.mark.parametrize("metric", ["psnr", "frechet_distance/random"])
def test_the_verdict_on_fewer_tokens_is_what_was_found(few, many, spread, verdict, metric):
    found = finding(findings(rows(few, many, spread)), "each doubling", metric)
    assert found["verdict"].startswith(verdict)
    assert found["value"] == pytest.approx((many - few) / 3)  # of three doublings
    assert found["error"] == pytest.approx(stats.t.ppf(0.975, 2) * spread / 3 / 3**0.5, rel=1e-3)


def test_the_verdict_on_places_is_of_each_number_of_tokens_too():
    found = findings(rows(4.0, -4.0, 0.1))
    assert finding(found, "encoder's text", "psnr", 4)["verdict"] == "confirmed"
    assert finding(found, "encoder's text", "psnr", 32)["verdict"] == "the opposite was found"
    assert finding(found, "encoder's text", "psnr")["verdict"].startswith("undecided")
    assert finding(found, "encoder's text", "ssim", 4)["value"] == 0


def test_captions_of_other_pictures_are_told():
    found = finding(findings(rows(4.0, 1.0, 0.1)), "other pictures", "psnr")
    assert (found["value"], found["verdict"]) == (-1, "worse")


def test_one_seed_decides_nothing():
    found = findings([row for row in rows(4.0, 1.0, 0.1) if row["seed"] == 0])
    assert found and all(each["verdict"] == "undecided: one seed has no spread" and each["error"] is None for each in found)


def test_quantiles_are_students():
    for freedom, value in enumerate(STUDENT_T, start=1):
        assert value == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)


def test_what_was_not_trained_is_not_told():
    found = findings([row for row in rows(4.0, 1.0, 0.1) if row["text"] in ("none", "both")])
    assert {each["question"] for each in found} and not any("encoder" in each["question"] for each in found)


def test_error_bars_are_as_long_as_the_deviation():
    made = rows(4.0, 1.0, 0.5)
    result = {"means": means(made), "tokens": [4, 32]}
    drawn = plot(result, "object", "psnr").count("h8")
    assert drawn == 2 * 3  # two ends on both's point at 4 tokens and on the decoder's two; none where there is no spread
    model = dict.fromkeys(("image_size", "latent_dim", "width", "encoder_depth", "decoder_depth"), 1)
    about = {
        "training": {"run": {"steps": 1, "batch_size": 1}, "model": model},
        "machine": {"cpu": "c", "git_commit": "g", "gpus": []},
        "features": {"random": {"title": "random features"}},
        "command": "x",
        "date": "2026-11-27",
        "pictures": 1,
        "seeds": [0, 1, 2],
        "data": {"composition": "", "object": ""},
        "gains": gains(made),
        "findings": findings(made),
    }
    text = table({**result, **about})
    assert "19.00 ± 0.50" in text and "5.00 ± 0.500" in text and "4 | PSNR in dB" in text
