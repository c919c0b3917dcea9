"""What is the same in all lanes of a warp: which one of the grid it is, of how many, and what is dealt out to it."""

from __future__ import annotations

from typing import Any

from numba import cuda
from numba.cuda import types

ALL: Any = 0xFFFFFFFF  # the mask of a whole warp
uint32, int32 = types.uint32, types.int32


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def uniform(value):  # type: ignore[no-untyped-def]
    """A 32-bit number that is the same in every lane, so that the compiler knows: branches on it divide no warp."""
    return uint32(cuda.shfl_sync(ALL, int32(value), 0))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def warp_of_grid():  # type: ignore[no-untyped-def]
    """Number of this warp."""
    return uint32((cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) >> 5)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def warps_of_grid():  # type: ignore[no-untyped-def]
    """How many there are."""
    return uint32((cuda.gridDim.x * cuda.blockDim.x) >> 5)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def first_dealt(n_pieces):  # type: ignore[no-untyped-def]
    """Where pieces are dealt out, those of a block one after another: this warp's first one, as block and piece, and how far it
    is from one to the next. By additions, :func:`next_dealt`: a division for each piece would cost as much as its copy."""
    warp, warps = warp_of_grid(), warps_of_grid()
    b, skip = uint32(warp // n_pieces), uint32(warps // n_pieces)
    return (b, uint32(warp - b * n_pieces)), (skip, uint32(warps - skip * n_pieces))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def next_dealt(at, step, n_pieces):  # type: ignore[no-untyped-def]
    """The warp's piece behind one."""
    b, p = uint32(at[0] + step[0]), uint32(at[1] + step[1])
    if p >= n_pieces:
        p = uint32(p - n_pieces)
        b = uint32(b + uint32(1))
    return b, p
