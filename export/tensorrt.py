"""TensorRT and TensorRT-RTX engines out of exported ONNX files, and what runs them on torch tensors.

The modules ``tensorrt`` and ``tensorrt_rtx`` have one API as far as it is used here, so that all of this serves both. What
differs: ``tensorrt`` builds for the GPU at hand, timing kernels on it; ``tensorrt_rtx`` builds without one, for the compute
capabilities it is told, and compiles kernels when an engine first runs.

Beside ``NAME.engine`` lie ``NAME.engine.json`` (:class:`EngineFile`), ``NAME.engine.log`` with all that the builder said, and
for TensorRT-RTX, once it ran, ``NAME.engine.cache`` with the kernels compiled for this GPU. Strongly typed networks have no
precision of their own: it is the ONNX file's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
import mmap
import re
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.export.directory import MANIFEST, Manifest, sha256
from textok_fast.files import write_atomically, write_text
from textok_fast.ops.device import resolve_device

log = logging.getLogger(__name__)

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # by the name of ``textok-fast export --to``
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")  # what a TensorRT-RTX engine is for where nothing else is said
FP8_TARGETS = ("sm_89", "sm_120")  # those of them that TensorRT-RTX builds FP8 for
FORMAT = 1
ALIGNMENT = 256  # bytes, of the addresses that an execution context reads and writes

Range = tuple[int, int, int]  # smallest, most frequent and largest size
Profile = Mapping[str, Range]  # by the name of a free dimension

# Sizes of the free dimensions that exported graphs have.
PROFILE: dict[str, Range] = {
    "batch": (1, 8, 64),
    "text_length": (1, 32, 256),
    "rows": (1, 64, 2048),  # of modulation.onnx: evaluations times conditions
    "evaluations": (1, 50, 1000),  # of sampler.onnx's table
}

_DTYPES = {  # by the name of a DataType
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
# The narrowest of these that a network computes in names its precision.
_PRECISIONS = {"FP8": "fp8", "INT8": "int8", "BF16": "bf16", "HALF": "fp16", "FLOAT": "fp32"}


@dataclass(frozen=True)
class BuildOptions:
    """How engines are built.

    profiles: the sizes each engine serves, see :data:`PROFILE`, whose entries hold where one of these has none (captions as far
        as the exported models take them). The first that suits an input runs it, so that a narrow one for small batches comes
        before a wide one.
    targets: GPUs by compute capability, as "sm_89". TensorRT-RTX only; None is the GPU at hand, and without one
        :data:`TARGETS`, in FP8 :data:`FP8_TARGETS`.
    refit: weights can be replaced later. TensorRT-RTX needs a GPU for that.
    workspace: bytes of GPU memory that a layer may use; None is the builder's own limit, all there is.
    timing_cache: file of measured kernel times, read if it is there and written after; TensorRT-RTX times nothing, so has none.
    level: how long the builder searches, 0 to 5; None is its own choice.
    """

    profiles: Sequence[Profile] = ({},)
    targets: Sequence[str] | None = None
    refit: bool = False
    workspace: int | None = None
    timing_cache: str | Path | None = None
    level: int | None = None

    def __post_init__(self) -> None:
        for profile in self.profiles:
            if unknown := sorted(set(profile) - set(PROFILE)):
                raise InputError(f"a profile has the sizes {', '.join(PROFILE)}; got {', '.join(unknown)}")
            for name, size in profile.items():
                if len(size) != 3 or not 1 <= size[0] <= size[1] <= size[2]:
                    raise InputError(
                        f"the sizes of {name!r} must be three, 1 <= smallest <= most frequent <= largest, got {tuple(size)}"
                    )


@dataclass(frozen=True)
class EngineFile:
    """What ``NAME.engine.json`` says.

    to: "tensorrt" or "tensorrt-rtx", at ``version``.
    targets: compute capabilities it runs on; of ``gpu`` alone where that is not None.
    gpu: name of the GPU it was built and timed on.
    onnx, sources: the file it was built from, and the SHA-256 of it and of the files with its weights, by their names.
    bytes, sha256: of the engine.
    precision: the narrowest type in the network: fp32, fp16, bf16, int8 or fp8.
    inputs, outputs: in the graph's order, names to [dtype of torch, shape], free sizes by their names, "" where they have none.
    profiles: for each, the smallest, most frequent and largest of every free size, by its name.
    seconds: what building took.
    """

    to: str
    version: str
    targets: list[str]
    gpu: str | None
    onnx: str
    sources: dict[str, str]
    bytes: int
    sha256: str
    precision: str
    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]
    profiles: list[dict[str, list[int]]]
    refit: bool
    workspace: int | None
    level: int | None
    seconds: float
    textok_fast: str = ""
    format: int = FORMAT


class BuiltEngine(NamedTuple):
    """An engine's path and what lies beside it."""

    path: Path
    about: EngineFile


