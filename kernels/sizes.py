"""What shares of a record tell each other while a launch runs: how many bytes each has, and where the next one's begin.

A share that knows its bytes says so in a cell of its own in VRAM, 0 until then, and who needs what lies before his own bytes
waits for all shares before. Shares must be asked for in their order (:mod:`kvortex.kernels.shares`, with no dealing): a warp
waits for earlier shares alone, each of which a warp has that runs, and which waits for earlier ones, so that the first of them
is never kept waiting. A cell's number says all that there is to know, so that no order among other loads and stores is needed.
"""

from __future__ import annotations

import ctypes
from typing import Any

from numba import cuda

from kvortex.kernels.flags import nap
from kvortex.kernels.plane import uint32, uint64, warp_sum
from kvortex.kernels.ptx import statement
from kvortex.kernels.warp import ALL

_NAP: Any = 64  # ns


@statement("st.relaxed.gpu.global.u32 [$0], $1;", "lr")
def _tell(address, number):  # type: ignore[no-untyped-def]
    ctypes.c_uint32.from_address(int(address)).value = int(number)


@statement("ld.relaxed.gpu.global.u32 $0, [$1];", "l", "r")
def _told(address):  # type: ignore[no-untyped-def]
    return ctypes.c_uint32.from_address(int(address)).value


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def publish(cells, share, nbytes, lane):  # type: ignore[no-untyped-def]
    """Says how many bytes a share of the record with these cells has."""
    if lane == uint32(0):
        _tell(cells + uint64(4) * uint64(share), uint32(nbytes + uint32(1)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def bytes_before(cells, share, lane):  # type: ignore[no-untyped-def]
    """Of all shares before one, the same in every lane; waits until these have said so."""
    total = uint32(0)
    at = uint32(0)
    while at < share:
        k = uint32(at + lane)
        told = uint32(1)
        if k < share:
            told = uint32(_told(cells + uint64(4) * uint64(k)))
        while uint32(cuda.ballot_sync(ALL, told == uint32(0))) != uint32(0):
            nap(uint32(_NAP))
            if told == uint32(0):
                told = uint32(_told(cells + uint64(4) * uint64(k)))
        total = uint32(total + told - uint32(1))
        at = uint32(at + uint32(32))
    return warp_sum(total)
