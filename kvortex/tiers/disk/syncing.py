"""Flushes the drives again and again while records are being written."""

from __future__ import annotations

import threading

from kvortex.tiers.disk.store import Store


class Syncer:
    """A thread that flushes every slab ``seconds`` after the last time, where something was written meanwhile."""

    def __init__(self, store: Store, seconds: float) -> None:
        self._store, self._seconds = store, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="kvortex-disk-sync", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._stop.wait(self._seconds):
            if not self._store.unsynced:
                continue
            self._store.unsynced = False  # before: what is written from now on is for the next time
            for slab in self._store.slabs:
                try:
                    slab.sync()
                except OSError as error:
                    self._store.failed(error)
                    self._store.unsynced = True

    def close(self) -> None:
        """Ends it; the caller flushes for the last time. Does not wait for a drive that hangs."""
        self._stop.set()
        self._thread.join(1.0)
