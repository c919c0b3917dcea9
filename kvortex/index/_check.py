"""Is an index whole? Every invariant in one pass; for tests and for looking for leaks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from kvortex.index._hash import find
from kvortex.index.core import FREE, N_ABSENT, N_FREE, N_PINNED, N_RESERVED, RESERVED, RESIDENT, Table
from kvortex.index.policies import damage

PROBLEMS = (
    "",
    "a bucket names a slot that has no key to be found, or names it twice",
    "the state is none of free, reserved, resident, or not free though the slot is not there yet",
    "the pins are negative, or on a slot that is not resident",
    "a slot is doomed that is not pinned",
    "the size is negative, or not 0 in a free slot",
    "the key is not found at its slot",
    "the counters of free, reserved or pinned slots are wrong",
    "the stack of free slots names a slot that is not free, or names it twice",
    "the policy's order is broken, or holds another set of slots than those that may be evicted",
)


@njit(nogil=True, cache=True)
def first_problem(t: Table) -> tuple[int, int]:
    """(index into PROBLEMS, slot, bucket or position); (0, 0) where all is well."""
    capacity = t.state.size
    # Buckets first: a table without an empty one would keep every search below going for ever.
    named = np.zeros(capacity, np.bool_)
    for bucket in range(t.buckets.size):
        slot = int(t.buckets[bucket]) - 1
        if slot == -1:
            continue
        if slot < 0 or slot >= capacity or named[slot] or t.state[slot] == FREE or t.doomed[slot]:
            return 1, bucket
        named[slot] = True

    there = capacity - t.counters[N_ABSENT]
    if there < 0 or there > capacity:
        return 7, -1
    free, reserved, pinned = 0, 0, 0
    held: npt.NDArray[np.bool_] = np.zeros(capacity, np.bool_)
    for slot in range(capacity):
        state, pins, doomed = t.state[slot], t.pins[slot], t.doomed[slot]
        if slot >= there and state != FREE:
            return 2, slot
        if state != FREE and state != RESERVED and state != RESIDENT:
            return 2, slot
        if pins < 0 or (pins > 0 and state != RESIDENT):
            return 3, slot
        if doomed > 1 or (doomed == 1 and pins == 0):
            return 4, slot
        if t.sizes[slot] < 0 or (state == FREE and t.sizes[slot] != 0):
            return 5, slot
        if state != FREE and doomed == 0 and find(t.buckets, t.keys, t.keys, slot) != slot:
            return 6, slot
        free += state == FREE and slot < there
        reserved += state == RESERVED
        pinned += pins > 0
        held[slot] = state == RESIDENT and pins == 0

    # A wrong counter could point outside the stack, so counters come before it.
    if t.counters[N_FREE] != free or t.counters[N_RESERVED] != reserved or t.counters[N_PINNED] != pinned:
        return 7, -1
    stacked = np.zeros(capacity, np.bool_)
    for place in range(free):
        slot = int(t.stack[place])
        if slot < 0 or slot >= there or stacked[slot] or t.state[slot] != FREE:
            return 8, place
        stacked[slot] = True
    broken = damage(t.order, held)
    return (9, broken) if broken >= 0 else (0, 0)
