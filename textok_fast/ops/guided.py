"""Guidance and the sampler's update in one pass over the samples. Backends: ``native`` (csrc: CPU, CUDA), ``triton``,
``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.ops.dispatch import REFERENCE, choose, describe, needs_gradient, one_device, register
from textok_fast.ops.library import define, has_native, library, native_runs_on, triton_runs_on

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels; the reference also takes float64
COLUMNS = 8  # of a table's row: scale, kx, km, a, b, low and high log-variance, noise factor


def guided_step_reference(
    output: Tensor,
    x: Tensor,
    table: Tensor,
    index: Tensor,
    noise: Tensor | None = None,
    *,
    guided_channels: int | None = None,
    clip_denoised: bool = False,
) -> Tensor:
    """:func:`guided_step` in PyTorch."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    dim, batch = _channel_dim(x), x.shape[0]
    channels = x.shape[dim]
    # Nothing here reads the device: the row is gathered, and one out of range becomes a row of NaN.
    index = index.reshape(1)
    valid = (index >= 0) & (index < table.shape[0])  # (1,)
    row = table.index_select(0, index.clamp(0, table.shape[0] - 1))[0].to(work)  # (8,)
    scale, kx, km, a, b, low, high, factor = torch.where(valid, row, torch.nan).unbind()

    output = output.to(work)
    prediction = conditional = output[:batch]  # (B, ...), with a learned variance twice the channels
    if output.shape[0] != batch:
        guided = channels if guided_channels is None else guided_channels
        c, u = conditional.narrow(dim, 0, guided), output[batch:].narrow(dim, 0, guided)
        prediction = torch.cat((u + scale * (c - u), conditional.narrow(dim, guided, channels - guided)), dim)
    prediction = prediction.narrow(dim, 0, channels)  # x's shape

    current = x.to(work)
    x0 = kx * current + km * prediction
    if clip_denoised:
        x0 = x0.clamp(-1, 1)
    result = a * x0 + b * current
    if noise is not None:
        log_variance = high
        if conditional.shape[dim] != channels:
            fraction = (conditional.narrow(dim, channels, channels) + 1) / 2  # x's shape
            log_variance = fraction * high + (1 - fraction) * low
        term = factor * torch.exp(0.5 * log_variance) * noise.to(work)
        result = result + torch.where(factor == 0, 0.0, term)  # where, since 0 * NaN is not 0
    return result.to(x.dtype)


def guided_step(
    output: Tensor,
    x: Tensor,
    table: Tensor,
    index: Tensor,
    noise: Tensor | None = None,
    *,
    guided_channels: int | None = None,
    clip_denoised: bool = False,
) -> Tensor:
    """One sampling step: classifier-free guidance (arXiv 2207.12598) and the update of DDPM, DDIM or Euler.

    A row of ``table`` holds guidance scale s, kx, km, a, b, low and high log-variance, and the noise factor n
    (:func:`textok_fast.diffusion.sampler_program` makes it). With c and u the two halves of ``output``:

        m = u + s (c - u) in the first ``guided_channels`` channels, c in the others; without a pair m = output
        x0 = kx x + km m, with ``clip_denoised`` clamped to [-1, 1]
        result = a x0 + b x + n exp(lv / 2) noise
        lv = f high + (1 - f) low with f = (w + 1) / 2, w the second C channels of c, if there are 2C; else lv = high

    ``index`` is read on the device, so that a captured loop can advance it; one outside the table makes the result NaN.
    Arithmetic is in float32 (float64 for float64 ``x``). The fused backends have no gradient.

    Args:
        output: (B, ...) or, as a guidance pair with the conditional half first, (2B, ...); C or 2C channels; float.
        x: (B, N, C) tokens or (B, C, H, W) images, float.
        table: (T, 8) float32.
        index: one int64, of any shape with one element.
        noise: as ``x``, float; None leaves the noise term out, and so does n = 0.
        guided_channels: how many channels are guided; None is all of x's.

    Returns: the next x, contiguous, of its shape and dtype.
    Raises: InputError for shapes and dtypes that do not belong together.
    """
    channels = x.shape[_channel_dim(x)]
    guided = channels if guided_channels is None else guided_channels
    _check(output, x, table, index, noise, guided)
    backend = choose("guided_step", output, x, noise, table, index, guided, clip_denoised)
    if backend == REFERENCE:
        return guided_step_reference(output, x, table, index, noise, guided_channels=guided, clip_denoised=clip_denoised)
    return library(backend).guided_step(output, x, noise, table, index, guided, clip_denoised)


