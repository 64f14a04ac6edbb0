"""Every operation against PyTorch: ``pytest benchmarks/test_ops.py --benchmark-json FILE; python benchmarks/summary.py FILE``.

Shapes of DiT-XL and ViT-Base. Contenders run in turn (benchmarks/alternating.py): ``eager`` is the operation's reference,
``inductor`` torch.compile of it, ``chosen`` the public function as a user calls it, which pytest-benchmark also times by
itself; the others are the operation's backends, forced. ``copy`` moves as many bytes and does nothing else. Small shapes are
read from the cache, where a model's activations lie between two kernels; large ones, and all weights of products, from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from alternating import Contender, Work, compare, copy_contender, describe_inputs, inductor, input_sets
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from textok_fast import ops
from textok_fast.evaluation.roofline import torch_dtype
from textok_fast.ops import dispatch
from textok_fast.ops.attention import attention_reference
from textok_fast.ops.fp8 import RowScaled, lacks_e4m3, quantize_rows_reference
from textok_fast.ops.guided import guided_step_reference
from textok_fast.ops.linear import PRODUCT_ROWS, PRODUCTS, linear_gelu_reference
from textok_fast.ops.norm import (
    gated_residual_layer_norm_modulate_reference,
    gated_residual_layer_norm_reference,
    layer_norm_modulate_reference,
)
from textok_fast.ops.patches import patchify_uint8_reference, unpatchify_uint8_reference
from textok_fast.ops.quantize import vq_nearest_reference

DTYPES = pytest.mark.parametrize("dtype", ["fp32", "bf16"])
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # of a result; both sides round
COLD_ROWS = 2048  # from so many rows on inputs are read from memory

# (batch, tokens, width). DiT-XL over 32 tokens: one guided sample, eight of them, 128 of them.
DIT_XL = ((2, 32, 1152), (16, 32, 1152), (256, 32, 1152))
# ViT-Base over the 256 patches of a 256 px picture and 32 latent tokens.
VIT_BASE = ((1, 288, 768), (32, 288, 768))


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def autotuned(request: pytest.FixtureRequest, function: Callable[..., Any]) -> dict[str, Contender]:
    """torch.compile's max-autotune, on request."""
    if not request.config.getoption("--max-autotune"):
        return {}
    return {"max_autotune": Contender(inductor(function, mode="max-autotune-no-cudagraphs"))}


@pytest.fixture
def race(
    benchmark: Any, device: torch.device, rounds: int, smoke: bool, request: pytest.FixtureRequest
) -> Callable[..., dict[str, Any]]:
    """Runs one case and keeps what was measured in the benchmark's JSON."""

    def run(
        operation: str,
        shape: Mapping[str, Any],
        dtype: str,
        make: Callable[[], tuple[Any, ...]],
        reference: Callable[..., Any],
        public: Callable[..., Any],
        work: Work,
        *,
        cold: bool = False,
        tolerance: float | None = None,
        others: Mapping[str, Contender] | None = None,
        leave_out: tuple[str, ...] = (),
        compiled: bool = True,
        gradients: bool = False,
        baseline: str = "eager",
    ) -> dict[str, Any]:
        inputs = input_sets(make, work.bytes, device, cold and not smoke)
        contenders = {baseline: Contender(reference)}
        if compiled and not request.config.getoption("--no-compile"):
            contenders["inductor"] = Contender(inductor(reference))
            contenders |= autotuned(request, reference)
        for backend, missing in dispatch.backends(operation).items():
            if not missing and backend not in ("reference", *leave_out) and not _interpreted(backend, device):
                contenders[backend] = Contender(public, {operation: backend})
        contenders |= others or {}
        contenders["chosen"] = Contender(public)
        contenders["copy"] = copy_contender(work.bytes, len(inputs), device)
        measured = compare(
            contenders,
            inputs,
            device=device,
            dtype=dtype,
            work=work,
            baseline=baseline,
            rounds=rounds,
            tolerance=TOLERANCE[dtype] if tolerance is None else tolerance,
            gradients=gradients,
        )
        case = {"operation": operation, "shape": dict(shape), "dtype": dtype, "device": device.type}
        case |= {"inputs": describe_inputs(inputs, work.bytes, device), "bytes": work.bytes, "flops": work.flops}
        benchmark.extra_info.update(case, **measured)
        with torch.enable_grad() if gradients else torch.inference_mode():
            benchmark.pedantic(_once, (public, inputs[0], device), rounds=rounds, iterations=1, warmup_rounds=1)
        return measured

    return run


