"""Models as ONNX: traced for any batch and caption length, of standard operators alone, each file complete or not there."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from textok_fast import __version__
from textok_fast.errors import InputError
from textok_fast.export.graphs import TEXT, Graph, Inputs, Part

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 20  # the first with Gelu. 23 has Attention, which TensorRT-RTX refuses in float32 and for small heads
SCOPES = "pkg.torch.onnx.name_scopes"  # a node's metadata: the modules it lies in, outermost first
EXTERNAL_BYTES = 2**31 - 2**24  # a file of protobuf holds 2 GB: from here on weights lie beside it
_INLINE_BYTES = 2**10  # smaller tensors stay in the graph: shape inference reads them
_ALIGNMENT = 2**16  # of weights in their file, so that a runtime can map it into memory on any system
TRACED = (2, 5)  # batch and caption length, neither of them 1, which would become a constant
LATEST = 25  # opset that torch's exporter and onnx's converter reach
_MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)  # operators that round nothing


# -- tracing -------------------------------------------------------------------------------------------------------------------


def require_libraries() -> None:
    """InputError, with what to install, unless everything is there that writing and checking a graph takes."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise InputError(f"ONNX export needs {error.name}: pip install 'textok-fast[export]'") from None


def require_opset(opset: int) -> None:
    """InputError for one without the operators that graphs are made of, and for one that nothing here writes."""
    if not OPSET <= opset <= LATEST:
        raise InputError(f"the opset must be {OPSET} (the first with Gelu) to {LATEST}, got {opset}")


def runtime_name() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def trace(graph: Graph, about: dict[str, Any], opset: int = OPSET, known: dict[str, ir.Model] | None = None) -> ir.Model:
    """The graph as a model in memory, with named inputs, outputs and weights; ``about`` becomes its metadata, as JSON.

    ``known``: models that were traced before, by name, which gains those that are traced here: a graph made of others is put
    together from them. Weights are references to the module's.

    Raises: InputError for an operator that is not ONNX's own, for a size that became a constant, and as
        :func:`require_opset`.
    """
    require_opset(opset)
    known = {} if known is None else known
    if parts := graph.parts():
        for part in parts:
            if part.graph.name not in known:
                known[part.graph.name] = _traced(part.graph, opset)
        model = _joined(graph, parts, known)
    else:
        model = known[graph.name] if graph.name in known else _traced(graph, opset)
        known[graph.name] = model
    model.producer_name, model.producer_version = "textok-fast", __version__
    model.metadata_props.clear()
    for key, value in about.items():
        model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    return model


def _traced(graph: Graph, opset: int) -> ir.Model:
    batch, length = TRACED
    length = length if graph.most_text is None else min(length, graph.most_text)
    inputs = graph.example(batch, length, torch.Generator().manual_seed(0))
    free: dict[str, Any] = {}
    for name in {name for axes in graph.axes.values() for name in axes.values()}:
        free[name] = torch.export.Dim(name, min=1, max=graph.most_text if name == TEXT else None) if name.isidentifier() else 0
    for name in [name for name, size in free.items() if size == 0]:  # a multiple of another
        factor, _, other = name.partition("*")
        free[name] = int(factor) * free[other]
    shapes = {name: {axis: free[size] for axis, size in graph.axes[name].items()} for name in inputs}
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            graph.eval(),
            (),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=shapes,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model: ir.Model = program.model
    foreign = {f"{node.domain}.{node.op_type}" for node in model.graph.all_nodes() if node.domain} | set(
        map(str, model.functions)
    )
    if foreign:
        raise InputError(f"the graph {graph.name} needs {min(foreign)}, which is no operator of ONNX's own")
    for value in model.graph.inputs:  # the exporter does not say so when a size became a constant
        for axis, size in graph.axes[str(value.name)].items():
            if value.shape is None or isinstance(value.shape[axis], int):
                raise InputError(f"the graph {graph.name} was traced for one {size} only, of its input {value.name}")
    _expand_masks(model)
    _name_weights(model)
    _drop_notes(model)
    return model


