"""A whole export: every graph of a model in one directory, calibrated where that is asked for, compared, and described."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textok_fast.diffusion import sampler_program
from textok_fast.errors import InputError
from textok_fast.export import onnx as onnx_files
from textok_fast.export import parity, quantize, tensorrt
from textok_fast.export.directory import PARITY_FILES, Manifest, Source, replaced
from textok_fast.export.graphs import (
    ForwardGraph,
    GeneratorNetwork,
    Graph,
    TextGraph,
    generator_graphs,
    on_cpu,
    tokenizer_graphs,
)
from textok_fast.export.material import HELD_OUT, STEPS, Material
from textok_fast.export.parity import OutputParity
from textok_fast.export.runtime import TEXT_FOLDER, assemble, load
from textok_fast.export.server import FILES, ServerOptions, require_servable, write_repository
from textok_fast.files import save_tensors, write_text
from textok_fast.inference.packages import BOTTLENECK, load_package, save_package
from textok_fast.inference.packages import PRECISIONS as PACKAGED
from textok_fast.inference.pipelines import GenerationPipeline, build_pipeline
from textok_fast.inference.plan import Plan
from textok_fast.modeling.text_encoders import TextEncoder, TextFeatures

PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float32, "int8": torch.float32}
QUANTIZED = tuple(quantize.LEVELS)
WIDENED = {  # what ONNX Runtime's CPU provider does not run, and what is run in its place
    "bf16": "copies of the graphs in float32 with each operator's result rounded to bfloat16 (it has no operators of bfloat16)"
}
OPTIONS = {  # of the functions, by what the command calls them
    "profiles": "--batch and --text-length",
    "targets": "--targets",
    "timing_cache": "--timing-cache",
    "device": "--device",
    "calibration": "--calibration",
    "opset": "--opset",
}


@dataclass
class Exported:
    """What an export left in ``directory``."""

    directory: Path
    manifest: Manifest
    parity: list[OutputParity]

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.directory),
            "files": self.manifest.files,
            "parity": [dataclasses.asdict(row) for row in self.parity],
        }


def export_onnx(
    source: Source,
    out: str | Path,
    what: str = "all",
    precision: str = "fp32",
    *,
    images: str | Path | None = None,
    pictures: int = 8,
    calibration: quantize.Method | None = None,
    tolerance: float | None = None,
    opset: int = onnx_files.OPSET,
    progress: Callable[[str], None] | None = None,
) -> Exported:
    """Writes the graphs of ``source`` to ``out``, which is replaced when all of them are complete and within the tolerance.

    Args:
        what: of :data:`textok_fast.export.directory.WHAT`; "all" is all that there is.
        precision: what the graphs compute in; of fp8 and int8 the products only. The text encoder stays float32.
        images: a folder of captioned pictures to calibrate and compare on; None for those of
            :meth:`textok_fast.export.material.Material.gather`.
        pictures: how many of them. Quantized graphs are calibrated on so many, and compared on a few others.
        calibration: how the ranges of int8 and fp8 are found, see :func:`textok_fast.export.quantize.calibrate`; None is
            "percentile". Other precisions have none.
        tolerance: what an output may differ by; None for :data:`textok_fast.export.parity.TOLERANCES`.
        opset: 20 to 25; from 23 on with the operator Attention.
        progress: is told what is being done.

    Raises: InputError for a part that is not there, for options that do not go together, without the libraries, and for a graph
        that differs by more than the tolerance, with the layer where it begins to; ``out`` is then as it was.
    """
    chosen = _Options.checked(source, what, precision, images, pictures, calibration, tolerance, opset)
    with replaced(Path(out)) as work:
        writer = _write_graphs(source, work, chosen, progress)
        runtime = onnx_files.runtime_name()
        title, note = f"Parity of the ONNX export in {precision}", writer.note(f"{runtime} on the CPU")
        write_text(work / "parity.md", parity.table(writer.rows, title, note))
        write_text(work / "parity.json", parity.to_json(writer.rows, precision=precision, runtime=runtime))
        writer.manifest.write(work)
    return Exported(Path(out), writer.manifest, writer.rows)


@dataclass(frozen=True)
class _Options:
    """Of an export of graphs: arguments of :func:`export_onnx`, which have been checked."""

    what: str
    precision: str
    images: str | Path | None
    pictures: int
    calibration: quantize.Method
    tolerance: float | None
    opset: int

    @classmethod
    def checked(
        cls,
        source: Source,
        what: str,
        precision: str,
        images: str | Path | None,
        pictures: int,
        calibration: quantize.Method | None,
        tolerance: float | None,
        opset: int,
    ) -> _Options:
        onnx_files.require_libraries()
        source.require(what)
        if precision not in PRECISIONS:
            raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if calibration is not None:
            quantize.require_method(calibration)
            if precision not in QUANTIZED:
                raise InputError(f"calibration is of {' and '.join(QUANTIZED)}, the precision is {precision}: leave it out")
        parity.require_tolerance(tolerance)
        onnx_files.require_opset(opset)
        return cls(what, precision, images, pictures, calibration or "percentile", tolerance, opset)


def _write_graphs(source: Source, work: Path, chosen: _Options, progress: Callable[[str], None] | None) -> _Writer:
    """All graphs in ``work``, compared; the tables and export.json are the caller's."""
    what, precision, say = chosen.what, chosen.precision, progress or (lambda _: None)
    source = dataclasses.replace(
        source,
        tokenizer=None if source.tokenizer is None else on_cpu(source.tokenizer),
        generator=None if source.generator is None else on_cpu(source.generator),
    )
    manifest = Manifest.of(source, "onnx", precision, opset=chosen.opset)
    say("pictures")
    material = Material.gather(source, chosen.images, chosen.pictures + HELD_OUT * (precision in QUANTIZED))
    dtype = DTYPES[precision]
    with tempfile.TemporaryDirectory(dir=work.parent, prefix=".compared.") as copies:
        writer = _Writer(source, work, Path(copies), manifest, material, chosen, say)
        encoder: object = None
        if source.tokenizer is not None and (what == "text" or (what == "all" and material.text is not None)):
            encoder = source.tokenizer.text_encoder  # loaded here; or somebody's own
            manifest.text = _about_text(encoder) if isinstance(encoder, TextEncoder) else None
        about = {
            "textok_config": manifest.tokenizer,
            "textok_dit_config": manifest.generator,
            "textok_pipeline": manifest.pipeline,
            "textok_text_encoder": manifest.text,
        }
        about = {name: value for name, value in about.items() if value is not None}
        if source.tokenizer is not None and what in ("encoder", "decoder", "all"):
            wanted = ("encoder", "decoder") if what == "all" else (what,)
            graphs = [graph for graph in tokenizer_graphs(source.tokenizer, dtype) if graph.name in wanted]
            writer.write(graphs, about, tokenizer_graphs, source.tokenizer)
            if state := source.tokenizer.bottleneck.state_dict():  # a codebook: indices are decoded without a graph
                save_tensors({name: value.contiguous() for name, value in state.items()}, work / BOTTLENECK)
                manifest.add_part(work, BOTTLENECK)
        if source.generator is not None and what in ("generator", "all"):
            writer.write(generator_graphs(source.generator, dtype), about, generator_graphs, source.generator)
        if isinstance(encoder, TextEncoder) and manifest.text is not None:
            writer.write([TextGraph.of(encoder)], about)
            encoder._loaded().tokenizer.save_pretrained(work / TEXT_FOLDER)
            manifest.add_part(work, TEXT_FOLDER)
        elif what == "text":
            raise InputError(f"only text encoders of transformers are exported, this tokenizer has a {type(encoder).__name__}")
        for path in sorted(work.glob("*.data")):
            manifest.add(work, path.stem + "_weights", path.name)
        if (reference := _pipeline(source)) is not None and {"decoder", "modulation", "step"} <= set(manifest.files):
            say("whole samples")
            writer.rows += whole_samples(reference, writer.loaded(), writer.material, precision, chosen.tolerance)
    return writer


