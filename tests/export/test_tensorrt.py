"""Engines: built by TensorRT-RTX where it is installed, which needs no GPU; run, refused and rebuilt over a fake of its API."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from textok_fast import InputError

REASON = "ONNX export needs the extra 'export' (onnx, onnxscript, onnxruntime)"
onnx = pytest.importorskip("onnx", reason=REASON)
pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

import fake_tensorrt  # noqa: E402
from tiny_export import NAMES, export_once  # noqa: E402

from textok_fast.export import tensorrt  # noqa: E402
from textok_fast.export.tensorrt import (  # noqa: E402
    FP8_TARGETS,
    TARGETS,
    BuildOptions,
    EngineProgram,
    build_engines,
    load_engine,
    read_about,
    why_not_here,
)

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install 'textok-fast[tensorrt-rtx]'"
)
GPU = ("sm_89", "NVIDIA L4")
SIZES = {"batch": (1, 2, 4), "text_length": (1, 4, 8)}


@pytest.fixture(scope="module")
def exported(make_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_once(make_tokenizer, tmp_path_factory)


# -- TensorRT-RTX itself -------------------------------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize("target", TARGETS)
def test_encoder_decoder_and_generator_build_for_every_target_without_a_gpu(
    exported: Path, tmp_path: Path, target: str
) -> None:
    built = build_engines(exported, "tensorrt-rtx", options=BuildOptions([SIZES], targets=[target]), out=tmp_path)
    assert [engine.path.name for engine in built] == [f"{name}.engine" for name in NAMES]
    for path, about in built:
        data = path.read_bytes()
        assert (about.bytes, about.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert (about.targets, about.gpu, about.precision) == ([target], None, "fp32")
        assert about.sources == {about.onnx: hashlib.sha256((exported / about.onnx).read_bytes()).hexdigest()}
        assert about.profiles == [{name: list(size) for name, size in SIZES.items()}]
        assert read_about(path) == about  # what lies beside it
        assert "INFO: " in path.with_name(f"{path.name}.log").read_text(encoding="utf-8")
    about = built[2].about
    assert about.inputs["text"] == ["float32", ["batch", "text_length", 8]]
    assert {name: dtype for name, (dtype, _) in about.inputs.items()} == {
        "x": "float32",
        "t": "float32",
        "y": "int64",
        "text": "float32",
        "text_mask": "bool",
    }
    assert list(about.outputs) == ["output"]


@needs_rtx
def test_one_engine_serves_all_targets_and_several_profiles(exported: Path, tmp_path: Path) -> None:
    options = BuildOptions([{"batch": (1, 1, 1)}, SIZES])
    ((path, about),) = build_engines(exported, "tensorrt-rtx", ["decoder"], options, tmp_path)
    assert about.targets == ([tensorrt.this_gpu()[0]] if torch.cuda.is_available() else list(TARGETS))  # type: ignore[index]
    assert [sizes["batch"] for sizes in about.profiles] == [[1, 1, 1], [1, 2, 4]]
    assert about.profiles[0]["text_length"] == [1, 32, 256]  # where a profile is silent
    assert path.stat().st_size == about.bytes


@needs_rtx
def test_fp8_is_built_for_the_gpus_that_have_it(tmp_path: Path) -> None:
    quantized(tmp_path / "linear.onnx")
    options = BuildOptions(targets=None if not torch.cuda.is_available() else FP8_TARGETS)
    ((_, about),) = build_engines(tmp_path, "tensorrt-rtx", options=options)
    assert (about.precision, about.targets) == ("fp8", list(FP8_TARGETS))


@needs_rtx
def test_what_cannot_be_built_is_refused_with_the_reason(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "this_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def build(**options: Any) -> None:
        build_engines(exported, "tensorrt-rtx", ["decoder"], BuildOptions(**options), tmp_path)

    with pytest.raises(InputError, match=r"builds for .*sm_89.*, got sm_90$"):
        build(targets=["sm_90"])
    with pytest.raises(InputError, match="give each target once"):
        build(targets=["sm_80", "sm_80"])
    with pytest.raises(InputError, match="on a GPU only, and here is none"):
        build(refit=True)
    with pytest.raises(InputError, match="'batch' must be three, 1 <= smallest"):
        build(profiles=[{"batch": (0, 1, 2)}])
    with pytest.raises(InputError, match=r"holds no sampler.onnx; it has decoder, encoder, forward"):
        build_engines(exported, "tensorrt-rtx", ["sampler"], out=tmp_path)
    with pytest.raises(InputError, match="holds no ONNX file: run textok-fast export"):
        build_engines(tmp_path, "tensorrt-rtx")
    model = onnx.load(str(exported / "decoder.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "many"
    onnx.save(model, str(tmp_path / "renamed.onnx"))
    with pytest.raises(InputError, match="axis 0 of 'tokens' free under the name 'many'"):
        build_engines(tmp_path, "tensorrt-rtx")
    node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    node.op_type, node.domain = "NoSuchOperator", "elsewhere"
    model.opset_import.add(domain="elsewhere", version=1)
    onnx.save(model, str(tmp_path / "renamed.onnx"))
    with pytest.raises(InputError, match=r"cannot read .*renamed.onnx: .*NoSuchOperator"):
        build_engines(tmp_path, "tensorrt-rtx")
    assert not list(tmp_path.glob("*.engine"))


@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_loading_says_that_there_is_no_gpu(exported: Path, tmp_path: Path) -> None:
    build_engines(exported, "tensorrt-rtx", ["decoder"], BuildOptions([SIZES]), tmp_path)
    with pytest.raises(InputError, match="torch sees no GPU"):
        load_engine(tmp_path, "decoder")
    with pytest.raises(InputError, match="run on a GPU, got device 'cpu'"):
        load_engine(tmp_path, "decoder", "cpu")


def quantized(path: Path) -> None:
    """x (batch, 32) -> x W with both in FP8 by Q/DQ pairs."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weight = (torch.randn(32, 16) * 0.1).numpy()
    zero = helper.make_tensor("zero", onnx.TensorProto.FLOAT8E4M3FN, [], [0.0])
    pairs = [
        helper.make_node(kind, [source, scale, "zero"], [target])
        for name, scale in (("x", "sx"), ("w", "sw"))
        for kind, source, target in (("QuantizeLinear", name, f"{name}q"), ("DequantizeLinear", f"{name}q", f"{name}d"))
    ]
    float_ = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [*pairs, helper.make_node("MatMul", ["xd", "wd"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", float_, ["batch", 32])],
        [helper.make_tensor_value_info("y", float_, ["batch", 16])],
        [
            numpy_helper.from_array(weight, "w"),
            zero,
            helper.make_tensor("sx", float_, [], [0.02]),
            helper.make_tensor("sw", float_, [], [0.001]),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(path))


# -- the API, faked ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Installs a fake tensorrt or tensorrt_rtx of given behaviour, whose GPU is the CPU."""

    def install(name: str = "tensorrt", **behaviour: Any) -> Any:
        module = fake_tensorrt.module(name, **behaviour)
        monkeypatch.setitem(__import__("sys").modules, name, module)
        return module

    monkeypatch.setattr(tensorrt, "this_gpu", lambda: GPU)
    monkeypatch.setattr(tensorrt, "gpu_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(tensorrt, "_stream", lambda device: 7)
    monkeypatch.setattr(tensorrt, "ALIGNMENT", fake_tensorrt.ALIGNMENT)
    yield install
    gc.collect()  # programs that write their caches when they go


@pytest.fixture
def decoder(exported: Path, tmp_path: Path) -> Path:
    shutil.copy(exported / "decoder.onnx", tmp_path)
    return tmp_path


def given(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length // 2 :] = False
    return torch.randn(batch, 3, 4), torch.randn(batch, length, 8), mask


def expected(decoder: Path, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(decoder / "decoder.onnx"), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0])


def test_what_the_builder_is_told(fake: Callable[..., Any], decoder: Path) -> None:
    trt = fake()
    times = decoder / "cache" / "times"
    options = BuildOptions([SIZES], refit=True, workspace=1 << 30, timing_cache=times, level=4)
    ((path, about),) = build_engines(decoder, options=options)
    config = trt.calls["config"]
    assert config.flags == [fake_tensorrt.Flag.REFIT]
    assert config.workspace == (fake_tensorrt.Flag.WORKSPACE, 1 << 30)
    assert config.builder_optimization_level == 4
    assert config.profiles[0]["text"] == ((1, 1, 8), (2, 4, 8), (4, 8, 8))
    assert (about.to, about.version, about.targets, about.gpu) == ("tensorrt", "10.0", ["sm_89"], "NVIDIA L4")
    assert (about.precision, about.refit, about.workspace, about.level) == ("fp16", True, 1 << 30, 4)
    assert (path.with_name("decoder.engine.log")).read_text() == "INFO: timing kernels\n"
    assert times.read_bytes() == b"+"
    build_engines(decoder, options=options)
    assert times.read_bytes() == b"++"  # read, added to and written again
    times.write_bytes(b"other version")
    build_engines(decoder, options=options)
    assert times.read_bytes() == b"+"


def test_captions_are_as_long_as_the_models_take_them(fake: Callable[..., Any], decoder: Path) -> None:
    fake()
    shutil.copy(decoder / "decoder.onnx", decoder / "text.onnx")
    for text, longest in (({"special": 2, "max_positions": 512}, 79), ({"special": 2, "max_positions": 77}, 77), (None, 77)):
        about = {"format": 1, "to": "onnx", "precision": "fp32", "files": {}}
        (decoder / "export.json").write_text(json.dumps({**about, "tokenizer": {"max_text_tokens": 77}, "text": text}))
        built = {path.stem: made.profiles[0]["text_length"] for path, made in build_engines(decoder)}
        assert built == {"decoder": [1, 32, 77], "text": [1, 32, longest]}
    (decoder / "export.json").write_text(json.dumps({**about, "tokenizer": {"max_text_tokens": 20}}))
    assert build_engines(decoder, names=["decoder"])[0].about.profiles[0]["text_length"] == [1, 20, 20]


def test_full_tensorrt_builds_for_the_gpu_at_hand_alone(
    fake: Callable[..., Any], decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    with pytest.raises(InputError, match="builds for the GPU at hand, sm_89, got targets sm_80"):
        build_engines(decoder, options=BuildOptions(targets=["sm_80"]))
    monkeypatch.setattr(tensorrt, "this_gpu", lambda: None)
    with pytest.raises(InputError, match="and here is none; tensorrt-rtx needs none"):
        build_engines(decoder)


def test_a_build_that_fails_says_why_and_leaves_its_log(fake: Callable[..., Any], decoder: Path) -> None:
    fake(fails="no implementation\nfor node_Attention")
    with pytest.raises(InputError, match=r"could not build decoder.onnx for sm_89: no implementation for node_Attention \(all"):
        build_engines(decoder)
    assert "ERROR: no implementation" in (decoder / "decoder.engine.log").read_text()
    assert not (decoder / "decoder.engine").exists()


def test_modules_that_are_not_there(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in tensorrt.MODULES.items():
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(InputError, match=f"{name} is not installed .*pip install {name}$"):
            build_engines(exported, name)
    with pytest.raises(InputError, match="for tensorrt or tensorrt-rtx, got 'onnx'"):
        build_engines(exported, "onnx")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_a_program_runs_on_the_memory_of_its_inputs(fake: Callable[..., Any], decoder: Path, name: str) -> None:
    trt = fake(name)
    to = name.replace("_", "-")
    build_engines(decoder, to, options=BuildOptions([{**SIZES, "batch": (1, 1, 1)}, SIZES]))
    program = load_engine(decoder, "decoder")
    assert trt.calls["profiles_set"] == [0, 1]
    for batch, length, profile in ((1, 5, 0), (3, 8, 1)):
        inputs = given(batch, length)
        (pixels,) = program(*inputs)
        torch.testing.assert_close(pixels, expected(decoder, inputs))
        assert trt.calls["profile"] == profile
        assert {key: trt.calls["addresses"][key] for key in program.inputs} == {
            key: tensor.data_ptr() for key, tensor in zip(program.inputs, inputs, strict=True)
        }, "inputs were copied"
    assert trt.calls["streams"] == [7, 7]
    # None in the place of an input the engine lacks, other layouts and types, and addresses between the alignment.
    tokens, text, mask = given(2, 4)
    shifted = torch.cat([torch.zeros(1), tokens.flatten()])[1:].view_as(tokens)
    (pixels,) = program(shifted.double(), None, text.transpose(0, 1).contiguous().transpose(0, 1), mask)
    torch.testing.assert_close(pixels, expected(decoder, (tokens, text, mask)))
    assert list(program.run({"text_mask": mask, "tokens": tokens, "text": text})) == ["pixels"]


def test_a_program_runs_on_its_own_device(fake: Callable[..., Any], decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = fake()
    build_engines(decoder, options=BuildOptions([SIZES]))
    program, entered = load_engine(decoder, "decoder"), []

    @contextlib.contextmanager
    def device(place: torch.device) -> Iterator[None]:
        before = len(trt.calls["streams"])
        yield
        entered.append((place, len(trt.calls["streams"]) - before))

    monkeypatch.setattr(tensorrt, "_device", device)
    program(*given(9, 5))
    assert entered == [(program.device, 3)]


def test_more_samples_than_a_profile_has_are_run_in_parts(fake: Callable[..., Any], decoder: Path) -> None:
    trt = fake()
    build_engines(decoder, options=BuildOptions([SIZES]))
    inputs = given(9, 5)
    (pixels,) = load_engine(decoder, "decoder")(*inputs)
    torch.testing.assert_close(pixels, expected(decoder, inputs))
    assert len(trt.calls["streams"]) == 3


def test_new_weights_for_an_engine(fake: Callable[..., Any], decoder: Path) -> None:
    trt = fake()
    build_engines(decoder, options=BuildOptions([SIZES]))
    with pytest.raises(InputError, match="weights are fixed: build it with"):
        load_engine(decoder, "decoder").refit(decoder / "decoder.onnx")
    build_engines(decoder, options=BuildOptions([SIZES], refit=True))
    program, inputs = load_engine(decoder, "decoder"), given(2, 5)
    before = program(*inputs)[0]
    model = onnx.load(str(decoder / "decoder.onnx"))
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) == 2:
            weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 0.5, weight.name))
    onnx.save(model, str(decoder / "decoder.onnx"))
    program.refit(decoder / "decoder.onnx")
    after = program(*inputs)[0]
    assert (after != before).any()
    torch.testing.assert_close(after, expected(decoder, inputs))
    trt.calls["refuse"] = True
    with pytest.raises(InputError, match=r"cannot take the weights of .*: no such weight"):
        program.refit(decoder / "decoder.onnx")


def test_inputs_that_do_not_fit(fake: Callable[..., Any], decoder: Path) -> None:
    fake()
    build_engines(decoder, options=BuildOptions([SIZES]))
    program = load_engine(decoder, "decoder")
    tokens, text, mask = given(2, 4)
    with pytest.raises(InputError, match=r"text is \(2, 9, 8\), the engine was built for \(1, 1, 8\) to \(4, 8, 8\); build it"):
        program(*given(2, 9))
    with pytest.raises(InputError, match=r"tokens is \(2, 3\)"):
        program(tokens[:, :, 0], text, mask)
    with pytest.raises(InputError, match="text_mask must be bool, got int64"):
        program(tokens, text, mask.long())
    with pytest.raises(InputError, match="it takes tokens, text, text_mask, got 2 tensors"):
        program(tokens, text)
    with pytest.raises(InputError, match="it takes tokens, text, text_mask, got tokens"):
        program.run({"tokens": tokens})
    with pytest.raises(InputError, match="tokens lies on meta, the engine on cpu"):
        program(tokens.to("meta"), text, mask)


def test_an_engine_that_does_not_fit_is_built_again_or_refused(
    fake: Callable[..., Any], decoder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake()
    build_engines(decoder, options=BuildOptions([SIZES], level=2))
    trt = fake(version="10.1")
    with pytest.raises(InputError, match="does not run here: it was built by tensorrt 10.0, this is 10.1; build it again"):
        load_engine(decoder, "decoder", rebuild=False)
    with caplog.at_level(logging.WARNING):
        program = load_engine(decoder, "decoder")
    assert "built by tensorrt 10.0, this is 10.1; building it again" in caplog.text
    assert program.about == read_about(decoder / "decoder.engine")
    assert (program.about.version, program.about.level) == ("10.1", 2)
    assert trt.calls["built"][0]["text"] == ((1, 1, 8), (2, 4, 8), (4, 8, 8))  # the sizes it had
    (decoder / "decoder.onnx").unlink()
    monkeypatch.setattr(tensorrt, "this_gpu", lambda: ("sm_80", "NVIDIA A100"))
    with pytest.raises(InputError, match=r"built for sm_89, this GPU is sm_80 \(NVIDIA A100\); .*copy decoder.onnx beside it"):
        load_engine(decoder, "decoder")


def test_why_an_engine_does_not_fit(fake: Callable[..., Any], decoder: Path) -> None:
    fake()
    ((path, about),) = build_engines(decoder)
    assert why_not_here(path, about, "10.0", GPU) == ""
    assert why_not_here(path, about, "10.0", None) == "there is no GPU here"
    assert "timed on NVIDIA L4, this GPU is NVIDIA L40S" in why_not_here(path, about, "10.0", ("sm_89", "NVIDIA L40S"))
    portable = replace(about, gpu=None, targets=["sm_80", "sm_89"])
    assert why_not_here(path, portable, "10.0", ("sm_80", "NVIDIA A100")) == ""
    (decoder / "decoder.onnx").write_bytes(b"another")
    assert why_not_here(path, about, "10.0", GPU) == "decoder.onnx has changed since it was built"
    path.write_bytes(b"cut")
    assert why_not_here(path, about, "10.0", GPU) == "decoder.engine is missing or cut short"


def test_external_weights_are_part_of_what_an_engine_was_built_from(fake: Callable[..., Any], decoder: Path) -> None:
    model = onnx.load(str(decoder / "decoder.onnx"))
    onnx.save(model, str(decoder / "decoder.onnx"), save_as_external_data=True, location="shared.data", size_threshold=0)
    fake()
    ((path, about),) = build_engines(decoder)
    assert about.sources == {
        name: hashlib.sha256((decoder / name).read_bytes()).hexdigest() for name in ("decoder.onnx", "shared.data")
    }
    with (decoder / "shared.data").open("ab") as file:
        file.write(b"more")
    assert why_not_here(path, about, "10.0", GPU) == "shared.data has changed since it was built"


def test_damaged_engines(fake: Callable[..., Any], decoder: Path) -> None:
    fake()
    ((path, about),) = build_engines(decoder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"decoder.engine is damaged: its SHA-256 is not the one in decoder.engine.json"):
        load_engine(decoder, "decoder", rebuild=False)
    load_engine(decoder, "decoder")  # which builds it again
    assert path.read_bytes() == whole
    beside = path.with_name("decoder.engine.json")
    content = json.loads(beside.read_text())
    path.write_bytes(b"x" * about.bytes)
    beside.write_text(json.dumps({**content, "sha256": hashlib.sha256(b"x" * about.bytes).hexdigest()}))
    with pytest.raises(InputError, match="cannot load .*decoder.engine: it gave no reason; build it again"):
        load_engine(decoder, "decoder")
    for damaged, said in (
        ("{", "cannot read"),
        ("[]", "cannot read"),
        (json.dumps({**content, "format": 9}), "is of format 9"),
    ):
        beside.write_text(damaged)
        with pytest.raises(InputError, match=said):
            load_engine(decoder, "decoder")
    beside.unlink()
    with pytest.raises(InputError, match="has no decoder.engine.json beside it"):
        load_engine(decoder, "decoder")


def test_tensorrt_rtx_says_what_is_wrong_and_keeps_compiled_kernels(fake: Callable[..., Any], decoder: Path) -> None:
    trt = fake("tensorrt_rtx")
    build_engines(decoder, "tensorrt-rtx")
    assert [capability.name for capability in trt.calls["capabilities"]] == ["SM89"]  # that of the GPU
    program: EngineProgram | None = load_engine(decoder, "decoder")
    trt.calls["cache"].data = b"kernels"
    program = None
    gc.collect()
    assert program is None and (decoder / "decoder.engine.cache").read_bytes() == b"kernels"
    program = load_engine(decoder, "decoder")
    assert trt.calls["cache"].data == b"kernels"
    build_engines(decoder, "tensorrt-rtx")
    assert not (decoder / "decoder.engine.cache").exists()  # it was another engine's
    fake("tensorrt_rtx", validity="INVALID")
    with pytest.raises(InputError, match="does not run here: version mismatch, unsupported cc; build it again"):
        load_engine(decoder, "decoder")
