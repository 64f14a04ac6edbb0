"""A model repository for NVIDIA's Triton Inference Server out of an export directory.

    model_repository/encoder     pixels, text, text_mask -> tokens          the exported graphs as they are, ONNX or TensorRT
                     decoder     tokens, text, text_mask -> pixels
                     generator   x, t, y, text, text_mask -> output         one evaluation: forward.onnx
                     text        input_ids, attention_mask -> text
                     generate    prompt, label, seed, ... -> image, tokens  the whole loop (triton_model.py)
    compose.yaml, Dockerfile     `docker compose up --build` starts it
    client.py                    asks it for pictures

Every tensor has a row for each sample, so that the server's dynamic batcher joins what arrives together: the steps of several
pictures too, each at its own time. Configurations are text-format messages of the server's ``model_config.proto``.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from textok_fast.config import DiTConfig, TexTokConfig, from_mapping
from textok_fast.diffusion import build_process, sampler_program
from textok_fast.diffusion.process import Process
from textok_fast.errors import InputError
from textok_fast.export.directory import MANIFEST, Manifest
from textok_fast.export.tensorrt import MODULES, EngineFile, onnx_files, read_about, this_gpu, why_damaged, why_not_here
from textok_fast.files import write_atomically, write_text

log = logging.getLogger(__name__)

IMAGE = "nvcr.io/nvidia/tritonserver:25.08-py3"
FILES = ("model_repository", "compose.yaml", "Dockerfile", "client.py")
MODELS = {"encoder": "encoder", "decoder": "decoder", "generator": "forward", "text": "text"}  # model: graph
TEXT_MULTIPLE = 16  # ``generate`` pads captions to one, so that requests of similar lengths share a batch
SCRIPTS = Path(__file__).parent
INSTANCES = 4  # of ``generate``, each a process that runs the requests which arrive together side by side

Kind = Literal["auto", "gpu", "cpu"]
# By the names of torch's types and by the numbers of ONNX's.
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "bool": "TYPE_BOOL",
}
_ONNX_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}


class Word(str):
    """A name of an enumeration, which text format writes without quotes."""


Message = Mapping[str, Any]  # of protobuf's text format


class Tensor(NamedTuple):
    """Of a graph's signature: a type by torch's name, and a shape whose free sizes are -1."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ServerOptions:
    """How models are served.

    backend: "onnxruntime" or "tensorrt"; "auto" is the engines of TensorRT where the directory has them for a model, else ONNX.
    max_batch: samples that one execution may have; an engine's largest batch where that is less.
    queue_delay: microseconds that a request may wait for others to be joined with.
    instances: of each network on each GPU.
    kind: where the networks run; "auto" is on GPUs where the server has some.
    sampler, steps: what ``generate`` offers, the first number of steps by default; an empty sampler is the pipelines' own. A
        request chooses among the numbers of steps.
    guidance_scale, guidance_interval: as in :class:`textok_fast.inference.SamplingOptions`; a request may give another scale.
    tokenizer: the text encoder's ``tokenizer.json``; None for the one in the export directory.
    image: of the server, whose TensorRT must be the version that the engines were built with.
    """

    backend: Literal["auto", "onnxruntime", "tensorrt"] = "auto"
    max_batch: int = 64
    queue_delay: int = 500
    instances: int = 1
    kind: Kind = "auto"
    sampler: str = ""
    steps: Sequence[int] = (50, 20, 250)
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    tokenizer: str | Path | None = None
    image: str = IMAGE

    def __post_init__(self) -> None:
        if self.backend not in ("auto", "onnxruntime", "tensorrt"):
            raise InputError(f"the backend is auto, onnxruntime or tensorrt, got {self.backend!r}")
        if self.kind not in ("auto", "gpu", "cpu"):
            raise InputError(f"models run on auto, gpu or cpu, got {self.kind!r}")
        if min(self.max_batch, self.instances) < 1 or self.queue_delay < 0:
            raise InputError(
                f"max_batch and instances must be at least 1 and queue_delay at least 0, got {self.max_batch}, "
                f"{self.instances} and {self.queue_delay}"
            )
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) != len(self.steps):
            raise InputError(f"give each number of steps once, from 1 on, and at least one; got {list(self.steps)}")