# -- building ------------------------------------------------------------------------------------------------------------------


def build_engines(
    directory: str | Path,
    to: str = "tensorrt",
    names: Sequence[str] | None = None,
    options: BuildOptions | None = None,
    out: str | Path | None = None,
) -> list[BuiltEngine]:
    """Builds ``NAME.engine`` from each ``NAME.onnx`` of ``directory``.

    Args:
        to: "tensorrt" or "tensorrt-rtx".
        names: which graphs, such as "decoder"; None is all that are there.
        out: where the engines go; None is ``directory``. Keep the ONNX files beside them, and an engine that does not suit
            another machine can be built again there.

    Raises: InputError when the module is not installed, a file is missing, a profile lacks a free dimension, a target is
        unknown, and for a graph that the builder refuses, with what it said; the log then stays where the engine would lie.
    """
    directory, options = Path(directory), options or BuildOptions()
    out = directory if out is None else Path(out)
    trt = import_module(to)
    found = sorted(path.stem for path in directory.glob("*.onnx"))
    if missing := sorted(set(names or ()) - set(found)):
        raise InputError(
            f"{directory} holds no {missing[0]}.onnx; it has {', '.join(found) or 'no ONNX file'}: export it first"
        )
    if not found:
        raise InputError(f"{directory} holds no ONNX file: run textok-fast export --to onnx first")
    out.mkdir(parents=True, exist_ok=True)
    return [
        _build(trt, to, directory / f"{name}.onnx", out / f"{name}.engine", options, longest_text(directory, name))
        for name in names or found
    ]


def longest_text(directory: Path, name: str) -> int:
    """Tokens of the longest caption that the graph ``name`` meets, by what export.json says of its models."""
    most = PROFILE["text_length"][2]
    if not (directory / MANIFEST).is_file():
        return most
    manifest = Manifest.read(directory)
    most = (manifest.tokenizer or {}).get("max_text_tokens", most)
    if name == "text":  # a clause of a caption is encoded with special tokens, which are then dropped
        text = manifest.text or {}
        most += text.get("special", 0)
        most = min(most, text.get("max_positions") or most)
    return most


def import_module(to: str) -> Any:
    """The module for "tensorrt" or "tensorrt-rtx"; InputError for another name, and when it is not installed."""
    if to not in MODULES:
        raise InputError(f"engines are built for {' or '.join(MODULES)}, got {to!r}")
    try:
        return importlib.import_module(MODULES[to])
    except ImportError as error:
        raise InputError(f"{to} is not installed ({error}): pip install {to}") from None


