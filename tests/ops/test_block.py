"""A packed DiT block as one operation: to the bit its parts one after the other, and the choice between the two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops.block import PackedBlock, packed_block_reference
from textok_fast.ops.dispatch import choose, use_backend
from textok_fast.ops.library import has_native

FORMS = [
    ("fp32", torch.float32, torch.float32),
    ("bf16", torch.bfloat16, torch.float32),
    ("bf16", torch.bfloat16, torch.bfloat16),
    ("int8", torch.float32, torch.float32),
    ("int8", torch.bfloat16, torch.float32),
]
needs_native = pytest.mark.skipif(not has_native("packed_block"), reason="the native library is not built")


def make(precision: Any, backend: str | None = None, width: int = 24, hidden: int = 40, heads: int = 3) -> PackedBlock:
    def layer(outputs: int, inputs: int) -> ops.PackedWeight:
        return ops.pack_linear(torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs), precision, backend)

    layers = layer(3 * width, width), layer(width, width), layer(hidden, width), layer(width, hidden)
    return PackedBlock(*layers, heads, "gelu_tanh")


def inputs(dtype: torch.dtype, stream: torch.dtype, batch: int = 2, rows: int = 7, width: int = 24) -> tuple[Tensor, ...]:
    table = torch.randn(batch, 8 * width + 5).to(dtype)  # of which the arguments are views
    modulation, shift, scale = table[:, : 6 * width], table[:, 6 * width : 7 * width], table[:, 7 * width : 8 * width]
    return torch.randn(batch, rows, width).to(stream), torch.randn(batch, rows, width).to(dtype), modulation, shift, scale


@needs_native
@pytest.mark.parametrize(("precision", "dtype", "stream"), FORMS)
def test_is_its_parts(precision: str, dtype: torch.dtype, stream: torch.dtype) -> None:
    block, given = make(precision, "native"), inputs(dtype, stream)
    with use_backend("native"):
        assert choose("packed_block", block, *given) == "native"
        found = ops.packed_block(block, *given)
        wanted = packed_block_reference(block, *given)
    for mine, parts, kind in zip(found, wanted, (stream, dtype), strict=True):
        assert mine.dtype == kind and torch.equal(mine, parts)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize(("precision", "dtype", "stream"), FORMS)
def test_the_reference_is_the_formula(precision: str, dtype: torch.dtype, stream: torch.dtype, eps: float) -> None:
    block, given = make(precision, "reference")._replace(mlp_eps=eps), inputs(dtype, stream)
    with use_backend("reference"):
        found = ops.packed_block(block, *given)
    x, hidden, modulation, shift, scale = (tensor.double() for tensor in given)

    def linear(x: Tensor, packed: ops.PackedWeight) -> Tensor:
        weight = packed.weight.double() if packed.scales is None else packed.weight.double() * packed.scales.double()[:, None]
        assert packed.bias is not None
        return x @ weight.T + packed.bias.double()

    def norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]

    _, _, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
    q, k, v = linear(hidden, block.qkv).unflatten(-1, (3, block.heads, -1)).unbind(2)  # each (B, N, H, D / H)
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div((24 // 3) ** 0.5).softmax(-1)
    attended = torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)
    x = x + gate1[:, None] * linear(attended, block.proj)
    branch = linear(
        torch.nn.functional.gelu(linear(norm(x, shift2, scale2, block.mlp_eps), block.fc1), approximate="tanh"), block.fc2
    )
    x = x + gate2[:, None] * branch
    rounding = {"fp32": 1e-5, "bf16": 3e-2, "int8": 5e-2}[precision]
    for mine, wanted in zip(found, (x, norm(x, shift, scale)), strict=True):
        assert (mine.double() - wanted).norm() / wanted.norm() < rounding


@needs_native
def test_a_forced_part_is_not_gone_around() -> None:
    block, given = make("fp32", "native"), inputs(torch.float32, torch.float32)
    for forced in ({"attention": "sdpa"}, {"gated_residual_layer_norm_modulate": "reference"}):
        with use_backend(**forced):
            assert choose("packed_block", block, *given) == "reference"
    with use_backend("reference"):
        assert choose("packed_block", block, *given) == "reference"
    assert choose("packed_block", make("fp32", "reference"), *given) == "reference"
    assert choose("packed_block", block._replace(mlp_eps=1e-5), *given) == "reference"  # the kernel has one epsilon
    with use_backend(packed_block="native"), pytest.raises(InputError, match="packed by the native library"):
        ops.packed_block(make("fp32", "reference"), *given)


@needs_native
def test_forced_it_runs_where_it_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    block, given = make("fp32", "native"), inputs(torch.float32, torch.float32)
    found = ops.packed_block(block, *given)
    monkeypatch.setattr("textok_fast.ops.block.NATIVE_KEYS", 0)  # as on a processor without AVX2
    assert choose("packed_block", block, *given) == "reference"
    with use_backend(packed_block="native"):
        torch.testing.assert_close(ops.packed_block(block, *given), found)


@needs_native
def test_in_a_compiled_graph() -> None:
    block, given = make("bf16", "native"), inputs(torch.bfloat16, torch.float32)

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        x, hidden = ops.packed_block(block, *given)
        return x + 1, hidden

    with torch.no_grad():
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(*given)
        for mine, wanted in zip(compiled, run(*given), strict=True):
            assert torch.equal(mine, wanted)


def test_bad_arguments_are_named() -> None:
    block, given = make("fp32", "reference"), list(inputs(torch.float32, torch.float32))
    for place, value, message in (
        (0, torch.zeros(2, 7, 23), r"x and hidden must be \(B, N, 24\), got \(2, 7, 23\)"),
        (1, torch.zeros(2, 6, 24), r"x and hidden must be"),
        (2, torch.zeros(2, 24), r"modulation must be \(2, 144\), got \(2, 24\)"),
        (4, torch.zeros(1, 24), r"scale must be \(2, 24\), got \(1, 24\)"),
    ):
        changed = [value if index == place else tensor for index, tensor in enumerate(given)]
        with pytest.raises(InputError, match=message):
            ops.packed_block(block, *changed)
    given[0] = given[0].requires_grad_()
    with pytest.raises(InputError, match="no gradient"):
        ops.packed_block(block, *given)


@needs_native
@pytest.mark.parametrize(("precision", "dtype", "stream"), FORMS)
def test_opcheck(precision: str, dtype: torch.dtype, stream: torch.dtype) -> None:
    block, given = make(precision, "native"), inputs(dtype, stream)
    weights = [tensor for each in block.weights for tensor in (each.weight, each.bias, each.scales) if tensor is not None]
    kind = ("fp32", "bf16", "int8").index(precision)
    arguments = (*given, weights, block.heads, kind, block.activation, 1e-6)
    torch.library.opcheck(torch.ops.textok_fast.packed_block.default, arguments)
