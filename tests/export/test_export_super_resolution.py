"""A super-resolution pipeline as ONNX files: compared on small pictures, loaded, timed, and refused by Triton's generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from textok_fast import InputError, TexTok
from textok_fast.data import load_dataset
from textok_fast.data.degradation import degrade
from textok_fast.inference.pipelines import SamplingOptions, SuperResolutionPipeline, load_pipeline

REASON = "ONNX export needs the extra 'export' (onnx, onnxscript, onnxruntime)"
pytest.importorskip("onnx", reason=REASON)
pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

from tiny_export import tiny_dit  # noqa: E402

from textok_fast.config import DataConfig  # noqa: E402
from textok_fast.evaluation.deploy import DeployConfig, run_deploy  # noqa: E402
from textok_fast.export import Source, export, load  # noqa: E402
from textok_fast.export.material import Material  # noqa: E402


@pytest.fixture(scope="module")
def pipeline(make_tokenizer: Callable[..., TexTok]) -> SuperResolutionPipeline:
    """x4 to 16 px; generator and decoder read captions."""
    sizes = {"num_classes": 0, "learn_sigma": False, "time_scale": 1000.0, "image_token_dim": 12, "num_image_tokens": 4}
    tokenizer = make_tokenizer(encoder_depth=1, decoder_depth=1)
    return SuperResolutionPipeline(tiny_dit(**sizes), tokenizer, "flow", size=4, patch_size=2, strength=0.5)


def source_of(pipeline: SuperResolutionPipeline) -> Source:
    about = {"objective": "flow", "prediction": "velocity", "schedule": "linear", **pipeline._about()}
    assert isinstance(pipeline.tokenizer, TexTok)
    return Source(pipeline.tokenizer, pipeline.generator, about)


@pytest.fixture(scope="module")
def exported(pipeline: SuperResolutionPipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("exported") / "out"
    return out, export(source_of(pipeline), out, pictures=3)


def test_whole_samples_are_compared_on_small_pictures(pipeline: SuperResolutionPipeline, exported: tuple[Path, Any]) -> None:
    _, done = exported
    graphs = {row.graph for row in done.parity}
    assert graphs >= {"encoder", "decoder", "modulation", "step", "forward", "sampler", "8 steps"}
    assert all(row.passed and (row.max_abs or 0) < 1e-3 for row in done.parity)


def test_what_graphs_are_compared_on_is_worn_as_in_training(pipeline: SuperResolutionPipeline) -> None:
    material = Material.gather(source_of(pipeline), count=3)
    assert material.pixels is not None and material.image_tokens is not None
    originals = ((material.pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    small = [degrade(each, 4, index=i, strength=0.5) for i, each in enumerate(originals)]
    patches = np.stack(small).reshape(3, 2, 2, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(3, 4, 12)
    # Each patch's own numbers, in whatever order the generator has them.
    expected = np.sort(patches / 127.5 - 1, axis=-1)
    np.testing.assert_allclose(np.sort(material.image_tokens.numpy(), axis=-1), expected, atol=1e-6)
    assert torch.equal(material.parted()[1].image_tokens, material.image_tokens[2:])  # type: ignore[arg-type]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_loaded_directory_enlarges_as_pytorch_does(
    pipeline: SuperResolutionPipeline, exported: tuple[Path, Any], guidance: float, fake_text_class: type
) -> None:
    loaded = load(exported[0], "cpu")
    assert isinstance(loaded, SuperResolutionPipeline)
    assert (loaded.size, loaded.patch_size, loaded.strength) == (4, 2, 0.5)
    loaded.tokenizer.text_encoder = fake_text_class()  # the export's own are of transformers
    data = load_dataset(DataConfig(source="shapes", image_size=16), "composition")
    small = np.stack([degrade(data[i].image, 4, index=i) for i in range(3)])
    options = SamplingOptions(steps=4, guidance_scale=guidance)
    for captions in (["a red cube", "a ball", ""], None):
        wanted = pipeline(small, captions, seed=3, options=options)
        made = loaded(small, captions, seed=3, options=options)
        torch.testing.assert_close(made.tokens, wanted.tokens, rtol=1e-3, atol=1e-4)
        assert (made.images.int() - wanted.images.int()).abs().max() <= 1
    with pytest.raises(InputError, match=r"\(B, 4, 4, 3\)"):
        loaded(np.zeros((1, 16, 16, 3), np.uint8))


def test_whole_pictures_are_timed(
    pipeline: SuperResolutionPipeline, exported: tuple[Path, Any], tmp_path: Path, loads_fake_text: Any
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    assert load_pipeline(tmp_path / "model").size == 4  # type: ignore[union-attr]
    result = run_deploy(DeployConfig((str(exported[0]),), str(tmp_path / "model"), steps=2, rounds=1, device="cpu"))
    pictures = [each for each in result.times if each.task == "picture, 2 steps"]
    assert len(pictures) >= 4 and all(each.median for each in pictures), result.to_markdown()


def test_the_server_refuses_before_anything_is_traced(pipeline: SuperResolutionPipeline, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(InputError, match=r"also reads small pictures\. Export it --to onnx or aoti"):
        export(source_of(pipeline), tmp_path / "out", to="triton-server", progress=said.append)
    assert not said and not list(tmp_path.iterdir())
