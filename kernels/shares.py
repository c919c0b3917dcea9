"""Shares of a launch's work, which warps take as they come.

A launch beside a model gets multiprocessors one after another, as the model's kernels leave them. Were its work dealt out
before, the CTA that came last would do its part when all others have ended, and the model's next kernel would wait for
that. So each warp takes the next share from a counter, and asks for it while it works on the one before; who comes when all
are taken has nothing to do. The first ones are asked for by a CTA at once, lest all warps that begin together wait for one
another's answers. Where there are no more than two shares for each warp they are dealt out: asking takes a microsecond.

Each warp that asks finds once that nothing is left, and the last one to find that puts the counter back: it is 0 before a
launch and behind it, and launches that share a counter follow one another on one stream.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from numba import cuda

from kvortex.kernels.divide import quotient
from kvortex.kernels.lane import store4
from kvortex.kernels.ptx import statement
from kvortex.kernels.warp import uint32, uniform, warps_of_grid

# That are asked for, a question each 2 to 3 ns. With a share for each of the 32,768 pieces of 128 MiB warps waited for the
# counter: a gather with digests took 83 us, and by twos 77, by threes 78, by sevens 84 (an H200, 132 CTAs of 512 threads).
MOST_SHARES = 16384
_NOBODY = 32  # in the place of a lane, where nobody asks
_lock = threading.Lock()  # of the simulator's threads
answer: Any = uniform


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def ceil_div(total, each):  # type: ignore[no-untyped-def]
    """How many shares of ``each`` pieces there are, the last of which may have fewer; or pieces of each of so many shares."""
    return uint32(quotient(uint32(total + each - uint32(1)), each))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def asker_of(shares, lane):  # type: ignore[no-untyped-def]
    """Who asks: the lane, or nobody where shares are few and dealt out."""
    asker = lane
    if shares <= uint32(warps_of_grid() + warps_of_grid()):
        asker = uint32(_NOBODY)
    return asker


def _taken(counter: Any, asker: Any, count: Any, dealt: Any) -> int:
    if int(asker) != 0:
        return int(dealt)
    cell = ctypes.c_uint32.from_address(int(counter))
    with _lock:
        taken = cell.value
        cell.value = taken + int(count)
        return taken


# Not ``add``: the assembler adds up over a warp what it can, and its lanes then wait for the answer at once.
@statement(
    "{ .reg .pred p; .reg .u32 t; mov.u32 t, $3; setp.eq.u32 p, $2, 0; "
    "@p atom.relaxed.gpu.global.inc.u32 t, [$1], 0xfffffffe; mov.u32 $0, t; }",
    "lrr",
    "r",
)
def _ask(counter, asker, dealt):  # type: ignore[no-untyped-def]
    """Takes the next share of the 32-bit number at ``counter``, or the one that is ``dealt`` to this warp: :func:`answer` of it
    is the same in all lanes."""
    return _taken(counter, asker, 1, dealt)


@statement(
    "{ .reg .pred p; .reg .u32 t; mov.u32 t, $4; setp.eq.u32 p, $2, 0; "
    "@p atom.relaxed.gpu.global.add.u32 t, [$1], $3; mov.u32 $0, t; }",
    "lrrr",
    "r",
)
def _ask_for(counter, asker, count, dealt):  # type: ignore[no-untyped-def]
    """Takes the next ``count`` shares, of which :func:`_ask` takes one: the first of them."""
    return _taken(counter, asker, count, dealt)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def first_share(taken, counter, asker):  # type: ignore[no-untyped-def]
    """A warp's first share: its CTA asks once for all its warps, which wait for one another here.

    The last warp asks, which has nothing else to do where others fetch what all of them need. ``taken`` is an array in shared
    memory, of which the first element is overwritten, and free again behind the call. All threads of a CTA, whole warps,
    must come to it.
    """
    warp, warps = uint32(cuda.threadIdx.x >> 5), uint32(cuda.blockDim.x >> 5)
    if warp == uint32(warps - uint32(1)):
        begin = _ask_for(counter, asker, warps, uint32(uint32(cuda.blockIdx.x) * warps))
        if cuda.threadIdx.x & 31 == 0:
            taken[0] = begin
    cuda.syncthreads()
    share = answer(uint32(uint32(taken[0]) + warp))
    cuda.syncthreads()
    return share


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def ask_next(counter, asker, share):  # type: ignore[no-untyped-def]
    """For the one behind ``share``, once for each that a warp has."""
    return _ask(counter, asker, uint32(share + warps_of_grid()))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def leave(counter, share, shares, asker):  # type: ignore[no-untyped-def]
    """For a warp whose ``share`` is none of ``shares``, which it does not ask for again."""
    if share == uint32(shares + warps_of_grid() - uint32(1)) and asker == uint32(0):
        store4(counter, uint32(0))
