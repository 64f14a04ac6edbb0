"""What a Triton Inference Server does with a model repository, as far as it is promised: configurations read from text format,
requests checked against them, warm-up, dynamic batching, and the Python backend's utilities; networks run in ONNX Runtime."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

Array = np.ndarray[Any, Any]
TYPES = {
    "TYPE_FP32": np.float32,
    "TYPE_INT64": np.int64,
    "TYPE_INT32": np.int32,
    "TYPE_BOOL": np.bool_,
    "TYPE_UINT8": np.uint8,
    "TYPE_STRING": np.object_,
}


def parse(text: str) -> dict[str, Any]:
    """protobuf's text format -> field names to the list of their values."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.sub(r"#.*", "", text))
    position = 0

    def scalar(token: str) -> Any:
        if token.startswith('"'):
            return token[1:-1]
        if token in ("true", "false"):
            return token == "true"
        return int(token) if re.fullmatch(r"-?\d+", token) else token

    def message(end: str | None) -> dict[str, Any]:
        nonlocal position
        fields: dict[str, Any] = {}
        while position < len(tokens) and tokens[position] != end:
            name = tokens[position]
            assert re.fullmatch(r"[a-z_]+", name), f"{name!r} is no field"
            position += 1
            if tokens[position] == "{":
                position += 1
                value: list[Any] = [message("}")]
                position += 1
            else:
                assert tokens[position] == ":", f"{name} has neither a value nor a message"
                position += 1
                if tokens[position] == "[":
                    close = tokens.index("]", position)
                    value = [scalar(token) for token in tokens[position + 1 : close] if token != ","]
                    position = close + 1
                else:
                    value = [scalar(tokens[position])]
                    position += 1
            fields.setdefault(name, []).extend(value)
        assert (position < len(tokens)) == (end is not None), "a message is not closed"
        return fields

    return message(None)


class TritonModelException(Exception):
    pass


