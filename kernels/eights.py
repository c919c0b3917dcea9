"""Eight numbers or words of a lane at a time, in registers: what the codes of bounded loss do to each of them.

A text of PTX for all eight is one call to Numba's compiler, which takes a minute for as many calls as there are additions.
Floats are as in :mod:`kvortex.kernels.float32`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numba import cuda

from kvortex.kernels.ptx import statement

# Mantissas of the quarter powers of two between 1 and 2; the exponent of the least scale, 2**-32.
ROOTS = (0, 0x1837F0, 0x3504F3, 0x5744FD)
LEAST_SCALE = 95
_MANTISSA = 0x7FFFFF
NEAREST = 1.5 * 2**23  # where float32 counts in ones
_NEAREST_BITS = int(np.float32(NEAREST).view(np.uint32))
_SIZES = {"e": 8, "w": 8, "v": 4}


def _floats(x: Any) -> Any:
    return np.array(x, np.float32)


def _products(x: Any, y: Any) -> Any:
    """Of float32, exact."""
    return np.asarray(x, np.float64) * np.asarray(y, np.float64)


def _fused(x: Any, y: Any, z: Any) -> Any:
    """(k,) float32: products and sums with one rounding, where all are finite.

    A sum of float64 that is not exact is made odd, towards what was left of it: then rounding it once more does no harm
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Transactions on Computers, 2008).
    """
    a, b = _products(x, y), np.asarray(z, np.float64)
    total = a + b
    other = total - a
    left = (a - (total - other)) + (b - other)
    even = total.view(np.int64) & 1 == 0
    return np.where((left != 0) & even, np.nextafter(total, np.copysign(np.inf, left)), total).astype(np.float32)


def uint32s(x: Any) -> Any:
    """(k,) uint32 of as many words."""
    return np.array([int(each) & 0xFFFFFFFF for each in x], np.uint32)


def _each(pattern: str, arguments: str, registers: str = "") -> str:
    """PTX of a pattern for each of eight: ``@`` is its result, ``a``, ``b``, ... in brackets are the arguments' parts of it."""
    places, at = [], 8
    for letter in arguments:
        places.append(at)
        at += _SIZES.get(letter, 1)
    made = []
    for k in range(8):
        text = pattern.replace("@", f"t{k}")
        for number, letter in enumerate(arguments):
            text = text.replace(f"[{'abcd'[number]}]", f"${places[number] + (k if letter in 'ew' else 0)}")
        made.append(text)
    return whole(made, [f"t{k}" for k in range(8)], f".reg .b32 t<8>; {registers}")


def whole(lines: list[str], results: list[str], registers: str) -> str:
    """Lines of PTX, and their results into where they belong."""
    return " ".join(["{", registers, *lines, *(f"mov.b32 ${at}, {name};" for at, name in enumerate(results)), "}"])


def _spread() -> str:
    lines = []
    for k in range(4):
        lines += [f"shl.b32 t{2 * k}, ${8 + k}, 16;", f"and.b32 t{2 * k + 1}, ${8 + k}, 0xFFFF0000;"]
    return whole(lines, [f"t{k}" for k in range(8)], ".reg .b32 t<8>;")


@statement(_spread(), "v", "e", pure=True)
def eight(words):  # type: ignore[no-untyped-def]
    """The numbers of 16 bytes of bf16."""
    each = uint32s(words)
    return tuple(np.stack((each << np.uint32(16), each & np.uint32(0xFFFF0000)), 1).ravel().view(np.float32))


@statement(_each("add.rn.f32 @, [a], [b];", "ee"), "ee", "e", pure=True)
def sums(x, y):  # type: ignore[no-untyped-def]
    return tuple(_floats(x) + _floats(y))


@statement(_each("sub.rn.f32 @, [a], [b];", "ee"), "ee", "e", pure=True)
def differences(x, y):  # type: ignore[no-untyped-def]
    return tuple(_floats(x) - _floats(y))


@statement(_each("fma.rn.f32 @, [b], [c], [a];", "eef"), "eef", "e", pure=True)
def joined(x, y, sign):  # type: ignore[no-untyped-def]
    """Sums, or with -1 as ``sign`` differences: a product with 1 or -1 is exact, so there is one rounding, as in those."""
    return tuple(_floats(x) + _floats(y) * np.float32(sign))


