"""Blocks damaged on purpose. It reaches inside the engine, as only a test may."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvortex import KVortexEngine


def flip_bit(engine: KVortexEngine, key: Any, bit: int) -> None:
    """One bit of a block in the pool."""
    slots = engine._index.acquire(engine._stored(np.asarray(key)[None]))
    engine._index.release(slots)
    engine._parts.arena.view(int(slots[0]))[bit // 8] ^= np.uint8(1 << bit % 8)
