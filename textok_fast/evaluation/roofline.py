"""What this machine can do at most, measured: the yardstick every speed is told against."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from textok_fast.errors import InputError
from textok_fast.ops.device import resolve_device

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# (rows, inner, columns) of x @ W^T. Squares, and the first MLP product of DiT-XL over 1,024 tokens.
CPU_SHAPES = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (1024, 1152, 4608))
CUDA_SHAPES = ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (8192, 1152, 4608))
CPU_COPY_BYTES = 256 * 2**20  # well above the caches of a CPU
CUDA_COPY_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Ceilings:
    """The best rates seen on this device in this dtype with this many threads.

    ``matmul_flops``: FLOP/s of the fastest torch matrix product (1 multiply-add = 2 FLOP), at ``matmul_shape`` (rows,
    inner, columns). ``read_bytes``: bytes/s read by a sum over a large tensor. ``copy_bytes``: bytes/s of a large
    copy, bytes read plus bytes written.
    """

    device: str
    dtype: str
    threads: int
    matmul_flops: float
    matmul_shape: tuple[int, int, int]
    read_bytes: float
    copy_bytes: float

    def better(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements of the same device, dtype and threads, rate by rate."""
        best = self if self.matmul_flops >= other.matmul_flops else other
        return dataclasses.replace(
            best,
            read_bytes=max(self.read_bytes, other.read_bytes),
            copy_bytes=max(self.copy_bytes, other.copy_bytes),
        )

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "matmul_shape": list(self.matmul_shape)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ceilings:
        return cls(**{**values, "matmul_shape": tuple(values["matmul_shape"])})


def measure_ceilings(
    device: str | torch.device = "cpu",
    dtype: str = "fp32",
    threads: int | None = None,
    shapes: tuple[tuple[int, int, int], ...] | None = None,
    copy_size: int | None = None,
    seconds: float = 0.4,
) -> Ceilings:
    """Measures :class:`Ceilings` of one device and dtype, each rate as the best repetition within about ``seconds``.

    ``dtype``: of :data:`DTYPES`, or "int8" on a CPU and "fp8" on CUDA: the products with 8-bit weights and activations.
    ``shapes``: (rows, inner, columns) of the products to try; ``copy_size``: bytes of the tensor that is read and copied.
    Raises :class:`InputError` for an unknown dtype or a device that is not there.
    """
    device = resolve_device(device)
    on_cuda = device.type == "cuda"
    shapes = shapes or (CUDA_SHAPES if on_cuda else CPU_SHAPES)
    copy_size = copy_size or (CUDA_COPY_BYTES if on_cuda else CPU_COPY_BYTES)
    with use_threads(threads), torch.inference_mode():
        rates = {}
        for rows, inner, columns in shapes:
            product = _product(rows, inner, columns, device, dtype)
            rates[rows, inner, columns] = 2 * rows * inner * columns / _best_seconds(product, device, seconds)
        best = max(rates, key=lambda shape: rates[shape])
        source = torch.zeros(max(1, copy_size // 4), device=device)
        source.fill_(1.0)  # touches every page; zero pages may be one shared page
        target = torch.empty_like(source).fill_(0.0)
        size = source.numel() * source.element_size()
        read = size / _best_seconds(lambda: source.sum(), device, seconds)
        copy = 2 * size / _best_seconds(lambda: target.copy_(source), device, seconds)
        return Ceilings(str(device), dtype, torch.get_num_threads(), rates[best], best, read, copy)


def _product(rows: int, inner: int, columns: int, device: torch.device, dtype: str) -> Callable[[], torch.Tensor]:
    """x (rows, inner) @ weight^T (inner, columns), as torch has it in this dtype."""
    if dtype == "int8" and device.type == "cpu":
        return _int8_product(rows, inner, columns)
    if dtype == "fp8" and device.type == "cuda":
        x, weight = (torch.randn(size, inner, device=device).to(torch.float8_e4m3fn) for size in (rows, columns))
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.bfloat16)
    kind = torch_dtype(dtype)
    x = torch.randn(rows, inner, device=device, dtype=kind)
    weight = torch.randn(columns, inner, device=device, dtype=kind)
    return lambda: torch.nn.functional.linear(x, weight)


def _int8_product(rows: int, inner: int, columns: int) -> Callable[[], torch.Tensor]:
    """oneDNN's product of bytes and int8 weights with float32 results."""
    x = torch.randint(0, 256, (rows, inner), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (columns, inner), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [rows, inner])
    scales, zeros = torch.ones(columns), torch.zeros(columns, dtype=torch.int64)
    options: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "none")  # of the result; what follows the product
    return lambda: torch.ops.onednn.qlinear_pointwise(x, 1.0, 128, packed, scales, zeros, None, *options)


def _best_seconds(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    time_call(call, device)
    best, spent, count = float("inf"), 0.0, 0
    while count < 3 or (spent < seconds and count < 200):
        wall, _ = time_call(call, device)
        best, spent, count = min(best, wall), spent + wall, count + 1
    return best


def time_call(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """(wall, processor) seconds of one call, waiting for the device. On CUDA the wall time is between two events on the
    current stream; the processor time is the host process's, all its threads together."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            processor = time.process_time()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000, time.process_time() - processor
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return max(time.perf_counter() - wall, 1e-9), time.process_time() - processor


def count_flops(fn: Callable[[], Any], backward: bool = False) -> int:
    """FLOPs of the matrix products, convolutions and attention that ``fn`` runs (1 multiply-add = 2 FLOP), with ``backward``
    those of a backward pass that it makes as well.

    Counted by torch.utils.flop_counter. Attention runs on the plain kernel meanwhile: the counter does not see into the fused
    CPU one and would leave out a third of a 4,096-token step. ``fn`` may run on the meta device, where it costs nothing.
    """
    with torch.inference_mode(not backward), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fn()
    return int(counter.get_total_flops())


def torch_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


@contextmanager
def use_threads(threads: int | None) -> Iterator[int]:
    """torch's intra-operation threads inside the block; None leaves them. Yields how many are in use."""
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
