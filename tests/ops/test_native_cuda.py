"""The CUDA kernels of csrc/cuda: run on the host by emulate_cuda.cpp, compiled by nvcc, and on a GPU where there is one.

References are written here, in float64, from the formulas.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.ops import nvcc
from textok_fast.ops.library import has_native, has_native_cuda

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # one unit in the last place of the result
EPS = 1e-6


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype, absolute: float = 1e-4) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=TOLERANCE[dtype], atol=absolute)


# -- inputs ------------------------------------------------------------------------------------------------------------------


def within(values: Tensor, layout: str) -> Tensor:
    """The same values as a view whose neighbours in memory are NaN.

    "dense"; "strided": room after each row and sample, a multiple of 16 bytes; "misaligned": one number before, 3 after a row.
    """
    before, after = {"dense": (0, 0), "strided": (0, 16), "misaligned": (1, 3)}[layout]
    shape = (*values.shape[:-2], values.shape[-2] + (layout != "dense"), values.shape[-1] + after)
    whole = torch.full((before + torch.Size(shape).numel(),), torch.nan, dtype=values.dtype, device=values.device)
    view = whole[before:].view(shape)[..., : values.shape[-2], : values.shape[-1]]
    view.copy_(values)
    return view


class NormCase:
    """x, branch (B, N, D) and gate, shift, scale (B, D), which with ``shared`` are one row for all samples."""

    def __init__(
        self, sizes: tuple[int, int, int], dtype: torch.dtype, layout: str = "dense", shared: bool = False, device: str = "cpu"
    ) -> None:
        self.sizes, self.dtype = sizes, dtype
        batch, _, width = sizes
        generator = torch.Generator().manual_seed(width)

        def tensor(*shape: int, layout: str = layout) -> Tensor:
            return within(torch.randn(*shape, generator=generator).to(device, dtype), layout)

        self.x, self.branch = tensor(*sizes), tensor(*sizes)
        self.grad, self.grad_residual = tensor(*sizes), tensor(*sizes)
        table = [tensor(1 if shared else batch, width) for _ in range(3)]
        self.gate, self.shift, self.scale = [row.expand(batch, width) for row in table]

    def residual(self, gated: bool) -> Tensor:
        return self.x.double() + (self.gate.double().unsqueeze(1) if gated else 1) * self.branch.double()

    def hidden(self, residual: Tensor, offset: float) -> Tensor:
        r = residual.double()
        normalized = (r - r.mean(-1, keepdim=True)) / torch.sqrt(r.var(-1, keepdim=True, correction=0) + EPS)
        return normalized * (offset + self.scale.double().unsqueeze(1)) + self.shift.double().unsqueeze(1)

    def gradients(self, residual: bool, gated: bool, offset: float) -> dict[str, Tensor]:
        """Of sum(grad * h) + sum(grad_residual * r) with r = x + gate * branch, by autograd; x here plays r."""
        r = self.x.double().requires_grad_()
        shift, scale = self.shift.double().clone().requires_grad_(), self.scale.double().clone().requires_grad_()
        normalized = (r - r.mean(-1, keepdim=True)) / torch.sqrt(r.var(-1, keepdim=True, correction=0) + EPS)
        hidden = normalized * (offset + scale.unsqueeze(1)) + shift.unsqueeze(1)
        objective = (hidden * self.grad.double()).sum()
        if residual:
            objective = objective + (r * self.grad_residual.double()).sum()
        dr, dshift, dscale = torch.autograd.grad(objective, (r, shift, scale))
        found = {"x": dr, "shift": dshift, "scale": dscale}
        if gated:
            found["branch"] = dr * self.gate.double().unsqueeze(1)
            found["gate"] = (dr * self.branch.double()).sum(1)
        return found


# -- the host runs the kernels -------------------------------------------------------------------------------------------------


class View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
    ]

    @classmethod
    def of(cls, tensor: Tensor | None) -> View:
        if tensor is None:
            return cls(None, 0, 0, None, None)
        storage = tensor.untyped_storage()
        strides = [stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]
        batch = strides[0] if tensor.ndim > 1 else 0
        row = strides[1] if tensor.ndim > 2 else 0
        return cls(tensor.data_ptr(), batch, row, storage.data_ptr(), storage.data_ptr() + storage.nbytes())


class Emulator:
    def __init__(self, file: Path) -> None:
        self.library = ctypes.CDLL(str(file))
        for name in ("emulate_forward", "emulate_backward", "emulate_guided"):
            getattr(self.library, name).restype = ctypes.c_char_p

    def _call(
        self, name: str, first: int, second: int, tensors: list[Tensor | None], sizes: tuple[int, ...], *more: float
    ) -> None:
        views = (View * len(tensors))(*map(View.of, tensors))
        numbers = (ctypes.c_int64 * len(sizes))(*sizes)
        failure = getattr(self.library, name)(first, second, views, numbers, *map(ctypes.c_float, more))
        assert failure is None, failure.decode()

    def forward(self, case: NormCase, residual: bool, gated: bool, offset: float, order: int) -> tuple[Tensor, Tensor]:
        """The residual, which without one is x, and the result."""
        out, sum_ = (torch.full(case.sizes, torch.nan, dtype=case.dtype) for _ in range(2))
        branch, gate = case.branch if residual else None, case.gate if gated else None
        tensors = [case.x, branch, gate, case.shift, case.scale, sum_ if residual else None, out]
        self._call("emulate_forward", TYPES[case.dtype], order, tensors, case.sizes, offset, EPS)
        return sum_ if residual else case.x, out

    def backward(
        self, case: NormCase, residual: bool, gated: bool, offset: float, order: int, chunk_rows: int = 0
    ) -> dict[str, Tensor]:
        batch, _, width = case.sizes
        found = {"x": torch.full(case.sizes, torch.nan, dtype=case.dtype)}
        found |= {name: torch.full((batch, width), torch.nan, dtype=case.dtype) for name in ("shift", "scale")}
        if gated:
            found["branch"] = torch.full(case.sizes, torch.nan, dtype=case.dtype)
            found["gate"] = torch.full((batch, width), torch.nan, dtype=case.dtype)
        inputs = [case.grad, case.x, case.grad_residual if residual else None]
        inputs += [case.branch if gated else None, case.gate if gated else None, case.scale]
        outputs = [found.get(name) for name in ("x", "branch", "shift", "scale", "gate")]
        self._call("emulate_backward", TYPES[case.dtype], order, inputs + outputs, (*case.sizes, chunk_rows), offset, EPS)
        return found


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = Path(__file__).with_name("emulate_cuda.cpp")
    file = tmp_path_factory.mktemp("emulator") / "emulator.so"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"]
    done = subprocess.run([*command, "-o", str(file), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Emulator(file)


# (sizes, dtype, layout, modulation shared by the samples). Vectors are 4 float32 or 8 bfloat16 numbers; a warp takes rows of up
# to 2,048 numbers (1,280 in the backward pass) in vectors, 256 in single numbers, a block wider ones.
NORM_CASES = [
    ((2, 3, 1), torch.float32, "dense", False),
    ((3, 1, 7), torch.float32, "strided", True),
    ((2, 3, 33), torch.bfloat16, "misaligned", False),
    ((2, 5, 72), torch.bfloat16, "dense", True),
    ((2, 3, 72), torch.float32, "strided", False),
    ((1, 9, 256), torch.float32, "misaligned", False),
    ((2, 2, 264), torch.bfloat16, "strided", True),
    ((1, 3, 264), torch.bfloat16, "misaligned", True),
    ((2, 3, 772), torch.float32, "dense", False),
    ((2, 5, 1152), torch.bfloat16, "strided", False),
    ((1, 2, 1284), torch.float32, "strided", False),
    ((1, 2, 2048), torch.bfloat16, "dense", False),
    ((1, 2, 2056), torch.bfloat16, "strided", True),
    ((1, 2, 4097), torch.float32, "dense", False),
]


@pytest.mark.parametrize(("sizes", "dtype", "layout", "shared"), NORM_CASES)
def test_emulated_forward(
    emulator: Emulator, sizes: tuple[int, int, int], dtype: torch.dtype, layout: str, shared: bool
) -> None:
    case = NormCase(sizes, dtype, layout, shared)
    results = []
    for order, (residual, gated, offset) in enumerate([(False, False, 1.0), (True, False, 0.0), (True, True, 1.0)]):
        sum_, out = emulator.forward(case, residual, gated, offset, order % 2)
        if residual:
            close(sum_, case.residual(gated), dtype)
        close(out, case.hidden(sum_, offset), dtype)
        results.append(out)
    _, again = emulator.forward(case, False, False, 1.0, 1)  # the threads in the other order
    assert torch.equal(results[0], again)


@pytest.mark.parametrize(("sizes", "dtype", "layout", "shared"), NORM_CASES)
def test_emulated_backward(
    emulator: Emulator, sizes: tuple[int, int, int], dtype: torch.dtype, layout: str, shared: bool
) -> None:
    case = NormCase(sizes, dtype, layout, shared)
    for order, (residual, gated, offset) in enumerate([(False, False, 1.0), (True, False, 0.0), (True, True, 1.0)]):
        found = emulator.backward(case, residual, gated, offset, order % 2)
        wanted = case.gradients(residual, gated, offset)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            close(found[name], value, dtype, absolute=1e-4 * sizes[1] ** 0.5)
    again = emulator.backward(case, True, True, 1.0, 1)
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_emulated_forward_of_many_rows(emulator: Emulator) -> None:
    case = NormCase((2, 257, 8), torch.bfloat16)  # over 512 rows are several warps a block; the last block has a warp too many
    _, out = emulator.forward(case, False, False, 1.0, 0)
    close(out, case.hidden(case.x, 1.0), torch.bfloat16)


@pytest.mark.parametrize(("width", "dtype"), [(24, torch.bfloat16), (1152, torch.float32), (2056, torch.bfloat16)])
def test_emulated_backward_over_chunks(emulator: Emulator, width: int, dtype: torch.dtype) -> None:
    case = NormCase((2, 17, width), dtype, "strided")  # chunks of 7, 7 and 3 rows for 4 warps, or for 3 where memory ends
    found = emulator.backward(case, True, True, 1.0, 0, chunk_rows=7)
    for name, value in case.gradients(True, True, 1.0).items():
        close(found[name], value, dtype, absolute=5e-4)


@pytest.mark.parametrize("name", ["x", "branch", "gate", "shift", "scale", "grad", "grad_residual"])
def test_emulated_vectors_need_every_address_aligned(emulator: Emulator, name: str) -> None:
    case = NormCase((2, 2, 40), torch.float32)
    setattr(case, name, within(getattr(case, name), "misaligned"))
    sum_, out = emulator.forward(case, True, True, 1.0, 0)
    close(sum_, case.residual(True), torch.float32)
    close(out, case.hidden(sum_, 1.0), torch.float32)
    found = emulator.backward(case, True, True, 1.0, 0)
    for key, value in case.gradients(True, True, 1.0).items():
        close(found[key], value, torch.float32)


def test_emulated_backward_of_no_rows(emulator: Emulator) -> None:
    found = emulator.backward(NormCase((2, 0, 40), torch.float32), True, True, 1.0, 0)
    assert all(torch.equal(found[name], torch.zeros(2, 40)) for name in ("shift", "scale", "gate"))


def test_emulated_statistics_are_two_pass(emulator: Emulator) -> None:
    case = NormCase((1, 2, 384), torch.float32)
    case.x += 300  # a mean that squares would drown the variance in
    _, out = emulator.forward(case, False, False, 1.0, 0)
    close(out, case.hidden(case.x, 1.0), torch.float32, absolute=1e-3)


def test_slots_and_columns_are_one_to_one(emulator: Emulator) -> None:
    assert emulator.library.emulate_slots() == 1


def test_emulator_notices_mistakes(emulator: Emulator) -> None:
    case = NormCase((1, 2, 40), torch.float32)
    case.shift = case.shift[:, :39].clone()  # one number too few
    with pytest.raises(AssertionError, match="outside of the tensors"):
        emulator.forward(case, False, False, 1.0, 0)


# -- guided_step ---------------------------------------------------------------------------------------------------------------


class GuidedCase:
    """x (B, N, C) or (B, C, H, W), a table of three rows: with noise, without, and one that clips."""

    def __init__(
        self,
        shape: tuple[int, ...],
        output_dtype: torch.dtype,
        dtype: torch.dtype,
        pair: bool,
        learned: bool,
        guided: int,
        noise_dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(len(shape) + guided)
        self.dim, self.pair, self.learned, self.guided = (2 if len(shape) == 3 else 1), pair, learned, guided
        full = list(shape)
        full[0] *= 1 + pair
        full[self.dim] *= 1 + learned

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(device)

        self.output = draw(*full).to(output_dtype)
        self.x, self.noise = draw(*shape).to(dtype), draw(*shape).to(noise_dtype or dtype)
        self.table = draw(3, 8).to(device)
        self.table[1, 7] = 0

    def wanted(self, step: int, noisy: bool, clip: bool) -> Tensor:
        if not 0 <= step < 3:
            return torch.full(self.x.shape, torch.nan, dtype=torch.float64, device=self.x.device)
        s, kx, km, a, b, low, high, n = self.table[step].double().unbind()
        conditional, unconditional = self.output.double().chunk(2) if self.pair else (self.output.double(),) * 2
        channels = self.x.shape[self.dim]
        c, u = conditional.narrow(self.dim, 0, channels), unconditional.narrow(self.dim, 0, channels)
        shape = [1] * self.x.ndim
        shape[self.dim] = channels
        guided = (torch.arange(channels, device=self.x.device) < self.guided).view(shape)
        m = torch.where(guided, u + s * (c - u), c) if self.pair else c
        x = self.x.double()
        x0 = kx * x + km * m
        if clip:
            x0 = x0.clamp(-1, 1)
        result = a * x0 + b * x
        if noisy and n != 0:
            f = (conditional.narrow(self.dim, channels, channels) + 1) / 2 if self.learned else torch.ones_like(x)
            result = result + n * torch.exp((f * high + (1 - f) * low) / 2) * self.noise.double()
        return result


GUIDED_CASES = [
    ((2, 5, 8), torch.float32, torch.float32, True, False, 8, None),
    ((2, 5, 7), torch.float32, torch.float32, True, False, 3, torch.bfloat16),  # single numbers
    ((2, 5, 7), torch.bfloat16, torch.float32, True, False, 7, None),  # 70 numbers, all guided: one group, single numbers
    ((3, 4, 8), torch.bfloat16, torch.float32, True, True, 3, None),
    ((3, 4, 4), torch.float16, torch.bfloat16, False, True, 4, torch.float32),
    ((2, 4, 6, 6), torch.float16, torch.bfloat16, True, True, 3, torch.float16),
    ((2, 3, 5, 5), torch.bfloat16, torch.float32, True, False, 1, None),
    ((1, 1, 1), torch.float32, torch.float32, False, False, 0, None),
]


@pytest.mark.parametrize(("shape", "output_dtype", "dtype", "pair", "learned", "guided", "noise_dtype"), GUIDED_CASES)
def test_emulated_guided_step(
    emulator: Emulator,
    shape: tuple[int, ...],
    output_dtype: torch.dtype,
    dtype: torch.dtype,
    pair: bool,
    learned: bool,
    guided: int,
    noise_dtype: torch.dtype | None,
) -> None:
    case = GuidedCase(shape, output_dtype, dtype, pair, learned, guided, noise_dtype)
    inner = 1 if len(shape) == 3 else shape[2] * shape[3]
    for step, noisy, clip in [
        (0, True, False),
        (1, True, True),
        (2, False, True),
        (2, True, True),
        (3, True, False),
        (-1, False, False),
    ]:
        index, out = torch.tensor([step]), torch.full(shape, torch.nan, dtype=dtype)
        tensors = [case.output, case.x, case.noise if noisy else None, case.table, index, out]
        group = shape[case.dim] * inner
        sizes = (case.x.numel(), group, guided * inner, 3, int(pair), int(learned), int(clip), TYPES[case.noise.dtype])
        emulator._call("emulate_guided", TYPES[output_dtype], TYPES[dtype], tensors, sizes)
        torch.testing.assert_close(
            out.double(), case.wanted(step, noisy, clip), rtol=2 * TOLERANCE[dtype], atol=1e-5, equal_nan=True
        )


def test_guided_places_beyond_32_bits(emulator: Emulator) -> None:
    result = (ctypes.c_int64 * 2)()
    place = emulator.library.emulate_place
    for i, group in [(5, 3), (2**31 - 1, 7), (2**31, 7), (2**33 + 5, 7), (2**35, 2**33), (2**33 + 5, 2**31 + 1)]:
        for learned in (0, 1):
            place(ctypes.c_int64(i), ctypes.c_int64(group), learned, result)
            assert list(result) == [i + learned * (i // group) * group, i % group]


# -- nvcc ----------------------------------------------------------------------------------------------------------------------


def test_ptxas_output_is_understood() -> None:
    output = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aIfEvT_' for 'sm_80'
ptxas info    : Function properties for _Z1aIfEvT_
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 484 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 352 bytes cmem[0]"""
    numbers = {"registers": 40, "shared": 1024, "stack": 16, "spill_stores": 12, "spill_loads": 8}
    first = {"kernel": "_Z1aIfEvT_", "source": "a.cu", "architecture": "sm_80", **numbers}
    none = {"registers": 8, "shared": 0, "stack": 0, "spill_stores": 0, "spill_loads": 0}
    assert nvcc.parse_ptxas(output, "a.cu") == [first, {"kernel": "_Z1bv", "source": "a.cu", "architecture": "sm_90a", **none}]


