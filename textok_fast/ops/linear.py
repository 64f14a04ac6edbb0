"""Linear layers with what follows them: GELU in the epilogue, and FP8 products with bias, GELU and an FP8 result.

``linear_gelu``: ``cublaslt`` (tanh GELU in cuBLASLt's epilogue), ``triton``, ``reference``.
``fp8_linear``: ``scaled_mm`` (torch's product with row-wise scales), ``triton``, ``reference``; see :func:`fp8_choice`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.ops.dispatch import REFERENCE, choose, describe, needs_gradient, one_device, register, without_autocast
from textok_fast.ops.fp8 import MAX_COLUMNS, RowScaled, lacks_e4m3, quantize_rows, quantize_rows_reference
from textok_fast.ops.library import define, library, triton_runs_on

APPROXIMATIONS = ("none", "tanh")
ACTIVATIONS = ("none", "gelu", "gelu_tanh")
HALF = (torch.bfloat16, torch.float16)

# torch 2.11 takes one scale a tensor there.
CPU_SCALED_MM = torch.__version__ >= "2.13"

# Up to so many rows a product is bound by reading the weights, and the Triton version is split along ``in``.
SKINNY_ROWS = 128
TRITON_FP8_ROWS = 512
# The products (in, out) of DiT-XL's and of ViT-Base's blocks, and numbers of rows: what the choices are measured on.
PRODUCTS = (
    *((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152)),
    *((768, 2304), (768, 768), (768, 3072), (3072, 768)),
)
PRODUCT_ROWS = (32, 64, 128, 512, 2048, 8192)

# -- references --------------------------------------------------------------------------------------------------------------


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """:func:`linear_gelu` in PyTorch."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def fp8_linear_reference(
    x: RowScaled,
    weight: RowScaled,
    bias: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """:func:`fp8_linear` in PyTorch: everything in float32 (float64 for ``dtype`` float64), then rounded to ``dtype``."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    with without_autocast(x.values):
        product = F.linear(x.values.to(compute), weight.values.to(compute))  # (..., out)
    out = product * x.scales.to(compute).unsqueeze(-1) * weight.scales.to(compute)
    if bias is not None:
        out = out + bias.to(compute)
    return _activate(out, activation).to(dtype)


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return x
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


# -- public functions --------------------------------------------------------------------------------------------------------


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """GELU(x weight^T + bias) (Hendrycks & Gimpel 2016), the first half of a transformer's MLP.

    The reference rounds the product to ``x``'s dtype before the GELU and keeps it for the backward pass; the kernels apply the
    GELU to the unrounded sums, and the Triton version's backward pass computes the product again.

    Args:
        x: (..., in), float.
        weight: (out, in); bias: (out,) or None.
        approximate: "none" for the exact GELU, "tanh" for its approximation, as ``torch.nn.functional.gelu`` has them.

    Returns: (..., out), in ``x``'s dtype, or autocast's.
    Raises: InputError for shapes that do not belong together and an unknown ``approximate``.
    """
    if approximate not in APPROXIMATIONS:
        raise InputError(f"approximate must be one of {APPROXIMATIONS}, got {approximate!r}")
    _check(x, weight, bias)
    backend = choose("linear_gelu", x, weight, bias, approximate)
    if backend == REFERENCE:
        return linear_gelu_reference(x, weight, bias, approximate)
    if backend == "cublaslt":
        flat = x.reshape(-1, x.shape[-1])  # (M, in)
        out = torch.ops.aten._addmm_activation(bias, flat, weight.t(), use_gelu=True)  # (M, out)
        return out.reshape(*x.shape[:-1], weight.shape[0])
    return library(backend).linear_gelu(x, weight, bias, approximate)


@overload
def fp8_linear(
    x: RowScaled | Tensor,
    weight: RowScaled,
    bias: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    *,
    fp8: Literal[False] = False,
) -> Tensor: ...
@overload
def fp8_linear(
    x: RowScaled | Tensor,
    weight: RowScaled,
    bias: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    *,
    fp8: Literal[True],
) -> RowScaled: ...
def fp8_linear(
    x: RowScaled | Tensor,
    weight: RowScaled,
    bias: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    *,
    fp8: bool = False,
) -> Tensor | RowScaled:
    """activation(x weight^T + bias) in e4m3, with a scale for each row of x and each channel of the weight. Without gradient.

    Sums are float32, of which Hopper's tensor cores keep about 14 bits while they add. ``scaled_mm`` rounds to bfloat16 before
    the activation, as a bfloat16 linear layer does. An FP8 result is quantized from the activation's float32 values, except
    that above 128 rows the Triton version rounds them to bfloat16 first, to store half as much: 2 % of the e4m3 numbers then
    come out as a neighbour of the reference's.

    Args:
        x: (..., in), from :func:`quantize_rows` or a fused LayerNorm; a float tensor is quantized first.
        weight: (out, in), from :func:`quantize_channels`.
        bias: (out,), float, or None.
        activation: "none", "gelu" (exact) or "gelu_tanh".
        dtype: of the result: bfloat16, float16, float32; float64 makes the reference compute in float64, to check against.
        fp8: return the result quantized row by row, for the next product; ``dtype`` is then not used.

    Returns: (..., out) in ``dtype``; with ``fp8`` :class:`RowScaled` of (..., out) and (...).
    Raises: InputError for shapes that do not belong together, other dtypes, and an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if dtype not in (*HALF, torch.float32, torch.float64):
        raise InputError(f"dtype must be bfloat16, float16, float32 or float64, got {dtype}")
    if not isinstance(weight, RowScaled):
        raise InputError(f"weight must come from quantize_channels, got {type(weight).__name__}")
    if isinstance(x, Tensor):
        x = quantize_rows(x)
    _check(x.values, weight.values, bias)
    _check_scales(x, weight)
    bias = None if bias is None else bias.detach()
    inputs = (x.values, x.scales, weight.values, weight.scales, bias, activation)
    if fp8:
        backend = choose("fp8_linear_fp8", *inputs)
        if backend == REFERENCE:
            return quantize_rows_reference(fp8_linear_reference(x, weight, bias, activation, torch.float32))
        if backend == "scaled_mm":
            return _activate_and_quantize_rows(_scaled_mm(x, weight, bias), activation)
        return RowScaled(*library(backend).fp8_linear_fp8(*inputs))
    backend = choose("fp8_linear", *inputs, dtype)
    if backend == REFERENCE:
        return fp8_linear_reference(x, weight, bias, activation, dtype)
    if backend == "scaled_mm":
        return _activate(_scaled_mm(x, weight, bias), activation)
    return library(backend).fp8_linear(*inputs, dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or not weight.shape[1]:
        raise InputError(f"weight must be (out, in), in at least 1, got {tuple(weight.shape)}")
    if not x.ndim or x.shape[-1] != weight.shape[1]:
        raise InputError(f"x must be (..., in) = (..., {weight.shape[1]}), got {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias must be (out,) = ({weight.shape[0]},), got {tuple(bias.shape)}")


def _check_scales(x: RowScaled, weight: RowScaled) -> None:
    for name, scaled in (("x", x), ("weight", weight)):
        if scaled.values.dtype != torch.float8_e4m3fn or scaled.scales.dtype != torch.float32:
            raise InputError(
                f"{name} must be e4m3 with float32 scales, from quantize_rows or quantize_channels,"
                f" got {scaled.values.dtype} with {scaled.scales.dtype}"
            )
        if scaled.scales.shape != scaled.values.shape[:-1]:
            raise InputError(
                f"{name} needs one scale a row, {tuple(scaled.values.shape[:-1])}, got {tuple(scaled.scales.shape)}"
            )


def _scaled_mm(x: RowScaled, weight: RowScaled, bias: Tensor | None) -> Tensor:
    """(..., out) bfloat16, the bias added before the rounding."""
    out = torch._scaled_mm(
        x.values.reshape(-1, x.values.shape[-1]).contiguous(),  # (M, in)
        weight.values.contiguous().t(),  # (in, out), column-major as it must be
        scale_a=x.scales.reshape(-1, 1).contiguous(),  # (M, 1)
        scale_b=weight.scales.reshape(1, -1).contiguous(),  # (1, out)
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # (M, out)
    return out.reshape(*x.values.shape[:-1], weight.values.shape[0])


def _activate_and_quantize_rows(x: Tensor, activation: str) -> RowScaled:
    """What follows an unfused product with an FP8 result, in one pass; the activation's result stays in float32."""
    backend = choose("activate_quantize_rows", x, activation)
    if backend == REFERENCE:
        return quantize_rows_reference(_activate(x.float(), activation))
    return RowScaled(*library(backend).activate_quantize_rows(x, activation))


# -- choice ------------------------------------------------------------------------------------------------------------------


def fp8_choice(rows: int, inputs: int, outputs: int) -> Literal["scaled_mm", "triton"]:
    """Which backend multiplies (rows, inputs) by (outputs, inputs) on a GPU that has both.

    By whole steps of DiT-XL on an H200, ms with scaled_mm and triton: 1.62 and 1.32 over 64 rows, 2.03 and 1.89 over 512, 7.55
    and 8.80 over 4,096 (benchmarks/results/step-choices-h200-2026-11-27.json). Where between the last two they cross was not
    measured.
    """
    return "triton" if rows <= TRITON_FP8_ROWS else "scaled_mm"


def _autocast_rule(x: Tensor) -> str:
    """Custom operations do not see autocast: refuse where it would convert."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device):
        return f"autocast would convert {x.dtype} to {torch.get_autocast_dtype(device)}"
    return ""


def _same_dtype_rule(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    if x.dtype not in (*HALF, torch.float32):
        return f"it takes float32, bfloat16 and float16, got {describe(x)}"
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"x, weight and bias must be of one dtype, got {describe(x)}, {describe(weight)}" + (
            "" if bias is None else f", {describe(bias)}"
        )
    return "" if one_device(x, weight, bias) else "the tensors lie on different devices"


def _cublaslt_rule(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> str:
    # aten::_addmm_activation has the tanh GELU on CUDA (in cuBLASLt's epilogue, or after the product for shapes that it does
    # not take, such as a single row) and the exact one on a CPU, and no derivative.
    if not x.is_cuda:
        return f"no cuBLASLt on {x.device.type}"
    if approximate != "tanh":
        return "cuBLASLt's GELU is the tanh approximation"
    if bias is None:
        return "cuBLASLt's GELU comes with a bias"
    if needs_gradient(x, weight, bias):
        return "it has no gradient"
    return _same_dtype_rule(x, weight, bias) or _autocast_rule(x)


def _triton_rule(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> str:
    if reason := triton_runs_on(x):
        return reason
    return _same_dtype_rule(x, weight, bias) or _autocast_rule(x)


def _triton_default(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> str:
    # A DiT-XL step as a CUDA graph on an H200, ms with cublaslt, reference, triton: 1.07, 1.13, 1.16 over 64 rows, 1.53, 1.62,
    # 1.70 over 512, 7.15, 7.61, 7.77 over 4,096 (benchmarks/results/step-choices-h200-2026-11-27.json).
    return "cuBLAS and a GELU of its own were faster at every size measured"


def _fp8_rule(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    if dtype == torch.float64:
        return "float64 is the reference's"
    return "" if one_device(x, x_scale, weight, weight_scale, bias) else "the tensors lie on different devices"


def _scaled_mm_rule(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    if not (x.is_cuda or x.is_cpu):
        return f"no torch._scaled_mm on {x.device.type}"
    if dtype != torch.bfloat16 or (bias is not None and bias.dtype != torch.bfloat16):
        return "with row-wise scales its result and its bias are bfloat16"
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return f"in and out must be multiples of 16, got a weight {tuple(weight.shape)}"
    if x.is_cuda and (reason := lacks_e4m3(x)):
        return reason
    if x.is_cpu and not CPU_SCALED_MM:
        return "on a CPU it takes row-wise scales from torch 2.13 on"
    return _fp8_rule(x, x_scale, weight, weight_scale, bias, activation, dtype)


def _scaled_mm_default(x: Tensor, x_scale: Tensor, weight: Tensor, *others: Any) -> str:
    if not x.is_cuda:
        return "on a CPU the reference is as fast"
    outputs, inputs = weight.shape
    return "" if fp8_choice(math.prod(x.shape[:-1]), inputs, outputs) == "scaled_mm" else "the Triton version is chosen here"


def _triton_fp8_rule(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    return lacks_e4m3(x) or _fp8_rule(x, x_scale, weight, weight_scale, bias, activation, dtype)


def _triton_fp8_to_fp8_rule(x: Tensor, x_scale: Tensor, weight: Tensor, *others: Any) -> str:
    if weight.shape[0] > MAX_COLUMNS:
        return f"a row of the result must fit one program, out <= {MAX_COLUMNS:,}, got {weight.shape[0]}"
    return _triton_fp8_rule(x, x_scale, weight, *others)


def _triton_activate_rule(x: Tensor, activation: str) -> str:
    if x.shape[-1] > MAX_COLUMNS:
        return f"a row must fit one program, at most {MAX_COLUMNS:,} columns, got {x.shape[-1]}"
    return lacks_e4m3(x)


def _on_gpu(x: Tensor, *others: Any) -> str:
    return "" if x.is_cuda else "interpreted kernels only check numbers"


register("linear_gelu", "cublaslt", _cublaslt_rule)
register("linear_gelu", "triton", _triton_rule, default=_triton_default)
for _name, _rule in (("fp8_linear", _triton_fp8_rule), ("fp8_linear_fp8", _triton_fp8_to_fp8_rule)):
    register(_name, "scaled_mm", _scaled_mm_rule, default=_scaled_mm_default)
    register(_name, "triton", _rule, default=_on_gpu)
register("activate_quantize_rows", "triton", _triton_activate_rule, default=_on_gpu)


# -- torch.library -----------------------------------------------------------------------------------------------------------


def _fake_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(namespace: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    hidden = F.linear(x, weight, bias)  # (..., out)
    grad = torch.ops.aten.gelu_backward(grad, hidden, approximate=ctx.approximate).reshape(-1, weight.shape[0])  # (M, out)
    for_x, for_weight, for_bias, _ = ctx.needs_input_grad
    return (
        (grad @ weight).reshape(x.shape) if for_x else None,
        grad.t() @ x.reshape(-1, x.shape[-1]) if for_weight else None,
        grad.sum(dim=0) if for_bias else None,
        None,
    )


def _fake_fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _fake_fp8_linear_fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x_scale.new_empty(x.shape[:-1])


def _fake_activate_quantize_rows(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


define(
    "linear_gelu",
    "(Tensor x, Tensor weight, Tensor? bias, str approximate) -> Tensor",
    _fake_linear_gelu,
    _save,
    _backward,
)
define(
    "fp8_linear",
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str activation, ScalarType dtype) -> Tensor",
    _fake_fp8_linear,
)
define(
    "fp8_linear_fp8",
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str activation) -> (Tensor, Tensor)",
    _fake_fp8_linear_fp8,
)
define("activate_quantize_rows", "(Tensor x, str activation) -> (Tensor, Tensor)", _fake_activate_quantize_rows)
