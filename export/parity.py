"""How far an exported graph is from the PyTorch class on the same inputs, and where it begins to be."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from textok_fast.export.graphs import Graph, Inputs
from textok_fast.export.onnx import run, save, scope, session

if TYPE_CHECKING:
    import onnx_ir as ir

# What an export may differ by: in fp32 the largest difference, in units of the reference's largest where that is above 1;
# else the norm of the difference over the reference's norm. Of code indices, the share that differs.
TOLERANCES = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.05, "int8": 0.15, "fp8": 0.15}
INDEX_TOLERANCES = {"fp32": 0.01, "fp16": 0.1, "bf16": 0.2, "int8": 0.5, "fp8": 0.5}


@dataclass
class OutputParity:
    """One output of one graph over all inputs it was compared on.

    ``max_abs`` and ``relative`` (norm over norm) of floats, ``differing`` of indices; ``psnr`` of pictures in dB. ``passed``
    None: not run, ``reason`` says why.
    """

    graph: str
    output: str
    precision: str
    cases: int
    max_abs: float | None = None
    relative: float | None = None
    differing: float | None = None
    psnr: float | None = None
    tolerance: float | None = None
    passed: bool | None = None
    reason: str = ""


def examples(graph: Graph, sizes: Iterable[tuple[int, int]]) -> Iterator[Inputs]:
    """Seeded inputs of these batches and caption lengths, none longer than the graph takes."""
    for batch, length in sizes:
        length = length if graph.most_text is None else min(length, graph.most_text)
        yield graph.example(batch, length, torch.Generator().manual_seed(1000 * batch + length))


def in_runtime(path: Path, graph: Graph) -> Callable[[Inputs], list[Tensor]]:
    """The file in ONNX Runtime on the CPU, as :func:`compare` takes it."""
    handle = session(path)
    return lambda given: run(handle, given, list(graph.outputs))


def compare(
    graph: Graph,
    exported: Callable[[Inputs], Sequence[Tensor]],
    inputs: Iterable[Inputs],
    precision: str,
    tolerance: float | None = None,
) -> list[OutputParity]:
    """What was exported beside ``graph.reference``: one result an output.

    ``tolerance``: of floats; None is what :data:`TOLERANCES` says.
    """
    errors = [_Errors() for _ in graph.outputs]
    for given in inputs:
        for error, reference, got in zip(errors, graph.reference(**given), exported(given), strict=True):
            error.add(reference, got)
    results = []
    is_discrete = any(name == "indices" for name in graph.outputs)
    for name, error in zip(graph.outputs, errors, strict=True):
        result = OutputParity(graph.name, name, precision, error.cases)
        if error.numbers:
            result.differing = error.different / error.numbers
            result.tolerance = INDEX_TOLERANCES[precision]
            result.passed = result.differing <= result.tolerance
        else:
            result.max_abs, result.relative = error.largest, error.relative
            result.tolerance = TOLERANCES[precision] if tolerance is None else tolerance
            measure = error.scaled if precision == "fp32" else error.relative
            result.passed = measure <= result.tolerance  # NaN is not
            if is_discrete and precision != "fp32":  # its tokens are its codes: another code is another vector
                result.passed, result.tolerance = not math.isnan(error.relative), None
        if name == "pixels" and error.numbers == 0:
            result.psnr = error.psnr
        results.append(result)
    return results


class _Errors:
    """Sums over the inputs that one output was compared on."""

    def __init__(self) -> None:
        self.cases = self.numbers = self.different = self.count = 0
        self.largest = self.scaled = 0.0
        self._squares = self._reference = 0.0

    def add(self, wanted: Tensor, got: Tensor) -> None:
        self.cases += 1
        if not wanted.is_floating_point():
            self.numbers += wanted.numel()
            self.different += int((wanted != got).sum())
            return
        wanted, got = wanted.double(), got.double()
        difference = (got - wanted).abs()
        most = float(difference.max()) if bool(torch.isfinite(got).all()) else math.nan
        self.largest = _larger(self.largest, most)
        self.scaled = _larger(self.scaled, most / max(1.0, float(wanted.abs().max())))
        self._squares += float(difference.square().sum()) if not math.isnan(most) else math.nan
        self._reference += float(wanted.square().sum())
        self.count += wanted.numel()

    @property
    def relative(self) -> float:
        return math.sqrt(self._squares / max(self._reference, 1e-30))

    @property
    def psnr(self) -> float:
        """Of pictures in [-1, 1], over all of them."""
        error = self._squares / max(self.count, 1)
        return math.inf if error == 0 else 10 * math.log10(4 / error)


def _larger(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


# -- where it departs ----------------------------------------------------------------------------------------------------------


@dataclass
class LayerError:
    """``relative`` error of one layer's output in ONNX Runtime."""

    layer: str
    relative: float


