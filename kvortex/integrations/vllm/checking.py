"""Whether a stored block still is what was stored: by the host, ahead of its use.

A connector's load may fail: there the engine, which compares digests while it moves blocks, says so in time. A load that vLLM's
spec was promised must not fail, so what it promises is looked at before. Only here is it known where an engine keeps records.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvortex.digests import DIGEST_BYTES, digest_records
from kvortex.engine import KVortexEngine
from kvortex.keys import KeyArray


def undamaged(engine: KVortexEngine, keys: KeyArray) -> npt.NDArray[np.bool_]:
    """Which of n keys are stored, and have the digest of their save, (n,) bool; with ``digests=False`` which are stored."""
    parts = engine._parts
    held = parts.index.acquire(keys)
    try:
        good: npt.NDArray[np.bool_] = held >= 0
        if parts.digests is not None and good.any():
            slots = held[good]
            addresses = parts.arena.address + slots * parts.arena.slot_bytes
            seen = np.empty((len(slots), DIGEST_BYTES), np.uint8)
            digest_records(addresses, parts.index.size_of(slots), seen)
            good[good] = (seen == parts.digests[slots]).all(axis=1)
        return good
    finally:
        parts.index.release(held)