def write_repository(directory: str | Path, out: str | Path, options: ServerOptions | None = None) -> list[str]:
    """Writes ``out``/model_repository, compose.yaml, Dockerfile and client.py; returns the names of the models.

    Args:
        directory: what ``textok-fast export --to onnx`` or ``--to tensorrt`` wrote: encoder, decoder, forward and text, as many
            as are there. ``generate`` is made of a pipeline's decoder and forward.
        out: made, or its model_repository replaced when the new one is complete.

    Raises: InputError for a directory that is none, not complete, or without a graph that can be served, with engines of
        TensorRT-RTX where TensorRT's are asked for (the server has no backend for them), and for a text encoder whose tokenizer
        is not there.
    """
    directory, out, options = Path(directory), Path(out), options or ServerOptions()
    manifest = Manifest.read(directory)
    if manifest.to != "onnx" and manifest.to not in MODULES:
        raise InputError(
            f"{directory} was exported to {manifest.to}, which the server is not given: export --to onnx or tensorrt"
        )
    manifest.require_complete(directory)
    if (manifest.tokenizer or {}).get("text_window"):
        raise InputError(
            "captions padded to a whole window (text_window, TA-TiTok's) are not made by the server: use export.load"
        )
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out, prefix=".model_repository."))
    try:
        length = _shortest_text(manifest)
        served = {}
        for model, graph in MODELS.items():
            if network := _find(directory, graph, options):
                _write_network(work / model, model, network, options, length)
                served[model] = network
        if not served:
            raise InputError(f"{directory} holds none of {', '.join(MODELS.values())}: run textok-fast export --to onnx first")
        if {"generator", "decoder"} <= set(served) and manifest.pipeline is not None:
            _write_generate(work / "generate", directory, manifest, served, options)
        names = sorted(path.name for path in work.iterdir())
        work.chmod(0o755)
        final = out / FILES[0]
        old = Path(tempfile.mkdtemp(dir=out, prefix=".model_repository."))
        if final.exists():
            final.replace(old / final.name)
        work.replace(final)
        shutil.rmtree(old)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_text(out / "compose.yaml", _compose(options))
    write_text(out / "Dockerfile", _DOCKERFILE)
    write_text(out / "client.py", (SCRIPTS / "triton_client.py").read_text(encoding="utf-8"))
    return names


# -- networks ------------------------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """A graph's files, signature and largest batch. ``profiles``: how many an engine has; 0 for ONNX."""

    files: list[Path]  # the graph first
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    max_batch: int
    profiles: int


def _find(directory: Path, graph: str, options: ServerOptions) -> Network | None:
    engine, onnx = directory / f"{graph}.engine", directory / f"{graph}.onnx"
    if options.backend != "onnxruntime" and engine.is_file():
        about = read_about(engine)
        if about.to == "tensorrt" and _fits(engine, about, options):
            batch = max(sizes["batch"][2] for sizes in about.profiles if "batch" in sizes)
            sides = [
                {
                    name: Tensor(dtype, tuple(size if isinstance(size, int) else -1 for size in shape))
                    for name, (dtype, shape) in side.items()
                }
                for side in (about.inputs, about.outputs)
            ]
            return _checked(Network([engine], sides[0], sides[1], min(batch, options.max_batch), len(about.profiles)))
        if options.backend == "tensorrt" and about.to != "tensorrt":
            raise InputError(
                f"{engine} is TensorRT-RTX's, which the server cannot run: export --to tensorrt, or serve the ONNX files"
            )
    if options.backend == "tensorrt" or not onnx.is_file():
        return None
    return _checked(Network(onnx_files(onnx), *_signature(onnx), options.max_batch, 0))


