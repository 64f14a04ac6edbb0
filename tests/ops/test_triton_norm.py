"""Triton's norm kernels, interpreted or on the GPU, against the definition in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from textok_fast import ops
from textok_fast.ops import dispatch, norm
from textok_fast.ops.fp8 import lacks_e4m3, quantize_rows_reference

if reason := dispatch.load_backend("triton"):
    pytest.skip(reason, allow_module_level=True)
from textok_fast.ops.triton_kernels import norm as kernels

triton_ops = torch.ops.textok_fast_triton
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (F32, F16)]  # of x, of the others
MANTISSA = {F32: 23, F16: 10, BF16: 7}
EPS = 1e-6


@pytest.fixture
def fp8_device(device: torch.device) -> torch.device:
    if lacks_e4m3(torch.empty(0, device=device)):
        pytest.skip("needs compute capability 8.9")
    return device


def make(
    batch: int, rows: int, width: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> tuple[Tensor, ...]:
    """x, branch, gate, shift, scale"""
    wide, narrow = dtypes
    x = (2 * torch.randn(batch, rows, width) + torch.randn(batch, rows, 1)).to(device, wide)
    branch = torch.randn(batch, rows, width).to(device, narrow)
    gate, shift, scale = (torch.randn(batch, width).to(device, narrow) for _ in range(3))
    return x, branch, gate, shift, scale


def hidden64(r: Tensor, shift: Tensor, scale: Tensor, offset: float = 1.0, eps: float = EPS) -> Tensor:
    """By the definition, in float64, without torch's LayerNorm."""
    r, shift, scale = r.double(), shift.double().unsqueeze(1), scale.double().unsqueeze(1)
    centred = r - r.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + scale) + shift


