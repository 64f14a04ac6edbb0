"""What an exported directory holds is checked before anything of it runs, and it takes no place that is in use."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from textok_fast import InputError, TexTok
from textok_fast.inference.pipelines import ClassToImagePipeline
from textok_fast.modeling.dit import DiT

REASON = "ONNX export needs the extra 'export' (onnx, onnxscript, onnxruntime)"
pytest.importorskip("onnx", reason=REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

from tiny_export import tiny_dit  # noqa: E402

from textok_fast.evaluation.deploy import DeployConfig, run_deploy  # noqa: E402
from textok_fast.export import Manifest, Source, directory, export, load, runtime, tensorrt  # noqa: E402
from textok_fast.export.directory import replaced, sha256  # noqa: E402
from textok_fast.export.server import write_repository  # noqa: E402


@pytest.fixture(scope="module")
def saved(make_tokenizer: Callable[..., TexTok], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of classes over a VQ tokenizer that reads no captions: "model", and exported, "out"."""
    place = tmp_path_factory.mktemp("exported")
    tokenizer = make_tokenizer(text="none", bottleneck="vq", encoder_depth=1, decoder_depth=1)
    ClassToImagePipeline(tiny_dit(text_dim=0), tokenizer).save_pretrained(place / "model")
    export(place / "model", place / "out", pictures=1)
    return place


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    """The export, each file of it a link that a test may replace."""
    place = tmp_path / "out"
    place.mkdir()
    for path in (saved / "out").iterdir():
        (place / path.name).symlink_to(path)
    return place