def _about_text(encoder: TextEncoder) -> dict[str, Any]:
    network = encoder._loaded()
    return {
        "name": encoder.name,
        "dim": encoder.dim,
        "identity": encoder.identity,
        "max_positions": network.max_positions,
        "special": network.special,
    }


def _pipeline(source: Source) -> GenerationPipeline | None:
    """The PyTorch classes as a pipeline; None where they are none, a model alone."""
    tokenizer, generator = source.tokenizer, source.generator
    if tokenizer is None or generator is None or source.pipeline is None:
        return None
    return build_pipeline(generator, tokenizer, source.pipeline, "the model")


def whole_samples(
    reference: GenerationPipeline,
    loaded: GenerationPipeline,
    material: Material,
    precision: str,
    tolerance: float | None = None,
    name: str = "",
) -> list[OutputParity]:
    """:func:`textok_fast.export.parity.whole_samples`; InputError where they differ by more than is allowed."""
    rows = parity.whole_samples(reference, loaded, material, precision, tolerance, STEPS)
    rows = [dataclasses.replace(row, graph=f"{row.graph}{name}") for row in rows]
    if failed := [row for row in rows if not row.passed]:
        raise InputError(
            f"nothing was written: the {failed[0].output} of whole samples ({failed[0].graph}) in {precision} differ from "
            f"PyTorch's by more than is allowed ({failed[0].excess}), though each graph alone is within its own limit. Allow "
            "more with a tolerance, or choose another precision or calibration"
        )
    return rows


