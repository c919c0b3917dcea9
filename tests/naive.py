"""Slow and obvious references that the tests compare kvortex with. Nothing here imports kvortex."""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence


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
    """What a BlockIndex does, in dictionaries: ``named`` is what keys lead to, ``lru`` what may be evicted, oldest first."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.evictions = capacity, 0
        self.named: dict[object, Record] = {}
        self.reserved: set[Record] = set()
        self.doomed: set[Record] = set()
        self.lru: OrderedDict[Record, None] = OrderedDict()

    def resident(self, key: object) -> Record | None:
        return None if self.named.get(key) in self.reserved else self.named.get(key)

    def free(self) -> int:
        return self.capacity - len(self.named) - len(self.doomed)

    def reserve(self, keys: Sequence[object], nbytes: int = 0) -> dict[object, str] | None:
        """What each key was, or ``None`` where the pool is too full."""
        found = {key: self.named[key] for key in keys if key in self.named}
        if len(keys) - len(found) > self.free() + len(self.lru.keys() - set(found.values())):
            return None
        for key in reversed(keys):
            if found.get(key) in self.lru:
                self.lru.move_to_end(found[key])
        for key in (key for key in keys if key not in found):
            if self.free() == 0:
                del self.named[self.lru.popitem(last=False)[0].key]
                self.evictions += 1
            self.named[key] = Record(key, nbytes)
            self.reserved.add(self.named[key])
        return {key: "new" if key not in found else "resident" if self.resident(key) else "pending" for key in keys}

    def commit(self, records: Sequence[Record]) -> None:
        self.reserved.difference_update(records)
        self.lru.update(dict.fromkeys(reversed(records)))

    def abort(self, records: Sequence[Record]) -> None:
        for record in records:
            self.reserved.remove(self.named.pop(record.key))

    def acquire(self, keys: Sequence[object]) -> list[Record | None]:
        for record in filter(None, map(self.resident, keys)):
            record.pins += 1
            self.lru.pop(record, None)
        return [self.resident(key) for key in keys]

    def release(self, records: Sequence[Record]) -> None:
        for record in reversed(records):
            record.pins -= 1
            if record.pins == 0 and record not in self.doomed:
                self.lru[record] = None
            self.doomed -= {record} if record.pins == 0 else set()

    def drop(self, keys: Sequence[object]) -> int:
        gone = [self.named.pop(key) for key in dict.fromkeys(keys) if self.resident(key)]
        for record in gone:
            self.lru.pop(record, None)
        self.doomed.update(record for record in gone if record.pins)
        return len(gone)


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
