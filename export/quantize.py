"""Post-training quantization of exported graphs: calibrate on real inputs, then write Q/DQ nodes around the products.

What TensorRT and ONNX Runtime fuse into an int8 or FP8 product: both of its inputs quantized and at once dequantized, the
weight with a scale for each output channel, the activation with one for the whole tensor, both symmetric (Wu et al. 2020, arXiv
2004.09602). Only products with a weight are touched. LayerNorm, softmax and attention's own products stay as they are, and so
do the embeddings and the last layer, where an error is not averaged out, and adaLN's products, which all blocks would see.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.export.graphs import Inputs
from textok_fast.export.onnx import release, run, save, scope, session, weight_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

Method = Literal["max", "percentile", "mse"]
METHODS: tuple[Method, ...] = ("max", "percentile", "mse")
LEVELS = {"int8": 127.0, "fp8": 448.0}  # the largest number that each holds; fp8 is e4m3
PERCENTILE = 99.99  # of |x|
BINS = 2048
_AT_ONCE = 2**30  # bytes of activations that one run of the graph hands out, about
_SMALLEST = 2.0**-24  # a range: of an activation that is always 0


@dataclass(frozen=True)
class Product:
    """A MatMul or Gemm with a constant weight. ``axis``: the weight's output channels."""

    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    axis: int


def products(model: ir.Model, left_alone: Sequence[str] = ()) -> list[Product]:
    """Those to quantize, in the graph's order; ``left_alone``: modules whose products stay as they are."""
    found = []
    initializers = model.graph.initializers
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        activation, weight = node.inputs[0], node.inputs[1]
        if activation is None or weight is None or weight.name not in initializers or activation.name in initializers:
            continue
        place = scope(node)
        if any(place == each or place.startswith(f"{each}.") for each in left_alone) or "adaLN_modulation" in place:
            continue
        transposed = node.op_type == "Gemm" and (flag := node.attributes.get("transB")) is not None and flag.as_int() == 1
        found.append(Product(node, activation, weight, 0 if transposed else 1))
    return found


# -- calibration ---------------------------------------------------------------------------------------------------------------


def require_method(method: str) -> None:
    """InputError for another than :data:`METHODS`."""
    if method not in METHODS:
        raise InputError(f"calibration must be one of {', '.join(METHODS)}, got {method!r}")


