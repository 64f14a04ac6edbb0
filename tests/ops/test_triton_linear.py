"""The Triton products against float64: interpreted without a GPU, and on one with the shapes they are made for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from textok_fast import ops
from textok_fast.ops import linear
from textok_fast.ops.fp8 import RowScaled, quantize_rows_reference
from textok_fast.ops.linear import fp8_linear_reference, linear_gelu_reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STRICT = ("linear_gelu", "quantize_rows", "fp8_linear", "fp8_linear_fp8", "activate_quantize_rows")


@pytest.fixture(autouse=True)
def _triton(device: torch.device) -> Iterator[None]:
    with ops.use_backend(**dict.fromkeys(STRICT, "triton")):
        yield


def bound(wanted: Tensor, magnitude: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """How far a result may be from ``wanted``: one rounding to ``dtype``, sums of ``inputs`` float32 numbers of ``magnitude``.

    The GELU's slope is at most 1.13. Hopper's FP8 sums keep 13 bits after the point.
    """
    sums = inputs * 2.0**-24 + 2.0**-20
    if wanted.is_cuda:
        sums += 2.0**-10
    subnormal = 2.0**-25 if dtype == torch.float16 else 0.0
    return torch.finfo(dtype).eps / 2 * 1.001 * wanted.abs() + 1.2 * sums * magnitude + subnormal


def check_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> None:
    out = ops.linear_gelu(x, weight, bias, approximate)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    in_double = None if bias is None else bias.double()
    wanted = linear_gelu_reference(x.double(), weight.double(), in_double, approximate)
    magnitude = F.linear(x.double().abs(), weight.double().abs(), None if in_double is None else in_double.abs())
    assert out.shape == wanted.shape
    assert ((out.double() - wanted).abs() <= bound(wanted, magnitude, x.shape[-1], x.dtype)).all()


def check_fp8(x: RowScaled, weight: RowScaled, bias: Tensor | None, activation: str, dtype: torch.dtype) -> None:
    out = ops.fp8_linear(x, weight, bias, activation, dtype)
    assert out.dtype == dtype
    assert out.is_contiguous()
    wanted = fp8_linear_reference(x, weight, bias, activation, torch.float64)
    absolute = RowScaled(x.values.float().abs().to(torch.float8_e4m3fn), x.scales)
    magnitude = fp8_linear_reference(
        absolute, RowScaled(weight.values.float().abs().to(torch.float8_e4m3fn), weight.scales), None, "none", torch.float64
    ) + (0 if bias is None else bias.double().abs())
    allowed = bound(wanted, magnitude, x.values.shape[-1], dtype)
    assert ((out.double() - wanted).abs() <= allowed).all()

    quantized = ops.fp8_linear(x, weight, bias, activation, fp8=True)
    rows = wanted.numel() // wanted.shape[-1]
    allowed = bound(wanted, magnitude, x.values.shape[-1], torch.float32 if rows <= linear.SKINNY_ROWS else torch.bfloat16)
    largest = wanted.abs().amax(dim=-1)
    assert ((quantized.scales.double() * 448 - largest).abs() <= allowed.amax(dim=-1) + 1e-6 * largest).all()
    # The nearest e4m3 number is at most 2^-4 of it away, or half a subnormal.
    step = quantized.scales.double().unsqueeze(-1) * 2**-10
    difference = (quantized.dequantize(torch.float64) - wanted).abs()
    assert (difference <= allowed * 1.1 + 2**-4 * 1.001 * wanted.abs() + step + allowed.amax(dim=-1, keepdim=True)).all()


def scaled(rows: int, columns: int, device: torch.device) -> RowScaled:
    return quantize_rows_reference(torch.randn(rows, columns, device=device) * (0.1 + torch.rand(rows, 1, device=device)))


# -- bf16, fp16, fp32 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 40, 24), (7, 72, 72), (33, 40, 72)])
def test_linear_gelu(rows: int, inputs: int, outputs: int, dtype: torch.dtype, approximate: str, device: torch.device) -> None:
    shapes = ((rows, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(*shape, device=device).to(dtype) for shape in shapes)
    check_linear_gelu(x, weight, bias, approximate)
    check_linear_gelu(x, weight, None, approximate)


def test_linear_gelu_reads_strided_and_misaligned_rows(device: torch.device) -> None:
    packed, weight = torch.randn(2, 3, 100, device=device).half(), torch.randn(24, 200, device=device).half()
    check_linear_gelu(packed[:, :, 1:41], weight[:, 3:43], None, "tanh")  # of x a copy-free view of 6 rows
    check_linear_gelu(packed[:, 1:, ::2][:, :, :40], weight[::2, ::5], None, "none")
    check_linear_gelu(packed[0, 1, :40], weight[:, :40], None, "none")  # one dimension


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_gelu_with_sums_in_several_parts(dtype: torch.dtype, device: torch.device) -> None:
    from textok_fast.ops.triton_kernels.linear import _gpu, plan

    assert plan(3, 520, 24, torch.finfo(dtype).bits // 8, _gpu(torch.device("cpu"))).splits > 1
    x, weight, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((3, 520), (24, 520), (24,)))
    check_linear_gelu(x, weight / 20, bias, "none")
    first = ops.linear_gelu(x, weight, bias)
    assert torch.equal(ops.linear_gelu(x, weight, bias), first)  # no atomics


@pytest.mark.parametrize("processors", [1, 4, 132])
def test_linear_gelu_with_every_tile(processors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from textok_fast.ops.triton_kernels import linear as kernels

    gpu = kernels.Gpu(processors, kernels._gpu(device).shared)
    chosen = kernels.plan(130, 72, 264, 2, gpu)
    assert (chosen.block_m, chosen.block_n) == {1: (128, 256), 4: (128, 256), 132: (64, 64)}[processors]
    monkeypatch.setattr(kernels, "_gpu", lambda device: gpu)
    x, weight, bias = (torch.randn(*shape, device=device).bfloat16() for shape in ((130, 72), (264, 72), (264,)))
    check_linear_gelu(x, weight, bias, "tanh")


def test_linear_gelu_keeps_nan_and_infinity_in_their_rows(device: torch.device) -> None:
    x, weight = torch.randn(5, 40, device=device), torch.randn(24, 40, device=device).abs()
    x[1, 3], x[3, 2] = float("nan"), float("inf")
    for approximate in ("none", "tanh"):
        out = ops.linear_gelu(x, weight, None, approximate)
        assert out[1].isnan().all()
        assert (out[3] == float("inf")).all()  # where torch's own exact GELU has NaN on some processors
        others = [0, 2, 4]
        torch.testing.assert_close(out[others], linear_gelu_reference(x[others], weight, None, approximate))


def test_large_arguments_of_the_gelu(device: torch.device) -> None:
    x = torch.tensor([[-1e4], [-40.0], [-6.0], [-1e-3], [0.0], [1e-3], [6.0], [40.0], [1e4]], device=device)
    weight = torch.ones(16, 1, device=device)
    for approximate in ("none", "tanh"):
        wanted = F.gelu(x.double(), approximate=approximate).expand(-1, 16)
        torch.testing.assert_close(ops.linear_gelu(x, weight, None, approximate).double(), wanted, rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_gelu_gradients(approximate: str, with_bias: bool, device: torch.device) -> None:
    def gradients(backend: str) -> list[Tensor]:
        torch.manual_seed(1)
        shapes = ((2, 3, 40), (24, 40), (24,))[: 3 if with_bias else 2]
        inputs = [torch.randn(*shape, device=device, requires_grad=True) for shape in shapes]
        with ops.use_backend(linear_gelu=backend):
            out = ops.linear_gelu(inputs[0], inputs[1], inputs[2] if with_bias else None, approximate)
        out.backward(torch.linspace(-1, 1, out.numel(), device=device).reshape(out.shape))
        return [given.grad for given in inputs if given.grad is not None]

    got, wanted = gradients("triton"), gradients("reference")
    assert len(got) == len(wanted) == (3 if with_bias else 2)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_gelu_gradients_of_gradients(approximate: str, with_bias: bool, device: torch.device) -> None:
    shapes = ((2, 3, 40), (24, 40), (24,))[: 3 if with_bias else 2]
    inputs = [(torch.randn(*shape, device=device) / 6).requires_grad_() for shape in shapes]

    def gradients(backend: str) -> tuple[Tensor, ...]:
        with ops.use_backend(linear_gelu=backend):
            out = ops.linear_gelu(inputs[0], inputs[1], inputs[2] if with_bias else None, approximate)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)

    for one, other in zip(gradients("triton"), gradients("reference"), strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# -- e4m3 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 72), (2, 257), (5,), (0, 8)])
def test_quantize_rows_is_the_reference_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    magnitude = 10 ** torch.empty(shape[:-1], device=device).uniform_(-4, 4).unsqueeze(-1)
    x = (torch.randn(shape, device=device) * magnitude).to(dtype)
    same_bits(ops.quantize_rows(x), quantize_rows_reference(x))


def same_bits(got: RowScaled, wanted: RowScaled) -> None:
    assert got.values.dtype == torch.float8_e4m3fn
    assert got.values.is_contiguous()
    assert torch.equal(got.values.view(torch.uint8), wanted.values.view(torch.uint8))
    torch.testing.assert_close(got.scales, wanted.scales, rtol=0, atol=0, equal_nan=True)


def test_quantize_rows_of_extremes(device: torch.device) -> None:
    x = torch.randn(10, 20, device=device)
    x[0] = 0
    x[1] *= 1e-41  # subnormal, and its scale a few of the smallest
    x[8], x[9, 1:] = 0, 0
    x[8, 3], x[9, 0] = 1e-45, -3e-43  # their scales would be zero
    x[2] *= 1e37
    x[4, 1:] = 0
    same_bits(ops.quantize_rows(x), quantize_rows_reference(x))
    x[5, 3], x[6, 2], x[7, 1] = float("nan"), float("inf"), -float("inf")
    got, wanted = ops.quantize_rows(x), quantize_rows_reference(x)
    torch.testing.assert_close(got.dequantize(), wanted.dequantize(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.scales, wanted.scales, rtol=0, atol=0, equal_nan=True)
    assert not got.dequantize()[5:8].isfinite().any()
    assert got.dequantize()[8:].count_nonzero() == 0


def test_norms_quantize_rows_whose_scale_would_be_zero_alike(device: torch.device) -> None:
    shift = torch.randn(4, 72, device=device).clamp(-1, 1)
    shift[:, 0] = 1
    shift *= torch.tensor([[1e-45], [3e-43], [4e-43], [1.0]], device=device)
    shift[:, 1] = 0
    x, scale = torch.randn(4, 1, 72, device=device), torch.full((4, 72), -1.0, device=device)  # hidden is shift
    got = RowScaled(*torch.ops.textok_fast_triton.layer_norm_modulate_fp8(x, shift, scale, 1e-6))
    wanted = quantize_rows_reference(shift.unsqueeze(1))
    assert torch.equal(got.scales, wanted.scales) and got.scales[:2].flatten().tolist() == [1.0, 1.0]
    assert torch.equal(got.values.float(), wanted.values.float()) and got.values.float().isfinite().all()


def test_quantize_rows_reads_strided_rows(device: torch.device) -> None:
    packed = torch.randn(4, 3, 60, device=device).bfloat16()
    for x in (packed[:, :, 1:21], packed[:, 1], packed[..., ::3], packed.transpose(0, 2)):
        same_bits(ops.quantize_rows(x), quantize_rows_reference(x))


@pytest.mark.parametrize("activation", linear.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 40, 24), (7, 72, 72), (33, 48, 32)])
def test_fp8_linear(rows: int, inputs: int, outputs: int, activation: str, device: torch.device) -> None:
    x, weight = scaled(rows, inputs, device), scaled(outputs, inputs, device)
    dtype = DTYPES[rows % 3]
    check_fp8(x, weight, torch.randn(outputs, device=device), activation, dtype)
    if rows == 7:
        check_fp8(x, weight, torch.randn(outputs, device=device).bfloat16(), activation, torch.float32)
        check_fp8(x, weight, None, activation, torch.bfloat16)


def test_fp8_linear_with_sums_in_several_parts(device: torch.device) -> None:
    x, weight = scaled(3, 1040, device), scaled(24, 1040, device)
    check_fp8(x, weight, torch.randn(24, device=device), "gelu", torch.float32)
    same_bits(ops.fp8_linear(x, weight, fp8=True), ops.fp8_linear(x, weight, fp8=True))


@pytest.mark.parametrize("processors", [1, 132])
def test_fp8_linear_of_more_than_128_rows(processors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from textok_fast.ops.triton_kernels import linear as kernels

    gpu = kernels.Gpu(processors, kernels._gpu(device).shared)
    outputs = 264 if processors == 1 else 72
    chosen = kernels.plan(130, 80, outputs, 1, gpu)
    assert (chosen.block_m, chosen.block_n, chosen.splits) == ((128, 256, 1) if processors == 1 else (64, 64, 1))
    monkeypatch.setattr(kernels, "_gpu", lambda device: gpu)
    bias = torch.randn(outputs, device=device)
    check_fp8(scaled(130, 80, device), scaled(outputs, 80, device), bias, "gelu_tanh", torch.bfloat16)


def test_fp8_linear_of_skinny_products_is_quantized_as_the_float32_result(device: torch.device) -> None:
    x, weight, bias = scaled(5, 40, device), scaled(24, 40, device), torch.randn(24, device=device)
    same_bits(
        ops.fp8_linear(x, weight, bias, "none", fp8=True),
        quantize_rows_reference(ops.fp8_linear(x, weight, bias, "none", torch.float32)),
    )


def test_fp8_linear_reads_strided_rows_of_a_batch(device: torch.device) -> None:
    x = quantize_rows_reference(torch.randn(2, 3, 80, device=device))
    x = RowScaled(x.values[:, :, 16:64], torch.stack([x.scales, x.scales], dim=-1)[..., 0])  # strided scales
    weight = scaled(48, 64, device)
    weight = RowScaled(weight.values[::2, :48], weight.scales[::2])
    check_fp8(x, weight, torch.randn(48, device=device)[::2], "gelu", torch.float32)


def test_a_row_with_a_nan_makes_only_that_row_nan(device: torch.device) -> None:
    x = torch.randn(4, 40, device=device)
    x[2, 5] = float("nan")
    out = ops.fp8_linear(x, scaled(24, 40, device), None, "gelu_tanh", fp8=True)
    assert out.dequantize()[2].isnan().all()
    assert out.dequantize()[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("activation", linear.ACTIVATIONS)
def test_activate_quantize_rows(activation: str, device: torch.device) -> None:
    x = torch.randn(6, 72, device=device).bfloat16()
    got = linear._activate_and_quantize_rows(x, activation)
    wanted = linear._activate(x.double(), activation)
    difference = (got.dequantize(torch.float64) - wanted).abs()
    assert (difference <= 2**-4 * 1.001 * wanted.abs() + got.scales.double().unsqueeze(-1) * 2**-10 * 1.001 + 1e-6).all()
    torch.testing.assert_close(got.scales.double() * 448, wanted.abs().amax(dim=-1), rtol=1e-6, atol=0)


def test_empty_batches(device: torch.device) -> None:
    weight, bias = scaled(24, 40, device), torch.randn(24, device=device)
    assert ops.linear_gelu(torch.empty(2, 0, 40, device=device), weight.dequantize(), bias).shape == (2, 0, 24)
    assert ops.fp8_linear(scaled(0, 40, device), weight, bias).shape == (0, 24)
    assert ops.fp8_linear(scaled(0, 40, device), weight, bias, fp8=True).scales.shape == (0,)


# -- torch.library -----------------------------------------------------------------------------------------------------------


def test_opcheck(device: torch.device) -> None:
    namespace = torch.ops.textok_fast_triton
    x, weight, bias = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((2, 3, 40), (24, 40), (24,)))
    torch.library.opcheck(namespace.linear_gelu.default, (x, weight, bias, "tanh"))
    torch.library.opcheck(namespace.linear_gelu.default, (x[0], weight, None, "none"))
    torch.library.opcheck(namespace.quantize_rows.default, (x.detach()[:, :, :7],))
    torch.library.opcheck(namespace.activate_quantize_rows.default, (x.detach(), "gelu"))
    a, b = scaled(3, 40, device), scaled(24, 40, device)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema cannot compare e4m3
    torch.library.opcheck(namespace.fp8_linear.default, (*a, *b, bias.detach(), "gelu", torch.float16), test_utils=checks)
    torch.library.opcheck(namespace.fp8_linear_fp8.default, (*a, *b, None, "none"), test_utils=checks)


def test_inputs_are_left_as_they_are(device: torch.device) -> None:
    a, b, bias = scaled(3, 40, device), scaled(24, 40, device), torch.randn(24, device=device)
    before = [tensor.clone() for tensor in (*a, *b, bias)]
    ops.fp8_linear(a, b, bias, "gelu")
    ops.fp8_linear(a, b, bias, "gelu", fp8=True)
    for tensor, copy in zip((*a, *b, bias), before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8))


def test_compiles_whole(device: torch.device) -> None:
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((3, 48), (32, 48), (32,)))
    channels = ops.quantize_channels(weight)

    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = ops.fp8_linear(ops.quantize_rows(x), channels, bias, "gelu", fp8=True)
        return ops.linear_gelu(x, weight, bias), ops.fp8_linear(x, channels, bias), hidden.dequantize()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(x), f(x), strict=True):
        assert torch.equal(got, wanted)


def test_kernels_are_launched_on_the_device_of_their_tensors(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from textok_fast.ops.triton_kernels import linear as kernels

    inside: list[Tensor] = []
    launched: list[str] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                assert [tensor.device for tensor in inside] == [args[0].device]
                launched.append(self.name)

            return launch

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("product_kernel", "finish_kernel"):
        monkeypatch.setattr(kernels, name, Kernel(name))
    a, b = scaled(3, 40, device), scaled(24, 40, device)
    ops.fp8_linear(a, b, fp8=True)
    ops.quantize_rows(a.dequantize())
    assert launched == ["product_kernel", "finish_kernel", "finish_kernel"] and not inside


# -- sizes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize(("processors", "shared"), [(132, 232_448), (108, 166_912), (128, 101_376), (20, 101_376)])
def test_plans_fit_the_gpu_and_cover_the_product(processors: int, shared: int, itemsize: int, device: torch.device) -> None:
    from textok_fast.ops.triton_kernels.linear import Gpu, plan

    for inputs, outputs in (*linear.PRODUCTS, (40, 24), (4096, 16)):
        for rows in (1, 17, *linear.PRODUCT_ROWS):
            chosen = plan(rows, inputs, outputs, itemsize, Gpu(processors, shared))
            assert (chosen.block_m + chosen.block_n) * chosen.block_k * itemsize * chosen.stages <= shared
            assert chosen.stages >= 2
            steps = -(-inputs // chosen.block_k)
            a_part = -(-steps // chosen.splits)
            assert (chosen.splits - 1) * a_part < steps <= chosen.splits * a_part  # no part is empty
            assert chosen.splits == 1 or rows <= linear.SKINNY_ROWS


def test_skinny_products_keep_a_gpu_busy(device: torch.device) -> None:
    from textok_fast.ops.triton_kernels.linear import HOPPER, plan

    for inputs, outputs in linear.PRODUCTS[:4]:  # DiT-XL's
        chosen = plan(32, inputs, outputs, 1, HOPPER)
        assert chosen.block_m == 32
        assert -(-outputs // chosen.block_n) * chosen.splits >= 0.6 * HOPPER.processors


# -- on a GPU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", linear.PRODUCT_ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), linear.PRODUCTS)
def test_real_shapes(rows: int, inputs: int, outputs: int, device: torch.device) -> None:
    x, weight = torch.randn(rows, inputs, device=device).bfloat16(), torch.randn(outputs, inputs, device=device).bfloat16()
    bias = torch.randn(outputs, device=device).bfloat16()
    weight = weight / inputs**0.5
    check_linear_gelu(x, weight, bias, "none")
    with ops.use_backend(linear_gelu="cublaslt"):
        out = ops.linear_gelu(x, weight, bias, "tanh")
    torch.testing.assert_close(out, linear_gelu_reference(x, weight, bias, "tanh"), rtol=2**-6, atol=2**-6)
    if torch.cuda.get_device_capability() < (8, 9):
        return
    a, b = ops.quantize_rows(x), ops.quantize_channels(weight)
    same_bits(a, quantize_rows_reference(x))
    for activation in linear.ACTIVATIONS:
        check_fp8(a, b, bias, activation, torch.bfloat16)
        with ops.use_backend(fp8_linear="scaled_mm", fp8_linear_fp8="scaled_mm"):
            out = ops.fp8_linear(a, b, bias, activation)
            quantized = ops.fp8_linear(a, b, bias, activation, fp8=True)
        wanted = fp8_linear_reference(a, b, bias, activation, torch.float64)
        torch.testing.assert_close(out.double(), wanted, rtol=2**-6, atol=2**-6)
        torch.testing.assert_close(quantized.dequantize(torch.float64), wanted, rtol=2**-3, atol=2**-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_on_a_device_that_is_not_the_current_one(device: torch.device) -> None:
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    for rows in (5, 130):  # with sums in several parts, and without
        x, weight, bias = (torch.randn(*shape, device=other).bfloat16() for shape in ((rows, 520), (24, 520), (24,)))
        check_linear_gelu(x, weight / 20, bias, "tanh")
        if torch.cuda.get_device_capability(other) >= (8, 9):
            same_bits(ops.quantize_rows(x), quantize_rows_reference(x))
            check_fp8(ops.quantize_rows(x), ops.quantize_channels(weight), bias, "gelu", torch.bfloat16)
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_more_than_2_to_the_31_numbers(device: torch.device) -> None:
    rows = 2**31 // 4608 + 200
    x, weight = torch.randn(rows, 64, device=device).bfloat16(), torch.randn(4608, 64, device=device).bfloat16()
    out = ops.linear_gelu(x, weight)
    torch.testing.assert_close(out[-300:], linear_gelu_reference(x[-300:], weight), rtol=2**-6, atol=2**-6)
