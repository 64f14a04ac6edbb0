"""The part of TensorRT's Python API that textok_fast uses, over onnx and ONNX Runtime: "engines" that run on CPU memory.

An engine is its ONNX file's bytes behind a header and its profiles. Execution reads and writes nothing but the addresses it was
given, as the library does, and checks them and the shapes against the profile.
"""

from __future__ import annotations

import ctypes
import enum
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

HEADER = b"fake engine "
ALIGNMENT = 64  # of torch on the CPU
_ELEMENTS = {1: "FLOAT", 7: "INT64", 9: "BOOL"}
_NUMPY = {"FLOAT": np.float32, "INT64": np.int64, "BOOL": np.bool_}


class Flag(enum.IntEnum):
    STRONGLY_TYPED = 1
    REFIT = 2
    WORKSPACE = 3


class Severity(enum.Enum):
    ERROR = 1
    INFO = 3


class EngineValidity(enum.Enum):
    VALID = 0
    INVALID = 2


class ILogger:
    def __init__(self) -> None:
        self.initialised = True


class Tensor:
    def __init__(self, value: Any) -> None:
        kind = value.type.tensor_type
        self.name = value.name
        self.dtype = SimpleNamespace(name=_ELEMENTS[kind.elem_type])
        self._names = [dim.dim_param or None for dim in kind.shape.dim]
        self.shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in kind.shape.dim)

    def get_dimension_name(self, axis: int) -> str | None:
        return self._names[axis]


