"""``export`` to engines and to a server: complete directories, which ``load`` and the server run as PyTorch runs."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
from textok_fast.export import Manifest, Source, export, load, refit, tensorrt  # noqa: E402
from textok_fast.export.material import Material  # noqa: E402
from textok_fast.export.server import ServerOptions  # noqa: E402
from textok_fast.inference import SamplingOptions  # noqa: E402
from textok_fast.inference.pipelines import ClassToImagePipeline  # noqa: E402
from textok_fast.inference.tokenizer import TokenizerEngine  # noqa: E402


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


def test_a_later_checkpoints_weights_go_into_the_engines(
    make_tokenizer: Callable[..., TexTok], saved: Path, tmp_path: Path, gpu: None
) -> None:
    first, later = (make_tokenizer(encoder_depth=1, decoder_depth=1, text="none") for _ in range(2))
    with torch.no_grad():
        for parameter in later.decoder.parameters():
            parameter.mul_(1.1)
    later.set_latent_statistics(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([2.0, 1.0, 0.5, 1.0]))
    export(Source(first), tmp_path / "engines", "tensorrt", what="decoder", pictures=1, refit=True)
    export(Source(later), tmp_path / "later", what="decoder", pictures=1)
    loaded, tokens = load(tmp_path / "engines"), torch.randn(2, 3, 4)
    assert isinstance(loaded, TokenizerEngine)
    torch.testing.assert_close(loaded.decode(tokens), first.decode(tokens), rtol=1e-4, atol=1e-4)
    refit(loaded, tmp_path / "later")
    torch.testing.assert_close(loaded.decode(tokens), later.decode(tokens), rtol=1e-4, atol=1e-4)
    assert torch.equal(loaded.latent_std, later.latent_std)
    # An engine that is built again is noted in export.json.
    engine = tmp_path / "engines" / "decoder.engine"
    whole = engine.read_bytes()
    engine.unlink()
    load(tmp_path / "engines")
    assert engine.read_bytes() == whole
    for entry in Manifest.read(tmp_path / "engines").files.values():
        assert (tmp_path / "engines" / entry["file"]).stat().st_size == entry["bytes"]
    with pytest.raises(InputError, match="only engines of TensorRT and TensorRT-RTX take other weights"):
        refit(load(tmp_path / "later", "cpu"), tmp_path / "later")
    manifest = Manifest.read(tmp_path / "later")
    assert manifest.tokenizer is not None
    manifest.tokenizer["mlp_ratio"] = 3.0
    manifest.write(tmp_path / "later")
    with pytest.raises(InputError, match="later holds another tokenizer: mlp_ratio is 3.0"):
        refit(loaded, tmp_path / "later")


def test_the_commands_options_reach_engines_and_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: dict[str, Any] = {}

    def stop(model: str, out: Path, to: str, **options: Any) -> None:
        told.update(options, to=to)
        raise InputError("far enough")

    monkeypatch.setattr("textok_fast.export.export", stop)

    def command(line: str) -> str:
        assert main(["export", "--model", "m", "--out", str(tmp_path / "out"), *line.split()]) == 2
        return capsys.readouterr().err

    engines = "--to tensorrt --profile batch=1,1,2 --profile batch=1,8,32 text_length=1,16,77 --refit --workspace 512 --level 2"
    assert "far enough" in command(engines)
    assert told["profiles"] == [{"batch": (1, 1, 2)}, {"batch": (1, 8, 32), "text_length": (1, 16, 77)}]
    assert (told["refit"], told["workspace"], told["level"]) == (True, 512 << 20, 2)
    served = "--backend tensorrt --kind gpu --max-batch 8 --queue-delay 9 --instances 2 --sampler ddim --steps 20 10"
    assert "far enough" in command(f"--to triton-server {served} --guidance-scale 3")
    wanted = ServerOptions("tensorrt", 8, 9, 2, "gpu", "ddim", [20, 10], 3.0)
    assert told["server"] == wanted
    for line, said in (
        ("--to onnx --max-batch 3", "--max-batch is of --to triton-server, this is an export to onnx"),
        ("--to triton-server --max-batch 0", "max_batch and instances must be at least 1"),
        ("--to tensorrt --profile batch=1,2", "a profile's sizes are NAME=LEAST,USUAL,MOST"),
        ("--to tensorrt --profile batch=1,2,3 --batch 1 2 3", "give one kind or the other"),
    ):
        assert said in " ".join(command(line).split())


def test_a_server_of_engines(saved: Path, tmp_path: Path, gpu: None) -> None:
    options = ServerOptions("tensorrt", max_batch=6)
    export(saved, tmp_path / "out", "triton-server", what="decoder", pictures=1, server=options)
    place = tmp_path / "out" / "model_repository" / "decoder"
    assert (place / "1" / "model.plan").read_bytes().startswith(fake_tensorrt.HEADER)
    config = fake_triton.parse((place / "config.pbtxt").read_text())
    assert (config["platform"], config["max_batch_size"]) == (["tensorrt_plan"], [6])


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