def assert_rounded(found: Tensor, wanted: Tensor, ulps: float = 1.0, arithmetic: float = 4e-6) -> None:
    """Within ``ulps`` units in the last place of ``found``'s dtype, and what float32 arithmetic on numbers near 1 may add."""
    _, exponent = torch.frexp(wanted)
    unit = torch.ldexp(torch.ones_like(wanted), exponent - 1 - MANTISSA[found.dtype])
    error = (found.double() - wanted).abs()
    allowed = ulps * unit + arithmetic * (1 + wanted.abs())
    assert bool((error <= allowed).all()), (
        f"error {error.max().item():.3g}, {(error / allowed).max().item():.2f} of what is allowed"
    )


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Error relative to the largest wanted magnitude."""
    assert found.shape == wanted.shape
    # One number is its own mean: its gradient is a difference of equal terms, each the gradient that comes in over sqrt(EPS).
    floor = EPS**-0.5 if wanted.ndim and wanted.shape[-1] == 1 else 1e-3
    scale = max(wanted.abs().max().item(), floor)
    assert (found.double() - wanted).abs().max().item() <= tolerance * scale


def gated(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, offset: float = 1.0
) -> tuple[Tensor, Tensor]:
    return triton_ops.gated_residual_layer_norm_modulate(x, branch, gate, shift, scale, offset, EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return triton_ops.layer_norm_modulate(x, shift, scale, EPS)


def check_forward(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> None:
    """Every forward form on these tensors."""
    hidden = modulate(x, shift, scale)
    assert hidden.dtype == scale.dtype and hidden.is_contiguous()
    assert_rounded(hidden, hidden64(x, shift, scale))
    for factor, offset in ((gate, 1.0), (None, 0.0)):
        residual, hidden = gated(x, branch, factor, shift, scale, offset)
        assert residual.dtype == x.dtype and hidden.dtype == scale.dtype and residual.is_contiguous()
        added = branch.double() if factor is None else factor.double().unsqueeze(1) * branch.double()
        assert_rounded(residual, x.double() + added, arithmetic=1e-6)
        # Normalized is what was stored.
        assert_rounded(hidden, hidden64(residual, shift, scale, offset))


# -- shapes of programs ------------------------------------------------------------------------------------------------------


def test_programs_hold_whole_rows() -> None:
    for width in [*range(1, 300), *range(300, 8193, 61), 8192]:
        for options in (kernels.forward_options(width, True, True, True), kernels.backward_options(width, True, True)):
            piece, warps = options["PIECE"], options["num_warps"]
            assert piece & (piece - 1) == 0 and warps & (warps - 1) == 0 and piece % (32 * warps) == 0
            padded = -(-width // piece) * piece
            assert width <= padded < width + piece and padded / (32 * warps) <= 40
    for width in (768, 1024, 1152):  # no lane idles
        assert width % kernels.forward_options(width, True, True, False)["PIECE"] == 0
        assert width % kernels.backward_options(width, True, True)["PIECE"] == 0


def test_chunks_cover_all_rows() -> None:
    for batch, rows in itertools.product((1, 3, 256, 5000), (1, 7, 32, 257, 100_000)):
        chunk = kernels.rows_in_chunk(batch, rows)
        assert 1 <= chunk <= rows
        assert batch * -(-rows // chunk) <= max(batch, kernels.MANY_PROGRAMS) + batch


def test_ahead_of_time_cases_are_what_launchers_use() -> None:
    for case in kernels.AOT:
        constants = dict(case.constexprs)
        flags = [constants["BRANCH"], constants["GATE"]]
        if case.kernel is kernels.norm_backward:
            wanted = kernels.backward_options(constants["D"], *flags)
        else:
            wanted = kernels.forward_options(constants["D"], *flags, constants["FP8"])
        assert constants | {"num_warps": case.num_warps} == wanted
        assert case.needs >= 89 or "*fp8e4nv" not in case.signature.values()
    assert len({case.name for case in kernels.AOT}) == len(kernels.AOT)


# -- forward -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "rows", "width"), [(2, 3, 72), (1, 1, 1152), (1, 2, 768)])
def test_forward(batch: int, rows: int, width: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    check_forward(*make(batch, rows, width, dtypes, device))


@pytest.mark.parametrize(("batch", "rows", "width"), [(3, 7, 1), (1, 33, 72), (1, 1, 8192), (1, 2, 1300)])
def test_forward_of_other_shapes(batch: int, rows: int, width: int, device: torch.device) -> None:
    check_forward(*make(batch, rows, width, (BF16, BF16), device))


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16)], ids=str)
def test_strided_and_misaligned(dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    batch, rows, width = 3, 4, 72
    x, branch, *_ = make(batch + 1, rows + 2, width + 5, dtypes, device)
    x = x[1:, 1 : rows + 1, 3 : width + 3]  # begins at an odd place
    branch = branch.transpose(0, 1).contiguous().transpose(0, 1)[:batch, :rows, 1 : width + 1]  # sample's stride below row's
    table = torch.randn(batch, 6 * width + 1).to(device, dtypes[1])[:, 1:]
    gate, shift, scale, *_ = table.chunk(6, dim=1)
    assert not any(t.is_contiguous() for t in (x, branch, gate, shift, scale)) and x.data_ptr() % 16
    check_forward(x, branch, gate, shift, scale)
    # One row of modulation for all samples; one picture for all samples; rows whose numbers lie apart.
    shift, scale, gate = (t[:1].expand(batch, -1) for t in (shift, scale, gate))
    assert shift.stride(0) == 0
    check_forward(x[:1].expand(batch, -1, -1), branch, gate, shift, scale)
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert apart.stride(-1) != 1
    check_forward(apart, branch, gate, shift.contiguous().t().contiguous().t(), scale)


def test_results_are_tensors_of_their_own(device: torch.device) -> None:
    x, branch, gate, shift, scale = make(1, 2, 8, (F32, F32), device)
    before = [t.clone() for t in (x, branch, gate, shift, scale)]
    residual, hidden = gated(x, branch, gate, shift, scale)
    assert len({t.untyped_storage().data_ptr() for t in (x, branch, residual, hidden)}) == 4
    assert all(map(torch.equal, before, (x, branch, gate, shift, scale)))


@pytest.mark.parametrize(("batch", "rows"), [(0, 3), (2, 0)])
def test_no_rows(batch: int, rows: int, device: torch.device) -> None:
    x, branch, gate, shift, scale = (t.requires_grad_() for t in make(batch, rows, 8, (F32, F32), device))
    residual, hidden = gated(x, branch, gate, shift, scale)
    assert residual.shape == hidden.shape == (batch, rows, 8)
    grads = torch.autograd.grad(residual.sum() + hidden.sum(), (x, branch, gate, shift, scale))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_numbers_stay_in_their_row(bad: float, device: torch.device) -> None:
    x, branch, gate, shift, scale = make(1, 3, 72, (BF16, BF16), device)
    x[0, 1, 70] = bad
    residual, hidden = gated(x, branch, gate, shift, scale)
    assert hidden[0, 1].isnan().all()
    assert torch.equal(residual[0, 1].isfinite(), x[0, 1].isfinite())
    assert_rounded(hidden[:, ::2], hidden64(residual[:, ::2], shift, scale))


def test_constant_and_large_rows(device: torch.device) -> None:
    _, _, _, shift, scale = make(1, 3, 72, (F32, F32), device)
    x = torch.stack([torch.full((72,), 3.0), 1e4 + torch.randn(72), 1e15 * torch.randn(72)])[None].to(device)
    hidden = modulate(x, shift, scale)
    assert torch.equal(hidden[0, 0], shift[0])  # no noise where there is no variance
    # A mean of 10,000 standard deviations: the variance is of the centred row, so that float32 has it yet.
    assert_near(hidden[0, 1], hidden64(x, shift, scale)[0, 1], 1e-3)
    assert_near(hidden[0, 2], hidden64(x, shift, scale)[0, 2], 1e-6)


# -- FP8 ---------------------------------------------------------------------------------------------------------------------


def check_fp8(values: Tensor, scales: Tensor, wanted: Tensor) -> None:
    """Against float64 numbers: the scale to float32's accuracy, the values within half a step of e4m3."""
    assert values.dtype == torch.float8_e4m3fn and scales.dtype == F32 and scales.shape == values.shape[:-1]
    largest = wanted.abs().amax(-1)
    torch.testing.assert_close(scales.double(), largest / 448, rtol=1e-5, atol=0)
    step = torch.maximum(wanted.abs() * 2**-4, scales.double().unsqueeze(-1) * 2**-10)
    error = (values.double() * scales.double().unsqueeze(-1) - wanted).abs()
    assert bool((error <= step * (1 + 1e-4) + 1e-5 * scales.double().unsqueeze(-1)).all())


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16)], ids=str)
@pytest.mark.parametrize(("batch", "rows", "width"), [(2, 3, 72), (1, 2, 1152), (2, 2, 1)])
def test_fp8(batch: int, rows: int, width: int, dtypes: tuple[torch.dtype, torch.dtype], fp8_device: torch.device) -> None:
    x, branch, gate, shift, scale = make(batch, rows, width, dtypes, fp8_device)
    check_fp8(*triton_ops.layer_norm_modulate_fp8(x, shift, scale, EPS), hidden64(x, shift, scale))
    for factor, offset in ((gate, 1.0), (None, 0.0)):
        residual, values, scales = triton_ops.gated_residual_layer_norm_modulate_fp8(
            x, branch, factor, shift, scale, offset, EPS
        )
        assert torch.equal(residual, gated(x, branch, factor, shift, scale, offset)[0])
        check_fp8(values, scales, hidden64(residual, shift, scale, offset))


