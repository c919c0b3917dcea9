"""An engine above tiers in memory that fail as they are told."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kvortex.engine import KVortexEngine
from kvortex.tiers import BreakerOptions, RecordFormat, TierOptions
from kvortex.tiers.memory import MemoryStore
from perf.faulty import FaultyTier
from tests.pages import PagedCache

FAST: dict[str, Any] = {"read_timeout_s": 0.2, "write_timeout_s": 0.2, "absent_s": 0.05}


class Tiers:
    """Tiers for one engine: ``tiers.config`` goes into its config, and ``tiers[0]`` is there once it is made."""

    def __init__(self, *stores: MemoryStore, breaker: dict[str, Any] | None = None, **options: Any) -> None:
        self.made: list[FaultyTier] = []
        chosen = TierOptions(**(FAST | options), breaker=BreakerOptions(**(breaker or {})))
        self.config = tuple((self._maker(store), chosen) for store in stores)

    def _maker(self, store: MemoryStore) -> Callable[[RecordFormat], FaultyTier]:
        def make(form: RecordFormat) -> FaultyTier:
            self.made.append(FaultyTier(store, form))
            return self.made[-1]

        return make

    def __getitem__(self, at: int) -> FaultyTier:
        return self.made[at]


def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    """Waits for something to come true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.002)


def nothing_is_held(engine: KVortexEngine) -> None:
    """No pin and no reserved slot is left, and the index is whole; waits for what runs in the background."""
    until(lambda: not (stats := engine.get_stats()).pinned_blocks and not stats.reserved_blocks)
    engine._index.check()
    until(lambda: engine._cascade is None or not engine._cascade.fetches)


def save(engine: KVortexEngine, cache: PagedCache, keys: Any, pages: Any) -> None:
    assert engine.save_blocks(keys, pages).wait().all()
