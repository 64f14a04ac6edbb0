"""The model repository: checked against the server's schema, warmed up and run by a fake of the server over ONNX Runtime."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from textok_fast import InputError, TexTok
from textok_fast.config import to_dict
from textok_fast.diffusion import SAMPLERS, build_process, sample
from textok_fast.inference import SamplingOptions
from textok_fast.inference.pipelines import ClassToImagePipeline, TextToImagePipeline, seeded_noise
from textok_fast.modeling.text_encoders import TextEncoder

REASON = "ONNX export needs the extra 'export' (onnx, onnxscript, onnxruntime)"
onnx = pytest.importorskip("onnx", reason=REASON)
pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

import fake_tensorrt  # noqa: E402
import fake_triton  # noqa: E402
from tiny_export import export_generator, export_module, export_once, tiny_dit  # noqa: E402

from textok_fast.export import server, tensorrt  # noqa: E402
from textok_fast.export.server import ServerOptions, write_repository  # noqa: E402

STEPS = (4, 6)


def write_manifest(directory: Path, pipeline: TextToImagePipeline | ClassToImagePipeline | None) -> None:
    content: dict[str, Any] = {"format": 1, "to": "onnx", "precision": "fp32", "files": {}}
    if pipeline is not None:
        pipeline.save_about(directory)
        content["pipeline"] = json.loads((directory / "pipeline.json").read_text(encoding="utf-8"))
        content |= {"tokenizer": to_dict(pipeline.tokenizer.config), "generator": to_dict(pipeline.generator.config)}
        content["text"] = {"max_positions": 32, "special": 2}
    (directory / "export.json").write_text(json.dumps(content), encoding="utf-8")


# -- a pipeline of classes, whose captions only the decoder and the attention read ---------------------------------------------


@pytest.fixture(scope="module")
def pipeline(make_tokenizer: Callable[..., TexTok]) -> ClassToImagePipeline:
    captions = {0: ["a red disc", "a disc"], 3: ["blue square left", "square", "the square"]}
    return ClassToImagePipeline(tiny_dit(), make_tokenizer(encoder_depth=1, decoder_depth=1), captions=captions)


@pytest.fixture(scope="module")
def exported(
    pipeline: ClassToImagePipeline, make_tokenizer: Callable[..., TexTok], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("exported")
    shutil.copytree(export_once(make_tokenizer, tmp_path_factory), directory, dirs_exist_ok=True)
    write_manifest(directory, pipeline)
    return directory


@pytest.fixture
def without_utilities() -> Iterator[None]:
    yield
    sys.modules.pop("triton_python_backend_utils", None)


def test_a_directory_becomes_a_repository(exported: Path, tmp_path: Path) -> None:
    assert write_repository(exported, tmp_path) == ["decoder", "encoder", "generate", "generator"]
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    networks = {f"model_repository/{name}/{file}" for name in ("decoder", "encoder", "generator") for file in ("1/model.onnx",)}
    configurations = {f"model_repository/{name}/config.pbtxt" for name in ("decoder", "encoder", "generator", "generate")}
    scripts = {f"model_repository/generate/1/{name}" for name in ("model.py", "settings.json")}
    assert found == {*networks, *configurations, *scripts, "compose.yaml", "Dockerfile", "client.py"}
    before = (tmp_path / "model_repository" / "decoder" / "config.pbtxt").read_text()
    write_repository(exported, tmp_path, ServerOptions(max_batch=24, instances=2, kind="gpu"))  # in the old one's place
    after = fake_triton.parse((tmp_path / "model_repository" / "decoder" / "config.pbtxt").read_text())
    assert before != after and after["max_batch_size"] == [24]
    assert after["instance_group"] == [{"count": [2], "kind": ["KIND_GPU"]}]
    assert after["dynamic_batching"][0]["preferred_batch_size"] == [8, 16, 24]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Dockerfile", "client.py", "compose.yaml", "model_repository"]


def test_every_network_is_warmed_up_as_configured(exported: Path, tmp_path: Path, without_utilities: None) -> None:
    write_repository(exported, tmp_path, ServerOptions(max_batch=12))
    models = fake_triton.Server(tmp_path / "model_repository").models
    for model in models.values():
        model.warm_up()
        assert model.batches == [1, 12]
    assert models["generator"].inputs["t"]["dims"] == [1] and models["generator"].inputs["t"]["reshape"] == [{"shape": []}]


@pytest.mark.parametrize(("sampler", "guidance"), [("ddpm", 3.0), ("dpmpp_2m", 1.0), ("unipc", 2.0), ("ddim", 1.5)])
def test_generate_draws_what_the_pipeline_draws(
    exported: Path, pipeline: ClassToImagePipeline, tmp_path: Path, without_utilities: None, sampler: str, guidance: float
) -> None:
    write_repository(exported, tmp_path, ServerOptions(sampler=sampler, steps=STEPS, guidance_interval=(100, 900)))
    served = fake_triton.Server(tmp_path / "model_repository")
    labels, seeds = [3, 0, 3], [5, 2**40 + 1, 7]
    options = SamplingOptions(sampler, STEPS[1], guidance, (100, 900))
    wanted = pipeline(labels, seed=seeds, options=options)
    features = pipeline.tokenizer.text_features(wanted.captions, 3)  # this server has no text encoder
    assert features is not None
    text = {"text": features.features.numpy(), "text_mask": features.mask.numpy()}
    (got,) = served.infer({"label": labels, "seed": seeds, "steps": [6] * 3, "guidance_scale": [guidance] * 3, **text})
    np.testing.assert_allclose(got["tokens"], wanted.tokens.numpy(), rtol=1e-4, atol=1e-4)
    assert np.abs(got["image"].astype(int) - wanted.images.numpy().astype(int)).max() <= 1
    assert got["seed"].tolist() == [[seed] for seed in seeds]
    assert served.models["decoder"].batches == [3]


def test_requests_that_arrive_together_share_batches(exported: Path, tmp_path: Path, without_utilities: None) -> None:
    write_repository(exported, tmp_path, ServerOptions(steps=STEPS, guidance_scale=2.0, max_batch=8))
    served = fake_triton.Server(tmp_path / "model_repository")
    one, two = {"label": [1], "seed": [0]}, {"label": [2, 4], "seed": [1, 2], "steps": [6, 6], "guidance_scale": [1.0, 1.0]}
    together = served.infer(one, two)
    # Four steps of a guidance pair beside those of two samples without; then the six steps' last two alone.
    assert served.models["generator"].batches == [4, 4, 4, 4, 2, 2]
    alone = [served.infer(one)[0], served.infer(two)[0]]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a["tokens"], b["tokens"], atol=1e-5)


def test_a_request_without_a_seed_says_which_it_was_given(exported: Path, tmp_path: Path, without_utilities: None) -> None:
    write_repository(exported, tmp_path, ServerOptions(steps=[2]))
    served = fake_triton.Server(tmp_path / "model_repository")
    first, second = served.infer({"label": [1]}, {"label": [1]})
    assert first["seed"] != second["seed"] and (first["tokens"] != second["tokens"]).any()
    (again,) = served.infer({"label": [1], "seed": first["seed"]})
    np.testing.assert_allclose(again["tokens"], first["tokens"], atol=1e-6)


def test_requests_that_cannot_be_served_fail_alone(exported: Path, tmp_path: Path, without_utilities: None) -> None:
    write_repository(exported, tmp_path, ServerOptions(steps=STEPS))
    served = fake_triton.Server(tmp_path / "model_repository")
    text = np.zeros((1, 2, 8), np.float32)
    good, *bad = served.infer(
        {"label": [4]},
        {"label": [5]},
        {"label": [0], "seed": [-1]},
        {"label": [0], "steps": [5]},
        {"label": [0, 0], "steps": [4, 6]},
        {"label": [0], "text": text, "text_mask": np.ones((1, 3), np.bool_)},
    )
    assert good["image"].shape == (1, 16, 16, 3)
    assert bad == [
        "labels are from 0 to 4, got [5]",
        "seeds are integers from 0 to 2**63 - 1, got -1",
        "steps is one number a request, of 4, 6; got 5",
        "steps is one number a request, of 4, 6; got 4, 6",
        "text_mask must be (1, 2), as text is (1, 2, 8); got (1, 3)",
    ]


def test_a_model_that_fails_is_named(
    exported: Path, tmp_path: Path, without_utilities: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(exported, tmp_path, ServerOptions(steps=STEPS))
    served = fake_triton.Server(tmp_path / "model_repository")

    def fail(given: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(served.models["decoder"], "run", fail)
    assert served.infer({"label": [0]}) == ["decoder: out of memory"]


# -- a pipeline of prompts, with the text encoder on the server ----------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder of 8 features, and the tokenizer that goes with it."""
    import tokenizers
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "disc", "square", "left", "on", "of"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    directory = tmp_path_factory.mktemp("bert")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
    transformers.BertModel(config).eval().save_pretrained(directory)
    return directory


