"""One sampling step: PyTorch against NumPy element by element. Kernels: test_native_guided, test_triton_guided."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops import dispatch
from textok_fast.ops.guided import guided_step, guided_step_reference
from textok_fast.ops.library import has_native

# (n, low, high) of the noise, and all others as a sampler's table could have them.
TABLE = [
    [3.0, 1.3, -0.8, 0.6, 0.35, -3.0, -1.0, 1.0],
    [1.0, 17.0, -16.9, 0.05, 0.9, -0.5, -0.2, 0.5],
    [1.5, 0.0, 1.0, 0.9, 0.1, -9.0, -2.0, 0.0],
]
# Half a unit in the last place of the result, after arithmetic in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

# Of output, x and noise.
STATES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
]


@dataclass
class Case:
    """Arguments of a step."""

    output: Tensor
    x: Tensor
    table: Tensor
    index: Tensor
    noise: Tensor | None
    guided: int | None
    clip: bool

    def positional(self) -> tuple[Any, ...]:
        """As the operation itself takes them."""
        channels = self.x.shape[2 if self.x.ndim == 3 else 1]
        guided = channels if self.guided is None else self.guided
        return self.output, self.x, self.noise, self.table, self.index, guided, self.clip

    def run(self) -> Tensor:
        return guided_step(
            self.output, self.x, self.table, self.index, self.noise, guided_channels=self.guided, clip_denoised=self.clip
        )

    def check(self, found: Tensor) -> None:
        """Against the reference in float64, to the precision of x."""
        noise = None if self.noise is None else self.noise.double()
        options = {"guided_channels": self.guided, "clip_denoised": self.clip}
        exact = guided_step_reference(self.output.double(), self.x.double(), self.table, self.index, noise, **options)
        assert found.dtype == self.x.dtype and found.shape == self.x.shape and found.is_contiguous()
        tolerance = TOLERANCE[self.x.dtype]
        size = 17 * max(1.0, self.x.abs().max().item())  # kx, which the result is far smaller than
        small = 4e-7 * size if self.x.dtype in (torch.float32, torch.float64) else 0.0
        torch.testing.assert_close(found.double(), exact, atol=tolerance + small, rtol=tolerance)


def make(
    shape: tuple[int, ...],
    pair: bool = True,
    learned: bool = True,
    noise: bool = True,
    guided: int | None = None,
    clip: bool = False,
    row: int = 0,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3,
    device: torch.device | str = "cpu",
) -> Case:
    """``dtypes`` of output, x and noise."""
    dim = 2 if len(shape) == 3 else 1
    wide = list(shape)
    wide[0] *= 2 if pair else 1
    wide[dim] *= 2 if learned else 1
    return Case(
        torch.randn(wide, device=device).to(dtypes[0]),
        torch.randn(shape, device=device).to(dtypes[1]),
        torch.tensor(TABLE, device=device),
        torch.tensor([row], device=device),
        torch.randn(shape, device=device).to(dtypes[2]) if noise else None,
        guided,
        clip,
    )


def variants() -> Iterator[dict[str, Any]]:
    """Every combination of what a step can have."""
    shapes = ((3, 5, 4), (2, 4, 3, 5))
    for shape, pair, learned, noise, clip in itertools.product(shapes, *[(False, True)] * 4):
        for guided in (None, 3) if pair else (None,):
            yield {"shape": shape, "pair": pair, "learned": learned, "noise": noise, "guided": guided, "clip": clip}


def by_element(case: Case) -> np.ndarray:
    """The definition, one number after the other."""
    output, x, table = case.output.numpy(), case.x.numpy(), case.table.double().numpy()
    s, kx, km, a, b, low, high, n = table[case.index.item()]
    dim = 2 if x.ndim == 3 else 1
    channels, batch = x.shape[dim], x.shape[0]
    guided = channels if case.guided is None else case.guided
    result = np.empty(x.shape)
    for place in np.ndindex(x.shape):
        m = c = output[place]
        if output.shape[0] != batch and place[dim] < guided:
            u = output[(place[0] + batch, *place[1:])]
            m = u + s * (c - u)
        x0 = kx * x[place] + km * m
        if case.clip:
            x0 = min(max(x0, -1.0), 1.0)
        result[place] = a * x0 + b * x[place]
        if case.noise is not None:
            log_variance = high
            if output.shape[dim] != channels:
                w = list(place)
                w[dim] += channels
                fraction = (output[tuple(w)] + 1) / 2
                log_variance = fraction * high + (1 - fraction) * low
            result[place] += n * math.exp(log_variance / 2) * case.noise.numpy()[place]
    return result


def test_against_the_definition() -> None:
    for options, row in itertools.product(variants(), range(3)):
        case = make(**options, row=row, dtypes=(torch.float64,) * 3)
        np.testing.assert_allclose(case.run().numpy(), by_element(case), rtol=1e-12, atol=1e-12)


def test_arithmetic_is_float32_and_the_result_as_x() -> None:
    case = make((2, 3, 4), dtypes=(torch.bfloat16, torch.bfloat16, torch.float32))
    wide = replace(case, output=case.output.float(), x=case.x.float())
    assert torch.equal(guided_step_reference(*_named(case)), guided_step_reference(*_named(wide)).bfloat16())


def _named(case: Case) -> tuple[Any, ...]:
    return case.output, case.x, case.table, case.index, case.noise


def check_index(case: Case) -> None:
    """Nothing but a row of the table gives numbers; the last row adds no noise, not even one that is NaN."""
    for index in (-1, 3, -(2**40), 2**40, 2**32):
        outside = replace(case, index=torch.tensor(index, device=case.x.device))
        assert outside.run().isnan().all()
    last = replace(case, index=torch.tensor([[2]], device=case.x.device))
    assert torch.equal(last.run(), replace(last, noise=None).run())
    if case.noise is not None:
        assert torch.equal(replace(last, noise=case.noise * torch.nan).run(), last.run())


def check_nan(case: Case) -> None:
    """A NaN in x or in the output stays at its place, also through clamping."""
    clipped = replace(case, clip=True, noise=None)
    assert clipped.run().isfinite().all()
    for tensor in (clipped.x, clipped.output):
        tensor.view(-1)[1] = torch.nan
        found = clipped.run().view(-1)
        assert found[1].isnan() and found.isnan().sum() == 1
        tensor.view(-1)[1] = 0.0


def test_index_and_nan() -> None:
    with ops.use_backend(guided_step="reference"):
        check_index(make((2, 3, 4)))
        check_nan(make((2, 4, 1, 3)))


def test_gradient() -> None:
    case = make((2, 3, 4), dtypes=(torch.float64,) * 3)

    def step(output: Tensor, x: Tensor) -> Tensor:
        return guided_step(output, x, case.table, case.index, case.noise, guided_channels=3)

    assert torch.autograd.gradcheck(step, (case.output.requires_grad_(), case.x.requires_grad_()))


def test_what_does_not_fit_is_refused() -> None:
    case = make((2, 3, 4))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"x": torch.randn(2, 4)}, r"x must be \(B, N, C\) or \(B, C, H, W\), got \(2, 4\)"),
        ({"output": torch.randn(4, 3, 12)}, r"output must be as x, \(2, 3, 4\), with once or twice .* got \(4, 3, 12\)"),
        ({"output": torch.randn(3, 3, 4)}, "output must be as x"),
        ({"output": torch.randn(2, 6, 4)}, "output must be as x"),
        ({"output": torch.randn(2, 4)}, "output must be as x"),
        ({"noise": torch.randn(4, 3, 4)}, r"noise must have the shape of x, \(2, 3, 4\), got \(4, 3, 4\)"),
        ({"noise": torch.ones(2, 3, 4, dtype=torch.int32)}, "noise must be float, got torch.int32"),
        ({"table": torch.zeros(3, 8, dtype=torch.float64)}, r"table must be float32 \(T, 8\), got cpu float64"),
        ({"table": torch.zeros(0, 8)}, r"table must be float32 \(T, 8\)"),
        ({"table": torch.zeros(8)}, r"table must be float32 \(T, 8\)"),
        ({"index": torch.tensor([0, 1])}, r"index must be a tensor of one int64, got cpu int64 \(2,\)"),
        ({"index": 1}, "index must be a tensor of one int64, got 1"),
        ({"index": torch.tensor(0, dtype=torch.int32)}, "index must be a tensor of one int64"),
        ({"guided": 5}, "cannot guide the first 5 of 4 channels"),
        ({"guided": -1}, "cannot guide the first -1 of 4 channels"),
    ]
    for change, message in wrong:
        with pytest.raises(InputError, match=message):
            replace(case, **change).run()


# -- choice ------------------------------------------------------------------------------------------------------------------


def check_compiled(case: Case) -> None:
    def step(output: Tensor, x: Tensor, table: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        return guided_step(output, x, table, index, noise, guided_channels=3)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        replace(case, guided=3).check(compiled(*_named(case)))


def test_compiled_in_one_graph() -> None:
    with ops.use_backend("reference"):
        check_compiled(make((2, 3, 4)))
    torch.compiler.reset()
    check_compiled(make((2, 3, 4)))


def test_exported_as_standard_operators() -> None:
    class Step(torch.nn.Module):
        def forward(self, output: Tensor, x: Tensor, table: Tensor, index: Tensor, noise: Tensor) -> Tensor:
            return guided_step(output, x, table, index, noise)

    program = torch.export.export(Step(), _named(make((2, 3, 4))))
    assert "textok" not in str(program.graph)


def test_choice_on_the_cpu() -> None:
    wanted = "native" if has_native("guided_step") else "reference"
    case = make((2, 3, 4))
    for dtypes in STATES:
        assert dispatch.choose("guided_step", *make((2, 3, 4), dtypes=dtypes).positional()) == wanted
    others = [replace(case, x=case.x.double()), replace(case, x=case.x.half()), replace(case, x=case.x.requires_grad_())]
    for other in others:
        assert dispatch.choose("guided_step", *other.positional()) == "reference"
