"""One warp copies a stretch of bytes through the widest lanes that both addresses allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.lane import (
    early16,
    fresh1,
    fresh2,
    fresh4,
    fresh8,
    fresh16,
    load1,
    load2,
    load4,
    load8,
    store1,
    store2,
    store4,
    store8,
    store16,
)

_U64 = types.uint64


def four_of(get16: Any) -> Callable[..., Any]:
    """A lane's 16 bytes of four rows, in flight together; a row is 512 bytes."""

    @cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
    def get_four(src):  # type: ignore[no-untyped-def]
        return get16(src), get16(src + _U64(512)), get16(src + _U64(1024)), get16(src + _U64(1536))

    return get_four  # type: ignore[no-any-return]


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def put_four(dst, words):  # type: ignore[no-untyped-def]
    """The reverse."""
    store16(dst, words[0])
    store16(dst + _U64(512), words[1])
    store16(dst + _U64(1024), words[2])
    store16(dst + _U64(1536), words[3])


def _mover(get16: Any, get8: Any, get4: Any, get2: Any, get1: Any) -> Callable[..., None]:
    get_four = four_of(get16)

    @cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
    def move(dst, src, nbytes, lane):  # type: ignore[no-untyped-def]
        align = dst | src
        at = _U64(lane)
        if align & _U64(15) == _U64(0):
            at = at * _U64(16)
            while at + _U64(8 * 512) <= nbytes + _U64(lane * 16):  # eight loads in flight: 4 KiB a warp and turn
                first, other = get_four(src + at), get_four(src + at + _U64(2048))
                put_four(dst + at, first)
                put_four(dst + at + _U64(2048), other)
                at += _U64(4096)
            while at + _U64(4 * 512) <= nbytes + _U64(lane * 16):  # four loads in flight: 2 KiB a warp and turn
                put_four(dst + at, get_four(src + at))
                at += _U64(2048)
            while at + _U64(16) <= nbytes:
                store16(dst + at, get16(src + at))
                at += _U64(512)
            at = (nbytes & ~_U64(15)) + _U64(lane)
        elif align & _U64(7) == _U64(0):
            at = at * _U64(8)
            while at + _U64(8) <= nbytes:
                store8(dst + at, get8(src + at))
                at += _U64(256)
            at = (nbytes & ~_U64(7)) + _U64(lane)
        elif align & _U64(3) == _U64(0):
            at = at * _U64(4)
            while at + _U64(4) <= nbytes:
                store4(dst + at, get4(src + at))
                at += _U64(128)
            at = (nbytes & ~_U64(3)) + _U64(lane)
        elif align & _U64(1) == _U64(0):
            at = at * _U64(2)
            while at + _U64(2) <= nbytes:
                store2(dst + at, get2(src + at))
                at += _U64(64)
            at = (nbytes & ~_U64(1)) + _U64(lane)
        while at < nbytes:
            store1(dst + at, get1(src + at))
            at += _U64(32)

    return move  # type: ignore[no-any-return]


CONSTANT, FRESH = (early16, load8, load4, load2, load1), (fresh16, fresh8, fresh4, fresh2, fresh1)
# From memory that nobody writes while the kernel runs, or, of whole 16 bytes, that the warp itself wrote before; and from
# memory that a DMA writes while it runs.
move: Any = _mover(*CONSTANT)
move_fresh: Any = _mover(*FRESH)