class LastHidden(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


@pytest.fixture(scope="module")
def prompted(
    bert: Path, exported: Path, make_tokenizer: Callable[..., TexTok], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TextToImagePipeline, Path]:
    directory = tmp_path_factory.mktemp("prompted")
    tokenizer = make_tokenizer(encoder_depth=1, decoder_depth=1, max_text_tokens=7)
    encoder = TextEncoder(bert, max_tokens=7, cache=False)
    tokenizer.text_encoder = encoder
    pipeline = TextToImagePipeline(tiny_dit(num_classes=0), tokenizer)
    for name in ("encoder.onnx", "decoder.onnx"):
        shutil.copy(exported / name, directory)  # the weights are the same
    export_generator(pipeline.generator, directory)
    ids = torch.randint(0, 12, (2, 5))
    export_module(
        LastHidden(encoder.network), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "text", directory / "text.onnx"
    )
    (directory / "text_tokenizer").mkdir()
    (directory / "text_tokenizer" / "tokenizer.json").write_bytes((bert / "tokenizer.json").read_bytes())
    write_manifest(directory, pipeline)
    return pipeline, directory


@pytest.mark.parametrize("split", ["", "; "])
def test_prompts_are_encoded_on_the_server(
    prompted: tuple[TextToImagePipeline, Path], bert: Path, tmp_path: Path, without_utilities: None, split: str
) -> None:
    pipeline, directory = prompted
    tokenizer = pipeline.tokenizer
    before, tokenizer.config = tokenizer.config, dataclasses.replace(tokenizer.config, text_split=split)
    tokenizer.text_encoder = TextEncoder(bert, max_tokens=7, split=split, cache=False)
    write_manifest(directory, pipeline)
    try:
        names = write_repository(directory, tmp_path, ServerOptions(steps=STEPS, guidance_scale=2.0))
        assert names == ["decoder", "encoder", "generate", "generator", "text"]
        served = fake_triton.Server(tmp_path / "model_repository")
        served.models["text"].warm_up()
        assert served.models["decoder"].config["model_warmup"][0]["inputs"][1]["value"][0]["dims"] == [7, 8]  # the longest
        # One with clauses, one of unknown words, one that is cut.
        prompts = ["a red disc; blue square left", "green", "a a a a red; red red red red; blue blue blue"]
        negative = ["blue", "a square", "a disc on a square; left"]
        options = SamplingOptions(steps=STEPS[0], guidance_scale=2.0)
        wanted = pipeline(prompts, seed=[1, 2, 3], options=options, negative_prompts=negative)
        (got,) = served.infer({"prompt": prompts, "negative_prompt": negative, "seed": [1, 2, 3]})
        np.testing.assert_allclose(got["tokens"], wanted.tokens.numpy(), rtol=1e-4, atol=1e-4)
        assert np.abs(got["image"].astype(int) - wanted.images.numpy().astype(int)).max() <= 1
        assert served.infer({"prompt": ["a disc", " "]}) == ["a prompt is a non-empty string"]
    finally:
        tokenizer.config = before
        write_manifest(directory, pipeline)


def test_a_text_encoder_needs_its_tokenizer(prompted: tuple[TextToImagePipeline, Path], tmp_path: Path) -> None:
    _, directory = prompted
    kept = directory / "text_tokenizer" / "tokenizer.json"
    moved = kept.rename(tmp_path / "elsewhere.json")
    try:
        with pytest.raises(InputError, match=r"has text.onnx and no tokenizer.json"):
            write_repository(directory, tmp_path / "out")
        assert not (tmp_path / "out" / "model_repository").exists()
        write_repository(directory, tmp_path / "out", ServerOptions(tokenizer=moved))
        assert (tmp_path / "out/model_repository/generate/1/tokenizer.json").read_bytes() == moved.read_bytes()
    finally:
        moved.rename(kept)


# -- the script's arithmetic ---------------------------------------------------------------------------------------------------


@pytest.fixture
def script(without_utilities: None) -> ModuleType:
    sys.modules["triton_python_backend_utils"] = ModuleType("triton_python_backend_utils")
    sys.modules.pop("textok_fast.export.triton_model", None)
    return importlib.import_module("textok_fast.export.triton_model")


def test_noise_is_the_librarys(script: ModuleType) -> None:
    seeds = [0, 1, 2**32, 2**63 - 1]
    for draw, shape in ((0, (3, 4)), (7, (5, 3)), (1000, (1, 1))):
        wanted = seeded_noise(seeds, "cpu")(draw, (4, *shape)).numpy()
        got = script.seeded_normal(np.array(seeds), draw, shape)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("guided_channels", [0, 2])
def test_every_sampler_is_the_librarys(script: ModuleType, sampler: str, guided_channels: int) -> None:
    learned = SAMPLERS[sampler] == "gaussian"
    process = build_process(SAMPLERS[sampler], learned)
    program = server._program(process, sampler, 6, None)
    loop = script.Sampler(**json.loads(json.dumps(program)))
    weight = torch.randn(4, 8 if learned else 4, generator=torch.Generator().manual_seed(0))

    def outputs(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        level = t.float().reshape(-1, 1, 1) / (1000 if learned else 1)
        return torch.tanh(x @ weight) * (1 - level), torch.tanh(x @ weight) * 0.5

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        c, u = outputs(x, t)
        guided = guided_channels or 4
        return torch.cat([u[..., :guided] + 3 * (c[..., :guided] - u[..., :guided]), c[..., guided:]], -1)

    source = seeded_noise([4, 9], "cpu")
    wanted = sample(sampler, model, source(0, (2, 3, 4)), 6, process, generator=source)
    state = np.zeros((loop.slots, 2, 3, 4), np.float32)
    state[0] = source(0, (2, 3, 4)).numpy()
    for i, time in enumerate(loop.times):
        pair = torch.cat(outputs(torch.from_numpy(state[0].copy()), torch.full((2,), float(time)))).numpy()
        noise = source(i + 1, (2, 3, 4)).numpy() if loop.noisy[i] else None
        state = loop.update(i, state, pair, np.full(2, 3.0, np.float32), noise, guided_channels)
    np.testing.assert_allclose(state[0], wanted.numpy(), atol=2e-4)


def test_captions_are_drawn_as_the_pipeline_draws_them(script: ModuleType, pipeline: ClassToImagePipeline) -> None:
    model = script.TritonPythonModel()
    model.settings = {"captions": {str(label): texts for label, texts in pipeline.captions.items()}}
    for label in (0, 1, 3):
        for seed in (0, 1, 2, 77, 2**32 + 3, 2**63 - 1):
            assert model._caption(label, seed) == pipeline._held_out_caption(label, seed)


# -- the server's schema -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The message class ModelConfig out of tritonclient's wheel, under whatever protobuf is installed.

    Only the serialized descriptor is read from the wheel's generated module: that refuses other versions of protobuf, and
    tritonclient beside onnx would hold ml_dtypes down. Where it is not installed, pip fetches it alone into a directory.
    """
    protobuf = pytest.importorskip("google.protobuf", reason="onnx brings protobuf")
    assert protobuf
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    spec = importlib.util.find_spec("tritonclient")
    if spec is not None and spec.submodule_search_locations:
        place = Path(next(iter(spec.submodule_search_locations)))
    else:
        target = tmp_path_factory.mktemp("wheel")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(target),
            "tritonclient>=2.60",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            assert not os.environ.get("CI"), f"in CI the schema is to be checked: {done.stderr[-200:]}"
            pytest.skip(f"tritonclient, whose wheel has the schema, is not here and cannot be fetched: {done.stderr[-200:]}")
        place = target / "tritonclient"
    source = (place / "grpc" / "model_config_pb2.py").read_text(encoding="utf-8")
    match = re.search(r"AddSerializedFile\((b'.*')\)", source)
    assert match is not None
    pool = descriptor_pool.DescriptorPool()
    pool.Add(descriptor_pb2.FileDescriptorProto.FromString(ast.literal_eval(match[1])))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def test_configurations_are_messages_of_the_published_schema(
    exported: Path, prompted: tuple[TextToImagePipeline, Path], tmp_path: Path, model_config: Any
) -> None:
    from google.protobuf import text_format

    write_repository(exported, tmp_path / "classes")
    write_repository(prompted[1], tmp_path / "prompts")
    files = sorted(tmp_path.rglob("config.pbtxt"))
    assert len(files) == 9
    for file in files:
        config = text_format.Parse(file.read_text(encoding="utf-8"), model_config())
        assert config.name == file.parent.name
        # The server's own checks of a configuration.
        assert config.backend in ("onnxruntime", "python") and config.max_batch_size > 0
        assert all(size <= config.max_batch_size for size in config.dynamic_batching.preferred_batch_size)
        assert all(group.count > 0 and not group.gpus for group in config.instance_group)
        for tensor in (*config.input, *config.output):
            assert tensor.data_type and tensor.dims and all(size == -1 or size > 0 for size in tensor.dims)
        required = {tensor.name: tensor for tensor in config.input if not tensor.optional}
        for warmup in config.model_warmup:
            assert set(warmup.inputs) == set(required) and 1 <= warmup.batch_size <= config.max_batch_size
            for name, value in warmup.inputs.items():
                assert value.data_type == required[name].data_type and len(value.dims) == len(required[name].dims)
        # What fake_triton reads is what protobuf reads.
        read = fake_triton.parse(file.read_text(encoding="utf-8"))
        assert [tensor.name for tensor in config.input] == [entry["name"][0] for entry in read["input"]]
        assert [list(tensor.dims) for tensor in config.input] == [entry["dims"] for entry in read["input"]]
    with pytest.raises(text_format.ParseError, match="max_batch"):
        text_format.Parse("max_batch: 3", model_config())


# -- engines, options, and what lies beside ------------------------------------------------------------------------------------


def test_engines_of_tensorrt_are_served_as_plans(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module())
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt.module("tensorrt_rtx"))
    monkeypatch.setattr(tensorrt, "this_gpu", lambda: ("sm_89", "NVIDIA L4"))
    profiles = tensorrt.BuildOptions([{"batch": (1, 1, 2)}, {"batch": (1, 8, 16)}])
    engines = tmp_path / "engines"
    tensorrt.build_engines(exported, "tensorrt", ["decoder", "forward"], profiles, engines)
    (engines / "export.json").write_text((exported / "export.json").read_text())
    assert write_repository(engines, tmp_path / "out") == ["decoder", "generate", "generator"]
    place = tmp_path / "out" / "model_repository" / "decoder"
    assert (place / "1" / "model.plan").read_bytes() == (engines / "decoder.engine").read_bytes()
    config = fake_triton.parse((place / "config.pbtxt").read_text())
    assert (config["platform"], config["max_batch_size"]) == (["tensorrt_plan"], [16])
    assert config["instance_group"][0]["profile"] == ["0", "1"]
    assert [entry["dims"] for entry in config["input"]] == [[3, 4], [-1, 8], [-1]]
    # One that does not suit the GPU here is passed over for its ONNX file, unless engines are asked for.
    shutil.copy(exported / "decoder.onnx", engines)
    monkeypatch.setattr(tensorrt, "this_gpu", lambda: ("sm_80", "NVIDIA A100"))
    monkeypatch.setattr(server, "this_gpu", lambda: ("sm_80", "NVIDIA A100"))
    write_repository(engines, tmp_path / "out")
    assert [path.name for path in (place / "1").iterdir()] == ["model.onnx"]
    write_repository(engines, tmp_path / "out", ServerOptions(backend="tensorrt"))
    assert [path.name for path in (place / "1").iterdir()] == ["model.plan"]
    (engines / "decoder.onnx").unlink()
    whole = (engines / "decoder.engine").read_bytes()
    (engines / "decoder.engine").write_bytes(whole[:-1] + b"?")
    with pytest.raises(InputError, match=r"decoder.engine cannot be served: decoder.engine is damaged"):
        write_repository(engines, tmp_path / "out")
    tensorrt.build_engines(exported, "tensorrt-rtx", ["decoder"], profiles, engines)
    with pytest.raises(InputError, match=r"decoder.engine is TensorRT-RTX's, which the server cannot run"):
        write_repository(engines, tmp_path / "out", ServerOptions(backend="tensorrt"))
    assert (place / "1" / "model.plan").exists()  # the repository is as it was


def test_external_weights_lie_beside_the_model(exported: Path, tmp_path: Path) -> None:
    model = onnx.load(str(exported / "decoder.onnx"))
    kept = {"save_as_external_data": True, "location": "shared.data", "size_threshold": 1024}
    onnx.save(model, str(tmp_path / "decoder.onnx"), **kept)
    write_manifest(tmp_path, None)
    assert write_repository(tmp_path, tmp_path / "out") == ["decoder"]  # no pipeline: no generate
    fake_triton.Server(tmp_path / "out" / "model_repository").models["decoder"].warm_up()


def test_directories_and_options_that_cannot_be_used(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no export.json: `textok-fast export` writes"):
        write_repository(tmp_path, tmp_path / "out")
    (tmp_path / "export.json").write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        write_repository(tmp_path, tmp_path / "out")
    write_manifest(tmp_path, None)
    with pytest.raises(InputError, match="holds none of encoder, decoder, forward, text"):
        write_repository(tmp_path, tmp_path / "out")
    model = onnx.load(str(exported / "decoder.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, str(tmp_path / "decoder.onnx"))
    with pytest.raises(InputError, match=r"cannot be served in batches: tokens is float32 \(2, 3, 4\)"):
        write_repository(tmp_path, tmp_path / "out")
    for wrong, said in (
        ({"backend": "python"}, "backend is auto"),
        ({"kind": "tpu"}, "run on auto, gpu or cpu"),
        ({"max_batch": 0}, "must be at least 1"),
        ({"steps": []}, "at least one"),
        ({"steps": [4, 4]}, "once"),
    ):
        with pytest.raises(InputError, match=said):
            ServerOptions(**wrong)


def test_compose_starts_the_image_with_the_repository(exported: Path, tmp_path: Path) -> None:
    write_repository(exported, tmp_path, ServerOptions(image="registry/triton:1"))
    service = yaml.safe_load((tmp_path / "compose.yaml").read_text())["services"]["triton"]
    assert service["build"] == {"context": ".", "args": {"TRITON_IMAGE": "${TRITON_IMAGE:-registry/triton:1}"}}
    assert service["command"] == "tritonserver --model-repository=/models"
    assert service["volumes"] == ["./model_repository:/models:ro"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    write_repository(exported, tmp_path, ServerOptions(kind="cpu"))
    assert "deploy" not in yaml.safe_load((tmp_path / "compose.yaml").read_text())["services"]["triton"]


# -- the client ----------------------------------------------------------------------------------------------------------------


def test_the_client_asks_for_pictures(
    exported: Path, tmp_path: Path, without_utilities: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_repository(exported, tmp_path, ServerOptions(steps=STEPS))
    served = fake_triton.Server(tmp_path / "model_repository")

    fake = fake_client(served)
    monkeypatch.setitem(sys.modules, "tritonclient", ModuleType("tritonclient"))
    monkeypatch.setitem(sys.modules, "tritonclient.http", fake)
    monkeypatch.setattr(sys.modules["tritonclient"], "http", fake, raising=False)
    client = load_client(tmp_path / "client.py")
    out = tmp_path / "made.png"
    options = {"label": 3, "seed": 5, "steps": 4, "guidance-scale": 2.0, "count": 2, "url": "there:8000", "out": out}
    client.main([f"--{name}={value}" for name, value in options.items()])
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/made-{i}.png (seed {5 + i})" for i in range(2)]
    (wanted,) = served.infer({"label": [3, 3], "seed": [5, 6], "steps": [4, 4], "guidance_scale": [2.0, 2.0]})
    for i in range(2):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"made-{i}.png")), wanted["image"][i])


def fake_client(served: fake_triton.Server) -> Any:
    """The part of tritonclient.http that the client uses, in front of a server in this process."""

    class InferInput:
        def __init__(self, name: str, shape: list[int], datatype: str) -> None:
            self.name, self.shape, self.datatype = name, shape, datatype

        def set_data_from_numpy(self, array: np.ndarray[Any, Any]) -> None:
            assert list(array.shape) == self.shape
            assert self.datatype == {"i8": "INT64", "i4": "INT32", "f4": "FP32", "O": "BYTES"}[array.dtype.str.lstrip("<|")]
            self.array = array

    class Client:
        def __init__(self, url: str, network_timeout: float = 60.0) -> None:
            assert url in ("there:8000", "localhost:8000")

        def infer(self, model: str, inputs: list[InferInput], outputs: list[str]) -> Any:
            assert (model, outputs) == ("generate", ["image", "seed"])
            (result,) = served.infer({tensor.name: tensor.array for tensor in inputs})
            return SimpleNamespace(as_numpy=lambda name: result[name])

    return SimpleNamespace(InferInput=InferInput, InferRequestedOutput=str, InferenceServerClient=Client)


def load_client(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("served_client", path)
    assert spec is not None and spec.loader is not None
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    return client


def test_the_examples_of_the_document(
    exported: Path, tmp_path: Path, without_utilities: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    write, ask, build = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    shutil.copytree(exported, "exported")
    exec(write, {})
    fake = fake_client(fake_triton.Server(tmp_path / "serving" / "model_repository"))
    for name, module in (("tritonclient", SimpleNamespace(http=fake)), ("tritonclient.http", fake)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "client", load_client(tmp_path / "serving" / "client.py"))
    names: dict[str, Any] = {}
    exec(ask, names)
    assert names["pictures"].shape == (2, 16, 16, 3) and len(set(names["seeds"])) == 2
    options = [field.name for field in dataclasses.fields(ServerOptions)]
    assert sorted(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \|", text.split("## Batches")[1], re.MULTILINE)))
    ) == sorted(options)
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        exec(build, {})
        assert tensorrt.read_about(tmp_path / "engines" / "decoder.engine").targets == ["sm_89", "sm_120"]
