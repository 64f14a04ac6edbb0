"""What is exported gives PyTorch's results at any batch and caption length, in one directory that is complete or not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from textok_fast import DiT, DiTConfig, InputError, TexTok, interop
from textok_fast.diffusion import build_process, sampler_program
from textok_fast.inference.engine import Engine
from textok_fast.inference.pipelines import ClassToImagePipeline
from textok_fast.inference.plan import Plan
from textok_fast.modeling.autoencoder import LatentTokenizer
from textok_fast.modeling.text_encoders import TextFeatures

REASON = "ONNX export needs the extra 'export' (onnx, onnxscript, onnxruntime)"
onnx = pytest.importorskip("onnx", reason=REASON)
pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

from tiny_export import tiny_dit  # noqa: E402

from textok_fast.export import Manifest, Source, export, export_onnx  # noqa: E402
from textok_fast.export import onnx as files  # noqa: E402
from textok_fast.export.artifacts import PRECISIONS, TARGETS  # noqa: E402
from textok_fast.export.directory import WHAT  # noqa: E402
from textok_fast.export.graphs import DecoderGraph, Graph, generator_graphs, on_cpu, tokenizer_graphs  # noqa: E402
from textok_fast.export.parity import describe_departure, examples, layer_errors  # noqa: E402

Make = Callable[..., TexTok]
GOLDEN = Path(__file__).parents[1] / "golden"
BATCHES, LENGTHS = (1, 3, 8), (1, 2, 7, 16)


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    return weights, {key.removeprefix("io."): value for key, value in tensors.items() if key.startswith("io.")}


def written(graphs: list[Graph], directory: Path) -> dict[str, Any]:
    """Sessions by name."""
    known: dict[str, Any] = {}
    for graph in graphs:
        files.save(files.trace(graph, {}, known=known), directory / f"{graph.name}.onnx")
    return {graph.name: files.session(directory / f"{graph.name}.onnx") for graph in graphs}


def assert_equal(graph: Graph, session: Any, batches: tuple[int, ...] = BATCHES, lengths: tuple[int, ...] = LENGTHS) -> None:
    for given in examples(graph, [(batch, length) for batch in batches for length in lengths]):
        got = files.run(session, given, list(graph.outputs))
        for name, wanted, found in zip(graph.outputs, graph.reference(**given), got, strict=True):
            assert wanted.dtype == found.dtype, name
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


# -- graphs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"depth": 2},
        {"num_tokens": 0, "input_size": 8, "patch_size": 2, "guided_channels": 3, "text_dim": 0},
        {
            "num_classes": 0,
            "text_dim": 0,
            "learn_sigma": False,
            "time_scale": 1000.0,
            "qk_norm": True,
            "image_token_dim": 6,
            "num_image_tokens": 2,
        },
    ],
    ids=["tokens, classes and text", "patches and classes", "a flow with image tokens"],
)
def test_a_generator_at_any_batch_and_caption_length(fields: dict[str, Any], tmp_path: Path) -> None:
    graphs = generator_graphs(tiny_dit(**fields))
    assert [graph.name for graph in graphs] == ["modulation", "step", "forward", "sampler"]
    sessions = written(graphs, tmp_path)
    for graph in graphs:
        assert_equal(graph, sessions[graph.name], lengths=LENGTHS if "text" in graph.axes else (1,))
        model = onnx.load(str(tmp_path / f"{graph.name}.onnx"))
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
        assert [value.name for value in model.graph.input] == list(graph.axes)
        assert [value.name for value in model.graph.output] == list(graph.outputs)
        assert str(Path.home()) not in str(model) and "site-packages" not in str(model)


def test_a_loop_over_the_sampler_is_the_engines_sampling(tmp_path: Path) -> None:
    model = tiny_dit()
    (session,) = written([graph for graph in generator_graphs(model) if graph.name == "sampler"], tmp_path).values()
    process = build_process("gaussian", learn_sigma=True)
    text = TextFeatures(torch.randn(3, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool())
    labels, seeds = torch.tensor([0, 4, 2]), torch.tensor([3, 1, 2])
    options: dict[str, Any] = {"sampler": "ddpm", "steps": 4, "guidance_scale": 2.0, "guidance_interval": (0.0, 600.0)}
    wanted = Engine(model, Plan(device="cpu")).sample(process, labels=labels, text=text, seeds=seeds, **options)
    from textok_fast import ops

    program = sampler_program(process, "ddpm", 2.0, (0.0, 600.0), steps=4)
    fixed = {"table": program.table, "times": program.times.float(), "labels": labels, "text": text[0], "text_mask": text[1]}
    x, index = ops.seeded_normal(seeds, torch.tensor([0]), (3, 4)), torch.tensor([0])
    for draw in range(4):
        noise = ops.seeded_normal(seeds, torch.tensor([draw + 1]), (3, 4))
        x, index = files.run(session, {"x": x, "index": index, "noise": noise, **fixed})
    assert index.tolist() == [4]
    torch.testing.assert_close(x, wanted, atol=1e-4, rtol=1e-4)
    beyond, _ = files.run(session, {"x": x, "index": index, "noise": noise, **fixed})
    assert beyond.isnan().all()


@pytest.mark.parametrize("bottleneck", ["kl", "vq"])
def test_a_tokenizers_other_outputs(make_tokenizer: Make, tmp_path: Path, bottleneck: str) -> None:
    tokenizer = make_tokenizer(bottleneck=bottleneck, text="encoder", text_positions=True, max_text_tokens=16, encoder_depth=1)
    tokenizer.set_latent_statistics(torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.5, 1.0, 2.0, 1.5]))
    graphs = tokenizer_graphs(tokenizer)
    assert graphs[0].outputs == ("tokens", "std" if bottleneck == "kl" else "indices")
    assert set(graphs[1].axes) == {"tokens"} and graphs[0].most_text == 16
    for graph, session in zip(graphs, written(graphs, tmp_path).values(), strict=True):
        assert_equal(graph, session, lengths=LENGTHS if "text" in graph.axes else (1,))


def test_a_peers_dit_over_patches(tmp_path: Path) -> None:
    weights, io = golden("dit_2d")
    model = interop.load("dit", weights, heads=4, guided_channels=3)
    assert isinstance(model, DiT)
    exported = export_onnx(Source(generator=model), tmp_path / "out", pictures=2)
    assert all(row.passed for row in exported.parity)
    given = {"x": io["x"], "t": io["t"].float(), "y": io["y"]}
    (out,) = files.run(files.session(tmp_path / "out" / "forward.onnx"), given)
    np.testing.assert_allclose(out, io["out"], atol=1e-4)


def test_a_peers_tokenizer_with_text(tmp_path: Path) -> None:
    weights, io = golden("tatitok_vae")
    tokenizer = interop.load("tatitok", weights, heads=4).tokenizer
    assert isinstance(tokenizer, TexTok)
    encoder, decoder = tokenizer_graphs(on_cpu(tokenizer))
    sessions = written([encoder, decoder], tmp_path)
    tokens, std = files.run(sessions["encoder"], {"pixels": 2 * io["image"] - 1})
    mean = io["mean"].squeeze(2).transpose(1, 2)  # (B, N, d)
    np.testing.assert_allclose(tokens, mean, atol=1e-4)
    np.testing.assert_allclose(std, (0.5 * io["logvar"].squeeze(2).transpose(1, 2)).exp(), atol=1e-4)
    text = {"text": io["text_guidance"], "text_mask": torch.ones(2, 7, dtype=torch.bool)}
    (pixels,) = files.run(sessions["decoder"], {"tokens": mean, **text})
    np.testing.assert_allclose((pixels + 1) / 2, io["decoded"].clamp(0, 1), atol=1e-4)


def test_a_size_that_became_a_constant_is_an_error(make_tokenizer: Make) -> None:
    class Fixed(DecoderGraph):
        def forward(self, tokens: torch.Tensor, *text: Any, **more: Any) -> tuple[torch.Tensor, ...]:
            return (super().forward(tokens.expand(len(tokens), -1, -1), *text, **more)[0],)

    with pytest.raises(InputError, match="traced for one batch only, of its input tokens"):
        files.trace(Fixed(make_tokenizer(text="none", decoder_depth=1)), {})


@pytest.mark.parametrize("limit", [1_000, 150_000])
def test_large_models_are_quantized(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float32 graphs pass the limit; quantized all of them, or only some of them, do."""
    monkeypatch.setattr(files, "EXTERNAL_BYTES", limit)
    exported = export_onnx(
        Source(generator=tiny_dit(width=64, mlp_ratio=2.0, text_dim=0)), tmp_path / "out", precision="int8", pictures=2
    )
    assert all(row.passed for row in exported.parity)
    assert "generator_weights" in exported.manifest.files
    assert {path.name for path in (tmp_path / "out").iterdir()} == exported.manifest.owned


