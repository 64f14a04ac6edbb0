"""The C++ kernels of guided_step on the CPU, against the formula in float64."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from textok_fast import ops
from textok_fast.ops.dispatch import use_backend
from textok_fast.ops.library import has_native, library

pytestmark = pytest.mark.skipif(not has_native("guided_step"), reason="the native library is not built")

X_DTYPES = [torch.float32, torch.bfloat16]
OUTPUT_DTYPES = [*X_DTYPES, torch.float16]
EXAMPLES = 30 if "TEXTOK_ISA" in os.environ else 150


def formula(
    output: Tensor, x: Tensor, noise: Tensor | None, row: Tensor, guided: int, clip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64 and the sum of the magnitudes that were added, both of x's shape."""
    s, kx, km, a, b, low, high, n = row.double().tolist()
    axis = -1 if x.ndim == 3 else 1
    channels, batch = x.shape[axis], x.shape[0]
    out = np.moveaxis(output.double().numpy(), axis, -1)
    current = np.moveaxis(x.double().numpy(), axis, -1)
    c, m = out[:batch], out[:batch, ..., :channels].copy()
    size = np.abs(m)
    if len(out) != batch:
        u = out[batch:, ..., :guided]
        m[..., :guided] = u + s * (m[..., :guided] - u)
        size[..., :guided] = np.abs(u) + abs(s) * (size[..., :guided] + np.abs(u))
    x0 = kx * current + km * m
    size = abs(kx) * np.abs(current) + abs(km) * size
    if clip:
        x0 = np.clip(x0, -1, 1)
    result, size = a * x0 + b * current, abs(a) * size + abs(b) * np.abs(current)
    if noise is not None and n != 0:
        log_variance: np.ndarray | float = high
        exponent: np.ndarray | float = abs(high)
        if c.shape[-1] != channels:
            f = (c[..., channels:] + 1) / 2
            log_variance = f * high + (1 - f) * low
            exponent = np.abs(f) * abs(high) + np.abs(1 - f) * abs(low)
        term = n * np.exp(log_variance / 2) * np.moveaxis(noise.double().numpy(), axis, -1)
        result, size = result + term, size + np.abs(term) * (2 + exponent)  # the exponent's rounding counts by its size
    return np.moveaxis(result, -1, axis), np.moveaxis(size, -1, axis)


