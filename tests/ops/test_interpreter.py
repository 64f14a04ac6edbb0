"""Casts and products in Triton kernels, as interpreted by tests/ops/interpreter.py or on the GPU, against their definitions."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
import interpreter  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU here")
needs_e4m3 = pytest.mark.skipif(
    not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="compute capability 8.9 converts to e4m3",
)


@triton.jit
def _cast(x_ptr: Any, out_ptr: Any, size: Any, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _dot(a_ptr: Any, b_ptr: Any, out_ptr: Any, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr) -> None:
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, out_dtype=tl.float32))


@triton.jit
def _arithmetic(x_ptr: Any, y_ptr: Any, out_ptr: Any, BLOCK: tl.constexpr) -> None:
    at = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, tl.where(x < y, x + y, x * y))


@triton.jit
def _sum(x_ptr: Any, out_ptr: Any, BLOCK: tl.constexpr) -> None:
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


@triton.jit
def _loop(out_ptr: Any, count: Any) -> None:
    total = 0
    for i in range(count):
        total += i
    tl.store(out_ptr, total)


def cast(x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """In a kernel."""
    out = torch.empty(x.shape, dtype=dtype, device=device)
    block = 65536 if INTERPRETED else 1024
    _cast[(triton.cdiv(x.numel(), block),)](x.to(device), out, x.numel(), BLOCK=block)
    return out.cpu()


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, signs of zeros included; any NaN for any NaN."""
    assert a.dtype == b.dtype
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.view(bits) == b.view(bits)
    return bool((equal | (a.float().isnan() & b.float().isnan())).all())


def every_bf16() -> Tensor:
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def every_e4m3() -> Tensor:
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)


def around_every_bf16() -> Tensor:
    """float32: each bf16 number, and behind it the numbers that decide the rounding. (393,216,)"""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int64)
    high = torch.arange(65536, dtype=torch.int64) << 16
    bits = (high[:, None] | low).flatten()
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def around_every_e4m3() -> Tensor:
    """float32: each finite e4m3 number, the middle to the next, and the neighbours of both; a dense grid; large ones."""
    positive = every_e4m3()[:127].float()
    exact = torch.cat([positive, (positive[1:] + positive[:-1]) / 2, torch.tensor([464.0, 480.0, 512.0, 1e30, torch.inf])])
    near = torch.cat([exact, torch.nextafter(exact, torch.tensor(torch.inf)), torch.nextafter(exact, torch.tensor(-torch.inf))])
    grid = torch.cat([torch.linspace(0, 500, 100_001), torch.logspace(-12, 2.7, 20_001)])
    return torch.cat([near, -near, grid, -grid, torch.tensor([torch.nan])])