def test_report_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {file.name for file in nvcc.kernel_sources()} == {"few_rows.cu", "guided.cu", "norm.cu"}
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: "nvcc")
    with pytest.raises(InputError, match="sm_80 or sm_90a, got 'ampere'"):
        nvcc.compile_report(["ampere"])
    monkeypatch.setattr(nvcc, "SOURCES", tmp_path)
    with pytest.raises(InputError, match="not installed"):
        nvcc.compile_report()
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: None)
    with pytest.raises(InputError, match="nvcc on PATH"):
        nvcc.compile_report()


@pytest.mark.slow
@pytest.mark.skipif(nvcc.find_nvcc() is None, reason="no nvcc")
def test_no_kernel_spills() -> None:
    entries = nvcc.compile_report()
    for entry in entries:
        # At 128 registers, so that two blocks fit, the widest tiles leave too few for what their outer loop counts.
        most = 64 if "rows_product" in entry["kernel"] else 0
        assert max(entry["spill_stores"], entry["spill_loads"], entry["stack"]) <= most, entry
        assert 0 < entry["registers"] <= 255
        assert entry["shared"] <= 48 << 10
    kernels = {entry["kernel"] for entry in entries}
    assert len(entries) == len(kernels) * len(nvcc.ARCHITECTURES)
    for part in (
        "norm_forward_warp",
        "norm_forward_block",
        "norm_backward_warp",
        "norm_backward_block",
        "norm_reduce",
        "guided_step",
        "rows_product",
        "rows_attention",
        "rows_norm",
    ):
        assert any(part in kernel for kernel in kernels)


