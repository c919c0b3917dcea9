"""The compiled operations of the index: one call a batch, over flat arrays, without the GIL.

Each function is handed a :class:`Table`, and checks everything before it changes anything, so a batch that is refused
has left no trace. Nothing here locks; :class:`kvortex.index.BlockIndex` does. What only looks is in ``_reads.py``, and may run
beside these: they say by ``begin_write`` and ``end_write`` when it would see things half done, and nothing in between
allocates, raises or returns.

Numba's cache on disk notices a change of this file, but not of the others of this folder, whose code ends up in
these functions: who edits those must touch this file too, or clear the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvortex.index import admission, policies
from kvortex.index._atomics import prefetch, store
from kvortex.index._compiled import compiled, inlined
from kvortex.index._ghosts import Ghosts
from kvortex.index._hash import Buckets, find, find_all, fingerprint, home, insert, new_buckets, remove, repeated, tag_of
from kvortex.index._lines import (
    CLAIMED,
    DOOMED,
    FREE,
    OWNER,
    PINS,
    RESERVED,
    RESIDENT,
    SIZE,
    STATE,
    Cells,
    Shorts,
    Words,
    length_of,
    new_lines,
)
from kvortex.index._memory import zeros
from kvortex.index._order import Order
from kvortex.index._reads import Sequence, begin_write, end_write

# What reserve found of a key: it was nowhere, it is in a reserved slot, it is resident, or it was nowhere and is not admitted.
NEW, PENDING, DECLINED = FREE, RESERVED, 9

# Rows of Table.counters. Resident slots are the rest of the capacity; the unpinned ones among them may be evicted.
# The absent ones are the last slots, which are not there yet: neither free nor anything else.
N_FREE, N_RESERVED, N_PINNED, N_EVICTIONS, N_ABSENT = 0, 1, 2, 3, 4
ADMIT_AFTER = 5

# What a call found wrong.
OK, FULL, DUPLICATE, RANGE, STATUS, LENGTH, AGAIN = 0, 1, 2, 3, 4, 5, 6
ANY_LENGTH = -1
_BUCKETS_A_SLOT = 4  # a quarter full: evicting and entering a key then seldom moves others
_ROOM_GROUP = 128  # keys that get their slots before the first is entered

Slots = npt.NDArray[np.int64]
Flags = npt.NDArray[np.uint8]
Stack = npt.NDArray[np.int32]


class Table(NamedTuple):
    """All arrays of one index."""

    words: Words  # (capacity + joints, 8): a line for each slot, see _lines
    cells: Cells  # the same memory
    shorts: Shorts  # the same memory
    buckets: Buckets  # (4 x capacity,): where keys are
    stack: Stack  # (capacity,): the first N_FREE entries are the free slots, the next one last
    counters: Slots  # (6,)
    sequence: Sequence  # (8,): a cache line for the number that is odd while a writer works
    order: Order  # the policy's; has the lines too
    offers: Ghosts  # what was not admitted


def new_table(capacity: int, policy: type[policies.Policy], ready: int, admit_after: int) -> Table:
    """An empty table, whose first ``ready`` slots are there; a fresh pool hands out slots 0, 1, 2, ..."""
    stack = np.zeros(capacity, np.int32)
    stack[:ready] = np.arange(ready - 1, -1, -1)
    lines = new_lines(capacity, policy.joints)
    counters = np.array([ready, 0, 0, 0, capacity - ready, admit_after], np.int64)
    order = policies.new_order(policy, lines, capacity, ready)
    offers = admission.new_offers(capacity, admit_after)
    return Table(*lines, new_buckets(_BUCKETS_A_SLOT * capacity), stack, counters, zeros(64).view(np.int64), order, offers)


@compiled
def reserve(
    t: Table,
    keys: Words,
    lengths: Slots,
    owner: int,
    prints: Slots,
    rows: Stack,
    slots: Slots,
    status: Flags,
    owners: Slots,
    taken: Slots,
) -> tuple[int, int, int]:
    """Fill ``slots``, ``status``, ``owners`` and, where status is NEW, ``taken``; ``prints`` and ``rows`` are :func:`scratch`.

    (OK, 0, 0), (DUPLICATE, row, row), (LENGTH, row, bytes there) or (FULL, slots asked for, slots evictable).
    """
    words, cells, shorts, buckets, counters = t.words, t.cells, t.shorts, t.buckets, t.counters
    offers, admit_after = t.offers, t.counters[ADMIT_AFTER]
    n = keys.shape[0]
    find_all(buckets, words, keys, prints, slots)
    first, second = repeated(keys, prints, rows)
    if first >= 0:
        return DUPLICATE, first, second
    new, spared = 0, 0
    for i in range(n):
        slot = slots[i]
        owners[i] = owner
        if slot < 0:
            status[i] = NEW if admission.admits(offers, prints[i], admit_after) else DECLINED
            new += status[i] == NEW
            continue
        if words[slot, SIZE] != length_of(lengths, i):
            return LENGTH, i, words[slot, SIZE]
        status[i], owners[i] = shorts[slot, STATE], words[slot, OWNER]
        # A key of this batch may not make room for another key of this batch.
        spared += status[i] == RESIDENT and cells[slot, PINS] == 0
    there = slots_there(t)
    evictable = there - counters[N_FREE] - counters[N_RESERVED] - counters[N_PINNED] - spared
    if new > counters[N_FREE] + evictable:
        return FULL, new, evictable

    if admit_after > 1:
        for i in range(n - 1, -1, -1):
            if slots[i] < 0:
                admission.settle(offers, prints[i], status[i] == NEW, there)
    _use(t.order, slots, status)
    if new > 0:
        begin_write(t.sequence)
        _take(t, keys, prints, lengths, owner, slots, status, taken)
        end_write(t.sequence)
    _release_used(t.order, slots, status)
    counters[N_RESERVED] += new
    return OK, 0, 0


@compiled
def slots_there(t: Table) -> int:
    """Slots that are there: free, reserved or resident."""
    return t.stack.size - t.counters[N_ABSENT]  # type: ignore[no-any-return]


@compiled
def _use(order: Order, slots: Slots, status: Flags) -> None:
    """Pins what is resident until the others have their slots, and counts it as used."""
    cells = order.cells
    for i in range(slots.size):
        if status[i] != RESIDENT:
            continue
        if cells[slots[i], PINS] == 0:
            policies.pin(order, slots[i])
        cells[slots[i], PINS] += 1
        policies.use(order, slots[i])


@compiled
def _release_used(order: Order, slots: Slots, status: Flags) -> None:
    cells = order.cells
    for i in range(slots.size - 1, -1, -1):
        if status[i] != RESIDENT:
            continue
        cells[slots[i], PINS] -= 1
        if cells[slots[i], PINS] == 0:
            policies.unpin(order, slots[i])


@compiled
def _take(
    t: Table, keys: Words, prints: Slots, lengths: Slots, owner: int, slots: Slots, status: Flags, taken: Slots
) -> None:
    """A slot for each NEW key, that of the next evicted record where none is free."""
    row = 0
    while row < slots.size:
        end = min(row + _ROOM_GROUP, slots.size)
        _make_room(t, prints, slots, status, row, end)
        for i in range(row, end):
            if status[i] == NEW:
                _enter(t, keys, prints, i, slots[i], length_of(lengths, i), owner)
                taken[i] = slots[i]
        row = end


@compiled
def _make_room(t: Table, prints: Slots, slots: Slots, status: Flags, row: int, end: int) -> None:
    """Slots for the NEW keys of a group. Who was evicted is still in the buckets, which are on their way."""
    words, buckets, stack, counters, order = t.words, t.buckets, t.stack, t.counters, t.order
    for i in range(row, end):
        if status[i] == NEW:
            policies.prefetch_miss(order, prints[i])
    for i in range(row, end):
        if status[i] != NEW:
            continue
        origin = policies.miss(order, prints[i])
        if counters[N_FREE] > 0:
            counters[N_FREE] -= 1
            slot = int(stack[counters[N_FREE]])
        else:
            slot = policies.evict(order, origin)
            counters[N_EVICTIONS] += 1
            prefetch(buckets, home(tag_of(fingerprint(words, slot)), buckets.size))
        policies.expect(order, slot, origin)
        slots[i] = slot


@inlined
def _enter(t: Table, keys: Words, prints: Slots, row: int, slot: int, length: int, owner: int) -> None:
    """Reserves a slot for ``keys[row]``; whose record was in it cannot be found any more."""
    words, shorts, buckets = t.words, t.shorts, t.buckets
    if shorts[slot, STATE] == RESIDENT:
        remove(buckets, tag_of(fingerprint(words, slot)), slot)
    store(shorts, slot, STATE, RESERVED)
    for j in range(4):
        store(words, slot, j, keys[row, j])
    words[slot, SIZE] = length
    words[slot, OWNER] = owner
    insert(buckets, tag_of(prints[row]), slot)


@compiled
def grow(t: Table, ready: int) -> None:
    """The first ``ready`` slots are there from now on; those that were there before stay so."""
    counters, stack = t.counters, t.stack
    first = slots_there(t)
    for slot in range(min(ready, stack.size) - 1, first - 1, -1):
        stack[counters[N_FREE]] = slot
        counters[N_FREE] += 1
        counters[N_ABSENT] -= 1
    policies.grow(t.order, slots_there(t))


@compiled
def _claim(shorts: Shorts, capacity: int, slots: Slots) -> tuple[int, int]:
    """Mark reserved slots as this batch's own; on the first that is not, take all marks back and say where."""
    for i in range(slots.size):
        slot = slots[i]
        fault = OK
        if slot < 0 or slot >= capacity:
            fault = RANGE
        elif shorts[slot, STATE] == CLAIMED:
            fault = DUPLICATE
        elif shorts[slot, STATE] != RESERVED:
            fault = STATUS
        if fault != OK:
            for j in range(i):
                store(shorts, slots[j], STATE, RESERVED)
            return fault, i
        store(shorts, slot, STATE, CLAIMED)
    return OK, 0


