"""Eight numbers or words of a lane at a time, in registers: what the codes of bounded loss do to each of them.

A text of PTX for all eight is one call to Numba's compiler, which takes a minute for as many calls as there are additions.
Floats are as in :mod:`kvortex.kernels.float32`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from kvortex.kernels.ptx import statement

# Mantissas of the quarter powers of two between 1 and 2; the exponent of the least scale, 2**-32.
ROOTS = (0, 0x1837F0, 0x3504F3, 0x5744FD)
LEAST_SCALE = 95
_MANTISSA, _NEAREST = 0x7FFFFF, 0x4B400000  # the latter is 1.5 * 2**23, where float32 counts in ones
_SIZES = {"e": 8, "w": 8, "v": 4}


def _floats(x: Any) -> Any:
    return np.array(x, np.float32)


def _words(x: Any) -> Any:
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
    return _whole(made, [f"t{k}" for k in range(8)], f".reg .b32 t<8>; {registers}")


def _whole(lines: list[str], results: list[str], registers: str) -> str:
    """Lines of PTX, and their results into where they belong."""
    return " ".join(["{", registers, *lines, *(f"mov.b32 ${at}, {name};" for at, name in enumerate(results)), "}"])


def _spread() -> str:
    lines = []
    for k in range(4):
        lines += [f"shl.b32 t{2 * k}, ${8 + k}, 16;", f"and.b32 t{2 * k + 1}, ${8 + k}, 0xFFFF0000;"]
    return _whole(lines, [f"t{k}" for k in range(8)], ".reg .b32 t<8>;")


@statement(_spread(), "v", "e", pure=True)
def eight(words):  # type: ignore[no-untyped-def]
    """The numbers of 16 bytes of bf16."""
    each = _words(words)
    return tuple(np.stack((each << np.uint32(16), each & np.uint32(0xFFFF0000)), 1).ravel().view(np.float32))


@statement(_each("add.rn.f32 @, [a], [b];", "ee"), "ee", "e", pure=True)
def sums(x, y):  # type: ignore[no-untyped-def]
    return tuple(_floats(x) + _floats(y))


@statement(_each("sub.rn.f32 @, [a], [b];", "ee"), "ee", "e", pure=True)
def differences(x, y):  # type: ignore[no-untyped-def]
    return tuple(_floats(x) - _floats(y))


@statement(_each("mul.rn.f32 @, [a], [b];", "ef"), "ef", "e", pure=True)
def scaled(x, factor):  # type: ignore[no-untyped-def]
    return tuple(_floats(x) * np.float32(factor))


@statement(_each("xor.b32 u, [b], [c]; add.rn.f32 @, [a], u;", "eer", ".reg .b32 u;"), "eer", "e", pure=True)
def joined(x, y, sign):  # type: ignore[no-untyped-def]
    """Sums, or with the highest bit as ``sign`` differences."""
    return tuple(_floats(x) + (_floats(y).view(np.uint32) ^ np.uint32(sign)).view(np.float32))


@statement(_each("shfl.sync.bfly.b32 @, [a], [b], 0x1F, 0xFFFFFFFF;", "er"), "er", "e", together=True)
def from_lane(x, flip):  # type: ignore[no-untyped-def]
    """Those of the lane whose number differs in these bits."""
    return cuda.shfl_xor_sync(0xFFFFFFFF, x, int(flip))


@statement(_each("min.f32 @, [a], [b];", "ee"), "ee", "e", pure=True)
def smaller_each(x, y):  # type: ignore[no-untyped-def]
    """Of numbers of which none is NaN."""
    return tuple(np.fmin(_floats(x), _floats(y)))


@statement(_each("max.f32 @, [a], [b];", "ee"), "ee", "e", pure=True)
def larger_each(x, y):  # type: ignore[no-untyped-def]
    """Likewise."""
    return tuple(np.fmax(_floats(x), _floats(y)))


@statement(_each("abs.f32 u, [a]; abs.f32 @, [b]; max.NaN.f32 @, u, @;", "ee", ".reg .b32 u;"), "ee", "e", pure=True)
def reaches(x, y):  # type: ignore[no-untyped-def]
    """The larger size of two numbers; NaN where one is."""
    return tuple(np.maximum(np.abs(_floats(x)), np.abs(_floats(y))))


def _folded(step: str) -> str:
    lines = [f"mov.b32 t{k}, ${1 + k};" for k in range(8)]
    lines += [f"{step} t{k}, t{k}, t{k + 4};" for k in range(4)]
    lines += [f"{step} t0, t0, t2;", f"{step} t1, t1, t3;", f"{step} t0, t0, t1;"]
    return _whole(lines, ["t0"], ".reg .b32 t<8>;")


@statement(_folded("min.f32"), "e", "f", pure=True)
def smallest(x):  # type: ignore[no-untyped-def]
    """Of numbers of which none is NaN."""
    return np.fmin.reduce(_floats(x))


@statement(_folded("max.f32"), "e", "f", pure=True)
def largest(x):  # type: ignore[no-untyped-def]
    """Likewise."""
    return np.fmax.reduce(_floats(x))


@statement(_folded("max.u32"), "e", "r", pure=True)
def most_word(x):  # type: ignore[no-untyped-def]
    """The largest of the bits of numbers that are not negative: those of NaN are above all others."""
    return int(_floats(x).view(np.uint32).max())


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
    return _whole(lines, names, ".reg .b32 t<24>;")


@statement(_turned(), "e", "e", pure=True)
def turned(x):  # type: ignore[no-untyped-def]
    """The first three steps of a rotation: neighbours, then those two apart, then four."""
    line = _floats(x)
    for half in (1, 2, 4):
        pairs = line.reshape(-1, 2, half)
        line = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1).ravel()
    return tuple(line)


_COUNTED = " ".join(f"setp.gt.u32 p, u, {root}; selp.u32 w, 1, 0, p; add.u32 @, @, w;" for root in ROOTS)


@statement(
    _each(
        f"and.b32 u, [a], {_MANTISSA}; shr.b32 @, [a], 23; shl.b32 @, @, 2; {_COUNTED} max.u32 @, @, {4 * LEAST_SCALE}; "
        f"sub.u32 @, @, {4 * LEAST_SCALE};",
        "e",
        ".reg .b32 u, w; .reg .pred p;",
    ),
    "e",
    "w",
    pure=True,
)
def scale_codes(most):  # type: ignore[no-untyped-def]
    """Codes of the first scale that is not below each number."""
    bits = _floats(most).view(np.uint32)
    found = 4 * (bits >> 23).astype(np.int64) + sum((bits & _MANTISSA) > root for root in ROOTS)
    return tuple(np.maximum(found - 4 * LEAST_SCALE, 0).tolist())


_ROOT = f"and.b32 u, w, 3; mov.b32 @, {ROOTS[3]}; " + " ".join(
    f"setp.eq.u32 p, u, {k}; selp.u32 @, {ROOTS[k]}, @, p;" for k in (2, 1, 0)
)
_SCALE = f"{_ROOT} shr.u32 w, w, 2; add.u32 w, w, {LEAST_SCALE}; shl.b32 w, w, 23; add.u32 @, @, w; add.u32 @, @, [b];"


def _scale(codes: Any, more: Any) -> Any:
    each = _words(codes).astype(np.int64)
    bits = np.array(ROOTS)[each & 3] + ((each >> 2) + LEAST_SCALE << 23) + int(more)
    return tuple((bits & 0xFFFFFFFF).astype(np.uint32).view(np.float32))


@statement(_each(f"sub.u32 w, 256, [a]; {_SCALE}", "wr", ".reg .b32 u, w; .reg .pred p;"), "wr", "e", pure=True)
def inverses(codes, more):  # type: ignore[no-untyped-def]
    """The inverse of each scale, which is the scale of 256 - code; ``more`` is added to its bits."""
    return _scale([256 - int(code) for code in codes], more)


def _bytes_of_two(line: str) -> list[str]:
    """A line for each of 8 bytes in ``$8`` and ``$9``."""
    return [line.replace("@", f"t{k}").replace("[a]", f"${8 + k // 4}").replace("#", str(k % 4)) for k in range(8)]


_STEPS = _SCALE.replace("[b]", "$10")


@statement(
    _whole(
        _bytes_of_two(f"prmt.b32 w, [a], 0, 0x444#; {_STEPS}"),
        [f"t{k}" for k in range(8)],
        ".reg .b32 t<8>, u, w; .reg .pred p;",
    ),
    "rrr",
    "e",
    pure=True,
)
def scales_of(low, high, more):  # type: ignore[no-untyped-def]
    """Scales by a byte each of two words; ``more`` is added to their bits."""
    return _scale(list(np.array([int(low), int(high)], np.uint64).astype(np.uint32).view(np.uint8)), more)


_CODE = "mul.rn.f32 t, ${a}, ${b}; max.f32 t, t, l; min.f32 t, t, ${top}; add.rm.f32 t{k}, t, m;"


def _keys(begin: int) -> str:
    """Of four numbers from ``begin`` on; behind 16 places of numbers and inverses lie half and top."""
    lines = ["neg.f32 l, $17;", f"mov.b32 m, {_NEAREST};", "add.rn.f32 m, m, $17;"]
    lines += [_CODE.format(a=1 + begin + k, b=9 + begin + k, top=18, k=k) for k in range(4)]
    lines += ["prmt.b32 t0, t0, t1, 0x0040;", "prmt.b32 t2, t2, t3, 0x0040;", "prmt.b32 t0, t0, t2, 0x5410;"]
    return _whole(lines, ["t0"], ".reg .b32 t<4>, t, l, m;")


def _codes(rest: Any, inverse: Any, half: Any, top: Any, which: slice) -> int:
    with np.errstate(all="ignore"):
        part = np.fmin(np.fmax(_floats(rest)[which] * _floats(inverse)[which], -np.float32(half)), np.float32(top))
        return int((np.floor(part) + np.float32(half)).astype(np.uint8).view(np.uint32)[0])


@statement(_keys(0), "eeff", "r", pure=True)
def low_codes(rest, inverse, half, top):  # type: ignore[no-untyped-def]
    """A byte for each of the first four: the step that it lies in, from ``half`` of them below 0 to that of ``top``."""
    return _codes(rest, inverse, half, top, slice(0, 4))


@statement(_keys(4), "eeff", "r", pure=True)
def high_codes(rest, inverse, half, top):  # type: ignore[no-untyped-def]
    """Of the last four."""
    return _codes(rest, inverse, half, top, slice(4, 8))


def _values() -> str:
    """Four eights, then zero and inverse."""
    lines = [f"mov.b32 m, {_NEAREST};"]
    for j in range(8):
        for i in range(4):
            lines += [f"sub.rn.f32 u{i}, ${8 + 8 * i + j}, $40;", f"mul.rn.f32 u{i}, u{i}, $41;", f"add.rn.f32 u{i}, u{i}, m;"]
        lines += ["prmt.b32 u0, u0, u1, 0x0040;", "prmt.b32 u2, u2, u3, 0x0040;", f"prmt.b32 t{j}, u0, u2, 0x5410;"]
    return _whole(lines, [f"t{k}" for k in range(8)], ".reg .b32 t<8>, u<4>, m;")


@statement(_values(), "eeeeff", "w", pure=True)
def value_codes(a, b, c, d, zero, inverse):  # type: ignore[no-untyped-def]
    """Byte i of word j: how many steps number j of eight i lies above zero, the nearest, of two the even one."""
    with np.errstate(all="ignore"):
        steps = np.rint((np.stack([_floats(x) for x in (a, b, c, d)], 1) - np.float32(zero)) * np.float32(inverse))
        return tuple(np.ascontiguousarray(steps.astype(np.uint8)).view(np.uint32).ravel().tolist())


def _decoded(codes: list[tuple[str, int]], minus: str, step: Any, plus: Any) -> list[str]:
    """Lines that put numbers into ``t``: codes are bytes of words, and count in 256ths of 2**15."""
    lines = []
    for k, (word, byte) in enumerate(codes):
        lines += [f"prmt.b32 t{k}, {word}, m, 0x74{byte}4;", f"sub.rn.f32 t{k}, t{k}, {minus};"]
        lines += [f"mul.rn.f32 t{k}, t{k}, {step(k)};", f"add.rn.f32 t{k}, t{k}, {plus(k)};"]
    return ["mov.b32 m, 0x4B000000;", *lines]


def _key_numbers() -> str:
    """Two words, middle, steps and means; pairs of bf16."""
    lines = _decoded([(f"${4 + k // 4}", k % 4) for k in range(8)], "$6", lambda k: f"${7 + k}", lambda k: f"${15 + k}")
    lines += [f"cvt.rn.bf16x2.f32 t{k}, t{2 * k + 1}, t{2 * k};" for k in range(4)]
    return _whole(lines, [f"t{k}" for k in range(4)], ".reg .b32 t<8>, m;")


@statement(_key_numbers(), "rrfee", "v", pure=True)
def key_numbers(low, high, middle, step, mean):  # type: ignore[no-untyped-def]
    """16 bytes of bf16 from eight codes: as many 256ths of a step as are left of 2**23 and 256 codes without ``middle``."""
    codes = np.array([int(low), int(high)], np.uint64).astype(np.uint32).view(np.uint8)
    count = np.float32(1 << 23) + np.float32(256) * codes.astype(np.float32) - np.float32(middle)
    with np.errstate(over="ignore"):
        return brain(tuple(count * _floats(step) + _floats(mean)))


def _value_numbers(byte: int) -> str:
    lines = _decoded([(f"${8 + k}", byte) for k in range(8)], "m", lambda k: "$16", lambda k: "$17")
    return _whole(lines, [f"t{k}" for k in range(8)], ".reg .b32 t<8>, m;")


def _numbers_of(byte: int) -> Any:
    @statement(_value_numbers(byte), "wff", "e", pure=True)
    def numbers(words, step, zero):  # type: ignore[no-untyped-def]
        """Eight numbers from one byte of each word, where ``step`` is a 256th of one."""
        codes = _words(words).view(np.uint8).reshape(8, 4)[:, byte].astype(np.float32)
        return tuple(np.float32(256) * codes * np.float32(step) + np.float32(zero))

    return numbers


value_numbers_0, value_numbers_1, value_numbers_2, value_numbers_3 = (_numbers_of(byte) for byte in range(4))


@statement(
    _whole(
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