# -- a GPU ---------------------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_native_cuda() or not has_native("guided_step"),
    reason="no CUDA device, or the native library is without CUDA code",
)
WIDTHS = (1, 7, 33, 72, 384, 768, 1152, 2048, 4097)
LAYOUTS = ("dense", "strided", "misaligned")


def gpu_sum_tolerance(rows: int) -> float:
    return 2e-4 * rows**0.5


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
def test_forward_on_gpu(dtype: torch.dtype, width: int, layout: str) -> None:
    library = torch.ops.textok_fast
    for rows, shared in ((1, False), (7, True), (33, False), (257, False)):
        case = NormCase((3, rows, width), dtype, layout, shared, "cuda")
        out = library.layer_norm_modulate(case.x, case.shift, case.scale, EPS)
        assert out.is_contiguous()
        close(out, case.hidden(case.x, 1.0), dtype)
        for gated, offset in ((False, 0.0), (True, 1.0)):
            gate = case.gate if gated else None
            found = library.gated_residual_layer_norm_modulate(case.x, case.branch, gate, case.shift, case.scale, offset, EPS)
            assert found[0].is_contiguous() and found[1].is_contiguous()
            close(found[0], case.residual(gated), dtype)
            close(found[1], case.hidden(found[0], offset), dtype)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