@statement(_each("shfl.sync.bfly.b32 @, [a], [b], 0x1F, 0xFFFFFFFF;", "er"), "er", "e", together=True)
def from_lane(x, flip):  # type: ignore[no-untyped-def]
    """Those of the lane whose number differs in these bits."""
    return cuda.shfl_xor_sync(0xFFFFFFFF, x, int(flip))


@statement(_each("min.NaN.f32 @, [a], [b];", "ee"), "ee", "e", pure=True)
def smaller_each(x, y):  # type: ignore[no-untyped-def]
    """NaN where one is."""
    return tuple(np.minimum(_floats(x), _floats(y)))


@statement(_each("max.NaN.f32 @, [a], [b];", "ee"), "ee", "e", pure=True)
def larger_each(x, y):  # type: ignore[no-untyped-def]
    """Likewise."""
    return tuple(np.maximum(_floats(x), _floats(y)))


@statement(_each("abs.f32 u, [a]; abs.f32 @, [b]; max.NaN.f32 @, u, @;", "ee", ".reg .b32 u;"), "ee", "e", pure=True)
def reaches(x, y):  # type: ignore[no-untyped-def]
    """The larger size of two numbers; NaN where one is."""
    return tuple(np.maximum(np.abs(_floats(x)), np.abs(_floats(y))))


def _folded(step: str) -> str:
    lines = [f"mov.b32 t{k}, ${1 + k};" for k in range(8)]
    lines += [f"{step} t{k}, t{k}, t{k + 4};" for k in range(4)]
    lines += [f"{step} t0, t0, t2;", f"{step} t1, t1, t3;", f"{step} t0, t0, t1;"]
    return whole(lines, ["t0"], ".reg .b32 t<8>;")


@statement(_folded("min.NaN.f32"), "e", "f", pure=True)
def smallest(x):  # type: ignore[no-untyped-def]
    """NaN where one is."""
    return np.minimum.reduce(_floats(x))


@statement(_folded("max.NaN.f32"), "e", "f", pure=True)
def largest(x):  # type: ignore[no-untyped-def]
    """Likewise."""
    return np.maximum.reduce(_floats(x))


def _turned() -> str:
    names = [f"${8 + k}" for k in range(8)]
    lines: list[str] = []
    for half in (1, 2, 4):
        made = list(names)
        for k in range(8):
            if not k & half:
                a, b = f"t{len(lines)}", f"t{len(lines) + 1}"
                lines += [f"add.rn.f32 {a}, {names[k]}, {names[k + half]};", f"sub.rn.f32 {b}, {names[k]}, {names[k + half]};"]
                made[k], made[k + half] = a, b
        names = made
    return whole(lines, names, ".reg .b32 t<24>;")


@statement(_turned(), "e", "e", pure=True)
def turned(x):  # type: ignore[no-untyped-def]
    """The first three steps of a rotation: neighbours, then those two apart, then four."""
    line = _floats(x)
    for half in (1, 2, 4):
        pairs = line.reshape(-1, 2, half)
        line = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1).ravel()
    return tuple(line)


_COUNTED = " ".join(f"setp.gt.u32 p, u, {root}; selp.u32 w, 1, 0, p; add.u32 @, @, w;" for root in ROOTS)
_SCALE_CODE = (
    f"and.b32 u, [a], {_MANTISSA}; shr.b32 @, [a], 23; shl.b32 @, @, 2; {_COUNTED} max.u32 @, @, {4 * LEAST_SCALE}; "
    f"sub.u32 @, @, {4 * LEAST_SCALE};"
)


def _scale_codes() -> str:
    """Eight numbers and the lane: of each exchange a lane keeps one half, and gives the other."""
    lines = ["and.b32 u, $9, 16; setp.ne.u32 high, u, 0; and.b32 u, $9, 8; setp.ne.u32 odd, u, 0;"]
    lines += [f"mov.b32 t{k}, ${1 + k};" for k in range(8)]
    for flip, upper, half in ((16, "high", 4), (8, "odd", 2)):
        for k in range(half):
            a, b = f"t{k}", f"t{k + half}"
            lines += [f"selp.b32 u, {a}, {b}, {upper}; selp.b32 {a}, {b}, {a}, {upper};"]
            lines += [f"shfl.sync.bfly.b32 u, u, {flip}, 0x1F, 0xFFFFFFFF; max.NaN.f32 {a}, {a}, u;"]
    lines += [_SCALE_CODE.replace("[a]", f"t{k}").replace("@", f"t{4 + k}") for k in range(2)]
    return whole(
        [*lines, "shl.b32 t5, t5, 16;", "or.b32 t4, t4, t5;"], ["t4"], ".reg .b32 t<8>, u, w; .reg .pred p, odd, high;"
    )


