"""Patches: PyTorch against NumPy, and what is checked. Kernels: test_native_patches, test_triton_patches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops import dispatch
from textok_fast.ops.library import has_native
from textok_fast.ops.patches import (
    patchify_uint8,
    patchify_uint8_reference,
    unpatchify_uint8,
    unpatchify_uint8_reference,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)


def halves() -> Tensor:
    """Numbers as near as float32 has them to the middle between two bytes, and those that are no byte. (1, 257, 3)."""
    middles = (2 * torch.arange(257, dtype=torch.float64) - 1) / 255 - 1
    middles[-1] = 0.0  # 127.5 exactly
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.5, -1.5, 1e30], dtype=torch.float64)
    numbers = torch.cat([middles, special, torch.linspace(-1.2, 1.2, 257 * 3 - 263, dtype=torch.float64)])
    return numbers.float().reshape(1, 257, 3)


# Layouts of pictures, (B, H, W, 3) -> the same.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda images: images,
    "channels first": lambda images: images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "crop": lambda images: F.pad(images, (0, 0, 5, 3, 2, 1))[:, 2:-1, 5:-3],
    "transposed": lambda images: images.transpose(1, 2).contiguous().transpose(1, 2),
    "one picture": lambda images: images[:1].expand(images.shape),
    "alpha dropped": lambda images: F.pad(images, (0, 1))[..., :3],
}


# -- patchify and unpatchify -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "patch", "channels"), [(8, 2, 3), (6, 3, 1), (4, 4, 5), (5, 1, 2)])
def test_unpatchify_is_the_inverse_of_patchify(size: int, patch: int, channels: int) -> None:
    images = torch.randn(2, channels, size, size)
    patches = ops.patchify(images, patch)
    assert patches.shape == (2, (size // patch) ** 2, channels * patch**2)
    assert torch.equal(ops.unpatchify(patches, patch, channels), images)


def test_patchify_and_a_linear_layer_are_a_patch_embedding_convolution() -> None:
    images, weight, bias = double(2, 3, 8, 12), double(5, 3, 4, 4), double(5)
    convolved = F.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(F.linear(ops.patchify(images, 4), weight.flatten(1), bias), convolved)


def test_patches_are_listed_row_by_row() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert ops.patchify(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_gradients() -> None:
    images = double(1, 2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.unpatchify(ops.patchify(x, 2), 2, channels=2), (images,))


# -- bytes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "patch"), [(8, 12, 4), (3, 9, 3), (5, 2, 1), (6, 6, 6)])
def test_patchify_uint8_element_by_element(height: int, width: int, patch: int) -> None:
    images = pictures(2, height, width)
    found = patchify_uint8(images, patch, torch.float64)
    assert found.dtype == torch.float64 and found.shape == (2, height // patch * (width // patch), 3 * patch**2)
    for b, y, x, c in np.ndindex(2, height, width, 3):
        place = (y // patch) * (width // patch) + x // patch
        number = found[b, place, c * patch**2 + (y % patch) * patch + x % patch].item()
        assert number == images[b, y, x, c].item() / 127.5 - 1


def test_patchify_uint8_is_what_patchify_makes_of_the_normalized_picture() -> None:
    images = pictures(2, 8, 12)
    normalized = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    for dtype in FLOATS:
        assert torch.equal(patchify_uint8_reference(images, 4, dtype), ops.patchify(normalized, 4).to(dtype))


def test_unpatchify_uint8_rounds_half_to_even_and_clamps() -> None:
    numbers = halves()  # three bytes: a patch of one pixel
    levels = np.rint((numbers.numpy() + np.float32(1)) * np.float32(127.5))
    wanted = np.nan_to_num(np.clip(levels, 0, 255), nan=0.0).astype(np.uint8)
    np.testing.assert_array_equal(unpatchify_uint8_reference(numbers, 1, 257).numpy().reshape(1, 257, 3), wanted)
    assert unpatchify_uint8(torch.zeros(1, 1, 3), 1).tolist() == [[[[128] * 3]]]  # 127.5


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_every_byte_comes_back(dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 8, 32, 1).repeat(2, 1, 1, 3).contiguous()
    images[..., 1], images[1] = images[..., 1].flip(1), images[1].flip(0)
    found = unpatchify_uint8(patchify_uint8(images, 4, dtype), 4, rows=2)
    assert found.dtype == torch.uint8 and torch.equal(found, images)


def test_square_pictures_need_no_rows() -> None:
    images = pictures(2, 6, 6)
    assert torch.equal(unpatchify_uint8(patchify_uint8(images, 2), 2), images)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"images must be uint8 \(B, H, W, 3\), got cpu float32"):
        patchify_uint8(torch.zeros(1, 4, 4, 3), 2)
    with pytest.raises(InputError, match=r"images must be uint8 \(B, H, W, 3\)"):
        patchify_uint8(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 2)
    for patch in (3, 0):
        with pytest.raises(InputError, match=f"pictures of 4 x 6 cannot be cut into patches of {patch}"):
            patchify_uint8(pictures(1, 4, 6), patch)
    with pytest.raises(InputError, match="dtype must be a float type"):
        patchify_uint8(pictures(1, 4, 4), 2, torch.int32)
    patches = torch.zeros(1, 6, 12)
    with pytest.raises(InputError, match=r"patches must be float \(B, N, 27\)"):
        unpatchify_uint8(patches, 3)
    with pytest.raises(InputError, match="6 patches are no square; give rows"):
        unpatchify_uint8(patches, 2)
    for rows in (4, 0, -2):
        with pytest.raises(InputError, match=f"6 patches do not fill {rows} rows"):
            unpatchify_uint8(patches, 2, rows)


# -- choice ------------------------------------------------------------------------------------------------------------------


def both(images: Tensor) -> Tensor:
    return unpatchify_uint8(patchify_uint8(images, 2), 2, rows=2)


def test_compiled_in_one_graph() -> None:
    images = pictures(2, 4, 6)
    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(images), images)


def test_exported_as_standard_operators() -> None:
    class Both(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return both(images)

    program = torch.export.export(Both(), (pictures(2, 4, 6),))
    assert "textok" not in str(program.graph)


def test_choice_on_the_cpu() -> None:
    wanted = "native" if has_native("patchify_uint8") else "reference"
    images, patches = pictures(1, 4, 4), torch.zeros(1, 4, 12)
    assert dispatch.choose("patchify_uint8", images, 2, torch.bfloat16) == wanted
    assert dispatch.choose("unpatchify_uint8", patches, 2, 2) == wanted
    assert dispatch.choose("patchify_uint8", images, 2, torch.float64) == "reference"
    assert dispatch.choose("unpatchify_uint8", patches.double(), 2, 2) == "reference"


def test_pictures_that_are_not_whole_patches_are_refused() -> None:
    with pytest.raises(InputError, match="multiple of the patch size 7 high and wide, got 14 x 16"):
        ops.patchify(torch.zeros(1, 3, 14, 16), 7)
    with pytest.raises(InputError, match=r"patches must be \(B, G \* G, 3 \* 2 \* 2\), got \(1, 6, 12\)"):
        ops.unpatchify(torch.zeros(1, 6, 12), 2)
