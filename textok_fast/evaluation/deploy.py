"""``textok-fast bench deploy``: every artifact of exported directories beside PyTorch and the engine, in turn."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from textok_fast.errors import InputError
from textok_fast.evaluation.provenance import machine_info
from textok_fast.inference.engine import Engine
from textok_fast.inference.plan import Plan
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.ops.device import resolve_device

if TYPE_CHECKING:
    from textok_fast.export import Manifest, Source
    from textok_fast.export.graphs import Graph, Inputs

Call = Callable[[], Any]


@dataclass
class DeployConfig:
    """What to time. ``directories``: of ``textok-fast export``; ``model``: what they were exported from.

    ``rounds``: over all contestants of one task, each called once a round. ``text_tokens``: of the captions. ``steps``: of a
    whole sample, guided by 2, where a directory holds a pipeline.
    """

    directories: tuple[str, ...]
    model: str
    batch: tuple[int, ...] = (1,)
    text_tokens: int = 16
    steps: int = 20
    rounds: int = 10
    threads: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        self.directories, self.batch = tuple(map(str, self.directories)), tuple(self.batch)
        if not self.directories or not self.batch or min(self.batch) < 1:
            raise InputError("give at least one exported directory, and batches of at least 1")
        for name in ("text_tokens", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class DeployTime:
    """One contestant at one task: seconds a call. ``reason``: why it has none."""

    task: str
    batch: int
    contestant: str
    median: float | None = None
    best: float | None = None
    rounds: int = 0
    reason: str = ""


@dataclass
class DeployResult:
    """All times, in the order in which they were taken."""

    config: dict[str, Any]
    machine: dict[str, Any]
    command: str
    times: list[DeployTime] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """A table with, for each task and batch, how many times PyTorch's speed each contestant has."""
        lines = ["| task | batch | what ran it | median, ms | best, ms | PyTorch's time over it |", "|---|---|---|---|---|---|"]
        reference = {(each.task, each.batch): each.median for each in self.times if each.contestant == "PyTorch fp32"}
        for each in self.times:
            if each.median is None or each.best is None:
                lines.append(f"| {each.task} | {each.batch} | {each.contestant} | {each.reason} | | |")
                continue
            base = reference.get((each.task, each.batch))
            ratio = "" if base is None else f"{base / each.median:.2f}"
            cells = f"{1e3 * each.median:.2f} | {1e3 * each.best:.2f} | {ratio}"
            lines.append(f"| {each.task} | {each.batch} | {each.contestant} | {cells} |")
        return "\n".join(lines) + "\n"


def run_deploy(
    config: DeployConfig, command: str = "", on_result: Callable[[DeployResult], None] | None = None
) -> DeployResult:
    """Times all of it; ``on_result`` is called after each task.

    Raises: InputError for a directory that no export wrote, or that was exported from another model than ``config.model``.
    """
    from textok_fast.export import Manifest, Source

    device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    manifests = {Path(directory): Manifest.read(directory) for directory in config.directories}
    for directory, manifest in manifests.items():
        manifest.require_complete(directory)
    source = Source.load(config.model)
    for directory, manifest in manifests.items():
        _require_same(directory, manifest, source, config.model)
    result = DeployResult(dataclasses.asdict(config), machine_info(), command)
    graphs = _graphs(source, any("text" in manifest.files for manifest in manifests.values()))
    for name, graph in graphs.items():
        if not any(_holds(manifest, name) for manifest in manifests.values()):
            continue
        for batch in config.batch:
            given = graph.example(batch, config.text_tokens, torch.Generator().manual_seed(0))
            placed = {key: value.to(device) for key, value in given.items()}
            contestants = _own(source, graph, placed, device)
            for directory, manifest in manifests.items():
                if _holds(manifest, name):
                    label = f"{manifest.to} {manifest.precision} ({directory})"
                    contestants[label] = functools.partial(_exported, directory, manifest, name, placed, device)
            result.times += _timed(name, batch, contestants, config.rounds, device)
            if on_result is not None:
                on_result(result)
    for batch in config.batch:
        if contestants := _pictures(source, manifests, config, batch, device):
            result.times += _timed(f"picture, {config.steps} steps", batch, contestants, config.rounds, device)
            if on_result is not None:
                on_result(result)
    return result


def _require_same(directory: Path, manifest: Manifest, source: Source, model: str) -> None:
    from textok_fast.export.runtime import model_differs

    for kind in ("tokenizer", "generator"):
        exported, own = getattr(manifest, kind), getattr(source, kind)
        if exported is None or own is None:
            continue
        if differs := model_differs(exported, own.config, but=()):
            raise InputError(f"{directory} was exported from another {kind} than {model}: its {differs}")


