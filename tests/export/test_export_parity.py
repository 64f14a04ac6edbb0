"""What counts as a departure: each measure on its own, on graphs whose error is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from textok_fast import InputError, TexTok

REASON = "ONNX export needs the extra 'export' (onnx, onnxscript, onnxruntime)"
onnx = pytest.importorskip("onnx", reason=REASON)
pytest.importorskip("onnxruntime", reason=REASON)

from tiny_export import tiny_dit  # noqa: E402

from textok_fast.export import Source, artifacts, parity  # noqa: E402
from textok_fast.export import onnx as files  # noqa: E402
from textok_fast.export.graphs import Graph  # noqa: E402
from textok_fast.export.material import Material  # noqa: E402
from textok_fast.inference.pipelines import ClassToImagePipeline  # noqa: E402

PRECISIONS = tuple(parity.TOLERANCES)


class Given(Graph):
    """A graph whose outputs are its inputs."""

    axes = {}  # noqa: RUF012

    def __init__(self, *outputs: str) -> None:
        super().__init__()
        self.name, self.outputs = "given", outputs

    def reference(self, *_: Any, **inputs: Any) -> tuple[Tensor, ...]:
        return tuple(inputs[name] for name in self.outputs)


def compared(wanted: dict[str, Tensor], got: dict[str, Tensor], precision: str, **options: Any) -> dict[str, Any]:
    graph = Given(*wanted)
    return {row.output: row for row in parity.compare(graph, lambda _: list(got.values()), [wanted], precision, **options)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_counter_is_to_be_the_same(precision: str) -> None:
    x = torch.ones(2, 3)
    assert compared({"index_next": torch.tensor([3])}, {"index_next": torch.tensor([3])}, precision)["index_next"].passed
    row = compared(
        {"x_next": x, "index_next": torch.tensor([3, 4, 5])}, {"x_next": x, "index_next": torch.tensor([3, 4, 6])}, precision
    )["index_next"]
    assert not row.passed and row.tolerance == 0 and "0.33 of its numbers differ" in row.excess


def test_tokens_of_other_codes_are_other_vectors_and_those_of_the_same_are_the_same() -> None:
    tokens, indices = torch.randn(1, 4, 3), torch.tensor([[0, 1, 2, 3]])
    wanted = {"tokens": tokens, "indices": indices}
    other = tokens.clone()
    other[0, 1] += 5.0
    rows = compared(wanted, {"tokens": other, "indices": torch.tensor([[0, 7, 2, 3]])}, "int8")
    assert rows["tokens"].passed and rows["tokens"].max_abs == 0
    assert rows["indices"].passed and rows["indices"].differing == 0.25
    rows = compared(wanted, {"tokens": other, "indices": indices}, "int8")  # the code's own vector is wrong
    assert not rows["tokens"].passed and rows["tokens"].tolerance == 0.15
    rows = compared(wanted, {"tokens": torch.full_like(tokens, math.nan), "indices": torch.tensor([[9, 9, 9, 9]])}, "int8")
    assert not rows["tokens"].passed and not rows["indices"].passed


def test_psnr_is_of_real_pictures() -> None:
    graph, picture = Given("pixels"), torch.zeros(1, 3, 4, 4)
    real, seeded = {"pixels": picture}, {"pixels": picture + 1}

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        return [given["pixels"] + (0.5 if given is seeded else 0.02)]

    (row,) = parity.compare(graph, run, [real], "fp32", 1.0, [seeded])
    assert row.cases == 2 and row.max_abs == 0.5 and row.psnr == pytest.approx(40.0, abs=0.01)  # 10 log10(4 / 0.02^2)
    (row,) = parity.compare(graph, run, [], "fp32", 1.0, [seeded])
    assert row.psnr is None
    assert parity.worst_input(graph, run, [real, seeded, real], "pixels", "fp32") is seeded


def test_a_layer_is_measured_as_the_graph_is() -> None:
    """In fp32 by the largest error; else by the norm, of which one wrong number among many is little."""
    errors = [parity.LayerError("one", relative=1e-6, scaled=2e-3), parity.LayerError("two", relative=0.3, scaled=1e-6)]
    assert parity.describe_departure(errors, 1e-3, "fp32").startswith("the first layer to depart is one (error 0.002)")
    assert parity.describe_departure(errors, 1e-3, "int8").startswith("the first layer to depart is two (relative error 0.3)")
    assert "the worst two" in parity.describe_departure([*errors, parity.LayerError("two", math.nan)], 1e-9, "int8")


# -- whole samples -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(make_tokenizer: Callable[..., TexTok]) -> ClassToImagePipeline:
    tokenizer = make_tokenizer(encoder_depth=1, decoder_depth=1, text="none")
    return ClassToImagePipeline(tiny_dit(text_dim=0), tokenizer)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_samples_have_a_limit(pipeline: ClassToImagePipeline, precision: str) -> None:
    """Any pipeline is taken, on whatever it runs; that of other weights is refused in every precision."""
    material = Material.gather(Source(pipeline.tokenizer, pipeline.generator), count=3)
    tokens, pictures = parity.whole_samples(pipeline, pipeline, material, precision)
    assert tokens.passed and pictures.passed and tokens.max_abs == 0 and math.isinf(pictures.psnr or 0)
    assert (tokens.tolerance, pictures.least_psnr) == (parity.SAMPLE_TOLERANCES[precision], parity.SAMPLE_PSNR[precision])
    other = ClassToImagePipeline(tiny_dit(text_dim=0, depth=2), pipeline.tokenizer)
    tokens, _ = parity.whole_samples(pipeline, other, material, precision)
    assert not tokens.passed
    with pytest.raises(InputError, match=r"tokens of whole samples \(8 steps of the engines\) .* though each graph alone"):
        artifacts.whole_samples(pipeline, other, material, precision, name=" of the engines")
    loose, _ = parity.whole_samples(pipeline, other, material, precision, tolerance=1000.0)
    assert loose.passed


# -- bfloat16 ------------------------------------------------------------------------------------------------------------------


def test_a_widened_graph_rounds_where_bfloat16_would(tmp_path: Path) -> None:
    import ml_dtypes
    import onnx_ir as ir

    draw = np.random.default_rng(0)
    weight, bias = (draw.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((8, 5), (5,)))
    helper, kind = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["x16"], to=kind.BFLOAT16),
            helper.make_node("MatMul", ["x16", "weight"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["sum"]),
            helper.make_node("Cast", ["sum"], ["y"], to=kind.FLOAT),
        ],
        "linear",
        [helper.make_tensor_value_info("x", kind.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", kind.FLOAT, ["batch", 5])],
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(bias, "bias")],
        value_info=[
            helper.make_tensor_value_info(name, kind.BFLOAT16, ["batch", size])
            for name, size in (("x16", 8), ("product", 5), ("sum", 5))
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(tmp_path / "narrow.onnx")
    )
    model = ir.load(tmp_path / "narrow.onnx")
    files.widen(model)
    files.save(model, tmp_path / "wide.onnx")
    x = torch.randn(64, 8)
    (got,) = files.run(files.session(tmp_path / "wide.onnx"), {"x": x})
    w, b = (torch.from_numpy(each.astype(np.float32)) for each in (weight, bias))
    wanted = ((x.bfloat16().float() @ w).bfloat16().float() + b).bfloat16().float()
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=1e-3)  # a product on the border may round to the other side
    assert float((got == wanted).float().mean()) > 0.95
    assert torch.equal(got, got.bfloat16().float()) and not torch.equal(got, x @ w + b)
