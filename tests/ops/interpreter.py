"""Triton's interpreter with bf16 and e4m3 as GPUs have them.

As shipped (3.6 to 3.9), casts to bf16 cut off instead of rounding, casts to e4m3 are wrong just below powers of two and do not
saturate, casts from integers and float64 to bf16 keep garbage, and bf16 arithmetic and ``tl.dot`` work on the bit patterns.
:func:`repaired` replaces the functions of ``triton.runtime.interpreter`` that all of these go through, and refuses a Triton in
which it does not find them as it knows them. It also halves the time: as shipped, triton.language is patched anew for each call
of a ``@triton.jit`` function in a kernel. What a GPU does and this does not: tf32 products, fused multiply-add, approximate
functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

E4M3_MAX = 448.0
# What is replaced, with the parameters it must have. None: it need only be there.
KNOWN: dict[str, tuple[str, ...] | None] = {
    "_convert_float": ("input", "input_dtype", "output_dtype", "rounding_mode"),
    "_patch_lang": ("fn",),
    "_patch_lang_tensor": ("tensor", "scope"),
    "_LangPatchScope.restore": ("self",),
    "InterpreterBuilder.cast_impl": ("self", "src", "dst_type"),
    "InterpreterBuilder.create_fp_to_fp": ("self", "src", "dst_type", "rounding_mode"),
    "InterpreterBuilder.create_dot": ("self", "a", "b", "d", "input_precision", "max_num_imprecise_acc"),
    "InterpreterBuilder.binary_op": ("self", "lhs", "rhs", "op"),
    "InterpreterBuilder.unary_op": ("self", "arg", "op"),
    "ReduceOps.sum": ("self", "input"),
    "TensorHandle": None,
}


def check_known() -> None:
    """Raises RuntimeError when this Triton's interpreter is not one that :func:`repaired` can repair."""
    import triton
    from triton.runtime import interpreter

    for path, parameters in KNOWN.items():
        found: Any = interpreter
        for name in path.split("."):
            found = getattr(found, name, None)
        have = None if found is None or parameters is None else tuple(inspect.signature(found).parameters)
        if found is None or have != parameters:
            raise RuntimeError(
                f"Triton {triton.__version__}: triton.runtime.interpreter.{path} is not what tests/ops/interpreter.py replaces"
                f" ({'missing' if found is None else f'parameters {have}, known {parameters}'}); adapt it to this version"
            )


def decode_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 patterns -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode_bf16(values: np.ndarray) -> np.ndarray:
    """float -> uint16 patterns, rounded to nearest even."""
    given = torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: torch refuses read-only arrays
    return given.to(torch.bfloat16).view(torch.uint16).numpy()


