"""The compiled operations of the index: one call a batch, over flat arrays, without the GIL.

Each function is handed a :class:`Table`, and checks everything before it changes anything, so a batch that is refused
has left no trace. Nothing here locks; :class:`kvortex.index.BlockIndex` does.

Numba's cache on disk notices a change of this file, but not of ``_hash.py`` and ``policies.py``, whose code ends up in
these functions: who edits those must touch this file too, or clear the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from kvortex.index import policies
from kvortex.index._hash import Buckets, Words, bucket_count, find, home, insert, remove, same

# State of a slot, and what reserve found of a key: a key that was nowhere is NEW, one in a reserved slot is PENDING.
FREE = NEW = 0
RESERVED = PENDING = 1
RESIDENT = 2
_CLAIMED = 3  # only inside one call: a slot that this batch has already named

# Rows of Table.counters. Resident slots are the rest of the capacity; the unpinned ones among them may be evicted.
# The absent ones are the last slots, which are not there yet: neither free nor anything else.
N_FREE, N_RESERVED, N_PINNED, N_EVICTIONS, N_ABSENT = 0, 1, 2, 3, 4

# What a call found wrong.
OK, FULL, DUPLICATE, RANGE, STATE, LENGTH, AGAIN = 0, 1, 2, 3, 4, 5, 6
ANY_LENGTH = -1

Slots = npt.NDArray[np.int64]
Flags = npt.NDArray[np.uint8]


class Table(NamedTuple):
    """All arrays of one index. ``capacity`` slots; the policy's array has one more row."""

    keys: Words  # (capacity, 4): the 32 bytes of each slot's key
    buckets: Buckets  # (power of two of at least 2 x capacity,): slot + 1, or 0
    state: Flags  # (capacity,): FREE, RESERVED or RESIDENT
    doomed: Flags  # (capacity,): 1 where the key was dropped and only pins keep the slot
    pins: npt.NDArray[np.int32]  # (capacity,)
    sizes: Slots  # (capacity,): bytes of the record; 0 in free slots
    owners: Slots  # (capacity,): number of the reservation that a slot was last part of
    stack: npt.NDArray[np.int32]  # (capacity,): the first N_FREE entries are the free slots, the next one last
    order: policies.Order  # the policy's
    counters: Slots  # (5,)


def new_table(capacity: int, policy: type[policies.Policy], ready: int) -> Table:
    """An empty table, whose first ``ready`` slots are there; a fresh pool hands out slots 0, 1, 2, ..."""
    stack = np.zeros(capacity, np.int32)
    stack[:ready] = np.arange(ready - 1, -1, -1)
    return Table(
        keys=np.zeros((capacity, 4), np.uint64),
        buckets=np.zeros(bucket_count(capacity), np.int32),
        state=np.zeros(capacity, np.uint8),
        doomed=np.zeros(capacity, np.uint8),
        pins=np.zeros(capacity, np.int32),
        sizes=np.zeros(capacity, np.int64),
        owners=np.zeros(capacity, np.int64),
        stack=stack,
        order=policy.state(capacity),
        counters=np.array([ready, 0, 0, 0, capacity - ready], np.int64),
    )


# Inside loops there are only single arrays: reaching into the table, or handing it on, counts references to arrays each
# time, which costs more than the search for a key does.


@njit(nogil=True, cache=True)
def _resident(buckets: Buckets, keys: Words, state: Flags, words: Words, row: int) -> int:
    """Slot of a key that is visible, or -1."""
    slot = find(buckets, keys, words, row)
    return slot if slot >= 0 and state[slot] == RESIDENT else -1


@njit(nogil=True, cache=True)
def lookup(t: Table, words: Words, found: npt.NDArray[np.bool_]) -> None:
    """Fill ``found``."""
    buckets, keys, state = t.buckets, t.keys, t.state
    for i in range(words.shape[0]):
        found[i] = _resident(buckets, keys, state, words, i) >= 0


@njit(nogil=True, cache=True)
def match(t: Table, words: Words) -> int:
    """Length of the leading run of resident keys."""
    buckets, keys, state = t.buckets, t.keys, t.state
    run = 0
    while run < words.shape[0] and _resident(buckets, keys, state, words, run) >= 0:
        run += 1
    return run