def layer_errors(graph: Graph, model: ir.Model, given: Inputs, directory: Path) -> list[LayerError]:
    """The linear layers and LayerNorms of the float32 ``graph`` beside the same values in ``model``, in the order in which they
    run, for one set of inputs.

    ``directory``: where the model's weights lie, if they lie in a file.
    """
    eager: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in graph.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):

            def keep(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                eager.setdefault(name, []).append(output.detach().float())

            handles.append(module.register_forward_hook(keep))  # a hook also keeps the layer from being read past
    try:
        with torch.no_grad():
            graph(**given)
    finally:
        for handle in handles:
            handle.remove()
    values = last_values(model, set(eager))
    outputs = list(model.graph.outputs)
    known = {value.name for value in outputs}
    model.graph.outputs.extend(value for value in values.values() if value.name not in known)
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".layers.") as work:
            path = Path(work).with_suffix(".onnx")  # beside the weights
            try:
                save(model, path)
                results = dict(
                    zip(values, run(session(path), given, [str(value.name) for value in values.values()]), strict=True)
                )
            finally:
                path.unlink(missing_ok=True)
    finally:
        del model.graph.outputs[len(outputs) :]
    found = []
    for name in values:  # in the graph's order
        for wanted in eager[name]:
            got = results[name].float()
            if wanted.shape == got.shape:
                error = float((got - wanted).norm() / wanted.norm().clamp(min=1e-12))
                found.append(LayerError(name, error))
                break
    return found


def last_values(model: ir.Model, modules: set[str]) -> dict[str, ir.Value]:
    """What each of the modules ends with in the graph, in the graph's order."""
    found: dict[str, ir.Value] = {}
    for node in model.graph:
        name = scope(node)
        if name in modules and node.outputs:
            found.pop(name, None)
            found[name] = node.outputs[0]
    return found


def describe_departure(errors: Sequence[LayerError], limit: float) -> str:
    """Which layer is the first whose error is above ``limit``, and which is the worst."""
    if not errors:
        return "no layer of the graph could be compared"
    first = next((each for each in errors if not each.relative <= limit), None)
    worst = max(errors, key=lambda each: math.inf if math.isnan(each.relative) else each.relative)
    if first is None:
        largest = f"the largest relative error is {worst.relative:.2g} at {worst.layer}"
        return f"no single layer is off by more than {limit:.2g}; {largest}"
    rest = f"(relative error {first.relative:.2g}), the worst {worst.layer} ({worst.relative:.2g})"
    return f"the first layer to depart is {first.layer} {rest}"


# -- the table -----------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[OutputParity], title: str, note: str = "") -> str:
    """As Markdown."""
    lines = [f"# {title}", "", *([note, ""] if note else [])]
    lines += [
        "| graph | output | precision | inputs | max error | relative error | indices that differ | PSNR, dB | allowed | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = row.reason if row.passed is None else "passed" if row.passed else f"failed {row.reason}".strip()
        cells = [
            _number(row.max_abs),
            _number(row.relative),
            _number(row.differing),
            _decibels(row.psnr),
            _number(row.tolerance),
        ]
        lines.append(f"| {row.graph} | {row.output} | {row.precision} | {row.cases} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _decibels(value: float | None) -> str:
    return "" if value is None else "equal" if math.isinf(value) else f"{value:.1f}"


def to_json(rows: Sequence[OutputParity], **about: Any) -> str:
    """What parity.json holds; an infinite PSNR is null there, and a NaN too."""
    listed = []
    for row in rows:
        values = dataclasses.asdict(row)
        listed.append({key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()})
    return json.dumps({**about, "outputs": listed}, indent=1) + "\n"
