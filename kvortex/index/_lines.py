"""What the index knows of a slot: one cache line of 64 bytes.

Looking for a key costs a miss of the cache for its bucket and one for this line, and whatever follows (its pins, its place
in the eviction order) is there by then. The same memory is seen as int64, int32 and int16; columns are named here.

====== ======== =====================================================
bytes  view     what
====== ======== =====================================================
0-31   words    the key, four words
32-39  words    ``SIZE``: bytes of the record; 0 in a free slot
40-47  words    ``OWNER``: number of the reservation that it was last part of
48-51  cells    ``PINS``
52-53  shorts   ``STATE``
54-55  shorts   ``MARK``: the policy's, see there
56-59  cells    ``PREV``: the line before this one in its ring
60-63  cells    ``NEXT``: the line behind it
====== ======== =====================================================

Behind the slots come lines of which only ``PREV`` and ``NEXT`` are used, the *joints*: a ring is a circular doubly linked list
through a joint, so no end is special. ``joint.next`` is the oldest line of the ring, ``joint.prev`` the newest. Which lines
are in a ring follows from their state and mark; links of others mean nothing, so fresh memory needs no initialisation.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvortex.index._atomics import prefetch
from kvortex.index._compiled import compiled, inlined
from kvortex.index._memory import zeros

Words = npt.NDArray[np.int64]
Cells = npt.NDArray[np.int32]
Shorts = npt.NDArray[np.int16]

LINE_BYTES = 64
SIZE, OWNER = 4, 5
PINS, PREV, NEXT = 12, 14, 15
STATE, MARK = 26, 27

# States of a slot.
FREE, RESERVED, RESIDENT = 0, 1, 2
CLAIMED = 3  # only inside one call: a slot that this batch has already named
DOOMED = 4  # the key was dropped, and only pins keep the slot


def new_lines(slots: int, joints: int) -> tuple[Words, Cells, Shorts]:
    """Three views of the same zeroed lines, and of ``joints`` empty rings behind them."""
    memory = zeros((slots + joints) * LINE_BYTES).reshape(-1, LINE_BYTES)
    cells = memory.view(np.int32)
    cells[slots:, PREV] = cells[slots:, NEXT] = np.arange(slots, slots + joints)
    return memory.view(np.int64), cells, memory.view(np.int16)


@inlined
def is_empty(cells: Cells, joint: int) -> bool:
    """Whether a ring has no line but its joint."""
    return cells[joint, NEXT] == joint  # type: ignore[no-any-return]


@inlined
def oldest(cells: Cells, joint: int) -> int:
    """The line that has been in a ring for the longest; the ring is not empty."""
    return np.int64(cells[joint, NEXT])  # type: ignore[return-value]


@inlined
def pop_oldest(cells: Cells, joint: int) -> int:
    """Takes the oldest line out of a ring, which is not empty; the next one is on its way then."""
    line = oldest(cells, joint)
    unlink(cells, line)
    prefetch(cells, np.int64(cells[joint, NEXT]))
    return line


@inlined
def link_newest(cells: Cells, joint: int, line: int) -> None:
    """Puts a line that is in no ring into one."""
    newest = cells[joint, PREV]
    cells[line, PREV] = newest
    cells[line, NEXT] = joint
    cells[newest, NEXT] = line
    cells[joint, PREV] = line


@inlined
def unlink(cells: Cells, line: int) -> None:
    """Takes a line out of the ring that it is in."""
    before, after = cells[line, PREV], cells[line, NEXT]
    cells[before, NEXT] = after
    cells[after, PREV] = before


@compiled
def count_ring(cells: Cells, joint: int, seen: npt.NDArray[np.uint8], mark: int) -> int:
    """Lines of a ring, each marked in ``seen``; or ``-1 - line`` of the first whose links are wrong, or that was marked."""
    count, at = 0, joint
    while True:
        after = int(cells[at, NEXT])
        if after < 0 or after >= cells.shape[0] or cells[after, PREV] != at:
            return -1 - at
        at = after
        if at == joint:
            return count
        if at >= seen.size or seen[at] != 0:
            return -1 - at
        seen[at] = mark
        count += 1


@inlined
def length_of(lengths: npt.NDArray[np.int64], row: int) -> int:
    """Length that a record must have; one number may stand for all."""
    return lengths[row if lengths.size > 1 else 0]  # type: ignore[no-any-return]


def ring(cells: Cells, joint: int) -> list[int]:
    """Lines of a ring, the oldest first. For tests and checks."""
    lines, at = [], int(cells[joint, NEXT])
    while at != joint:
        lines.append(at)
        at = int(cells[at, NEXT])
    return lines
