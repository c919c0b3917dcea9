"""An index of blocks as one would write it in Python: an ``OrderedDict`` and two dicts under a lock.

It does what :class:`kvortex.index.BlockIndex` does under LRU, in the fastest way that CPython has: keys are ``bytes`` that the
caller has made already, loops are comprehensions or run in C, resident keys lead to their slots in one ``OrderedDict`` that is
the eviction order as well, and pinned ones lie in a dict of their own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import repeat

NEW, PENDING, RESIDENT = 0, 1, 2


class DictIndex:
    """Slots of a pool by 32-byte keys; two-phase, pinned, least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.evictions = 0
        self._lock = threading.Lock()
        self._free = list(range(capacity - 1, -1, -1))
        self._keys: list[bytes] = [b""] * capacity
        self._sizes = [0] * capacity
        self._evictable: OrderedDict[bytes, int] = OrderedDict()  # key → slot, the oldest first
        self._pinned: dict[bytes, int] = {}
        self._pins = [0] * capacity
        self._reserved: dict[bytes, int] = {}

    def lookup(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys are resident."""
        with self._lock:
            if not self._pinned:
                return list(map(self._evictable.__contains__, keys))
            evictable, pinned = self._evictable, self._pinned
            return [key in evictable or key in pinned for key in keys]

    def reserve(self, keys: Sequence[bytes], nbytes: int) -> tuple[list[int], list[int]]:
        """Slots and status of each key; resident ones count as used, the last of the batch first."""
        with self._lock:
            evictable, pinned, reserved, sizes = self._evictable, self._pinned, self._reserved, self._sizes
            if len(set(keys)) != len(keys):
                raise ValueError("a batch names each key once")
            slots = list(map(evictable.get, keys, repeat(-1)))
            status = [RESIDENT if slot >= 0 else NEW for slot in slots]
            spared = len(slots) - status.count(NEW)
            if pinned or reserved:
                for at, key in enumerate(keys):
                    if slots[at] < 0 and (slot := pinned.get(key, -1)) >= 0:
                        slots[at], status[at] = slot, RESIDENT
                    elif slots[at] < 0 and (slot := reserved.get(key, -1)) >= 0:
                        slots[at], status[at] = slot, PENDING
            new = status.count(NEW)
            if new < len(keys) and any(slot >= 0 and sizes[slot] != nbytes for slot in slots):
                raise ValueError("a record has another length")
            if new > len(self._free) + len(evictable) - spared:
                raise MemoryError("the pool is full")
            if spared:
                for key in reversed(keys):
                    if key in evictable:
                        evictable.move_to_end(key)
            free, names, pop = self._free, self._keys, evictable.popitem
            for at, key in enumerate(keys):
                if status[at] == NEW:
                    if free:
                        slot = free.pop()
                    else:
                        slot = pop(False)[1]
                        self.evictions += 1
                    names[slot], sizes[slot], slots[at], reserved[key] = key, nbytes, slot, slot
            return slots, status

    def commit(self, slots: Sequence[int]) -> None:
        """Makes reserved slots resident, the last of the batch as the oldest."""
        with self._lock:
            names, reserved, evictable = self._keys, self._reserved, self._evictable
            if any(reserved.get(names[slot]) != slot for slot in slots):
                raise ValueError("a slot is not reserved")
            for slot in reversed(slots):
                key = names[slot]
                del reserved[key]
                evictable[key] = slot

    def acquire(self, keys: Sequence[bytes]) -> list[int]:
        """Pins resident keys: their slots, -1 for others."""
        with self._lock:
            evictable, pinned, pins = self._evictable, self._pinned, self._pins
            slots = []
            for key in keys:
                slot = evictable.pop(key, -1)
                if slot >= 0:
                    pinned[key] = slot
                else:
                    slot = pinned.get(key, -1)
                if slot >= 0:
                    pins[slot] += 1
                slots.append(slot)
            return slots

    def release(self, slots: Sequence[int]) -> None:
        """Drops a pin of each slot."""
        with self._lock:
            names, evictable, pinned, pins = self._keys, self._evictable, self._pinned, self._pins
            for slot in reversed(slots):
                if slot >= 0:
                    pins[slot] -= 1
                    if pins[slot] == 0:
                        evictable[names[slot]] = pinned.pop(names[slot])