def nearest_e4m3(x: Tensor) -> Tensor:
    """By its definition: the nearest of the 127 magnitudes, of two equally near the one with an even pattern; saturating."""
    table = np.array([m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127])
    magnitude = np.minimum(np.abs(x.double().numpy()), 448.0)
    above = np.minimum(np.searchsorted(table, magnitude), 126)
    below = np.maximum(above - 1, 0)
    up, down = table[above] - magnitude, magnitude - table[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    code = np.where(np.isnan(magnitude), 127, code) | np.where(np.signbit(x.numpy()), 128, 0)
    return torch.from_numpy(code.astype(np.uint8)).view(torch.float8_e4m3fn)


def test_bf16_widens_exactly(device: torch.device) -> None:
    assert same(cast(every_bf16(), torch.float32, device), every_bf16().float())


def test_bf16_rounds_to_nearest_even(device: torch.device) -> None:
    x = around_every_bf16()
    assert same(cast(x, torch.bfloat16, device), x.to(torch.bfloat16))


@pytest.mark.parametrize("source", [torch.float64, torch.float16, torch.int32])
def test_other_types_to_bf16(source: torch.dtype, device: torch.device) -> None:
    x = torch.arange(-(2**15), 2**15, 7).to(torch.int16)
    given = x.view(torch.float16) if source == torch.float16 else x.to(source) * 3
    assert same(cast(given, torch.bfloat16, device), given.to(torch.bfloat16))


def test_bf16_to_other_types(device: torch.device) -> None:
    assert same(cast(every_bf16(), torch.float16, device), every_bf16().to(torch.float16))
    small = torch.linspace(-1000, 1000, 501).to(torch.bfloat16)
    assert torch.equal(cast(small, torch.int32, device), small.to(torch.int32))


@needs_e4m3
def test_e4m3_widens_exactly(device: torch.device) -> None:
    assert same(cast(every_e4m3(), torch.float32, device), every_e4m3().float())


@needs_e4m3
def test_e4m3_rounds_to_nearest_even_and_saturates(device: torch.device) -> None:
    for x in (around_every_e4m3(), every_bf16().float()):
        found = cast(x, torch.float8_e4m3fn, device)
        assert same(found, nearest_e4m3(x))
        assert same(found, x.clamp(-448, 448).to(torch.float8_e4m3fn))


@needs_e4m3
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_every_half_to_e4m3(source: torch.dtype, device: torch.device) -> None:
    x = every_bf16().view(torch.int16).view(source)
    assert same(cast(x, torch.float8_e4m3fn, device), nearest_e4m3(x.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, pytest.param(torch.float8_e4m3fn, marks=needs_e4m3)])
def test_dot_multiplies_widened_operands(dtype: torch.dtype, device: torch.device) -> None:
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype)
    out = torch.empty(32, 16, device=device)
    _dot[(1,)](a.to(device), b.to(device), out, M=32, N=16, K=64)
    # An e4m3 product on Hopper keeps its sums in fewer bits.
    tolerance = 1e-5 if INTERPRETED or dtype != torch.float8_e4m3fn else 1e-2
    torch.testing.assert_close(out.cpu().double(), a.double() @ b.double(), rtol=0, atol=tolerance)


@needs_interpreter
def test_arithmetic_of_bf16_is_rounded_arithmetic() -> None:
    x, y, out = torch.randn(256).bfloat16(), torch.randn(256).bfloat16(), torch.empty(256, dtype=torch.bfloat16)
    _arithmetic[(1,)](x, y, out, BLOCK=256)
    assert torch.equal(out, torch.where(x < y, x + y, x * y))
    with pytest.raises(Exception, match=r"tl\.sum of .*bf16.* is not interpreted"):
        _sum[(1,)](x, out, BLOCK=256)


def test_a_loop_whose_bound_is_an_argument(device: torch.device) -> None:
    out = torch.zeros(1, dtype=torch.int32, device=device)
    _loop[(1,)](out, 7)
    assert out.item() == 21


@needs_interpreter
@pytest.mark.parametrize("path", list(interpreter.KNOWN))
def test_an_unknown_interpreter_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the repair silently not applied, the tests of kernels would hold them to wrong numbers."""
    from triton.runtime import interpreter as shipped

    *owner, name = path.split(".")
    holder = getattr(shipped, owner[0]) if owner else shipped
    monkeypatch.delattr(holder, name)
    with pytest.raises(RuntimeError, match=rf"interpreter\.{path} is not what .* \(missing\)"):
        interpreter.check_known()
    if interpreter.KNOWN[path] is not None:
        monkeypatch.setattr(holder, name, lambda other: None, raising=False)
        with pytest.raises(RuntimeError, match=rf"interpreter\.{path} is not what .* \(parameters \('other',\), known"):
            interpreter.check_known()


@needs_interpreter
def test_repair_ends() -> None:
    from triton.runtime import interpreter as shipped

    def replaced() -> list[Callable[..., Any]]:
        builder = shipped.InterpreterBuilder
        return [shipped._convert_float, builder.cast_impl, builder.create_dot, builder.binary_op, shipped.ReduceOps.sum]

    before = replaced()
    assert all("interpreter.py" in str(inspect.getsourcefile(function)) for function in before)
    with interpreter.repaired():
        assert not set(before) & set(replaced())
    assert replaced() == before