def rewrite(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((out / "export.json").read_text())
    change(content)
    (out / "export.json").unlink()
    (out / "export.json").write_text(json.dumps(content))


def test_a_codebook_is_part_of_it(out: Path) -> None:
    assert "bottleneck.safetensors" in Manifest.read(out).files
    state = load_file(out / "bottleneck.safetensors")
    (out / "bottleneck.safetensors").unlink()
    with pytest.raises(InputError, match="is not complete: bottleneck.safetensors is missing or cut short"):
        load(out, "cpu")
    rewrite(out, lambda content: content["files"].pop("bottleneck.safetensors"))  # as an export before it was listed
    with pytest.raises(InputError, match="is not complete: bottleneck.safetensors, the codebook, is missing"):
        load(out, "cpu")
    (out / "bottleneck.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="cannot read .*bottleneck.safetensors"):
        load(out, "cpu")
    save_file({name: value[:1].clone() for name, value in state.items()}, out / "bottleneck.safetensors")
    with pytest.raises(InputError, match="bottleneck.safetensors is of another tokenizer"):
        load(out, "cpu")


def test_a_directory_that_was_tampered_with(out: Path) -> None:
    for change, said in (
        (lambda content: content.update(files=[]), "files is no object"),
        (lambda content: content["files"]["decoder"].pop("bytes"), "no file, bytes and sha256 for 'decoder'"),
        (lambda content: content["files"]["decoder"].update(bytes="9"), "no file, bytes and sha256 for 'decoder'"),
        (lambda content: content["files"]["decoder"].update(file="../x/decoder.onnx"), "'../x/decoder.onnx' does not lie in"),
        (lambda content: content["files"]["decoder"].update(file="/decoder.onnx"), "'/decoder.onnx' does not lie in"),
        (lambda content: content.update(parts=[".."]), "parts is no list of names in the directory"),
        (lambda content: content.update(generator=[]), "generator is no object"),
    ):
        before = (out / "export.json").read_text()
        rewrite(out, change)
        with pytest.raises(InputError, match=f"export.json is damaged: .*{said}"):
            load(out, "cpu")
        (out / "export.json").write_text(before)


def test_a_server_is_given_complete_exports_alone(out: Path, tmp_path: Path) -> None:
    whole = (out / "decoder.onnx").read_bytes()
    (out / "decoder.onnx").unlink()
    (out / "decoder.onnx").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="is damaged: decoder.onnx is not what was exported"):
        write_repository(out, tmp_path / "served")
    rewrite(out, lambda content: content.update(to="aoti"))
    with pytest.raises(InputError, match="was exported to aoti, which the server is not given"):
        write_repository(out, tmp_path / "served")
    with pytest.raises(InputError, match="providers are ONNX Runtime's"):
        load(out, "cpu", "cpu", verify=False)
    assert not (tmp_path / "served").exists()


def test_the_text_encoders_tokenizer_is_never_asked_for_elsewhere(tmp_path: Path) -> None:
    about = {"name": "tiny", "identity": "x", "dim": 8, "special": 2, "max_positions": 32}
    given = (about, lambda *given: [], torch.device("cpu"), 8, "", False)
    with pytest.raises(InputError, match="is not complete: text_tokenizer is missing"):
        runtime.ExportedTextEncoder(tmp_path / "text_tokenizer", *given)
    (tmp_path / "text_tokenizer").mkdir()
    with pytest.raises(InputError, match="cannot read the tokenizer in"):
        runtime.ExportedTextEncoder(tmp_path / "text_tokenizer", *given)


def test_digests_are_of_what_a_file_holds_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "weights", []
    real = hashlib.file_digest
    monkeypatch.setattr(directory.hashlib, "file_digest", lambda file, kind: read.append(1) or real(file, kind))
    path.write_bytes(b"one")
    old = time.time_ns() - 10**9
    os.utime(path, ns=(old, old))
    assert sha256(path) == sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 1  # shared weights of several graphs are read once
    path.write_bytes(b"two")
    assert sha256(path) == sha256(path) == hashlib.sha256(b"two").hexdigest()
    assert len(read) == 3  # one that has just been written may be written again unseen


def test_the_working_directory_is_refused_before_anything_is_done(
    make_tokenizer: Callable[..., TexTok], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for name in (".", "..", str(tmp_path / "in")):
        with pytest.raises(InputError, match="is, or holds, the working directory; give a new one"):
            export(Source(make_tokenizer(text="none")), name, what="decoder")
    with replaced(Path("../in/new")) as work:
        (work / "file").write_text("")
    assert (tmp_path / "in" / "new" / "file").exists()


# -- what load returns ---------------------------------------------------------------------------------------------------------


def test_a_loaded_pipeline_has_the_models_ways_but_not_its_weights(saved: Path, tmp_path: Path) -> None:
    pipeline = load(saved / "out", "cpu")
    assert isinstance(pipeline, ClassToImagePipeline) and pipeline._engines is not None
    tokenizer, model = pipeline._engines[1], TexTok.from_pretrained(saved / "model" / "tokenizer")
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(tokenizer.preprocess(images), model.preprocess(images))
    x = torch.randn(2, 3, 4)
    assert torch.equal(tokenizer.normalize(x), model.normalize(x)) and torch.equal(
        tokenizer.denormalize(x), model.denormalize(x)
    )
    assert torch.equal(tokenizer.latent_mean, model.latent_mean) and torch.equal(tokenizer.latent_std, model.latent_std)
    assert tokenizer.text_features(None, 2) is None
    for each in (pipeline, pipeline.generator, pipeline.tokenizer):
        with pytest.raises(InputError, match="do not give their weights: save the one it was exported from"):
            each.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_deploy_times_whole_pictures_and_the_right_model(saved: Path, tmp_path: Path) -> None:
    directories = (str(saved / "out"),)
    result = run_deploy(DeployConfig(directories, str(saved / "model"), steps=2, rounds=1, device="cpu"))
    pictures = [each for each in result.times if each.task == "picture, 2 steps"]
    assert [each.contestant.split(" (")[0] for each in pictures if not each.contestant.startswith("engine")] == [
        "PyTorch fp32",
        "onnx fp32",
        "onnx fp32",
    ]
    assert pictures[-1].contestant.endswith("out), without sampler.onnx")
    assert all(each.median for each in pictures), result.to_markdown()
    DiT(tiny_dit(num_classes=7, text_dim=0).config).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="another generator than .*other: its num_classes is 5, wanted 7"):
        run_deploy(DeployConfig(directories, str(tmp_path / "other"), rounds=1, device="cpu"))


# -- ONNX Runtime --------------------------------------------------------------------------------------------------------------


def test_inputs_that_a_graph_does_not_take(saved: Path) -> None:
    program = runtime.OnnxProgram(saved / "out" / "step.onnx", torch.device("cpu"))
    x, rows = torch.zeros(2, 3, 4), torch.zeros(2, 8 * 16)
    (first,), (second,) = program(x, rows), program(x + 1, rows)
    assert first.data_ptr() != second.data_ptr() and not torch.equal(first, second)  # a result is its caller's
    assert program(x[:0], rows[:0])[0].shape == (0, *first.shape[1:])
    for given, said in (
        ((torch.zeros(2, 3, 5), rows), r"x of step.onnx must be \(batch, 3, 4\), got \(2, 3, 5\)"),
        ((x, rows[:1]), r"rows of step.onnx must be \(batch, 128\), got \(1, 128\)"),
        ((x[0], rows), r"must be \(batch, 3, 4\), got \(3, 4\)"),
        ((x.double(), rows), "x of step.onnx must be float32 on cpu, got float64"),
        ((x,), "step.onnx takes x, rows; got 1 tensors"),
    ):
        with pytest.raises(InputError, match=said):
            program(*given)
    program._session = None  # whatever it raises
    with pytest.raises(InputError, match="ONNX Runtime cannot run step.onnx on these inputs: 'NoneType'"):
        program(x, rows)
    said = "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for " + "Cast " * 99
    assert runtime._said(Exception(said)).startswith("Could not find an") and len(runtime._said(Exception(said))) == 120


class FakeStream:
    """torch's streams, which note who waits for whom."""

    log: ClassVar[list[str]] = []

    def __init__(self, device: Any = None, name: str = "own") -> None:
        self.name, self.cuda_stream = name, 4711

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A GPU that is the CPU, and sessions that note what they are made with and run on the CPU."""
    made: dict[str, Any] = {"got": None, "current": FakeStream(name="current")}
    FakeStream.log.clear()
    real, empty = onnxruntime.InferenceSession, torch.empty

    class Binding:
        def __init__(self, binding: Any) -> None:
            self.binding, self.bound = binding, []

        def bind_input(self, name: str, kind: str, *rest: Any) -> None:
            assert kind == "cuda"
            self.bound.append(name)
            self.binding.bind_input(name, "cpu", *rest)

        def bind_output(self, name: str, kind: str, *rest: Any) -> None:
            self.binding.bind_output(name, "cpu", *rest)

    class Session:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            made["providers"] = providers
            self.session = real(path, options, providers=["CPUExecutionProvider"])
            self.get_inputs, self.get_outputs = self.session.get_inputs, self.session.get_outputs

        def get_providers(self) -> list[str]:
            return made["got"] or [each if isinstance(each, str) else each[0] for each in made["providers"]]

        def io_binding(self) -> Binding:
            made["binding"] = Binding(self.session.io_binding())
            return made["binding"]

        def run_with_iobinding(self, binding: Binding, options: Any) -> None:
            assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
            FakeStream.log.append("run")
            self.session.run_with_iobinding(binding.binding)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made["current"])
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **kind: empty(*size, **kind))
    monkeypatch.setenv("TEXTOK_CACHE", str(tmp_path / "cache"))
    return made


def test_a_session_on_a_gpu(saved: Path, faked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.OnnxProgram, "_check", lambda self, name, dtype, shape, x, sizes: sizes.update(batch=len(x)))
    path = saved / "out" / "step.onnx"
    program = runtime.OnnxProgram(path, torch.device("cuda", 1))
    cuda, cpu = faked["providers"]
    assert cpu == "CPUExecutionProvider" and cuda[0] == "CUDAExecutionProvider"
    assert cuda[1] == {"device_id": 1, "user_compute_stream": "4711", "use_tf32": 0}
    x, rows = torch.randn(2, 3, 4), torch.randn(2, 128)
    (wanted,) = runtime.OnnxProgram.__call__(program, x, rows)
    assert FakeStream.log == ["own waits for current", "run", "current waits for own"]
    faked["current"] = FakeStream(name="another")  # a call belongs to the stream it is made under
    faked_log, bound = len(FakeStream.log), len(program._binding.bound)
    (again,) = program(x, rows)
    assert FakeStream.log[faked_log:] == ["own waits for another", "run", "another waits for own"]
    assert torch.equal(again, wanted) and len(program._binding.bound) == bound == 2  # what lies where it lay stays bound
    program(x.clone(), rows)
    assert program._binding.bound[2:] == ["x"]


def test_a_provider_that_does_not_start_is_not_passed_over(saved: Path, faked: dict[str, Any]) -> None:
    faked["got"] = ["CPUExecutionProvider"]
    with pytest.raises(InputError, match="did not start CUDAExecutionProvider for .*, only CPUExecutionProvider"):
        runtime.OnnxProgram(saved / "out" / "decoder.onnx", torch.device("cuda", 0))


def test_the_tensorrt_provider_keeps_its_engines_in_the_cache(saved: Path, faked: dict[str, Any], tmp_path: Path) -> None:
    path = saved / "out" / "sampler.onnx"
    runtime.OnnxProgram(path, torch.device("cuda", 0), "tensorrt")
    (name, options), *others = faked["providers"]
    assert name == "TensorrtExecutionProvider" and [each[0] for each in others] == ["CUDAExecutionProvider", "C"]
    cache = Path(options["trt_engine_cache_path"])
    assert cache.is_dir() and cache == tmp_path / "cache" / "onnxruntime-tensorrt" / sha256(path)[:16]
    low, _, high = tensorrt.PROFILE["batch"]
    for which, batch, evaluations in (("min", low, 1), ("max", high, 1000)):
        sizes = dict(each.split(":") for each in options[f"trt_profile_{which}_shapes"].split(","))
        assert (sizes["x"], sizes["table"], sizes["index"]) == (f"{batch}x3x4", f"{evaluations}x8", "1")


def test_a_provider_is_never_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for provider in ("cuda", "tensorrt"):
        with pytest.raises(InputError, match="this build of ONNX Runtime has no .*install onnxruntime-gpu"):
            runtime.place(None, provider)
    assert runtime.place(None, "") == torch.device("cpu")  # nobody has named a provider
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(runtime.PROVIDERS.values()))
    assert runtime.place("auto", "tensorrt") == runtime.place(None, "") == torch.device("cuda", 0)
