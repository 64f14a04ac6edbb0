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

from textok_fast.errors import InputError
from textok_fast.export.graphs import Graph, Inputs
from textok_fast.export.onnx import run, save, scope, session
from textok_fast.modeling.text_encoders import TextFeatures

if TYPE_CHECKING:
    import onnx_ir as ir

    from textok_fast.export.material import Material
    from textok_fast.inference.pipelines import GenerationPipeline

CHECKED = ((1, 1), (3, 7))  # batches and caption lengths beside those of the pictures
SAMPLED = 2  # samples, at most, that are drawn with the export and with PyTorch

# What an export may differ by: in fp32 the largest difference, in units of the reference's largest where that is above 1;
# else the norm of the difference over the reference's norm. Of code indices, the share that differs; the tokens of these are
# compared where the index is the same, for another code is another vector. Other integers are to be the same.
TOLERANCES = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.05, "int8": 0.15, "fp8": 0.15}
INDEX_TOLERANCES = {"fp32": 0.01, "fp16": 0.1, "bf16": 0.2, "int8": 0.5, "fp8": 0.5}
# Of whole samples, to which errors of all steps add up: the tokens' relative error, and the pictures' least PSNR in dB.
SAMPLE_TOLERANCES = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.1, "int8": 0.3, "fp8": 0.3}
SAMPLE_PSNR = {"fp32": 60.0, "fp16": 35.0, "bf16": 25.0, "int8": 15.0, "fp8": 15.0}


@dataclass
class OutputParity:
    """One output of one graph over all inputs it was compared on.

    ``max_abs`` and ``relative`` (norm over norm) of floats, ``differing`` of integers; ``psnr`` of pictures in dB. Allowed is a
    ``tolerance``, or at least ``least_psnr``. ``passed`` None: not run, ``reason`` says why.
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
    least_psnr: float | None = None
    passed: bool | None = None
    reason: str = ""

    @property
    def excess(self) -> str:
        """Of one that failed: by how much, in words."""
        if self.differing is not None:
            return f"{self.differing:.2g} of its numbers differ, allowed is {self.tolerance:.3g}"
        if self.least_psnr is not None:
            return f"PSNR {self.psnr:.1f} dB, at least {self.least_psnr:.1f} is wanted"
        return f"largest error {self.max_abs:.3g}, relative {self.relative:.3g}, allowed is {self.tolerance:.3g}"


def examples(graph: Graph, sizes: Iterable[tuple[int, int]]) -> Iterator[Inputs]:
    """Seeded inputs of these batches and caption lengths, none longer than the graph takes."""
    for batch, length in sizes:
        length = length if graph.most_text is None else min(length, graph.most_text)
        yield graph.example(batch, length, torch.Generator().manual_seed(1000 * batch + length))


def in_runtime(path: Path, graph: Graph) -> Callable[[Inputs], list[Tensor]]:
    """The file in ONNX Runtime on the CPU, as :func:`compare` takes it."""
    handle = session(path)
    return lambda given: run(handle, given, list(graph.outputs))


def require_tolerance(tolerance: float | None) -> None:
    """InputError for a limit that no error can be held to."""
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise InputError(f"the tolerance must be a number above 0, got {tolerance}")


def compare(
    graph: Graph,
    exported: Callable[[Inputs], Sequence[Tensor]],
    inputs: Iterable[Inputs],
    precision: str,
    tolerance: float | None = None,
    seeded: Iterable[Inputs] = (),
) -> list[OutputParity]:
    """What was exported beside ``graph.reference``: one result an output.

    Args:
        inputs: of real pictures; PSNR is over these alone.
        seeded: further inputs, whose errors count as those of ``inputs`` do.
        tolerance: of floats; None is what :data:`TOLERANCES` says. The limits of integers are not changed by it.
    """
    errors = [_Errors() for _ in graph.outputs]
    for given in seeded:
        _add(errors, graph, given, exported(given), real=False)
    for given in inputs:
        _add(errors, graph, given, exported(given), real=True)
    results = []
    for name, error in zip(graph.outputs, errors, strict=True):
        result = OutputParity(graph.name, name, precision, error.cases)
        if error.numbers:
            result.differing = error.different / error.numbers
            result.tolerance = INDEX_TOLERANCES[precision] if name == "indices" else 0.0
            result.passed = result.differing <= result.tolerance
        else:
            result.max_abs, result.relative = error.largest, error.relative
            result.tolerance = TOLERANCES[precision] if tolerance is None else tolerance
            result.passed = error.measure(precision) <= result.tolerance  # NaN is not
        if name == "pixels" and error.real:
            result.psnr = error.psnr
        results.append(result)
    return results


def worst_input(
    graph: Graph, exported: Callable[[Inputs], Sequence[Tensor]], inputs: Iterable[Inputs], output: str, precision: str
) -> Inputs:
    """That of ``inputs`` for which ``output`` is furthest from PyTorch's."""
    place = graph.outputs.index(output)
    most, worst = -1.0, None
    for given in inputs:
        errors = [_Errors() for _ in graph.outputs]
        _add(errors, graph, given, exported(given), real=True)
        error = errors[place]
        size = error.different / error.numbers if error.numbers else error.measure(precision)
        size = math.inf if math.isnan(size) else size
        if size > most:
            most, worst = size, given
    assert worst is not None
    return worst


