"""Least recently used goes first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kvortex.index._compiled import compiled, inlined
from kvortex.index._lines import count_ring, link_newest, pop_oldest, ring
from kvortex.index._order import SLOTS, Order


class LRU:
    """One ring, from the least recently used to the most.

    A record is in it from its commit on, as the newest. It leaves with its first pin and comes back as the newest with its
    last release: while it is pinned its place does not matter, and eviction has nothing to skip. Since a batch is
    committed and released from its last key to its first, the tail of a prefix goes before its head.

    Memory: none beside the line. Nothing is remembered of what is gone.
    """

    name: ClassVar[str] = "lru"
    kind: ClassVar[int] = 0
    joints: ClassVar[int] = 1
    numbers: ClassVar[int] = 0
    ghost_rings: ClassVar[int] = 0

    @staticmethod
    def ghosts(slots: int) -> int:
        return 0

    @staticmethod
    def queues(order: Order) -> list[list[int]]:
        return [ring(order.cells, int(order.head[SLOTS]))]


@inlined
def link(order: Order, slot: int) -> None:
    """As the newest."""
    link_newest(order.cells, order.head[SLOTS], slot)


@inlined
def evict(order: Order) -> int:
    """The oldest."""
    slot: int = pop_oldest(order.cells, order.head[SLOTS])
    return slot


@compiled
def damage(order: Order, linked: npt.NDArray[np.uint8]) -> int:
    """See :func:`kvortex.index.policies.damage`."""
    count: int = count_ring(order.cells, order.head[SLOTS], linked, 1)
    return min(0, count)
