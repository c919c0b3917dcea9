"""Steps of ``cachegen`` from numbers and back, a statement each, on the bits of float32: as a host computes them.

Each operation says how it rounds, so it is never contracted with its neighbour; denormals are kept, and quotients are the
nearest. Single operations on numbers are in ``float32.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvortex.kernels.ptx import statement


def _number(bits: Any) -> Any:
    return np.array([int(bits)], np.uint32).view(np.float32)


def _bits(number: Any) -> int:
    return int(number.astype(np.float32).view(np.uint32)[0])


@statement(
    "{ .reg .f32 a, b, c; mov.b32 a, $1; mov.b32 b, $2; mov.b32 c, $3; sub.rn.f32 a, a, b; div.rn.f32 a, a, c; "
    "cvt.rni.f32.f32 a, a; mov.b32 $0, a; }",
    "rrr",
    "r",
    pure=True,
)
def steps_away(value, middle, step):  # type: ignore[no-untyped-def]
    """``rint((value - middle) / step)``."""
    with np.errstate(all="ignore"):
        return _bits(np.rint((_number(value) - _number(middle)) / _number(step)))


@statement(
    "{ .reg .f32 a, b, c; cvt.rn.f32.s32 a, $1; mov.b32 b, $2; mov.b32 c, $3; mul.rn.f32 a, a, b; add.rn.f32 a, a, c; "
    "mov.b32 $0, a; }",
    "rrr",
    "r",
    pure=True,
)
def value_at(steps, step, middle):  # type: ignore[no-untyped-def]
    """``steps * step + middle``, in two roundings; ``steps`` are the 32 bits of a signed integer."""
    with np.errstate(all="ignore"):
        count = np.array([int(steps) & 0xFFFFFFFF], np.uint32).view(np.int32).astype(np.float32)
        return _bits(count * _number(step) + _number(middle))


@statement("{ .reg .f32 a; mov.b32 a, $1; cvt.rzi.s32.f32 $0, a; }", "r", "r", pure=True)
def whole(number):  # type: ignore[no-untyped-def]
    """A number as the 32 bits of a signed integer, towards zero; of one that has none, anything."""
    with np.errstate(all="ignore"):
        return int(np.nan_to_num(np.clip(_number(number), -(2.0**31), 2.0**31 - 128)).astype(np.int32).view(np.uint32)[0])


@statement("div.u32 $0, $1, $2;", "rr", "r", pure=True)
def quotient(number, divisor):  # type: ignore[no-untyped-def]
    """Of two unsigned integers."""
    return int(number) // int(divisor)
