"""A row of a tile of the plane code, two values in each lane, with exponents in their places all along.

Bits 7 to 14 and 23 to 30 of a word are the exponents of the lane's two channels, as in two bf16. ``bases`` holds base - 1 of
both there, and a bit above the lower one, which lends where base - 1 - code is below zero: no borrow goes further.

What a value of the second tier has, 16 bits in shared memory, is how much is to be added to what code 3 alone would be; or, of
an escape, its exponent, and bits 0 and 2 say so.

What is coded is seen as distances: of both values ``base - 1 - exponent`` in the halves of a word, and FAR instead of a sign.
"""

from __future__ import annotations

from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.ptx import statement

uint32: Any = types.uint32
ESCAPED = 5
_LOW, _HIGH = 0x7F80, 0x7F800000
_SIGNS = 0x807F807F
FAR, AT_BASE = 0x100, 0x1FF


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def bases_of(pair):  # type: ignore[no-untyped-def]
    """Of the lane's two bases, a byte each."""
    low = uint32(uint32(pair - uint32(1)) & uint32(255))
    high = uint32(uint32((pair >> uint32(8)) - uint32(1)) & uint32(255))
    return uint32(low << uint32(7) | high << uint32(23) | uint32(0x8000))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def late_of(code):  # type: ignore[no-untyped-def]
    """Of a code of the second tier that is no escape: 0 is the base itself, others are 4 and more below it."""
    late = uint32(uint32(128) - uint32(128) * code)
    if code == uint32(0):
        late = uint32(512)
    return late


@statement(
    "{ .reg .b32 t, a, h; .reg .pred p, q, r, s;"
    " and.b32 t, $1, 0x01800180; sub.u32 t, $2, t; shl.b32 h, $5, 16;"
    # of the low one, then the high one: whether it is late and no escape, and whether it is one
    " lop3.b32 a, $3, $4, 1, 0x20; setp.ne.u32 p, a, 0; lop3.b32 a, $3, $5, 4, 0x20; setp.ne.u32 q, a, 0;"
    " lop3.b32 a, $3, $4, 1, 0x80; setp.ne.u32 r, a, 0; lop3.b32 a, $3, $5, 4, 0x80; setp.ne.u32 s, a, 0;"
    " @p add.u32 t, t, $4; @q add.u32 t, t, h;"
    f" @r lop3.b32 t, $4, t, {_LOW:#x}, 0xE4; @s lop3.b32 t, h, t, {_HIGH:#x}, 0xE4;"
    f" prmt.b32 a, $6, $6, 0x1100; lop3.b32 $0, a, t, {_SIGNS:#x}, 0xE4; }}",
    "rrrrrr",
    "r",
    pure=True,
)
def row_word(codes, bases, three, first, other, signs):  # type: ignore[no-untyped-def]
    """Two bf16.

    Parameters
    ----------
    codes
        Those of the first tier in bits 7 and 8, 23 and 24; other bits do not count.
    bases
        Of :func:`bases_of`.
    three
        Bits 0 and 2: whether the low one, and the high one, has code 3.
    first, other
        What they have in the second tier, with their signs in 32 bits; of no meaning where the code is another.
    signs
        Sign and mantissa of both, a byte each.
    """
    word = (int(bases) - (int(codes) & 0x01800180)) & 0xFFFFFFFF
    for late, bit, shift, field in ((int(first), 1, 0, _LOW), (int(other), 4, 16, _HIGH)):
        moved = late << shift & 0xFFFFFFFF
        if three & bit and late & bit:
            word = word & ~field | moved & field
        elif three & bit:
            word = (word + moved) & 0xFFFFFFFF
    spread = int(signs) & 255 | (int(signs) & 255) << 8 | (int(signs) >> 8 & 255) << 16 | (int(signs) >> 8 & 255) << 24
    return spread & _SIGNS | word & ~_SIGNS & 0xFFFFFFFF


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def distances_from(pair):  # type: ignore[no-untyped-def]
    """What :func:`distances` takes of the lane's two bases, a byte each."""
    return uint32((pair & uint32(255)) + uint32(255) + (((pair >> uint32(8)) + uint32(255)) << uint32(16)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def distances(word, bases):  # type: ignore[no-untyped-def]
    """Of a row's two values; AT_BASE is -1."""
    return uint32(uint32(bases - ((word >> uint32(7)) & uint32(0x00FF00FF))) ^ uint32(FAR * 0x10001))


@statement(
    # 4 and more become ones all along: a sum's upper bit says so, and is repeated
    "{ .reg .b32 a; and.b32 a, $1, 0x03FC03FC; add.u32 a, a, 0x7FFF7FFF; prmt.b32 a, a, a, 0xBB99;"
    " lop3.b32 $0, a, $1, 0x00030003, 0xA8; }",
    "r",
    "r",
    pure=True,
)
def first_codes(far):  # type: ignore[no-untyped-def]
    """Codes of the first tier, in bits 0 and 1 of both halves, by :func:`distances`."""
    return min(int(far) & 0xFFFF, 3) | min(int(far) >> 16, 3) << 16


@statement("prmt.b32 $0, $1, $2, 0x5410;", "rr", "r", pure=True)
def lower_halves(a, b):  # type: ignore[no-untyped-def]
    return int(a) & 0xFFFF | (int(b) & 0xFFFF) << 16


@statement("prmt.b32 $0, $1, $2, 0x7632;", "rr", "r", pure=True)
def upper_halves(a, b):  # type: ignore[no-untyped-def]
    return int(a) >> 16 | int(b) >> 16 << 16


@statement(
    "{ .reg .b32 a; shr.u32 a, $1, 8; lop3.b32 a, a, $1, 0x00800080, 0xE4; prmt.b32 $0, a, a, 0x4420; }",
    "r",
    "r",
    pure=True,
)
def sign_bytes(word):  # type: ignore[no-untyped-def]
    """Sign and mantissa of two bf16, a byte each, in the lower half; the upper one is of no use, and the same byte twice."""
    low, high = (int(word) >> shift & 0xFFFF for shift in (0, 16))
    low, high = low >> 8 & 128 | low & 127, high >> 8 & 128 | high & 127
    return low | high << 8 | low << 16 | low << 24