@njit(nogil=True, cache=True)
def repeated(words: Words) -> tuple[int, int]:
    """Two rows that are the same key, or (-1, -1); O(n) by a small table of row + 1."""
    n = words.shape[0]
    mask = bucket_count(n) - 1
    rows = np.zeros(mask + 1, np.int32)
    for i in range(n):
        at = home(words, i, mask)
        while rows[at] != 0:
            row = int(rows[at]) - 1
            if same(words, row, words, i):
                return row, i
            at = (at + 1) & mask
        rows[at] = i + 1
    return -1, -1


@njit(nogil=True, cache=True)
def reserve(
    t: Table, words: Words, lengths: Slots, owner: int, slots: Slots, status: Flags, owners: Slots, taken: Slots
) -> tuple[int, int, int]:
    """Fill ``slots``, ``status``, ``owners`` and, where status is NEW, ``taken``.

    (OK, 0, 0), (DUPLICATE, row, row), (LENGTH, row, bytes there) or (FULL, slots asked for, slots evictable).
    """
    keys, buckets, state, pins = t.keys, t.buckets, t.state, t.pins
    sizes, stack, order, counters = t.sizes, t.stack, t.order, t.counters
    n = words.shape[0]
    first, second = repeated(words)
    if first >= 0:
        return DUPLICATE, first, second
    new, spared = 0, 0
    for i in range(n):
        slots[i] = find(buckets, keys, words, i)
        status[i] = NEW if slots[i] < 0 else state[slots[i]]
        if status[i] == NEW:
            new += 1
            owners[i] = owner
        elif sizes[slots[i]] != lengths[i]:
            return LENGTH, i, sizes[slots[i]]
        else:
            owners[i] = t.owners[slots[i]]
            if status[i] == RESIDENT and pins[slots[i]] == 0:
                spared += 1  # a key of this batch: may not make room for another key of this batch
    there = state.size - counters[N_ABSENT]
    evictable = there - counters[N_FREE] - counters[N_RESERVED] - counters[N_PINNED] - spared
    if new > counters[N_FREE] + evictable:
        return FULL, new, evictable

    # The spared ones become the newest first. Then there are enough older ones, and eviction stops short of them.
    for i in range(n - 1, -1, -1):
        if status[i] == RESIDENT and pins[slots[i]] == 0:
            policies.touch(order, slots[i])
    for i in range(n):
        if status[i] != NEW:
            continue
        if counters[N_FREE] > 0:
            counters[N_FREE] -= 1
            slot = int(stack[counters[N_FREE]])
        else:
            slot = policies.evict(order)
            remove(buckets, keys, slot)
            counters[N_EVICTIONS] += 1
        for j in range(4):
            keys[slot, j] = words[i, j]
        state[slot] = RESERVED
        sizes[slot] = lengths[i]
        t.owners[slot] = owner
        insert(buckets, keys, slot)
        slots[i] = taken[i] = slot
    counters[N_RESERVED] += new
    return OK, 0, 0


@njit(nogil=True, cache=True)
def grow(t: Table, ready: int) -> None:
    """The first ``ready`` slots are there from now on; those that were there before stay so."""
    counters, stack = t.counters, t.stack
    first = t.state.size - counters[N_ABSENT]
    for slot in range(min(ready, t.state.size) - 1, first - 1, -1):
        stack[counters[N_FREE]] = slot
        counters[N_FREE] += 1
        counters[N_ABSENT] -= 1


@njit(nogil=True, cache=True)
def _claim(state: Flags, slots: Slots) -> tuple[int, int]:
    """Mark reserved slots as this batch's own; on the first that is not, take all marks back and say where."""
    for i in range(slots.size):
        slot = slots[i]
        fault = OK
        if slot < 0 or slot >= state.size:
            fault = RANGE
        elif state[slot] == _CLAIMED:
            fault = DUPLICATE
        elif state[slot] != RESERVED:
            fault = STATE
        if fault != OK:
            for j in range(i):
                state[slots[j]] = RESERVED
            return fault, i
        state[slot] = _CLAIMED
    return OK, 0


@njit(nogil=True, cache=True)
def _free(state: Flags, sizes: Slots, stack: npt.NDArray[np.int32], counters: Slots, slot: int) -> None:
    state[slot] = FREE
    sizes[slot] = 0
    stack[counters[N_FREE]] = slot
    counters[N_FREE] += 1


@njit(nogil=True, cache=True)
def commit(t: Table, slots: Slots, once: Flags) -> tuple[int, int]:
    """(OK, 0); (AGAIN, 0) where ``once`` is set; or (RANGE, DUPLICATE or STATE, position)."""
    if once[0]:
        return AGAIN, 0
    state, order = t.state, t.order
    fault, at = _claim(state, slots)
    if fault != OK:
        return fault, at
    for i in range(slots.size - 1, -1, -1):
        state[slots[i]] = RESIDENT
        policies.admit(order, slots[i])
    t.counters[N_RESERVED] -= slots.size
    once[0] = 1
    return OK, 0


