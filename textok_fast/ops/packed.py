"""Linear layers for inference on a CPU whose weights are brought once into the order in which the processor reads them.

Backends: ``native`` (csrc), ``onednn`` (the library inside PyTorch), ``reference``. Packed weights are of one backend and one
processor, so the backend is chosen when they are packed, and they are not for storing: native ones carry a mark of their
layout, and are refused where another one is read; oneDNN's cannot be stored at all.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from textok_fast import _native
from textok_fast.errors import InputError
from textok_fast.ops import dispatch
from textok_fast.ops.dispatch import REFERENCE, choose, describe, needs_gradient, register, without_autocast
from textok_fast.ops.library import define, has_native, library, native_runs_on

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS = ("fp32", "bf16", "int8")  # the index is the kernels' ``kind``
DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # of the weight, by kind
ACTIVATIONS = ("none", "gelu", "gelu_tanh")
INT8_MAX = 127  # symmetric: -128 is not used
ONEDNN = "textok_fast_onednn"  # namespace in torch.ops


class PackedWeight(NamedTuple):
    """A linear layer's weight as ``backend`` reads it; opaque but for ``reference``, where it is (out, in)."""

    weight: Tensor
    scales: Tensor | None  # (out,) float32, int8 only: weight = integers * scales
    bias: Tensor | None  # (out,), float32, or bfloat16 for bf16
    in_features: int
    out_features: int
    precision: Precision
    backend: str

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return self  # nobody writes to it, and oneDNN's tensors cannot be copied

    @property
    def nbytes(self) -> int:
        """Of its tensors; where the layout is oneDNN's, without its padding."""
        given = [tensor for tensor in (self.weight, self.scales, self.bias) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in given)


# -- reference ---------------------------------------------------------------------------------------------------------------


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) -> integers (..., D) int8 and scales (...) float32 with x = integers * scales, symmetric in each row.

    The scale is max |x| / 127, 1 for a row of zeros, and NaN for one with a NaN or an infinity, whose integers are zeros.
    """
    x = x.float()
    scales = x.abs().amax(dim=-1) / INT8_MAX  # (...)
    scales = torch.where(scales == 0, 1.0, torch.where(scales.isfinite(), scales, torch.nan))
    integers = (x / scales.unsqueeze(-1)).round().clamp(-INT8_MAX, INT8_MAX).nan_to_num(0.0)  # (..., D)
    return integers.to(torch.int8), scales


def packed_linear_reference(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """:func:`packed_linear` in PyTorch, from the weight (out, in) in float32, bfloat16 or int8, with int8's scales (out,)."""
    with without_autocast(x):
        if scales is None:
            out = F.linear(x.float(), weight.float())  # (..., out)
        else:
            integers, row_scales = quantize_int8(x)
            # float64 holds the sums of integer products exactly
            out = F.linear(integers.double(), weight.double()).float() * row_scales.unsqueeze(-1) * scales
    if bias is not None:
        out = out + bias.float()
    return _activate(out, activation).to(x.dtype)


def _activate(x: Tensor, activation: str) -> Tensor:
    return x if activation == "none" else F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


# -- public functions --------------------------------------------------------------------------------------------------------


