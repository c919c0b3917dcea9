"""Sums over the lanes of a warp that come before."""

from __future__ import annotations

from numba import cuda

from kvortex.kernels.ptx import statement

_ALL = 0xFFFFFFFF


def _summed() -> str:
    steps = (f"shfl.sync.up.b32 b|p, a, {step}, 0, 0xFFFFFFFF; @p add.u32 a, a, b;" for step in (1, 2, 4, 8, 16))
    return " ".join(["{ .reg .b32 a, b; .reg .pred p; mov.b32 a, $1;", *steps, "mov.b32 $0, a; }"])


@statement(_summed(), "rr", "r", together=True)
def summed(value, lane):  # type: ignore[no-untyped-def]
    """Sum of a number over this lane and all before, in 32 bits."""
    total = own = int(value)
    for step in (1, 2, 4, 8, 16):
        other = int(cuda.shfl_xor_sync(_ALL, total, step))
        own += other if lane & step else 0
        total += other
    return own & _ALL