@njit(nogil=True, cache=True)
def abort(t: Table, slots: Slots, once: Flags) -> tuple[int, int]:
    """(OK, 0); (AGAIN, 0) where ``once`` is set; or (RANGE, DUPLICATE or STATE, position)."""
    if once[0]:
        return AGAIN, 0
    keys, buckets, state, sizes, stack, counters = t.keys, t.buckets, t.state, t.sizes, t.stack, t.counters
    fault, at = _claim(state, slots)
    if fault != OK:
        return fault, at
    for i in range(slots.size - 1, -1, -1):  # last first, so that the stack hands them out in their old order
        remove(buckets, keys, slots[i])
        _free(state, sizes, stack, counters, slots[i])
    counters[N_RESERVED] -= slots.size
    once[0] = 1
    return OK, 0


@njit(nogil=True, cache=True)
def acquire(t: Table, words: Words, lengths: Slots, slots: Slots) -> tuple[int, int, int]:
    """Fill ``slots``, and pin them; (OK, 0, 0), or (LENGTH, row, bytes there) with every slot -1."""
    keys, buckets, state, pins, order, sizes = t.keys, t.buckets, t.state, t.pins, t.order, t.sizes
    for i in range(words.shape[0]):
        slot = _resident(buckets, keys, state, words, i)
        if slot >= 0 and lengths[i] != ANY_LENGTH and sizes[slot] != lengths[i]:
            slots[:] = -1
            return LENGTH, i, sizes[slot]
        slots[i] = slot
    pinned = 0
    for i in range(words.shape[0]):
        slot = slots[i]
        if slot < 0:
            continue
        if pins[slot] == 0:
            policies.pin(order, slot)
            pinned += 1
        pins[slot] += 1
    t.counters[N_PINNED] += pinned
    return OK, 0, 0


@njit(nogil=True, cache=True)
def _overdrawn(pins: npt.NDArray[np.int32], slots: Slots) -> tuple[int, int]:
    """Whether every slot has as many pins as it is named here; (OK, 0), or (RANGE or STATE, position)."""
    # Taking the pins off for a trial counts slots that are named several times, wherever they stand.
    fault, tried = OK, slots.size
    for i in range(slots.size):
        slot = slots[i]
        if slot == -1:
            continue
        if slot < -1 or slot >= pins.size:
            fault, tried = RANGE, i
            break
        if pins[slot] == 0:
            fault, tried = STATE, i
            break
        pins[slot] -= 1
    for i in range(tried):
        if slots[i] >= 0:
            pins[slots[i]] += 1
    return fault, 0 if fault == OK else tried


@njit(nogil=True, cache=True)
def release(t: Table, slots: Slots, once: Flags) -> tuple[int, int]:
    """(OK, 0); (AGAIN, 0) where ``once`` is set; or (RANGE or STATE, position)."""
    if once[0]:
        return AGAIN, 0
    state, doomed, pins, sizes = t.state, t.doomed, t.pins, t.sizes
    stack, order, counters = t.stack, t.order, t.counters
    fault, at = _overdrawn(pins, slots)
    if fault != OK:
        return fault, at
    for i in range(slots.size - 1, -1, -1):
        slot = slots[i]
        if slot < 0:
            continue
        pins[slot] -= 1
        if pins[slot] > 0:
            continue
        counters[N_PINNED] -= 1
        if doomed[slot]:
            doomed[slot] = 0
            _free(state, sizes, stack, counters, slot)
        else:
            policies.unpin(order, slot)
    once[0] = 1
    return OK, 0


@njit(nogil=True, cache=True)
def drop(t: Table, words: Words) -> int:
    """Forget resident keys; how many there were."""
    keys, buckets, state, doomed, pins = t.keys, t.buckets, t.state, t.doomed, t.pins
    sizes, stack, order, counters = t.sizes, t.stack, t.order, t.counters
    dropped = 0
    for i in range(words.shape[0] - 1, -1, -1):
        slot = _resident(buckets, keys, state, words, i)
        if slot < 0:
            continue
        dropped += 1
        remove(buckets, keys, slot)
        if pins[slot] > 0:
            doomed[slot] = 1
        else:
            policies.forget(order, slot)
            _free(state, sizes, stack, counters, slot)
    return dropped