def test_backward_on_gpu(dtype: torch.dtype, width: int, layout: str) -> None:
    library = torch.ops.textok_fast
    for rows, shared in ((1, False), (7, True), (33, False), (257, False)):
        case = NormCase((3, rows, width), dtype, layout, shared, "cuda")
        found = library.layer_norm_modulate_backward(case.grad, case.x, case.scale, EPS)
        wanted = case.gradients(False, False, 1.0)
        for tensor, name in zip(found, ("x", "shift", "scale"), strict=True):
            close(tensor, wanted[name], dtype, gpu_sum_tolerance(rows))
        for gated, offset in ((False, 0.0), (True, 1.0)):
            gate = case.gate if gated else None
            backward: Callable[..., Any] = library.gated_residual_layer_norm_modulate_backward
            arguments = (case.grad_residual, case.grad, case.x, case.branch, gate, case.scale, offset, EPS)
            found = backward(*arguments)
            wanted = case.gradients(True, gated, offset)
            for tensor, name in zip(found, ("x", "branch", "gate", "shift", "scale"), strict=True):
                if name in wanted:
                    close(tensor, wanted[name], dtype, gpu_sum_tolerance(rows))
                else:
                    assert tensor.shape == (0,)
            for one, two in zip(found, backward(*arguments), strict=True):
                assert torch.equal(one, two)  # bit for bit


