"""Is an index whole? Every invariant in one pass; for tests and for looking for leaks."""

from __future__ import annotations

import numpy as np

from kvortex.index._ghosts import is_whole
from kvortex.index._hash import ROW_BITS, ROW_MASK, find, fingerprint, tag_of
from kvortex.index._lines import DOOMED, FREE, PINS, RESERVED, RESIDENT, SIZE, STATE
from kvortex.index.core import N_ABSENT, N_FREE, N_PINNED, N_RESERVED, Table
from kvortex.index.policies import damage
from kvortex.jit import njit

PROBLEMS = (
    "",
    "a bucket names a slot that has no key to be found, or names it twice, or by the hash of another key",
    "the state is none of free, reserved, resident, dropped, or not free though the slot is not there yet",
    "the pins are negative, or on a slot that is not resident",
    "a slot is dropped that is not pinned",
    "the size is negative, or not 0 in a free slot",
    "the key is not found at its slot",
    "the counters of free, reserved or pinned slots are wrong",
    "the stack of free slots names a slot that is not free, or names it twice",
    "the policy's order is broken, or holds another set of slots than those that may be evicted",
    "the memory of offers is broken",
)


@njit(nogil=True)
def first_problem(t: Table) -> tuple[int, int]:
    """(index into PROBLEMS, slot, bucket or position); (0, 0) where all is well."""
    capacity = t.stack.size
    # Buckets first: a table without an empty one would keep every search below going for ever.
    named = np.zeros(capacity, np.bool_)
    for bucket in range(t.buckets.size):
        entry = t.buckets[bucket]
        if entry == 0:
            continue
        slot = int((entry & ROW_MASK) - 1)
        if slot < 0 or slot >= capacity or named[slot] or entry >> ROW_BITS != tag_of(fingerprint(t.words, slot)):
            return 1, bucket
        if t.shorts[slot, STATE] == FREE or t.shorts[slot, STATE] == DOOMED:
            return 1, bucket
        named[slot] = True

    there = capacity - t.counters[N_ABSENT]
    if there < 0 or there > capacity:
        return 7, -1
    free, reserved, pinned = 0, 0, 0
    for slot in range(capacity):
        state, pins, size = t.shorts[slot, STATE], t.cells[slot, PINS], t.words[slot, SIZE]
        if slot >= there and state != FREE:
            return 2, slot
        if state != FREE and state != RESERVED and state != RESIDENT and state != DOOMED:
            return 2, slot
        if pins < 0 or (pins > 0 and state != RESIDENT and state != DOOMED):
            return 3, slot
        if state == DOOMED and pins == 0:
            return 4, slot
        if size < 0 or (state == FREE and size != 0):
            return 5, slot
        searched = state != FREE and state != DOOMED
        if searched and find(t.buckets, t.words, tag_of(fingerprint(t.words, slot)), t.words, slot) != slot:
            return 6, slot
        free += state == FREE and slot < there
        reserved += state == RESERVED
        pinned += pins > 0

    # A wrong counter could point outside the stack, so counters come before it.
    if t.counters[N_FREE] != free or t.counters[N_RESERVED] != reserved or t.counters[N_PINNED] != pinned:
        return 7, -1
    stacked = np.zeros(capacity, np.bool_)
    for place in range(free):
        slot = int(t.stack[place])
        if slot < 0 or slot >= there or stacked[slot] or t.shorts[slot, STATE] != FREE:
            return 8, place
        stacked[slot] = True
    broken = damage(t.order)
    if broken >= 0:
        return 9, broken
    return (0, 0) if is_whole(t.offers) else (10, -1)