@compiled
def _free(words: Words, shorts: Shorts, stack: Stack, counters: Slots, slot: int) -> None:
    store(shorts, slot, STATE, FREE)
    words[slot, SIZE] = 0
    stack[counters[N_FREE]] = slot
    counters[N_FREE] += 1


@compiled
def commit(t: Table, slots: Slots, once: Flags) -> tuple[int, int]:
    """(OK, 0); (AGAIN, 0) where ``once`` is set; or (RANGE, DUPLICATE or STATUS, position)."""
    if once[0]:
        return AGAIN, 0
    shorts, order = t.shorts, t.order
    fault, at = _claim(shorts, t.stack.size, slots)
    if fault != OK:
        return fault, at
    begin_write(t.sequence)
    for i in range(slots.size - 1, -1, -1):
        store(shorts, slots[i], STATE, RESIDENT)
        policies.admit(order, slots[i])
    end_write(t.sequence)
    t.counters[N_RESERVED] -= slots.size
    once[0] = 1
    return OK, 0


@compiled
def abort(t: Table, slots: Slots, once: Flags) -> tuple[int, int]:
    """(OK, 0); (AGAIN, 0) where ``once`` is set; or (RANGE, DUPLICATE or STATUS, position)."""
    if once[0]:
        return AGAIN, 0
    words, shorts, buckets, stack, counters, order = t.words, t.shorts, t.buckets, t.stack, t.counters, t.order
    fault, at = _claim(shorts, stack.size, slots)
    if fault != OK:
        return fault, at
    begin_write(t.sequence)
    for i in range(slots.size - 1, -1, -1):  # last first, so that the stack hands them out in their old order
        remove(buckets, tag_of(fingerprint(words, slots[i])), slots[i])
        policies.abandon(order, slots[i])
        _free(words, shorts, stack, counters, slots[i])
    end_write(t.sequence)
    counters[N_RESERVED] -= slots.size
    once[0] = 1
    return OK, 0


