"""Bytes of 32 neighbours to words of one bit each, in the registers of one lane; and what four lanes trade for that.

Each function here is its own inverse, so that what codes also decodes.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numba import cuda

from kvortex.kernels.ptx import statement


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


def _few_swaps() -> list[str]:
    """Of codes of at most four bits: the first step only joins two halves of bytes, and the upper four words become 0."""
    joined = [f"shl.b32 p, t{k + 4}, 4; or.b32 t{k}, t{k}, p;" for k in range(4)]
    swaps = [
        _swapped(f"t{k}", f"t{k + step}", step, mask)
        for step, mask in ((2, 0x33333333), (1, 0x55555555))
        for k in range(4)
        if not k & step
    ]
    return [*joined, *swaps, *(f"mov.b32 t{k}, 0;" for k in range(4, 8))]


def _few_swaps_back() -> list[str]:
    swaps = [
        _swapped(f"t{k}", f"t{k + step}", step, mask)
        for step, mask in ((2, 0x33333333), (1, 0x55555555))
        for k in range(4)
        if not k & step
    ]
    parted = [
        f"shr.u32 t{k + 4}, t{k}, 4; and.b32 t{k + 4}, t{k + 4}, 0x0F0F0F0F; and.b32 t{k}, t{k}, 0x0F0F0F0F;" for k in range(4)
    ]
    return [*swaps, *parted]


@statement(_text(_few_swaps()), "w", "w", pure=True)
def few_bit_planes(words):  # type: ignore[no-untyped-def]
    """:func:`bit_planes` of bytes below 16."""
    return bit_planes(words)


@statement(_text(_few_swaps_back()), "w", "w", pure=True)
def few_codes(words):  # type: ignore[no-untyped-def]
    """The reverse, where only the first four words count."""
    return bit_planes((*words[:4], 0, 0, 0, 0))


@statement(_text(_bytes_turned("t0", "t1", "t2", "t3") + _bytes_turned("t4", "t5", "t6", "t7")), "w", "w", pure=True)
def bytes_turned(words):  # type: ignore[no-untyped-def]
    """Byte i of word j becomes byte j of word i, of the first four words and of the last four."""
    each = np.array([int(word) for word in words], "<u4").view(np.uint8).reshape(2, 4, 4)
    return tuple(np.ascontiguousarray(each.swapaxes(1, 2)).view("<u4").ravel().tolist())


def _traded() -> str:
    """Lines for two fours of words, with the lane in ``$16``."""
    lines = ["and.b32 p, $16, 1; setp.ne.u32 odd, p, 0; and.b32 p, $16, 2; setp.ne.u32 high, p, 0;"]
    for flip, upper in ((1, "odd"), (2, "high")):
        for k in (k for k in range(8) if not k & flip):
            first, second = f"t{k}", f"t{k + flip}"
            lines += [
                f"selp.b32 p, {first}, {second}, {upper}; shfl.sync.bfly.b32 q, p, {flip}, 0x1F, 0xFFFFFFFF;",
                f"selp.b32 {first}, q, {first}, {upper}; selp.b32 {second}, {second}, q, {upper};",
            ]
    return _text(lines).replace("r, s;", "r, s; .reg .pred odd, high;", 1)


@statement(_traded(), "wr", "w", together=True)
def traded(words, lane):  # type: ignore[no-untyped-def]
    """Word j of lane i, of four lanes side by side, becomes word i of lane j; of the first four words and of the last four.

    A lane keeps one of two words and gives the other to the lane beside it, for the one that it keeps.
    """
    made = list(words)
    for flip in (1, 2):
        for k in (k for k in range(8) if not k & flip):
            kept, given = (k + flip, k) if lane & flip else (k, k + flip)
            made[given] = cuda.shfl_xor_sync(0xFFFFFFFF, made[given], flip)
    return tuple(made)


_STORED = """{ .reg .pred four, six, eight, three;
 setp.eq.u32 three, $1, 3; setp.eq.u32 four, $1, 4; setp.eq.u32 six, $1, 6; setp.eq.u32 eight, $1, 8;
 @four st.global.v4.b32 [$0], {$2,$3,$4,$5};
 @eight st.global.v4.b32 [$0], {$2,$3,$4,$5};
 @eight st.global.v4.b32 [$0+16], {$6,$7,$8,$9};
 @six st.global.v2.b32 [$0], {$2,$3};
 @six st.global.v2.b32 [$0+8], {$4,$5};
 @six st.global.v2.b32 [$0+16], {$6,$7};
 @three st.global.b32 [$0], $2;
 @three st.global.b32 [$0+4], $3;
 @three st.global.b32 [$0+8], $4; }"""


@statement(_STORED, "lrw")
def store_planes(address, bits, words):  # type: ignore[no-untyped-def]
    """Writes the first 3, 4, 6 or 8 words, at a multiple of 4, 16, 8 or 16."""
    (ctypes.c_uint32 * int(bits)).from_address(int(address))[:] = words[: int(bits)]
