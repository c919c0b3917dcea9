"""What no policy can exceed: Belady's MIN, with bypass, on a trace that is known to its end."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from kvortex.jit import njit
from kvortex.traces.format import Trace

_NEVER = np.iinfo(np.int64).max


@njit(nogil=True)
def _min(blocks: npt.NDArray[np.int64], free: npt.NDArray[np.bool_], distinct: int, capacity: int) -> int:
    """Hits of MIN with bypass on ``blocks`` ((n,) numbers below ``distinct``), one reference after another.

    A block that comes next where it is ``free`` ((n,) bool) is not kept: it is stored there again, and was no hit.
    """
    n = blocks.size
    following = np.empty(n, np.int64)  # where the same block comes next
    place = np.full(distinct, _NEVER, np.int64)
    for at in range(n - 1, -1, -1):
        following[at] = place[blocks[at]]
        place[blocks[at]] = at

    held = np.zeros(n, np.bool_)  # whether the block that comes here is resident until then
    # The latest next use first. What has been used in the meantime stays in, behind all that is still to come.
    latest = [np.int64(0)]
    latest.pop()
    resident, hits = 0, 0
    for at in range(n):
        if held[at]:
            hits += 1
            resident -= 1
        after = following[at]
        if after == _NEVER or free[after]:
            continue
        if resident == capacity:
            if -latest[0] < after:
                continue  # itself the last to be used again
            held[-heapq.heappop(latest)] = False
            resident -= 1
        heapq.heappush(latest, -after)
        held[after] = True
        resident += 1
    return hits


def bound(trace: Trace, pool_blocks: int) -> int:
    """Prefix hits that no policy can exceed on a pool of so many blocks, whatever it knows of the future.

    Parameters
    ----------
    trace
    pool_blocks
        At least 1. Longer requests are cut to it, as in a replay.

    Returns
    -------
    int
        Hits of MIN with bypass: of the resident blocks and the new one, that which is used again last goes, and the new
        one is not stored where it is that. Blocks are referenced one after the other.

    Notes
    -----
    MIN has the most hits of single references (L. A. Belady, "A study of replacement algorithms for a virtual-storage
    computer", IBM Systems Journal 5(2), 1966; it may decline to store, because admission may). A replay counts less:
    a block of a request only if all before it are resident too, when the request comes. Take any policy that stores
    nothing but what is asked for. Its hits are the first references of each request, made before anything of the request
    is stored; so a cache that takes one reference at a time can have all of them, and then go over to what the policy
    holds after the request, one block in for one out. MIN has at least as many hits as that cache: a bound.

    Where each block always has the same block before it, as in Mooncake's traces, the bound is reached. A block is never
    used again sooner than the one before it, so MIN gives up the tail of a prefix before its head, and all its hits
    are prefix hits.

    What was stored without being asked for (``Trace.stored``) is stored for nothing and counts as no hit, so MIN keeps a
    block only for its next use by a request: the most hits still. With such blocks the bound need not be reached.
    """
    inside = np.arange(len(trace.ids)) - np.repeat(trace.starts[:-1], np.diff(trace.starts)) < pool_blocks
    free = np.repeat(trace.stored, np.diff(trace.starts))
    return int(_min(trace.numbers[inside], free[inside], trace.distinct, pool_blocks))
