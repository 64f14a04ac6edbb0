"""A whole export: every graph of a model in one directory, calibrated where that is asked for, compared, and described."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textok_fast.config import to_dict
from textok_fast.diffusion import sampler_program
from textok_fast.errors import InputError
from textok_fast.export import onnx as onnx_files
from textok_fast.export import parity, quantize, tensorrt
from textok_fast.export.directory import PARITY_FILES, Manifest, Source, replaced
from textok_fast.export.graphs import (
    DecoderGraph,
    ForwardGraph,
    GeneratorNetwork,
    Graph,
    SamplerGraph,
    TextGraph,
    generator_graphs,
    on_cpu,
    tokenizer_graphs,
)
from textok_fast.export.material import HELD_OUT, STEPS, Material
from textok_fast.export.parity import OutputParity
from textok_fast.export.runtime import TEXT_FOLDER
from textok_fast.export.server import FILES, ServerOptions, write_repository
from textok_fast.files import save_tensors, write_text
from textok_fast.inference.packages import BOTTLENECK, load_package, save_package
from textok_fast.inference.plan import Plan
from textok_fast.modeling.text_encoders import TextEncoder, TextFeatures

PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float32, "int8": torch.float32}
QUANTIZED = tuple(quantize.LEVELS)
CHECKED = ((1, 1), (3, 7))  # batches and caption lengths beside those of the pictures
NOT_RUN = {"bf16": "not compared: ONNX Runtime's CPU provider does not run bfloat16"}


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
    calibration: quantize.Method = "percentile",
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
        calibration: how the ranges of int8 and fp8 are found, see :func:`textok_fast.export.quantize.calibrate`.
        tolerance: what an output may differ by; None for :data:`textok_fast.export.parity.TOLERANCES`.
        progress: is told what is being done.

    Raises: InputError for a part that is not there, without the libraries, and for a graph that differs by more than the
        tolerance, with the layer where it begins to; ``out`` is then as it was.
    """
    onnx_files.require_libraries()
    source.require(what)
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    say = progress or (lambda _: None)
    source = dataclasses.replace(
        source,
        tokenizer=None if source.tokenizer is None else on_cpu(source.tokenizer),
        generator=None if source.generator is None else on_cpu(source.generator),
    )
    with replaced(Path(out)) as work:
        manifest = Manifest.of(source, "onnx", precision, opset=opset)
        say("pictures")
        material = Material.gather(source, images, pictures + HELD_OUT * (precision in QUANTIZED))
        writer = _Writer(work, manifest, material, precision, calibration, tolerance, opset, say)
        dtype = DTYPES[precision]
        if source.tokenizer is not None and what in ("encoder", "decoder", "all"):
            wanted = ("encoder", "decoder") if what == "all" else (what,)
            graphs = [graph for graph in tokenizer_graphs(source.tokenizer, dtype) if graph.name in wanted]
            writer.write(graphs, {"textok_config": to_dict(source.tokenizer.config)}, tokenizer_graphs, source.tokenizer)
            if state := source.tokenizer.bottleneck.state_dict():  # a codebook: indices are decoded without a graph
                save_tensors({name: value.contiguous() for name, value in state.items()}, work / BOTTLENECK)
                manifest.add_part(work, BOTTLENECK)
        if source.generator is not None and what in ("generator", "all"):
            about = {"textok_dit_config": to_dict(source.generator.config), "textok_pipeline": source.pipeline or {}}
            writer.write(generator_graphs(source.generator, dtype), about, generator_graphs, source.generator)
        if source.tokenizer is not None and (what == "text" or (what == "all" and writer.material.text is not None)):
            encoder: object = source.tokenizer.text_encoder  # anybody may have put his own there
            if isinstance(encoder, TextEncoder):
                _write_text(writer, encoder)
            elif what == "text":
                raise InputError(
                    f"only text encoders of transformers are exported, this tokenizer has a {type(encoder).__name__}"
                )
        if {"decoder", "sampler"} <= set(manifest.files) and precision not in NOT_RUN and source.process is not None:
            say("whole samples")
            writer.rows += whole_samples(source, writer.material, work, precision)
        for path in sorted(work.glob("*.data")):
            manifest.add(work, path.stem + "_weights", path.name)
        title = f"Parity of the ONNX export in {precision}"
        seeded = "" if precision in QUANTIZED else "seeded inputs and on "
        calibrated = f"; calibrated ({calibration}) on {len(writer.calibrated_on)} others" if precision in QUANTIZED else ""
        note = (
            f"{onnx_files.runtime_name()} on the CPU beside PyTorch in float32, on {seeded}{len(writer.material)} inputs "
            f"from: {writer.material.about}{calibrated}"
        )
        write_text(work / "parity.md", parity.table(writer.rows, title, note))
        write_text(work / "parity.json", parity.to_json(writer.rows, precision=precision, runtime=onnx_files.runtime_name()))
        manifest.write(work)
    return Exported(Path(out), manifest, writer.rows)