def _build(
    trt: Any, to: str, onnx: Path, path: Path, options: BuildOptions, longest_text: int = PROFILE["text_length"][2]
) -> BuiltEngine:
    with _BuilderLog(trt, path.with_name(f"{path.name}.log")) as messages:
        start = time.perf_counter()
        builder = trt.Builder(messages.logger)
        network = builder.create_network(_network_flags(trt))
        parser = trt.OnnxParser(network, messages.logger)
        if not parser.parse_from_file(str(onnx)):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            said = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors[:3])
            raise InputError(f"{to} {trt.__version__} cannot read {onnx}: {said}")
        precision = _precision(trt, network)
        config = builder.create_builder_config()
        targets, gpu = _set_targets(trt, to, config, options, precision)
        low, usual, _ = PROFILE["text_length"]
        known = {**PROFILE, "text_length": (low, min(usual, longest_text), longest_text)}
        profiles = [_add_profile(builder, config, network, {**known, **given}, onnx) for given in options.profiles]
        if options.refit:
            config.set_flag(trt.BuilderFlag.REFIT)
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
        if options.level is not None:
            config.builder_optimization_level = options.level
        times = None if options.timing_cache is None or to != "tensorrt" else Path(options.timing_cache)
        if times is not None:
            # One of another version or GPU is refused by set_timing_cache, or its entries are passed over: both do no harm.
            cache = config.create_timing_cache(times.read_bytes() if times.is_file() else b"")
            if not config.set_timing_cache(cache, False):
                config.set_timing_cache(config.create_timing_cache(b""), False)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise InputError(
                f"{to} {trt.__version__} could not build {onnx.name} for {', '.join(targets)}: {messages.last_error()} "
                f"(all it said: {messages.path})"
            )
        data = memoryview(engine)
        if times is not None:
            _write_bytes(times, memoryview(config.get_timing_cache().serialize()))
        about = EngineFile(
            to=to,
            version=trt.__version__,
            targets=targets,
            gpu=gpu,
            onnx=onnx.name,
            sources={file.name: sha256(file) for file in onnx_files(onnx)},
            bytes=data.nbytes,
            sha256=hashlib.sha256(data).hexdigest(),
            precision=precision,
            inputs=_signature(network.get_input(i) for i in range(network.num_inputs)),
            outputs=_signature(network.get_output(i) for i in range(network.num_outputs)),
            profiles=profiles,
            refit=options.refit,
            workspace=options.workspace,
            level=options.level,
            seconds=round(time.perf_counter() - start, 3),
            textok_fast=_version(),
        )
    _write_bytes(path, data)
    write_text(_about_path(path), json.dumps(dataclasses.asdict(about), indent=1) + "\n")
    path.with_name(f"{path.name}.cache").unlink(missing_ok=True)  # of the engine that was here
    return BuiltEngine(path, about)


def _network_flags(trt: Any) -> int:
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _precision(trt: Any, network: Any) -> str:
    found = set()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        found |= {layer.get_output(j).dtype.name for j in range(layer.num_outputs)}
    return next((name for dtype, name in _PRECISIONS.items() if dtype in found), "fp32")


def _set_targets(trt: Any, to: str, config: Any, options: BuildOptions, precision: str) -> tuple[list[str], str | None]:
    """What the engine is built for: compute capabilities, and the GPU's name where it is built for the one at hand alone."""
    here = this_gpu()
    require_options(to, options)
    if to == "tensorrt":
        assert here is not None
        return [here[0]], here[1]
    if options.targets is not None:
        targets = list(options.targets)
    else:
        targets = [here[0]] if here is not None else list(FP8_TARGETS if precision == "fp8" else TARGETS)
    known = _compute_capabilities(trt)
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        config.set_compute_capability(known[target], i)
    return targets, None


def require_options(to: str, options: BuildOptions) -> None:
    """InputError for options that engines cannot be built with here, or that would change nothing; before anything is built."""
    trt, here, targets = import_module(to), this_gpu(), options.targets
    if to == "tensorrt":
        if here is None:
            raise InputError("tensorrt builds on the GPU that will run the engine, and here is none; tensorrt-rtx needs none")
        if targets is not None and list(targets) != [here[0]]:
            raise InputError(f"tensorrt builds for the GPU at hand, {here[0]}, got targets {', '.join(targets)}")
        return
    if options.timing_cache is not None:
        raise InputError("tensorrt-rtx times no kernels, so it keeps no timing cache: leave timing_cache (--timing-cache) out")
    if options.refit and not torch.cuda.is_available():
        raise InputError("tensorrt-rtx builds engines that can be refitted on a GPU only, and here is none: leave refit")
    if targets is None:
        return
    known = _compute_capabilities(trt)
    if unknown := [target for target in targets if target not in known]:
        raise InputError(f"{to} {trt.__version__} builds for {', '.join(known)}, got {', '.join(unknown)}")
    if not targets or len(set(targets)) != len(targets):
        raise InputError(f"give each target once, and at least one of {', '.join(known)}; got {', '.join(targets) or 'none'}")


def _compute_capabilities(trt: Any) -> dict[str, Any]:
    """Those that TensorRT-RTX builds for, by names such as "sm_89"."""
    return {f"sm_{name[2:]}": value for name, value in trt.ComputeCapability.__members__.items() if name[:2] == "SM"}


