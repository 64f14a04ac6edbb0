"""``export`` to engines and to a server: complete directories, which ``load`` and the server run as PyTorch runs."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from textok_fast import InputError, TexTok

REASON = "ONNX export needs the extra 'export' (onnx, onnxscript, onnxruntime)"
pytest.importorskip("onnx", reason=REASON)
pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

import fake_tensorrt  # noqa: E402
import fake_triton  # noqa: E402
from tiny_export import tiny_dit  # noqa: E402

from textok_fast.cli import main  # noqa: E402
from textok_fast.export import Manifest, Source, export, load, tensorrt  # noqa: E402
from textok_fast.export.material import Material  # noqa: E402
from textok_fast.export.server import ServerOptions  # noqa: E402
from textok_fast.inference import SamplingOptions  # noqa: E402
from textok_fast.inference.pipelines import ClassToImagePipeline  # noqa: E402


@pytest.fixture(scope="module")
def saved(make_tokenizer: Callable[..., TexTok], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of classes that reads no captions."""
    tokenizer = make_tokenizer(encoder_depth=1, decoder_depth=1, text="none")
    return ClassToImagePipeline(tiny_dit(text_dim=0), tokenizer).save_pretrained(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TensorRT on a GPU that is the CPU."""
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module())
    monkeypatch.setattr(tensorrt, "this_gpu", lambda: ("sm_89", "NVIDIA L4"))
    monkeypatch.setattr(tensorrt, "gpu_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(tensorrt, "_stream", lambda device: 7)
    monkeypatch.setattr(tensorrt, "ALIGNMENT", fake_tensorrt.ALIGNMENT)
    yield
    sys.modules.pop("triton_python_backend_utils", None)


def test_engines_are_compared_and_loaded_as_the_pipeline(saved: Path, tmp_path: Path, gpu: None) -> None:
    from textok_fast.inference import load_pipeline

    out = tmp_path / "out"
    exported = export(saved, out, "tensorrt", pictures=2, profiles=[{"batch": (1, 2, 4)}])
    assert [(row.graph, row.output, row.passed) for row in exported.parity if "steps" in row.graph] == [
        (name, output, True) for name in ("8 steps", "8 steps of the engines") for output in ("tokens", "pictures")
    ]
    rows = {row.graph: row for row in exported.parity if "steps" not in row.graph}
    engines = [name for name in rows if name.endswith(".engine")]
    assert sorted(engines) == [f"{name}.engine" for name in ("decoder", "encoder", "forward", "modulation", "sampler", "step")]
    assert all(rows[name].passed and rows[name].cases for name in engines)
    assert "| decoder.engine | pixels | fp32 |" in (out / "parity.md").read_text()
    assert "2 inputs from: 2 scenes" in (out / "parity.md").read_text()
    manifest = Manifest.read(out)
    for name in engines:
        file = out / name
        assert manifest.files[name]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert Manifest.read(out).to == "tensorrt" and {path.name for path in out.iterdir()} <= Manifest.read(out).owned
    pipeline, options = load(out), SamplingOptions(steps=3, guidance_scale=2.0)
    assert isinstance(pipeline, ClassToImagePipeline)
    got = pipeline([1, 4, 2, 0, 3], seed=[1, 2, 3, 4, 5], options=options)  # more than the engines' batch
    wanted = load_pipeline(saved)([1, 4, 2, 0, 3], seed=[1, 2, 3, 4, 5], options=options)
    torch.testing.assert_close(got.tokens, wanted.tokens, rtol=1e-4, atol=1e-4)
    assert int((got.images.int() - wanted.images.int()).abs().max()) <= 1


def test_an_engine_that_cannot_be_built_leaves_its_log(
    saved: Path, tmp_path: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module(fails="no room"))
    with pytest.raises(
        InputError, match=r"could not build decoder.onnx for sm_89: no room \(all it said: .*out.decoder.engine.log"
    ):
        export(saved, tmp_path / "out", "tensorrt", what="decoder", pictures=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out.decoder.engine.log"]
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(InputError, match="tensorrt is not installed"):
        export(saved, tmp_path / "out", "tensorrt", pictures=2)


def test_quantized_engines_are_compared_on_what_nothing_was_calibrated_on(
    saved: Path, tmp_path: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake engine runs the ONNX file: on the same inputs it has the same errors."""
    gathered: list[int] = []
    gather = Material.gather

    def counted(source: Source, images: str | Path | None = None, count: int = 8) -> Material:
        gathered.append(count)
        return gather(source, images, count)

    monkeypatch.setattr(Material, "gather", counted)
    rows = {
        row.graph: row
        for row in export(saved, tmp_path / "out", "tensorrt", what="decoder", precision="int8", pictures=4).parity
    }
    assert gathered == [8]  # once: 4 to calibrate on and 4 others, at most a third
    one, other = rows["decoder"], rows["decoder.engine"]
    assert one.cases == other.cases == 1
    assert (one.max_abs, one.relative, one.psnr) == pytest.approx((other.max_abs, other.relative, other.psnr), rel=0.01)
    assert "on 2 inputs from" in (note := (tmp_path / "out" / "parity.md").read_text())
    assert "calibrated (percentile) on 6 others" in note
    export(
        saved,
        tmp_path / "out",
        "onnx",
        what="decoder",
        precision="int8",
        pictures=1,
        images=one_picture(tmp_path),
        tolerance=1.0,
    )
    assert "calibrated (percentile) on the same picture" in (tmp_path / "out" / "parity.md").read_text()


def one_picture(directory: Path) -> Path:
    from PIL import Image

    folder = directory / "photos"
    folder.mkdir()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(folder / "red.png")
    (folder / "red.txt").write_text("red")
    return folder


def test_what_engines_cannot_be_built_with_is_said_first(
    saved: Path, tmp_path: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt.module("tensorrt_rtx"))
    said: list[str] = []
    for to, options, message in (
        ("tensorrt", {"profiles": [{"batch": (4, 2, 1)}]}, r"sizes of 'batch' must be three, .* got \(4, 2, 1\)"),
        ("tensorrt", {"targets": ["sm_80"]}, "builds for the GPU at hand, sm_89, got targets sm_80"),
        ("tensorrt-rtx", {"targets": ["sm_1"]}, "got sm_1"),
        ("tensorrt-rtx", {"targets": []}, "give each target once"),
        ("tensorrt-rtx", {"timing_cache": tmp_path / "times"}, r"keeps no timing cache: leave timing_cache \(--timing-cache\)"),
    ):
        with pytest.raises(InputError, match=message):
            export(saved, tmp_path / "out", to, progress=said.append, **options)
    monkeypatch.setattr(tensorrt, "this_gpu", lambda: None)
    with pytest.raises(InputError, match="and here is none; tensorrt-rtx needs none"):
        export(saved, tmp_path / "out", "tensorrt", progress=said.append)
    assert not said and not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_command_builds_engines_without_a_gpu(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["export", "--model", str(saved), "--what", "generator", "--to", "tensorrt-rtx", "--precision", "fp16"]
    assert main([*command, "--pictures", "2", "--targets", "sm_80", "sm_120", "--batch", "1", "2", "4", "--out", str(out)]) == 0
    assert "| step.engine | output | fp16 | 0 |" in capsys.readouterr().out
    for name in ("forward", "modulation", "sampler", "step"):
        about = tensorrt.read_about(out / f"{name}.engine")
        assert (about.precision, about.targets) == ("fp16", ["sm_80", "sm_120"])
        assert about.profiles[0].get("batch", [1, 2, 4]) == [1, 2, 4]
    assert set(tensorrt.read_about(out / "forward.engine").profiles[0]) == {"batch"}  # one batch, of x and of t alike
    with pytest.raises(InputError, match="torch sees no GPU"):
        load(out)


def test_a_server_serves_what_the_pipeline_draws(saved: Path, tmp_path: Path, gpu: None) -> None:
    from textok_fast.inference import load_pipeline

    out = tmp_path / "out"
    exported = export(saved, out, "triton-server", pictures=2, server=ServerOptions(steps=(3,), guidance_scale=2.0))
    assert list(exported.manifest.files) == ["decoder", "encoder", "generate", "generator"]
    assert {path.name for path in out.iterdir()} == Manifest.read(out).owned
    served = fake_triton.Server(out / "model_repository")
    (got,) = served.infer({"label": [1, 4], "seed": [1, 2]})
    wanted = load_pipeline(saved)([1, 4], seed=[1, 2], options=SamplingOptions(steps=3, guidance_scale=2.0))
    np.testing.assert_allclose(got["tokens"], wanted.tokens.numpy(), rtol=1e-4, atol=1e-4)
    export(saved, out, "triton-server", what="decoder", pictures=2)  # in its place
    assert [path.name for path in (out / "model_repository").iterdir()] == ["decoder"]
    with pytest.raises(InputError, match="exported to triton-server, which .*load does not run"):
        load(out)
