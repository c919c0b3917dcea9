"""What a warp does with a word of each lane: bits and lanes change places, and sums over the lanes before."""

from __future__ import annotations

from numba import cuda

from kvortex.kernels.ptx import statement

_ALL = 0xFFFFFFFF
_HALVES = {16: 0x0000FFFF, 8: 0x00FF00FF, 4: 0x0F0F0F0F, 2: 0x33333333, 1: 0x55555555}


def _turned() -> str:
    """A word with the lane in ``$2``. A lane keeps the bits whose number agrees with its own in one binary place, and takes the
    others from the lane that differs in it."""
    lines = ["{ .reg .b32 a, b, k, m; .reg .pred p; mov.b32 a, $1;"]
    for step, (low, high) in {16: (0x5410, 0x3276), 8: (0x6240, 0x3715)}.items():
        lines += [
            f"and.b32 k, $2, {step}; setp.eq.u32 p, k, 0; selp.b32 k, {low}, {high}, p;",
            f"shfl.sync.bfly.b32 b, a, {step}, 0x1F, 0xFFFFFFFF; prmt.b32 a, a, b, k;",
        ]
    for step in (4, 2, 1):
        own = _HALVES[step]
        lines += [
            f"and.b32 k, $2, {step}; setp.eq.u32 p, k, 0; selp.b32 m, {own}, {own ^ _ALL}, p;",
            f"selp.b32 k, {step}, {32 - step}, p; shfl.sync.bfly.b32 b, a, {step}, 0x1F, 0xFFFFFFFF;",
            "shf.l.wrap.b32 b, b, b, k; lop3.b32 a, a, b, m, 0xE4;",  # where the mask is set the first, else the second
        ]
    return " ".join([*lines, "mov.b32 $0, a; }"])


@statement(_turned(), "rr", "r", together=True)
def turned(word, lane):  # type: ignore[no-untyped-def]
    """Bit i of lane j becomes bit j of lane i, which is its own inverse."""
    word = int(word)
    for step, mask in _HALVES.items():
        other = int(cuda.shfl_xor_sync(_ALL, word, step))
        word = word & mask ^ (other & mask) << step if not lane & step else word & ~mask ^ other >> step & mask
        word &= _ALL
    return word


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