@compiled
def acquire(t: Table, keys: Words, lengths: Slots, prints: Slots, slots: Slots, counts: bool) -> tuple[int, int, int]:
    """Fill ``slots``, and pin them, as a use where that ``counts``; (OK, 0, 0), or (LENGTH, row, bytes there), all slots -1."""
    words, cells, shorts, order = t.words, t.cells, t.shorts, t.order
    find_all(t.buckets, words, keys, prints, slots)
    for i in range(keys.shape[0]):
        slot = slots[i] if slots[i] >= 0 and shorts[slots[i], STATE] == RESIDENT else -1
        wanted = length_of(lengths, i)
        if slot >= 0 and wanted != ANY_LENGTH and words[slot, SIZE] != wanted:
            slots[:] = -1
            return LENGTH, i, words[slot, SIZE]
        slots[i] = slot
    pinned = 0
    for i in range(slots.size):
        slot = slots[i]
        if slot < 0:
            continue
        if cells[slot, PINS] == 0:
            policies.pin(order, slot)
            pinned += 1
        cells[slot, PINS] += 1
        if counts:
            policies.use(order, slot)
    t.counters[N_PINNED] += pinned
    return OK, 0, 0


@compiled
def _overdrawn(cells: Cells, capacity: int, slots: Slots) -> tuple[int, int]:
    """Whether every slot has as many pins as it is named here; (OK, 0), or (RANGE or STATUS, position)."""
    # Taking the pins off for a trial counts slots that are named several times, wherever they stand.
    fault, tried = OK, slots.size
    for i in range(slots.size):
        slot = slots[i]
        if slot == -1:
            continue
        if slot < -1 or slot >= capacity:
            fault, tried = RANGE, i
            break
        if cells[slot, PINS] == 0:
            fault, tried = STATUS, i
            break
        cells[slot, PINS] -= 1
    for i in range(tried):
        if slots[i] >= 0:
            cells[slots[i], PINS] += 1
    return fault, 0 if fault == OK else tried