def _interpreted(backend: str, device: torch.device) -> bool:
    return backend == "triton" and device.type != "cuda"


def _once(public: Callable[..., Any], inputs: tuple[Any, ...], device: torch.device) -> None:
    public(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()


def modulation(batch: int, width: int, like: Tensor) -> tuple[Tensor, ...]:
    """Six views of one row a sample, as adaLN cuts its linear layer's result."""
    rows = 0.5 * torch.randn(batch, 6 * width, device=like.device)
    return rows.to(like.dtype).chunk(6, dim=1)  # each (B, D), the batch's stride 6 D


def shrink(shape: tuple[int, ...], smoke: bool) -> tuple[int, ...]:
    return (1, *shape[1:]) if smoke else shape


# -- 1 and 2: LayerNorm with what stands around it ----------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", DIT_XL, ids=shape_id)
def test_layer_norm_modulate(race: Any, device: torch.device, smoke: bool, shape: tuple[int, ...], dtype: str) -> None:
    batch, tokens, width = shrink(shape, smoke)

    def make() -> tuple[Tensor, ...]:
        x = torch.randn(batch, tokens, width, device=device).to(torch_dtype(dtype))
        return (x, *modulation(batch, width, x)[:2])

    size = torch_dtype(dtype).itemsize
    work = Work(bytes=size * (2 * batch * tokens * width + 2 * batch * width))
    public, reference = ops.layer_norm_modulate, layer_norm_modulate_reference
    where = {"B": batch, "N": tokens, "D": width}
    race("layer_norm_modulate", where, dtype, make, reference, public, work, cold=batch * tokens >= COLD_ROWS)


@DTYPES
@pytest.mark.parametrize("shape", DIT_XL, ids=shape_id)
def test_gated_residual_layer_norm_modulate(
    race: Any, device: torch.device, smoke: bool, shape: tuple[int, ...], dtype: str
) -> None:
    batch, tokens, width = shrink(shape, smoke)

    def make() -> tuple[Tensor, ...]:
        x, branch = (torch.randn(batch, tokens, width, device=device).to(torch_dtype(dtype)) for _ in range(2))
        return (x, branch, *modulation(batch, width, x)[:3])

    size = torch_dtype(dtype).itemsize
    work = Work(bytes=size * (4 * batch * tokens * width + 3 * batch * width))
    public, reference = ops.gated_residual_layer_norm_modulate, gated_residual_layer_norm_modulate_reference
    where = {"B": batch, "N": tokens, "D": width}
    operation = "gated_residual_layer_norm_modulate"
    race(operation, where, dtype, make, reference, public, work, cold=batch * tokens >= COLD_ROWS)


@DTYPES
@pytest.mark.parametrize("shape", VIT_BASE, ids=shape_id)
def test_gated_residual_layer_norm(race: Any, device: torch.device, smoke: bool, shape: tuple[int, ...], dtype: str) -> None:
    """The ViT's: no gate, the norm's own weight and bias."""
    batch, tokens, width = shrink(shape, smoke)

    def make() -> tuple[Any, ...]:
        x, branch = (torch.randn(batch, tokens, width, device=device).to(torch_dtype(dtype)) for _ in range(2))
        weight, bias = (torch.randn(width, device=device).to(torch_dtype(dtype)) for _ in range(2))
        return x, branch, None, weight, bias

    size = torch_dtype(dtype).itemsize
    work = Work(bytes=size * (4 * batch * tokens * width + 2 * width))
    public, reference = ops.gated_residual_layer_norm, gated_residual_layer_norm_reference
    where = {"B": batch, "N": tokens, "D": width, "gate": "none"}
    operation = "gated_residual_layer_norm_modulate"
    race(operation, where, dtype, make, reference, public, work, cold=batch * tokens >= COLD_ROWS)


@DTYPES
@pytest.mark.parametrize("shape", [DIT_XL[1], DIT_XL[2]], ids=shape_id)
def test_gated_residual_layer_norm_modulate_with_backward(
    race: Any, request: Any, device: torch.device, smoke: bool, shape: tuple[int, ...], dtype: str
) -> None:
    """Forward and backward, for training."""
    batch, tokens, width = shrink(shape, smoke)

    def make() -> tuple[Tensor, ...]:
        x, branch = (torch.randn(batch, tokens, width, device=device).to(torch_dtype(dtype)) for _ in range(2))
        leaves = (part.detach().clone() for part in (x, branch, *modulation(batch, width, x)[:3]))
        return tuple(leaf.requires_grad_() for leaf in leaves)

    def with_backward(function: Callable[..., Any]) -> Callable[..., Any]:
        def both(*inputs: Tensor) -> tuple[Tensor, ...]:
            residual, hidden = function(*inputs)
            return torch.autograd.grad((residual, hidden), inputs, (hidden.detach(), residual.detach()))

        return both

    reference = with_backward(gated_residual_layer_norm_modulate_reference)
    public = with_backward(ops.gated_residual_layer_norm_modulate)
    # The forward's two reads and two writes; the backward reads two gradients, residual and branch, and writes two gradients.
    work = Work(bytes=torch_dtype(dtype).itemsize * 10 * batch * tokens * width)
    others = {}
    if not request.config.getoption("--no-compile"):
        others["inductor"] = Contender(with_backward(inductor(gated_residual_layer_norm_modulate_reference)))
    race(
        "gated_residual_layer_norm_modulate",
        {"B": batch, "N": tokens, "D": width, "pass": "both"},
        dtype,
        make,
        reference,
        public,
        work,
        cold=batch * tokens >= COLD_ROWS,
        compiled=False,  # torch.autograd.grad is not traced: the contender above compiles the forward, and with it its backward
        others=others,
        gradients=True,
    )


@on_gpu
@pytest.mark.parametrize("shape", DIT_XL, ids=shape_id)
def test_gated_residual_layer_norm_modulate_fp8(race: Any, device: torch.device, smoke: bool, shape: tuple[int, ...]) -> None:
    """With the row-scaled FP8 result that the next product takes."""
    batch, tokens, width = shrink(shape, smoke)

    def make() -> tuple[Tensor, ...]:
        x, branch = (torch.randn(batch, tokens, width, device=device).bfloat16() for _ in range(2))
        return (x, branch, *modulation(batch, width, x)[:3])

    def reference(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        residual, hidden = gated_residual_layer_norm_modulate_reference(*inputs)
        return residual, *quantize_rows_reference(hidden)

    def public(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        residual, hidden = ops.gated_residual_layer_norm_modulate(*inputs, fp8=True)
        return residual, *hidden

    work = Work(bytes=batch * tokens * width * (3 * 2 + 1) + batch * tokens * 4)
    where = {"B": batch, "N": tokens, "D": width}
    operation = "gated_residual_layer_norm_modulate_fp8"
    race(operation, where, "bf16", make, reference, public, work, cold=batch * tokens >= COLD_ROWS, tolerance=6e-2)


# -- 5: pictures --------------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("batch", [1, 32])
def test_patchify_uint8(race: Any, device: torch.device, smoke: bool, batch: int, dtype: str) -> None:
    batch, height, patch = 1 if smoke else batch, 256, 16

    def make() -> tuple[Tensor]:
        return (torch.randint(0, 256, (batch, height, height, 3), dtype=torch.uint8, device=device),)

    kind = torch_dtype(dtype)
    work = Work(bytes=batch * height * height * 3 * (1 + kind.itemsize))
    race(
        "patchify_uint8",
        {"B": batch, "H": height, "p": patch},
        dtype,
        make,
        lambda images: patchify_uint8_reference(images, patch, kind),
        lambda images: ops.patchify_uint8(images, patch, kind),
        work,
        cold=batch > 1,
    )


@DTYPES
@pytest.mark.parametrize("batch", [1, 32])
def test_unpatchify_uint8(race: Any, device: torch.device, smoke: bool, batch: int, dtype: str) -> None:
    batch, height, patch = 1 if smoke else batch, 256, 16
    kind = torch_dtype(dtype)

    def make() -> tuple[Tensor]:
        return (torch.randn(batch, (height // patch) ** 2, 3 * patch * patch, device=device).to(kind),)

    work = Work(bytes=batch * height * height * 3 * (1 + kind.itemsize))
    race(
        "unpatchify_uint8",
        {"B": batch, "H": height, "p": patch},
        dtype,
        make,
        lambda patches: unpatchify_uint8_reference(patches, patch),
        lambda patches: ops.unpatchify_uint8(patches, patch),
        work,
        cold=batch > 1,
    )


# -- 6: the nearest code ------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", [(32, 8, 4096), (32, 16, 16384), (2048, 16, 16384)], ids=shape_id)
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalized"])
def test_vq_nearest(race: Any, device: torch.device, smoke: bool, shape: tuple[int, ...], dtype: str, normalize: bool) -> None:
    rows, width, codes = (8, 16, 256) if smoke else shape

    def make() -> tuple[Tensor, Tensor]:
        kind = torch_dtype(dtype)
        return torch.randn(1, rows, width, device=device).to(kind), torch.randn(codes, width, device=device).to(kind)

    size = torch_dtype(dtype).itemsize
    race(
        "vq_nearest",
        {"M": rows, "d": width, "K": codes} | ({"normalize": True} if normalize else {}),
        dtype,
        make,
        lambda x, codebook: vq_nearest_reference(x, codebook, normalize),
        lambda x, codebook: ops.vq_nearest(x, codebook, normalize),
        Work(bytes=size * width * (rows + codes) + 8 * rows, flops=2 * rows * codes * width),
        tolerance=0.02,  # of the rows; equally near codes within rounding may differ
    )


# -- 7: guidance and the sampler's step ---------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", [(1, 32, 16), (64, 32, 16), (64, 4, 64, 64)], ids=shape_id)
def test_guided_step(race: Any, device: torch.device, smoke: bool, shape: tuple[int, ...], dtype: str) -> None:
    """A guidance pair with learned variance, as DiT-XL gives it in ``dtype``; the state is float32."""
    shape = shrink(shape, smoke)
    channel = 2 if len(shape) == 3 else 1
    table = torch.tensor([[4.0, 1.1, -0.4, 0.2, 0.8, -6.0, -5.0, 1.0]], device=device)  # (1, 8)
    index = torch.zeros(1, dtype=torch.int64, device=device)

    def make() -> tuple[Tensor, ...]:
        x, noise = (torch.randn(shape, device=device) for _ in range(2))
        output = torch.cat([torch.randn(shape, device=device)] * 2, dim=channel)  # twice the channels
        return torch.cat([output, 0.9 * output]).to(torch_dtype(dtype)), x, table, index, noise

    elements = make()[1].numel()
    # Read: the conditional half with the variance, the other half's guided channels, state and noise. Written: the state.
    work = Work(bytes=elements * (3 * torch_dtype(dtype).itemsize + 3 * 4))
    where = {"x": shape_id(shape)}
    race("guided_step", where, dtype, make, guided_step_reference, ops.guided_step, work, cold=elements >= 2**20)


# -- 3: attention -------------------------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("batch", [1, 64, 256])
@pytest.mark.parametrize(("heads", "dim"), [(12, 64), (16, 72)], ids=["ViT-Base", "DiT-XL"])
@pytest.mark.parametrize("tokens", [32, 64, 128, 256])
def test_short_attention(race: Any, device: torch.device, smoke: bool, tokens: int, heads: int, dim: int, batch: int) -> None:
    """From the packed projection; ``sdpa`` is torch's own choice of kernel, ``sdpa_flash`` its FlashAttention."""

    def make() -> tuple[Tensor]:
        return (torch.randn(batch, tokens, 3, heads, dim, device=device).bfloat16(),)

    def sdpa(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, H * D)

    def sdpa_flash(qkv: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa(qkv)

    def eager(qkv: Tensor) -> Tensor:
        return attention_reference(*qkv.unbind(2))

    elements = batch * tokens * heads * dim
    race(
        "attention",
        {"B": batch, "N": tokens, "H": heads, "D": dim},
        "bf16",
        make,
        sdpa,
        lambda qkv: ops.short_attention(qkv, heads),
        Work(bytes=2 * 4 * elements, flops=4 * elements * tokens),
        cold=batch * tokens >= COLD_ROWS,
        others={"sdpa_flash": Contender(sdpa_flash), "eager": Contender(eager)},
        leave_out=("sdpa",),
        compiled=False,
        baseline="sdpa",
    )


# -- 4: products --------------------------------------------------------------------------------------------------------------


def product_bytes(rows: int, inputs: int, outputs: int, of_inputs: int) -> int:
    """Of a product with a 16-bit result and operands of ``of_inputs`` bytes."""
    return of_inputs * (rows * inputs + inputs * outputs) + 2 * rows * outputs


@on_gpu
@pytest.mark.parametrize("rows", PRODUCT_ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), [product for product in PRODUCTS if product[1] == 4 * product[0]])
def test_linear_gelu(race: Any, request: Any, device: torch.device, smoke: bool, inputs: int, outputs: int, rows: int) -> None:
    """The first half of DiT-XL's MLP (tanh GELU) and of ViT-Base's (exact)."""
    approximate = "tanh" if inputs == 1152 else "none"

    def make() -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = (torch.randn(*size, device=device) for size in ((rows, inputs), (outputs, inputs), (outputs,)))
        return x.bfloat16(), (weight / inputs**0.5).bfloat16(), bias.bfloat16()

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_gelu_reference(x, weight, bias, approximate)

    race(
        "linear_gelu",
        {"M": rows, "in": inputs, "out": outputs, "GELU": approximate},
        "bf16",
        make,
        reference,
        lambda x, weight, bias: ops.linear_gelu(x, weight, bias, approximate),
        Work(bytes=product_bytes(rows, inputs, outputs, 2), flops=2 * rows * inputs * outputs),
        cold=True,
        compiled=False,
        others=autotuned(request, reference),
    )


@on_gpu
@pytest.mark.parametrize("rows", PRODUCT_ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), PRODUCTS)
def test_fp8_linear(race: Any, request: Any, device: torch.device, smoke: bool, inputs: int, outputs: int, rows: int) -> None:
    """Rows quantized before (a fused LayerNorm does it), against the bf16 product of the same numbers by cuBLAS.

    ``quantize+`` quantizes a bf16 tensor first. The bytes are the FP8 product's, for cuBLAS too.
    """
    if reason := lacks_e4m3(torch.empty(0, device=device)):
        pytest.skip(reason)

    def make() -> tuple[Any, ...]:
        x = ops.quantize_rows(torch.randn(rows, inputs, device=device))
        weight = ops.quantize_channels(torch.randn(outputs, inputs, device=device) / inputs**0.5)
        bias = torch.randn(outputs, device=device).bfloat16()
        return x, weight, bias, x.dequantize(torch.bfloat16), weight.dequantize(torch.bfloat16)

    def cublas(x: RowScaled, weight: RowScaled, bias: Tensor, x_half: Tensor, weight_half: Tensor) -> Tensor:
        return F.linear(x_half, weight_half, bias)

    def public(x: RowScaled, weight: RowScaled, bias: Tensor, *halves: Tensor) -> Tensor:
        return ops.fp8_linear(x, weight, bias)

    def quantizing(x: RowScaled, weight: RowScaled, bias: Tensor, x_half: Tensor, weight_half: Tensor) -> Tensor:
        return ops.fp8_linear(x_half, weight, bias)

    race(
        "fp8_linear",
        {"M": rows, "in": inputs, "out": outputs},
        "bf16",
        make,
        cublas,
        public,
        Work(bytes=product_bytes(rows, inputs, outputs, 1), flops=2 * rows * inputs * outputs),
        cold=True,
        compiled=False,
        others={"quantize+": Contender(quantizing)} | autotuned(request, cublas),
        baseline="cublas",
    )
