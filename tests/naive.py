"""Slow and obvious references that the tests compare kvortex with. Nothing here imports kvortex."""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from tests.naive_policies import NAIVE_POLICIES, NaiveAdmission


def chain(seed: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Keys of all full blocks, one hash at a time."""
    keys, key = [], seed
    for i in range(len(tokens) // block_size):
        block = tokens[i * block_size : (i + 1) * block_size]
        key = hashlib.sha256(key + b"".join(struct.pack("<I", token) for token in block)).digest()
        keys.append(key)
    return keys


class Record:
    """One record of :class:`NaiveIndex`: what a slot is to the real index."""

    def __init__(self, key: object, nbytes: int) -> None:
        self.key, self.nbytes, self.pins = key, nbytes, 0


class NaiveIndex:
    """What a BlockIndex does, in dictionaries: ``named`` is what keys lead to, ``policy`` has what may be evicted.

    ``policy`` is a class of tests/naive_policies.py.
    """

    def __init__(self, capacity: int, policy: str = "lru", admit_after: int = 1) -> None:
        self.capacity, self.evictions = capacity, 0
        self.policy = NAIVE_POLICIES[policy](capacity)
        self.admission = NaiveAdmission(4 * capacity, admit_after)
        self.named: dict[object, Record] = {}
        self.reserved: set[Record] = set()
        self.pinned: set[Record] = set()
        self.doomed: set[Record] = set()  # dropped, and pinned

    def resident(self, key: object) -> Record | None:
        return None if self.named.get(key) in self.reserved else self.named.get(key)

    def free(self) -> int:
        return self.capacity - len(self.named) - len(self.doomed)

    def evictable(self) -> int:
        return len(self.named) - len(self.reserved) - len(self.pinned - self.doomed)

    def reserve(self, keys: Sequence[object], nbytes: int = 0) -> dict[object, str] | None:
        """What each key was, or ``None`` where the pool is too full."""
        nowhere = [key for key in keys if key not in self.named]
        new = [key for key in nowhere if self.admission.admits(key)]
        found = [record for key in keys if (record := self.resident(key))]
        if len(new) > self.free() + self.evictable() - sum(not record.pins for record in found):
            return None
        said = {key: "resident" if self.resident(key) else "pending" for key in keys if key in self.named}
        for key in reversed(nowhere):
            self.admission.settle(key, key in new)
        self._pin(found)
        for key in new:
            origin = self.policy.miss(key)
            if self.free() == 0:
                del self.named[self.policy.evict(origin).key]
                self.evictions += 1
            self.named[key] = Record(key, nbytes)
            self.policy.expect(self.named[key], origin)
            self.reserved.add(self.named[key])
        self.release(found)
        return {key: said.get(key, "new" if key in new else "declined") for key in keys}

    def commit(self, records: Sequence[Record]) -> None:
        self.reserved.difference_update(records)
        for record in reversed(records):
            self.policy.admit(record)

    def abort(self, records: Sequence[Record]) -> None:
        for record in reversed(records):
            self.reserved.remove(self.named.pop(record.key))
            self.policy.abandon(record)

    def acquire(self, keys: Sequence[object]) -> list[Record | None]:
        self._pin([record for key in keys if (record := self.resident(key))])
        return [self.resident(key) for key in keys]

    def _pin(self, records: Sequence[Record]) -> None:
        for record in records:
            if not record.pins:
                self.policy.pin(record)
            record.pins += 1
            self.pinned.add(record)
            self.policy.use(record)

    def release(self, records: Sequence[Record]) -> None:
        for record in reversed(records):
            record.pins -= 1
            if record.pins:
                continue
            self.pinned.remove(record)
            if record in self.doomed:
                self.doomed.remove(record)
            else:
                self.policy.unpin(record)

    def drop(self, keys: Sequence[object]) -> int:
        gone = [self.named.pop(key) for key in dict.fromkeys(reversed(keys)) if self.resident(key)]
        for record in gone:
            self.policy.forget(record)
        self.doomed.update(record for record in gone if record.pins)
        return len(gone)


def replay(
    requests: Sequence[Sequence[int]],
    capacity: int,
    policy: str,
    admit_after: int = 1,
    stored: Sequence[bool] | None = None,
) -> list[int]:
    """Hits of each request of a trace, by the calls that an engine makes: as :func:`replay_lru`, for any policy.

    What is ``stored`` is no request: it is reserved and committed, and has no hits.
    """
    index, hits = NaiveIndex(capacity, policy, admit_after), []
    for request, unasked in zip(requests, stored or [False] * len(requests), strict=True):
        wanted = list(request)[:capacity]
        count = 0
        while count < len(wanted) and index.resident(wanted[count]) and not unasked:
            count += 1
        hits += [] if unasked else [count]
        index.release([record for record in index.acquire(wanted[:count]) if record])
        said = index.reserve(wanted[count:]) or {}
        index.commit([index.named[key] for key, what in said.items() if what == "new"])
    return hits


def replay_lru(requests: Iterable[Sequence[int]], capacity: int) -> list[int]:
    """Hits of each request of a trace (block numbers, all different) on a least-recently-used pool of ``capacity`` blocks.

    A request uses its leading run of resident blocks, then stores the others. What is used or stored together counts
    from last to first, so the tail of a prefix is evicted before its head. An engine's calls for one request are
    match, acquire and release of the hits, reserve of the rest, commit of the new ones.
    """
    pool: OrderedDict[int, None] = OrderedDict()  # oldest first
    hits = []
    for request in requests:
        wanted = list(request)[:capacity]
        count = 0
        while count < len(wanted) and wanted[count] in pool:
            count += 1
        hits.append(count)
        run, rest = wanted[:count], wanted[count:]
        new = [block for block in rest if block not in pool]
        for block in run[::-1] + [block for block in rest[::-1] if block in pool]:
            pool.move_to_end(block)
        for block in reversed(new):
            if len(pool) == capacity:
                pool.popitem(last=False)
            pool[block] = None
    return hits