class _Session:
    """A file in ONNX Runtime on the CPU, without packed copies of its weights, as :func:`assemble` takes programs."""

    def __init__(self, path: Path) -> None:
        self._session = onnx_files.session(path)
        self.inputs = [str(each.name) for each in self._session.get_inputs()]

    def __call__(self, *given: Tensor | None) -> list[Tensor]:
        tensors = [each for each in given if each is not None]
        return onnx_files.run(self._session, dict(zip(self.inputs, tensors, strict=True)))


@dataclass
class _Writer:
    """Writes graphs into a directory, one set after another. ``copies``: a directory for what is run in a file's place."""

    source: Source
    work: Path
    copies: Path
    manifest: Manifest
    material: Material
    chosen: _Options
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.rows: list[OutputParity] = []
        self.runs: dict[str, Path] = {}  # what ONNX Runtime ran, by the graph's name
        self.precision, self.tolerance = self.chosen.precision, self.chosen.tolerance
        self.calibrated_on = self.material
        if self.precision in QUANTIZED:
            self.calibrated_on, self.material = self.material.parted()

    def note(self, runtime: str) -> str:
        """What the table is about: on which inputs, and calibrated on which."""
        if self.precision in WIDENED:
            runtime += f", which ran {WIDENED[self.precision]},"
        given = f"{len(self.material)} inputs from: {self.material.about}"
        if self.precision not in QUANTIZED:
            return f"{runtime} beside PyTorch in float32, on seeded inputs and on {given} (PSNR on the latter alone)"
        others = f"{len(self.calibrated_on)} others" if self.calibrated_on is not self.material else "the same picture"
        return f"{runtime} beside PyTorch in float32, on {given}; calibrated ({self.chosen.calibration}) on {others}"

    def loaded(self) -> GenerationPipeline:
        """The pipeline over what was compared."""
        files = {name: entry for name, entry in self.manifest.files.items() if name not in ("encoder", "forward", "text")}
        manifest = dataclasses.replace(self.manifest, files=files, text=None)
        made = assemble(self.work, manifest, torch.device("cpu"), lambda name: _Session(self.runs[name]))
        assert isinstance(made, GenerationPipeline)
        return made

    def write(
        self, graphs: Sequence[Graph], about: dict[str, Any], exact: Callable[..., list[Graph]] | None = None, model: Any = None
    ) -> None:
        """``exact(model)``: the same graphs in float32, by which a failure is located; None: these are."""
        precision = self.precision if exact is not None else "fp32"
        models: list[Any] = []
        known: dict[str, Any] = {}
        for graph in graphs:
            self.say(f"tracing {graph.name}")
            models.append(onnx_files.trace(graph, {**about, "textok_precision": precision}, self.chosen.opset, known))
        known.clear()  # a model is let go as soon as its file is there: of a large one several do not fit into memory
        with tempfile.TemporaryDirectory(dir=self.work.parent, prefix=".calibration.") as place:
            ranges = self._calibrate(graphs, models, Path(place)) if precision in QUANTIZED else {}
            largest = max(
                quantize.quantized_bytes(model, quantize.products(model, graph.left_alone))
                if graph.name in ranges
                else onnx_files.weight_bytes(model)
                for graph, model in zip(graphs, models, strict=True)
            )
            name = f"{'generator' if len(graphs) > 2 else graphs[0].name}.data"
            with onnx_files.weights_beside(largest, self.work / name) as store:
                for graph in graphs:
                    self.say(f"writing {graph.name}")
                    traced = models.pop(0)
                    if graph.name in ranges:
                        quantize.quantize(traced, quantize.products(traced, graph.left_alone), ranges[graph.name], precision)
                    onnx_files.save(traced, self.work / f"{graph.name}.onnx", store)
                    for value in traced.graph.initializers.values():
                        value.const_value = None  # the graph's parts refer to each other: it would stay until it is collected
                    del traced
        for graph in graphs:
            self.manifest.add(self.work, graph.name, f"{graph.name}.onnx")
            self.runs[graph.name] = self.work / f"{graph.name}.onnx"
        if precision in WIDENED:
            self._widen(graphs, 2 * largest, f"{name}")
        for graph in graphs:
            self.say(f"comparing {graph.name}")
            seeded, given = list(parity.examples(graph, parity.CHECKED)), list(self.material.inputs(graph))
            run = parity.in_runtime(self.runs[graph.name], graph)
            if precision in QUANTIZED and given:  # whose ranges are those of real inputs: others only have to run
                for example in seeded:
                    run(example)
                seeded = []
            rows = parity.compare(graph, run, given, precision, self.tolerance, seeded)
            self.rows += rows
            if failed := [row for row in rows if not row.passed]:
                graph32 = graph if exact is None else next(g for g in exact(model) if g.name == graph.name)
                worst = parity.worst_input(graph, run, [*seeded, *given], failed[0].output, precision)
                self._refuse(failed[0], graph32, worst)
            del run  # with its copy of the weights

    def _widen(self, graphs: Sequence[Graph], largest: int, name: str) -> None:
        import onnx_ir as ir

        with onnx_files.weights_beside(largest, self.copies / name) as store:
            for graph in graphs:
                model = ir.load(self.runs[graph.name])
                onnx_files.widen(model, store)
                self.runs[graph.name] = self.copies / f"{graph.name}.onnx"
                onnx_files.save(model, self.runs[graph.name], store)

    def _calibrate(self, graphs: Sequence[Graph], models: Sequence[Any], place: Path) -> dict[str, dict[str, float]]:
        """For each graph what :func:`quantize.quantize` takes. Weights of large models lie in ``place`` meanwhile."""
        ranges: dict[str, dict[str, float]] = {}
        layers: dict[str, float] = {}  # of a product, by its module: graphs that have it in common quantize it alike
        weights = [(value, value.const_value) for model in models for value in model.graph.initializers.values()]
        with onnx_files.weights_beside(max(map(onnx_files.weight_bytes, models)), place / "weights.data") as store:
            for graph, model in zip(graphs, models, strict=True):
                if store is not None:
                    onnx_files.save(model, place / f"{graph.name}.onnx", store)
                found = quantize.products(model, graph.left_alone)
                names = {str(each.activation.name): onnx_files.scope(each.node) for each in found}
                if set(names.values()) <= set(layers):
                    ranges[graph.name] = {name: layers[layer] for name, layer in names.items()}
                else:
                    self.say(f"calibrating {graph.name}")
                    given = list(self.calibrated_on.inputs(graph))
                    mine = quantize.calibrate(model, found, given, place, self.chosen.calibration, self.precision)
                    layers |= {onnx_files.scope(each.node): mine[str(each.activation.name)] for each in found}
                    ranges[graph.name] = mine
        for value, tensor in weights:  # the module's own again, of which there is one copy in memory
            value.const_value = tensor
        return ranges

    def _refuse(self, row: OutputParity, graph: Graph, given: dict[str, Tensor]) -> None:
        import onnx_ir as ir

        limit = parity.TOLERANCES[row.precision] if row.differing is not None or row.tolerance is None else row.tolerance
        path = self.runs[graph.name]
        errors = parity.layer_errors(graph, ir.load(path), given, path.parent)
        where = parity.describe_departure(errors, limit, row.precision)
        raise InputError(
            f"nothing was written: {graph.name}'s {row.output} in {row.precision} differs from PyTorch's by more than is "
            f"allowed ({row.excess}); {where}. Allow more with a tolerance, or choose another precision or calibration"
        )


