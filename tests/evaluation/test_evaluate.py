"""`textok-fast evaluate` from end to end on small models, stopped in the middle, and on two processes."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from file_server import serving
from narrow_inception import save_inception
from PIL import Image
from safetensors.torch import save_file

from textok_fast import DiT, DiTConfig, InputError, TexTok
from textok_fast.cli import _progress, main
from textok_fast.evaluation import evaluate, inception, psnr, ssim
from textok_fast.evaluation.batches import NpzPictures
from textok_fast.evaluation.downloads import file_sha256
from textok_fast.evaluation.evaluate import (
    Options,
    PipelinePictures,
    Sampling,
    evaluate_generation,
    evaluate_reconstruction,
    evaluate_text,
    write_reference,
)
from textok_fast.evaluation.features import ClipScore, InceptionNetwork, PixelNetwork, load_networks
from textok_fast.evaluation.fidelity import (
    codebook_use,
    frechet_distance,
    gaussian,
    inception_score,
    precision_recall,
)
from textok_fast.inference.pipelines import load_pipeline
from textok_fast.training import perceptual

pytest.importorskip("torchmetrics")

COUNT = 12
PART = ["--part-size", "4", "--batch-size", "3", "--device", "cpu"]


def drawn(count: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, 16, 16, 3): two colours each and some noise."""
    rng = np.random.default_rng(seed)
    halves = rng.integers(0, 256, (count, 1, 2, 3)).repeat(8, axis=2).repeat(16, axis=1)
    return (0.8 * halves + 0.2 * rng.integers(0, 256, (count, 16, 16, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[..., TexTok]) -> Path:
    """Pictures, a tokenizer with a codebook, a pipeline by class and one by caption, and an Inception of other weights."""
    directory = tmp_path_factory.mktemp("work")
    (directory / "photos").mkdir()
    for i, picture in enumerate(drawn(COUNT)):
        Image.fromarray(picture).save(directory / "photos" / f"{i:02d}.png")
        (directory / "photos" / f"{i:02d}.txt").write_text(f"number {i}")
    make_tokenizer(text="none", bottleneck="fsq").save_pretrained(directory / "tokenizer")
    save_inception(directory / "inception.pth")
    torch.manual_seed(0)
    config = {"num_tokens": 3, "in_channels": 4, "width": 32, "depth": 1, "heads": 2, "learn_sigma": False}
    pipeline = directory / "pipeline"
    DiT(DiTConfig(**config, num_classes=3)).save_pretrained(pipeline / "generator")
    make_tokenizer(text="none").save_pretrained(pipeline / "tokenizer")
    about = {"objective": "flow", "prediction": "velocity", "label_names": ["a", "b", "c"], "captions": {}}
    (pipeline / "pipeline.json").write_text(json.dumps(about))
    return directory


@pytest.fixture
def network(work: Path) -> InceptionNetwork:
    return InceptionNetwork(str(work / "inception.pth"))


@pytest.fixture
def run(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """One command with --json in the directory of the models; what it printed."""
    monkeypatch.chdir(work)

    def call(*arguments: object) -> dict[str, Any]:
        assert main(["evaluate", *map(str, arguments), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return call


def values(found: dict[str, Any]) -> dict[str, float]:
    return {name: metric["value"] for name, metric in found["metrics"].items()}


def published(monkeypatch: pytest.MonkeyPatch, network: InceptionNetwork) -> None:
    """These weights count as FID's."""
    for module in (inception, sys.modules[NpzPictures.__module__]):
        monkeypatch.setattr(module, "PUBLISHED_SHA256", network.identity["sha256"])


# -- reconstruction ---------------------------------------------------------------------------------------------------------


def test_reconstruction_is_what_its_parts_say(
    run: Callable[..., dict[str, Any]], network: InceptionNetwork, work: Path
) -> None:
    arguments = ("reconstruction", "--model", "tokenizer", "--images", "photos", "--inception", "inception.pth", *PART)
    found = run(*arguments, "--features", "inception", "pixels", "--npz", "--out", "reconstruction")
    tokenizer = TexTok.from_pretrained(work / "tokenizer")
    originals = drawn(COUNT)
    tokens = tokenizer.encode(torch.from_numpy(originals))
    made = tokenizer.decode(tokens, output="uint8").numpy()
    label = network.label
    both = [network(pictures)["pool"] for pictures in (made, originals)]
    pixels = [PixelNetwork()(pictures)["pool"] for pictures in (made, originals)]
    assert values(found) == {
        "psnr": pytest.approx(psnr(originals, made), abs=1e-3),
        "ssim": pytest.approx(ssim(originals, made), abs=1e-4),
        "codebook_use": codebook_use(tokens.indices, tokenizer.bottleneck.codebook_size).share,
        f"frechet_distance/{label}": pytest.approx(frechet_distance(*map(gaussian, both)), rel=1e-3),
        f"inception_score/{label}": pytest.approx(inception_score(network.logits(both[0])).mean, rel=1e-3),
        "frechet_distance/pixels": pytest.approx(frechet_distance(*map(gaussian, pixels)), rel=1e-3),
    }
    assert "FID" not in json.dumps(found["metrics"]) and "pixels" in found["metrics"]["frechet_distance/pixels"]["title"]
    assert list(found["missing"]) == ["LPIPS"] and "--lpips FILE" in found["missing"]["LPIPS"]
    assert found["settings"]["pictures"] == COUNT and found["machine"]["torch"] == torch.__version__
    assert found["command"].startswith("textok-fast evaluate reconstruction --model tokenizer")
    assert any("12 pictures" in note for note in found["notes"])
    assert json.loads((work / "reconstruction/reconstruction.json").read_text()) == found
    assert f"| PSNR, dB | {values(found)['psnr']:.3f} | higher |" in (work / "reconstruction/reconstruction.md").read_text()
    with Image.open(work / "reconstruction/reconstruction.png") as grid:
        assert grid.size == (8 * 20 + 4, 2 * 20 + 4)  # eight originals above their reconstructions
        np.testing.assert_array_equal(np.asarray(grid)[24:40, 4:20], made[0])
    np.testing.assert_array_equal(NpzPictures(work / "reconstruction/reconstructions.npz").read(0, COUNT).pictures, made)


def test_fid_is_said_of_the_published_weights_alone(
    run: Callable[..., dict[str, Any]], network: InceptionNetwork, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(monkeypatch, network)
    arguments = ("reconstruction", "--model", "tokenizer", "--images", "photos", *PART, "--out", "published")
    found = run(*arguments, "--inception", "inception.pth")
    assert {"rfid", "inception_score"} <= set(found["metrics"])
    assert (work / "published/reconstruction.md").read_text().count("| rFID |") == 1
    without = run(*arguments[:-1], "without")
    assert set(without["metrics"]) == {"psnr", "ssim", "codebook_use"}  # the rest is computed
    assert "--inception published" in without["missing"]["rFID, inception score"]
    # And once they are there, only what was missing is: the other parts are as they were.
    files = {path: path.stat().st_mtime_ns for path in (work / "without/parts").rglob("*.safetensors")}
    again = run(*arguments[:-1], "without", "--inception", "inception.pth")
    assert values(again) == values(found)
    assert {path: path.stat().st_mtime_ns for path in files} == files


@pytest.fixture
def lpips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., perceptual.LPIPS]:
    """Loads a small LPIPS, as evaluations then do; its files are in served/: vgg, heads and, with both, lpips.safetensors."""
    channels = (2, 2, 3, 3, 4)
    torch.manual_seed(0)
    network = perceptual.LPIPS(channels)
    state = {}
    for place, number in enumerate(number for stage in perceptual.VGG16_CONVOLUTIONS for number in stage):
        state |= {f"features.{number}.{name}": value for name, value in network.convolutions[place].named_parameters()}
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(channels)}
    (tmp_path / "served").mkdir()
    for name, tensors in (("vgg", state), ("heads", heads), ("lpips", state | heads)):
        given = {key: value.detach().contiguous() for key, value in tensors.items()}
        save_file(given, tmp_path / "served" / f"{name}.safetensors")
    load = functools.partial(perceptual.load_lpips, channels=channels)
    monkeypatch.setattr(evaluate, "load_lpips", load)
    return load


def test_lpips_of_the_training(work: Path, tmp_path: Path, lpips: Callable[..., perceptual.LPIPS]) -> None:
    model, images = str(work / "tokenizer"), str(work / "photos")
    options = Options(features=["pixels"], part_size=5, npz=True)
    weights = str(tmp_path / "served/lpips.safetensors")
    found = evaluate_reconstruction(model, images, tmp_path / "out", lpips=(weights, ""), options=options)
    assert found is not None and "LPIPS" not in found.missing
    made = NpzPictures(tmp_path / "out/reconstructions.npz").read(0, COUNT).pictures
    first, second = (torch.from_numpy(each).permute(0, 3, 1, 2) / 127.5 - 1 for each in (made, drawn(COUNT)))
    expected = lpips(weights)(first, second).mean()
    assert found.metrics["lpips"].value == pytest.approx(float(expected), rel=1e-4)
    assert found.metrics["lpips"].value > 0.001


def test_lpips_by_url_and_hash(
    run: Callable[..., dict[str, Any]],
    lpips: Callable[..., perceptual.LPIPS],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TEXTOK_CACHE", str(tmp_path / "cache"))
    served = tmp_path / "served"
    arguments = ["reconstruction", "--model", "tokenizer", "--images", "photos", "--features", "pixels", *PART, "--out"]
    here = run(*arguments, tmp_path / "here", "--lpips", served / "vgg.safetensors", served / "heads.safetensors")
    vgg, heads = (file_sha256(served / f"{name}.safetensors") for name in ("vgg", "heads"))
    with serving(served) as server:
        urls = [f"{server.url}/{name}.safetensors" for name in ("vgg", "heads")]
        there = run(*arguments, tmp_path / "there", "--lpips", *urls, "--lpips-sha256", vgg, heads)
        half = [served / "vgg.safetensors", urls[1], "--lpips-sha256", "", heads]  # a file needs none
        assert values(run(*arguments, tmp_path / "half", "--lpips", *half)) == values(there) == values(here)
        assert sorted(path for path, _ in server.asked) == ["/heads.safetensors", "/vgg.safetensors"]
        for given, message in (
            ([*urls, "--lpips-sha256", vgg], f"give the sha256 of {urls[1]}"),
            ([urls[0]], f"give the sha256 of {urls[0]}"),
            ([f"{urls[0]}?other", "--lpips-sha256", heads], "what came has the sha256 " + vgg),
            ([urls[0], "--lpips-sha256", vgg, heads], "2 hashes of the 1"),
            ([served / "vgg.safetensors", "--lpips-sha256", heads], "not the file that was meant"),
            ([served, "--lpips-sha256", heads], "is a directory"),
        ):
            assert main(["evaluate", *map(str, [*arguments, tmp_path / "no", "--lpips", *given])]) == 2
            assert message in capsys.readouterr().err
        # torchvision's file by name, downloaded once.
        monkeypatch.setattr(evaluate, "VGG16_URL", f"{server.url}/lpips.safetensors")
        monkeypatch.setattr(evaluate, "VGG16_SHA256", file_sha256(served / "lpips.safetensors"))
        assert values(run(*arguments, tmp_path / "named", "--lpips", "published")) == values(here)
    assert values(run(*arguments, tmp_path / "later", "--lpips", "published")) == values(here)
    assert main(["evaluate", *map(str, [*arguments, tmp_path / "no", "--lpips-sha256", vgg])]) == 2
    assert "--lpips names" in capsys.readouterr().err


def test_captions_matter_and_can_be_withheld(
    make_tokenizer: Callable[..., TexTok], loads_fake_text: Any, work: Path, tmp_path: Path
) -> None:
    model = str(make_tokenizer().save_pretrained(tmp_path / "reader"))
    options = Options(features=["pixels"])
    images = str(work / "photos")
    given = evaluate_reconstruction(model, images, tmp_path / "given", options=options)
    null = evaluate_reconstruction(model, images, tmp_path / "null", with_captions=False, options=options)
    tokenizer = TexTok.from_pretrained(tmp_path / "reader")
    originals, captions = torch.from_numpy(drawn(COUNT)), [f"number {i}" for i in range(COUNT)]
    for found, texts in ((given, captions), (null, None)):
        made = tokenizer.decode(tokenizer.encode(originals, texts), texts, output="uint8")
        assert found is not None and "codebook_use" not in found.metrics
        assert found.metrics["psnr"].value == pytest.approx(psnr(originals, made), abs=1e-3)
    np.savez(tmp_path / "photos.npz", drawn(COUNT))
    without = evaluate_reconstruction(model, str(tmp_path / "photos.npz"), tmp_path / "npz", options=options)
    assert without is not None and null is not None and without.metrics == null.metrics
    assert "12 of the 12 pictures have no caption" in " ".join(without.notes) and len(null.notes) == 1
    assert given is not None and null is not None and given.metrics["psnr"].value != null.metrics["psnr"].value
    with pytest.raises(InputError, match="captions differ"):
        evaluate_reconstruction(model, images, tmp_path / "given", with_captions=False, options=options)


# -- generation and text ----------------------------------------------------------------------------------------------------


def test_generation_against_a_reference_batch(
    run: Callable[..., dict[str, Any]], network: InceptionNetwork, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "REFERENCE_PICTURES", 8)
    monkeypatch.setattr(inception, "SPATIAL_CHANNELS", 1)  # eigenvalues of 2,023 features take seconds
    samples, reference = drawn(20, seed=1), drawn(COUNT)
    np.savez(work / "samples.npz", samples)
    written = run("reference", "--images", "photos", "--inception", "inception.pth", *PART, "--out", "reference.npz")
    assert (written["pictures"], written["kept"]) == (COUNT, 8)
    batch = NpzPictures(work / "reference.npz")
    kept = [0, 1, 3, 4, 6, 7, 9, 10]
    np.testing.assert_array_equal(batch.read(0, 8).pictures, reference[kept])
    real, fake = network(reference), network(samples)
    np.testing.assert_allclose(batch.statistics().covariance, gaussian(real["pool"]).covariance, atol=1e-5)  # type: ignore[union-attr]

    arguments = ("generation", "--samples", "samples.npz", "--inception", "inception.pth", *PART)
    found = run(*arguments, "--reference", "reference.npz", "--out", "generation")
    shares = precision_recall(real["pool"][kept], fake["pool"])
    expected = {
        "frechet_distance": pytest.approx(frechet_distance(gaussian(fake["pool"]), gaussian(real["pool"])), rel=1e-3),
        "spatial_frechet_distance": pytest.approx(
            frechet_distance(gaussian(fake["spatial"]), gaussian(real["spatial"])), rel=1e-3
        ),
        "inception_score": pytest.approx(inception_score(network.logits(fake["pool"])).mean, rel=1e-3),
        "precision": shares.precision,
        "recall": shares.recall,
    }
    assert values(found) == {f"{name}/{network.label}": value for name, value in expected.items()}
    assert shares.precision > 0 and not found["missing"]

    # ADM's batches do not say whose statistics they hold: the published Inception's.
    with np.load(work / "reference.npz") as archive:
        arrays = {name: archive[name] for name in archive.files if name != "inception_sha256"}
    np.savez(work / "adm.npz", **arrays)
    stranger = run(*arguments, "--reference", "adm.npz", "--out", "stranger")
    assert any("adm.npz are not of" in note for note in stranger["notes"])
    of_eight = frechet_distance(gaussian(fake["pool"]), gaussian(real["pool"][kept]))
    assert values(stranger)[f"frechet_distance/{network.label}"] == pytest.approx(of_eight, rel=1e-3)
    published(monkeypatch, network)
    own = run(*arguments, "--reference", "adm.npz", "--out", "adm")
    names = {"frechet_distance": "gfid", "spatial_frechet_distance": "sfid"}
    assert values(own) == {names.get(name, name): value for name, value in expected.items()}

    # Statistics alone: no pictures, so no manifold. And of a folder there is everything.
    np.savez(work / "statistics.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    alone = run(*arguments, "--reference", "statistics.npz", "--out", "alone")
    assert set(alone["metrics"]) == {"gfid", "inception_score"} and set(alone["missing"]) == {"sFID", "precision, recall"}
    assert values(run(*arguments, "--reference", "photos", "--out", "folder"))["gfid"] == expected["frechet_distance"]


def test_a_pipeline_makes_each_sample_once(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "reference.npz", drawn(COUNT))
    options = Options(features=["pixels"], count=7, part_size=4, batch_size=3, npz=True)
    sampling = Sampling(seed=5, steps=2)
    pipeline = str(work / "pipeline")
    given: dict[str, Any] = {"reference": str(tmp_path / "reference.npz"), "options": options}
    found = evaluate_generation(pipeline, tmp_path / "out", sampling=sampling, **given)
    assert found is not None and found.settings["steps"] == 2 and found.settings["pictures"] == 7
    made = NpzPictures(tmp_path / "out/samples.npz").read(0, 7).pictures
    evenly = [0, 1, 2, 0, 1, 2, 0]  # over the classes
    own = load_pipeline(pipeline)
    expected = own(evenly, seed=5, options=evaluate.SamplingOptions(steps=2)).images.numpy()
    np.testing.assert_allclose(made.astype(int), expected.astype(int), atol=1)
    assert found.metrics["frechet_distance/pixels"].value > 0

    monkeypatch.setattr(PipelinePictures, "_make", None)  # nothing is made again
    again = evaluate_generation(pipeline, tmp_path / "out", sampling=sampling, **given)
    assert again is not None and again.metrics == found.metrics
    with pytest.raises(InputError, match=r"sampling differ"):
        evaluate_generation(pipeline, tmp_path / "out", sampling=Sampling(seed=5, steps=3), **given)
    with pytest.raises(InputError, match="by class"):
        evaluate_generation(pipeline, tmp_path / "new", sampling=Sampling(["a"]), **given)
    with pytest.raises(InputError, match="take no prompts"):
        evaluate_generation(str(tmp_path / "reference.npz"), tmp_path / "new", sampling=Sampling(["a"]), **given)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small CLIP over letters, with its processor, and where they are."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>"]
    tokens += [letter + end for letter in string.ascii_lowercase + string.digits for end in ("", "</w>")]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokens), "max_position_embeddings": 10, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**small, "image_size": 16, "patch_size": 8}
    torch.manual_seed(3)  # of other seeds most scores are 0
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = CLIPProcessor(images, CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    directory = tmp_path_factory.mktemp("clip")
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory, model, processor


def test_clip_score(run: Callable[..., dict[str, Any]], clip: Any, work: Path, tmp_path: Path) -> None:
    directory, model, processor = clip
    found = run("text", "--samples", "photos", "--clip", directory, *PART, "--out", tmp_path / "text")
    scores = []
    for i, picture in enumerate(drawn(COUNT)):  # one by one
        ids = processor.tokenizer(f"number {i}", return_tensors="pt", max_length=10, truncation=True)
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        of_images = processor.image_processor
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (of_images.image_mean, of_images.image_std))
        with torch.no_grad():
            image = model.visual_projection(model.vision_model((pixels - mean) / std).pooler_output)[0]
            text = model.text_projection(model.text_model(**ids).pooler_output)[0]
        scores.append(100 * max(float(image @ text / image.norm() / text.norm()), 0.0))
    assert found["metrics"]["clip_score"]["value"] == pytest.approx(np.mean(scores), rel=1e-3)
    error = np.std(scores, ddof=1) / COUNT**0.5
    assert found["metrics"]["clip_score"]["detail"]["standard error"] == pytest.approx(error, rel=1e-3)
    assert np.std(scores) > 0
    np.savez(tmp_path / "samples.npz", drawn(4))
    with pytest.raises(InputError, match="without a caption"):
        evaluate_text(str(tmp_path / "samples.npz"), tmp_path / "x", clip=str(directory))


def test_without_a_clip_it_says_so(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """As `generation` without Inception: an error, or what else was asked for."""
    with pytest.raises(InputError, match=r"the CLIP score needs a CLIP of transformers: --clip DIR.*clip-vit-base-patch32"):
        evaluate_text("photos", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    found = run("text", "--samples", "photos", *PART, "--npz", "--out", tmp_path / "text")
    assert not found["metrics"] and "--clip DIR" in found["missing"]["CLIP score"]
    np.testing.assert_array_equal(NpzPictures(tmp_path / "text/samples.npz").read(0, COUNT).pictures, drawn(COUNT))


@pytest.fixture
def hub(clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hub that cannot be reached, and a cache with two commits of team/clip. The models that it was asked for."""
    from huggingface_hub import HfApi, constants

    repository = tmp_path / "hub/models--team--clip"
    for name, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        shutil.copytree(clip[0], repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    older = type(clip[1])(clip[1].config)
    older.save_pretrained(repository / "snapshots" / ("b" * 40))
    asked: list[str] = []

    def unreachable(self: HfApi, name: str, *, revision: str | None, timeout: float) -> None:
        asked.append(f"{name}@{revision}")
        raise RuntimeError("no network\nhere")  # httpx's errors are no OSError either

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    return asked


def test_a_revision_of_the_hub_can_be_pinned(hub: list[str], clip: Any, work: Path, tmp_path: Path) -> None:
    scores = {}
    for source, commit in (("team/clip", "a"), ("team/clip@v1", "b"), (f"team/clip@{'b' * 40}", "b"), (str(clip[0]), "")):
        found = evaluate_text(str(work / "photos"), tmp_path / f"out-{commit}", clip=source)  # a pin goes on with the same
        assert found is not None and found.settings["clip"] == (f"team/clip@{commit * 40}" if commit else source)
        scores[source] = found.metrics["clip_score"].value
    main_, tag, commit, directory = scores.values()
    assert main_ == directory != tag == commit
    assert not hub  # what is in the cache asks nobody
    (network,), _ = load_networks(["team/clip@v1"])
    assert network.title == "the pooled features of team/clip@v1" and not hub


def test_a_hub_that_cannot_be_reached_is_one_line_and_one_question(hub: list[str], work: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no directory team/other@v2, and the Hub .*\(no network here\): check the name"):
        ClipScore("team/other@v2")
    assert hub == ["team/other@v2"]
    (tmp_path / "hub/models--team--clip/snapshots" / ("a" * 40) / "model.safetensors").unlink()  # stopped before it came
    with pytest.raises(InputError, match="of what the cache has: cannot load team/clip as a CLIPModel"):
        ClipScore("team/clip")
    assert hub[1:] == ["team/clip@None"]


def test_prompts_are_taken_in_turn(
    make_tokenizer: Callable[..., TexTok], loads_fake_text: Any, clip: Any, tmp_path: Path
) -> None:
    pipeline = tmp_path / "pipeline"
    torch.manual_seed(0)
    config = {"num_tokens": 3, "in_channels": 4, "width": 32, "depth": 1, "heads": 2, "learn_sigma": False}
    DiT(DiTConfig(**config, num_classes=0, text_dim=8)).save_pretrained(pipeline / "generator")
    make_tokenizer().save_pretrained(pipeline / "tokenizer")
    (pipeline / "pipeline.json").write_text(
        json.dumps({"objective": "flow", "prediction": "velocity", "label_names": [], "captions": {}})
    )
    sampling = Sampling(["red", "a cow"], steps=2)
    found = evaluate_text(
        str(pipeline), tmp_path / "out", clip=str(clip[0]), sampling=sampling, options=Options(count=5, npz=True)
    )
    assert found is not None and found.settings["prompts"] == 2
    own = load_pipeline(pipeline)(["red", "a cow", "red", "a cow", "red"], options=evaluate.SamplingOptions(steps=2))
    made = NpzPictures(tmp_path / "out/samples.npz").read(0, 5).pictures
    np.testing.assert_allclose(made.astype(int), own.images.numpy().astype(int), atol=1)
    with pytest.raises(InputError, match="--prompts"):
        evaluate_text(str(pipeline), tmp_path / "none", clip=str(clip[0]))


def test_captions_are_read_without_decoding(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(work / "photos", tmp_path / "photos")
    wanted = evaluate.open_pictures(folder, image_size=8).read(0, 4).captions
    monkeypatch.setattr("textok_fast.data.files.decode_image", None)
    assert evaluate.captions_of(folder)[:4] == wanted
    samples = [{"image": f"{k}.png", "caption": text} for k, text in enumerate(["a cow", ""])]
    for sample in samples:
        Image.new("RGB", (8, 8)).save(tmp_path / sample["image"])
    (tmp_path / "samples.json").write_text(json.dumps({"samples": samples}))
    assert evaluate.captions_of(tmp_path) == ["a cow"]
    for file in folder.glob("*.txt"):
        file.unlink()
    with pytest.raises(InputError, match="have no captions"):
        evaluate.captions_of(folder)


def test_the_crop_belongs_to_a_result(work: Path, tmp_path: Path) -> None:
    """Of pictures and reference alike: a stopped run does not go on with another."""
    (tmp_path / "wide").mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (40, 55, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "wide" / f"{i}.png")
    model, wide = str(work / "tokenizer"), str(tmp_path / "wide")
    found = {}
    for crop in ("center", "adm"):
        options = Options(features=["pixels"], crop=crop)  # type: ignore[arg-type]
        found[crop] = evaluate_reconstruction(model, wide, tmp_path / crop, options=options)
        assert found[crop] is not None and found[crop].settings["crop"] == crop
    distances = [each.metrics["frechet_distance/pixels"].value for each in found.values() if each is not None]
    assert distances[0] != distances[1]
    with pytest.raises(InputError, match="crop"):
        evaluate_reconstruction(model, wide, tmp_path / "center", options=Options(features=["pixels"], crop="adm"))
    # A reference batch remembers its crop, and a report says where the pictures have another; ADM's do not say.
    inception = str(work / "inception.pth")
    write_reference(wide, tmp_path / "own.npz", Options(inception=inception, image_size=16, crop="adm"))
    np.savez(tmp_path / "adms.npz", arr_0=drawn(3))
    for crop in ("center", "adm"):
        for reference, words in (
            ("own.npz", "was cropped by adm, and these pictures by center"),
            ("adms.npz", "does not say how"),
        ):
            options = Options(features=["pixels"], crop=crop)  # type: ignore[arg-type]
            batch = str(tmp_path / reference)
            report = evaluate_reconstruction(model, wide, tmp_path / f"{crop}-{reference}", reference=batch, options=options)
            assert report is not None and (words in " ".join(report.notes)) is (crop == "center")
    # The reference's pictures are brought to their size by the same steps as the samples.
    options = Options(features=["pixels"], image_size=16, crop="adm")
    same = evaluate_generation(wide, tmp_path / "same", reference=wide, options=options)
    assert same is not None and same.metrics["frechet_distance/pixels"].value < 1e-9


# -- mistakes ---------------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, photos = work / "tokenizer", work / "photos"
    np.savez(tmp_path / "small.npz", drawn(4)[:, :8, :8])
    for arguments, message in (
        (("reconstruction", "--model", model, "--images", tmp_path / "none"), "no pictures at"),
        (("reconstruction", "--model", model, "--images", tmp_path / "small.npz"), "takes (16, 16, 3)"),
        (("reconstruction", "--model", model, "--images", photos, "--count", 13), "13 pictures were asked for"),
        (("reconstruction", "--model", model, "--images", photos, "--lpips", "a", "b", "c"), "--lpips takes"),
        (("reconstruction", "--model", model, "--images", photos, "--part-size", 0), "part-size"),
        (("generation", "--samples", photos, "--reference", tmp_path / "none.npz"), "none.npz"),
        (("text", "--samples", photos, "--clip", tmp_path / "none"), "no directory"),
    ):
        code = main(["evaluate", *map(str, arguments), "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert (code, error.count("error: "), message in error) == (2, 1, True), error
    assert main(["evaluate", "reference", "--images", str(photos), "--out", str(tmp_path / "reference.txt")]) == 2
    with pytest.raises(InputError, match="nothing can be computed: Inception's weights are not here"):
        evaluate_generation(str(work / "pipeline"), tmp_path / "nothing", reference=str(photos))  # before 50,000 are made
    assert not list(tmp_path.rglob("samples"))
    with pytest.raises(InputError, match="Inception's weights are not here"):
        write_reference(str(photos), tmp_path / "reference.npz")
    digest = InceptionNetwork(str(work / "inception.pth")).identity["sha256"]
    np.savez(tmp_path / "wide.npz", drawn(4), mu=np.zeros(5), sigma=np.eye(5), inception_sha256=digest)
    options = Options(inception=str(work / "inception.pth"))
    with pytest.raises(InputError, match="of 128 and of 5 numbers"):
        evaluate_generation(str(photos), tmp_path / "wide", reference=str(tmp_path / "wide.npz"), options=options)


# -- stopped, and shared ----------------------------------------------------------------------------------------------------


def start(work: Path, arguments: list[str], processes: int = 1) -> subprocess.Popen[str]:
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, *launch, "-m", "textok_fast", "evaluate", *arguments, "--json"]
    return subprocess.Popen(command, env=environment, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def parts(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")}


def test_a_killed_run_goes_on_and_ends_with_the_same(run: Callable[..., dict[str, Any]], work: Path, tmp_path: Path) -> None:
    arguments = ["generation", "--samples", "pipeline", "--reference", "photos", "--count", "40", "--steps", "4"]
    arguments += ["--features", "pixels", "--part-size", "2", "--batch-size", "2", "--device", "cpu"]
    uninterrupted = run(*arguments, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    process = start(work, [*arguments, "--out", str(out)])
    deadline = time.monotonic() + 400
    while len(parts(out)) < 5:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    before = parts(out)
    assert len(before) < len(parts(tmp_path / "whole")) and not (out / "generation.json").exists()
    continued = run(*arguments, "--out", out)
    assert values(continued) == values(uninterrupted)
    assert before.items() <= parts(out).items()  # what was there was not computed again


def test_progress_begins_with_what_is_there(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    options = Options(features=["pixels"], part_size=5, progress=lambda done, total: seen.append((done, total)))
    arguments = str(work / "tokenizer"), str(work / "photos"), tmp_path / "out"
    evaluate_reconstruction(*arguments, options=options)
    assert seen == [(0, 12), (5, 12), (10, 12), (12, 12)]  # the first before the first part
    for stage, part in (("psnr-ssim", 1), ("codes", 1)):
        (tmp_path / "out/parts" / stage / f"{part:06d}.safetensors").unlink()
    seen.clear()
    evaluate_reconstruction(*arguments, options=options)
    assert seen == [(7, 12), (12, 12)]
    # The bar counts them as done, and not as fast.
    bar = _progress("reconstruction", silent=False)
    with bar as advance:
        advance(7, 12)
        assert "7/12" in capsys.readouterr().err
        first = bar.bar
        start = first.start_t
        first._time = lambda: start + 2.0  # the clock that tqdm reads
        advance(12, 12)
        assert bar.bar is first  # so that its clock began before the first part
        assert (first.initial, first.n, first.total) == (7, 12, 12)
    assert "2.50it/s" in capsys.readouterr().err  # five in two seconds


def test_two_processes_find_what_one_finds(run: Callable[..., dict[str, Any]], work: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    arguments = ["reconstruction", "--model", "tokenizer", "--images", "photos", "--inception", "inception.pth", *PART]
    alone = run(*arguments, "--out", tmp_path / "alone")
    process = start(work, [*arguments, "--out", str(tmp_path / "two")], processes=2)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    shared = json.loads(out)  # of one process: two would be no JSON
    assert shared["settings"]["processes"] == 2
    assert values(shared) == values(alone)
    assert len(parts(tmp_path / "two")) == len(parts(tmp_path / "alone"))