def check(output: Tensor, x: Tensor, noise: Tensor | None, table: Tensor, index: int, guided: int, clip: bool) -> None:
    result = library("native").guided_step(output, x, noise, table, torch.tensor([index]), guided, clip)
    assert result.shape == x.shape and result.dtype == x.dtype and result.is_contiguous()
    wanted, size = formula(output, x, noise, table[index], guided, clip)
    rounding = 0 if x.dtype == torch.float32 else 2.0**-8
    bound = 8 * 2.0**-24 * size + rounding * np.abs(wanted) + 1e-30
    assert (np.abs(result.double().numpy() - wanted) <= bound).all()


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    st.sampled_from([3, 4]),
    st.integers(0, 3),
    st.integers(1, 20),
    st.integers(1, 7),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from(["none", "float32", "bfloat16"]),
    st.booleans(),
    st.sampled_from(X_DTYPES),
    st.sampled_from(OUTPUT_DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_random(
    dims: int,
    batch: int,
    channels: int,
    length: int,
    halves: int,
    kinds: int,
    part: float,
    clip: bool,
    noisy: str,
    without_factor: bool,
    x_dtype: torch.dtype,
    output_dtype: torch.dtype,
    strided: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(samples: int, channels: int, dtype: torch.dtype) -> Tensor:
        shape = (samples, length, channels) if dims == 3 else (samples, channels, length, length + 1)
        values = torch.randn(shape, generator=generator)
        if strided:  # channels last where they are first, and the reverse
            values = values.movedim(1, -1).contiguous().movedim(-1, 1)
        return values.to(dtype)

    x = draw(batch, channels, x_dtype)
    output = draw(halves * batch, kinds * channels, output_dtype)
    noise = None if noisy == "none" else draw(batch, channels, getattr(torch, noisy))
    table = torch.randn(5, 8, generator=generator)
    table[:, 5:7] = 8 * table[:, 5:7] - 4  # logarithms of variances
    if without_factor:
        table[:, 7] = 0
    check(output, x, noise, table, 3, round(part * channels), clip)


@pytest.mark.parametrize("shape", [(64, 32, 16), (8, 4, 64, 64), (1, 256, 8)])
@pytest.mark.parametrize("kinds", [1, 2])
def test_sizes_of_the_models(shape: tuple[int, ...], kinds: int) -> None:
    axis = 2 if len(shape) == 3 else 1
    wide = list(shape)
    wide[0], wide[axis] = 2 * wide[0], kinds * wide[axis]
    x, noise, output, table = torch.randn(shape), torch.randn(shape), torch.randn(wide), torch.randn(2, 8)
    check(output, x, noise, table, 1, 3, True)
    threads = torch.get_num_threads()
    arguments = (output.bfloat16(), x, noise, table, torch.tensor(0), 3, False)
    one = library("native").guided_step(*arguments)
    try:
        torch.set_num_threads(3)
        assert torch.equal(library("native").guided_step(*arguments), one)
    finally:
        torch.set_num_threads(threads)


def row(km: float = 0, a: float = 0, high: float = 0, n: float = 0) -> Tensor:
    """A table of one step; s = 1, the other coefficients 0."""
    return torch.tensor([[1, 0, km, a, 0, 0, high, n]], dtype=torch.float32)


def test_exponential() -> None:
    """n exp(lv / 2) noise with lv from -300 to 300, through overflow, subnormal numbers and 0."""
    exponents = torch.arange(-300, 301)
    output = torch.stack((torch.zeros(601), 2.0 * exponents - 1), dim=-1).unsqueeze(0)  # (1, 601, 2): f = exponents
    x = torch.zeros(1, 601, 1)
    result = library("native").guided_step(output, x, x + 1, row(high=1, n=1), torch.tensor(0), 1, False)
    wanted = np.exp(exponents.numpy() / 2)
    with np.errstate(over="ignore"):
        rounded = wanted.astype(np.float32)
    np.testing.assert_allclose(result.flatten().numpy(), rounded, rtol=4e-7, atol=3e-45)
    for high in (-30.0, 3.0):
        fixed = library("native").guided_step(x, x, x + 1, row(high=high, n=1), torch.tensor(0), 1, False)
        np.testing.assert_allclose(fixed.numpy(), np.exp(high / 2), rtol=4e-7)


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES)
def test_every_16_bit_number_is_read_exactly(dtype: torch.dtype) -> None:
    bits = torch.arange(-32768, 32768).to(torch.int16)
    numbers = bits.float() / 77 if dtype == torch.float32 else bits.view(dtype)
    for values in (numbers.reshape(1, 16, 4096), numbers[: 13 * 5041].reshape(1, 5041, 13)):  # rows that end within a vector
        x = torch.zeros(values.shape)
        result = library("native").guided_step(values, x, None, row(km=1, a=1), torch.tensor(0), 0, False)
        assert torch.equal(result.nan_to_num(nan=12345), values.float().nan_to_num(nan=12345))
        paired = torch.cat((values, values))  # guidance changes only the first two of each row
        result = library("native").guided_step(paired, x, None, row(km=1, a=1), torch.tensor(0), 2, False)
        assert torch.equal(result[..., 2:].nan_to_num(nan=12345), values[..., 2:].float().nan_to_num(nan=12345))


@pytest.mark.parametrize("x_dtype", X_DTYPES)
@pytest.mark.parametrize("index", [-1, 2, 2**40, -(2**63)])
def test_a_step_outside_the_table_is_nan(index: int, x_dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5).to(x_dtype)
    for noise in (None, x):
        for clip in (False, True):
            result = library("native").guided_step(x, x, noise, torch.zeros(2, 8), torch.tensor(index), 5, clip)
            assert result.isnan().all()


def test_nan_and_infinity() -> None:
    x = torch.zeros(1, 6, 3)
    output = torch.zeros(1, 6, 6)
    output[0, 0, 0], output[0, 1, 0], output[0, 2, 0] = torch.nan, torch.inf, -torch.inf
    output[0, 3, 3], output[0, 4, 3] = torch.nan, torch.inf
    noise = torch.ones_like(x)
    noise[0, 5] = torch.nan
    step = library("native").guided_step
    table = torch.tensor([[1.0, 0, 1, 1, 0, -2, 2, 1], [1, 0, 1, 1, 0, -2, 2, 0]])  # w = 0: lv = 0
    result = step(output, x, noise, table, torch.tensor(0), 3, True)[0, :, 0]
    assert result.isnan().tolist() == [True, False, False, True, False, True]
    assert result[1:3].tolist() == pytest.approx([2, 0]) and result[4] == torch.inf
    # Without a factor neither the noise nor the variance is looked at.
    quiet = step(output, x, noise, table, torch.tensor(1), 3, True)[0, :, 0]
    assert quiet[0].isnan() and quiet[1:].tolist() == [1, -1, 0, 0, 0]


def test_tables_and_steps_that_are_views() -> None:
    x, output = torch.randn(2, 3, 4), torch.randn(4, 3, 4)
    wide, steps = torch.randn(6, 16), torch.tensor([9, 2, 9])
    result = library("native").guided_step(output, x, None, wide[::2, 4:12], steps[1:2].reshape(1, 1), 4, False)
    wanted, _ = formula(output, x, None, wide[4, 4:12], 4, False)
    np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_public_function() -> None:
    x, output, noise, table = torch.randn(2, 3, 4), torch.randn(4, 3, 8), torch.randn(2, 3, 4), torch.randn(3, 8)
    with use_backend(guided_step="native"):
        result = ops.guided_step(output, x, table, torch.tensor(1), noise, guided_channels=3, clip_denoised=True)
    wanted, _ = formula(output, x, noise, table[1], 3, True)
    np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_what_the_kernels_do_not_take_is_refused() -> None:
    step, x, table, index = library("native").guided_step, torch.randn(2, 3, 4), torch.randn(3, 8), torch.tensor(1)
    with pytest.raises(RuntimeError, match="output must be as x"):
        step(torch.randn(3, 3, 4), x, None, table, index, 4, False)
    with pytest.raises(RuntimeError, match="output must be as x"):
        step(torch.randn(2, 6, 4), x, None, table, index, 4, False)
    with pytest.raises(RuntimeError, match="noise must have x's shape"):
        step(x, x, x[:1], table, index, 4, False)
    with pytest.raises(RuntimeError, match=r"table must be \(T, 8\)"):
        step(x, x, None, table[:, :7], index, 4, False)
    with pytest.raises(RuntimeError, match="index must have one element"):
        step(x, x, None, table, torch.tensor([1, 2]), 4, False)
    with pytest.raises(RuntimeError, match="guided_channels must be 0 to 4"):
        step(x, x, None, table, index, 5, False)
    with pytest.raises(RuntimeError, match="x has the dtype"):
        step(x, x.half(), None, table, index, 4, False)
    with pytest.raises(RuntimeError, match="x must be"):
        step(x[0], x[0], None, table, index, 4, False)


@pytest.mark.parametrize("noisy", [False, True])
def test_opcheck(noisy: bool) -> None:
    x, output = torch.randn(2, 3, 4), torch.randn(4, 3, 8).bfloat16()
    arguments = (output, x, torch.randn_like(x) if noisy else None, torch.randn(3, 8), torch.tensor(1), 3, True)
    torch.library.opcheck(torch.ops.textok_fast.guided_step.default, arguments)