def module(name: str = "tensorrt", version: str = "10.0", validity: str = "VALID", fails: str = "") -> Any:
    """A module; ``calls`` records what builders and contexts were told. ``fails``: what the builder says and fails with."""
    calls: dict[str, Any] = {"addresses": {}, "streams": [], "profiles_set": []}

    class Network:
        num_layers = 1

        def __init__(self, flags: int) -> None:
            assert flags == 1 << Flag.STRONGLY_TYPED

        def get_layer(self, i: int) -> Any:
            return SimpleNamespace(num_outputs=1, get_output=lambda j: SimpleNamespace(dtype=SimpleNamespace(name="HALF")))

        def get_input(self, i: int) -> Tensor:
            return self.inputs[i]

        def get_output(self, i: int) -> Tensor:
            return self.outputs[i]

        def read(self, path: str) -> None:
            model = onnx.load(path)
            self.data = model.SerializeToString()
            self.inputs, self.outputs = [[Tensor(v) for v in side] for side in (model.graph.input, model.graph.output)]
            self.num_inputs, self.num_outputs = len(self.inputs), len(self.outputs)

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: Network, logger: ILogger) -> None:
            assert logger.initialised
            self.network = network

        def parse_from_file(self, path: str) -> bool:
            self.network.read(path)
            return True

    class TimingCache:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def serialize(self) -> bytes:
            return self.data + b"+"

    class Config:
        def __init__(self) -> None:
            self.profiles: list[dict[str, Any]] = []
            calls["config"] = self
            self.flags: list[Flag] = []

        def add_optimization_profile(self, profile: Any) -> int:
            self.profiles.append(profile.shapes)
            return len(self.profiles) - 1

        def set_flag(self, flag: Flag) -> None:
            self.flags.append(flag)

        def set_memory_pool_limit(self, pool: Flag, size: int) -> None:
            self.workspace = (pool, size)

        def create_timing_cache(self, data: bytes) -> TimingCache:
            return TimingCache(data)

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            self.cache = cache
            return not cache.data.startswith(b"other version")

        def get_timing_cache(self) -> TimingCache:
            return self.cache

        def set_compute_capability(self, capability: str, i: int) -> None:
            calls.setdefault("capabilities", []).append(capability)

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
            self.shapes[name] = (low, usual, high)

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Network:
            return Network(flags)

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            self.logger.log(Severity.INFO, "timing kernels")
            if fails:
                self.logger.log(Severity.ERROR, fails)
                return None
            calls["built"] = config.profiles
            return HEADER + json.dumps(config.profiles).encode() + b"\0" + network.data

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            assert logger.initialised

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            return Engine(data) if data.startswith(HEADER) else None

    class Engine:
        def __init__(self, data: bytes) -> None:
            profiles, _, data = data[len(HEADER) :].partition(b"\0")
            self.profiles = json.loads(profiles)
            self.session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
            graph = onnx.load_from_string(data).graph
            self.inputs = {value.name: Tensor(value) for value in graph.input}
            self.outputs = {value.name: Tensor(value) for value in graph.output}
            self.all = {**self.inputs, **self.outputs}
            self.num_io_tensors = len(self.all)

        def get_tensor_name(self, i: int) -> str:
            return list(self.all)[i]

        def get_tensor_dtype(self, name: str) -> Any:
            return self.all[name].dtype

        def create_runtime_config(self) -> Any:
            return SimpleNamespace(create_runtime_cache=RuntimeCache, set_runtime_cache=lambda cache: None)

        def create_execution_context(self, *config: Any) -> Context:
            assert (name == "tensorrt_rtx") == bool(config)
            return Context(self)

    class Refitter:
        def __init__(self, engine: Engine, logger: Any) -> None:
            self.engine, self.logger = engine, logger

        def refit_cuda_engine(self) -> bool:
            self.engine.session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])
            return True

    class OnnxParserRefitter:
        def __init__(self, refitter: Refitter, logger: Any) -> None:
            self.refitter = refitter

        def refit_from_file(self, path: str) -> bool:
            self.refitter.path = path
            if calls.get("refuse"):
                self.refitter.logger.log(Severity.ERROR, "no such weight")
                return False
            return True

    class RuntimeCache:
        def __init__(self) -> None:
            self.data = b""
            calls["cache"] = self

        def deserialize(self, data: bytes) -> bool:
            self.data = data
            return True

        def serialize(self) -> bytes:
            return self.data

    class Context:
        def __init__(self, engine: Engine) -> None:
            self.engine, self.shapes, self.addresses = engine, {}, calls["addresses"]
            self.profile = 0

        def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
            self.profile = profile
            calls["profiles_set"].append(profile)
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            low, _, high = self.engine.profiles[self.profile][name]
            assert all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
            self.shapes[name] = shape
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            assert name in self.engine.all and address
            self.addresses[name] = address
            return True

        def infer_shapes(self) -> list[str]:
            missing = [name for name in self.engine.inputs if name not in self.shapes]
            if not missing:
                zeros = {name: np.zeros(shape, self._type(name)) for name, shape in self.shapes.items()}
                for name, value in zip(self.engine.outputs, self.engine.session.run(None, zeros), strict=True):
                    self.shapes[name] = value.shape
                self.shapes = {name: tuple(shape) for name, shape in self.shapes.items()}
            return missing

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self.shapes[name]

        def execute_async_v3(self, stream: int) -> bool:
            calls["streams"].append(stream)
            calls["profile"] = self.profile
            given = {name: self._at(name).copy() for name in self.engine.inputs}
            for name, value in zip(self.engine.outputs, self.engine.session.run(None, given), strict=True):
                self._at(name)[...] = value
            self.shapes = {}
            return True

        def _type(self, name: str) -> Any:
            return _NUMPY[self.engine.all[name].dtype.name]

        def _at(self, name: str) -> np.ndarray[Any, Any]:
            assert self.addresses[name] % ALIGNMENT == 0, f"{name} is not aligned"
            shape, dtype = self.shapes[name], np.dtype(self._type(name))
            size = int(np.prod(shape)) * dtype.itemsize
            memory = (ctypes.c_byte * size).from_address(self.addresses[name])
            return np.frombuffer(memory, dtype).reshape(shape)

    if name == "tensorrt_rtx":
        state = EngineValidity[validity]
        Runtime.get_engine_validity = lambda self, data: (state, 0 if state.name == "VALID" else 3)  # type: ignore[attr-defined]
    return SimpleNamespace(
        __version__=version,
        calls=calls,
        ILogger=ILogger,
        Builder=Builder,
        OnnxParser=OnnxParser,
        Runtime=Runtime,
        Refitter=Refitter,
        OnnxParserRefitter=OnnxParserRefitter,
        NetworkDefinitionCreationFlag=Flag,
        BuilderFlag=Flag,
        MemoryPoolType=Flag,
        ComputeCapability=enum.Enum("ComputeCapability", {"SM80": "80", "SM89": "89", "CURRENT": "current"}),
        EngineInvalidityDiagnostics=enum.IntFlag("EngineInvalidityDiagnostics", {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2}),
    )
