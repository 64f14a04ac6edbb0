"""Quantized graphs: where the Q/DQ nodes stand, what calibration chooses, and that they run at every size."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from textok_fast import DiT, DiTConfig, InputError, TexTok

REASON = "ONNX export needs the extra 'export' (onnx, onnxscript, onnxruntime)"
onnx = pytest.importorskip("onnx", reason=REASON)
pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

from textok_fast.export import Source, export_onnx, quantize  # noqa: E402
from textok_fast.export import onnx as files  # noqa: E402
from textok_fast.export.graphs import DecoderGraph, GeneratorNetwork, StepGraph, TextGraph  # noqa: E402
from textok_fast.export.material import Material  # noqa: E402
from textok_fast.export.parity import examples  # noqa: E402
from textok_fast.export.tensorrt import BuildOptions, build_engines  # noqa: E402

Make = Callable[..., TexTok]


@pytest.fixture(scope="module")
def source(make_tokenizer: Make) -> Source:
    tokenizer = make_tokenizer()
    sizes = {"width": 32, "depth": 2, "heads": 2, "num_tokens": 3, "in_channels": 4, "num_classes": 5, "text_dim": 8}
    generator = DiT(DiTConfig(**sizes, learn_sigma=False, time_scale=1000.0)).eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    about = {"objective": "flow", "prediction": "velocity", "label_names": [], "captions": {}}
    return Source(tokenizer, generator, about)


@pytest.fixture(scope="module", params=["int8", "fp8"])
def exported(request: pytest.FixtureRequest, source: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    out = tmp_path_factory.mktemp("quantized") / request.param
    return request.param, out, export_onnx(source, out, "all" if request.param == "int8" else "decoder", request.param)


@pytest.mark.parametrize("name", ["encoder", "decoder", "step", "forward"])
def test_only_products_with_weights_are_quantized(exported: tuple[str, Path, Any], name: str) -> None:
    precision, out, _ = exported
    if not (out / f"{name}.onnx").is_file():
        pytest.skip("not exported")
    graph = onnx.load(str(out / f"{name}.onnx")).graph
    made = {value: node for node in graph.node for value in node.output}
    held = {tensor.name: tensor for tensor in graph.initializer}
    kind = onnx.TensorProto.INT8 if precision == "int8" else onnx.TensorProto.FLOAT8E4M3FN
    quantized = 0
    for node in graph.node:
        sources = [made.get(value) for value in node.input]
        ops = [None if each is None else each.op_type for each in sources]
        if "DequantizeLinear" not in ops or node.op_type == "DequantizeLinear":
            continue
        assert node.op_type in ("MatMul", "Gemm") and ops[:2] == ["DequantizeLinear"] * 2
        quantized += 1
        activation, weight = sources[:2]
        narrow = made[activation.input[0]]
        assert narrow.op_type == "QuantizeLinear" and held[narrow.input[1]].dims == []  # one scale for the tensor
        assert held[narrow.input[2]].data_type == kind  # whose zero point is 0
        assert not onnx.numpy_helper.to_array(held[narrow.input[2]]).astype(np.float32).any()
        stored = held[weight.input[0]]
        (axis,) = [attribute.i for attribute in weight.attribute if attribute.name == "axis"]
        assert stored.data_type == kind and list(held[weight.input[1]].dims) == [stored.dims[axis]]
    # Of each of two blocks: qkv, proj, fc1 and fc2, and in the generator the cross-attention's q, kv and proj.
    assert quantized == {"encoder": 8, "decoder": 8, "step": 14, "forward": 14}[name]


def test_every_batch_and_caption_length_runs(source: Source, exported: tuple[str, Path, Any]) -> None:
    _, out, result = exported
    assert all(row.passed for row in result.parity)
    assert any(row.relative is not None and row.relative > 1e-3 for row in result.parity)  # it is quantized
    assert source.tokenizer is not None and source.generator is not None
    graphs = [DecoderGraph(source.tokenizer), StepGraph(GeneratorNetwork(source.generator, torch.float32))]
    for graph in [graph for graph in graphs if (out / f"{graph.name}.onnx").is_file()]:
        handle = files.session(out / f"{graph.name}.onnx")
        for given in examples(graph, [(batch, length) for batch in (1, 3, 8) for length in (1, 5, 16)]):
            (got,) = files.run(handle, given)
            (wanted,) = graph.reference(**given)
            # Within 0.15 on the held-out pictures (the rows above); random numbers lie outside of the calibrated ranges.
            assert got.shape == wanted.shape and float((got - wanted).norm() / wanted.norm()) < 0.25


def test_weights_shrink(source: Source, exported: tuple[str, Path, Any], tmp_path: Path) -> None:
    _, out, _ = exported
    assert source.tokenizer is not None
    files.save(files.trace(DecoderGraph(source.tokenizer), {}), tmp_path / "decoder.onnx")
    held = {"quantized": out / "decoder.onnx", "float": tmp_path / "decoder.onnx"}
    sizes = {
        name: sum(len(tensor.raw_data) for tensor in onnx.load(str(path)).graph.initializer if "blocks" in tensor.name)
        for name, path in held.items()
    }
    assert sizes["quantized"] < 0.4 * sizes["float"]


# -- calibration ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_ranges(source: Source, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source.tokenizer is not None
    monkeypatch.setattr(quantize, "PERCENTILE", 90.0)  # of so few numbers the largest is within 99.99 %
    graph = DecoderGraph(source.tokenizer)
    model = files.trace(graph, {})
    inputs = list(Material.gather(Source(source.tokenizer), count=4).inputs(graph))
    found = quantize.products(model, graph.left_alone)
    ranges = {method: quantize.calibrate(model, found, inputs, tmp_path, method, precision) for method in quantize.METHODS}
    assert len(ranges["max"]) == len({each.activation.name for each in found})
    for name, largest in ranges["max"].items():
        assert 0 < ranges["percentile"][name] <= largest * (1 + 1e-6)
        assert largest / 8 <= ranges["mse"][name] <= largest * (1 + 1e-6)
    # The largest number is that of the activation itself: of an exact run of the graph with the activation as its output.
    name = next(iter(ranges["max"]))
    model.graph.outputs.append(found[0].activation)
    files.save(model, tmp_path / "probe.onnx")
    handle = files.session(tmp_path / "probe.onnx")
    seen = torch.cat([files.run(handle, given, [name])[0].abs().flatten() for given in inputs])
    assert ranges["max"][name] == pytest.approx(float(seen.max()))
    wanted = float(seen.quantile(0.9))  # but for the histogram's bins
    assert wanted <= ranges["percentile"][name] <= wanted + 3 * float(seen.max()) / quantize.BINS < 0.9 * float(seen.max())


def test_the_least_error_is_the_least() -> None:
    """A few large numbers among many small ones: to clip them costs less than to round all others coarsely."""
    x = torch.cat([torch.randn(4_000_000), torch.tensor([40.0])]).double()
    histogram = torch.histc(x.abs(), quantize.BINS, 0.0, 40.0)
    chosen = quantize._least_error(histogram, 40.0, "int8")
    assert 4 < chosen < 12

    def error(largest: float) -> float:
        return float((x - quantize.round_trip(x, largest, "int8")).square().mean())

    assert error(chosen) < error(40.0) and error(chosen) < 1.05 * min(error(40.0 * i / 64) for i in range(8, 65))
    assert 3.5 < quantize._percentile(histogram, 40.0, "int8") < 4.5  # of 99.99 % of a normal distribution: 3.9


def test_e4m3_rounds_as_torch_does() -> None:
    x = torch.tensor([0.0, 0.1, 1.0, 1.0625, 447.0, 1000.0, -3.3])
    assert quantize.round_trip(x, 448.0, "fp8").tolist() == x.clamp(max=448).to(torch.float8_e4m3fn).float().tolist()


def test_mistakes_are_named(source: Source, tmp_path: Path) -> None:
    assert source.tokenizer is not None
    model = files.trace(DecoderGraph(source.tokenizer), {})
    found = quantize.products(model)
    with pytest.raises(InputError, match="one of max, percentile, mse, got 'entropy'"):
        quantize.calibrate(model, found, [{}], tmp_path, "entropy")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one captioned picture"):
        quantize.calibrate(model, found, [], tmp_path)
    with pytest.raises(InputError, match="int8 or fp8, got 'int4'"):
        quantize.quantize(model, found, {}, "int4")


def test_an_activation_that_is_always_zero(source: Source, tmp_path: Path) -> None:
    assert source.tokenizer is not None
    graph = DecoderGraph(source.tokenizer)
    model = files.trace(graph, {})
    found = quantize.products(model, graph.left_alone)
    quantize.quantize(model, found, {str(each.activation.name): quantize._SMALLEST for each in found}, "int8")
    files.save(model, tmp_path / "decoder.onnx")
    (pixels,) = files.run(files.session(tmp_path / "decoder.onnx"), next(examples(graph, [(2, 3)])))
    assert bool(torch.isfinite(pixels).all())


def test_text_graphs_see_the_captions_as_their_encoder_hands_them_over(source: Source) -> None:
    class Words:
        pad_token_id = 9

        def __call__(self, texts: list[str], truncation: bool, max_length: int | None) -> dict[str, list[list[int]]]:
            assert truncation and max_length == 4
            return {"input_ids": [[1, *(len(word) for word in text.split()), 2][:max_length] for text in texts]}

    material = Material.gather(source, count=3)
    assert len(material.captions) == 3 and all(material.captions)
    material.captions = ["a cow; red sky", "", "sheep"]
    graph = TextGraph(torch.nn.Identity(), 10, 4)
    assert not list(material.inputs(graph))  # of no encoder
    graph._source = SimpleNamespace(  # type: ignore[assignment]
        _loaded=lambda: SimpleNamespace(tokenizer=Words()),
        _clauses=lambda index, text: [each for each in text.split("; ") if each],
    )
    first, second = material.inputs(graph)
    assert first["input_ids"].tolist() == [[1, 1, 3, 2], [1, 3, 3, 2]] and first["attention_mask"].min() == 1
    assert second["input_ids"].tolist() == [[1, 5, 2]]
    material.captions = ["a cow; sheep", "", ""]
    (given,) = material.inputs(graph)
    assert given["input_ids"].tolist() == [[1, 1, 3, 2], [1, 5, 2, 9]]
    assert given["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")
def test_quantized_graphs_become_engines_of_their_precision(exported: tuple[str, Path, Any], tmp_path: Path) -> None:
    precision, out, _ = exported
    for name in ("decoder", "step")[: 1 + (precision == "int8")]:
        options = BuildOptions([{"batch": (1, 2, 4), "text_length": (1, 4, 8)}], targets=["sm_89"])
        ((_, about),) = build_engines(out, "tensorrt-rtx", [name], options, tmp_path)
        assert (about.precision, about.targets) == (precision, ["sm_89"])