@statement(_scale_codes(), "er", "r", together=True)
def scale_codes(most, lane):  # type: ignore[no-untyped-def]
    """Of the largest of four lanes that lie 8 and 16 apart, number by number, codes of the first scale that is not below it.

    None is negative. Lane ``l`` has those of numbers ``2 * (l >> 3)`` and the one behind, 16 bits each: more than 255 where no
    scale is as large, or a number is NaN.
    """
    numbers = list(_floats(most))
    for flip in (16, 8):
        half = len(numbers) // 2
        kept, given = (slice(half, None), slice(0, half)) if lane & flip else (slice(0, half), slice(half, None))
        seen = [cuda.shfl_xor_sync(0xFFFFFFFF, number, flip) for number in numbers[given]]
        numbers = list(np.maximum(_floats(numbers[kept]), _floats(seen)))
    bits = _floats(numbers).view(np.uint32)
    found = 4 * (bits >> 23).astype(np.int64) + sum((bits & _MANTISSA) > root for root in ROOTS)
    codes = np.maximum(found - 4 * LEAST_SCALE, 0).tolist()
    return codes[0] | codes[1] << 16


_GATHERED = """{ .reg .b32 own, seen, which; .reg .pred odd, high;
 and.b32 own, $3, 16; setp.ne.u32 high, own, 0; and.b32 own, $3, 8; setp.ne.u32 odd, own, 0;
 prmt.b32 own, $2, 0, 0x4420;
 shfl.sync.bfly.b32 seen, own, 8, 0x1F, 0xFFFFFFFF;
 selp.b32 which, 0x1054, 0x5410, odd;
 prmt.b32 own, own, seen, which;
 shfl.sync.bfly.b32 seen, own, 16, 0x1F, 0xFFFFFFFF;
 selp.b32 which, seen, own, high;
 selp.b32 own, own, seen, high;
 mov.b32 $0, which;
 mov.b32 $1, own; }"""


@statement(_GATHERED, "rr", "p", together=True)
def gathered(codes, lane):  # type: ignore[no-untyped-def]
    """Two words of a byte for each of eight codes, in all lanes, from what :func:`scale_codes` gives each."""
    own = codes & 0xFF | codes >> 8 & 0xFF00
    seen = cuda.shfl_xor_sync(0xFFFFFFFF, own, 8)
    own = seen | own << 16 if lane & 8 else own | seen << 16
    seen = cuda.shfl_xor_sync(0xFFFFFFFF, own, 16)
    return (seen, own) if lane & 16 else (own, seen)


def _scale(codes: Any, exponent: int) -> Any:
    """Of 8 codes; ``exponent`` is that of code 0."""
    each = np.array(codes, np.int64)
    return tuple((np.array(ROOTS)[each & 3] + ((each >> 2) + exponent << 23)).astype(np.uint32).view(np.float32))


def _bytes_of_two(low: Any, high: Any) -> Any:
    return np.array([int(low), int(high)], np.uint64).astype(np.uint32).view(np.uint8).astype(np.int64)


# Four scales at a time, a byte of each in a word: ``i`` says which root, ``e`` the exponent. What a byte of a root is a
# permutation of the four that there are picks.
_TABLES = [sum((root >> 8 * at & 255) << 8 * k for k, root in enumerate(ROOTS)) for at in range(3)]
_FOUR_SCALES = (
    "shr.b32 u, i, 4; or.b32 i, i, u; prmt.b32 i, i, 0, 0x4420; "
    + " ".join(f"mov.b32 {name}, {table}; prmt.b32 {name}, {name}, 0, i;" for name, table in zip("abc", _TABLES, strict=True))
    + " shl.b32 u, e, 7; lop3.b32 c, u, 0x80808080, c, 0xEA; shr.b32 e, e, 1; and.b32 e, e, 0x7F7F7F7F; "
    "prmt.b32 u, a, b, 0x5140; prmt.b32 a, a, b, 0x7362; prmt.b32 b, c, e, 0x5140; prmt.b32 c, c, e, 0x7362; "
    "prmt.b32 t0, u, b, 0x5410; prmt.b32 t1, u, b, 0x7632; prmt.b32 t2, a, c, 0x5410; prmt.b32 t3, a, c, 0x7632;"
)


