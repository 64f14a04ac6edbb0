"""Normal noise by seed: one program draws four numbers for each of BLOCK counters of one sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

import textok_fast.ops.noise  # noqa: F401 - declares the operation
from textok_fast.ops.aot import AotCase
from textok_fast.ops.library import implement_triton

BLOCK = 128


@triton.jit
def _box_muller(first, second):  # type: ignore[no-untyped-def]
    u = first.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # (p + 1/2) / 2**32
    radius = tl.sqrt(-2.0 * tl.log(u))
    # The angle 2 pi q / 2**32 is a quarter of the circle, found in integers, and a rest within pi / 4, for which Taylor's
    # series suffice: tl.cos and tl.sin reduce any float and spill registers for it.
    quarter = (second + 0x20000000) >> 30
    rest = (second - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    square = rest * rest
    sine = rest * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    swap = (quarter & 1) != 0
    x, y = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    x = tl.where(((quarter + 1) & 2) != 0, -x, x)
    y = tl.where((quarter & 2) != 0, -y, y)
    return radius * x, radius * y


@triton.jit
def seeded_normal_kernel(seeds_ptr, draw_ptr, out_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    blocks = tl.cdiv(size, 4 * BLOCK)  # of a sample
    sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    group = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    zero = group * 0
    draw = tl.load(draw_ptr).to(tl.uint32) + zero
    p0, p1, p2, p3 = tl.philox(tl.load(seeds_ptr + sample), group, zero, draw, zero)
    z0, z1 = _box_muller(p0, p1)
    z2, z3 = _box_muller(p2, p3)
    values = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))  # in the order of z0, z1, z2, z3
    at = block * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + sample.to(tl.int64) * size + at, values, mask=at < size)


def seeded_normal(seeds: Tensor, draw: Tensor, shape: Sequence[int]) -> Tensor:
    out = torch.empty((seeds.shape[0], *shape), dtype=torch.float32, device=seeds.device)
    size = math.prod(shape)
    programs = seeds.shape[0] * triton.cdiv(size, 4 * BLOCK)  # on the grid's one axis that is not limited to 65,535
    with torch.cuda.device_of(seeds):
        seeded_normal_kernel[(programs,)](seeds.contiguous(), draw, out, size, BLOCK=BLOCK)
    return out


implement_triton("seeded_normal", seeded_normal)


def _aot_case(name: str, size: int) -> AotCase:
    pointers = {"seeds_ptr": "*i64", "draw_ptr": "*i64", "out_ptr": "*fp32"}
    aligned = (*pointers, "size") if size % 16 == 0 else tuple(pointers)
    return AotCase(name, seeded_normal_kernel, {**pointers, "size": "i32"}, {"BLOCK": BLOCK}, aligned=aligned)


AOT = [_aot_case("tokens 32 x 16", 32 * 16), _aot_case("odd size", 31 * 7)]
