"""The C++ kernels of pack_linear and packed_linear on the CPU, against products in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from textok_fast import _native, ops  # noqa: F401  (importing ops declares the operations)
from textok_fast.ops.library import has_native

pytestmark = pytest.mark.skipif(not has_native("packed_linear"), reason=_native.load().reason)

ISA = os.environ.get("TEXTOK_ISA", "")
EXAMPLES = 25 if ISA else 80
FP32, BF16, INT8 = 0, 1, 2
WEIGHTS = {FP32: torch.float32, BF16: torch.bfloat16, INT8: torch.int8}
INPUTS = [(FP32, torch.float32), (BF16, torch.bfloat16), (INT8, torch.float32), (INT8, torch.bfloat16)]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # of a result, relative
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
pack_linear, packed_linear = torch.ops.textok_fast.pack_linear, torch.ops.textok_fast.packed_linear


class Layer:
    """Weights of one kind, as they are and packed."""

    def __init__(self, kind: int, width: int, out: int, bias: torch.dtype | None = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kind, self.out = kind, out
        self.weight = (torch.randn(out, width, generator=generator) * (40 if kind == INT8 else 1)).clamp(-128, 127)
        self.weight = self.weight.to(WEIGHTS[kind])
        self.scales = torch.rand(out, generator=generator) + 0.5 if kind == INT8 else None
        self.bias = None if bias is None else (3 * torch.randn(out, generator=generator)).to(bias)
        self.packed = pack_linear(self.weight, kind)

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        return packed_linear(x, self.packed, self.scales, self.bias, self.out, self.kind, activation)

    def check(self, x: Tensor, activation: str = "none") -> None:
        """The result, and a bound on its error from that of float32 sums."""
        result = self(x, activation)
        assert result.dtype == x.dtype and result.shape == (*x.shape[:-1], self.out) and result.is_contiguous()
        weight, numbers = self.weight.double(), x.double()
        if self.scales is not None:  # sums are exact: what follows them is rounded
            scale = x.float().abs().amax(dim=-1, keepdim=True) / 127 if x.shape[-1] else torch.zeros(*x.shape[:-1], 1)
            scale = torch.where(scale == 0, 1, scale)
            numbers = (x.float() / scale).round().clamp(-127, 127).double()
            exact = (numbers @ weight.T) * scale.double() * self.scales.double()
            error = 4 * 2.0**-24 * exact.abs()
        else:
            exact = numbers @ weight.T
            error = (x.shape[-1] + 2) * 2.0**-24 * (numbers.abs() @ weight.abs().T)
        if self.bias is not None:
            exact = exact + self.bias.double()
            error = error + 2.0**-23 * (exact.abs() + self.bias.double().abs())
        wanted = ACTIVATIONS[activation](exact)
        error = 1.2 * error + 1e-5 * wanted.abs() * (activation != "none") + ROUNDING[x.dtype] * wanted.abs() + 1e-30
        assert ((result.double() - wanted).abs() <= error).all()


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    st.sampled_from(INPUTS),
    st.integers(0, 70),
    st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 127, 192, 333, 1152, 1300])),
    st.one_of(st.integers(1, 100), st.sampled_from([144, 145, 200])),
    st.sampled_from(list(ACTIVATIONS)),
    st.sampled_from(["none", "float32", "like x"]),
    st.floats(-4, 4),
    st.integers(0, 2**31),
)
def test_random(
    kind_and_dtype: tuple[int, torch.dtype],
    rows: int,
    width: int,
    out: int,
    activation: str,
    bias: str,
    power: float,
    seed: int,
) -> None:
    kind, dtype = kind_and_dtype
    layer = Layer(kind, width, out, {"none": None, "float32": torch.float32, "like x": dtype}[bias], seed)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    layer.check((10**power * x).to(dtype), activation)


@pytest.mark.parametrize(("kind", "dtype"), INPUTS)
def test_rows_lie_anywhere(kind: int, dtype: torch.dtype) -> None:
    layer = Layer(kind, 37, 50)
    room = torch.randn(3, 5, 4, 80).to(dtype)
    for x in (
        room[0, 0, 0, :37],
        room[..., :37],
        room[..., 3:40],
        room[:, 1:4, ::2, 40:77],
        room.transpose(0, 1)[..., :37],
        room.permute(2, 0, 1, 3)[..., 1:38],
        room[:1, :, :1, :37].expand(3, 5, 4, 37),
        room[..., ::2][..., :37],
        room[0, :, :, :37].transpose(-1, -2).contiguous().transpose(-1, -2),
        room[:0, ..., :37],
        room[:, :, None, 1, :37],
    ):
        layer.check(x)
        assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize(("kind", "dtype"), INPUTS)
def test_a_row_does_not_depend_on_others(kind: int, dtype: torch.dtype) -> None:
    """Nor on where it lies among them: 300 rows are taken in several parts, groups and rests of groups."""
    layer = Layer(kind, 1300, 100)  # more than one block of steps
    x = torch.randn(300, 1300).to(dtype)
    whole = layer(x, "gelu")
    layer.check(x[:140], "gelu")
    for first, last in ((0, 1), (1, 3), (2, 9), (5, 18), (100, 170), (131, 300), (299, 300)):
        assert torch.equal(layer(x[first:last], "gelu"), whole[first:last])


@pytest.mark.parametrize(("kind", "dtype"), INPUTS)
@pytest.mark.parametrize("sizes", [(40, 1152, 500), (300, 1300, 40), (7, 4608, 400)])
def test_threads_change_nothing(sizes: tuple[int, int, int], kind: int, dtype: torch.dtype) -> None:
    """Few panels and many rows are divided by rows too."""
    rows, width, out = sizes
    layer, x = Layer(kind, width, out), torch.randn(rows, width).to(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append((pack_linear(layer.weight, kind), layer(x, "gelu_tanh")))
    finally:
        torch.set_num_threads(threads)
    for packed, result in results[1:]:
        assert torch.equal(packed.view(torch.uint8), results[0][0].view(torch.uint8))
        assert torch.equal(result, results[0][1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("kind", "dtype"), INPUTS)
def test_what_is_not_finite_stays_in_its_row(kind: int, dtype: torch.dtype, value: float) -> None:
    layer, x = Layer(kind, 45, 60), torch.randn(20, 45).to(dtype)
    clean = layer(x)
    x[[3, 17], [0, 44]] = torch.tensor([value, -value]).to(dtype)
    result = layer(x)
    others = [i for i in range(20) if i not in (3, 17)]
    assert torch.equal(result[others], clean[others])
    bad = result[[3, 17]]
    assert bad.isnan().all() if math.isnan(value) or kind == INT8 else not bad.isfinite().any()
    for activation in ("gelu", "gelu_tanh"):
        assert layer(x, activation)[[3, 17]][bad.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_sums_are_exact(dtype: torch.dtype) -> None:
    """Every extreme of both factors, with scales of 1; float32 holds these sums."""
    x = torch.randint(-127, 128, (9, 1000))
    x[:4, :] = torch.tensor([[127], [-127], [127], [0]])
    x[:, 0] = 127  # x's own scale is 1
    weight = torch.randint(-128, 128, (70, 1000), dtype=torch.int8)
    weight[:4, :] = torch.tensor([[127], [-128], [-127], [0]])
    result = packed_linear(x.to(dtype), pack_linear(weight, INT8), torch.ones(70), None, 70, INT8, "none")
    assert torch.equal(result, (x @ weight.long().T).to(dtype))


def test_quantization_rounds_half_to_even_and_takes_zeros_and_tiny_numbers() -> None:
    eye = torch.eye(8, dtype=torch.int8)
    x = torch.tensor(
        [
            [127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 3.25],
            [0.0] * 8,
            [1e-45, -1e-45, 0, 0, 0, 0, 0, 0],
            [2e38, -3e38, 1e30, 0, 0, 0, 0, 3e38],
        ]
    )
    result = packed_linear(x, pack_linear(eye, INT8), torch.ones(8), None, 8, INT8, "none")
    assert result[0].tolist() == [127, 0, 2, 2, 0, -2, -126, 3]
    assert result[1:3].eq(0).all()
    assert torch.allclose(result[3], x[3], rtol=1e-6, atol=3e38 / 127 * 0.501)
    tiny = torch.tensor([[190e-45, 0, 0, 0, 0, 0, 0, 0]])  # its scale is a subnormal number of one digit
    assert packed_linear(tiny, pack_linear(eye, INT8), torch.ones(8), None, 8, INT8, "none").isfinite().all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations_over_their_range(activation: str) -> None:
    x = torch.cat((torch.linspace(-30, 30, 4001), torch.logspace(-30, 30, 500), -torch.logspace(-30, 30, 500)))[:, None]
    result = packed_linear(x, pack_linear(torch.ones(1, 1), FP32), None, None, 1, FP32, activation).double()
    exact = x.double()
    if activation == "gelu":
        wanted, exponent = ACTIVATIONS["gelu"](exact), exact.square() / 2
    else:
        exponent = 2 * math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3).abs()
        wanted = exact * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3))
    # The exponential's argument is itself a float32.
    relative = 1e-6 + 2.0**-22 * exponent.clamp(max=100)
    assert ((result - wanted).abs() <= relative * wanted.abs() + 1e-36).all()


def test_sizes_of_a_transformer() -> None:
    for kind, dtype in INPUTS:
        Layer(kind, 1152, 1152).check(torch.randn(2, 33, 1152).to(dtype), "gelu_tanh")
    Layer(INT8, 4608, 96).check(torch.randn(32, 4608))


def of_other_kernels(packed: Tensor) -> Tensor:
    """As many numbers, which say of themselves that other kernels packed them."""
    packed = packed.clone()
    layout = packed.view(torch.int32)[-1:]
    layout.copy_((layout + 1) % 5)
    return packed


def test_what_the_kernels_do_not_take_is_refused() -> None:
    layer, x = Layer(FP32, 8, 5), torch.randn(3, 8)
    quantized = Layer(INT8, 8, 5)
    for arguments, what in (
        ((x.bfloat16(), layer.packed, None, None, 5, FP32, "none"), "x must be Float, got BFloat16"),
        ((x.double(), quantized.packed, quantized.scales, None, 5, INT8, "none"), "x must be Float or BFloat16"),
        ((x, layer.packed, None, None, 5000, FP32, "none"), "packed is not what pack_linear makes here"),
        ((torch.randn(3, 9), layer.packed, None, None, 5, FP32, "none"), "packed is not what pack_linear makes here"),
        ((x, quantized.packed, None, None, 5, FP32, "none"), "packed must be Float"),
        ((x, quantized.packed, None, None, 5, INT8, "none"), "int8 weights need scales"),
        ((x, quantized.packed, torch.ones(4), None, 5, INT8, "none"), "scales has the wrong shape"),
        ((x, layer.packed, None, torch.zeros(4), 5, FP32, "none"), "bias has the wrong shape"),
        ((x, layer.packed, None, torch.zeros(5).bfloat16(), 5, FP32, "none"), "bias must be Float or of x's dtype"),
        ((x, layer.packed, None, None, 5, FP32, "relu"), "activation must be none, gelu or gelu_tanh, got relu"),
        ((x, layer.packed, None, None, 5, 3, "none"), "kind must be 0"),
        ((torch.tensor(1.0), layer.packed, None, None, 5, FP32, "none"), "x must be"),
        ((x, torch.zeros_like(layer.packed), None, None, 5, FP32, "none"), "packed is not what pack_linear makes here"),
        ((x, of_other_kernels(layer.packed), None, None, 5, FP32, "none"), "packed was made for .* ones run here"),
        ((x, of_other_kernels(quantized.packed), quantized.scales, None, 5, INT8, "none"), "packed was made for"),
    ):
        with pytest.raises(RuntimeError, match=what):
            packed_linear(*arguments)
    with pytest.raises(RuntimeError, match="weight must be BFloat16, got Float"):
        pack_linear(torch.zeros(3, 4), BF16)
    with pytest.raises(RuntimeError, match=r"weight must be \(out, in\)"):
        pack_linear(torch.zeros(3), FP32)
    with pytest.raises(RuntimeError, match="could overflow"):
        pack_linear(torch.zeros(1, 131073, dtype=torch.int8), INT8)


@pytest.mark.skipif(ISA != "", reason="this is that run")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    """The same with a smaller one, which a process chooses once; avx512 asked for by name is without VNNI and BF16."""
    names = ["baseline", "avx2", "avx512"]
    if names.index(isa) > names.index(_native.load().info["kernels"]):
        pytest.skip("this machine does not have it")
    chosen = "random or anywhere or depend or finite or exact or rounds or range"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__, "-k", chosen]
    done = subprocess.run(command, env={**os.environ, "TEXTOK_ISA": isa}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
