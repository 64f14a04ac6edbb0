"""The C++ kernels of patchify_uint8 and unpatchify_uint8 on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from textok_fast import _native, ops
from textok_fast.ops.dispatch import use_backend
from textok_fast.ops.library import has_native, library

pytestmark = pytest.mark.skipif(not has_native("patchify_uint8"), reason="the native library is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXAMPLES = 15 if "TEXTOK_ISA" in os.environ else 60
LAYOUTS = ["contiguous", "planes", "crop", "rgba", "transposed", "repeated"]


def make_images(layout: str, batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """(B, H, W, 3) bytes, in one of the ways pictures come."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    if layout == "planes":
        return draw(batch, 3, height, width).permute(0, 2, 3, 1)
    if layout == "crop":
        return draw(batch, height + 3, width + 5, 3)[:, 1 : height + 1, 2 : width + 2]
    if layout == "rgba":
        return draw(batch, height, width, 4)[..., :3]
    if layout == "transposed":
        return draw(batch, width, height, 3).transpose(1, 2)
    if layout == "repeated":
        return draw(1, height, width, 3).expand(batch, -1, -1, -1)
    return draw(batch, height, width, 3)


def patches_of(images: Tensor, p: int) -> np.ndarray:
    """(B, H, W, 3) -> (B, H/p * W/p, 3 p p) bytes: channel, row, column inside a patch."""
    b, height, width, _ = images.shape
    blocks = images.numpy().reshape(b, height // p, p, width // p, p, 3)
    return blocks.transpose(0, 1, 3, 5, 2, 4).reshape(b, height // p * (width // p), 3 * p * p)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    st.sampled_from(LAYOUTS),
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([1, 2, 3, 4, 7, 8, 14, 16, 17, 32, 33]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_patchify(layout: str, batch: int, rows: int, columns: int, p: int, dtype: torch.dtype, seed: int) -> None:
    images = make_images(layout, batch, rows * p, columns * p, seed)
    result = library("native").patchify_uint8(images, p, dtype)
    assert result.dtype == dtype and result.is_contiguous()
    # Rounded once for each operation, then to the dtype.
    values = patches_of(images, p).astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert torch.equal(result, torch.from_numpy(values).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte(dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).reshape(1, 16, 16, 3)
    result = library("native").patchify_uint8(images, 16, dtype).reshape(3, 256).double()
    wanted = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    bound = {torch.float32: 2e-7, torch.bfloat16: 2.0**-9 + 2e-7, torch.float16: 2.0**-12 + 2e-7}[dtype]
    assert (result - wanted).abs().max() <= bound
    assert result[0, 0] == -1 and result[0, 255] == 1
    back = library("native").unpatchify_uint8(library("native").patchify_uint8(images, 16, dtype), 16, 1)
    if dtype == torch.bfloat16:  # has fewer steps in [0.5, 1] than bytes
        assert (back.int() - images.int()).abs().max() <= 1
    else:
        assert torch.equal(back, images)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([1, 2, 3, 4, 7, 8, 14, 16, 17, 32, 33]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_unpatchify(batch: int, rows: int, columns: int, p: int, dtype: torch.dtype, strided: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(batch, rows * columns, 3 * p * p, generator=generator)
    # Numbers that become halves of a byte, and what is no number or none that fits.
    halves = (torch.randint(0, 256, patches.shape, generator=generator) + 0.5) / 127.5 - 1
    patches = torch.where(torch.rand(patches.shape, generator=generator) < 0.3, halves, patches).to(dtype)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, 1.0, 0.0, 3e4, -3e4]).to(dtype)
    chosen = torch.randint(0, 80, patches.shape, generator=generator)
    patches = torch.where(chosen < 8, special[chosen.clamp(max=7)], patches)
    if strided:
        patches = patches.transpose(1, 2).contiguous().transpose(1, 2)
    result = library("native").unpatchify_uint8(patches, p, rows)
    assert result.dtype == torch.uint8 and result.is_contiguous()
    assert result.shape == (batch, rows * p, columns * p, 3)
    scaled = (patches.float().numpy() + np.float32(1)) * np.float32(127.5)
    bytes_ = np.clip(np.rint(np.where(np.isnan(scaled), np.float32(0), scaled)), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(patches_of(result, p), bytes_)


def test_halves_go_to_the_even_byte() -> None:
    halves = np.arange(255, dtype=np.float32) + np.float32(0.5)
    values = halves / np.float32(127.5) - np.float32(1)
    exact = (values + np.float32(1)) * np.float32(127.5) == halves  # the others do not come back as halves
    assert exact.sum() > 100
    patches = torch.from_numpy(values).repeat_interleave(3).reshape(1, 255, 3)
    result = library("native").unpatchify_uint8(patches, 1, 1)[0, 0, :, 0].numpy()
    assert (result[exact] % 2 == 0).all()
    np.testing.assert_array_equal(result[exact], np.rint(halves[exact]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_outputs_are_written_past_the_cache(dtype: torch.dtype) -> None:
    images = make_images("contiguous", 6, 512, 1024)  # 36 and 18 MiB of patches
    result = library("native").patchify_uint8(images, 16, dtype)
    values = torch.arange(256, dtype=torch.uint8).float() / 127.5 - 1
    assert torch.equal(result, values.to(dtype)[torch.from_numpy(patches_of(images, 16)).int()])


def test_threads_change_nothing() -> None:
    images = make_images("contiguous", 3, 96, 128)
    patches = library("native").patchify_uint8(images, 8, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(library("native").patchify_uint8(images, 8, torch.float32), patches)
        assert torch.equal(library("native").unpatchify_uint8(patches, 8, 12), images)
    finally:
        torch.set_num_threads(threads)


def test_public_functions() -> None:
    images = make_images("planes", 2, 24, 16)
    with use_backend(patchify_uint8="native", unpatchify_uint8="native"):
        patches = ops.patchify_uint8(images, 8)
        back = ops.unpatchify_uint8(patches, 8, rows=3)
    assert torch.equal(back, images)


def test_what_the_kernels_do_not_take_is_refused() -> None:
    native = library("native")
    images = make_images("contiguous", 1, 8, 8)
    with pytest.raises(RuntimeError, match="does not divide"):
        native.patchify_uint8(images, 3, torch.float32)
    with pytest.raises(RuntimeError, match="does not divide"):
        native.patchify_uint8(images, 0, torch.float32)
    with pytest.raises(RuntimeError, match="patch_size 2147483648 is larger than 32768"):
        native.patchify_uint8(images[:, :0], 2**31, torch.float32)  # 0 is a multiple of every number
    with pytest.raises(RuntimeError, match="patch_size 4294967296 is larger than 32768"):
        native.unpatchify_uint8(torch.zeros(1, 0, 0), 2**32, 1)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        native.patchify_uint8(images, 4, torch.float64)
    with pytest.raises(RuntimeError, match="images"):
        native.patchify_uint8(images.float(), 4, torch.float32)
    with pytest.raises(RuntimeError, match=r"images must be \(B, H, W, 3\)"):
        native.patchify_uint8(images[..., :2], 4, torch.float32)
    patches = native.patchify_uint8(images, 4, torch.float32)
    with pytest.raises(RuntimeError, match="do not fill 3 rows"):
        native.unpatchify_uint8(patches, 4, 3)
    with pytest.raises(RuntimeError, match=r"patches must be \(B, N, 3 \* p \* p\)"):
        native.unpatchify_uint8(patches, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    images = make_images("crop", 2, 8, 12)
    torch.library.opcheck(torch.ops.textok_fast.patchify_uint8.default, (images, 4, dtype))
    patches = library("native").patchify_uint8(images, 4, dtype)
    torch.library.opcheck(torch.ops.textok_fast.unpatchify_uint8.default, (patches, 4, 2))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa: str) -> None:
    """What else is in these files, with a smaller instruction set, which a process chooses once."""
    names = ["baseline", "avx2", "avx512"]
    if names.index(isa) >= names.index(_native.load().info["kernels"]):
        pytest.skip("runs already, or this machine does not have it")
    files = [str(Path(__file__).with_name(f"test_native_{name}.py")) for name in ("patches", "quantize", "guided")]
    options = ["-q", "-p", "no:cacheprovider", "-k", "not opcheck and not every_instruction_set and not past_the_cache"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, env={**os.environ, "TEXTOK_ISA": isa}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