@dataclass
class _Writer:
    """Writes graphs into a directory, one set after another."""

    work: Path
    manifest: Manifest
    material: Material
    precision: str
    calibration: quantize.Method
    tolerance: float | None
    opset: int
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.rows: list[OutputParity] = []
        self.calibrated_on = self.material
        if self.precision in QUANTIZED:
            self.calibrated_on, self.material = self.material.parted()

    def write(
        self, graphs: Sequence[Graph], about: dict[str, Any], exact: Callable[..., list[Graph]] | None = None, model: Any = None
    ) -> None:
        """``exact(model)``: the same graphs in float32, by which a failure is located; None: these are."""
        precision = self.precision if exact is not None else "fp32"
        models: list[Any] = []
        known: dict[str, Any] = {}
        for graph in graphs:
            self.say(f"tracing {graph.name}")
            models.append(onnx_files.trace(graph, {**about, "textok_precision": precision}, self.opset, known))
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
            if precision in NOT_RUN:
                self.rows += [OutputParity(graph.name, out, precision, 0, reason=NOT_RUN[precision]) for out in graph.outputs]
                continue
            self.say(f"comparing {graph.name}")
            seeded, given = list(parity.examples(graph, CHECKED)), list(self.material.inputs(graph))
            run = parity.in_runtime(self.work / f"{graph.name}.onnx", graph)
            if precision in QUANTIZED and given:  # whose ranges are those of real inputs: others only have to run
                for example in seeded:
                    run(example)
            else:
                given = [*seeded, *given]
            rows = parity.compare(graph, run, given, precision, self.tolerance)
            del run  # with its copy of the weights
            self.rows += rows
            if failed := [row for row in rows if not row.passed]:
                graph32 = graph if exact is None else next(g for g in exact(model) if g.name == graph.name)
                self._refuse(failed[0], graph32, given[-1])

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
                    mine = quantize.calibrate(model, found, given, place, self.calibration, self.precision)
                    layers |= {onnx_files.scope(each.node): mine[str(each.activation.name)] for each in found}
                    ranges[graph.name] = mine
        for value, tensor in weights:  # the module's own again, of which there is one copy in memory
            value.const_value = tensor
        return ranges

    def _refuse(self, row: OutputParity, graph: Graph, given: dict[str, Tensor]) -> None:
        import onnx_ir as ir

        limit = row.tolerance if row.tolerance is not None else parity.TOLERANCES[row.precision]
        written = ir.load(self.work / f"{graph.name}.onnx")
        where = parity.describe_departure(parity.layer_errors(graph, written, given, self.work), limit)
        if row.differing is not None:
            what = f"{row.differing:.2g} of its numbers differ"
        else:
            what = f"largest error {row.max_abs:.3g}, relative {row.relative:.3g}"
        raise InputError(
            f"nothing was written: {graph.name}'s {row.output} in {row.precision} differs from PyTorch's by more than "
            f"{limit:.3g} ({what}); {where}. Allow more with a tolerance, or choose another precision or calibration"
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
    if what == "text":
        raise InputError("a package holds no text encoder: export it to onnx")
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
        if failed := [row for row in rows if not row.passed]:
            row = failed[0]
            raise InputError(
                f"nothing was written: {row.graph}'s {row.output} in {precision} differs from PyTorch's by more than "
                f"{row.tolerance:.3g} (largest error {row.max_abs:.3g}, relative {row.relative:.3g})"
            )
        note = f"AOTInductor on {plan.device} beside PyTorch, on {len(material)} inputs from: {material.about}"
        write_text(work / "parity.md", parity.table(rows, f"Parity of the packages in {precision}", note))
        write_text(work / "parity.json", parity.to_json(rows, precision=precision, runtime=f"torch {torch.__version__}"))
        manifest.write(work)
    return Exported(Path(out), manifest, rows)


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
    calibration: quantize.Method = "percentile",
    tolerance: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Exported:
    """The graphs of :func:`export_onnx` and, beside each, its engine (:func:`textok_fast.export.tensorrt.build_engines`).

    Where this GPU runs the engines they are compared as the ONNX files are, and added to the table; elsewhere it says that they
    were not run. Of a graph that the builder refuses the log stays beside ``out``. ``profiles``, ``targets``,
    ``timing_cache``, ``refit``, ``workspace``, ``level``: of :class:`textok_fast.export.tensorrt.BuildOptions`.
    """
    tensorrt.import_module(to)  # before minutes of tracing
    options = tensorrt.BuildOptions(profiles, targets, refit, workspace, timing_cache, level)
    say = progress or (lambda _: None)
    with replaced(Path(out)) as work:
        given: dict[str, Any] = {"images": images, "pictures": pictures, "calibration": calibration, "tolerance": tolerance}
        exported = export_onnx(source, work, what, precision, progress=progress, **given)
        manifest, rows = exported.manifest, list(exported.parity)
        manifest.to = to
        for name in [name for name, entry in manifest.files.items() if entry["file"].endswith(".onnx")]:
            say(f"building {name}")
            try:
                (built,) = tensorrt.build_engines(work, to, [name], options)
            except InputError as error:
                written, kept = work / f"{name}.engine.log", Path(f"{out}.{name}.engine.log")
                if written.is_file():
                    shutil.copy(written, kept)  # the rest goes
                raise InputError(str(error).replace(str(written), str(kept))) from None
            manifest.parts += [f"{name}.engine{suffix}" for suffix in ("", ".json", ".log", ".cache")]
            rows += _compare_engine(built, name, source, images, pictures, precision, tolerance)
        if failed := [row for row in rows if row.passed is False]:
            row = failed[0]
            raise InputError(
                f"nothing was written: {row.graph}'s {row.output} in {precision} differs from PyTorch's by more than "
                f"{row.tolerance:.3g} (largest error {row.max_abs}, relative {row.relative})"
            )
        runtime = f"{to} {built.about.version}"
        title = f"Parity of the {to} engines in {precision}, and of the ONNX files they were built from"
        write_text(work / "parity.md", parity.table(rows, title, f"{runtime} and {onnx_files.runtime_name()} beside PyTorch"))
        write_text(work / "parity.json", parity.to_json(rows, precision=precision, runtime=runtime))
        manifest.write(work)
    return Exported(Path(out), manifest, rows)


def _compare_engine(
    built: tensorrt.BuiltEngine,
    name: str,
    source: Source,
    images: str | Path | None,
    pictures: int,
    precision: str,
    tolerance: float | None,
) -> list[OutputParity]:
    gpu, about = tensorrt.this_gpu(), built.about
    if name == "text" or (reason := tensorrt.why_not_here(built.path, about, about.version, gpu)):
        reason = "not compared" if name == "text" else f"not run: {reason}"
        return [OutputParity(f"{name}.engine", output, precision, 0, reason=reason) for output in about.outputs]
    program = tensorrt.load_engine(built.path.parent, name, rebuild=False)

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        outputs = program.run({key: value.to(program.device) for key, value in given.items()})
        return [value.cpu() for value in outputs.values()]

    graphs = [] if source.tokenizer is None else tokenizer_graphs(on_cpu(source.tokenizer))
    graphs += [] if source.generator is None else generator_graphs(on_cpu(source.generator))
    (graph,) = [graph for graph in graphs if graph.name == name]
    material = Material.gather(source, images, pictures)
    rows = parity.compare(graph, run, material.inputs(graph), precision, tolerance)
    return [dataclasses.replace(row, graph=f"{name}.engine") for row in rows]


def export_server(
    source: Source,
    out: str | Path,
    what: str = "all",
    precision: str = "fp32",
    *,
    server: ServerOptions | None = None,
    images: str | Path | None = None,
    pictures: int = 8,
    calibration: quantize.Method = "percentile",
    tolerance: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Exported:
    """The graphs of :func:`export_onnx` as a model repository (:func:`textok_fast.export.server.write_repository`); with
    ``ServerOptions(backend="tensorrt")`` the engines of :func:`export_engines`, as large as ``max_batch`` asks."""
    with replaced(Path(out)) as work:
        given: dict[str, Any] = {"images": images, "pictures": pictures, "calibration": calibration, "tolerance": tolerance}
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
        raise InputError(f"an export to {to} has no option {', '.join(unknown)}")
    return TARGETS[to](model if isinstance(model, Source) else Source.load(model), out, **options)


def _write_text(writer: _Writer, encoder: TextEncoder) -> None:
    network = encoder._loaded()
    writer.write([TextGraph.of(encoder)], {"textok_text_encoder": encoder.name})
    network.tokenizer.save_pretrained(writer.work / TEXT_FOLDER)
    writer.manifest.add_part(writer.work, TEXT_FOLDER)
    writer.manifest.text = {
        "name": encoder.name,
        "dim": encoder.dim,
        "identity": encoder.identity,
        "max_positions": network.max_positions,
        "special": network.special,
    }


@torch.no_grad()
def whole_samples(source: Source, material: Material, directory: Path, precision: str) -> list[OutputParity]:
    """Samples by the exported sampler and decoder beside PyTorch's, from the same noise: the error of many steps together."""
    tokenizer, generator, process = source.tokenizer, source.generator, source.process
    assert tokenizer is not None and generator is not None and process is not None
    graph, decoder = SamplerGraph(GeneratorNetwork(generator, torch.float32)), DecoderGraph(tokenizer)
    handle, decode = onnx_files.session(directory / "sampler.onnx"), onnx_files.session(directory / "decoder.onnx")
    program = sampler_program(process, "euler" if process.objective == "flow" else "ddpm", 2.0, steps=STEPS)
    given = next(iter(material.inputs(graph)))
    fixed = {name: value for name, value in given.items() if name not in ("x", "index", "noise")}
    fixed |= {"table": program.table, "times": program.times.float()}
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(given["x"].shape, generator=draw)
    states = [(start, torch.zeros(1, dtype=torch.int64))] * 2
    for _ in range(program.evaluations):
        noise = torch.randn(start.shape, generator=draw)
        inputs = [{"x": x, "index": index, "noise": noise, **fixed} for x, index in states]
        states = [tuple(graph.reference(**inputs[0])), tuple(onnx_files.run(handle, inputs[1], list(graph.outputs)))]  # type: ignore[list-item]
    text = {name: value for name, value in given.items() if name.startswith("text") and name in decoder.axes}
    wanted = decoder.reference(tokens=states[0][0], **text)[0]
    got = onnx_files.run(decode, {"tokens": states[1][0], **text})[0]
    rows = []
    for name, one, other in (("tokens", states[0][0], states[1][0]), ("pictures", wanted, got)):
        errors = parity._Errors()
        errors.add(one, other)
        row = OutputParity(f"{program.steps} steps", name, precision, 1, errors.largest, errors.relative)
        row.psnr = errors.psnr if name == "pictures" else None
        row.passed = not math.isnan(errors.relative)
        rows.append(row)
    return rows