def _scales(which: str) -> str:
    """Of two words, with what is added to, or what is left of, each byte of exponents in ``$10``."""
    lines = []
    for at in range(2):
        four = f"{which.replace('[w]', f'${8 + at}')} {_FOUR_SCALES}"
        lines += [re.sub(r"\bt([0-3])\b", lambda found: f"t{4 * at + int(found[1])}", four)]  # noqa: B023
    return whole(lines, [f"t{k}" for k in range(8)], ".reg .b32 t<8>, a, b, c, e, i, u;")


@statement(
    _scales("shr.b32 e, [w], 2; and.b32 e, e, 0x3F3F3F3F; add.u32 e, e, $10; and.b32 i, [w], 0x03030303;"),
    "rrr",
    "e",
    pure=True,
)
def scales_of(low, high, exponents):  # type: ignore[no-untyped-def]
    """Scales by a byte each of two words; each byte of ``exponents`` is that of the scale of code 0, 1 to 190."""
    return _scale(_bytes_of_two(low, high), int(exponents) & 255)


@statement(
    _scales(
        "shr.b32 e, [w], 2; and.b32 e, e, 0x3F3F3F3F; sub.u32 e, $10, e; and.b32 i, [w], 0x03030303; "
        "add.u32 u, i, 0x03030303; shr.b32 u, u, 2; and.b32 u, u, 0x01010101; sub.u32 e, e, u; "
        "sub.u32 i, 0x04040404, i; and.b32 i, i, 0x03030303;"
    ),
    "rrr",
    "e",
    pure=True,
)
def inverses_of(low, high, exponents):  # type: ignore[no-untyped-def]
    """Inverses of these scales, of which that of code 0 has the exponent ``exponents``, 65 to 254: those of minus the codes."""
    return _scale(-_bytes_of_two(low, high), int(exponents) & 255)


# No number is larger than its scale, nor a scale's product with its inverse than 1: so no code lies below the first one.
_CODE = "fma.rm.f32 t{k}, ${a}, ${b}, $17; min.f32 t{k}, t{k}, $18;"


def _keys(begin: int) -> str:
    """Of four numbers from ``begin`` on; behind 16 places of numbers and inverses lie first and last."""
    lines = [_CODE.format(a=1 + begin + k, b=9 + begin + k, k=k) for k in range(4)]
    lines += ["prmt.b32 t0, t0, t1, 0x0040;", "prmt.b32 t2, t2, t3, 0x0040;", "prmt.b32 t0, t0, t2, 0x5410;"]
    return whole(lines, ["t0"], ".reg .b32 t<4>;")


def _codes(rest: Any, inverse: Any, first: Any, last: Any, which: slice) -> int:
    with np.errstate(all="ignore"):
        steps = np.floor(_products(_floats(rest)[which], _floats(inverse)[which])) + np.float64(first)
        return int((np.fmin(steps, np.float64(last)) - NEAREST).astype(np.int64).astype(np.uint8).view(np.uint32)[0])


@statement(_keys(0), "eeff", "r", pure=True)
def low_codes(rest, inverse, first, last):  # type: ignore[no-untyped-def]
    """A byte for each of the first four: which step it lies in. ``NEAREST`` and a code is ``first`` of what lies in the step
    from 0 on, ``last`` of what lies in the last one or above."""
    return _codes(rest, inverse, first, last, slice(0, 4))


@statement(_keys(4), "eeff", "r", pure=True)
def high_codes(rest, inverse, first, last):  # type: ignore[no-untyped-def]
    """Of the last four."""
    return _codes(rest, inverse, first, last, slice(4, 8))