def _channel_dim(x: Tensor) -> int:
    if x.ndim not in (3, 4):
        raise InputError(f"x must be (B, N, C) or (B, C, H, W), got {tuple(x.shape)}")
    return 2 if x.ndim == 3 else 1


def _check(output: Tensor, x: Tensor, table: Tensor, index: Tensor, noise: Tensor | None, guided: int) -> None:
    dim = _channel_dim(x)
    batch, channels = x.shape[0], x.shape[dim]
    rest = x.shape[1:dim] + x.shape[dim + 1 :]
    if (
        output.ndim != x.ndim
        or output.shape[0] not in (batch, 2 * batch)
        or output.shape[dim] not in (channels, 2 * channels)
        or output.shape[1:dim] + output.shape[dim + 1 :] != rest
    ):
        raise InputError(
            f"output must be as x, {tuple(x.shape)}, with once or twice its samples and channels, got {tuple(output.shape)}"
        )
    if noise is not None and noise.shape != x.shape:
        raise InputError(f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(noise.shape)}")
    for name, tensor in (("output", output), ("x", x), ("noise", noise)):
        if tensor is not None and not tensor.is_floating_point():
            raise InputError(f"{name} must be float, got {tensor.dtype}")
    if table.dtype != torch.float32 or table.ndim != 2 or table.shape[0] < 1 or table.shape[1] != COLUMNS:
        raise InputError(f"table must be float32 (T, {COLUMNS}), got {describe(table)}")
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.numel() != 1:
        got = describe(index) if isinstance(index, Tensor) else repr(index)
        raise InputError(f"index must be a tensor of one int64, got {got}")
    if not 0 <= guided <= channels:
        raise InputError(f"cannot guide the first {guided} of {channels} channels")


# -- choice ------------------------------------------------------------------------------------------------------------------


def _native_rule(output: Tensor, x: Tensor, noise: Tensor | None, table: Tensor, index: Tensor, *options: int) -> str:
    if not has_native("guided_step"):
        return "the native library is not loaded"
    if reason := native_runs_on(x):
        return reason
    state = FLOAT_DTYPES if x.is_cuda else (torch.float32, torch.bfloat16)  # no sampler keeps its state in float16 on a CPU
    if output.dtype not in FLOAT_DTYPES or any(tensor is not None and tensor.dtype not in state for tensor in (x, noise)):
        return f"it takes float32 and bfloat16 (float16: output, on CUDA all), got {describe(output)} and {describe(x)}"
    return _common_rule(output, x, noise, table, index)


def _triton_rule(output: Tensor, x: Tensor, noise: Tensor | None, table: Tensor, index: Tensor, *options: int) -> str:
    if reason := triton_runs_on(x):
        return reason
    if any(tensor is not None and tensor.dtype not in FLOAT_DTYPES for tensor in (output, x, noise)):
        return f"it takes float32, bfloat16 and float16, got {describe(output)} and {describe(x)}"
    if x.numel() < 1 or output.numel() > 2**30:
        return f"it takes 1 to 2**30 elements, got {describe(output)}"
    return _common_rule(output, x, noise, table, index)


def _common_rule(output: Tensor, x: Tensor, noise: Tensor | None, table: Tensor, index: Tensor) -> str:
    if needs_gradient(output, x, noise, table):
        return "it has no gradient; call it under torch.no_grad()"
    return "" if one_device(x, output, noise, table, index) else "the tensors lie on different devices"


def _on_gpu(output: Tensor, *others: object) -> str:
    return "" if output.is_cuda else "interpreted kernels only check numbers"


register("guided_step", "native", _native_rule)
register("guided_step", "triton", _triton_rule, default=_on_gpu)


# -- torch.library -----------------------------------------------------------------------------------------------------------


def _fake(
    output: Tensor, x: Tensor, noise: Tensor | None, table: Tensor, index: Tensor, guided_channels: int, clip_denoised: bool
) -> Tensor:
    return x.new_empty(x.shape)


define(
    "guided_step",
    "(Tensor output, Tensor x, Tensor? noise, Tensor table, Tensor index, int guided_channels, bool clip_denoised) -> Tensor",
    _fake,
)
