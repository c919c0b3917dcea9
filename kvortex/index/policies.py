"""Which resident record goes next: the contract of eviction policies, and who is called.

The index tells a policy what happens to a key and its slot, in this order:

========= ==========================================================================================
miss      a key that is nowhere is to be stored; gives its *origin*, what the policy remembers of it
evict     no slot is free: name one that may go, and forget it; there is one
expect    the slot is reserved for the key of that origin
abandon   ... and given back unwritten; or
admit     its record was committed: it may be evicted from now on
pin       its first pin: it may no longer be evicted
use       it was asked for again; always while it is pinned, if only for the length of the call
unpin     its last pin went
forget    its record was dropped, be it pinned or not; nothing more is told of it
grow      there are more slots
========= ==========================================================================================

A policy is a class that says its name, what memory it needs and how it is seen from outside, and compiled functions beside it,
a file each. State lives in :class:`kvortex.index._order.Order`: the mark and the links in each slot's line, joints, a few
numbers and ghosts. The functions below look at the policy's kind, a number in that state, and call its function: a branch that
a processor always guesses right, where a function that is handed in could not be cached on disk by Numba. A new policy
brings its file, a line in ``POLICIES``, and its branches here.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np

from kvortex.index import arc, lfu, lru, s3fifo
from kvortex.index._compiled import compiled, inlined
from kvortex.index._ghosts import is_whole, new_ghosts, prefetch_seek
from kvortex.index._lines import PINS, RESIDENT, STATE, Cells, Shorts, Words, unlink
from kvortex.index._order import FRESH, KIND, OWN, THERE, Order
from kvortex.index.arc import ARC
from kvortex.index.lfu import LFU
from kvortex.index.lru import LRU
from kvortex.index.s3fifo import S3FIFO
from kvortex.jit import njit


class Policy(Protocol):
    """What the index needs from a policy outside compiled code."""

    name: ClassVar[str]
    kind: ClassVar[int]
    """Number of its branches."""
    joints: ClassVar[int]
    """Rings of slots."""
    numbers: ClassVar[int]
    """Cells of ``Order.head`` for itself, which start as 0."""
    ghost_rings: ClassVar[int]

    @staticmethod
    def ghosts(slots: int) -> int:
        """Keys that are remembered at most."""
        ...

    @staticmethod
    def queues(order: Order) -> list[list[int]]:
        """Slots in each of its rings, the oldest first. For tests, O(slots)."""
        ...


POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (LRU, S3FIFO, ARC, LFU)}
_LRU, _S3FIFO, _ARC, _LFU = LRU.kind, S3FIFO.kind, ARC.kind, LFU.kind


def new_order(policy: type[Policy], lines: tuple[Words, Cells, Shorts], slots: int, there: int) -> Order:
    """A policy's empty state over the lines of ``slots`` slots and its joints, ``there`` of which are there."""
    head = np.zeros(OWN + policy.numbers, np.int64)
    head[:OWN] = policy.kind, there, slots
    return Order(*lines, head, new_ghosts(policy.ghosts(slots), policy.ghost_rings))


@compiled
def grow(order: Order, there: int) -> None:
    """So many slots are there from now on."""
    order.head[THERE] = there


@inlined
def miss(order: Order, print_: int) -> int:
    """A key of that fingerprint, which is nowhere, is to be stored: its origin."""
    kind, origin = order.head[KIND], FRESH
    if kind == _S3FIFO:
        origin = s3fifo.miss(order, print_)
    elif kind == _ARC:
        origin = arc.miss(order, print_)
    return origin


@inlined
def prefetch_miss(order: Order, print_: int) -> None:
    """``miss`` will soon be told of this key."""
    kind = order.head[KIND]
    if kind in (_S3FIFO, _ARC):
        prefetch_seek(order.ghosts, print_)


