"""The Triton attention kernel against float64, through torch.ops: interpreted, or on a GPU where there is one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops import dispatch
from textok_fast.ops.attention import attention_reference, short_attention

pytest.importorskip("triton")

# Half a unit in the last place of a result near 1, and of the weights that the second product rounds as well.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
HALVES = (torch.float16, torch.bfloat16)

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _triton(device: torch.device) -> None:
    reason = dispatch.load_backend("triton")
    if reason:
        pytest.skip(reason)


def packed(batch: int, rows: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v (B, N, H, D): views of one projection."""
    return torch.randn(batch, rows, 3, heads, dim, device=device).to(dtype).unbind(2)


def key_mask(batch: int, keys: int, device: torch.device) -> Tensor:
    """About a third of the keys masked, never all."""
    mask = torch.rand(batch, keys, device=device) > 0.35
    mask[:, keys // 2] = True
    return mask


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    out = torch.ops.textok_fast_triton.attention(q, k, v, mask)
    wanted = attention_reference(q.double(), k.double(), v.double(), mask)
    assert out.dtype == q.dtype and out.shape == (q.shape[0], q.shape[1], q.shape[2] * q.shape[3]) and out.is_contiguous()
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), wanted, atol=tolerance * wanted.abs().max().item(), rtol=0)
    return out


# -- numbers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 8, 20, 64, 72, 80, 96, 100, 128])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_head_dims(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = packed(2, 19, 2, dim, dtype, device)
    check(q, k, v, key_mask(2, 19, device))
    if dim == 72:
        check(q, k, v)


@pytest.mark.parametrize("rows", [1, 7, 16, 32, 33, 64, 77, 256])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_lengths(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = packed(1, rows, 1, 72, dtype, device)
    check(q[:, -40:] if rows == 256 else q, k, v, key_mask(1, rows, device))
    if dtype == torch.bfloat16:
        check(q, k, v)


@pytest.mark.parametrize(("queries", "keys"), [(1, 77), (70, 5), (33, 130)])
def test_other_queries_than_keys(queries: int, keys: int, device: torch.device) -> None:
    q, _, _ = packed(2, queries, 3, 24, torch.bfloat16, device)
    _, k, v = packed(2, keys, 3, 24, torch.bfloat16, device)
    check(q, k, v, key_mask(2, keys, device))


def test_more_is_refused(device: torch.device) -> None:
    for shape in ((1, 257, 1, 8), (1, 8, 1, 129), (1, 0, 1, 8)):
        x = torch.zeros(shape, device=device)
        with pytest.raises(ValueError, match="the kernel takes 1 to 256 keys of 1 to 128 channels"):
            torch.ops.textok_fast_triton.attention(x, x, x, None)
        with ops.use_backend(attention="triton"), pytest.raises(InputError, match="up to 256 keys of up to 128 channels"):
            ops.attention(x, x, x)


def test_nothing_to_do(device: torch.device) -> None:
    x = torch.zeros(0, 4, 2, 8, device=device)
    assert torch.ops.textok_fast_triton.attention(x, x, x, None).shape == (0, 4, 16)
    k = torch.zeros(3, 4, 2, 8, device=device)
    assert torch.ops.textok_fast_triton.attention(k[:, :0], k, k, None).shape == (3, 0, 16)


@pytest.mark.parametrize("rows", [slice(3, 9), slice(-5, None), slice(None, None, 3)])
def test_rows_of_a_packed_projection(rows: slice, device: torch.device) -> None:
    qkv = torch.randn(2, 21, 3, 2, 20, device=device).bfloat16()
    mask = key_mask(2, 21, device)
    with ops.use_backend(attention="triton"):
        every = short_attention(qkv.flatten(2), 2, mask)
        some = short_attention(qkv, 2, mask, rows)
    torch.testing.assert_close(every.double(), attention_reference(*qkv.double().unbind(2), mask), atol=2.0**-7, rtol=2.0**-7)
    assert torch.equal(some, every[:, rows])


def strided(part: Tensor, layout: str) -> Tensor:
    """The same numbers laid out otherwise."""
    batch, rows, heads, dim = part.shape
    if layout == "misaligned":
        return part.new_zeros(part.numel() + 1)[1:].view(part.shape).copy_(part)
    if layout == "odd row":
        return part.new_zeros(batch, rows, heads * dim + 1)[..., 1:].unflatten(-1, (heads, dim)).copy_(part)
    if layout == "heads first":
        return part.new_zeros(batch, heads, rows, dim).transpose(1, 2).copy_(part)
    if layout == "channels first":  # the last stride is not 1: the launcher copies
        return part.new_zeros(batch, heads, dim, rows).permute(0, 3, 1, 2).copy_(part)
    return part[:1, :1, :1].expand(part.shape)  # strides of 0


@pytest.mark.parametrize("layout", ["misaligned", "odd row", "heads first", "channels first", "expanded"])
def test_layouts(layout: str, device: torch.device) -> None:
    parts = packed(2, 9, 2, 20, torch.float16, device)
    index = ["misaligned", "odd row", "heads first", "channels first", "expanded"].index(layout) % 3
    check(*(strided(part, layout) if index == other else part for other, part in enumerate(parts)))  # one of them
    q, k, v = (strided(part, layout) for part in parts)
    check(q, k, v, key_mask(9, 2, device).T)  # a mask whose strides are swapped
    check(q, k, v, torch.tensor([[True]], device=device).expand(2, 9))


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    q, k, v = packed(1, 70, 1, 16, torch.float32, device)
    out = torch.ops.textok_fast_triton.attention(1e3 * q, 1e3 * k, v, None)
    # Scores of 1e6 are known to 0.06 in float32: what stands out by more decides alone.
    scores = (1e3 * q).double()[0, :, 0] @ (1e3 * k).double()[0, :, 0].T / 4
    first, second = scores.topk(2, dim=1).values.T
    clear = first - second > 30
    assert clear.sum() > 50
    torch.testing.assert_close(out[0, clear], v[0, scores.argmax(1)[clear], 0])


@pytest.mark.parametrize("rows", [9, 150])
def test_a_sample_without_keys_gets_zeros(rows: int, device: torch.device) -> None:
    q, k, v = packed(2, rows, 1, 16, torch.float32, device)
    mask = torch.zeros(2, rows, dtype=torch.bool, device=device)
    mask[1, -1] = True  # in the last block: those before have none
    out = check(q, k, v, mask)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    torch.testing.assert_close(out[1], v[1, -1].expand(rows, -1))


@pytest.mark.parametrize("rows", [9, 70])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_go_where_the_reference_has_them(rows: int, value: float, device: torch.device) -> None:
    for index in range(3):
        parts = [part.clone() for part in packed(1, rows, 2, 8, torch.float32, device)]
        parts[index][0, 3, 0, 5] = value
        out, wanted = torch.ops.textok_fast_triton.attention(*parts, None), attention_reference(*parts)
        torch.testing.assert_close(out, wanted, equal_nan=True, atol=1e-5, rtol=1e-5)
        assert not wanted.isfinite().all() and wanted[..., 8:].isfinite().all()


def test_a_masked_key_changes_nothing(device: torch.device) -> None:
    q, k, v = (part.clone() for part in packed(2, 70, 2, 16, torch.bfloat16, device))
    mask = key_mask(2, 70, device)
    before = torch.ops.textok_fast_triton.attention(q, k, v, mask)
    k[~mask], v[~mask] = 1e6, -1e6
    assert torch.equal(torch.ops.textok_fast_triton.attention(q, k, v, mask), before)


# -- launches ----------------------------------------------------------------------------------------------------------------


def test_parts_hold_the_head_and_no_more_than_they_must() -> None:
    from textok_fast.ops.triton_kernels.attention import parts

    wanted = {8: (16, 0), 16: (16, 0), 20: (32, 0), 40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32)}
    assert {dim: parts(dim) for dim in wanted} == wanted
    assert parts(120) == parts(128) == (128, 0)
    for dim in range(1, 129):
        first, second = parts(dim)
        assert first in (16, 32, 64, 128) and second in (0, 16, 32) and dim <= first + second < max(17, 2 * dim)


def test_a_program_takes_several_heads_only_where_there_are_many() -> None:
    from textok_fast.ops.triton_kernels.attention import plan

    def heads_each(batch: int, heads: int, rows: int) -> int:
        launch = plan(batch, heads, rows, rows, 72, 2, 8, False)
        assert launch.grid[0] * launch.constexprs["HEADS"] == batch * heads
        assert launch.grid[1] * launch.constexprs["BLOCK_M"] >= rows
        assert launch.constexprs["BLOCKS_N"] * launch.constexprs["BLOCK_N"] >= rows
        return launch.constexprs["HEADS"]

    assert heads_each(2, 16, 32) == heads_each(64, 16, 32) == 1
    assert heads_each(128, 16, 32) == 2 and heads_each(256, 16, 32) == heads_each(4096, 16, 32) == 4
    assert heads_each(4096, 15, 32) == 1 and heads_each(4096, 6, 32) == 2
    assert heads_each(4096, 16, 256) == 1


def test_several_heads_a_program(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = packed(2, 20, 4, 40, torch.bfloat16, device)
    mask = key_mask(2, 20, device)
    one_each = check(q, k, v, mask)
    monkeypatch.setattr("textok_fast.ops.triton_kernels.attention.ENOUGH_PROGRAMS", 1)
    assert torch.equal(check(q, k, v, mask), one_each)


def test_strides_are_told_in_the_widest_loads_they_allow() -> None:
    from textok_fast.ops.triton_kernels.attention import common_vector

    def vector(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> int:
        return common_vector(*torch.empty(shape, dtype=dtype).unbind(2))

    assert vector((2, 5, 3, 16, 72)) == 8 and vector((2, 5, 3, 16, 72), torch.float32) == 4
    assert vector((2, 5, 3, 2, 20)) == 4 and vector((2, 5, 3, 2, 7)) == 1


@pytest.mark.parametrize(("rows", "dim", "masked"), list(itertools.product((32, 64, 256), (64, 72), (False, True))))
def test_the_report_compiles_what_is_launched(
    rows: int, dim: int, masked: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from textok_fast.ops.triton_kernels import attention as kernels

    (case,) = (case for case in kernels.AOT if case.name == f"B=2 N={rows} D={dim} bf16{' mask' if masked else ''}")
    assert case.tensor_cores
    launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            return lambda *args, **options: launches.append((args, options))

    monkeypatch.setattr(kernels, "attention_kernel", Recorder())
    mask = torch.ones(2, rows, dtype=torch.bool, device=device) if masked else None
    kernels.attention(*packed(2, rows, 16, dim, torch.bfloat16, device), mask)
    ((args, options),) = launches
    given = dict(zip(case.kernel.arg_names, args, strict=False))
    assert given.keys() | options.keys() == {*case.kernel.arg_names, "num_warps", "num_stages"}
    assert (options.pop("num_warps"), options.pop("num_stages")) == (case.num_warps, case.num_stages)
    # As Triton specializes: None and 1 are constants, and it notes what 16 divides.
    constants = {name: value for name, value in given.items() if value is None or (isinstance(value, int) and value == 1)}
    assert options | constants == case.constexprs
    for name, value in given.items():
        if isinstance(value, Tensor):
            assert case.signature[name] == ("*i1" if value.dtype == torch.bool else "*bf16")
        elif isinstance(value, int) and value != 1:
            assert case.signature[name] == "i32" and (name in case.aligned) == (value % 16 == 0)


# -- torch.library -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool, device: torch.device) -> None:
    parts = [part.requires_grad_() for part in packed(1, 5, 2, 8, torch.float32, device)]
    mask = key_mask(1, 5, device) if masked else None
    torch.library.opcheck(torch.ops.textok_fast_triton.attention.default, (*parts, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = (part.detach().clone().requires_grad_() for part in packed(2, 9, 2, 12, dtype, device))
    mask = key_mask(2, 9, device)
    mask[0] = False
    grad = torch.randn(2, 9, 24, device=device, dtype=dtype)
    with ops.use_backend(attention="triton"):
        found = torch.autograd.grad(ops.attention(q, k, v, mask), (q, k, v), grad)
    wide = [part.detach().double().requires_grad_() for part in (q, k, v)]
    wanted = torch.autograd.grad(attention_reference(*wide, mask), wide, grad.double())
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_the_backward_formula_is_the_derivative() -> None:
    """In float64, which the kernel does not take: the formula with the reference in the kernel's place."""
    from textok_fast.ops.attention import _backward, _save

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            out = attention_reference(*inputs)
            _save(ctx, inputs, out)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return _backward(None, ctx, grad)

    q, k, v = (torch.randn(2, n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4))
    for mask in (None, torch.tensor([[True, False, True, True], [False] * 4])):
        assert torch.autograd.gradcheck(lambda q, k, v, mask=mask: Formula.apply(q, k, v, mask), (q, k, v))


def test_compiled_without_a_break(device: torch.device) -> None:
    qkv = torch.randn(1, 9, 48, device=device)
    mask = key_mask(1, 9, device)

    def function(qkv: Tensor) -> Tensor:
        return short_attention(2 * qkv, 2, mask, slice(2, 5)) + 1

    torch._dynamo.reset()
    with ops.use_backend(attention="triton"):
        out = torch.compile(function, fullgraph=True, backend="aot_eager")(qkv)
    torch.testing.assert_close(out, function(qkv), atol=1e-5, rtol=1e-5)


# -- on a GPU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("rows", [32, 64, 77, 128, 256])
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_real_sizes(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    for batch in (2, 130):  # one head a program, and several
        q, k, v = packed(batch, rows, 16, dim, dtype, device)
        check(q, k, v)
        check(q, k, v, key_mask(batch, rows, device))
        check(q[:, -rows // 4 :], k, v)


@pytest.mark.gpu
@on_gpu
def test_inside_a_captured_graph(device: torch.device) -> None:
    q, k, v = packed(2, 32, 16, 72, torch.bfloat16, device)
    call = torch.ops.textok_fast_triton.attention
    call(q, k, v, None)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(q, k, v, None)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, call(q, k, v, None))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_flash_attention_where_it_is_installed(dtype: torch.dtype, device: torch.device) -> None:
    if dispatch.load_backend("flash"):
        pytest.skip(dispatch.load_backend("flash"))
    q, k, v = (part.requires_grad_() for part in packed(2, 300, 4, 72, dtype, device))
    if dispatch.choose("attention", q, k, v, None) != "flash":
        pytest.skip("no flash-attn that is installed runs on this GPU")
    out = ops.attention(q, k, v)
    wanted = attention_reference(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), wanted, atol=2 * TOLERANCE[dtype], rtol=0)
    grad = torch.randn_like(out)
    for one, other in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(wanted, (q, k, v), grad), strict=True):
        torch.testing.assert_close(one, other.to(dtype), atol=8 * TOLERANCE[dtype], rtol=8 * TOLERANCE[dtype])