class Model:
    """A network of the repository; ``batches`` are the sizes it was run with."""

    def __init__(self, place: Path) -> None:
        self.config = parse((place / "config.pbtxt").read_text(encoding="utf-8"))
        assert self.config["name"] == [place.name]
        self.max_batch = self.config["max_batch_size"][0]
        self.inputs = {entry["name"][0]: entry for entry in self.config["input"]}
        self.outputs = {entry["name"][0]: entry for entry in self.config["output"]}
        self.batches: list[int] = []
        assert all(size <= self.max_batch for size in self.config["dynamic_batching"][0].get("preferred_batch_size", []))
        if self.config.get("backend") == ["onnxruntime"]:
            self.session = onnxruntime.InferenceSession(str(place / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
            assert set(self.inputs) == {entry.name for entry in self.session.get_inputs()}

    def check(self, given: dict[str, Array], entries: dict[str, Any]) -> None:
        batch = len(next(iter(given.values())))
        assert 1 <= batch <= self.max_batch
        for name, array in given.items():
            assert name in entries, f"{self.config['name'][0]} has no {name}"
            entry = entries[name]
            assert array.dtype == TYPES[entry["data_type"][0]], f"{name} is {array.dtype}"
            dims = entry["dims"]
            shape = (batch, *dims)
            assert array.ndim == len(shape), f"{name} is {array.shape}, wanted {shape}"
            assert all(wanted in (-1, got) for got, wanted in zip(array.shape, shape, strict=True)), (name, array.shape, shape)

    def run(self, given: dict[str, Array]) -> dict[str, Array]:
        self.check(given, self.inputs)
        assert set(given) == set(self.inputs), "an input is missing"
        self.batches.append(len(next(iter(given.values()))))
        shaped = {
            name: array.reshape(len(array), *self.inputs[name]["reshape"][0]["shape"])
            if "reshape" in self.inputs[name]
            else array
            for name, array in given.items()
        }
        values = self.session.run(list(self.outputs), shaped)
        results = dict(zip(self.outputs, values, strict=True))
        self.check(results, self.outputs)
        return results

    def warm_up(self) -> None:
        """Runs its warm-up samples."""
        for sample in self.config["model_warmup"]:
            given = {}
            for entry in sample["inputs"]:
                value = entry["value"][0]
                assert value["zero_data"] == [True]
                given[entry["key"][0]] = np.zeros((sample["batch_size"][0], *value["dims"]), TYPES[value["data_type"][0]])
            assert all(np.isfinite(result).all() for result in self.run(given).values())


class Server:
    """``infer`` for tests; ``utilities`` is the module that Python models import."""

    def __init__(self, repository: Path) -> None:
        places = [place for place in sorted(repository.iterdir()) if place.name != "generate"]
        self.models = {place.name: Model(place) for place in places}
        self.pending: dict[str, list[tuple[dict[str, Array], asyncio.Future[dict[str, Array]]]]] = {}
        self.utilities = self._utilities()
        sys.modules["triton_python_backend_utils"] = self.utilities
        place = repository / "generate"
        if place.is_dir():
            spec = importlib.util.spec_from_file_location("served_model", place / "1" / "model.py")
            assert spec is not None and spec.loader is not None
            self.module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self.module)
            self.generate_config = Model(place)
            self.generate = self.module.TritonPythonModel()
            self.generate.initialize({"model_name": "generate"})

    def infer(self, *requests: dict[str, Any]) -> list[Any]:
        """Responses of ``generate`` to requests that arrive together: outputs by name, or the error's message."""
        prepared = []
        for request in requests:
            given = {name: self._prepare(name, value) for name, value in request.items()}
            self.generate_config.check(given, self.generate_config.inputs)
            required = {name for name, entry in self.generate_config.inputs.items() if not entry.get("optional", [False])[0]}
            assert required <= set(given), f"the server would refuse a request without {required - set(given)}"
            prepared.append(
                SimpleNamespace(tensors={name: self.utilities.Tensor(name, array) for name, array in given.items()})
            )
        responses = asyncio.run(self.generate.execute(prepared))
        assert len(responses) == len(requests)
        results = []
        for response in responses:
            if response.has_error():
                results.append(response.error().message())
                continue
            outputs = {tensor.name(): tensor.as_numpy() for tensor in response.tensors.values()}
            self.generate_config.check(outputs, self.generate_config.outputs)
            assert set(outputs) == set(self.generate_config.outputs)
            results.append(outputs)
        return results

    def _prepare(self, name: str, value: Any) -> Array:
        if isinstance(value, np.ndarray):
            return value
        dtype = TYPES[self.generate_config.inputs[name]["data_type"][0]]
        column = [each.encode() if isinstance(each, str) else each for each in value]
        return np.array(column, dtype).reshape(-1, 1)

    async def _enqueue(self, model: str, given: dict[str, Array]) -> dict[str, Array]:
        """Joins requests that wait, as the dynamic batcher does where all their shapes agree."""
        loop = asyncio.get_running_loop()
        waiting = self.pending.setdefault(model, [])
        if not waiting:
            loop.call_soon(self._flush, model)
        future: asyncio.Future[dict[str, Array]] = loop.create_future()
        waiting.append((given, future))
        return await future

    def _flush(self, model: str) -> None:
        groups: dict[Any, list[tuple[dict[str, Array], asyncio.Future[dict[str, Array]]]]] = {}
        for given, future in self.pending.pop(model):
            self.models[model].check(given, self.models[model].inputs)
            key = tuple((name, array.shape[1:]) for name, array in sorted(given.items()))
            groups.setdefault(key, []).append((given, future))
        for group in groups.values():
            while group:
                part, size = [], 0
                while group and size + len(group[0][0][next(iter(group[0][0]))]) <= self.models[model].max_batch:
                    part.append(group.pop(0))
                    size += len(part[-1][0][next(iter(part[-1][0]))])
                joined = {name: np.concatenate([given[name] for given, _ in part]) for name in part[0][0]}
                try:
                    results = self.models[model].run(joined)
                except Exception as error:
                    for _, future in part:
                        future.set_exception(error)
                    continue
                start = 0
                for given, future in part:
                    end = start + len(next(iter(given.values())))
                    future.set_result({name: value[start:end] for name, value in results.items()})
                    start = end

    def _utilities(self) -> ModuleType:
        server = self
        module = ModuleType("triton_python_backend_utils")

        class Tensor:
            def __init__(self, name: str, array: Array) -> None:
                assert isinstance(array, np.ndarray) and array.flags.c_contiguous
                self._name, self._array = name, array

            def name(self) -> str:
                return self._name

            def as_numpy(self) -> Array:
                return self._array

        class TritonError:
            def __init__(self, message: str) -> None:
                self._message = message

            def message(self) -> str:
                return self._message

        class InferenceResponse:
            def __init__(self, output_tensors: Any = (), error: TritonError | None = None) -> None:
                self.tensors = {tensor.name(): tensor for tensor in output_tensors}
                self._error = error

            def has_error(self) -> bool:
                return self._error is not None

            def error(self) -> TritonError | None:
                return self._error

        class InferenceRequest:
            def __init__(self, model_name: str, requested_output_names: Any, inputs: Any, preferred_memory: Any) -> None:
                assert preferred_memory == ("cpu", 0), "outputs would lie on the GPU, out of numpy's reach"
                self.model, self.wanted = model_name, requested_output_names
                self.tensors = {tensor.name(): tensor for tensor in inputs}

            async def async_exec(self) -> InferenceResponse:
                given = {name: tensor.as_numpy() for name, tensor in self.tensors.items()}
                try:
                    outputs = await server._enqueue(self.model, given)
                except RuntimeError as error:  # what ONNX Runtime raises
                    return InferenceResponse(error=TritonError(str(error)))
                return InferenceResponse([Tensor(name, np.ascontiguousarray(outputs[name])) for name in self.wanted])

        contents: dict[str, Any] = {
            "Tensor": Tensor,
            "TritonError": TritonError,
            "TritonModelException": TritonModelException,
            "InferenceResponse": InferenceResponse,
            "InferenceRequest": InferenceRequest,
            "PreferredMemory": lambda kind, device: (kind, device),
            "TRITONSERVER_MEMORY_CPU": "cpu",
            "get_input_tensor_by_name": lambda request, name: request.tensors.get(name),
            "get_output_tensor_by_name": lambda response, name: response.tensors.get(name),
        }
        for name, value in contents.items():
            setattr(module, name, value)
        return module
