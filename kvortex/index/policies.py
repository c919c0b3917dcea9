"""Which resident record goes next: eviction policies as small compiled functions over one array.

The index tells a policy six things, by slot: ``admit`` (its record was committed), ``touch`` (it was asked for again
while unpinned), ``pin`` (its first pin: it may no longer be evicted), ``unpin`` (its last pin went), ``forget`` (it
left without being evicted), and ``evict`` (name the next one, and forget it). So a policy only ever holds slots that
may be evicted, and ``evict`` is never called when it holds none. All state is one int32 array, made by the policy
class; row ``capacity`` belongs to the policy as a whole.

The six functions below are the contract, and LRU is what they do today. A second policy brings its class with
``name``, ``state`` and ``ranking``, a mark of its own in its array, and one branch on that mark in each function: Numba
caches what is compiled on disk, and a policy handed in as a function would defeat that.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from numba import njit

Order = npt.NDArray[np.int32]
_PREV, _NEXT = 0, 1
_UNLINKED = -1


class Policy(Protocol):
    """What the index needs from a policy outside compiled code."""

    name: ClassVar[str]

    @staticmethod
    def state(capacity: int) -> Order:
        """New, empty state for slots 0 to ``capacity - 1``."""
        ...

    @staticmethod
    def ranking(order: Order) -> npt.NDArray[np.int64]:
        """Every slot held, the next to be evicted first; (m,) int64. For tests and checks, O(m)."""
        ...


class LRU:
    """Least recently used goes first, O(1) for everything: a circular doubly linked list through the slots.

    The state is (capacity + 1, 2) int32, previous and next; the last row is the ring's joint, so no end is special.
    ``joint.next`` is the oldest slot. A pinned slot is not in the list: it leaves on its first pin and comes back as
    the newest on its last release, so eviction never has to skip anything.
    """

    name: ClassVar[str] = "lru"

    @staticmethod
    def state(capacity: int) -> Order:
        order = np.full((capacity + 1, 2), _UNLINKED, np.int32)
        order[capacity] = capacity
        return order

    @staticmethod
    def ranking(order: Order) -> npt.NDArray[np.int64]:
        slots: npt.NDArray[np.int64] = _ranking(order)
        return slots


POLICIES: dict[str, type[Policy]] = {LRU.name: LRU}


@njit(nogil=True, cache=True)
def admit(order: Order, slot: int) -> None:
    """``slot`` holds a committed record and may be evicted from now on."""
    _link_newest(order, slot)


@njit(nogil=True, cache=True)
def touch(order: Order, slot: int) -> None:
    """``slot``, which the policy holds, was asked for again."""
    _unlink(order, slot)
    _link_newest(order, slot)


@njit(nogil=True, cache=True)
def pin(order: Order, slot: int) -> None:
    """``slot``, which the policy holds, got its first pin."""
    _unlink(order, slot)


@njit(nogil=True, cache=True)
def unpin(order: Order, slot: int) -> None:
    """``slot`` lost its last pin."""
    _link_newest(order, slot)


@njit(nogil=True, cache=True)
def forget(order: Order, slot: int) -> None:
    """The record in ``slot``, which the policy holds, is gone; this was no eviction."""
    _unlink(order, slot)


@njit(nogil=True, cache=True)
def evict(order: Order) -> int:
    """The slot that goes next; the policy no longer holds it. Never called on an empty policy."""
    slot = int(order[order.shape[0] - 1, _NEXT])
    _unlink(order, slot)
    return slot


@njit(nogil=True, cache=True)
def damage(order: Order, held: npt.NDArray[np.bool_]) -> int:
    """First slot at which the state contradicts ``held`` ((capacity,) bool: slots the policy should hold), or -1."""
    joint = order.shape[0] - 1
    linked = np.zeros(joint, np.bool_)
    at = joint
    for _ in range(joint + 1):
        after = int(order[at, _NEXT])
        if after < 0 or after > joint or order[after, _PREV] != at:
            return int(at)
        at = after
        if at == joint:
            break
        linked[at] = True
    for slot in range(joint):
        if linked[slot] != held[slot] or (order[slot, _PREV] == _UNLINKED) == held[slot]:
            return slot
    return -1


@njit(nogil=True, cache=True)
def _link_newest(order: Order, slot: int) -> None:
    joint = order.shape[0] - 1
    newest = order[joint, _PREV]
    order[slot, _PREV] = newest
    order[slot, _NEXT] = joint
    order[newest, _NEXT] = slot
    order[joint, _PREV] = slot


@njit(nogil=True, cache=True)
def _unlink(order: Order, slot: int) -> None:
    before, after = order[slot, _PREV], order[slot, _NEXT]
    order[before, _NEXT] = after
    order[after, _PREV] = before
    order[slot, _PREV] = _UNLINKED
    order[slot, _NEXT] = _UNLINKED


@njit(nogil=True, cache=True)
def _ranking(order: Order) -> npt.NDArray[np.int64]:
    joint = order.shape[0] - 1
    slots = np.empty(joint, np.int64)
    count = 0
    at = int(order[joint, _NEXT])
    while at != joint and count < joint:
        slots[count] = at
        count += 1
        at = int(order[at, _NEXT])
    ranked: npt.NDArray[np.int64] = slots[:count].copy()
    return ranked
