"""Native and Triton operations in ``torch.library``: one definition, two namespaces.

``torch.ops.textok_fast.NAME`` is defined by the C++ library (csrc/), ``torch.ops.textok_fast_triton.NAME`` here, with the same
schema. What holds for both is given once, to :func:`define`: the fake kernel, which tells torch.compile the shapes, and the
derivative. Calling ``torch.ops`` directly skips the checks and the choice of :mod:`textok_fast.ops.dispatch`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from textok_fast import _native
from textok_fast.ops.dispatch import register_backend

NATIVE, TRITON = "textok_fast", "textok_fast_triton"
KERNELS = ("attention", "guided", "linear", "noise", "norm", "patches", "quantize")  # modules of textok_fast.ops.triton_kernels


@dataclass(frozen=True)
class Definition:
    """``backward`` is called with the ``torch.ops`` namespace, the context and the gradients."""

    name: str
    schema: str
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None


_definitions: dict[str, Definition] = {}
_in_native: set[str] = set()  # names of those that the native library has


def _native_capabilities(info: dict[str, str]) -> tuple[frozenset[int], int]:
    """Compute capabilities, 10 * major + minor, that the native library runs on, and one from which on its PTX serves all.

    Machine code serves the later minor versions too, except that of Hopper, which is sm_90a's. ``info["cuda"]`` is such as
    "13.0 (80,90,100,120)", ``info["cuda_ptx"]`` such as "90,120".
    """
    compiled = [int(number) for number in re.findall(r"\d+(?=[,)])", info.get("cuda", ""))]
    served = {later for number in compiled for later in ([90] if number == 90 else range(number, number - number % 10 + 10))}
    return frozenset(served), min(map(int, re.findall(r"\d+", info.get("cuda_ptx", ""))), default=1_000_000)


_NATIVE_CAPABILITIES, _NATIVE_PTX = _native_capabilities(_native.load().info)
_triton_library: list[torch.library.Library] = []  # keeps what was registered alive


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Declares an operation, such as ``define("f", "(Tensor x, float eps) -> Tensor", fake)``.

    Args:
        fake: same arguments; returns empty tensors of the right shape, dtype and strides.
        setup_context: ``(ctx, inputs, output)``, as torch.library.register_autograd has it.
        backward: ``(library, ctx, *gradients)``, where ``library`` is the namespace the forward came from.
    """
    _definitions[name] = definition = Definition(name, schema, fake, setup_context, backward)
    if _native.load().available and hasattr(torch.ops.textok_fast, name):
        _in_native.add(name)
        _attach(NATIVE, definition)


def refuse_second_derivative(namespace: Any, ctx: Any, *grads: Any) -> Any:
    """The derivative of a derivative's kernel: there is none, and without this it would be zero without a word."""
    raise RuntimeError("fused operations cannot be differentiated twice; use textok_fast.ops.use_backend('reference')")


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The ``setup_context`` that goes with :func:`refuse_second_derivative`."""


def implement_triton(name: str, function: Callable[..., Any]) -> None:
    """``function`` launches the Triton kernels of an operation that was declared; called by textok_fast.ops.triton_kernels."""
    if not _triton_library:
        _triton_library.append(torch.library.Library(TRITON, "DEF"))
    library, definition = _triton_library[0], _definitions[name]
    library.define(name + definition.schema)
    library.impl(name, function, "CUDA")
    library.impl(name, function, "CPU")  # interpreted
    _attach(TRITON, definition)


def _attach(namespace: str, definition: Definition) -> None:
    qualified = f"{namespace}::{definition.name}"
    torch.library.register_fake(qualified, definition.fake)
    if definition.backward is not None:
        backward = functools.partial(definition.backward, getattr(torch.ops, namespace))
        torch.library.register_autograd(qualified, backward, setup_context=definition.setup_context)


def library(backend: str) -> Any:
    """The ``torch.ops`` namespace of the backend "native" or "triton"."""
    return torch.ops.textok_fast if backend == "native" else torch.ops.textok_fast_triton


def has_native(name: str) -> bool:
    """Whether the native library is loaded and has this operation (one left by an older build may lack it)."""
    return name in _in_native


def has_native_cuda() -> bool:
    """Whether the native library is loaded and was built with its CUDA part."""
    return bool(_NATIVE_CAPABILITIES)


def native_runs_on(x: Tensor) -> str:
    """Why the native library has no code for the device of ``x``, or ""."""
    if x.is_cpu:
        return ""
    if not x.is_cuda or not _NATIVE_CAPABILITIES:
        return f"it has no code for {x.device.type}"
    properties = torch.cuda.get_device_properties(x.device)  # a constant to torch.compile
    capability = 10 * properties.major + properties.minor
    if capability in _NATIVE_CAPABILITIES or capability >= _NATIVE_PTX:
        return ""
    return f"it was not compiled for GPUs of compute capability {properties.major}.{properties.minor}"


def triton_runs_on(x: Tensor) -> str:
    """Why the Triton kernels do not run on the device of ``x``, or ""."""
    if x.is_cpu and interpreting():
        return ""
    if not x.is_cuda:
        return f"no Triton on {x.device.type}"
    major = torch.cuda.get_device_properties(x.device).major
    return "" if major >= 8 else f"its kernels need compute capability 8.0, this GPU has {major}.x"


def interpreting() -> bool:
    """Whether Triton's interpreter was switched on, which runs kernels on the CPU, slowly, to check their numbers."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def load_native() -> str:
    """Loader of the backend "native"."""
    status = _native.load()
    return "" if status.available else status.reason


def load_triton() -> str:
    """Loader of the backend "triton": imports the kernels, where Triton is installed and something can run them."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'textok-fast[gpu]'"
    if not torch.cuda.is_available() and not interpreting():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    if not interpreting() and not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "Triton needs a C compiler to launch kernels, and none is on PATH"
    try:
        for module in KERNELS:
            import_module(f"textok_fast.ops.triton_kernels.{module}")
    except Exception as error:  # a Triton that is too old, or broken, must not keep the references from working
        return f"its kernels cannot be imported: {' '.join(str(error).split()) or type(error).__name__}"
    return ""


register_backend("native", load_native)
register_backend("triton", load_triton)
