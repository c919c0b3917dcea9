"""S3-FIFO: a small queue that most records leave soon, a main queue for those that were asked for again, and ghosts.

Yang, Zhang, Qiu, Yue and Vinayak, "FIFO queues are all you need for cache eviction", SOSP 2023, with their sizes.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kvortex.index import _ghosts
from kvortex.index._compiled import compiled, inlined
from kvortex.index._hash import fingerprint
from kvortex.index._lines import MARK, PINS, count_ring, is_empty, link_newest, oldest, pop_oldest, ring, unlink
from kvortex.index._order import FRESH, OWN, SLOTS, THERE, Order

_GHOST = 1  # origin: was evicted from the small queue lately
_SMALL, _MAIN = OWN, OWN + 1  # of head: records of each queue, pinned and reserved ones too

# Bits of a mark.
_USES, _IN_MAIN, _PARKED = 3, 4, 8


class S3FIFO:
    """Two queues, and the keys of what was evicted from the small one.

    The small queue's share is a tenth of the slots that are there, at least one; the other slots are the main queue's share,
    and the number of ghosts. A key that is asked for enters, with its commit, the main queue if it was a ghost (and is
    one no longer), else the small one. Each acquire or ``reserve`` that finds it counts as a use, up to three; its place stays.

    Eviction looks at the oldest record of the small queue while that has at least its share (or the main queue has none
    to look at), else of the main one. In the small queue a record that was used twice or more moves to the main queue, its
    uses forgotten; another is evicted and becomes a ghost, the oldest of which is forgotten if there are too many. In the
    main queue a record that was used becomes the newest, for one of its uses; another is evicted, and leaves no ghost. A
    record that is pinned when it is looked at leaves its queue and comes back to it as the newest with its last release.
    So each look is paid for by an entry, a use or a pin, and eviction is O(1), amortised over these.

    Reserved and pinned records count in the queue that they belong to. An aborted key is no ghost again.

    Memory: 0.9 ghosts a slot, of 32 bytes: 29 bytes a slot.
    """

    name: ClassVar[str] = "s3fifo"
    kind: ClassVar[int] = 1
    joints: ClassVar[int] = 2
    numbers: ClassVar[int] = 2
    ghost_rings: ClassVar[int] = 1

    @staticmethod
    def ghosts(slots: int) -> int:
        return slots - max(1, slots // 10)

    @staticmethod
    def queues(order: Order) -> list[list[int]]:
        small = int(order.head[SLOTS])
        return [ring(order.cells, small), ring(order.cells, small + 1)]


@inlined
def _share(order: Order) -> int:
    """Of the small queue."""
    return max(np.int64(1), order.head[THERE] // 10)  # type: ignore[call-overload,no-any-return]


@inlined
def miss(order: Order, print_: int) -> int:
    """Whether the key is a ghost, which it is no longer."""
    row = _ghosts.seek(order.ghosts, print_)
    if row < 0:
        return FRESH
    _ghosts.take(order.ghosts, 0, row)
    return _GHOST


@inlined
def expect(order: Order, slot: int, origin: int) -> None:
    """Counts a reserved slot in its queue."""
    order.shorts[slot, MARK] = _IN_MAIN if origin == _GHOST else 0
    order.head[_MAIN if origin == _GHOST else _SMALL] += 1


@inlined
def leave(order: Order, slot: int) -> None:
    """Not counted any more, and out of its queue if ``slot`` is in one."""
    order.head[_MAIN if order.shorts[slot, MARK] & _IN_MAIN else _SMALL] -= 1


@inlined
def link(order: Order, slot: int) -> None:
    """As the newest of its queue."""
    link_newest(order.cells, order.head[SLOTS] + (order.shorts[slot, MARK] & _IN_MAIN != 0), slot)


@inlined
def use(order: Order, slot: int) -> None:
    """One more, up to three."""
    if order.shorts[slot, MARK] & _USES < _USES:
        order.shorts[slot, MARK] += 1


@inlined
def unpin(order: Order, slot: int) -> None:
    """Back into its queue, if eviction came by meanwhile."""
    if order.shorts[slot, MARK] & _PARKED:
        order.shorts[slot, MARK] &= ~_PARKED
        link(order, slot)


@inlined
def forget(order: Order, slot: int) -> None:
    """Out of its queue, if it is in one."""
    leave(order, slot)
    if not order.shorts[slot, MARK] & _PARKED:
        unlink(order.cells, slot)


@inlined
def evict(order: Order) -> int:
    """See the class."""
    cells, shorts, head = order.cells, order.shorts, order.head
    small, main = head[SLOTS], head[SLOTS] + 1
    while True:
        from_small = is_empty(cells, main) or (head[_SMALL] >= _share(order) and not is_empty(cells, small))
        slot: int = pop_oldest(cells, small if from_small else main)
        if cells[slot, PINS] > 0:
            shorts[slot, MARK] |= _PARKED
        elif from_small and shorts[slot, MARK] & _USES > 1:
            shorts[slot, MARK] = _IN_MAIN
            head[_SMALL] -= 1
            head[_MAIN] += 1
            link_newest(cells, main, slot)
        elif not from_small and shorts[slot, MARK] & _USES > 0:
            shorts[slot, MARK] -= 1
            link_newest(cells, main, slot)
        else:
            leave(order, slot)
            if from_small:
                _remember(order, slot)
            return slot


@inlined
def _remember(order: Order, slot: int) -> None:
    ghosts, most = order.ghosts, order.head[THERE] - _share(order)
    if most == 0:
        return
    print_ = fingerprint(order.words, slot)
    twin = _ghosts.seek(ghosts, print_)
    if twin >= 0:  # another key of the same fingerprint: a table has each but once
        _ghosts.take(ghosts, 0, twin)
    if _ghosts.length(ghosts, 0) == most:
        _ghosts.take_oldest(ghosts, 0)
    _ghosts.add(ghosts, 0, print_, 0)


@compiled
def damage(order: Order, linked: npt.NDArray[np.uint8]) -> int:
    """See :func:`kvortex.index.policies.damage`."""
    cells, shorts, head = order.cells, order.shorts, order.head
    for queue in range(2):
        joint = head[SLOTS] + queue
        count: int = count_ring(cells, joint, linked, 1)
        if count < 0 or count > head[_SMALL + queue]:
            return min(count, -1)
        at = oldest(cells, joint)
        while at != joint:
            if (shorts[at, MARK] & _IN_MAIN != 0) != (queue == 1) or shorts[at, MARK] & _PARKED:
                return -1 - at  # type: ignore[no-any-return]
            at = oldest(cells, at)
    return 0