@pytest.mark.gpu
@on_gpu
def test_columns_that_do_not_lie_together_on_gpu() -> None:
    case = NormCase((2, 5, 24), torch.float32, device="cuda")
    turned = case.x.transpose(1, 2).contiguous().transpose(1, 2)  # its last stride is N
    found = torch.ops.textok_fast.layer_norm_modulate(turned, case.shift, case.scale, EPS)
    close(found, case.hidden(case.x, 1.0), torch.float32)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("output_dtype", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("shape", "pair", "learned", "guided"),
    [
        ((2, 32, 8), True, False, 8),
        ((3, 33, 7), True, True, 3),
        ((64, 257, 16), True, True, 16),
        ((4, 4, 32, 32), True, True, 3),
        ((2, 3, 5, 5), False, False, 3),
    ],
)
def test_guided_step_on_gpu(
    shape: tuple[int, ...], pair: bool, learned: bool, guided: int, dtype: torch.dtype, output_dtype: torch.dtype
) -> None:
    case = GuidedCase(shape, output_dtype, dtype, pair, learned, guided, device="cuda")
    for step, noisy, clip in [(0, True, False), (1, True, True), (2, False, True), (3, True, False), (-1, False, False)]:
        index, noise = torch.tensor([step], device="cuda"), case.noise if noisy else None
        found = torch.ops.textok_fast.guided_step(case.output, case.x, noise, case.table, index, guided, clip)
        wanted = case.wanted(step, noisy, clip)
        torch.testing.assert_close(found.double(), wanted, rtol=2 * TOLERANCE[dtype], atol=1e-4, equal_nan=True)


@pytest.mark.gpu
@on_gpu
def test_guided_step_in_a_cuda_graph() -> None:
    """A captured step whose index advances on the device walks through the table, and then leaves it."""
    case = GuidedCase((2, 32, 8), torch.bfloat16, torch.float32, True, True, 8, device="cuda")
    index = torch.zeros(1, dtype=torch.int64, device="cuda")

    def step() -> Tensor:
        result = torch.ops.textok_fast.guided_step(case.output, case.x, case.noise, case.table, index, 8, False)
        index.add_(1)
        return result

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # on another stream than the default one, so that this one must be asked for
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    index.zero_()
    for row in range(4):
        graph.replay()
        torch.testing.assert_close(captured.double(), case.wanted(row, True, False), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert index.item() == 4