def _fits(engine: Path, about: EngineFile, options: ServerOptions) -> bool:
    """Whether to serve an engine. One that does not suit the GPU here may suit the server's: it is served where engines are
    asked for, and is passed over where the choice is ours and ONNX does as well.

    Raises: InputError for one that is damaged, or of other ONNX files than lie beside it.
    """
    if reason := why_damaged(engine, about):
        raise InputError(f"{engine} cannot be served: {reason}; export again")
    gpu = this_gpu()
    if options.backend == "tensorrt" or gpu is None or not engine.with_name(about.onnx).is_file():
        return True
    reason = why_not_here(engine, about, about.version, gpu)
    if reason:
        log.warning(
            "%s is not served, but its ONNX file: %s; choose the backend tensorrt to serve it elsewhere", engine, reason
        )
    return not reason


def _checked(network: Network) -> Network:
    for name, tensor in (network.inputs | network.outputs).items():
        if not tensor.shape or tensor.shape[0] != -1 or tensor.dtype not in _TYPES:
            raise InputError(
                f"{network.files[0]} cannot be served in batches: {name} is {tensor.dtype} {tensor.shape}, wanted a first size "
                "that is free"
            )
    return network


def _signature(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of an ONNX file."""
    try:
        import onnx
    except ImportError:
        raise InputError("reading ONNX files needs onnx: pip install 'textok-fast[export]'") from None
    graph = onnx.load(str(path), load_external_data=False).graph

    def tensors(values: Any) -> dict[str, Tensor]:
        found = {}
        for value in values:
            kind = value.type.tensor_type
            shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
            found[value.name] = Tensor(_ONNX_TYPES.get(kind.elem_type, "?"), shape)
        return found

    return tensors(graph.input), tensors(graph.output)


def _shortest_text(manifest: Manifest) -> int:
    """What short captions are padded to: one :data:`TEXT_MULTIPLE`, unless a caption has fewer tokens at most."""
    return min(TEXT_MULTIPLE, (manifest.tokenizer or {}).get("max_text_tokens", TEXT_MULTIPLE))


def _write_network(place: Path, name: str, network: Network, options: ServerOptions, length: int) -> None:
    version = place / "1"
    version.mkdir(parents=True)
    graph, *weights = network.files
    shutil.copyfile(graph, version / ("model.plan" if network.profiles else "model.onnx"))
    for file in weights:
        shutil.copyfile(file, version / file.name)
    batches = sorted({size for size in (8, 16, 32, 64, network.max_batch) if size <= network.max_batch})
    group: dict[str, Any] = {"count": options.instances, "kind": Word(f"KIND_{options.kind.upper()}")}
    if network.profiles > 1:
        group["profile"] = [str(i) for i in range(network.profiles)]
    config: dict[str, Any] = {
        "name": name,
        **({"platform": "tensorrt_plan"} if network.profiles else {"backend": "onnxruntime"}),
        "max_batch_size": network.max_batch,
        "input": [_tensor_config(key, tensor) for key, tensor in network.inputs.items()],
        "output": [_tensor_config(key, tensor) for key, tensor in network.outputs.items()],
        "instance_group": [group],
        "dynamic_batching": {"preferred_batch_size": batches, "max_queue_delay_microseconds": options.queue_delay},
        # Memory is found and kernels are chosen, or compiled, before the first request.
        "model_warmup": [_warmup(network, size, length) for size in dict.fromkeys((1, batches[-1]))],
    }
    write_text(place / "config.pbtxt", text_format(config))


def _tensor_config(name: str, tensor: Tensor) -> dict[str, Any]:
    """Of one sample. The server has no scalars: a number is a shape of 1 outside and none inside."""
    dims = list(tensor.shape[1:])
    config: dict[str, Any] = {"name": name, "data_type": Word(_TYPES[tensor.dtype]), "dims": dims or [1]}
    return config if dims else {**config, "reshape": {"shape": []}}


def _warmup(network: Network, batch: int, length: int) -> dict[str, Any]:
    """Zeros: a picture in grey, class 0, and a caption whose tokens are all padding, which is the null caption."""
    inputs = [
        {
            "key": name,
            "value": {
                "data_type": Word(_TYPES[tensor.dtype]),
                "dims": [length if size == -1 else size for size in tensor.shape[1:]] or [1],
                "zero_data": True,
            },
        }
        for name, tensor in network.inputs.items()
    ]
    return {"name": f"batch {batch}", "batch_size": batch, "inputs": inputs}


# -- generate ------------------------------------------------------------------------------------------------------------------


def require_servable(generator: DiTConfig) -> None:
    """InputError for a generator whose pictures ``generate`` cannot make: its requests have no small picture."""
    if generator.image_token_dim:
        raise InputError(
            "the server's generate makes pictures of classes and captions; this generator also reads small pictures. Export it "
            "--to onnx or aoti, which export.load runs as a SuperResolutionPipeline, or serve its networks alone, with --what"
        )


def _write_generate(
    place: Path, directory: Path, manifest: Manifest, served: Mapping[str, Network], options: ServerOptions
) -> None:
    pipeline = manifest.pipeline
    if pipeline is None or manifest.generator is None or manifest.tokenizer is None:
        raise InputError(f"{directory / MANIFEST} describes a pipeline without both its models: export again")
    generator, tokenizer = from_mapping(DiTConfig, manifest.generator), from_mapping(TexTokConfig, manifest.tokenizer)
    generator_inputs, decoder_inputs = served["generator"].inputs, served["decoder"].inputs
    require_servable(generator)
    reads_text = "text" in generator_inputs or "text" in decoder_inputs
    text = _text_settings(place / "1", directory, manifest, tokenizer, options) if reads_text and "text" in served else None
    process = build_process(
        pipeline["objective"], generator.learn_sigma, pipeline.get("prediction", "epsilon"), pipeline.get("schedule", "linear")
    )
    sampler = options.sampler or ("euler" if process.objective == "flow" else "ddpm")
    conditions = ["label"] if generator.num_classes else ["prompt"] if text is not None else ["text"]
    settings = {
        "shape": [generator.num_tokens, generator.in_channels],
        "num_classes": generator.num_classes,
        "guided_channels": generator.guided_channels,
        "generator_text": "text" in generator_inputs,
        "decoder_text": "text" in decoder_inputs,
        "text_dim": tokenizer.text_dim if reads_text else 0,
        "text": text,
        "null_length": _shortest_text(manifest),
        "captions": pipeline.get("captions", {}),
        "conditions": conditions,
        "guidance_scale": options.guidance_scale,
        "sampler": sampler,
        "steps": options.steps[0],
        "programs": {str(steps): _program(process, sampler, steps, options.guidance_interval) for steps in options.steps},
    }
    write_text(place / "1" / "settings.json", json.dumps(settings, ensure_ascii=False) + "\n")
    write_text(place / "1" / "model.py", (SCRIPTS / "triton_model.py").read_text(encoding="utf-8"))
    inputs = [_request_input("seed", "int64"), _request_input("guidance_scale", "float32"), _request_input("steps", "int32")]
    if generator.num_classes:
        inputs.append(_request_input("label", "int64", optional=False))
    if text is not None:
        inputs.append(_request_input("prompt", "", optional=conditions != ["prompt"]))
        inputs.append(_request_input("negative_prompt", ""))
    elif reads_text:
        inputs.append(_request_input("text", "float32", [-1, tokenizer.text_dim], optional=conditions != ["text"]))
        inputs.append(_request_input("text_mask", "bool", [-1]))
    size = tokenizer.image_size
    # A guidance pair is two samples of the generator.
    batch = min(served["decoder"].max_batch, served["generator"].max_batch // 2)
    if batch < 1:
        raise InputError("generate sends guidance pairs, two samples at once: give max_batch and engines of at least 2")
    config = {
        "name": "generate",
        "backend": "python",
        "max_batch_size": batch,
        "input": inputs,
        "output": [
            {"name": "image", "data_type": Word("TYPE_UINT8"), "dims": [size, size, 3]},
            {"name": "tokens", "data_type": Word("TYPE_FP32"), "dims": [generator.num_tokens, generator.in_channels]},
            {"name": "seed", "data_type": Word("TYPE_INT64"), "dims": [1]},
        ],
        "instance_group": [{"count": INSTANCES, "kind": Word("KIND_CPU")}],  # its arithmetic is on small numbers
        "dynamic_batching": {"max_queue_delay_microseconds": options.queue_delay},
    }
    write_text(place / "config.pbtxt", text_format(config))


def _program(process: Process, sampler: str, steps: int, interval: tuple[float, float] | None) -> dict[str, Any]:
    """A :class:`textok_fast.diffusion.SamplerProgram` as JSON; ``guided`` marks where a request's guidance scale applies."""
    made = sampler_program(process, sampler, 2.0, interval, steps=steps)  # 2: any scale but 1
    mix = None if made.mix is None else made.mix.tolist()
    table, times = made.table.tolist(), made.times.float().tolist()
    return {"table": table, "times": times, "mix": mix, "noisy": made.noisy, "guided": made.guided}


def _request_input(name: str, dtype: str, dims: Sequence[int] = (1,), optional: bool = True) -> dict[str, Any]:
    config = {"name": name, "data_type": Word(_TYPES[dtype] if dtype else "TYPE_STRING"), "dims": list(dims)}
    return {**config, "optional": True} if optional else config


def _text_settings(
    version: Path, directory: Path, manifest: Manifest, tokenizer: TexTokConfig, options: ServerOptions
) -> dict[str, Any]:
    """How prompts become features, as the tokenizer's own text encoder makes them; copies tokenizer.json."""
    found = options.tokenizer or next(iter(sorted(directory.glob("**/tokenizer.json"))), None)
    if found is None or not Path(found).is_file():
        raise InputError(
            f"{directory} has text.onnx and no tokenizer.json to encode prompts with: export again with --what text or all, or "
            "name one"
        )
    version.mkdir(parents=True, exist_ok=True)
    data = Path(found).read_bytes()
    write_atomically(version / "tokenizer.json", lambda target: target.write_bytes(data))
    most = (manifest.text or {}).get("max_positions")
    lengths = {"max_tokens": tokenizer.max_text_tokens, "max_positions": most, "multiple": TEXT_MULTIPLE}
    return {"split": tokenizer.text_split, **lengths}


# -- text format and files -----------------------------------------------------------------------------------------------------


def text_format(message: Message, indent: str = "") -> str:
    """A message in protobuf's text format: mappings are messages, lists of them repeated fields, other lists short lists."""
    lines = []
    for key, value in message.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key} {{\n{text_format(value, indent + '  ')}{indent}}}\n")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{key} {{\n{text_format(each, indent + '  ')}{indent}}}\n" for each in value]
        elif isinstance(value, list):
            lines.append(f"{indent}{key}: [{', '.join(map(_scalar, value))}]\n")
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not isinstance(value, Word):
        return json.dumps(value)
    return str(value)


_DOCKERFILE = f"""\
# Triton Inference Server and what the model "generate" imports.
ARG TRITON_IMAGE={IMAGE}
FROM ${{TRITON_IMAGE}}
RUN pip install --no-cache-dir "numpy>=1.26" "tokenizers>=0.20"
"""

_COMPOSE = """\
# docker compose up --build
services:
  triton:
    build:
      context: .
      args:
        TRITON_IMAGE: ${TRITON_IMAGE:-IMAGE}
    command: tritonserver --model-repository=/models
    ports:
      - "8000:8000"  # HTTP
      - "8001:8001"  # gRPC
      - "8002:8002"  # metrics
    volumes:
      - ./model_repository:/models:ro
    shm_size: 1gb  # between the server and the processes of "generate"
    healthcheck:
      test: ["CMD", "curl", "-fs", "localhost:8000/v2/health/ready"]
      interval: 5s
      start_period: 120s
"""
_COMPOSE_GPU = """\
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: all
              capabilities: [gpu]
"""


def _compose(options: ServerOptions) -> str:
    compose = _COMPOSE.replace("IMAGE}", f"{options.image}}}")
    return compose if options.kind == "cpu" else compose + _COMPOSE_GPU
