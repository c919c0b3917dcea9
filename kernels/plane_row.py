"""A row of a tile of the plane code, two values in each lane, with exponents in their places all along.

Bits 7 to 14 and 23 to 30 of a word are the exponents of the lane's two channels, as in two bf16. ``bases`` holds base - 1 of
both there, and a bit above the lower one, which lends where base - 1 - code is below zero: no borrow goes further.

What a value of the second tier has, 16 bits in shared memory, is how much is to be added to what code 3 alone would be, in 15
bits; or, of an escape, its exponent, and the highest bit says so.

What is coded is seen as distances: of both values ``base - exponent`` in the halves of a word, and FAR for all that has no code
of its own. What is kept of a value until its tail is made has 255 - exponent in the upper byte of 16 bits.
"""

from __future__ import annotations

from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.ptx import statement

uint32: Any = types.uint32
uint64: Any = types.uint64
ESCAPED = 0x8000
_SIGNS = 0x807F807F
FAR = 10


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def bases_of(pair):  # type: ignore[no-untyped-def]
    """Of the lane's two bases, a byte each."""
    low = uint32(uint32(pair - uint32(1)) & uint32(255))
    high = uint32(uint32((pair >> uint32(8)) - uint32(1)) & uint32(255))
    return uint32(low << uint32(7) | high << uint32(23) | uint32(0x8000))


@statement(
    "{ .reg .b32 a, b, t; mov.b32 a, 0xFEFF0004; mov.b32 b, 0x00FBFCFD; prmt.b32 t, a, b, $2; mov.b32 a, 0;"
    " prmt.b32 b, t, a, 0x2404; shr.u32 $0, b, 1; prmt.b32 b, t, a, 0x3414; shr.u32 $1, b, 1; }",
    "r",
    "p",
    pure=True,
)
def late_of(nibbles):  # type: ignore[no-untyped-def]
    """What four codes of the second tier have that are no escapes, two in a word: 0 is the base itself, others are 4 and more
    below. Nibbles of the lower half have codes 0, 2, 1, 3."""
    a, c, b, d = ((4, 0, 255, 254, 253, 252, 251, 0)[int(nibbles) >> shift & 7] << 7 for shift in (0, 4, 8, 12))
    return a | b << 16, c | d << 16


def _row_word(signs: int) -> str:
    """With a selector of bytes of signs."""
    return (
        # Carries of the lower sum end in bits whose place signs and mantissas take.
        "{ .reg .b32 t, a; and.b32 t, $1, 0x01800180; sub.u32 t, $2, t; add.u32 t, t, $3;"
        " prmt.b32 a, $3, $3, 0xBB99; lop3.b32 t, $3, t, a, 0xE4;"  # an escape's highest bit, all along: its own exponent
        f" prmt.b32 a, $4, $4, {signs:#x}; lop3.b32 $0, a, t, {_SIGNS:#x}, 0xE4; }}"
    )


@statement(_row_word(0x1100), "rrrr", "r", pure=True)
def row_word(codes, bases, late, signs):  # type: ignore[no-untyped-def]
    """Two bf16.

    Parameters
    ----------
    codes
        Those of the first tier in bits 7 and 8, 23 and 24; other bits do not count.
    bases
        Of :func:`bases_of`.
    late
        What both have in the second tier, 16 bits each; 0 where the code is another than 3.
    signs
        Sign and mantissa of both, a byte each, in the lower half.
    """
    word = 0
    for own, shift in zip(_halves(late), (0, 16), strict=True):
        exponent = (int(bases) >> shift + 7 & 255) - (int(codes) >> shift + 7 & 3) + (own >> 7)
        word |= ((own if own & ESCAPED else exponent << 7) & 0x7F80) << shift
    spread = int(signs) & 255 | (int(signs) & 255) << 8 | (int(signs) >> 8 & 255) << 16 | (int(signs) >> 8 & 255) << 24
    return spread & _SIGNS | word


@statement(_row_word(0x3322), "rrrr", "r", pure=True)
def row_word_above(codes, bases, late, signs):  # type: ignore[no-untyped-def]
    """As :func:`row_word`, with signs and mantissas in the upper half."""
    return row_word(codes, bases, late, int(signs) >> 16)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def marks_of(codes):  # type: ignore[no-untyped-def]
    """Of a word of the first tier a bit for each value that is in the second, as :mod:`kvortex.kernels.marked` has them."""
    return uint32(codes & (codes >> uint32(1)) & uint32(0x55555555))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def sixteen_places(tail, at):  # type: ignore[no-untyped-def]
    """Where the 32 bits of a sixteen lie in a tail, and its 16."""
    odd = uint64(at & uint32(1))
    word = tail + uint64(6) * uint64(at) - uint64(2) * odd
    return word, word + uint64(8) - uint64(2) * odd


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def packed_sixteen(codes, more):  # type: ignore[no-untyped-def]
    """The 32 bits and the 16, which have others above, from nibbles of the first eight codes and of the last."""
    word = uint32(codes | (more >> uint32(13)) & uint32(0x8888) | (more << uint32(2)) & uint32(0x88880000))
    return word, uint32(more | (more >> uint32(15)) & uint32(0x8888))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def nibbles_of_sixteen(word, short):  # type: ignore[no-untyped-def]
    """The reverse of :func:`packed_sixteen`."""
    spare = uint32((word >> uint32(3)) & uint32(0x1111) | (word >> uint32(18)) & uint32(0x2222))
    spare = uint32(spare | (short >> uint32(1)) & uint32(0x4444))
    return uint32(word & uint32(0x77777777)), uint32(short & uint32(0x7777) | spare << uint32(16))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def sevenths(nibbles):  # type: ignore[no-untyped-def]
    """The lowest bits of nibbles that are 7, of such as are below 8: of codes of the second tier those of escapes."""
    return uint32(nibbles & (nibbles >> uint32(1)) & (nibbles >> uint32(2)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def nibble_place(found):  # type: ignore[no-untyped-def]
    """Which of eight codes a nibble has, of which one bit's number plus 1 is known."""
    k = uint32(uint32(found - uint32(1)) >> uint32(2))
    return uint32(k & uint32(4) | (k << uint32(1)) & uint32(2) | (k >> uint32(1)) & uint32(1))


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


def _late_codes(most: str) -> str:
    lines = ["{ .reg .b32 t, u, k, z; mov.b32 k, 0x00030003; mov.b32 z, 0;"]
    for at in range(4):
        lines.append(f"and.b32 t, ${1 + at}, 0x000F000F; {most}")
        lines.append("mov.b32 u, t;" if at == 0 else f"mad.lo.u32 u, t, {16**at}, u;")
    return " ".join([*lines, "sub.u32 u, u, 0x33333333; prmt.b32 $0, u, z, 0x3120; }"])


@statement(_late_codes("max.u16x2 t, t, k;"), "rrrr", "r", pure=True, before=_late_codes("vmax2.u32.u32.u32 t, t, k, z;"))
def late_codes(a, b, c, d):  # type: ignore[no-untyped-def]
    """Codes of the second tier of eight values, by distances of 0, 4 and more in the lowest four bits of the halves of words:
    four in the nibbles of a half, in the order 0, 2, 1, 3."""
    codes = [max((each & 15) - 3, 0) for word in (a, b, c, d) for each in _halves(word)]
    return sum(codes[at] << 4 * k for k, at in enumerate((0, 2, 1, 3, 4, 6, 5, 7)))


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