def _pictures(
    source: Source, manifests: dict[Path, Manifest], config: DeployConfig, batch: int, device: torch.device
) -> dict[str, Callable[[], Call]]:
    """Whole samples, guided, with their pictures as bytes, through :func:`textok_fast.export.load` and as PyTorch draws them;
    nothing where no directory holds a pipeline."""
    from textok_fast.export import load
    from textok_fast.inference.pipelines import GenerationPipeline, SamplingOptions, build_pipeline

    tokenizer, generator, about = source.tokenizer, source.generator, source.pipeline
    there = {
        directory: manifest
        for directory, manifest in manifests.items()
        if _holds(manifest, "decoder") and _holds(manifest, "forward") and manifest.pipeline is not None
    }
    if tokenizer is None or generator is None or about is None or not there:
        return {}
    draw = torch.Generator().manual_seed(0)
    labels, text, image_tokens = None, None, None
    if generator.config.image_token_dim:
        shape = (batch, generator.config.num_image_tokens, generator.config.image_token_dim)
        image_tokens = torch.randn(shape, generator=draw).to(device)
    if generator.config.num_classes:
        labels = torch.arange(batch) % generator.config.num_classes
    if generator.config.text_dim or tokenizer.config.text_in_decoder:
        size = (batch, config.text_tokens, tokenizer.config.text_dim)
        text = TextFeatures(torch.randn(size, generator=draw), torch.ones(size[:2], dtype=torch.bool))
    options = SamplingOptions(steps=config.steps, guidance_scale=2.0)

    def drawn(made: Any) -> Call:
        if not isinstance(made, GenerationPipeline):
            raise InputError("it holds no pipeline that can be run")
        decoder: Any = made.tokenizer if made._engines is None else made._engines[1]
        given = text if generator.config.text_dim else None

        @torch.no_grad()
        def call() -> Any:
            tokens = made.generate_tokens(labels, given, list(range(batch)), options, image_tokens)
            return decoder.decode(tokens, None if text is None else tuple(text), output="uint8")

        return call

    def own(plan: Plan | None) -> Call:
        models = generator.to(device), tokenizer.to(device)
        return drawn(build_pipeline(*models, about, config.model, plan))

    contestants: dict[str, Callable[[], Call]] = {"PyTorch fp32": functools.partial(own, None)}
    for plan in dict.fromkeys([Plan.automatic(device, "fp32"), Plan.automatic(device)]):
        contestants[f"engine {plan.precision}"] = functools.partial(own, plan)
    for directory, manifest in there.items():
        label = f"{manifest.to} {manifest.precision} ({directory})"
        contestants[label] = lambda directory=directory: drawn(load(directory, device))  # type: ignore[misc]
        if "sampler" in manifest.files:
            apart = functools.partial(load, directory, device, sampler=False)
            contestants[f"{label}, without sampler.onnx"] = lambda apart=apart: drawn(apart())  # type: ignore[misc]
    return contestants


def _graphs(source: Source, text: bool) -> dict[str, Graph]:
    from textok_fast.export.graphs import TextGraph, generator_graphs, on_cpu, tokenizer_graphs

    graphs = [] if source.tokenizer is None else tokenizer_graphs(on_cpu(source.tokenizer))
    graphs += [] if source.generator is None else generator_graphs(on_cpu(source.generator))
    graphs += [TextGraph.of(source.tokenizer.text_encoder)] if text and source.tokenizer is not None else []
    return {graph.name: graph for graph in graphs}


_PACKAGES = {"encoder": "tokenizer", "decoder": "tokenizer", "forward": "generator"}  # graph -> the package that has it


def _holds(manifest: Manifest, graph: str) -> bool:
    return graph in manifest.files or f"{_PACKAGES.get(graph)}/package" in manifest.files


def _own(source: Source, graph: Graph, given: Inputs, device: torch.device) -> dict[str, Callable[[], Call]]:
    """PyTorch's modules and the engine, each made when it is asked for."""
    from textok_fast.export.graphs import GeneratorNetwork

    made: dict[str, Callable[[], Call]] = {}
    model = source.tokenizer if graph.name in ("encoder", "decoder") else source.generator

    def pytorch() -> Call:
        graph.to(device)
        if isinstance(network := getattr(graph, "network", None), GeneratorNetwork):
            network.original[0].to(device)
        return functools.partial(graph.reference, **given)

    made["PyTorch fp32"] = pytorch
    for plan in dict.fromkeys([Plan.automatic(device, "fp32"), Plan.automatic(device)]):
        if graph.name in _PACKAGES and model is not None:
            made[f"engine {plan.precision}"] = lambda plan=plan: _call(Engine(model, plan), graph.name, given)  # type: ignore[misc]
    return made


def _call(engine: Any, name: str, given: Inputs) -> Call:
    text = TextFeatures(given["text"], given["text_mask"]) if "text" in given else None
    if name == "encoder":
        return lambda: engine.encode_pixels(given["pixels"].to(engine.dtype), text)
    if name == "decoder":
        return lambda: engine.decode(given["tokens"], text)
    return lambda: engine(given["x"], given["t"], given.get("y"), text, given.get("image_tokens"))


def _exported(directory: Path, manifest: Manifest, name: str, given: Inputs, device: torch.device) -> Call:
    """The artifact, loaded."""
    from textok_fast.export import runtime, tensorrt
    from textok_fast.inference.packages import load_package

    if manifest.to == "aoti":
        return _call(load_package(directory / _PACKAGES[name], device), name, given)
    if manifest.to in tensorrt.MODULES:
        return functools.partial(tensorrt.load_engine(directory, name, device), *given.values())
    if manifest.to != "onnx":
        raise InputError(f"what is exported to {manifest.to} is not timed here")
    place = runtime.place(device, "")
    program = runtime.OnnxProgram(directory / manifest.files[name]["file"], place)
    return functools.partial(program, *given.values())


@torch.no_grad()
def _timed(
    task: str, batch: int, contestants: dict[str, Callable[[], Call]], rounds: int, device: torch.device
) -> Sequence[DeployTime]:
    """Rounds over all contestants, after one call of each that is not counted."""
    ready: dict[str, Call] = {}
    found = {name: DeployTime(task, batch, name) for name in contestants}
    for name, make in contestants.items():
        try:
            ready[name] = make()
            ready[name]()
        except InputError as error:
            ready.pop(name, None)
            found[name].reason = str(error)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, call in ready.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        found[name].median, found[name].best, found[name].rounds = statistics.median(taken), min(taken), rounds
    return list(found.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