def _expand_masks(model: ir.Model) -> None:
    """Masks of Attention that hold for all queries, (B, 1, 1, N_k), as (B, 1, N_q, N_k): ONNX Runtime takes no others."""
    import numpy as np
    import onnx_ir as ir

    graph = model.graph
    for number, node in enumerate([node for node in graph if node.op_type == "Attention"]):
        queries, mask = node.inputs[0], node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None or mask.shape is None or mask.shape[-2] != 1:
            continue
        ones = ir.Tensor(np.ones(1, np.int64), name=f"attention_one_{number}")
        one = ir.Value(name=ones.name, const_value=ones, shape=ir.Shape([1]), type=ir.TensorType(ones.dtype))
        graph.register_initializer(one)
        # In the graph: captions are rows of a tokenizer's own sequence, so its length is theirs.
        span = [ir.AttrInt64("start", 2), ir.AttrInt64("end", 3)]
        length = ir.Node("", "Shape", [queries], span, outputs=[ir.Value(name=f"attention_queries_{number}")])
        parts = [one, one, length.outputs[0], one]
        sizes = ir.Node("", "Concat", parts, [ir.AttrInt64("axis", 0)], outputs=[ir.Value(name=f"attention_sizes_{number}")])
        wide = ir.Node(
            "", "Expand", [mask, sizes.outputs[0]], outputs=[ir.Value(name=f"attention_mask_{number}", type=mask.type)]
        )
        graph.insert_before(node, [length, sizes, wide])
        node.replace_input_with(3, wide.outputs[0])


def _joined(graph: Graph, parts: Sequence[Part], known: dict[str, ir.Model]) -> ir.Model:
    """Copies of the parts' models one after the other; weights stay shared."""
    import onnx_ir as ir

    values: dict[str, ir.Value] = {}  # by the names of the whole
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []
    names: set[str] = set()
    for part in parts:
        copied = known[part.graph.name].graph.clone()
        for value in copied.inputs:
            wire = part.inputs[str(value.name)]
            if wire not in values:  # an input of the whole
                assert value.shape is not None
                sizes: list[Any] = list(value.shape)
                for axis, size in graph.axes[wire].items():  # the whole's names: a part's rows may be its batch
                    sizes[axis] = size
                values[wire] = ir.Value(name=wire, type=value.type, shape=ir.Shape(sizes))
            ir.convenience.replace_all_uses_with(value, values[wire])
        outputs = {str(value.name): value for value in copied.outputs}
        copied.outputs.clear()
        own = list(copied)
        copied.remove(own)
        held = list(copied.initializers.values())
        copied.initializers.clear()
        for value in (*held, *(value for node in own for value in node.outputs)):
            name = str(value.name)
            value.name = f"{part.graph.name}.{name}" if name in names or name in graph.axes else name
            names.add(str(value.name))
        for value in (value for node in own for value in node.outputs):
            if value.shape is not None:  # without names: the part's batch may be another than the whole's
                value.shape = ir.Shape([size if isinstance(size, int) else None for size in value.shape])
        for name, wire in part.outputs.items():
            values[wire] = outputs[name]
            if wire in graph.outputs:
                outputs[name].name = wire
        nodes += own
        initializers += held
    for number, node in enumerate(nodes):
        node.name = f"node_{number}"
    first = known[parts[0].graph.name]
    whole = ir.Graph(
        [values[name] for name in graph.axes],
        [values[name] for name in graph.outputs],
        nodes=nodes,
        initializers=initializers,
        opset_imports=dict(first.opset_imports),
        name=graph.name,
    )
    last = {str(value.name): value.shape for value in known[parts[-1].graph.name].graph.outputs}
    for value in whole.outputs:
        value.shape = last[str(value.name)]
    return ir.Model(whole, ir_version=first.ir_version)


def scope(node: ir.Node) -> str:
    """The innermost module that a node lies in, such as "network.model.blocks.0.attn.qkv"; "" for the graph itself."""
    scopes = node.metadata_props.get(SCOPES)
    return "" if scopes is None else str(ast.literal_eval(scopes)[-2] if len(ast.literal_eval(scopes)) > 1 else "")


def _name_weights(model: ir.Model) -> None:
    """Transposed weights, which the exporter numbers, get the name of their layer: of "a.b", "a.b.weight_t"."""
    initializers = model.graph.initializers
    for node in model.graph:
        if node.op_type != "MatMul" or (weight := node.inputs[1]) is None or weight.name not in initializers:
            continue
        name = f"{scope(node)}.weight_t"
        if str(weight.name).startswith("val_") and name not in initializers:
            weight.name = name  # the graph's table follows


def _drop_notes(model: ir.Model) -> None:
    """Of what the exporter notes only the modules stay: the rest is long, and has paths of this machine in it."""
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        kept = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        if kept is not None:
            node.metadata_props[SCOPES] = kept
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without torch's deprecations and its notes that torchvision is absent: nothing there a caller could act on."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


# -- files ---------------------------------------------------------------------------------------------------------------------