def decode_e4m3(bits: np.ndarray) -> np.ndarray:
    """uint8 patterns -> float32, exactly."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()[bits]


def encode_e4m3(values: np.ndarray) -> np.ndarray:
    """float -> uint8 patterns, rounded to nearest even, larger ones and infinity to ±448 (PTX cvt.rn.satfinite), NaN to NaN."""
    given = torch.from_numpy(np.array(values, dtype=np.float32)).clamp(-E4M3_MAX, E4M3_MAX)
    return given.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


@contextmanager
def repaired() -> Iterator[None]:
    """Repairs the interpreter of the installed Triton, which must have been imported with TRITON_INTERPRET=1."""
    check_known()
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    decoders: dict[Any, Callable[[np.ndarray], np.ndarray]] = {tl.bfloat16: decode_bf16, tl.float8e4nv: decode_e4m3}
    encoders: dict[Any, Callable[[np.ndarray], np.ndarray]] = {tl.bfloat16: encode_bf16, tl.float8e4nv: encode_e4m3}
    shipped_convert, shipped_patch_lang = interpreter._convert_float, interpreter._patch_lang
    shipped_patch_tensor = interpreter._patch_lang_tensor
    shipped_cast, shipped_dot, shipped_sum = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, ReduceOps.sum
    shipped_binary, shipped_unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def decode(handle: Any) -> np.ndarray:
        """Numbers of a tensor: bf16 and e4m3 as float32, all others as they are."""
        decoder = decoders.get(handle.dtype.scalar)
        return handle.data if decoder is None else decoder(handle.data)

    def convert(handle: Any, dtype: Any) -> np.ndarray:
        """Its numbers as the numpy representation of a scalar Triton dtype."""
        values = decode(handle)
        if dtype in encoders:
            return encoders[dtype](values)
        with np.errstate(over="ignore"):  # float16 has infinities too
            return values.astype(interpreter._get_np_dtype(dtype))

    def convert_float(input: np.ndarray, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> np.ndarray:
        toward_zero = rounding_mode is not None and rounding_mode != interpreter._ir.ROUNDING_MODE.RTNE
        if toward_zero or not {input_dtype, output_dtype} & set(encoders):
            return shipped_convert(input, input_dtype, output_dtype, rounding_mode)
        converted = convert(TensorHandle(input.view(interpreter._get_np_dtype(input_dtype)), input_dtype), output_dtype)
        return converted.view(getattr(np, f"uint{output_dtype.primitive_bitwidth}"))

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if {src.dtype.scalar, dst_type.scalar} & set(encoders):
            return TensorHandle(convert(src, dst_type.scalar), dst_type.scalar)
        return shipped_cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        data = convert_float(src.data, src.dtype.scalar, dst_type.scalar, rounding_mode)
        return TensorHandle(data.view(interpreter._get_np_dtype(dst_type.scalar)), dst_type.scalar)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if d.dtype.scalar == tl.float32 and all(x.dtype.scalar in (*decoders, tl.float16, tl.float32) for x in (a, b)):
            product = np.matmul(decode(a).astype(np.float32), decode(b).astype(np.float32))
            return TensorHandle(product + d.data, tl.float32)
        if {a.dtype.scalar, b.dtype.scalar, d.dtype.scalar} & set(decoders):
            raise TypeError(f"tl.dot of {a.dtype} and {b.dtype} into {d.dtype} is not interpreted: accumulate in float32")
        return shipped_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        dtype = lhs.dtype.scalar
        with np.errstate(all="ignore"):  # a GPU warns of nothing
            if dtype not in decoders:
                return shipped_binary(self, lhs, rhs, op)
            result = op(decode(lhs), decode(rhs))
        return TensorHandle(result if result.dtype == np.bool_ else encoders[dtype](result), dtype)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        dtype = arg.dtype.scalar
        if dtype not in decoders:
            return shipped_unary(self, arg, op)
        return TensorHandle(encoders[dtype](op(decode(arg))), dtype)

    def reduce_sum(self: Any, input: Any) -> Any:
        if input.dtype.scalar in decoders:
            raise TypeError(f"tl.sum of {input.dtype} is not interpreted: widen to float32 first")
        return shipped_sum(self, input)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        shipped_patch_tensor(tensor, scope)
        # Triton 3.6 turns an array of one element into an int, which NumPy 2.4 refuses: a loop's bound.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    running: list[Any] = []  # the scope of the kernel that runs

    def patch_lang(fn: Any) -> Any:
        if running:
            return interpreter._LangPatchScope()  # a function in a kernel, for which all is patched
        scope = shipped_patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        running.append(scope)
        restore = scope.restore

        def restore_at_the_end() -> None:
            running.clear()
            restore()

        scope.restore = restore_at_the_end
        return scope

    replacements = {
        "_convert_float": convert_float,
        "_patch_lang": patch_lang,
        "_patch_lang_tensor": patch_lang_tensor,
        "InterpreterBuilder.cast_impl": cast_impl,
        "InterpreterBuilder.create_fp_to_fp": create_fp_to_fp,
        "InterpreterBuilder.create_dot": create_dot,
        "InterpreterBuilder.binary_op": binary_op,
        "InterpreterBuilder.unary_op": unary_op,
        "ReduceOps.sum": reduce_sum,
    }
    patches = [mock.patch(f"triton.runtime.interpreter.{path}", function) for path, function in replacements.items()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
