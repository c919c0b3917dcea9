"""What is the same in all lanes of a warp: which one of the grid it is, of how many."""

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