def test_fp8_rounds_as_the_reference(fp8_device: torch.device) -> None:
    """Rows in all sizes, of zeros, with infinities and NaN: bit for bit the quantized float32 result."""
    width = 72
    sizes = [1.0, 1e-3, 448.0, 0.0, 1e-36, 1e-39, 3e-42, 1e-25, 1e-18, 1e30, 3e38, 1.0, 1.0, 1.0]
    shift = torch.randn(len(sizes), width).clamp(-1, 1) * torch.tensor(sizes)[:, None]
    shift[11, 5], shift[12, 6], shift[13, 7] = torch.inf, -torch.inf, torch.nan
    shift[2, :8] = torch.tensor([448.0, 1.0, 1.0625, 1.1875, 0.0009765625, 0.0029296875, -17.0, 2.0**-10])  # ties
    shift, scale = shift.to(fp8_device), torch.full((len(sizes), width), -1.0, device=fp8_device)  # hidden is shift
    x = torch.randn(len(sizes), 1, width, device=fp8_device)
    hidden = modulate(x, shift, scale)
    assert torch.equal(hidden[:11, 0], shift[:11])
    values, scales = triton_ops.layer_norm_modulate_fp8(x, shift, scale, EPS)
    wanted = quantize_rows_reference(hidden)
    torch.testing.assert_close(scales, wanted.scales, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values.float(), wanted.values.float(), rtol=0, atol=0, equal_nan=True)
    assert scales[3].item() == 1 and scales[11].isinf() and scales[12].isinf() and scales[13].isnan()