def pack_linear(
    weight: Tensor, bias: Tensor | None = None, precision: Precision = "fp32", backend: str | None = None, rows: int = 64
) -> PackedWeight:
    """Brings a linear layer's weight into the form that :func:`packed_linear` reads. Without gradient.

    Args:
        weight: (out, in), float, on the CPU; reference also elsewhere. int8: each channel is divided by its max |w| / 127.
        bias: (out,), float, or None.
        precision: "fp32", "bf16" or "int8".
        backend: "native", "onednn" or "reference"; None takes the fastest for these sizes that this machine has.
        rows: how many rows x will have, about, for that choice and for oneDNN's order of the weight; any other number works.

    Raises: InputError for another shape or precision, and for a backend that does not take it.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise InputError(f"weight must be float (out, in), both at least 1, got {describe(weight)}")
    outputs, inputs = weight.shape
    if bias is not None and bias.shape != (outputs,):
        raise InputError(f"bias must be (out,) = ({outputs},), got {tuple(bias.shape)}")
    kind = PRECISIONS.index(precision)
    if backend is None:
        backend = choose("packed_linear", weight, kind, rows)
    elif backend not in (*_RULES, REFERENCE):
        raise InputError(f"unknown backend {backend!r} of packed_linear; known: {', '.join((*_RULES, REFERENCE))}")
    elif backend != REFERENCE and (reason := _RULES[backend](weight, kind, rows)):
        raise InputError(f"packed_linear: the backend {backend!r} does not take this weight: {reason}")
    weight = weight.detach()
    scales = None
    if precision == "int8":
        weight, scales = quantize_int8(weight)
    weight = weight.to(DTYPES[kind]).contiguous()
    if bias is not None:
        bias = bias.detach().to(torch.bfloat16 if precision == "bf16" else torch.float32).contiguous()
    if backend == "native":
        weight = library(backend).pack_linear(weight, kind)
    elif backend == "onednn":
        weight = _onednn_pack(weight, rows)
    return PackedWeight(weight, scales, bias, inputs, outputs, precision, backend)


def packed_linear(x: Tensor, packed: PackedWeight, activation: str = "none") -> Tensor:
    """activation(x weight^T + bias), summed in float32 and rounded once. Without gradient.

    int8: x is quantized row by row, symmetric, to s_x q with s_x = max |x| / 127 and q rounded half to even, and the result is
    (q weight^T) s_x scales + bias, with exact sums of integers (Dettmers et al. 2022, arXiv 2208.07339, without its outliers'
    part). A row does not depend on the others.

    Args:
        x: (..., in): float32 for fp32, bfloat16 for bf16, either for int8; rows may lie anywhere, a row's numbers side by side.
        packed: from :func:`pack_linear`.
        activation: "none", "gelu" (exact) or "gelu_tanh".

    Returns: (..., out) in ``x``'s dtype. A NaN in x makes its row NaN; int8: an infinity too.
    Raises: InputError for another shape, dtype or activation, where a gradient is wanted, and, but for ``reference``, inside
        torch.func and forward-mode differentiation; RuntimeError for a native weight that came from another kind of processor.
    """
    weight, scales, bias, inputs, outputs, precision, backend = packed
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if not x.ndim or x.shape[-1] != inputs:
        raise InputError(f"x must be (..., in) = (..., {inputs}), got {tuple(x.shape)}")
    wanted = (torch.float32, torch.bfloat16) if precision == "int8" else (DTYPES[PRECISIONS.index(precision)],)
    if x.dtype not in wanted:
        raise InputError(f"x must be {' or '.join(map(str, wanted))} for weights packed in {precision}, got {x.dtype}")
    if needs_gradient(x):
        raise InputError("packed weights have no gradient; call them under torch.no_grad()")
    if backend == REFERENCE:
        return packed_linear_reference(x, weight, scales, bias, activation)
    if dispatch._is_transformed():  # derivatives would be zero without a word
        raise InputError("packed weights have no rules for torch.func and forward-mode differentiation; pack for 'reference'")
    namespace = library(backend) if backend == "native" else getattr(torch.ops, ONEDNN)
    return namespace.packed_linear(x, weight, scales, bias, outputs, PRECISIONS.index(precision), activation)


# -- oneDNN ------------------------------------------------------------------------------------------------------------------

# Its own operations as custom ones: torch.compile has its own forms of them, which want the weight as a constant.


def _onednn_pack(weight: Tensor, rows: int) -> Tensor:
    if weight.dtype == torch.int8:
        return torch.ops.onednn.qlinear_prepack(weight, None)
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _onednn_linear(
    x: Tensor, packed: Tensor, scales: Tensor | None, bias: Tensor | None, out_features: int, kind: int, activation: str
) -> Tensor:
    if scales is None:
        name, form = {"none": ("none", "none"), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}[activation]
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], form)
    flat = x.reshape(-1, x.shape[-1])  # (M, in)
    integers, row_scales = quantize_int8(flat)
    # Unsigned with zero point 128: its signed products are a hundred times slower on processors without AMX.
    shifted = (integers.view(torch.uint8) ^ 128).contiguous()  # (M, in)
    zeros = torch.zeros(out_features, dtype=torch.int64)
    out = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )  # (M, out)
    out = out.mul_(row_scales.unsqueeze(-1))
    if bias is not None:
        out.add_(bias)
    return _activate(out, activation).to(x.dtype).reshape(*x.shape[:-1], out_features)


# -- choice ------------------------------------------------------------------------------------------------------------------


def _native_rule(weight: Tensor, kind: int, rows: int) -> str:
    if not has_native("packed_linear") or not has_native("pack_linear"):
        return "the native library is not loaded, or of an older build"
    if not weight.is_cpu:
        return f"it packs for a CPU, got {describe(weight)}"
    return native_runs_on(weight)


def _onednn_rule(weight: Tensor, kind: int, rows: int) -> str:
    if not weight.is_cpu or not torch.backends.mkldnn.is_available():
        return f"no oneDNN on {weight.device.type}"
    if PRECISIONS[kind] == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bf16 products"
    if PRECISIONS[kind] == "int8" and not torch.cpu._is_vnni_supported():
        return "without VNNI its sums of int8 products saturate"
    return ""


def _native_default(weight: Tensor, kind: int, rows: int) -> str:
    if _onednn_rule(weight, kind, rows):
        return ""
    return "" if rows <= _native_up_to(PRECISIONS[kind]) else "oneDNN is faster for so many rows"


def _native_up_to(precision: str) -> float:
    most = NATIVE_UP_TO.get(_native.load().info.get("kernels", ""), NATIVE_UP_TO["baseline"])[precision]
    return min(most, NATIVE_UP_TO_BESIDE_AMX) if precision != "fp32" and torch.cpu._is_amx_tile_supported() else most


# Rows up to which the native products are chosen where oneDNN could run too, by the native library's kernels. On one thread of
# an AVX-512 processor they took 0.8 to 0.95 of its time up to 64 rows, as long at 128, 1.01 to 1.14 times as long from 256 on;
# in int8 always less. With both kept to AVX2 there, fp32: 0.5 at 1 row, 0.73 at 32, 0.94 at 512. Where only the baseline runs
# (ARM, or TEXTOK_ISA), and where oneDNN has bf16 or int8 beside AVX2, it knows more instructions than the kernels do.
NATIVE_UP_TO: dict[str, dict[str, float]] = {
    "avx512": {"fp32": 128, "bf16": 128, "int8": math.inf},
    "avx2": {"fp32": math.inf, "bf16": 0, "int8": 0},
    "baseline": {"fp32": 0, "bf16": 0, "int8": 0},
}
# At most, for bf16 and int8, where oneDNN has AMX: a tile has 16 rows, and up to half of it reading the weights should be what
# takes the time. Not measured yet on such a processor.
NATIVE_UP_TO_BESIDE_AMX = 8

_RULES = {"native": _native_rule, "onednn": _onednn_rule}
register("packed_linear", "native", _native_rule, default=_native_default)
register("packed_linear", "onednn", _onednn_rule)
dispatch.load_backend("onednn")


# -- torch.library -----------------------------------------------------------------------------------------------------------


def _fake_pack(weight: Tensor, kind: int) -> Tensor:
    raise NotImplementedError("packing is done before a model is compiled or exported: the size depends on the processor")


def _fake_linear(
    x: Tensor, packed: Tensor, scales: Tensor | None, bias: Tensor | None, out_features: int, kind: int, activation: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


PACKED_LINEAR = "(Tensor x, Tensor packed, Tensor? scales, Tensor? bias, int out_features, int kind, str activation) -> Tensor"
define("pack_linear", "(Tensor weight, int kind) -> Tensor", _fake_pack)
define("packed_linear", PACKED_LINEAR, _fake_linear)

_onednn_library = torch.library.Library(ONEDNN, "DEF")
_onednn_library.define("packed_linear" + PACKED_LINEAR)
for _key in ("CPU", "MkldnnCPU"):  # a packed weight is a tensor of the second kind
    _onednn_library.impl("packed_linear", _onednn_linear, _key)
torch.library.register_fake(f"{ONEDNN}::packed_linear", _fake_linear, lib=_onednn_library)
