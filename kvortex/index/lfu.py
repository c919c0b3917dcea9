"""Least frequently used goes first; of several, the least recently used.

Shah, Mitra and Matani, "An O(1) algorithm for implementing the LFU cache eviction scheme", 2010: a list of records for each
frequency. Theirs are found from one frequency to the next; here a record that was pinned comes back with any frequency, so
the lists are an array, and a word for each 64 of them says which are not empty.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kvortex.index._atomics import lowest_bit, prefetch
from kvortex.index._compiled import compiled, inlined
from kvortex.index._lines import MARK, NEXT, count_ring, is_empty, link_newest, oldest, ring, unlink
from kvortex.index._order import OWN, SLOTS, Order

MOST_USES = 1023
_BITS = 6


class LFU:
    """A ring for each number of uses.

    A record has one use with its commit and one more with each key that acquires it or asks for it in ``reserve``, up to
    1,023: records that were used more often than that are told apart by recency alone. It leaves its ring with its first pin
    and enters that of its uses, as the newest, with its last release. The oldest of the lowest ring that is not empty
    goes first: 16 words say which that is. Uses are forgotten with the record.

    Memory: 64 KiB beside the lines, however many there are.
    """

    name: ClassVar[str] = "lfu"
    kind: ClassVar[int] = 3
    joints: ClassVar[int] = MOST_USES + 1
    numbers: ClassVar[int] = (MOST_USES + 1) >> _BITS
    ghost_rings: ClassVar[int] = 0

    @staticmethod
    def ghosts(slots: int) -> int:
        return 0

    @staticmethod
    def queues(order: Order) -> list[list[int]]:
        first = int(order.head[SLOTS])
        return [found for uses in range(MOST_USES + 1) if (found := ring(order.cells, first + uses))]


@inlined
def expect(order: Order, slot: int) -> None:
    """A first use, at the commit."""
    order.shorts[slot, MARK] = 1


@inlined
def use(order: Order, slot: int) -> None:
    """One more use of a slot that is in no ring."""
    if order.shorts[slot, MARK] < MOST_USES:
        order.shorts[slot, MARK] += 1


@inlined
def link(order: Order, slot: int) -> None:
    """As the newest of its uses."""
    uses = np.int64(order.shorts[slot, MARK])
    link_newest(order.cells, order.head[SLOTS] + uses, slot)
    order.head[OWN + (uses >> _BITS)] |= np.int64(1) << (uses & ((1 << _BITS) - 1))


@inlined
def leave(order: Order, slot: int) -> None:
    """Out of its ring."""
    uses = np.int64(order.shorts[slot, MARK])
    unlink(order.cells, slot)
    if is_empty(order.cells, order.head[SLOTS] + uses):
        order.head[OWN + (uses >> _BITS)] &= ~(np.int64(1) << (uses & ((1 << _BITS) - 1)))


@inlined
def evict(order: Order) -> int:
    """The oldest of the fewest uses."""
    word = OWN
    while order.head[word] == 0:
        word += 1
    uses = ((word - OWN) << _BITS) + lowest_bit(order.head[word])
    slot: int = oldest(order.cells, order.head[SLOTS] + uses)
    leave(order, slot)
    prefetch(order.cells, np.int64(order.cells[order.head[SLOTS] + uses, NEXT]))
    return slot


@compiled
def damage(order: Order, linked: npt.NDArray[np.uint8]) -> int:
    """See :func:`kvortex.index.policies.damage`."""
    cells, shorts, head = order.cells, order.shorts, order.head
    for uses in range(MOST_USES + 1):
        joint = head[SLOTS] + uses
        count: int = count_ring(cells, joint, linked, 1)
        bit = (head[OWN + (uses >> _BITS)] >> (uses & ((1 << _BITS) - 1))) & 1
        if count < 0 or bit != (count > 0):
            return min(count, -1)
        at = oldest(cells, joint)
        while at != joint:
            if shorts[at, MARK] != uses:
                return -1 - at  # type: ignore[no-any-return]
            at = oldest(cells, at)
    return 0
