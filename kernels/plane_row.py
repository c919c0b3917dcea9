"""A row of a tile of the plane code, two values in each lane, with exponents in their places all along.

Bits 7 to 14 and 23 to 30 of a word are the exponents of the lane's two channels, as in two bf16. ``bases`` holds base - 1 of
both there, and a bit above the lower one, which lends where base - 1 - code is below zero: no borrow goes further.

What a value of the second tier has, 16 bits in shared memory, is how much is to be added to what code 3 alone would be; or, of
an escape, its exponent, and bits 0 and 2 say so.

What is coded is seen as distances: of both values ``base - exponent`` in the halves of a word, and FAR for all that has no code
of its own. What is kept of a value until its tail is made has 255 - exponent in the upper byte of 16 bits.
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
FAR = 10


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
def shifted_bases(pair):  # type: ignore[no-untyped-def]
    """Of the lane's two bases, a byte each, what is to be added to 255 - exponent for the distance, in 16 bits each."""
    low, high = uint32(pair & uint32(255)), uint32(pair >> uint32(8))
    return uint32(uint32(low + uint32(0xFF01)) & uint32(0xFFFF) | uint32(high + uint32(0xFF01)) << uint32(16))


@statement("{ .reg .b32 a; mad.lo.u32 a, $1, 0xFFFFFFFE, 0xFFFFFFFF; prmt.b32 $0, a, 0, 0x4341; }", "r", "r", pure=True)
def inverted(word):  # type: ignore[no-untyped-def]
    """255 - exponent of two bf16, in the halves of a word: bytes of the complement of the word's double."""
    return 255 - (int(word) >> 7 & 255) | 255 - (int(word) >> 23 & 255) << 16


@statement(
    f"{{ .reg .b32 a, k; add.u16x2 a, $1, $2; mov.b32 k, {FAR * 0x10001:#x}; min.u16x2 $0, a, k; }}",
    "rr",
    "r",
    pure=True,
    before="{ .reg .b32 a, k, z; mov.b32 z, 0; vadd2.u32.u32.u32 a, $1, $2, z;"
    f" mov.b32 k, {FAR * 0x10001:#x}; vmin2.u32.u32.u32 $0, a, k, z; }}",
)
def distances(inverse, bases):  # type: ignore[no-untyped-def]
    """``base - exponent`` of a row's two values, by :func:`inverted` and :func:`shifted_bases`; FAR where it is more, or less
    than 0."""
    both = zip(_halves(inverse), _halves(bases), strict=True)
    low, high = (min(a + b & 0xFFFF, FAR) for a, b in both)
    return low | high << 16


@statement(
    "{ .reg .b32 k; mov.b32 k, 0x00040004; min.u16x2 $0, $1, k; }",
    "r",
    "r",
    pure=True,
    before="{ .reg .b32 k, z; mov.b32 z, 0; mov.b32 k, 0x00040004; vmin2.u32.u32.u32 $0, $1, k, z; }",
)
def first_codes(near):  # type: ignore[no-untyped-def]
    """Codes of the first tier by :func:`distances`, if 3 is added and bits above the two lowest are dropped."""
    low, high = (min(each, 4) for each in _halves(near))
    return low | high << 16


def _halves(word: Any) -> tuple[int, int]:
    return int(word) & 0xFFFF, int(word) >> 16 & 0xFFFF


@statement(
    "{ .reg .b32 m, h; prmt.b32 m, $1, $2, 0x6420; prmt.b32 h, $1, $2, 0x7531; lop3.b32 $0, h, m, 0x80808080, 0xE4; }",
    "rr",
    "r",
    pure=True,
)
def sign_bytes(word, other):  # type: ignore[no-untyped-def]
    """Sign and mantissa of four bf16, a byte each."""
    each = (*_halves(word), *_halves(other))
    return sum((value >> 8 & 128 | value & 127) << 8 * at for at, value in enumerate(each))