@inlined
def evict(order: Order, origin: int) -> int:
    """The slot that goes, to make room for a key of that origin. There must be one that may."""
    kind = order.head[KIND]
    slot: int
    if kind == _S3FIFO:
        slot = s3fifo.evict(order)
    elif kind == _ARC:
        slot = arc.evict(order, origin)
    elif kind == _LFU:
        slot = lfu.evict(order)
    else:
        slot = lru.evict(order)
    return slot


@inlined
def expect(order: Order, slot: int, origin: int) -> None:
    """``slot`` is reserved for a key of that origin."""
    kind = order.head[KIND]
    if kind == _S3FIFO:
        s3fifo.expect(order, slot, origin)
    elif kind == _ARC:
        arc.expect(order, slot, origin)
    elif kind == _LFU:
        lfu.expect(order, slot)


@inlined
def abandon(order: Order, slot: int) -> None:
    """``slot``, which was reserved, is free again."""
    kind = order.head[KIND]
    if kind == _S3FIFO:
        s3fifo.leave(order, slot)
    elif kind == _ARC:
        arc.leave(order, slot)


@inlined
def admit(order: Order, slot: int) -> None:
    """``slot`` holds a committed record and may be evicted from now on."""
    kind = order.head[KIND]
    if kind == _S3FIFO:
        s3fifo.link(order, slot)
    elif kind == _ARC:
        arc.link(order, slot)
    elif kind == _LFU:
        lfu.link(order, slot)
    else:
        lru.link(order, slot)


@inlined
def pin(order: Order, slot: int) -> None:
    """``slot`` gets its first pin."""
    kind = order.head[KIND]
    if kind == _LFU:
        lfu.leave(order, slot)
    elif kind != _S3FIFO:
        unlink(order.cells, slot)


@inlined
def use(order: Order, slot: int) -> None:
    """``slot``, which is pinned, was asked for again."""
    kind = order.head[KIND]
    if kind == _S3FIFO:
        s3fifo.use(order, slot)
    elif kind == _ARC:
        arc.use(order, slot)
    elif kind == _LFU:
        lfu.use(order, slot)


@inlined
def unpin(order: Order, slot: int) -> None:
    """``slot`` has lost its last pin."""
    kind = order.head[KIND]
    if kind == _S3FIFO:
        s3fifo.unpin(order, slot)
    else:
        admit(order, slot)


@inlined
def forget(order: Order, slot: int) -> None:
    """The record in ``slot`` is gone, and was not evicted. Its pins, if it has any, are still counted."""
    kind = order.head[KIND]
    if kind == _S3FIFO:
        s3fifo.forget(order, slot)
    elif kind == _LFU:
        if order.cells[slot, PINS] == 0:
            lfu.leave(order, slot)
    else:
        if order.cells[slot, PINS] == 0:
            unlink(order.cells, slot)
        if kind == _ARC:
            arc.leave(order, slot)


@njit(nogil=True)
def damage(order: Order) -> int:
    """First slot at which the state contradicts the lines, or -1.

    Each policy's ``damage`` marks the slots of its rings in ``linked``, and gives 0 or ``-1 - slot``.
    """
    cells, shorts, kind = order.cells, order.shorts, order.head[KIND]
    linked = np.zeros(order.head[OWN - 1], np.uint8)
    wrong: int
    if kind == _S3FIFO:
        wrong = s3fifo.damage(order, linked)
    elif kind == _ARC:
        wrong = arc.damage(order, linked)
    elif kind == _LFU:
        wrong = lfu.damage(order, linked)
    else:
        wrong = lru.damage(order, linked)
    if wrong < 0:
        return -1 - wrong
    for slot in range(linked.size):
        resident = shorts[slot, STATE] == RESIDENT
        evictable = resident and cells[slot, PINS] == 0
        may_be_linked = resident if kind == _S3FIFO else evictable  # there, pinned ones wait in their place
        if (linked[slot] == 0 and evictable) or (linked[slot] == 1 and not may_be_linked):
            return slot
    return -1 if is_whole(order.ghosts) else linked.size


__all__ = ["ARC", "FRESH", "LFU", "LRU", "POLICIES", "S3FIFO", "Order", "Policy", "new_order"]
