"""Whether a stored block still is what was stored: by the host, ahead of its use.

Only here is it known where an engine keeps its records. A load of the connector may fail, so it needs this only while engines
do not compare digests themselves. A spec's load must not fail, so what it promises is looked at before, whatever engines do.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvortex.digests import DIGEST_BYTES, digest_records
from kvortex.engine import KVortexEngine
from kvortex.keys import KeyArray

Int64s = npt.NDArray[np.int64]


class HostCheck:
    """Digests of an engine's records, by slots that the caller counts."""

    def __init__(self, engine: KVortexEngine, slots: int) -> None:
        self._engine = engine
        self._digests = np.zeros((slots, DIGEST_BYTES), np.uint8)

    def note(self, slots: Int64s, keys: KeyArray) -> npt.NDArray[np.bool_]:
        """Remembers what is stored now under n keys; (n,) bool, false where nothing is."""
        found, digests = self._digest(keys, kept=True)
        self._digests[slots[found]] = digests[found]
        return found

    def good(self, slots: Int64s, keys: KeyArray) -> npt.NDArray[np.bool_]:
        """Which of n keys are stored, and are what was noted, (n,) bool."""
        found, digests = self._digest(keys)
        good: npt.NDArray[np.bool_] = found & (digests == self._digests[slots]).all(axis=1)
        return good

    def _digest(self, keys: KeyArray, *, kept: bool = False) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint8]]:
        """Which of n keys are stored, and the digests of what lies there now; or those that the engine has kept, if it does."""
        parts = self._engine._parts
        digests = np.zeros((len(keys), DIGEST_BYTES), np.uint8)
        held = parts.index.acquire(keys)
        try:
            found = held >= 0
            if kept and parts.digests is not None:
                digests[found] = parts.digests[held[found]]
                return found, digests
            addresses = parts.arena.address + held[found] * parts.arena.slot_bytes
            read = np.empty((len(addresses), DIGEST_BYTES), np.uint8)
            digest_records(addresses, parts.index.size_of(held[found]), read)
            digests[found] = read
            return found, digests
        finally:
            parts.index.release(held)