def _add(errors: Sequence[_Errors], graph: Graph, given: Inputs, exported: Sequence[Tensor], real: bool) -> None:
    """The errors of all outputs for one set of inputs."""
    reference = graph.reference(**given)
    same = None  # where code indices agree, (B, N, 1)
    if "indices" in graph.outputs:
        place = graph.outputs.index("indices")
        same = (reference[place] == exported[place])[..., None]
    for name, error, wanted, got in zip(graph.outputs, errors, reference, exported, strict=True):
        if same is not None and name == "tokens" and bool(torch.isfinite(got).all()):
            wanted, got = wanted * same, got * same
        error.add(wanted, got, real)


class _Errors:
    """Sums over the inputs that one output was compared on."""

    def __init__(self) -> None:
        self.cases = self.numbers = self.different = self.real = 0
        self.largest = self.scaled = 0.0
        self._squares = self._reference = self._real_squares = 0.0

    def add(self, wanted: Tensor, got: Tensor, real: bool = True) -> None:
        """``real``: of pictures, whose PSNR counts."""
        self.cases += 1
        if not wanted.is_floating_point():
            self.numbers += wanted.numel()
            self.different += int((wanted != got).sum())
            return
        wanted, got = wanted.double(), got.double()
        difference = (got - wanted).abs()
        most = float(difference.max()) if bool(torch.isfinite(got).all()) else math.nan
        squares = float(difference.square().sum()) if not math.isnan(most) else math.nan
        self.largest = _larger(self.largest, most)
        self.scaled = _larger(self.scaled, most / max(1.0, float(wanted.abs().max())))
        self._squares += squares
        self._reference += float(wanted.square().sum())
        if real:
            self._real_squares += squares
            self.real += wanted.numel()

    def measure(self, precision: str) -> float:
        """What :data:`TOLERANCES` limits."""
        return self.scaled if precision == "fp32" else self.relative

    @property
    def relative(self) -> float:
        return math.sqrt(self._squares / max(self._reference, 1e-30))

    @property
    def psnr(self) -> float:
        """Of pictures in [-1, 1], over all of them."""
        error = self._real_squares / max(self.real, 1)
        return math.inf if error == 0 else 10 * math.log10(4 / error)


