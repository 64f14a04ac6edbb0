"""The Triton kernels of patches against PyTorch: interpreted, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from test_patches import FLOATS, VIEWS, both, halves, pictures
from torch import Tensor

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops import dispatch
from textok_fast.ops.patches import (
    patchify_uint8,
    patchify_uint8_reference,
    unpatchify_uint8,
    unpatchify_uint8_reference,
)

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _triton(device: torch.device) -> None:
    reason = dispatch.load_backend("triton")
    if reason:
        pytest.skip(reason)


def check_patchify(images: Tensor, patch: int, dtype: torch.dtype) -> None:
    found = torch.ops.textok_fast_triton.patchify_uint8(images, patch, dtype)
    assert found.is_contiguous() and torch.equal(found, patchify_uint8_reference(images, patch, dtype))


def check_unpatchify(patches: Tensor, patch: int, rows: int) -> None:
    found = torch.ops.textok_fast_triton.unpatchify_uint8(patches, patch, rows)
    assert found.is_contiguous() and torch.equal(found, unpatchify_uint8_reference(patches, patch, rows))


# Sides that blocks divide and do not, one block and several, patches that are powers of two and are not.
SIZES = [(8, 12, 4), (7, 21, 7), (3, 5, 1), (32, 32, 16), (2, 600, 2), (34, 17, 17)]


@pytest.mark.parametrize(("height", "width", "patch"), SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sizes(height: int, width: int, patch: int, dtype: torch.dtype, device: torch.device) -> None:
    check_patchify(pictures(2, height, width).to(device), patch, dtype)
    patches = torch.randn(2, height // patch * (width // patch), 3 * patch**2, device=device)
    check_unpatchify((0.8 * patches).to(dtype), patch, height // patch)


@pytest.mark.parametrize("view", VIEWS)
def test_layouts_of_pictures(view: str, device: torch.device) -> None:
    check_patchify(VIEWS[view](pictures(3, 8, 12).to(device)), 4, torch.float32)


def test_layouts_of_patches(device: torch.device) -> None:
    patches = torch.randn(2, 12, 6, device=device)
    check_unpatchify(patches.transpose(1, 2), 2, 3)
    check_unpatchify(torch.randn(1, 6, 14, device=device)[..., 1:13], 2, 3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding(dtype: torch.dtype, device: torch.device) -> None:
    check_unpatchify(halves().to(device, dtype), 1, 257)


def test_every_byte(device: torch.device) -> None:
    images = torch.arange(256, dtype=torch.uint8, device=device).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    for dtype in FLOATS:
        check_patchify(images, 8, dtype)
        with ops.use_backend(patchify_uint8="triton", unpatchify_uint8="triton"):
            assert torch.equal(unpatchify_uint8(patchify_uint8(images, 8, dtype), 8), images)


def test_operations_are_sound(device: torch.device) -> None:
    library = torch.ops.textok_fast_triton
    torch.library.opcheck(library.patchify_uint8, (pictures(2, 4, 6).to(device).transpose(1, 2), 2, torch.bfloat16))
    torch.library.opcheck(library.unpatchify_uint8, (torch.randn(2, 6, 12, device=device), 2, 2))


def test_compiled_in_one_graph(device: torch.device) -> None:
    images = pictures(2, 4, 6).to(device)
    with ops.use_backend("triton"):
        assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(images), images)


def test_what_the_kernels_do_not_take(device: torch.device) -> None:
    with ops.use_backend(patchify_uint8="triton"), pytest.raises(InputError, match="bfloat16 and float16, got torch.float64"):
        patchify_uint8(pictures(1, 4, 4).to(device), 2, torch.float64)
    with ops.use_backend(unpatchify_uint8="triton"), pytest.raises(InputError, match=r"it takes 1 to 2\*\*30 elements, got 0"):
        unpatchify_uint8(torch.zeros(0, 4, 12, device=device), 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("batch", "size", "patch"), [(1, 256, 8), (64, 256, 16), (3, 512, 16), (2, 224, 14)])
def test_on_a_gpu(batch: int, size: int, patch: int) -> None:
    images = pictures(batch, size, size).cuda()
    for dtype in FLOATS:
        assert dispatch.choose("patchify_uint8", images, patch, dtype) == "triton"
        patches = patchify_uint8(images, patch, dtype)
        assert torch.equal(patches, patchify_uint8_reference(images, patch, dtype))
        assert torch.equal(unpatchify_uint8(patches, patch), images)
        for view in VIEWS.values():
            check_patchify(view(images), patch, dtype)
        check_unpatchify((0.8 * torch.randn(patches.shape, device="cuda")).to(dtype), patch, size // patch)
