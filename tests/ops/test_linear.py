"""linear_gelu and FP8 products: the references, what the public functions check, which backend is chosen, torch._scaled_mm."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops import dispatch, linear
from textok_fast.ops.fp8 import RowScaled, quantize_rows_reference
from textok_fast.ops.library import interpreting

GELU = {
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "none": lambda x: x,
}


def scaled(rows: int, columns: int) -> RowScaled:
    return quantize_rows_reference(torch.randn(rows, columns) * torch.rand(rows, 1) * 3)


def dense(x: RowScaled) -> np.ndarray:
    return x.values.to(torch.float64).numpy() * x.scales.double().numpy()[..., None]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_linear_gelu(approximate: str, with_bias: bool) -> None:
    x, weight = torch.randn(2, 3, 5).double(), torch.randn(7, 5).double()
    bias = torch.randn(7).double() if with_bias else None
    product = x.numpy() @ weight.numpy().T + (0 if bias is None else bias.numpy())
    wanted = GELU["gelu_tanh" if approximate == "tanh" else "gelu"](product)
    np.testing.assert_allclose(ops.linear_gelu(x, weight, bias, approximate).numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_linear_gelu_has_gradients(approximate: str) -> None:
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (5, 4), (5,))]
    assert torch.autograd.gradcheck(lambda *given: ops.linear_gelu(*given, approximate), inputs)


def test_linear_gelu_is_the_layer_and_its_activation_to_the_bit_under_autocast_too() -> None:
    layer, x = torch.nn.Linear(8, 12), torch.randn(2, 3, 8)
    for approximate in ("none", "tanh"):
        assert torch.equal(ops.linear_gelu(x, layer.weight, layer.bias, approximate), F.gelu(layer(x), approximate=approximate))
        with torch.autocast("cpu", torch.bfloat16):
            out = ops.linear_gelu(x, layer.weight, layer.bias, approximate)
            assert out.dtype == torch.bfloat16
            assert torch.equal(out, F.gelu(layer(x), approximate=approximate))


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_fp8_linear_in_float64(activation: str, with_bias: bool) -> None:
    x, weight = scaled(3, 24), scaled(5, 24)
    bias = torch.randn(5) if with_bias else None
    wanted = GELU[activation](dense(x) @ dense(weight).T + (bias.double().numpy() if bias is not None else 0))
    np.testing.assert_allclose(ops.fp8_linear(x, weight, bias, activation, torch.float64).numpy(), wanted, atol=1e-12)
    single = ops.fp8_linear(x, weight, bias, activation, torch.float32)
    np.testing.assert_allclose(single.numpy(), wanted, rtol=1e-6, atol=1e-5)
    assert torch.equal(ops.fp8_linear(x, weight, bias, activation), single.bfloat16())
    quantized = ops.fp8_linear(x, weight, bias, activation, fp8=True)
    again = quantize_rows_reference(single)
    assert torch.equal(quantized.scales, again.scales)
    assert torch.equal(quantized.values.float(), again.values.float())


def test_fp8_linear_takes_batches_and_unquantized_activations() -> None:
    x, weight = torch.randn(2, 3, 16), ops.quantize_channels(torch.randn(5, 16))
    out = ops.fp8_linear(x, weight)
    assert out.shape == (2, 3, 5)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ops.fp8_linear(ops.quantize_rows(x), weight))
    assert torch.equal(out.reshape(6, 5), ops.fp8_linear(x.reshape(6, 16), weight))
    assert torch.equal(out[1, 2], ops.fp8_linear(x[1, 2], weight))
    quantized = ops.fp8_linear(x, weight, fp8=True)
    assert quantized.values.shape == (2, 3, 5)
    assert quantized.scales.shape == (2, 3)


def test_fp8_linear_ignores_autocast_and_records_no_gradient() -> None:
    x, weight, bias = scaled(3, 16), scaled(5, 16), torch.randn(5, requires_grad=True)
    out = ops.fp8_linear(x, weight, bias, "gelu", torch.float32)
    assert not out.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.fp8_linear(x, weight, bias, "gelu", torch.float32), out)
    assert not ops.quantize_rows(torch.randn(2, 4, requires_grad=True)).scales.requires_grad


def test_quantized_products_are_near_the_products_they_stand_for() -> None:
    x, weight, bias = torch.randn(64, 256), torch.randn(48, 256) / 16, torch.randn(48)
    out = ops.fp8_linear(x, ops.quantize_channels(weight), bias, dtype=torch.float32)
    error = (out - F.linear(x, weight, bias)).square().mean().sqrt() / F.linear(x, weight).square().mean().sqrt()
    assert 0.01 < error < 0.05  # e4m3 has 4 significant bits: errors of up to 2^-4 in either factor


def test_quantize_channels_scales_each_output_channel() -> None:
    weight = torch.randn(6, 10) * torch.logspace(-3, 3, 6).unsqueeze(1)
    weight[2] = 0
    values, scales = ops.quantize_channels(weight)
    np.testing.assert_allclose(scales.numpy(), np.where(np.arange(6) == 2, 1, np.abs(weight.numpy()).max(1) / 448), rtol=1e-6)
    again = RowScaled(values, scales).dequantize()
    assert ((again - weight).abs() <= 2**-4 * weight.abs() + scales.unsqueeze(1) * 2**-10).all()
    assert values.float().abs().amax(dim=1).tolist() == [448, 448, 0, 448, 448, 448]


def test_rows_whose_scale_would_be_zero_become_zeros() -> None:
    x = torch.tensor([1e-45, 1e-43, 3e-43, 4e-43]).unsqueeze(1) * torch.tensor([1.0, 0.0, -1.0])
    assert (x[:, 0] > 0).all()  # subnormal, and not flushed
    values, scales = ops.quantize_rows(x)
    assert scales.tolist() == [1.0, 1.0, 1.0, 2.0**-149]  # 4e-43 / 448 is nearer to the smallest float32 than to zero
    wanted = torch.tensor([[0.0, 0.0, 0.0]] * 3 + [[288.0, 0.0, -288.0]])  # 4e-43 is 285 of the smallest
    assert torch.equal(values.float(), wanted)
    assert ops.fp8_linear(x, scaled(5, 3), dtype=torch.float32).isfinite().all()


def test_bad_inputs_are_named() -> None:
    x, weight = torch.randn(3, 16), torch.randn(5, 16)
    with pytest.raises(InputError, match="approximate must be one of"):
        ops.linear_gelu(x, weight, None, "fast")
    with pytest.raises(InputError, match=r"x must be \(..., in\) = \(..., 16\), got \(3, 8\)"):
        ops.linear_gelu(x[:, :8], weight)
    with pytest.raises(InputError, match="weight must be"):
        ops.linear_gelu(x, weight[0])
    for backend in ("reference", "triton") if interpreting() else ("reference",):
        with ops.use_backend(linear_gelu=backend), pytest.raises(InputError, match=r"in at least 1, got \(5, 0\)"):
            ops.linear_gelu(x[:, :0], weight[:, :0])
    empty = [RowScaled(a.to(torch.float8_e4m3fn), torch.ones(len(a))) for a in (x[:, :0], weight[:, :0])]
    with pytest.raises(InputError, match=r"in at least 1, got \(5, 0\)"):
        ops.fp8_linear(*empty)
    with pytest.raises(InputError, match=r"bias must be \(out,\) = \(5,\), got \(3,\)"):
        ops.linear_gelu(x, weight, torch.randn(3))
    with pytest.raises(InputError, match="takes a float tensor"):
        ops.quantize_rows(torch.zeros(3, 4, dtype=torch.int32))
    with pytest.raises(InputError, match="takes a float tensor"):
        ops.quantize_rows(torch.tensor(1.0))
    with pytest.raises(InputError, match="weight must be"):
        ops.quantize_channels(torch.randn(4))
    a, b = scaled(3, 16), scaled(5, 16)
    with pytest.raises(InputError, match="activation must be one of"):
        ops.fp8_linear(a, b, None, "relu")
    with pytest.raises(InputError, match="dtype must be"):
        ops.fp8_linear(a, b, dtype=torch.int8)
    with pytest.raises(InputError, match="weight must be e4m3 with float32 scales"):
        ops.fp8_linear(a, RowScaled(b.values.float(), b.scales))
    with pytest.raises(InputError, match=r"weight needs one scale a row, \(5,\), got \(5, 1\)"):
        ops.fp8_linear(a, RowScaled(b.values, b.scales.unsqueeze(1)))


# -- torch._scaled_mm --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not linear.CPU_SCALED_MM, reason="torch._scaled_mm takes row-wise scales on a CPU from 2.13 on")
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_scaled_mm_against_the_reference(activation: str, with_bias: bool) -> None:
    x, weight = scaled(7, 48), scaled(32, 48)
    bias = torch.randn(32).bfloat16() if with_bias else None
    product = ops.fp8_linear(x, weight, bias, "none", torch.float64)
    with ops.use_backend(fp8_linear="scaled_mm", fp8_linear_fp8="scaled_mm"):
        out = ops.fp8_linear(x, weight, bias, activation)
        quantized = ops.fp8_linear(x, weight, bias, activation, fp8=True)
    # It rounds to bf16 before the activation, whose slope is at most 1.13, and after it.
    wanted = ops.fp8_linear(x, weight, bias, activation, torch.float64)
    bound = 2**-8 * (1.14 * product.abs() + wanted.abs()) + 1e-5
    if with_bias:  # on a CPU it rounds before it adds the bias too
        bound = bound + 1.14 * 2**-8 * ops.fp8_linear(x, weight, None, "none", torch.float64).abs()
    assert ((out.double() - wanted).abs() <= bound).all()
    in_float = (quantized.dequantize(torch.float64) - wanted).abs()
    assert (in_float <= bound + 2**-4 * 1.01 * wanted.abs() + quantized.scales.double().unsqueeze(1) * 2**-9).all()


def test_scaled_mm_gets_the_layout_that_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def scaled_mm(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        seen.append((a, b, options))
        return (a.float() @ b.float() * options["scale_a"] * options["scale_b"]).to(options["out_dtype"])

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(linear, "CPU_SCALED_MM", True)
    x = quantize_rows_reference(torch.randn(2, 6, 64))
    x = RowScaled(x.values[:, :, :32], x.scales)  # rows 64 apart
    weight = scaled(48, 32)
    with ops.use_backend(fp8_linear="scaled_mm"):
        out = ops.fp8_linear(x, weight)
    ((a, b, options),) = seen
    assert a.shape == (12, 32)
    assert a.stride() == (32, 1)  # row-major
    assert b.shape == (32, 48)
    assert b.stride() == (1, 32)  # column-major
    assert options["scale_a"].shape == (12, 1)
    assert options["scale_b"].shape == (1, 48)
    assert options["scale_a"].is_contiguous()
    assert options["scale_b"].is_contiguous()
    assert options["out_dtype"] == torch.bfloat16
    assert options["bias"] is None
    torch.testing.assert_close(out, ops.fp8_linear(x, weight))


@pytest.mark.skipif(not linear.CPU_SCALED_MM, reason="torch._scaled_mm takes row-wise scales on a CPU from 2.13 on")
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_scaled_mm_of_no_rows(shape: tuple[int, ...]) -> None:
    with ops.use_backend(fp8_linear="scaled_mm"):
        assert ops.fp8_linear(quantize_rows_reference(torch.empty(shape)), scaled(32, 16)).shape == (*shape[:-1], 32)


# -- choice ------------------------------------------------------------------------------------------------------------------


def test_scaled_mm_refuses_what_it_cannot() -> None:
    def refusal(x: RowScaled, weight: RowScaled, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
        with ops.use_backend(fp8_linear="scaled_mm"), pytest.raises(InputError, match="forced backend") as caught:
            ops.fp8_linear(x, weight, bias, dtype=dtype)
        return str(caught.value)

    assert "multiples of 16" in refusal(scaled(3, 24), scaled(16, 24))
    assert "multiples of 16" in refusal(scaled(3, 16), scaled(20, 16))
    assert "bfloat16" in refusal(scaled(3, 16), scaled(16, 16), dtype=torch.float32)
    assert "bfloat16" in refusal(scaled(3, 16), scaled(16, 16), torch.randn(16))


def test_linear_gelu_is_the_reference_on_a_cpu() -> None:
    x, weight, bias = torch.randn(3, 16), torch.randn(5, 16), torch.randn(5)
    assert dispatch.choose("linear_gelu", x, weight, bias, "tanh") == "reference"
    assert "cpu" in linear._cublaslt_rule(x, weight, bias, "tanh")


def test_rules_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        """As much of a CUDA tensor as the rules of linear_gelu look at."""

        is_cuda, is_cpu, ndim = True, False, 2
        device = torch.device("cuda:0")

        def __init__(self, *shape: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False) -> None:
            self.shape, self.dtype, self.requires_grad = shape, dtype, requires_grad

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    x, weight, bias = OnGpu(64, 16), OnGpu(32, 16), OnGpu(32)
    assert linear._cublaslt_rule(x, weight, bias, "tanh") == ""
    assert "tanh" in linear._cublaslt_rule(x, weight, bias, "none")
    assert "bias" in linear._cublaslt_rule(x, weight, None, "tanh")
    assert "one dtype" in linear._cublaslt_rule(x, weight, OnGpu(32, dtype=torch.float32), "tanh")
    trained = OnGpu(32, 16, requires_grad=True)
    assert "gradient" in linear._cublaslt_rule(x, trained, bias, "tanh")
    assert linear._triton_rule(x, trained, bias, "tanh") == ""
    with torch.no_grad():
        for rows in ((64,), (129,), (4, 32)):
            assert linear._triton_rule(OnGpu(*rows, 16), trained, bias, "none") == ""
            assert dispatch.choose("linear_gelu", OnGpu(*rows, 16), trained, bias, "tanh") == "cublaslt"
            assert dispatch.choose("linear_gelu", OnGpu(*rows, 16), trained, bias, "none") == "reference"
    assert linear._same_dtype_rule(OnGpu(4, 16, dtype=torch.float64), weight, bias).startswith("it takes")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float16)
    assert "autocast" in linear._triton_rule(x, weight, bias, "none")
    assert "autocast" in linear._cublaslt_rule(x, weight, bias, "tanh")
    half = (OnGpu(64, 16, dtype=torch.float16), OnGpu(32, 16, dtype=torch.float16), OnGpu(32, dtype=torch.float16))
    assert linear._triton_rule(*half, "none") == linear._cublaslt_rule(*half, "tanh") == ""
    e4m3 = (OnGpu(64, 32), OnGpu(64), OnGpu(48, 32), OnGpu(48))
    assert "Triton" in linear._scaled_mm_default(*e4m3, None, "none")
    assert "Triton" in linear._scaled_mm_default(OnGpu(2, 256, 32), *e4m3[1:], None, "none")
    assert linear._scaled_mm_default(OnGpu(4, 512, 32), *e4m3[1:], None, "none") == ""


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_fp8_needs_compute_capability_8_9(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    class Properties:
        major, minor = capability

    class OnGpu:
        is_cuda, is_cpu, device = True, False, torch.device("cuda:0")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    reason = linear.lacks_e4m3(OnGpu())  # type: ignore[arg-type]
    assert reason == ("FP8 needs compute capability 8.9, this GPU has 8.0" if capability == (8, 0) else "")


def test_fp8_choice_names_a_backend_for_every_product_that_is_measured() -> None:
    assert linear.PRODUCTS[:4] == ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152))
    for rows in linear.PRODUCT_ROWS:
        for inputs, outputs in linear.PRODUCTS:
            assert linear.fp8_choice(rows, inputs, outputs) in dispatch.backends("fp8_linear")


def test_compiles_whole() -> None:
    x, weight, bias = torch.randn(3, 16), torch.randn(5, 16), torch.randn(5)
    channels = ops.quantize_channels(weight)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = ops.fp8_linear(ops.quantize_rows(x), channels, bias, "gelu", fp8=True)
        return ops.linear_gelu(x, weight, bias, "tanh"), hidden.dequantize()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(x), f(x), strict=True):
        torch.testing.assert_close(got, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x)[0].dtype == torch.bfloat16
