"""Something for a GPU to be busy with while transfers are measured: a kernel that has every multiprocessor, as a product of
large matrices has.

CTAs stay until all work is done and take it in *tiles*, one after another, as persistent kernels do: whoever wants a
multiprocessor waits for the end of the kernel, and one that is kept from the kernel leaves more tiles to the others.
"""

from __future__ import annotations

from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.flags import take

THREADS = 512  # with 32 registers each, so that they fill a multiprocessor to the last thread

_F32 = types.float32
SIGNATURE: Any = types.void(types.uint64, types.int32, types.int32)


def compute(counter, tiles, turns):  # type: ignore[no-untyped-def]
    """Multiplies and adds.

    Parameters
    ----------
    counter : uint64
        Address of a 32-bit number, 0 before the launch, that counts the tiles that were taken.
    tiles, turns : int32
        Tiles of all CTAs together, and what there is to do for each.
    """
    taken = cuda.shared.array(1, types.uint32)
    a, b = _F32(cuda.threadIdx.x), _F32(cuda.blockIdx.x)
    busy = True
    while busy:
        if cuda.threadIdx.x == 0:
            taken[0] = take(counter)
        cuda.syncthreads()
        busy = taken[0] < types.uint32(tiles)
        cuda.syncthreads()
        turn = 0
        while busy and turn < turns:
            a = a * _F32(0.5) + _F32(1.0)
            b = b * _F32(0.25) + _F32(2.0)
            turn += 1
    if a + b < _F32(0.0):  # never, which the compiler does not know: it would drop the work otherwise
        take(counter)