def _larger(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


# -- whole samples -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def whole_samples(
    reference: GenerationPipeline,
    loaded: GenerationPipeline,
    material: Material,
    precision: str,
    tolerance: float | None = None,
    steps: int = 8,
) -> list[OutputParity]:
    """Samples and their pictures by ``loaded``, on any runtime and device, beside those of ``reference`` from the same noise:
    the errors of many guided steps together. One result for the tokens, one for the pictures.

    Args:
        reference: the PyTorch classes, in float32.
        tolerance: of one step, as :func:`compare` takes it: the limits of :data:`SAMPLE_TOLERANCES` and :data:`SAMPLE_PSNR` are
            for the default one, and move with it.
    """
    from textok_fast.inference.pipelines import SamplingOptions

    config = reference.generator.config
    labels = material.labels[:SAMPLED] if config.num_classes else None
    text = None if material.text is None else TextFeatures(*(part[:SAMPLED] for part in material.text))
    image_tokens = None if material.image_tokens is None else material.image_tokens[:SAMPLED]
    seeds = list(range(min(SAMPLED, len(material))))
    options = SamplingOptions(steps=steps, guidance_scale=2.0)
    drawn = []
    for pipe in (reference, loaded):
        engines: Any = (pipe.generator, pipe.tokenizer) if pipe._engines is None else pipe._engines
        tokens = pipe.generate_tokens(labels, text if config.text_dim else None, seeds, options, image_tokens)
        pictures = engines[1].decode(tokens, text if engines[1].config.text_in_decoder else None)
        drawn.append((tokens.float().cpu(), pictures.float().cpu()))
    factor = 1.0 if tolerance is None else tolerance / TOLERANCES[precision]
    rows = []
    for name, wanted, got in zip(("tokens", "pictures"), *drawn, strict=True):
        error = _Errors()
        error.add(wanted, got)
        row = OutputParity(f"{steps} steps", name, precision, 1, error.largest, error.relative)
        if name == "tokens":
            row.tolerance = SAMPLE_TOLERANCES[precision] * factor
            row.passed = error.relative <= row.tolerance
        else:
            row.psnr, row.least_psnr = error.psnr, SAMPLE_PSNR[precision] - 20 * math.log10(factor)
            row.passed = error.psnr >= row.least_psnr
        rows.append(row)
    return rows


# -- where it departs ----------------------------------------------------------------------------------------------------------


@dataclass
class LayerError:
    """One layer's output in ONNX Runtime: ``relative`` error, norm over norm, and largest one, ``scaled`` as in
    :data:`TOLERANCES`."""

    layer: str
    relative: float
    scaled: float = math.nan

    def measure(self, precision: str) -> float:
        """What :data:`TOLERANCES` limits; infinite for a NaN."""
        value = self.scaled if precision == "fp32" else self.relative
        return math.inf if math.isnan(value) else value


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
        while len(model.graph.outputs) > len(outputs):
            model.graph.outputs.pop()  # a slice that is deleted leaves its values marked as outputs, written without a type
    found = []
    for name in values:  # in the graph's order
        for wanted in eager[name]:
            got = results[name].float()
            if wanted.shape == got.shape:
                error = _Errors()
                error.add(wanted, got)
                found.append(LayerError(name, error.relative, error.scaled))
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


def describe_departure(errors: Sequence[LayerError], limit: float, precision: str) -> str:
    """Which layer is the first whose error is above ``limit``, and which is the worst, by the measure of ``precision``."""
    if not errors:
        return "no layer of the graph could be compared"
    kind = "error" if precision == "fp32" else "relative error"
    first = next((each for each in errors if not each.measure(precision) <= limit), None)
    worst = max(errors, key=lambda each: each.measure(precision))
    if first is None:
        largest = f"the largest {kind} is {worst.measure(precision):.2g} at {worst.layer}"
        return f"no single layer is off by more than {limit:.2g}; {largest}"
    rest = f"({kind} {first.measure(precision):.2g}), the worst {worst.layer} ({worst.measure(precision):.2g})"
    return f"the first layer to depart is {first.layer} {rest}"


# -- the table -----------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[OutputParity], title: str, note: str = "") -> str:
    """As Markdown."""
    lines = [f"# {title}", "", *([note, ""] if note else [])]
    lines += [
        "| graph | output | precision | inputs | max error | relative error | share that differs | PSNR, dB | allowed | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = row.reason if row.passed is None else "passed" if row.passed else f"failed {row.reason}".strip()
        cells = [
            _number(row.max_abs),
            _number(row.relative),
            _number(row.differing),
            _decibels(row.psnr),
            _number(row.tolerance) if row.least_psnr is None else f"{row.least_psnr:.0f} dB or more",
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
