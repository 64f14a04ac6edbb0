"""The Triton kernel of a sampling step against float64: interpreted, or on a GPU where there is one."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_guided import STATES, TOLERANCE, check_compiled, check_index, check_nan, make, variants

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops import dispatch
from textok_fast.ops.library import has_native_cuda

pytest.importorskip("triton")

FLOATS = [dtype for dtype in TOLERANCE if dtype != torch.float64]


@pytest.fixture(autouse=True)
def _triton(device: torch.device) -> None:
    reason = dispatch.load_backend("triton")
    if reason:
        pytest.skip(reason)


def test_every_kind_of_step(device: torch.device) -> None:
    for options, row in zip(variants(), itertools.cycle(range(3)), strict=False):
        case = make(**options, row=row, device=device)
        case.check(torch.ops.textok_fast_triton.guided_step(*case.positional()))


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS, repeat=3)))
def test_dtypes(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], device: torch.device) -> None:
    case = make((2, 3, 4), guided=3, dtypes=dtypes, device=device)
    case.check(torch.ops.textok_fast_triton.guided_step(*case.positional()))


# One channel and many, one element and several blocks.
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 77, 7), (1, 40, 33), (2, 1, 5, 3), (3, 5, 11, 9), (2, 4, 16, 16)])
def test_shapes(shape: tuple[int, ...], device: torch.device) -> None:
    for pair, learned in itertools.product((False, True), repeat=2):
        case = make(shape, pair=pair, learned=learned, guided=1, device=device)
        case.check(torch.ops.textok_fast_triton.guided_step(*case.positional()))


def test_layouts(device: torch.device) -> None:
    case = make((3, 4, 5, 6), device=device)
    case.output = case.output.to(memory_format=torch.channels_last)
    assert case.noise is not None
    case.x, case.noise = case.x.transpose(0, 1).contiguous().transpose(0, 1), case.noise[:1].expand(case.x.shape)
    case.table = torch.cat([case.table, case.table], 1)[:, :8]
    case.check(torch.ops.textok_fast_triton.guided_step(*case.positional()))


def test_index_and_nan(device: torch.device) -> None:
    with ops.use_backend(guided_step="triton"):
        check_index(make((2, 3, 4), device=device))
        check_nan(make((2, 4, 1, 3), device=device))


def test_operation_is_sound(device: torch.device) -> None:
    for case in (make((2, 3, 4), device=device), make((2, 4, 1, 3), learned=False, noise=False, device=device)):
        torch.library.opcheck(torch.ops.textok_fast_triton.guided_step, case.positional())


def test_compiled_in_one_graph(device: torch.device) -> None:
    with ops.use_backend("triton"):
        check_compiled(make((2, 3, 4), device=device))


def test_what_the_kernel_does_not_take(device: torch.device) -> None:
    case = make((2, 3, 4), device=device)
    with ops.use_backend(guided_step="triton"):
        case.x.requires_grad_()
        with pytest.raises(InputError, match="it has no gradient"):
            case.run()
        case.x = case.x.detach().double()
        with pytest.raises(InputError, match="it takes float32, bfloat16 and float16, got .* and .* float64"):
            case.run()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [(1, 32, 16), (64, 32, 16), (8, 256, 8), (16, 4, 64, 64), (2, 3, 255, 257)])
@pytest.mark.parametrize("dtypes", STATES)
def test_on_a_gpu(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    backends = ["triton", "native"] if has_native_cuda() else ["triton"]
    for options, row in itertools.product(variants(), range(3)):
        case = make(**{**options, "shape": shape, "guided": options["guided"] and 3}, row=row, dtypes=dtypes, device="cuda")
        for backend in backends:
            with ops.use_backend(guided_step=backend):
                case.check(case.run())
