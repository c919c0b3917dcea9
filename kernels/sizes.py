"""What shares of a record tell each other while a launch runs: how many bytes each has, and where the next one's begin.

A share that knows its bytes says so in a cell of its own in VRAM, 0 until then, and who needs what lies before his own bytes
waits for all shares before. Shares must be asked for in their order (:mod:`kvortex.kernels.shares`, with no dealing): a warp
waits for earlier shares alone, each of which a warp has that runs, and which waits for earlier ones, so that the first of them
is never kept waiting. A cell's number says all that there is to know, so that no order among other loads and stores is needed.
"""

from __future__ import annotations

from typing import Any

from numba import cuda

from kvortex.kernels.flags import nap, tell, told
from kvortex.kernels.plane import uint32, uint64, warp_sum
from kvortex.kernels.warp import ALL

_NAP: Any = 64  # ns


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def publish(cells, share, nbytes, lane):  # type: ignore[no-untyped-def]
    """Says how many bytes a share of the record with these cells has."""
    if lane == uint32(0):
        tell(cells + uint64(4) * uint64(share), uint32(nbytes + uint32(1)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _asked(cells, k, share, known):  # type: ignore[no-untyped-def]
    """A share's cell, unless it is known, or of none that counts."""
    found = known
    if found == uint32(0):
        found = uint32(1)
        if k < share:
            found = uint32(told(cells + uint64(4) * uint64(k)))
    return found


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def bytes_before(cells, share, lane):  # type: ignore[no-untyped-def]
    """Of all shares before one, the same in every lane; waits until these have said so."""
    total = uint32(0)
    at = uint32(0)
    while at < share:  # 128 cells at a time, four loads in flight
        k = uint32(at + lane)
        a = b = c = d = uint32(0)
        waits = True
        while waits:
            a, b = _asked(cells, k, share, a), _asked(cells, uint32(k + uint32(32)), share, b)
            c, d = _asked(cells, uint32(k + uint32(64)), share, c), _asked(cells, uint32(k + uint32(96)), share, d)
            waits = uint32(cuda.ballot_sync(ALL, min(min(a, b), min(c, d)) == uint32(0))) != uint32(0)
            if waits:
                nap(uint32(_NAP))
        total = uint32(total + a + b + c + d - uint32(4))
        at = uint32(at + uint32(128))
    return warp_sum(total)