def calibrate(
    model: ir.Model,
    found: Sequence[Product],
    inputs: Sequence[Inputs],
    directory: Path,
    method: Method = "percentile",
    precision: str = "int8",
) -> dict[str, float]:
    """The largest magnitude that each product's activation is to hold, by its name.

    ``max``: the largest seen; ``percentile``: 99.99 % of the numbers are within it; ``mse``: the one whose rounding and
    clipping loses least, of 64 between an eighth of the largest and all of it.

    Args:
        inputs: what the graph is run on, in float32, in ONNX Runtime.
        directory: where the model's weights lie, if they lie in a file.
    """
    require_method(method)
    if not inputs:
        raise InputError("calibration needs inputs: give at least one captioned picture")
    values = {str(each.activation.name): each.activation for each in found}
    if not values:
        return {}
    known = [str(value.name) for value in model.graph.outputs]
    given = {str(value.name) for value in model.graph.inputs}
    count = len(model.graph.outputs)
    model.graph.outputs.extend(value for name, value in values.items() if name not in known and name not in given)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, suffix=".onnx") as file:
            save(model, Path(file.name))
            handle = session(Path(file.name))
    finally:
        while len(model.graph.outputs) > count:
            model.graph.outputs.pop()  # a slice that is deleted leaves its values marked as outputs, written without a type
    names = [name for name in values if name not in given]

    def activations() -> Iterator[tuple[str, Tensor]]:
        for example in inputs:
            yield from ((name, value) for name, value in example.items() if name in values)
            done, size = 0, 8
            while done < len(names):
                part = names[done : done + size]
                found = run(handle, example, part)
                yield from zip(part, found, strict=True)
                done += size
                size = max(1, size * _AT_ONCE // max(1, sum(each.nbytes for each in found)))

    largest = dict.fromkeys(values, 0.0)
    for name, value in activations():
        largest[name] = max(largest[name], float(value.abs().max()))
    if method == "max":
        return {name: max(most, _SMALLEST) for name, most in largest.items()}
    histograms = {name: torch.zeros(BINS, dtype=torch.float64) for name in values}
    for name, value in activations():
        if largest[name]:
            histograms[name] += torch.histc(value.float().abs(), BINS, 0.0, largest[name]).double()
    choose = _percentile if method == "percentile" else _least_error
    return {name: max(choose(histograms[name], most, precision), _SMALLEST) for name, most in largest.items()}


def _percentile(histogram: Tensor, largest: float, precision: str) -> float:
    share = histogram.cumsum(0) / histogram.sum().clamp(min=1)
    place = int(torch.searchsorted(share, PERCENTILE / 100))
    return largest * (min(place, BINS - 1) + 1) / BINS


def _least_error(histogram: Tensor, largest: float, precision: str) -> float:
    centers = (torch.arange(BINS, dtype=torch.float64) + 0.5) * largest / BINS  # (bins,)
    candidates = largest * torch.linspace(0.125, 1.0, 64, dtype=torch.float64)
    errors = [
        float((histogram * (centers - round_trip(centers, float(each), precision)).square()).sum()) for each in candidates
    ]
    return float(candidates[int(np.argmin(errors))])


def round_trip(x: Tensor, largest: float, precision: str) -> Tensor:
    """x quantized so that ``largest`` is the greatest number held, and dequantized again."""
    scale = largest / LEVELS[precision]
    scaled = (x / scale).clamp(-LEVELS[precision], LEVELS[precision])
    rounded = scaled.round() if precision == "int8" else scaled.float().to(torch.float8_e4m3fn).to(x.dtype)
    return rounded * scale


def quantized_bytes(model: ir.Model, found: Sequence[Product]) -> int:
    """Of the model's weights after :func:`quantize`: those of ``found`` take a byte a number."""
    replaced = {str(each.weight.name): each.weight.const_value for each in found}
    return weight_bytes(model) - sum(each.nbytes - each.size for each in replaced.values() if each is not None)


# -- the graph -----------------------------------------------------------------------------------------------------------------


def quantize(model: ir.Model, found: Sequence[Product], ranges: dict[str, float], precision: str) -> int:
    """Writes QuantizeLinear and DequantizeLinear around the inputs of ``found``, in place; weights become int8 or e4m3.

    ``ranges``: as :func:`calibrate` gives them. Returns how many products are quantized.
    """
    import onnx_ir as ir

    if precision not in LEVELS:
        raise InputError(f"a graph is quantized to {' or '.join(LEVELS)}, got {precision!r}")
    if not found:
        return 0
    graph = model.graph
    activations: dict[str, ir.Value] = {}  # name -> its dequantized form
    weights: dict[tuple[str, int], ir.Value] = {}

    def constant(name: str, array: Any) -> ir.Value:
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
        return value

    zero = constant(f"{precision}_zero", _narrow(np.zeros((), np.float32), precision))
    for product in found:
        x, w, node = product.activation, product.weight, product.node
        name = str(x.name)
        if name not in activations:
            scale = constant(f"{name}_scale", np.array(ranges[name] / LEVELS[precision], np.float32))
            narrow = ir.Node("", "QuantizeLinear", [x, scale, zero], outputs=[ir.Value(name=f"{name}_{precision}")])
            wide = ir.Node(
                "", "DequantizeLinear", [narrow.outputs[0], scale, zero], outputs=[ir.Value(name=f"{name}_dequantized")]
            )
            graph.insert_before(node, [narrow, wide])
            activations[name] = wide.outputs[0]
        key = (str(w.name), product.axis)
        if key not in weights:
            weights[key] = _weight(graph, node, w, product.axis, precision, constant)
        node.replace_input_with(0, activations[name])
        node.replace_input_with(1, weights[key])
    for name in {name for name, _ in weights}:
        if not graph.initializers[name].uses():
            del graph.initializers[name]
    return len(found)


def _weight(graph: ir.Graph, node: ir.Node, w: ir.Value, axis: int, precision: str, constant: Any) -> ir.Value:
    import onnx_ir as ir

    assert w.const_value is not None
    array = np.array(w.const_value.numpy(), np.float32)  # a copy: the file's pages are let go
    release(w.const_value)
    scale = np.maximum(np.abs(array).max(axis=1 - axis) / LEVELS[precision], _SMALLEST).astype(np.float32)  # (out,)
    narrow = constant(f"{w.name}_{precision}", _narrow(array / np.expand_dims(scale, 1 - axis), precision))
    zeros = constant(f"{w.name}_zero", _narrow(np.zeros(scale.shape, np.float32), precision))
    wide = ir.Node(
        "",
        "DequantizeLinear",
        [narrow, constant(f"{w.name}_scale", scale), zeros],
        [ir.AttrInt64("axis", axis)],
        outputs=[ir.Value(name=f"{w.name}_dequantized")],
    )
    graph.insert_before(node, [wide])
    return wide.outputs[0]


def _narrow(array: Any, precision: str) -> Any:
    """Scaled numbers as int8 or e4m3."""
    if precision == "int8":
        return np.clip(np.rint(array), -127, 127).astype(np.int8)
    import ml_dtypes

    return np.clip(array, -448, 448).astype(ml_dtypes.float8_e4m3fn)
