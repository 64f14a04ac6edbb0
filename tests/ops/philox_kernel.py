"""Triton's Philox on a counter and a key of one's own; in a module, since a kernel needs its source's file."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_kernel(numbers_ptr, out_ptr):  # type: ignore[no-untyped-def]
    one = tl.arange(0, 1)
    c0, c1 = tl.load(numbers_ptr + one).to(tl.uint32), tl.load(numbers_ptr + 1 + one).to(tl.uint32)
    c2, c3 = tl.load(numbers_ptr + 2 + one).to(tl.uint32), tl.load(numbers_ptr + 3 + one).to(tl.uint32)
    p0, p1, p2, p3 = tl.philox(tl.load(numbers_ptr + 4), c0, c1, c2, c3)
    tl.store(out_ptr + one, p0.to(tl.int64))
    tl.store(out_ptr + 1 + one, p1.to(tl.int64))
    tl.store(out_ptr + 2 + one, p2.to(tl.int64))
    tl.store(out_ptr + 3 + one, p3.to(tl.int64))