def _add_profile(builder: Any, config: Any, network: Any, sizes: Profile, onnx: Path) -> dict[str, list[int]]:
    """Adds an optimization profile; returns the sizes that it gives the network's free dimensions."""
    profile = builder.create_optimization_profile()
    used: dict[str, list[int]] = {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = _named_shape(tensor)
        for axis, free in enumerate(shape):
            if isinstance(free, str):
                if free not in sizes:
                    raise InputError(
                        f"{onnx.name} leaves axis {axis} of {tensor.name!r} free under the name {free!r}, and no profile says "
                        f"its sizes; known are {', '.join(sizes)}"
                    )
                used[free] = list(sizes[free])
        profile.set_shape(tensor.name, *(shape_at(shape, used, k) for k in range(3)))
    if config.add_optimization_profile(profile) < 0:
        raise InputError(f"the builder refuses the profile {used} of {onnx.name}")
    return used


def shape_at(shape: Sequence[int | str], sizes: Mapping[str, Sequence[int]], k: int) -> tuple[int, ...]:
    """``shape`` with a profile's smallest (k = 0), most frequent (1) or largest (2) size in the place of each name."""
    return tuple(sizes[size][k] if isinstance(size, str) else size for size in shape)


def _named_shape(tensor: Any) -> list[int | str]:
    """A network tensor's shape with the names of its free dimensions, "" for one without."""
    return [(tensor.get_dimension_name(i) or "") if size < 0 else int(size) for i, size in enumerate(tensor.shape)]


def _signature(tensors: Iterable[Any]) -> dict[str, list[Any]]:
    return {tensor.name: [_dtype_name(_torch_dtype(tensor.dtype)), _named_shape(tensor)] for tensor in tensors}


def _torch_dtype(dtype: Any) -> torch.dtype:
    if dtype.name not in _DTYPES:
        raise InputError(f"an engine's tensors of type {dtype.name} have no counterpart in PyTorch")
    return _DTYPES[dtype.name]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def onnx_files(path: Path) -> list[Path]:
    """An ONNX file and those beside it that hold its weights, where they are external; needs no package ``onnx``."""
    with path.open("rb") as file, contextlib.closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data:
        # TensorProto.external_data: entries of a key (field 1) and a value (field 2), each behind its length.
        entries = re.finditer(rb"\n\x08location\x12(?=(.)(.{1,127}))", data, re.DOTALL)
        names = {entry[2][: entry[1][0]].decode("utf-8", "replace") for entry in entries}
    # What only looks like an entry, in the middle of weights, names no file.
    return [path, *(file for file in sorted(path.parent.iterdir()) if file.name in names)]


def this_gpu() -> tuple[str, str] | None:
    """Compute capability, as "sm_89", and name of torch's current CUDA device; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}", torch.cuda.get_device_name()


class _BuilderLog:
    """Writes all messages of a builder to a file; ``with`` closes it."""

    def __init__(self, trt: Any, path: Path) -> None:
        self.path = path
        self._file = path.open("w", encoding="utf-8")
        self._errors: list[str] = []
        self.logger = _logger(trt, self._add)

    def __enter__(self) -> _BuilderLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _add(self, severity: str, message: str) -> None:
        if not self._file.closed:
            self._file.write(f"{severity}: {message}\n")
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self._errors.append(" ".join(message.split()))

    def last_error(self) -> str:
        return self._errors[-1] if self._errors else "it gave no reason"


def _logger(trt: Any, add: Any) -> Any:
    """An ILogger that hands on (severity's name, message)."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 refuses super().__init__ of a base it has not seen initialised

        def log(self, severity: Any, message: str) -> None:
            add(severity.name, message)

    return Logger()


def _write_bytes(path: Path, data: Any) -> None:
    def write(target: Path) -> None:
        with target.open("wb") as file:
            file.write(data)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def _version() -> str:
    import textok_fast

    return textok_fast.__version__


def _about_path(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.json")


# -- does it fit ---------------------------------------------------------------------------------------------------------------


def read_about(engine: Path) -> EngineFile:
    """``NAME.engine.json``; InputError when it is missing, damaged or of another format."""
    path = _about_path(engine)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise InputError(f"{path} is of format {about['format']}, this version reads {FORMAT}: build the engine again")
        return EngineFile(**about)
    except FileNotFoundError:
        raise InputError(f"{engine} has no {path.name} beside it: build it with textok-fast export") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {path}: {error}; build the engine again") from None


def why_damaged(engine: Path, about: EngineFile) -> str:
    """Why an engine is not what was built, or not of the ONNX files and weights that lie beside it, or ""."""
    if not engine.is_file() or engine.stat().st_size != about.bytes:
        return f"{engine.name} is missing or cut short"
    if sha256(engine) != about.sha256:
        return f"{engine.name} is damaged: its SHA-256 is not the one in {_about_path(engine).name}"
    for name, digest in about.sources.items():
        if engine.with_name(name).is_file() and sha256(engine.with_name(name)) != digest:
            return f"{name} has changed since it was built"
    return ""


def why_not_here(engine: Path, about: EngineFile, version: str, gpu: tuple[str, str] | None) -> str:
    """Why an engine does not run with ``version`` of its library on ``gpu`` (:func:`this_gpu`), or "": also as
    :func:`why_damaged`."""
    if reason := why_damaged(engine, about):
        return reason
    if about.version != version:
        return f"it was built by {about.to} {about.version}, this is {version}"
    if gpu is None:
        return "there is no GPU here"
    if gpu[0] not in about.targets:
        return f"it was built for {', '.join(about.targets)}, this GPU is {gpu[0]} ({gpu[1]})"
    if about.gpu not in (None, gpu[1]):
        return f"it was built and timed on {about.gpu}, this GPU is {gpu[1]}"
    return ""


def load_engine(
    directory: str | Path, name: str, device: str | torch.device | None = None, rebuild: bool = True
) -> EngineProgram:
    """Loads ``NAME.engine``, built again with the same options where it does not fit and its ONNX file lies beside it.

    Args:
        device: a CUDA device; None is torch's current one.
        rebuild: False to raise instead.

    Raises: InputError with the reason when it does not fit and cannot be built, and when the library is not installed.
    """
    engine = Path(directory) / f"{name}.engine"
    about = read_about(engine)
    trt = import_module(about.to)
    place = gpu_device(device)
    with _device(place):
        gpu = this_gpu()
        if reason := why_not_here(engine, about, trt.__version__, gpu):
            onnx = engine.with_name(about.onnx)
            if not rebuild or not onnx.is_file() or gpu is None:
                what = "build it again here" if onnx.is_file() else f"export it again, or copy {about.onnx} beside it"
                raise InputError(f"{engine} does not run here: {reason}; {what}")
            log.warning("%s does not run here: %s; building it again", engine, reason)
            about = _build(trt, about.to, onnx, engine, _same_options(about)).about
            _note(engine)
        return EngineProgram(trt, engine, about, place)


def _note(engine: Path) -> None:
    """Brings export.json, where there is one, to the engine that has been built again."""
    directory = engine.parent
    if not (directory / MANIFEST).is_file():
        return
    manifest = Manifest.read(directory)
    beside = {engine.name, _about_path(engine).name, f"{engine.name}.log"}
    for name, entry in list(manifest.files.items()):
        if entry["file"] in beside:
            manifest.add(directory, name, entry["file"])
    manifest.write(directory)


def _same_options(about: EngineFile) -> BuildOptions:
    """Those that an engine was built with, for the GPU at hand."""
    profiles = [{name: (low, usual, high) for name, (low, usual, high) in sizes.items()} for sizes in about.profiles]
    return BuildOptions(profiles=profiles, refit=about.refit, workspace=about.workspace, level=about.level)


def gpu_device(device: str | torch.device | None = None) -> torch.device:
    """A CUDA device with its number; None and "auto" are torch's current one. InputError for another, and without one."""
    place = resolve_device("cuda" if device is None or str(device) == "auto" else device)
    if place.type != "cuda":
        raise InputError(f"engines of TensorRT and TensorRT-RTX run on a GPU, got device {str(place)!r}")
    return torch.device("cuda", torch.cuda.current_device()) if place.index is None else place


@contextlib.contextmanager
def _device(device: torch.device) -> Iterator[None]:
    """``device`` as torch's current one, in which TensorRT builds, loads and runs."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


# -- running -------------------------------------------------------------------------------------------------------------------


class EngineProgram:
    """An engine on a GPU, called as a compiled network of :mod:`textok_fast.inference.packages` is.

    It reads its inputs where they lie and writes new tensors, on torch's current stream, and can be captured in a CUDA graph.
    Serves one thread at a time.
    """

    def __init__(self, trt: Any, engine: Path, about: EngineFile, device: torch.device) -> None:
        self.about, self.device, self._trt = about, device, trt
        self.inputs, self.outputs = list(about.inputs), list(about.outputs)
        self._messages: list[str] = []
        self._logger = _logger(trt, self._add_message)  # the runtime keeps no reference of its own
        self._runtime = trt.Runtime(self._logger)
        data = engine.read_bytes()
        if hasattr(self._runtime, "get_engine_validity"):
            validity, why = self._runtime.get_engine_validity(data)
            if validity.name == "INVALID":
                raise InputError(f"{engine} does not run here: {_diagnosis(trt, why)}; build it again")
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise InputError(f"cannot load {engine}: {self._last_message()}; build it again")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        if set(names) != {*self.inputs, *self.outputs}:
            raise InputError(f"{engine} has the tensors {', '.join(names)}, {_about_path(engine).name} says otherwise")
        self._dtypes = {name: _torch_dtype(self._engine.get_tensor_dtype(name)) for name in names}
        self._config = self._runtime_config(engine)
        self._contexts = [self._context(i) for i in range(len(about.profiles))]

    def __call__(self, *given: Tensor | None) -> list[Tensor]:
        """Its outputs for its inputs in their order; None is left out. Raises as :meth:`run`."""
        tensors = [tensor for tensor in given if tensor is not None]
        if len(tensors) != len(self.inputs):
            raise InputError(f"it takes {', '.join(self.inputs)}, got {len(tensors)} tensors")
        return list(self.run(dict(zip(self.inputs, tensors, strict=True))).values())

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its outputs by name.

        More samples than the widest profile has are run in parts. Floating inputs are converted to the type the engine reads,
        and those that are not contiguous copied; others are read in place. Raises InputError for other names, devices, types,
        and shapes that no profile has room for.
        """
        if set(inputs) != set(self.inputs):
            raise InputError(f"it takes {', '.join(self.inputs)}, got {', '.join(inputs) or 'nothing'}")
        with _device(self.device):  # another may be torch's current one
            results = [self._execute(part) for part in self._parts(inputs)]
        if len(results) == 1:
            return results[0]
        free = {name: isinstance(shape[0], str) for name, (_, shape) in self.about.outputs.items()}
        return {
            name: torch.cat([result[name] for result in results]) if free[name] else results[-1][name] for name in self.outputs
        }

    def refit(self, onnx: str | Path) -> None:
        """Takes the weights of another export of the same graph, for an engine that was built with ``refit``.

        The engine's file stays as it is. Raises InputError for an engine without, and for a file with other weights.
        """
        if not self.about.refit:
            raise InputError("this engine's weights are fixed: build it with BuildOptions(refit=True)")
        with _device(self.device):
            refitter = self._trt.Refitter(self._engine, self._logger)
            parser = self._trt.OnnxParserRefitter(refitter, self._logger)
            if not parser.refit_from_file(str(onnx)) or not refitter.refit_cuda_engine():
                raise InputError(f"the engine cannot take the weights of {onnx}: {self._last_message()}")

    def _parts(self, inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        rows = self.about.inputs[self.inputs[0]][1][0]  # "batch", of a modulation "rows"
        count = len(inputs[self.inputs[0]])
        if not isinstance(rows, str) or count <= (most := max(sizes[rows][2] for sizes in self.about.profiles)):
            return [dict(inputs)]
        cut = {name for name, (_, shape) in self.about.inputs.items() if shape[:1] == [rows]}
        return [
            {name: tensor[start : start + most] if name in cut else tensor for name, tensor in inputs.items()}
            for start in range(0, count, most)
        ]

    def _execute(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        held = {name: self._as_read(name, inputs[name]) for name in self.inputs}
        context = self._contexts[self._profile_for(held)]
        for name, tensor in held.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise InputError(f"the engine refuses {name} of shape {tuple(tensor.shape)}: {self._last_message()}")
            context.set_tensor_address(name, tensor.data_ptr())
        if lacking := context.infer_shapes():
            raise InputError(f"the engine cannot tell the shapes of its outputs: {', '.join(lacking)} say too little")
        results = {}
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            results[name] = torch.empty(shape, dtype=self._dtypes[name], device=self.device)
            context.set_tensor_address(name, results[name].data_ptr())
        # Torch's allocator gives what was held to nobody else before this stream has passed the execution.
        if not context.execute_async_v3(_stream(self.device)):
            raise RuntimeError(f"the engine failed: {self._last_message()}")
        return results

    def _as_read(self, name: str, tensor: Tensor) -> Tensor:
        wanted = self._dtypes[name]
        if tensor.device.type != self.device.type or tensor.device.index not in (None, self.device.index):
            raise InputError(f"{name} lies on {tensor.device}, the engine on {self.device}")
        if tensor.dtype != wanted:
            if not (tensor.is_floating_point() and wanted.is_floating_point):
                raise InputError(f"{name} must be {_dtype_name(wanted)}, got {_dtype_name(tensor.dtype)}")
            tensor = tensor.to(wanted)
        if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
            return tensor
        return tensor.clone(memory_format=torch.contiguous_format)

    def _profile_for(self, inputs: Mapping[str, Tensor]) -> int:
        """The first profile that all inputs fit; InputError where none does, about the last, which ought to be the widest."""
        why = ""
        for i, sizes in enumerate(self.about.profiles):
            why = self._why_not_profile(inputs, sizes)
            if not why:
                return i
        raise InputError(f"{why}; build it with such a profile")

    def _why_not_profile(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, Sequence[int]]) -> str:
        for name, tensor in inputs.items():
            shape = self.about.inputs[name][1]
            low, high = shape_at(shape, sizes, 0), shape_at(shape, sizes, 2)
            if tensor.ndim != len(shape) or any(not a <= n <= b for a, n, b in zip(low, tensor.shape, high, strict=True)):
                return f"{name} is {tuple(tensor.shape)}, the engine was built for {low} to {high}"
        return ""

    def _runtime_config(self, engine: Path) -> Any:
        """TensorRT-RTX's, with the kernels compiled in earlier processes; None for TensorRT, which has none to compile."""
        if self.about.to != "tensorrt-rtx":
            return None
        config = self._engine.create_runtime_config()
        cache = config.create_runtime_cache()
        path = engine.with_name(f"{engine.name}.cache")
        known = path.read_bytes() if path.is_file() else b""
        if known:
            cache.deserialize(known)  # False for one of another GPU or version, which then stays empty
        config.set_runtime_cache(cache)
        weakref.finalize(self, _save_cache, cache, path, len(known))  # at the latest when the process ends
        return config

    def _context(self, profile: int) -> Any:
        # Both overloads take one argument: the configuration, or where the workspace lies, whose default is what we want.
        arguments = () if self._config is None else (self._config,)
        context = self._engine.create_execution_context(*arguments)
        if context is None:
            raise RuntimeError(f"no execution context: {self._last_message()}; is there memory left on {self.device}?")
        if len(self.about.profiles) > 1:
            context.set_optimization_profile_async(profile, _stream(self.device))
        return context

    def _add_message(self, severity: str, message: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self._messages.append(" ".join(message.split()))
            log.error("%s", self._messages[-1])

    def _last_message(self) -> str:
        return self._messages[-1] if self._messages else "it gave no reason"


def _diagnosis(trt: Any, bits: int) -> str:
    names = [name for name, flag in trt.EngineInvalidityDiagnostics.__members__.items() if int(flag) & int(bits)]
    return ", ".join(name.lower().replace("_", " ") for name in names) or "the library gives no reason"


def _save_cache(cache: Any, path: Path, known: int) -> None:
    """Keeps the kernels that were compiled since; a directory that cannot be written is no error."""
    data = memoryview(cache.serialize())
    if data.nbytes > known:
        with contextlib.suppress(OSError):
            _write_bytes(path, data)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream
