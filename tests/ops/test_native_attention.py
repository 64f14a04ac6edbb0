"""The C++ kernel of attention on the CPU, against the formula in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from textok_fast import _native, ops
from textok_fast.errors import InputError
from textok_fast.ops.attention import NATIVE_KEYS, NATIVE_UP_TO, attention_reference
from textok_fast.ops.dispatch import choose, use_backend
from textok_fast.ops.library import has_native, library

pytestmark = pytest.mark.skipif(not has_native("attention"), reason="the native library is not built")

DTYPES = [torch.float32, torch.bfloat16]
ISA = os.environ.get("TEXTOK_ISA", "")
EXAMPLES = 20 if ISA else 80


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, spread: float = 1.0) -> Tensor:
    out = library("native").attention(q, k, v, mask)
    assert out.shape == (q.shape[0], q.shape[1], q.shape[2] * q.shape[3]) and out.dtype == q.dtype and out.is_contiguous()
    wanted = attention_reference(q.double(), k.double(), v.double(), mask)
    # An average of v: errors are of its size. A score's, which grow with it (``spread``), are a probability's relative ones.
    # Products of bf16 round the probabilities, each by half a unit of 8 bits.
    size = v.double().abs().amax(dim=1).flatten(1).unsqueeze(1)  # (B, 1, H D)
    rounding = 4e-6 * max(1.0, spread) if q.dtype == torch.float32 else 2.0**-7
    assert ((out.double() - wanted).abs() <= rounding * size + 1e-30).all()
    return out


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 11),
    st.integers(1, 70),
    st.integers(1, 3),
    st.integers(1, 75),
    st.sampled_from(["none", "some", "one", "nothing"]),
    st.sampled_from(DTYPES),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.integers(0, 2**31),
)
def test_random(
    batch: int, queries: int, keys: int, heads: int, dim: int, masked: str, dtype: torch.dtype, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        (torch.randn(batch, rows, heads, dim, generator=generator) * scale).to(dtype)
        for rows, scale in ((queries, spread), (keys, 1.0), (keys, 1.0))
    )
    mask = None
    if masked != "none":
        mask = torch.rand(batch, keys, generator=generator) < 0.5
        mask[0] = masked == "some"
        mask[0, keys // 2] |= masked == "one"
    out = check(q, k, v, mask, spread)
    if masked == "nothing":
        assert not out[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [slice(None), slice(3, 8), slice(0, 1)])
def test_reads_packed_projections_in_place(dtype: torch.dtype, rows: slice) -> None:
    qkv = torch.randn(2, 33, 3 * 4 * 24).to(dtype)
    with use_backend(attention="native"):
        found = ops.short_attention(qkv, 4, rows=rows)
    q, k, v = qkv.unflatten(-1, (3, 4, 24)).unbind(2)
    assert torch.equal(found, library("native").attention(q[:, rows].contiguous(), k.contiguous(), v.contiguous(), None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_any_kind(dtype: torch.dtype) -> None:
    q = torch.randn(2, 3, 5, 16).to(dtype).transpose(1, 2)  # heads before rows
    k = torch.randn(2, 16, 9, 3).to(dtype).permute(0, 2, 3, 1)  # a row's numbers apart
    v = torch.randn(1, 9, 3, 16).to(dtype).expand(2, -1, -1, -1)
    check(q, k, v, torch.ones(1, 9, dtype=torch.bool).expand(2, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_batch_change_a_result(dtype: torch.dtype) -> None:
    qkv = torch.randn(6, 64, 3, 16, 72).to(dtype)
    q, k, v = qkv.unbind(2)
    run, threads = library("native").attention, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(q, k, v, None)
        torch.set_num_threads(3)
        assert torch.equal(run(q, k, v, None), one)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(run(q[4:5], k[4:5], v[4:5], None), one[4:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [2, 5, 8])
def test_queries_of_few_heads_are_divided_among_threads(dtype: torch.dtype, threads: int) -> None:
    q, k = torch.randn(1, 333, 3, 20).to(dtype), torch.randn(1, 45, 3, 20).to(dtype)
    mask = torch.rand(1, 45) < 0.8
    run, before = library("native").attention, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(q, k, k + 1, mask)
        torch.set_num_threads(threads)
        assert torch.equal(run(q, k, k + 1, mask), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_and_numbers_that_are_none(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 6, 1, 8).to(dtype) for _ in range(3))
    check(1000 * q, 100 * k, v, spread=1e5)  # one key takes all
    check(0 * q, k, v)  # all alike
    q[0, 2] = torch.nan
    out = library("native").attention(q, k, v, None)[0]
    assert out[2].isnan().all() and out[[0, 1, 3, 4, 5]].isfinite().all()
    k[0, 5] = torch.nan
    q[0, 2] = 0
    kept = torch.tensor([[True] * 5 + [False]])
    assert library("native").attention(q, k, v, kept).isfinite().all()  # a masked key is nothing, whatever it holds
    q[:], k[:] = 1, -torch.inf  # no score is a number: nor is the softmax, but where all keys are masked
    assert library("native").attention(q, k, v, None).isnan().all() and attention_reference(q, k, v).isnan().all()
    assert library("native").attention(q, k, v, kept).isnan().all()
    assert not library("native").attention(q, k, v, torch.zeros_like(kept)).any()


def test_the_choice() -> None:
    q = torch.zeros(1, 32, 2, 8)
    assert choose("attention", q, q, q, None) == ("native" if NATIVE_KEYS >= 32 else "sdpa")
    assert choose("attention", *[q.double()] * 3, None) == choose("attention", *[q.half()] * 3, None) == "sdpa"
    assert choose("attention", q.requires_grad_(), q, q, None) == "sdpa"
    assert NATIVE_UP_TO[_native.load().info["kernels"]] == NATIVE_KEYS
    with use_backend(attention="native"), pytest.raises(InputError, match="takes float32 and bfloat16"):
        ops.attention(*[torch.zeros(1, 2, 1, 4, dtype=torch.float64)] * 3)


def test_gradients_are_the_formulas() -> None:
    given = [torch.randn(2, 5, 3, 4, requires_grad=True) for _ in range(3)]
    with use_backend(attention="native"):
        ops.attention(*given).square().sum().backward()
    found = [tensor.grad for tensor in given]
    doubles = [tensor.detach().double().requires_grad_() for tensor in given]
    attention_reference(*doubles).square().sum().backward()
    for mine, wanted in zip(found, doubles, strict=True):
        assert mine is not None and wanted.grad is not None
        torch.testing.assert_close(mine.double(), wanted.grad, rtol=1e-4, atol=1e-5)


def test_what_the_kernel_does_not_take_is_refused() -> None:
    run, q = library("native").attention, torch.randn(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="q has the dtype Half"):
        run(q.half(), q.half(), q.half(), None)
    with pytest.raises(RuntimeError, match="k has the wrong shape"):
        run(q, q[:1], q, None)
    with pytest.raises(RuntimeError, match="v must be Float, got BFloat16"):
        run(q, q, q.bfloat16(), None)
    with pytest.raises(RuntimeError, match="mask must be Bool"):
        run(q, q, q, torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="at least one key"):
        run(q, q[:, :0], q[:, :0], None)
    assert run(q[:, :0], q, q, None).shape == (2, 0, 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(dtype: torch.dtype, masked: bool) -> None:
    q, k = torch.randn(2, 3, 2, 4).to(dtype), torch.randn(2, 5, 2, 4).to(dtype)
    torch.library.opcheck(torch.ops.textok_fast.attention.default, (q, k, k + 1, torch.rand(2, 5) < 0.8 if masked else None))


@pytest.mark.slow
@pytest.mark.skipif(bool(ISA), reason="one instruction set is forced already")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(isa: str) -> None:
    if isa not in ["baseline", "avx2", "avx512"][: ["baseline", "avx2", "avx512"].index(_native.load().info["kernels"]) + 1]:
        pytest.skip(f"this processor has no {isa}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(Path(__file__).resolve())]
    done = subprocess.run(command, env={**os.environ, "TEXTOK_ISA": isa}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