def export_aoti(
    source: Source,
    out: str | Path,
    what: str = "all",
    precision: str = "fp32",
    *,
    device: str = "cpu",
    images: str | Path | None = None,
    pictures: int = 8,
    tolerance: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Exported:
    """Writes packages of :func:`textok_fast.inference.save_package` for this kind of machine, in the folders ``generator`` and
    ``tokenizer``; encoder and decoder are one package.

    Else as :func:`export_onnx`. Raises: InputError also for a precision that a package does not have (fp32 and bf16 it has).
    """
    source.require(what)
    parity.require_tolerance(tolerance)
    if what == "text":
        raise InputError("a package holds no text encoder: export it to onnx")
    if precision not in PACKAGED:
        raise InputError(f"a package holds {' or '.join(PACKAGED)}, got {precision!r}: export that to onnx")
    say = progress or (lambda _: None)
    models: dict[str, Any] = {"generator": source.generator, "tokenizer": source.tokenizer}
    wanted = {"generator": ["generator"], "all": list(models)}.get(what, ["tokenizer"])
    plan = Plan(precision=precision, device=device).require_machine()  # type: ignore[arg-type]
    with replaced(Path(out)) as work:
        manifest, rows = Manifest.of(source, "aoti", precision), []
        material = Material.gather(source, images, pictures)
        for name in [name for name in wanted if models[name] is not None]:
            say(f"compiling the {name}")
            save_package(models[name], work / name, plan)
            for file in sorted((work / name).iterdir()):
                manifest.add(work, f"{name}/{file.stem}", f"{name}/{file.name}")
            say(f"comparing the {name}")
            rows += _compare_package(load_package(work / name), name, source, material, precision, tolerance)
        _refuse_any(rows)
        if (reference := _pipeline(source)) is not None and len(wanted) == 2:
            say("whole samples")
            manifest.write(work)
            rows += whole_samples(reference, _loaded_pipeline(work, plan.device), material, precision, tolerance)
        note = f"AOTInductor on {plan.device} beside PyTorch, on {len(material)} inputs from: {material.about}"
        write_text(work / "parity.md", parity.table(rows, f"Parity of the packages in {precision}", note))
        write_text(work / "parity.json", parity.to_json(rows, precision=precision, runtime=f"torch {torch.__version__}"))
        manifest.write(work)
    return Exported(Path(out), manifest, rows)


def _refuse_any(rows: Sequence[OutputParity]) -> None:
    """InputError for the first that failed."""
    for row in rows:
        if row.passed is False:
            raise InputError(
                f"nothing was written: {row.graph}'s {row.output} in {row.precision} differs from PyTorch's by more than is "
                f"allowed ({row.excess})"
            )


def _loaded_pipeline(directory: Path, device: str | None = None) -> GenerationPipeline:
    pipeline = load(directory, device)
    assert isinstance(pipeline, GenerationPipeline)
    return pipeline


@torch.no_grad()
def _compare_package(
    engine: Any, name: str, source: Source, material: Material, precision: str, tolerance: float | None
) -> list[OutputParity]:
    """A loaded package beside the modules: the same measures as :func:`textok_fast.export.parity.compare`."""
    if name == "generator":
        graphs: list[Graph] = [ForwardGraph(GeneratorNetwork(on_cpu(source.generator), torch.float32))]
    else:
        graphs = tokenizer_graphs(on_cpu(source.tokenizer))

    def run(graph: Graph, given: dict[str, Tensor]) -> list[Tensor]:
        text = TextFeatures(given["text"], given["text_mask"]) if "text" in given else None
        if graph.name == "encoder":
            tokens = engine.encode(given["pixels"], text)
            found = [tokens.mode(), *([tokens.indices] if tokens.indices is not None else [])]
            return found if tokens._posterior is None else list(tokens._posterior)
        if graph.name == "decoder":
            return [engine.decode(given["tokens"], text)]
        return [engine(given["x"], given["t"], given.get("y"), text, given.get("image_tokens"))]

    rows = []
    for graph in graphs:
        given = list(material.inputs(graph))
        rows += parity.compare(graph, functools.partial(run, graph), given, precision, tolerance)
    return rows


def export_engines(
    source: Source,
    out: str | Path,
    what: str = "all",
    precision: str = "fp32",
    *,
    to: str,
    profiles: Sequence[tensorrt.Profile] = ({},),
    targets: Sequence[str] | None = None,
    timing_cache: str | Path | None = None,
    refit: bool = False,
    workspace: int | None = None,
    level: int | None = None,
    images: str | Path | None = None,
    pictures: int = 8,
    calibration: quantize.Method | None = None,
    tolerance: float | None = None,
    opset: int = onnx_files.OPSET,
    progress: Callable[[str], None] | None = None,
) -> Exported:
    """The graphs of :func:`export_onnx` and, beside each, its engine (:func:`textok_fast.export.tensorrt.build_engines`).

    Where this GPU runs the engines they are compared as the ONNX files are, on the same pictures, and added to the table;
    elsewhere it says that they were not run. Of a graph that the builder refuses the log stays beside ``out``. ``profiles``,
    ``targets``, ``timing_cache``, ``refit``, ``workspace``, ``level``: of :class:`textok_fast.export.tensorrt.BuildOptions`.
    """
    # All is checked before minutes of tracing.
    options = tensorrt.BuildOptions(profiles, targets, refit, workspace, timing_cache, level)
    tensorrt.require_options(to, options)
    chosen = _Options.checked(source, what, precision, images, pictures, calibration, tolerance, opset)
    say = progress or (lambda _: None)
    with replaced(Path(out)) as work:
        writer = _write_graphs(source, work, chosen, progress)
        manifest, rows, runs_here = writer.manifest, writer.rows, True
        manifest.to = to
        manifest.write(work)  # the builder reads how long captions are
        graphs = {graph.name: graph for graph in _exact_graphs(writer.source, "text" in manifest.files)}
        for name in [name for name, entry in manifest.files.items() if entry["file"].endswith(".onnx")]:
            say(f"building {name}")
            try:
                (built,) = tensorrt.build_engines(work, to, [name], options)
            except InputError as error:
                written, kept = work / f"{name}.engine.log", Path(f"{out}.{name}.engine.log")
                if written.is_file():
                    shutil.copy(written, kept)  # the rest goes
                raise InputError(str(error).replace(str(written), str(kept))) from None
            manifest.add(work, built.path.name, built.path.name)
            manifest.parts += [f"{name}.engine{suffix}" for suffix in (".json", ".log", ".cache")]
            compared = _compare_engine(built, graphs[name], writer, "fp32" if name == "text" else precision)
            runs_here = runs_here and all(row.passed is not None for row in compared)
            rows += compared
            _refuse_any(compared)
        if any(row.output == "pictures" for row in rows) and runs_here and (reference := _pipeline(writer.source)) is not None:
            say("whole samples")
            manifest.write(work)
            rows += whole_samples(reference, _loaded_pipeline(work), writer.material, precision, tolerance, " of the engines")
        runtime = f"{to} {built.about.version}"
        title = f"Parity of the {to} engines in {precision}, and of the ONNX files they were built from"
        note = writer.note(f"{runtime}, and {onnx_files.runtime_name()} on the CPU")
        write_text(work / "parity.md", parity.table(rows, title, note))
        write_text(work / "parity.json", parity.to_json(rows, precision=precision, runtime=runtime))
        manifest.write(work)
    return Exported(Path(out), manifest, rows)


def _exact_graphs(source: Source, has_text: bool) -> list[Graph]:
    """All that a source has, in float32; the text encoder's only on request, for it would be loaded."""
    graphs: list[Graph] = [] if source.tokenizer is None else tokenizer_graphs(source.tokenizer)
    graphs += [] if source.generator is None else generator_graphs(source.generator)
    if has_text and source.tokenizer is not None:
        graphs.append(TextGraph.of(source.tokenizer.text_encoder))
    return graphs


def _compare_engine(built: tensorrt.BuiltEngine, graph: Graph, writer: _Writer, precision: str) -> list[OutputParity]:
    """On the inputs that the ONNX file was compared on, of int8 and fp8 none of those it was calibrated on."""
    gpu, about, name = tensorrt.this_gpu(), built.about, f"{graph.name}.engine"
    if reason := tensorrt.why_not_here(built.path, about, about.version, gpu):
        return [OutputParity(name, output, precision, 0, reason=f"not run: {reason}") for output in about.outputs]
    program = tensorrt.load_engine(built.path.parent, graph.name, rebuild=False)

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        outputs = program.run({key: value.to(program.device) for key, value in given.items()})
        return [outputs[output].cpu() for output in graph.outputs]

    rows = parity.compare(graph, run, writer.material.inputs(graph), precision, writer.tolerance)
    return [dataclasses.replace(row, graph=name) for row in rows]


def export_server(
    source: Source,
    out: str | Path,
    what: str = "all",
    precision: str = "fp32",
    *,
    server: ServerOptions | None = None,
    images: str | Path | None = None,
    pictures: int = 8,
    calibration: quantize.Method | None = None,
    tolerance: float | None = None,
    opset: int = onnx_files.OPSET,
    progress: Callable[[str], None] | None = None,
) -> Exported:
    """The graphs of :func:`export_onnx` as a model repository (:func:`textok_fast.export.server.write_repository`); with
    ``ServerOptions(backend="tensorrt")`` the engines of :func:`export_engines`, as large as ``max_batch`` asks."""
    if what == "all" and source.pipeline is not None and source.generator is not None:  # before minutes of tracing
        require_servable(source.generator.config)
    if server is not None and server.sampler and source.process is not None:
        sampler_program(source.process, server.sampler, 2.0, steps=server.steps[0])
    with replaced(Path(out)) as work:
        given: dict[str, Any] = {"images": images, "pictures": pictures, "calibration": calibration, "tolerance": tolerance}
        given["opset"] = opset
        make: Callable[..., Exported] = export_onnx
        if server is not None and server.backend == "tensorrt":
            sizes = (1, min(8, server.max_batch), server.max_batch)
            make = functools.partial(export_engines, to="tensorrt", profiles=[{"batch": sizes}])
        exported = make(source, work / "exported", what, precision, progress=progress, **given)
        names = write_repository(work / "exported", work, server)
        for name in PARITY_FILES:
            (work / "exported" / name).replace(work / name)
        shutil.rmtree(work / "exported")
        manifest = dataclasses.replace(exported.manifest, to="triton-server", files={}, parts=list(FILES))
        for name in names:
            (file,) = sorted((work / FILES[0] / name / "1").glob("model.*"))
            manifest.add(work, name, str(file.relative_to(work)))
        manifest.write(work)
    return Exported(Path(out), manifest, exported.parity)


TARGETS: dict[str, Callable[..., Exported]] = {
    "onnx": export_onnx,
    "aoti": export_aoti,
    "tensorrt": functools.partial(export_engines, to="tensorrt"),
    "tensorrt-rtx": functools.partial(export_engines, to="tensorrt-rtx"),
    "triton-server": export_server,
}


def export(model: Source | str | Path, out: str | Path, to: str = "onnx", **options: Any) -> Exported:
    """``model`` to one of :data:`TARGETS`: its function's arguments and errors, and InputError for another target and for an
    option that this one does not have."""
    if to not in TARGETS:
        raise InputError(f"models are exported to {', '.join(TARGETS)}; got {to!r}")
    taken = set(inspect.signature(TARGETS[to]).parameters)
    if unknown := sorted(set(options) - taken):
        named = ", ".join(f"{name} ({OPTIONS[name]})" if name in OPTIONS else name for name in unknown)
        raise InputError(f"an export to {to} has no option {named}")
    return TARGETS[to](model if isinstance(model, Source) else Source.load(model), out, **options)
