"""Codes of fewer than 8 bits, packed in the registers of one lane, and back: see :mod:`kvortex.codecs._lossy`.

A lane has bytes of four neighbours in each word, and of eight neighbours in two.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvortex.kernels.eights import uint32s, whole
from kvortex.kernels.ptx import statement


# 0xE4 of lop3: where the third is set the first, else the second.
@statement("{ .reg .b32 t; shl.b32 t, $2, 4; lop3.b32 $0, $1, t, 0x0F0F0F0F, 0xE4; }", "rr", "r", pure=True)
def lower_bits(low, high):  # type: ignore[no-untyped-def]
    """The lower four bits of each byte of two words, whose bytes are below 64."""
    return (int(low) & 0x0F0F0F0F) | (int(high) << 4 & 0xF0F0F0F0)


@statement(
    "{ .reg .b32 t, u; shr.u32 t, $1, 4; and.b32 t, t, 0x03030303; shr.u32 u, $2, 2; "
    "lop3.b32 t, t, u, 0x0C0C0C0C, 0xF8; shr.u32 u, t, 4; or.b32 t, t, u; prmt.b32 $0, t, 0, 0x4420; }",
    "rr",
    "r",
    pure=True,
)  # 0xF8: the first, or the second and the third
def upper_bits(low, high):  # type: ignore[no-untyped-def]
    """16 bits: the upper two of six of each byte of two words."""
    each = uint32s((low, high)).view(np.uint8) >> 4
    return int(sum((int(each[k]) | int(each[4 + k]) << 2) << 4 * k for k in range(4)))


def _parted() -> Any:
    lines = [
        f"and.b32 t{2 * k}, ${8 + k}, 0x0F0F0F0F; shr.u32 u, ${8 + k}, 4; and.b32 t{2 * k + 1}, u, 0x0F0F0F0F;"
        for k in range(4)
    ]
    return whole(lines, [f"t{k}" for k in range(8)], ".reg .b32 t<8>, u;")


@statement(_parted(), "v", "w", pure=True)
def codes_of_four(words):  # type: ignore[no-untyped-def]
    """Of four words of :func:`lower_bits` what was low and what was high in each, side by side."""
    each = uint32s(words)
    return tuple(np.stack((each & 0x0F0F0F0F, each >> 4 & 0x0F0F0F0F), 1).ravel().tolist())


def _joined() -> Any:
    """Four words of lower bits, and four of upper ones."""
    lines = []
    for k in range(4):
        word, half, low, high = f"${8 + k}", f"${12 + k}", f"t{2 * k}", f"t{2 * k + 1}"
        lines += [
            f"prmt.b32 u, {half}, 0, 0x4140; shl.b32 v, u, 4; or.b32 u, u, v;",  # a nibble a byte, beside others
            f"shl.b32 v, u, 4; and.b32 v, v, 0x30303030; lop3.b32 {low}, {word}, v, 0x0F0F0F0F, 0xEC;",
            f"shl.b32 v, u, 2; and.b32 v, v, 0x30303030; shr.u32 u, {word}, 4; lop3.b32 {high}, u, v, 0x0F0F0F0F, 0xEC;",
        ]
    return whole(lines, [f"t{k}" for k in range(8)], ".reg .b32 t<8>, u, v;")


@statement(_joined(), "vv", "w", pure=True)  # 0xEC: the first and the third, or the second
def codes_of_six(words, uppers):  # type: ignore[no-untyped-def]
    """Likewise of four words of :func:`lower_bits`, and of :func:`upper_bits` beside them."""
    made = []
    for word, half in zip(words, uppers, strict=True):
        for high in range(2):
            upper = sum((int(half) >> 4 * k + 2 * high & 3) << 8 * k + 4 for k in range(4))
            made.append(int(word) >> 4 * high & 0x0F0F0F0F | upper)
    return tuple(made)


def _swapped(low: str, high: str, shift: int, mask: int) -> str:
    """A line: bits of one word that are not in the mask change places with those of another that are, ``shift`` lower."""
    return (
        f"shl.b32 p, {high}, {shift}; shr.u32 q, {low}, {shift}; "
        f"lop3.b32 {low}, {low}, p, {mask}, 0xE4; lop3.b32 {high}, q, {high}, {mask}, 0xE4;"
    )


_SWAPS = [
    _swapped(f"t{k}", f"t{k + step}", step, mask)
    for step, mask in ((2, 0x33333333), (1, 0x55555555))
    for k in range(4)
    if not k & step
]


def _planes() -> Any:
    """The first of three steps only joins two halves of bytes, since codes are below 16."""
    lines = [f"shl.b32 p, ${8 + k}, 4; or.b32 t{k}, ${4 + k}, p;" for k in range(4)]
    return whole([*lines, *_SWAPS], [f"t{k}" for k in range(4)], ".reg .b32 t<4>, p, q;")


@statement(_planes(), "w", "v", pure=True)
def bit_planes(words):  # type: ignore[no-untyped-def]
    """Of bytes below 16: bit b of byte i of word j becomes bit 8 * i + j of word b."""
    bits = np.unpackbits(uint32s(words).astype("<u4").view(np.uint8), bitorder="little").reshape(8, 4, 8)
    return tuple(np.packbits(bits.transpose(2, 1, 0), bitorder="little").view("<u4")[:4].tolist())


def _codes() -> Any:
    lines = [f"mov.b32 t{k}, ${8 + k};" for k in range(4)]
    parted = [
        f"shr.u32 t{k + 4}, t{k}, 4; and.b32 t{k + 4}, t{k + 4}, 0x0F0F0F0F; and.b32 t{k}, t{k}, 0x0F0F0F0F;" for k in range(4)
    ]
    return whole([*lines, *_SWAPS, *parted], [f"t{k}" for k in range(8)], ".reg .b32 t<8>, p, q;")


@statement(_codes(), "v", "w", pure=True)
def codes_of_planes(words):  # type: ignore[no-untyped-def]
    """The reverse."""
    bits = np.unpackbits(uint32s((*words, 0, 0, 0, 0)).astype("<u4").view(np.uint8), bitorder="little").reshape(8, 4, 8)
    return tuple(np.packbits(bits.transpose(2, 1, 0), bitorder="little").view("<u4").tolist())
