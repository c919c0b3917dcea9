"""A tier in this process's own memory: records as other tiers store them, in a dict. For tests, and to try things out."""

from __future__ import annotations

import collections
import ctypes
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvortex.keys import KEY_BYTES, KeyArray
from kvortex.tiers.base import Call, Digests, Fetched, Int64s, Outcome, Outcomes, Tier
from kvortex.tiers.inventory import Listing, Name, Verified, check_record, list_records, verify_records
from kvortex.tiers.record import HEADER, HEADER_BYTES, RecordFormat, check_payloads

_PROBE_BYTES = 4096


class MemoryStore:
    """Objects by name, that several tiers may share, as they would share a server. The oldest make room for others.

    Parameters
    ----------
    capacity_bytes
        None for no bound.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.objects: collections.OrderedDict[bytes, bytes] = collections.OrderedDict()
        self.used_bytes = self.evictions = 0
        self._lock = threading.RLock()

    def get(self, name: bytes) -> bytes | None:
        """An object, or None."""
        with self._lock:
            return self.objects.get(name)

    def put(self, name: bytes, value: bytes) -> bool:
        """Whether there was room."""
        with self._lock:
            if self.capacity_bytes is not None and len(value) > self.capacity_bytes:
                return False
            self.remove(name)
            while self.capacity_bytes is not None and self.used_bytes + len(value) > self.capacity_bytes:
                _, old = self.objects.popitem(last=False)
                self.used_bytes -= len(old)
                self.evictions += 1
            self.objects[name] = value
            self.used_bytes += len(value)
            return True

    def remove(self, name: bytes) -> bool:
        """Whether it was there."""
        with self._lock:
            old = self.objects.pop(name, None)
            self.used_bytes -= len(old or b"")
            return old is not None


@functools.cache
def shared_store(name: str) -> MemoryStore:
    """The store of that name in this process."""
    return MemoryStore()


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """A store of this process by its name, and its bound, where it is to have one (another)."""

    name: str
    capacity_bytes: int | None = None


class MemoryTier(Tier):
    """Records of one engine in a :class:`MemoryStore`, by namespace and key.

    Parameters
    ----------
    store
        Or the options of a shared one.
    form
    """

    name = "memory"

    def __init__(self, store: MemoryStore | MemoryOptions, form: RecordFormat) -> None:
        if isinstance(store, MemoryOptions):
            capacity, store = store.capacity_bytes, shared_store(store.name)
            store.capacity_bytes = capacity or store.capacity_bytes
        self.store, self.form = store, form
        self.capacity_bytes = store.capacity_bytes

    def _name(self, key: npt.NDArray[np.uint8]) -> bytes:
        return self.form.namespace + key.tobytes()

    def contains(self, keys: KeyArray, call: Call) -> npt.NDArray[np.bool_] | None:
        return np.array([self.store.get(self._name(key)) is not None for key in keys], bool)

    def get_into(self, keys: KeyArray, addresses: Int64s, room: Int64s, call: Call) -> Fetched:
        n = len(keys)
        found = Fetched(np.full(n, Outcome.MISS, np.uint8), np.zeros(n, np.int64), np.zeros((n, 16), np.uint8))
        for at in range(n):
            if stopped := _stopped(call):
                found.outcomes[at] = stopped
                continue
            record = self.store.get(self._name(keys[at]))
            if record is not None:
                self._read(record, keys[at : at + 1], int(addresses[at]), int(room[at]), at, found)
        return found

    def _read(self, record: bytes, key: KeyArray, address: int, room: int, at: int, found: Fetched) -> None:
        if len(record) < HEADER_BYTES:
            return
        header = np.frombuffer(record, HEADER, 1)
        outcome, nbytes = int(self.form.check_headers(header, key)[0]), len(record) - HEADER_BYTES
        digest = np.ascontiguousarray(header["digest"])
        if outcome == Outcome.OK and (nbytes != int(header["payload_bytes"][0]) or nbytes > room):
            outcome = Outcome.MISS if nbytes == int(header["payload_bytes"][0]) else Outcome.CORRUPT
        if outcome == Outcome.OK:
            ctypes.memmove(address, record[HEADER_BYTES:], nbytes)
            if not check_payloads(np.array([address]), np.array([nbytes]), digest)[0]:
                outcome = Outcome.CORRUPT
        if outcome == Outcome.CORRUPT:
            self.store.remove(self._name(key[0]))
        found.outcomes[at] = outcome
        if outcome == Outcome.OK:
            found.sizes[at], found.digests[at] = nbytes, digest[0]

    def put_from(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, call: Call) -> Outcomes:
        headers, outcomes = self.form.headers(keys, sizes, digests), np.empty(len(keys), np.uint8)
        for at in range(len(keys)):
            if stopped := _stopped(call):
                outcomes[at] = stopped
                continue
            record = headers[at : at + 1].tobytes() + ctypes.string_at(int(addresses[at]), int(sizes[at]))
            outcomes[at] = Outcome.OK if self.store.put(self._name(keys[at]), record) else Outcome.TOO_LARGE
        return outcomes

    def delete(self, keys: KeyArray, call: Call) -> Outcomes:
        there = [self.store.remove(self._name(key)) for key in keys]
        return np.where(np.array(there, bool), Outcome.OK, Outcome.MISS).astype(np.uint8)

    def used_bytes(self) -> int | None:
        return self.store.used_bytes

    def evictions(self) -> int:
        return self.store.evictions

    def probe(self, call: Call) -> str | None:
        name = b"probe" + self.form.namespace
        self.store.put(name, bytes(_PROBE_BYTES))
        return None if self.store.remove(name) else "what was stored was not there"

    def close(self) -> None:
        """Nothing to end."""


def _stopped(call: Call) -> int:
    if call.cancelled():
        return Outcome.CANCELLED
    return 0 if call.left() else Outcome.TIMEOUT


def _records(options: MemoryOptions) -> Iterator[tuple[Name, bytes]]:
    for name, record in list(shared_store(options.name).objects.items()):
        yield Name(name[:-KEY_BYTES], name[-KEY_BYTES:]), bytes(record)


def listing(options: MemoryOptions) -> Listing:
    """What is in a shared store."""
    return list_records(_records(options))


def verify(options: MemoryOptions) -> Verified:
    """Checks every record of a shared store; what is none counts as corrupt."""
    return verify_records((name, check_record(name, record)) for name, record in _records(options))


def purge(options: MemoryOptions) -> int:
    """Empties a shared store; the bytes that it held."""
    store = shared_store(options.name)
    held, store.used_bytes = store.used_bytes, 0
    store.objects.clear()
    return held
