"""`textok-fast evaluate generation` of a pipeline that makes small pictures large."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from textok_fast import DiT, DiTConfig, InputError, TexTok
from textok_fast.cli import main
from textok_fast.config import DataConfig, GeneratorTrainConfig, LowResolutionConfig, to_dict
from textok_fast.data import load_dataset
from textok_fast.data.degradation import degrade
from textok_fast.evaluation import psnr, ssim
from textok_fast.evaluation.batches import NpzPictures
from textok_fast.evaluation.evaluate import (
    Evaluation,
    Options,
    Sampling,
    evaluate_generation,
    evaluate_super_resolution,
    is_super_resolution,
)
from textok_fast.evaluation.features import PixelNetwork
from textok_fast.evaluation.fidelity import frechet_distance, gaussian
from textok_fast.inference.pipelines import SamplingOptions, SuperResolutionPipeline, load_pipeline

pytest.importorskip("torchmetrics")

COUNT, STEPS, SEED, STRENGTH = 10, 3, 5, 0.4
WAYS = ("bicubic", "uncaptioned", "captioned", "guided", "tokenizer")


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    """uint8 (10, 16, 16, 3): two colours each and some noise."""
    rng = np.random.default_rng(0)
    halves = rng.integers(0, 256, (COUNT, 1, 2, 3)).repeat(8, axis=2).repeat(16, axis=1)
    return (0.9 * halves + 0.1 * rng.integers(0, 256, (COUNT, 16, 16, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[..., TexTok], photos: np.ndarray) -> Path:
    """Captioned pictures, a pipeline that reads captions and one, "blind", that reads none: x4 to 16 px, of no training."""
    directory = tmp_path_factory.mktemp("work")
    (directory / "photos").mkdir()
    for i, picture in enumerate(photos):
        Image.fromarray(picture).save(directory / "photos" / f"{i:02d}.png")
        (directory / "photos" / f"{i:02d}.txt").write_text(f"number {i}")
    sizes: dict[str, Any] = {"num_tokens": 3, "in_channels": 4, "width": 32, "depth": 1, "heads": 2, "learn_sigma": False}
    sizes |= {"num_classes": 0, "image_token_dim": 12, "num_image_tokens": 4}
    for name, text_dim, text in (("reads", 8, "both"), ("blind", 0, "none")):
        torch.manual_seed(0)
        generator = DiT(DiTConfig(**sizes, text_dim=text_dim))
        with torch.no_grad():
            for parameter in generator.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        tokenizer = make_tokenizer(text=text)
        pipeline = SuperResolutionPipeline(generator, tokenizer, "flow", size=4, patch_size=2, strength=STRENGTH)
        pipeline.save_pretrained(directory / name / "final")
    return directory


def evaluated(work: Path, out: Path, name: str = "reads", **changes: Any) -> Evaluation:
    options = Options(**{"features": ["pixels"], "part_size": 4, "batch_size": 3, **changes.pop("options", {})})
    given = {"images": str(work / "photos"), "sampling": Sampling(seed=SEED, steps=STEPS, guidance=3.0), **changes}
    found = evaluate_super_resolution(str(work / name / "final"), out, **given, options=options)
    assert found is not None
    return found


def values(found: Evaluation) -> dict[str, float]:
    return {name: metric.value for name, metric in found.metrics.items()}


def test_numbers_are_those_of_each_way(work: Path, loads_fake_text: Any, photos: np.ndarray, tmp_path: Path) -> None:
    found = evaluated(work, tmp_path / "out", options={"npz": True})
    pipeline: Any = load_pipeline(work / "reads/final")
    small = np.stack([degrade(photo, 4, seed=SEED, index=i, strength=STRENGTH) for i, photo in enumerate(photos)])
    captions = [f"number {i}" for i in range(COUNT)]

    def enlarged(texts: list[str] | None, guidance: float) -> np.ndarray:
        options = SamplingOptions(steps=STEPS, guidance_scale=guidance)
        made: np.ndarray = pipeline(small, texts, seed=SEED, options=options).images.numpy()
        return made

    tokens = pipeline.tokenizer.encode(torch.from_numpy(photos), captions)
    expected = {
        "bicubic": np.stack([np.asarray(Image.fromarray(each).resize((16, 16), Image.Resampling.BICUBIC)) for each in small]),
        "uncaptioned": enlarged(None, 1.0),
        "captioned": enlarged(captions, 1.0),
        "guided": enlarged(captions, 3.0),
        "tokenizer": pipeline.tokenizer.decode(tokens, captions, output="uint8").numpy(),
    }
    assert len({made.tobytes() for made in expected.values()}) == 5
    features = {name: PixelNetwork()(made)["pool"] for name, made in {**expected, "originals": photos}.items()}
    for name, made in expected.items():
        of = {metric: values(found)[f"{metric}/{name}"] for metric in ("psnr", "ssim", "frechet_distance/pixels")}
        distance = frechet_distance(gaussian(features[name]), gaussian(features["originals"]))
        assert of["psnr"] == pytest.approx(psnr(photos, made), abs=0.02)  # the engine rounds a pixel in a thousand elsewhere
        assert of["ssim"] == pytest.approx(ssim(photos, made), abs=1e-3)
        assert of["frechet_distance/pixels"] == pytest.approx(distance, rel=1e-2, abs=1e-5)
        if name != "bicubic":
            gain = found.metrics[f"psnr_gain/{name}"]
            assert gain.value == pytest.approx(of["psnr"] - values(found)["psnr/bicubic"], abs=1e-5)
            assert gain.detail["standard error"] > 0
    by_guidance = values(found)["psnr/guided"] - values(found)["psnr/captioned"]
    assert values(found)["psnr_gain_of_guidance/guided"] == pytest.approx(by_guidance, abs=1e-5)
    assert list(found.missing) == ["LPIPS"]
    assert (found.settings["strength"], found.settings["seed"], found.settings["scale"]) == (STRENGTH, SEED, 4)
    report = (tmp_path / "out/generation.md").read_text()
    assert (
        "| metric | bicubic | no caption | caption | caption, guidance 3 | tokenizer alone, of the originals | better |"
        in report
    )
    assert report.count("| PSNR, dB |") == 1 and f"{values(found)['psnr/guided']:.3f}" in report
    assert json.loads((tmp_path / "out/generation.json").read_text()) == found.to_dict()
    kept = NpzPictures(tmp_path / "out/samples.npz").read(0, COUNT).pictures
    assert np.abs(kept.astype(int) - expected["guided"]).max() <= 1
    with Image.open(tmp_path / "out/generation.png") as grid:
        assert grid.size == (4 * 20 + 4, 7 * 20 + 4)  # a part's four pictures, small, in five ways and as they were
        np.testing.assert_array_equal(np.asarray(grid)[4:20, 4:20], small[0].repeat(4, 0).repeat(4, 1))
        np.testing.assert_array_equal(np.asarray(grid)[124:140, 24:40], photos[1])


def test_a_stopped_run_goes_on_and_what_is_added_makes_no_picture_again(
    work: Path, loads_fake_text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluated(work, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(work, tmp_path / "out", options={"progress": stop})
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert len(files) == len(list((tmp_path / "whole").rglob("*.safetensors"))) / 3
    lost = tmp_path / "out/parts/psnr-ssim-guided/000000.safetensors"
    lost.unlink()
    made: list[int] = []
    run = SuperResolutionPipeline.__call__

    def counting(self: SuperResolutionPipeline, images: Any, *args: Any, **options: Any) -> Any:
        made.append(len(images))
        return run(self, images, *args, **options)

    monkeypatch.setattr(SuperResolutionPipeline, "__call__", counting)
    assert values(evaluated(work, tmp_path / "out")) == values(whole)
    assert sum(made) == 3 * (COUNT - 4)  # three ways of the parts that were not there
    assert {path: path.stat().st_mtime_ns for path in files if path != lost} == {k: v for k, v in files.items() if k != lost}
    made.clear()
    photos = str(work / "photos")
    other = evaluated(work, tmp_path / "out", reference=photos)
    assert not made and values(other) == pytest.approx(values(whole))
    for change in (
        {"sampling": Sampling(seed=SEED, steps=STEPS, guidance=2.0)},
        {"sampling": Sampling(seed=SEED + 1, steps=STEPS, guidance=3.0)},
        {"strength": 1.0},
    ):
        with pytest.raises(InputError, match="made otherwise"):
            evaluated(work, tmp_path / "out", **change)  # type: ignore[arg-type]


def test_the_held_out_split_is_that_of_the_trainings_data(work: Path, tmp_path: Path) -> None:
    data = DataConfig(source="shapes", image_size=16, objects=8, held_out_objects=4, scene_objects=2)
    model = DiTConfig(num_tokens=3, in_channels=4, num_classes=0)
    config = GeneratorTrainConfig(model=model, data=data, low_resolution=LowResolutionConfig(scale=4, patch_size=2))
    with pytest.raises(InputError, match=r"give --images, pictures of 16 px: there is no .*config\.yaml"):
        evaluated(work, tmp_path / "none", "blind", images="")
    (work / "blind/config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    found = evaluated(work, tmp_path / "out", "blind", images="", strength=0.0, options={"count": 6})
    held_out = load_dataset(data, "composition")
    originals = np.stack([held_out[i].image for i in range(6)])
    bicubic = [
        np.asarray(Image.fromarray(each).resize((4, 4), Image.Resampling.BICUBIC).resize((16, 16), Image.Resampling.BICUBIC))
        for each in originals
    ]
    assert values(found)["psnr/bicubic"] == pytest.approx(psnr(originals, np.stack(bicubic)), abs=1e-3)
    assert found.settings["images"] == "the composition split of shapes, which training did not see"
    assert {metric.of for metric in found.metrics.values()} == {"bicubic", "no caption", "tokenizer alone, of the originals"}
    assert "reads them" in found.missing["with captions"]


def test_without_captions_or_guidance_less_is_compared(
    work: Path, loads_fake_text: Any, photos: np.ndarray, tmp_path: Path
) -> None:
    plain = evaluated(work, tmp_path / "plain", sampling=Sampling(seed=SEED, steps=STEPS))
    assert "psnr/captioned" in plain.metrics and "psnr/guided" not in plain.metrics
    assert "--guidance" in plain.missing["guided by captions"]
    np.savez(tmp_path / "photos.npz", photos)
    bare = evaluated(work, tmp_path / "bare", images=str(tmp_path / "photos.npz"))
    assert "psnr/captioned" not in bare.metrics and "have none" in bare.missing["with captions"]
    assert values(bare)["psnr/uncaptioned"] == values(plain)["psnr/uncaptioned"]


def test_what_does_not_go_together_is_said(
    work: Path, loads_fake_text: Any, tmp_path: Path, make_tokenizer: Callable[..., TexTok], capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = str(work / "reads/final"), str(work / "photos")
    assert is_super_resolution(model) and not is_super_resolution(images)
    with pytest.raises(InputError, match="makes small pictures large"):
        evaluate_generation(model, tmp_path / "out", reference=images)
    with pytest.raises(InputError, match="takes no prompts"):
        evaluated(work, tmp_path / "out", sampling=Sampling(["a"]))
    plain = tmp_path / "plain"
    DiT(DiTConfig(num_tokens=3, in_channels=4, width=32, depth=1, heads=2, num_classes=2)).save_pretrained(plain / "generator")
    make_tokenizer(text="none").save_pretrained(plain / "tokenizer")
    (plain / "pipeline.json").write_text(json.dumps({"objective": "gaussian", "label_names": [], "captions": {}}))
    with pytest.raises(InputError, match="reads no small pictures"):
        evaluate_super_resolution(str(plain), tmp_path / "out")
    for more, message in (
        (["--reference", images, "--images", images], "are of super-resolution"),
        (["--reference", images, "--strength", "1"], "are of super-resolution"),
        ([], "give --reference"),
    ):
        assert main(["evaluate", "generation", "--samples", str(plain), "--out", str(tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err


def test_a_killed_command_ends_with_the_same(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "generation", "--samples", str(work / "blind/final"), "--images", str(work / "photos")]
    arguments += ["--steps", "2", "--features", "pixels", "--part-size", "1", "--batch-size", "1", "--device", "cpu", "--json"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    whole = json.loads(capsys.readouterr().out)
    out = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "textok_fast", *arguments, "--out", str(out)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while len(before := list(out.rglob("*.safetensors"))) < 20:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(before) < len(list((tmp_path / "whole").rglob("*.safetensors"))) and not (out / "generation.json").exists()
    assert main([*arguments, "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == whole["metrics"]