def test_graphs_share_one_file_of_weights_beyond_protobufs_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "EXTERNAL_BYTES", 10_000)
    model = tiny_dit(width=64, mlp_ratio=2.0, text_dim=0)
    exported = export_onnx(Source(generator=model), tmp_path / "out", pictures=2)
    assert exported.manifest.files["generator_weights"]["file"] == "generator.data"
    weights = sum(p.numel() * 4 for p in model.parameters())
    padding = files._ALIGNMENT * len(list(model.parameters()))
    assert weights * 0.9 < (tmp_path / "out" / "generator.data").stat().st_size < weights + padding
    assert all((tmp_path / "out" / f"{name}.onnx").stat().st_size < weights / 2 for name in ("forward", "sampler"))
    assert all(row.passed for row in exported.parity)


# -- a whole directory ---------------------------------------------------------------------------------------------------------


def pipeline(make_tokenizer: Make, **fields: Any) -> Source:
    tokenizer = make_tokenizer(encoder_depth=1, decoder_depth=1)
    generator = tiny_dit(num_classes=0, learn_sigma=False, time_scale=1000.0, **fields)
    about = {"objective": "flow", "prediction": "velocity", "schedule": "linear", "label_names": [], "captions": {}}
    return Source(tokenizer, generator, about)


def test_a_directory_says_what_it_holds(make_tokenizer: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = pipeline(make_tokenizer)
    said: list[str] = []
    exported = export(source, out, what="generator", pictures=3, progress=said.append)
    assert {path.name for path in out.iterdir()} == {
        "export.json", "parity.json", "parity.md", "modulation.onnx", "step.onnx", "forward.onnx", "sampler.onnx",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    manifest = Manifest.read(out)
    assert manifest == exported.manifest and manifest.to == "onnx" and manifest.opset == 20
    assert manifest.pipeline == source.pipeline and manifest.generator is not None and manifest.generator["width"] == 16
    assert source.tokenizer is not None and manifest.tokenizer is not None and not manifest.tokenizer["latent_mean"]
    listed = json.loads((out / "parity.json").read_text())["outputs"]
    assert [row["graph"] for row in listed] == ["modulation", "step", "forward", "sampler", "sampler"]
    assert all(row["passed"] and (row["max_abs"] or 0) < 1e-4 for row in listed)
    assert "| forward | output | fp32 |" in (out / "parity.md").read_text()
    assert "tracing sampler" in said
    kept = onnx.load(str(out / "step.onnx"))
    properties = {entry.key: entry.value for entry in kept.metadata_props}
    assert json.loads(properties["textok_dit_config"]) == manifest.generator
    assert json.loads(properties["textok_pipeline"]) == source.pipeline
    assert json.loads(properties["textok_config"]) == manifest.tokenizer  # each file has the whole configuration
    # A file that is cut short is noticed, another's file is left alone, and an export gives way to the next.
    (out / "step.onnx").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"not complete: step.onnx is missing or cut short"):
        Manifest.read(out).require_complete(out)
    export(source, out, what="decoder", pictures=1)
    assert {path.name for path in out.iterdir()} == {"export.json", "parity.json", "parity.md", "decoder.onnx"}
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"holds thesis.tex, which is no part of an export"):
        export(source, out, what="decoder")