def test_fp8_leaves_gradients_alone(fp8_device: torch.device) -> None:
    x, branch, gate, shift, scale = make(1, 2, 72, (F32, F32), fp8_device)
    with dispatch.use_backend("triton"), torch.no_grad():
        quantized = ops.layer_norm_modulate(x, shift, scale, fp8=True)
        assert torch.equal(quantized.values.float(), triton_ops.layer_norm_modulate_fp8(x, shift, scale, EPS)[0].float())
        _, quantized = ops.gated_residual_layer_norm_modulate(x, branch, gate, shift, scale, fp8=True)
        assert quantized.values.dtype == torch.float8_e4m3fn
    with dispatch.use_backend(layer_norm_modulate_fp8="triton"):
        again = ops.layer_norm_modulate(x.requires_grad_(), shift, scale, fp8=True)
    assert not again.values.requires_grad and not again.scales.requires_grad


# -- gradients ---------------------------------------------------------------------------------------------------------------


def grads_of(function: Callable[..., Any], inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((result * weight.to(result.dtype)).sum() for result, weight in zip(results, weights, strict=True))
    return torch.autograd.grad(total, leaves)


def compare_gradients(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    results: int,
    tolerances: dict[torch.dtype, float] | None = None,
) -> None:
    # Of bf16 and fp16 the gradients that reach the kernel are rounded, and so are its results: a weight of the sum is the
    # gradient of one result, and is rounded as that is, so that a residual stream in float32 has float32's exactness.
    tolerances = tolerances or {F32: 4e-6, BF16: 6e-3, F16: 1e-3}
    with torch.no_grad():
        outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(outputs) == results
    weights = tuple(torch.randn_like(output) for output in outputs)
    found = grads_of(function, inputs, weights)
    wanted = grads_of(reference, tuple(t.double() for t in inputs), weights)
    for given, got, want in zip(inputs, found, wanted, strict=True):
        assert got.dtype == given.dtype
        assert_near(got, want, tolerances[got.dtype])


def check_gradients(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, tolerances: dict[torch.dtype, float] | None = None
) -> None:
    def compare(function: Callable[..., Any], reference: Callable[..., Any], inputs: tuple[Tensor, ...], count: int) -> None:
        compare_gradients(function, reference, inputs, count, tolerances)

    compare(modulate, hidden64, (x, shift, scale), 1)

    # The residual is rounded before it is normalized: the reference normalizes the same numbers, with the same gradient.
    rounded = [gated(x, branch, factor, shift, scale, offset)[0].double() for factor, offset in ((gate, 1.0), (None, 0.0))]

    def with_gate(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        r = x + gate.unsqueeze(1) * branch
        r = r + (rounded[0] - r).detach()
        return r, hidden64(r, shift, scale)

    def without_gate(x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        r = x + branch
        r = r + (rounded[1] - r).detach()
        return r, hidden64(r, shift, scale, 0.0)

    compare(gated, with_gate, (x, branch, gate, shift, scale), 2)
    compare(
        lambda x, branch, shift, scale: gated(x, branch, None, shift, scale, 0.0),
        without_gate,
        (x, branch, shift, scale),
        2,
    )


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_gradients(dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    check_gradients(*make(2, 3, 72, dtypes, device))


@pytest.mark.parametrize(("batch", "rows", "width", "programs"), [(1, 2, 1152, 1), (2, 7, 1, 3), (1, 33, 5, 8)])
def test_gradients_of_other_shapes(
    batch: int, rows: int, width: int, programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several rows in a chunk, the last chunk of a sample shorter."""
    monkeypatch.setattr(kernels, "MANY_PROGRAMS", programs)
    assert batch * rows == programs or kernels.rows_in_chunk(batch, rows) > 1
    check_gradients(*make(batch, rows, width, (F32, F32), device))


def test_many_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, _, shift, scale = make(1, 257, 3, (BF16, BF16), device)
    assert_rounded(modulate(x, shift, scale), hidden64(x, shift, scale))
    monkeypatch.setattr(kernels, "MANY_PROGRAMS", 4)
    compare_gradients(modulate, hidden64, (x, shift, scale), 1)


def test_gradients_of_strided_inputs(device: torch.device) -> None:
    x, branch, gate, shift, scale = make(2, 3, 20, (F32, F32), device)
    views = (x[:, :, 1:], branch.transpose(0, 1).contiguous().transpose(0, 1)[..., :-1])
    rows = tuple(t[:1, 1:].expand(2, -1) for t in (gate, shift, scale))
    check_gradients(*views, *rows)
    # A sum's gradient has stride 0 everywhere.
    leaf = x.detach().requires_grad_()
    modulate(leaf, shift, scale).sum().backward()
    wanted = grads_of(lambda x: hidden64(x, shift, scale), (x.double(),), (torch.ones_like(x),))[0]
    assert leaf.grad is not None
    assert_near(leaf.grad, wanted, 1e-5)


def test_public_functions_differentiate(device: torch.device) -> None:
    x, branch, gate, shift, scale = make(2, 3, 12, (F32, F32), device)
    weight, bias = scale[0], shift[0]
    weights = (torch.randn_like(x), torch.randn_like(x))
    for function, inputs, count in (
        (ops.layer_norm_modulate, (x, shift, scale), 1),
        (ops.gated_residual_layer_norm_modulate, (x, branch, gate, shift, scale), 2),
        (lambda x, branch, *rest: ops.gated_residual_layer_norm(x, branch, None, *rest), (x, branch, weight, bias), 2),
        (ops.gated_residual_layer_norm, (x, branch, gate, weight, bias), 2),
    ):
        with dispatch.use_backend("triton"):
            found = grads_of(function, inputs, weights[:count])
        with dispatch.use_backend("reference"):
            wanted = grads_of(function, tuple(t.double() for t in inputs), weights[:count])
        for got, want in zip(found, wanted, strict=True):
            assert_near(got, want, 4e-6)


# -- torch.library and torch.compile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16)], ids=str)
def test_opcheck(dtypes: tuple[torch.dtype, torch.dtype], fp8_device: torch.device) -> None:
    x, branch, gate, shift, scale = make(2, 2, 8, dtypes, fp8_device)
    grad = torch.randn_like(branch)
    no_compile = ("test_schema", "test_faketensor", "test_autograd_registration")
    wants = [t.clone().requires_grad_() for t in (x, branch, gate, shift, scale)]
    without = (*wants[:2], None, *wants[3:], 0.0, EPS)
    torch.library.opcheck(triton_ops.gated_residual_layer_norm_modulate, (*wants, 1.0, EPS))
    for name, arguments in (
        ("layer_norm_modulate", (wants[0], wants[3], wants[4], EPS)),
        ("gated_residual_layer_norm_modulate", without),
        ("layer_norm_modulate_backward", (grad, x, scale, EPS)),
        ("layer_norm_modulate_fp8", (x, shift, scale, EPS)),
        ("gated_residual_layer_norm_modulate_backward", (x, grad, x, branch, gate, scale, 1.0, EPS)),
        ("gated_residual_layer_norm_modulate_backward", (x, grad, x, branch, None, scale, 0.0, EPS)),
        ("gated_residual_layer_norm_modulate_fp8", (x, branch, gate, shift, scale, 1.0, EPS)),
    ):
        torch.library.opcheck(getattr(triton_ops, name), arguments, test_utils=no_compile)


def test_compile(device: torch.device) -> None:
    x, branch, gate, shift, scale = make(2, 3, 12, (F32, F32), device)
    weights = (torch.randn_like(x), torch.randn_like(x))

    def block(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x, hidden = norm.gated_residual_layer_norm_modulate(x, branch, gate, shift, scale)
        return x, norm.layer_norm_modulate(x + hidden, shift, scale)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with dispatch.use_backend("triton"):
        inputs = (x, branch, gate, shift, scale)
        for found, wanted in zip(grads_of(compiled, inputs, weights), grads_of(block, inputs, weights), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        for found, wanted in zip(compiled(*inputs), block(*inputs), strict=True):
            assert torch.equal(found, wanted)


# -- on a GPU, in real shapes ------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "rows", "width"), [(64, 32, 1152), (2, 257, 1152), (16, 288, 768), (5, 33, 72), (1, 5, 8192), (300, 3, 1)]
)
def test_on_gpu(batch: int, rows: int, width: int, dtypes: tuple[torch.dtype, torch.dtype], gpu: torch.device) -> None:
    inputs = make(batch, rows, width, dtypes, gpu)
    check_forward(*inputs)
    # Sums over up to 4,608 rows.
    check_gradients(*inputs, {F32: 2e-5, BF16: 6e-3, F16: 1e-3})
    x, _, _, shift, scale = inputs
    if not lacks_e4m3(x):
        check_fp8(*triton_ops.layer_norm_modulate_fp8(x, shift, scale, EPS), hidden64(x, shift, scale))


@pytest.mark.gpu
def test_gradients_are_the_same_each_time_on_gpu(gpu: torch.device) -> None:
    inputs = make(64, 100, 1152, (BF16, BF16), gpu)
    weights = (torch.randn_like(inputs[0]), torch.randn_like(inputs[0]))
    first, second = (grads_of(gated, inputs, weights) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.gpu
def test_more_than_2_to_the_31_numbers_on_gpu(gpu: torch.device) -> None:
    batch, width = 2, 1024
    rows = 2**31 // width // batch + 3
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    x = torch.randn(1, 64, width, device=gpu, dtype=BF16).repeat(batch, rows // 64 + 1, 1)[:, :rows]
    _, _, _, shift, scale = make(batch, 1, width, (BF16, BF16), gpu)
    hidden = modulate(x, shift, scale)
    assert_rounded(hidden[:, -5:], hidden64(x[:, -5:], shift, scale))
    dx, _, _ = triton_ops.layer_norm_modulate_backward(hidden, x, scale, EPS)
    wanted, _, _ = triton_ops.layer_norm_modulate_backward(hidden[:, -5:], x[:, -5:], scale, EPS)
    assert torch.equal(dx[:, -5:], wanted)