class WeightFile:
    """One file of weights for several graphs; what two of them have in common lies there once."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self._places: dict[bytes, tuple[int, int]] = {}  # digest -> offset, length

    def add(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Where the tensor's numbers lie."""
        import onnx_ir as ir

        data = tensor.tobytes()
        release(tensor)
        digest = hashlib.blake2b(data, digest_size=20).digest()
        if digest not in self._places:
            self._file.seek(-self._file.tell() % _ALIGNMENT, os.SEEK_CUR)
            self._places[digest] = (self._file.tell(), len(data))
            self._file.write(data)
        offset, length = self._places[digest]
        shape = tensor.shape
        assert isinstance(shape, ir.Shape)
        return ir.ExternalTensor(
            self.path.name, offset, length, tensor.dtype, shape=shape, name=str(tensor.name), base_dir=self.path.parent
        )


@contextlib.contextmanager
def weights_beside(largest: int, path: Path) -> Iterator[WeightFile | None]:
    """A file for the weights of models of at most ``largest`` bytes where that passes protobuf's 2 GB; else None, no file."""
    if largest < EXTERNAL_BYTES:
        yield None
        return
    with path.open("wb") as file:
        yield WeightFile(path, file)


def weight_bytes(model: ir.Model) -> int:
    """Of all weights that the model holds, in bytes."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def save(model: ir.Model, path: Path, store: WeightFile | None = None) -> None:
    """Writes a model, checks it in full and infers its shapes. Weights that went to ``store`` are read from there from then on.

    Raises: InputError where the checker finds something.
    """
    import onnx
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        tensor = value.const_value
        lies_there = isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir) == path.parent
        if tensor is None or lies_there:
            continue
        if store is not None and tensor.nbytes >= _INLINE_BYTES:
            value.const_value = store.add(tensor)
        elif isinstance(tensor, ir.ExternalTensor):  # in the directory of an earlier file
            value.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name)
    if store is not None:
        store._file.flush()
    ir.save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(f"the graph {path.name} is not valid: {' '.join(str(error).split())[:300]}") from None


def release(tensor: ir.TensorProtocol | None) -> None:
    """Lets go of the pages of a tensor that lies in a file: it is mapped again when it is read again."""
    import onnx_ir as ir

    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()


# -- bfloat16 where nothing runs it --------------------------------------------------------------------------------------------


def widen(model: ir.Model, store: WeightFile | None = None) -> None:
    """Makes bfloat16 float32 whose numbers are rounded to bfloat16 after each operator that computes, in place.

    These are the numbers of a runtime that computes an operator in float32 and stores its result in bfloat16. ONNX Runtime's
    CPU provider, which has no operators of bfloat16 but Cast, runs this. Large weights go to ``store`` at once.
    """
    import numpy as np
    import onnx_ir as ir

    narrow, wide = ir.DataType.BFLOAT16, ir.TensorType(ir.DataType.FLOAT)

    def float32(tensor: ir.TensorProtocol) -> ir.Tensor:
        made = ir.Tensor(np.array(tensor.numpy(), np.float32), name=tensor.name)
        release(tensor)
        return made

    graph = model.graph
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == narrow:
            held = float32(tensor)
            value.const_value = held if store is None or held.nbytes < _INLINE_BYTES else store.add(held)
            value.type = wide
    for node in list(graph):
        casts = node.op_type == "Cast" and node.attributes["to"].as_int() == int(narrow)
        if casts:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == narrow:
                node.attributes[name] = ir.AttrTensor(name, float32(attribute.as_tensor()))
        for value in node.outputs:
            if value.dtype != narrow and not casts:
                continue
            value.type = wide
            if node.op_type in _MOVES:
                continue
            to = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(narrow))], outputs=[ir.Value(name=f"{value.name}_bf16")])
            back = ir.Node(
                "",
                "Cast",
                [to.outputs[0]],
                [ir.AttrInt64("to", int(ir.DataType.FLOAT))],
                outputs=[ir.Value(name=f"{value.name}_rounded", type=wide, shape=value.shape)],
            )
            for user, place in list(value.uses()):
                if user is not to:
                    user.replace_input_with(place, back.outputs[0])
            graph.insert_after(node, [to, back])


# -- ONNX Runtime --------------------------------------------------------------------------------------------------------------


def session(path: Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU.

    Packed copies of the weights are left out: they would double the memory of a comparison.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors: its notes on unused initializers are nothing a caller could act on
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(handle: Any, inputs: Inputs, outputs: list[str] | None = None) -> list[torch.Tensor]:
    """Outputs (None: all of them) of a session, as tensors."""
    given = {name: value.detach().contiguous().numpy() for name, value in inputs.items()}
    return [torch.from_numpy(value) for value in handle.run(outputs, given)]