def _values() -> str:
    """Four eights, then zero and inverse."""
    lines = [f"mov.b32 m, {_NEAREST_BITS};"]
    for j in range(8):
        for i in range(4):
            lines += [f"sub.rn.f32 u{i}, ${8 + 4 * j + i}, $40;", f"fma.rn.f32 u{i}, u{i}, $41, m;"]
        lines += ["prmt.b32 u0, u0, u1, 0x0040;", "prmt.b32 u2, u2, u3, 0x0040;", f"prmt.b32 t{j}, u0, u2, 0x5410;"]
    return whole(lines, [f"t{k}" for k in range(8)], ".reg .b32 t<8>, u<4>, m;")


@statement(_values(), "eeeeff", "w", pure=True)
def value_codes(a, b, c, d, zero, inverse):  # type: ignore[no-untyped-def]
    """A byte for each number, in their order: how many steps it lies above zero, the nearest, of two the even one."""
    with np.errstate(all="ignore"):
        steps = np.rint(_products(np.stack([_floats(x) for x in (a, b, c, d)]) - np.float32(zero), np.float32(inverse)))
        return tuple(steps.astype(np.uint8).view(np.uint32).ravel().tolist())


def _counted(codes: list[tuple[str, int]], magic: str) -> list[str]:
    """Lines that put codes, bytes of words, into ``t``: 256 of each above 2**23."""
    return [f"prmt.b32 t{k}, {word}, {magic}, 0x74{byte}4;" for k, (word, byte) in enumerate(codes)]


def _key_numbers() -> str:
    """Two words, middle, steps, means and magic; pairs of bf16."""
    lines = _counted([(f"${4 + k // 4}", k % 4) for k in range(8)], "$23")
    lines += [
        f"sub.rn.f32 t{k}, t{k}, $6; fma.rn.f32 t{k}, t{k}, ${7 + k}, ${15 + k};" for k in range(8)
    ]
    lines += [f"cvt.rn.bf16x2.f32 t{k}, t{2 * k + 1}, t{2 * k};" for k in range(4)]
    return whole(lines, [f"t{k}" for k in range(4)], ".reg .b32 t<8>;")


@statement(_key_numbers(), "rrfeef", "v", pure=True)
def key_numbers(low, high, middle, step, mean, magic):  # type: ignore[no-untyped-def]
    """16 bytes of bf16 from eight codes: as many 256ths of a step as are left of 2**23 and 256 codes without ``middle``.

    ``magic`` is 2**23: a number that the compiler does not know, which else takes a register for each permutation instead.
    """
    codes = np.array([int(low), int(high)], np.uint64).astype(np.uint32).view(np.uint8)
    count = np.float32(magic) + np.float32(256) * codes.astype(np.float32) - np.float32(middle)
    with np.errstate(over="ignore"):
        return brain(tuple(_fused(count, _floats(step), _floats(mean))))


def _value_numbers() -> str:
    """Two words, then step, zero and magic."""
    lines = _counted([(f"${8 + k // 4}", k % 4) for k in range(8)], "$12")
    lines += [f"sub.rn.f32 t{k}, t{k}, $12; fma.rn.f32 t{k}, t{k}, $10, $11;" for k in range(8)]
    return whole(lines, [f"t{k}" for k in range(8)], ".reg .b32 t<8>;")


@statement(_value_numbers(), "rrfff", "e", pure=True)
def value_numbers(low, high, step, zero, magic):  # type: ignore[no-untyped-def]
    """Eight numbers from the bytes of two words, where ``step`` is a 256th of one, and ``magic`` as of :func:`key_numbers`.

    A step has 11 bits and a code 8, so their product is exact: with its sum there is one rounding in two operations too.
    """
    codes = np.float32(256) * uint32s((low, high)).view(np.uint8).astype(np.float32)
    return tuple(codes * np.float32(step) + np.float32(zero))


@statement(
    whole(
        [f"cvt.rn.bf16x2.f32 t{k}, ${5 + 2 * k}, ${4 + 2 * k};" for k in range(4)],
        [f"t{k}" for k in range(4)],
        ".reg .b32 t<4>;",
    ),
    "e",
    "v",
    pure=True,
)
def brain(x):  # type: ignore[no-untyped-def]
    """Eight numbers, none NaN, as 16 bytes of bf16: the nearest, of two the even one."""
    bits = _floats(x).view(np.uint32).astype(np.uint64)
    halves = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
    return tuple(halves.view(np.uint32).tolist())