@compiled
def release(t: Table, slots: Slots, once: Flags) -> tuple[int, int]:
    """(OK, 0); (AGAIN, 0) where ``once`` is set; or (RANGE or STATUS, position)."""
    if once[0]:
        return AGAIN, 0
    words, cells, shorts, stack, counters, order = t.words, t.cells, t.shorts, t.stack, t.counters, t.order
    fault, at = _overdrawn(cells, stack.size, slots)
    if fault != OK:
        return fault, at
    for i in range(slots.size - 1, -1, -1):
        slot = slots[i]
        if slot < 0:
            continue
        cells[slot, PINS] -= 1
        if cells[slot, PINS] > 0:
            continue
        counters[N_PINNED] -= 1
        if shorts[slot, STATE] == DOOMED:
            _free(words, shorts, stack, counters, slot)
        else:
            policies.unpin(order, slot)
    once[0] = 1
    return OK, 0


@compiled
def drop(t: Table, keys: Words, slots: Slots, once: Flags) -> int:
    """Forget resident keys, of ``slots`` those that are in these; none where ``once`` is set. How many there were."""
    words, cells, shorts, buckets, stack, counters, order = t.words, t.cells, t.shorts, t.buckets, t.stack, t.counters, t.order
    dropped = 0
    begin_write(t.sequence)
    for i in range((0 if once[0] else keys.shape[0]) - 1, -1, -1):
        tag = tag_of(fingerprint(keys, i))
        slot = find(buckets, words, tag, keys, i)
        if slot < 0 or shorts[slot, STATE] != RESIDENT or (slots.size and slots[i] != slot):
            continue
        dropped += 1
        remove(buckets, tag, slot)
        policies.forget(order, slot)
        if cells[slot, PINS] > 0:
            store(shorts, slot, STATE, DOOMED)
        else:
            _free(words, shorts, stack, counters, slot)
    end_write(t.sequence)
    return dropped
