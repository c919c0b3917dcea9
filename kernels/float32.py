"""Arithmetic of float32 whose every bit is given: each statement rounds once, and none is ever joined with another.

Compilers make one rounding of a product and a sum, where the host makes two. PTX with a rounding mode in its name is left as
it is (PTX ISA, *add*, *mul*), and subnormal numbers are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvortex.kernels.ptx import statement


def _word(number: Any) -> int:
    return int(np.float32(number).view(np.uint32))


@statement("mov.b32 $0, $1;", "f", "r", pure=True)
def word_of(number):  # type: ignore[no-untyped-def]
    """The bits of a number."""
    return _word(number)


@statement("mov.b32 $0, $1;", "r", "f", pure=True)
def number_of(word):  # type: ignore[no-untyped-def]
    """The number that has these bits."""
    return np.uint32(word).view(np.float32)


@statement("cvt.rn.f32.u32 $0, $1;", "r", "f", pure=True)
def whole(word):  # type: ignore[no-untyped-def]
    """An integer below 2**24 as a number."""
    return np.float32(word)


@statement("add.rn.f32 $0, $1, $2;", "ff", "f", pure=True)
def plus(a, b):  # type: ignore[no-untyped-def]
    return np.float32(a) + np.float32(b)


@statement("sub.rn.f32 $0, $1, $2;", "ff", "f", pure=True)
def minus(a, b):  # type: ignore[no-untyped-def]
    return np.float32(a) - np.float32(b)


@statement("mul.rn.f32 $0, $1, $2;", "ff", "f", pure=True)
def times(a, b):  # type: ignore[no-untyped-def]
    return np.float32(a) * np.float32(b)


@statement("div.rn.f32 $0, $1, $2;", "ff", "f", pure=True)
def over(a, b):  # type: ignore[no-untyped-def]
    return np.float32(a) / np.float32(b)


@statement("min.NaN.f32 $0, $1, $2;", "ff", "f", pure=True)
def smaller(a, b):  # type: ignore[no-untyped-def]
    """Of two numbers; NaN where one is."""
    return np.minimum(np.float32(a), np.float32(b))


@statement("max.NaN.f32 $0, $1, $2;", "ff", "f", pure=True)
def larger(a, b):  # type: ignore[no-untyped-def]
    """Likewise."""
    return np.maximum(np.float32(a), np.float32(b))


@statement("{ .reg .f32 t; abs.f32 t, $2; max.NaN.f32 $0, $1, t; }", "ff", "f", pure=True)
def reach(so_far, number):  # type: ignore[no-untyped-def]
    """The larger of a number that is not negative, and the size of another; NaN where one is."""
    return np.maximum(np.float32(so_far), np.abs(np.float32(number)))


@statement("{ .reg .b16 t; cvt.rm.f16.f32 t, $1; cvt.u32.u16 $0, t; }", "f", "r", pure=True)
def half_down(number):  # type: ignore[no-untyped-def]
    """The largest fp16 that is not above a number of at most 65,504 in size, which is not -0, as bits."""
    if not abs(number) <= 65504:
        return 0
    half = np.float16(number)
    return int((np.nextafter(half, np.float16(-np.inf)) if half > number else half).view(np.uint16))


@statement("{ .reg .b16 t; cvt.rp.f16.f32 t, $1; cvt.u32.u16 $0, t; }", "f", "r", pure=True)
def half_up(number):  # type: ignore[no-untyped-def]
    """The smallest fp16 that is not below a number from 0 to 65,504, as bits."""
    if not abs(number) <= 65504:
        return 0
    half = np.float16(number)
    return int((np.nextafter(half, np.float16(np.inf)) if half < number else half).view(np.uint16))