def test_what_cannot_be_exported_is_said_first(make_tokenizer: Make, tmp_path: Path) -> None:
    source, said = pipeline(make_tokenizer), list[str]()
    for given, options, message in (
        (source, {"to": "coreml"}, "exported to onnx, aoti"),
        (source, {"what": "vocoder"}, "must be one of encoder, decoder, generator, text, all"),
        (source, {"precision": "fp64"}, "precision must be one of fp32, fp16, bf16, fp8, int8"),
        (source, {"device": "cpu"}, "an export to onnx has no option device"),
        (source, {"pictures": 0}, "at least 1 picture"),
        (source, {"calibration": "max"}, "calibration is of int8 and fp8, the precision is fp32"),
        (source, {"precision": "int8", "calibration": "entropy"}, "one of max, percentile, mse, got 'entropy'"),
        (source, {"tolerance": -1.0}, "tolerance must be a number above 0, got -1.0"),
        (source, {"tolerance": float("nan")}, "above 0, got nan"),
        (source, {"to": "aoti", "tolerance": 0.0}, "above 0, got 0.0"),
        (source, {"opset": 17}, "opset must be 20 .* to 25, got 17"),
        (source, {"opset": 99}, "opset must be 20 .* to 25, got 99"),
        (source, {"profiles": [{"batch": (1, 2, 4)}]}, r"has no option profiles \(--batch and --text-length\)"),
        (Source(tokenizer=source.tokenizer), {"what": "generator"}, "no generator to export: the model is a tokenizer alone"),
        (
            Source(generator=source.generator),
            {"what": "text"},
            "no text of ours to export: the model is a generator",
        ),
        (source, {"to": "aoti", "what": "text"}, "holds no text encoder"),
        (source, {"to": "aoti", "precision": "fp16"}, "a package holds fp32 or bf16"),
    ):
        with pytest.raises(InputError, match=message):
            export(given, tmp_path / "out", progress=said.append, **options)
    assert set(said) <= {"pictures"}  # nothing was traced
    with pytest.raises(InputError, match="no model at"):
        export(tmp_path / "nowhere", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_of_a_generator_over_an_sd_vae_the_generator_is_exported(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes: dict[str, Any] = {"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
    sizes |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    dit = DiT(DiTConfig(input_size=4, patch_size=2, in_channels=4, width=32, depth=1, heads=2, num_classes=3))
    vae = LatentTokenizer(diffusers.AutoencoderKL(**sizes), 8)
    ClassToImagePipeline(dit, vae).save_pretrained(tmp_path / "pipe")
    done = export(tmp_path / "pipe", tmp_path / "out", pictures=1)
    assert {"modulation", "step", "forward", "sampler"} <= set(done.manifest.files) and "decoder" not in done.manifest.files
    assert all(row.passed for row in done.parity)
    with pytest.raises(InputError, match="no decoder of ours to export: the model is a generator, alone or with an SD-VAE"):
        export(tmp_path / "pipe", tmp_path / "other", what="decoder")


def test_the_commands_choices_are_the_exports() -> None:
    from textok_fast import cli

    assert tuple(TARGETS) == cli.EXPORT_TARGETS and PRECISIONS == cli.EXPORT_PRECISIONS and WHAT == cli.EXPORT_WHAT


def test_a_graph_beyond_its_tolerance_is_not_kept(make_tokenizer: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = pipeline(make_tokenizer)
    export(source, out, what="decoder", pictures=1)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(
        InputError, match=r"decoder's pixels in int8 differs .* the first layer to depart is decoder.vit.blocks.0"
    ):
        export(source, out, what="decoder", precision="int8", pictures=4, tolerance=1e-4)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_first_layer_to_depart_is_found(make_tokenizer: Make, tmp_path: Path) -> None:
    import onnx_ir as ir

    graph = DecoderGraph(make_tokenizer(text="none", decoder_depth=3))
    model = files.trace(graph, {})
    given = next(examples(graph, [(2, 1)]))
    errors = layer_errors(graph, model, given, tmp_path)
    names = [each.layer for each in errors]
    assert max(each.relative for each in errors) < 1e-5
    assert "decoder.vit.blocks.1.mlp.fc2" in names and names.index("decoder.vit.blocks.1.mlp.fc1") < names.index(
        "decoder.vit.norm"
    )
    weight = model.graph.initializers["decoder.vit.blocks.1.mlp.fc1.weight_t"]
    assert weight.const_value is not None
    weight.const_value = ir.Tensor(1.5 * weight.const_value.numpy(), name=weight.name)
    errors = layer_errors(graph, model, given, tmp_path)
    said = describe_departure(errors, 1e-3, "int8")
    assert said.startswith("the first layer to depart is decoder.vit.blocks.1.mlp.fc1 (")
    assert not list(tmp_path.iterdir())
    assert len(model.graph.outputs) == 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_halves(make_tokenizer: Make, tmp_path: Path, precision: str) -> None:
    source = Source(make_tokenizer(encoder_depth=1, decoder_depth=1))
    exported = export(source, tmp_path / "out", what="decoder", precision=precision, pictures=2)
    model = onnx.load(str(tmp_path / "out" / "decoder.onnx"))
    kinds = {tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("weight_t")}
    assert kinds == {onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16}
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {onnx.TensorProto.FLOAT}
    (row,) = exported.parity
    low, high = {"fp16": (1e-5, 5e-3), "bf16": (5e-4, 0.05)}[precision]
    assert row.passed and row.relative is not None and low < row.relative < high and row.psnr is not None
    if precision == "bf16":
        assert "each operator's result rounded to bfloat16" in (tmp_path / "out" / "parity.md").read_text()
        assert {path.name for path in (tmp_path / "out").iterdir()} <= Manifest.read(tmp_path / "out").owned
        with pytest.raises(InputError, match=r"pixels in bf16 differs .* the first layer to depart is decoder\."):
            export(source, tmp_path / "exact", what="decoder", precision=precision, pictures=2, tolerance=1e-4)


def test_a_later_opset_has_attention(tmp_path: Path) -> None:
    (graph,) = [graph for graph in generator_graphs(tiny_dit()) if graph.name == "step"]
    model = files.trace(graph, {}, 23)
    assert sum(node.op_type == "Attention" for node in model.graph) == 2  # of the block: its own and the caption's
    files.save(model, tmp_path / "step.onnx")
    assert_equal(graph, files.session(tmp_path / "step.onnx"), (1, 3), (1, 7))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_later_opset_has_attention_over_pictures_and_captions(
    make_tokenizer: Callable[..., TexTok], tmp_path: Path, side: str
) -> None:
    """The captions are rows of the sequence, so that the number of queries is free."""
    (graph,) = [graph for graph in tokenizer_graphs(make_tokenizer(text="both")) if graph.name == side]
    model = files.trace(graph, {}, 23)
    assert any(node.op_type == "Attention" for node in model.graph)
    files.save(model, tmp_path / "graph.onnx")
    assert_equal(graph, files.session(tmp_path / "graph.onnx"), (1, 3), (1, 7))
