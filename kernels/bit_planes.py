"""Bytes of 32 neighbours to words of one bit each, in the registers of one lane; and what four lanes trade for that.

Each function here is its own inverse, so that what codes also decodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from kvortex.kernels.ptx import statement

uint32, int32 = types.uint32, types.int32
ALL: Any = 0xFFFFFFFF


def _bytes_turned(a: str, b: str, c: str, d: str) -> list[str]:
    """Lines: byte i of word j becomes byte j of word i."""
    return [
        f"prmt.b32 p, {a}, {b}, 0x5140; prmt.b32 q, {c}, {d}, 0x5140; prmt.b32 r, {a}, {b}, 0x7362; "
        f"prmt.b32 s, {c}, {d}, 0x7362;",
        f"prmt.b32 {a}, p, q, 0x5410; prmt.b32 {b}, p, q, 0x7632; prmt.b32 {c}, r, s, 0x5410; prmt.b32 {d}, r, s, 0x7632;",
    ]


def _swapped(low: str, high: str, shift: int, mask: int) -> str:
    """A line: bits of one word that are not in the mask change places with those of another that are, ``shift`` lower."""
    return (
        f"shl.b32 p, {high}, {shift}; shr.u32 q, {low}, {shift}; "
        f"lop3.b32 {low}, {low}, p, {mask}, 0xE4; lop3.b32 {high}, q, {high}, {mask}, 0xE4;"
    )  # 0xE4: where the third is set the first, else the second


def _swaps() -> list[str]:
    return [
        _swapped(f"t{k}", f"t{k + step}", step, mask)
        for step, mask in ((4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555))
        for k in range(8)
        if not k & step
    ]


def _text(lines: list[str]) -> str:
    begin = [f"mov.b32 t{k}, ${8 + k};" for k in range(8)]
    return " ".join(["{ .reg .b32 t<8>, p, q, r, s;", *begin, *lines, *(f"mov.b32 ${k}, t{k};" for k in range(8)), "}"])


@statement(_text(_swaps()), "w", "w", pure=True)
def bit_planes(words):  # type: ignore[no-untyped-def]
    """Bit b of byte i of word j becomes bit 8 * i + j of word b."""
    bits = np.unpackbits(np.array([int(each) for each in words], "<u4").view(np.uint8), bitorder="little").reshape(8, 4, 8)
    return tuple(np.packbits(bits.transpose(2, 1, 0), bitorder="little").view("<u4").tolist())


@statement(_text(_bytes_turned("t0", "t1", "t2", "t3") + _bytes_turned("t4", "t5", "t6", "t7")), "w", "w", pure=True)
def bytes_turned(words):  # type: ignore[no-untyped-def]
    """Byte i of word j becomes byte j of word i, of the first four words and of the last four."""
    each = np.array([int(word) for word in words], "<u4").view(np.uint8).reshape(2, 4, 4)
    return tuple(np.ascontiguousarray(each.swapaxes(1, 2)).view("<u4").ravel().tolist())


@statement(
    "{ .reg .b32 p, q; prmt.b32 p, $1, $2, 0x0040; prmt.b32 q, $3, $4, 0x0040; prmt.b32 $0, p, q, 0x5410; }",
    "rrrr",
    "r",
    pure=True,
)
def lowest(a, b, c, d):  # type: ignore[no-untyped-def]
    """The lowest bytes of four words as one."""
    return sum((int(word) & 255) << 8 * at for at, word in enumerate((a, b, c, d)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _traded(first, second, lane, flip):  # type: ignore[no-untyped-def]
    """A lane keeps one of two words and gives the other to the lane beside it, for the one that it keeps."""
    upper = uint32(lane & flip) != uint32(0)
    got = uint32(cuda.shfl_xor_sync(ALL, int32(first if upper else second), flip))
    return uint32(got if upper else first), uint32(second if upper else got)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def traded(a, b, c, d, lane):  # type: ignore[no-untyped-def]
    """Word j of lane i, of four lanes side by side, becomes word i of lane j."""
    a, b = _traded(a, b, lane, uint32(1))
    c, d = _traded(c, d, lane, uint32(1))
    a, c = _traded(a, c, lane, uint32(2))
    b, d = _traded(b, d, lane, uint32(2))
    return a, b, c, d
