"""The tier itself: opened, asked by many threads at once, probed and closed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import threading
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvortex.errors import ConfigError, told
from kvortex.index import BlockIndex
from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Digests, Fetched, Int64s, Outcome, Outcomes, Tier
from kvortex.tiers.disk import snapshot
from kvortex.tiers.disk.crew import Crew
from kvortex.tiers.disk.deleting import forget
from kvortex.tiers.disk.options import DiskOptions
from kvortex.tiers.disk.pages import PAGE
from kvortex.tiers.disk.places import Places
from kvortex.tiers.disk.probing import probe
from kvortex.tiers.disk.reading import fetch
from kvortex.tiers.disk.recovery import recover
from kvortex.tiers.disk.slab import MOST_AT_ONCE, START, Slab, slot_bytes_for
from kvortex.tiers.disk.store import Store
from kvortex.tiers.disk.syncing import Syncer
from kvortex.tiers.disk.system import System
from kvortex.tiers.disk.writing import keep
from kvortex.tiers.record import RecordFormat

_CLOSING = 10.0  # seconds that a close waits for a disk that hangs

# Steps, and threads, that check digests or make headers while the disk works for others.
_SPARE_READERS, _SPARE_WRITERS = 2, 1


class DiskTier(Tier):
    """Records in preallocated files, one for each folder, which are found again when they are opened again.

    Parameters
    ----------
    options
    form
        What records look like; its namespace and length are those of the files.
    system
        What does the system's calls; of tests.

    Attributes
    ----------
    notes : list of str
        What was wished for and could not be had.
    slots : int
        Records that there is room for.
    slot_bytes : int
        What each takes on disk.
    recovered : int
        Records that were found when it was opened.

    Raises
    ------
    ConfigError
        Blocks are too large, or a folder is in use, is not to be written to, has something else in it, or has too little
        room; the message says which and what to do.
    """

    name, local = "disk", True

    def __init__(self, options: DiskOptions, form: RecordFormat, *, system: System | None = None) -> None:
        if form.usual_bytes is not None:  # slots of one size, and as many as possible
            form = dataclasses.replace(form, most_bytes=min(form.most_bytes, form.usual_bytes), usual_bytes=None)
            self.most_bytes = form.most_bytes
        self.options, self.form = options, form
        self.capacity_bytes = options.capacity_bytes
        self.slot_bytes = slot_bytes_for(form.most_bytes)
        if self.slot_bytes > MOST_AT_ONCE:
            raise ConfigError(
                f"a disk tier takes blocks of {MOST_AT_ONCE - PAGE} bytes at most, which is what Linux writes at once, not of "
                f"{form.most_bytes}; use smaller blocks, or no disk tier"
            )
        self._system = system or System()
        self._pid = os.getpid()
        self._calls, self._quiet, self._closed = 0, threading.Condition(), False
        self._probing = threading.Lock()
        with contextlib.ExitStack() as undo:
            slabs = self._open_slabs(undo)
            places = Places(sum(slab.slots for slab in slabs))
            self.slots = places.count
            index = BlockIndex(places.count, options.policy)
            self._store = Store(slabs, places, index, form)
            recover(slabs, places, form, index, self._system)
            for slab in slabs:
                snapshot.remove(slab.folder)
            self.recovered = index.counts().resident
            self._readers = Crew(options.readers, _SPARE_READERS, "kvortex-disk-read")
            undo.callback(self._readers.close, _CLOSING)
            self._writers = Crew(options.writers, _SPARE_WRITERS, "kvortex-disk-write")
            undo.callback(self._writers.close, _CLOSING)
            self._syncer = Syncer(self._store, options.sync_seconds) if options.sync == "group" else None
            undo.pop_all()
        self.notes = [note for slab in slabs for note in slab.notes]

    def _open_slabs(self, undo: contextlib.ExitStack) -> list[Slab]:
        options, slabs = self.options, []
        share = options.capacity_bytes // len(options.paths)
        if share < START + self.slot_bytes:
            raise ConfigError(
                f"capacity_bytes = {options.capacity_bytes}: over {len(options.paths)} paths it does not hold one block each, "
                f"which takes {START + self.slot_bytes} bytes; make it larger, or name fewer paths"
            )
        for folder in options.paths:
            slab = Slab(
                str(folder),
                share,
                self.slot_bytes,
                self.form.namespace,
                direct=options.direct,
                durable=options.sync == "dsync",
                reset=options.reset,
                system=self._system,
            )
            undo.callback(slab.close)
            slabs.append(slab)
        return slabs

    @contextlib.contextmanager
    def _call(self) -> Iterator[bool]:
        """Whether the tier is there, and stays so until this call has ended."""
        if os.getpid() != self._pid:  # a child has no threads, and the locks are in whatever state
            yield False
            return
        with self._quiet:
            there = not self._closed
            self._calls += there
        try:
            yield there
        finally:
            if there:
                with self._quiet:
                    self._calls -= 1
                    self._quiet.notify_all()

    def contains(self, keys: KeyArray, call: Call) -> npt.NDArray[np.bool_]:
        with self._call() as there:
            return self._store.index.lookup(keys) if there else np.zeros(len(keys), np.bool_)

    def get_into(self, keys: KeyArray, addresses: Int64s, room: Int64s, call: Call) -> Fetched:
        with self._call() as there:
            if there:
                return fetch(self._store, self._readers, keys, addresses, room, call)
        n = len(keys)
        return Fetched(_failed(n), np.zeros(n, np.int64), np.zeros((n, 16), np.uint8))

    def put_from(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, call: Call) -> Outcomes:
        with self._call() as there:
            if there:
                return keep(self._store, self._writers, keys, addresses, sizes, digests, call)
        return _failed(len(keys))

    def delete(self, keys: KeyArray, call: Call) -> Outcomes:
        with self._call() as there:
            return forget(self._store, self._writers, keys, call) if there else _failed(len(keys))

    def probe(self, call: Call) -> str | None:
        with self._call() as there:
            if not there:
                return "it is closed"
            if not self._probing.acquire(timeout=call.left()):
                return "another probe does not come back"
            try:
                return probe(self._store, self._readers, self._writers, secrets.token_bytes(32), call)
            finally:
                self._probing.release()

    def used_bytes(self) -> int:
        return (self._store.index.counts().resident - self._store.quarantined()) * self.slot_bytes

    def evictions(self) -> int:
        return self._store.index.counts().evictions

    def failures(self) -> dict[str, int]:
        """How often what went wrong since the start: names of ``errno``, ``"short"`` and ``"corrupt"``."""
        return self._store.failures()

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        with self._quiet:
            if self._closed:
                return
            self._closed = True
        if self._syncer is not None:
            self._syncer.close()
        ends = time.monotonic() + _CLOSING
        ended = self._readers.close(_CLOSING)
        ended &= self._writers.close(max(0.0, ends - time.monotonic()))
        with self._quiet:
            ended &= self._quiet.wait_for(lambda: self._calls == 0, max(0.0, ends - time.monotonic()))
        if not ended:  # a thread hangs in the kernel, and will use what it has: the next opening looks at all headers
            return
        self._leave()
        for slab in self._store.slabs:
            slab.close()

    def _leave(self) -> None:
        """What the next opening need not search for."""
        store = self._store
        places, slots = store.places, store.index.acquire(store.places.keys)
        live = (slots >= 0) & (places.of_slot[slots] == np.arange(places.count))
        store.index.release(slots)
        rows = np.zeros(places.count, snapshot.ROW)
        rows["key"], rows["bytes"], rows["generation"] = places.keys, places.sizes, places.generations
        rows["mark"], rows["before"], rows["live"] = places.marks, places.before, live
        for number, slab in enumerate(store.slabs):
            try:
                slab.sync()
                snapshot.write(slab.folder, rows[number :: len(store.slabs)], slab.now, self._system)
                slab.end()
            except OSError as error:
                store.failed(error)
                self.notes.append(f"{slab.folder}: was not closed as it should be: {told(error)}")


def _failed(count: int) -> Outcomes:
    return np.full(count, Outcome.FAILED, np.uint8)
