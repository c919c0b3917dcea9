"""ARC: recency and frequency share the pool, and ghosts of both say where the border should be.

Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003. Names are theirs.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kvortex.index import _ghosts
from kvortex.index._compiled import compiled, inlined
from kvortex.index._hash import fingerprint
from kvortex.index._lines import MARK, count_ring, is_empty, link_newest, oldest, pop_oldest, ring
from kvortex.index._order import FRESH, OWN, SLOTS, THERE, Order

_FROM_B1, _FROM_B2, _NO_GHOST = 1, 2, 3  # origins beside FRESH
_B1, _B2 = 0, 1
_T1, _T2, _P = OWN, OWN + 1, OWN + 2  # of head: records of T1 and T2, pinned and reserved ones too, and T1's target


class ARC:
    """Records that were used once (T1) and more often (T2), and the keys of those that were evicted from each (B1, B2).

    A new key enters T1 with its commit, and T2 if it is a ghost. A record that is acquired, or found by ``reserve``,
    belongs to T2 from then on. Each list goes from the least recently used to the most; as under LRU a pinned record is in
    neither, and comes back as the newest with its last release.

    What the paper does for a request is done when ``reserve`` finds a key nowhere. *c* is the number of slots that are
    there. A ghost of B1 raises T1's target *p* by ``max(1, |B2| // |B1|)``, up to *c*; one of B2 lowers it by
    ``max(1, |B1| // |B2|)``, down to 0; either is a ghost no longer. For a key that is no ghost the oldest of B1 is forgotten
    where T1 and B1 have *c*, else the oldest of B2 where all four have 2 *c*. If a slot is missing then, the oldest of T1
    is evicted where T1 has more than *p*, or *p* and the key was a ghost of B2; else the oldest of T2; and from the other
    list where the one has none that may go. It becomes the newest ghost of its list, unless T1 alone has *c*.

    Reserved and pinned records count in the list that they belong to, so a batch is judged as its keys would be one after
    the other. There are *c* ghosts at most: where dropped records that are still pinned would make room for more, the oldest
    of B2, else of B1, is forgotten. An aborted key is no ghost again, and what it did to *p* stays.

    Memory: a ghost a slot, 32 bytes.
    """

    name: ClassVar[str] = "arc"
    kind: ClassVar[int] = 2
    joints: ClassVar[int] = 2
    numbers: ClassVar[int] = 3
    ghost_rings: ClassVar[int] = 2

    @staticmethod
    def ghosts(slots: int) -> int:
        return slots

    @staticmethod
    def queues(order: Order) -> list[list[int]]:
        first = int(order.head[SLOTS])
        return [ring(order.cells, first), ring(order.cells, first + 1)]


@inlined
def miss(order: Order, print_: int) -> int:
    """Moves *p*, and forgets ghosts, as the class says; where the key comes from."""
    head, ghosts, c = order.head, order.ghosts, order.head[THERE]
    b1, b2 = _ghosts.length(ghosts, _B1), _ghosts.length(ghosts, _B2)
    row = _ghosts.seek(ghosts, print_)
    if row >= 0 and _ghosts.mark_of(ghosts, row) == _B1:
        head[_P] = min(c, head[_P] + max(1, b2 // b1))
        _ghosts.take(ghosts, _B1, row)
        return _FROM_B1
    if row >= 0:
        head[_P] = max(0, head[_P] - max(1, b1 // b2))
        _ghosts.take(ghosts, _B2, row)
        return _FROM_B2
    if head[_T1] + b1 >= c:
        if b1 == 0:
            return _NO_GHOST
        _ghosts.take_oldest(ghosts, _B1)
    elif b2 > 0 and head[_T1] + head[_T2] + b1 + b2 >= 2 * c:
        _ghosts.take_oldest(ghosts, _B2)
    return FRESH


@inlined
def evict(order: Order, origin: int) -> int:
    """The paper's REPLACE."""
    cells, head = order.cells, order.head
    t1, t2 = head[SLOTS], head[SLOTS] + 1
    wanted = origin == _NO_GHOST or head[_T1] > head[_P] or (origin == _FROM_B2 and head[_T1] == head[_P])
    first = is_empty(cells, t2) or (wanted and not is_empty(cells, t1))
    slot: int = pop_oldest(cells, t1 if first else t2)
    leave(order, slot)
    if origin != _NO_GHOST:
        _remember(order, _B1 if first else _B2, slot)
    return slot


@inlined
def _remember(order: Order, ring_: int, slot: int) -> None:
    ghosts = order.ghosts
    print_ = fingerprint(order.words, slot)
    twin = _ghosts.seek(ghosts, print_)
    if twin >= 0:  # another key of the same fingerprint: a table has each but once
        _ghosts.take(ghosts, _ghosts.mark_of(ghosts, twin), twin)
    if _ghosts.length(ghosts, _B1) + _ghosts.length(ghosts, _B2) >= order.head[THERE]:
        _ghosts.take_oldest(ghosts, _B2 if _ghosts.length(ghosts, _B2) > 0 else _B1)
    _ghosts.add(ghosts, ring_, print_, ring_)


@inlined
def expect(order: Order, slot: int, origin: int) -> None:
    """Counts a reserved slot in its list."""
    second = origin in (_FROM_B1, _FROM_B2)
    order.shorts[slot, MARK] = 1 if second else 0
    order.head[_T2 if second else _T1] += 1


@inlined
def leave(order: Order, slot: int) -> None:
    """Not counted any more."""
    order.head[_T1 + order.shorts[slot, MARK]] -= 1


@inlined
def use(order: Order, slot: int) -> None:
    """A slot in no list belongs to T2 from now on."""
    if order.shorts[slot, MARK] == 0:
        order.shorts[slot, MARK] = 1
        order.head[_T1] -= 1
        order.head[_T2] += 1


@inlined
def link(order: Order, slot: int) -> None:
    """As the newest of its list."""
    link_newest(order.cells, order.head[SLOTS] + order.shorts[slot, MARK], slot)


@compiled
def damage(order: Order, linked: npt.NDArray[np.uint8]) -> int:
    """See :func:`kvortex.index.policies.damage`."""
    cells, shorts, head = order.cells, order.shorts, order.head
    for which in range(2):
        joint = head[SLOTS] + which
        count: int = count_ring(cells, joint, linked, 1)
        if count < 0 or count > head[_T1 + which]:
            return min(count, -1)
        at = oldest(cells, joint)
        while at != joint:
            if shorts[at, MARK] != which:
                return -1 - at  # type: ignore[no-any-return]
            at = oldest(cells, at)
    return 0 if 0 <= head[_P] <= head[THERE] else -1 - head[SLOTS]  # type: ignore[no-any-return]
