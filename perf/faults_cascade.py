"""A running engine above tiers that do everything wrong that tiers do: what must never be, counted.

An engine with a pool of a few blocks, two tiers below it, and threads that save, prefetch and load at random. Each call of a
tier may raise, fail, answer nonsense, come late or not at all, scribble into the slots and fail, or find its records flipped,
torn, lengthened, swapped, emptied, or of another version. Bytes follow from keys (``kvortex/cli/pages.py``), so every page that
a load says it brought is checked byte by byte, and every page of a miss must still hold what lay there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvortex.cli.pages import Pages
from kvortex.config import KVortexConfig
from kvortex.devices import HostDevice
from kvortex.engine import KVortexEngine
from kvortex.errors import PoolFullError, TransferTimeoutError
from kvortex.tiers import BreakerOptions, RecordFormat, TierOptions
from kvortex.tiers.memory import MemoryStore
from perf.faulty import FAULTS, FaultyTier

KEYS, THREADS, PAGES, SLOTS = 48, 3, 4, 6
_FAULTS_A_LIFE = 1500  # until the engine is made anew above the same stores
_READ_S, _WRITE_S, _HUNG_S = 0.05, 0.05, 0.2
_SLACK_S = 2.0  # by which a busy machine may be late
_NEVER = BreakerOptions(failures=10**9, lost_s=1e8)
_QUICK = BreakerOptions(failures=5, lost_s=0.5, pause_s=0.02, longest_pause_s=0.1)


def campaign(seed: int, faults: int, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Injects at least so many faults.

    Parameters
    ----------
    seed
        Of all that is random; threads take turns as they like all the same.
    faults
    progress
        Told how many of how many faults were injected.

    Returns
    -------
    dict
        ``faults`` and ``kinds`` (how many of each), ``operations``, ``blocks_right``; all of ``wrong_bytes``, ``hangs``,
        ``leaked`` and ``raised`` must be 0, and ``served_again`` true. ``seconds`` it took.
    """
    began, at = time.monotonic(), 0
    stores = [MemoryStore(KEYS // 2 * 4096), MemoryStore()]
    total: dict[str, Any] = {"operations": 0, "blocks_right": 0, "wrong_bytes": 0, "hangs": 0, "leaked": 0, "raised": 0}
    kinds: dict[str, int] = {}
    served_again = True
    with Pages(HostDevice(), THREADS * PAGES, 2, 4, 1, 32) as pages:
        while sum(kinds.values()) < faults:
            life = Life(pages, stores, seed + at, min(_FAULTS_A_LIFE, faults - sum(kinds.values())), tripping=at % 3 == 2)
            found = life.run()
            served_again &= found.pop("served_again")
            for name, count in found.pop("kinds").items():
                kinds[name] = kinds.get(name, 0) + count
            for name, count in found.items():
                total[name] += count
            at += 1
            if progress is not None:
                progress(sum(kinds.values()), faults)
    seconds = time.monotonic() - began
    return {"faults": sum(kinds.values()), "kinds": kinds, **total, "served_again": served_again, "seconds": seconds}


class Life:
    """One engine, from its making to its end.

    Parameters
    ----------
    pages, stores
    seed
    faults
        After so many the tiers work again.
    tripping
        Whether breakers open; else tiers are called whatever they do, and more goes wrong.
    """

    def __init__(self, pages: Pages, stores: list[MemoryStore], seed: int, faults: int, *, tripping: bool) -> None:
        self.pages, self.stores, self.faults, self.tripping = pages, stores, faults, tripping
        self.rng = np.random.default_rng(seed)
        self.tiers: list[FaultyTier] = []
        self.injected = 0
        self.found = {"operations": 0, "blocks_right": 0, "wrong_bytes": 0, "hangs": 0, "leaked": 0, "raised": 0}
        self._lock = threading.Lock()

    def run(self) -> dict[str, Any]:
        """What was found."""
        with self._engine() as engine:
            opener = threading.Thread(target=self._open_gates, args=(engine,), daemon=True)
            opener.start()
            workers = [threading.Thread(target=self._work, args=(engine, at), daemon=True) for at in range(THREADS)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(600)
                self.found["hangs"] += worker.is_alive()
            self.injected = self.faults  # whatever became of the threads
            opener.join(60)
            served = self._serves(engine)
            self._look_for_leaks(engine)
        kinds: dict[str, int] = {}
        for tier in self.tiers:
            for name, count in tier.injected.items():
                kinds[name] = kinds.get(name, 0) + count
        return {**self.found, "kinds": kinds, "served_again": served}

    def _engine(self) -> KVortexEngine:
        breaker = _QUICK if self.tripping else _NEVER
        times: dict[str, Any] = {"read_timeout_s": _READ_S, "write_timeout_s": _WRITE_S, "absent_s": 1e-3, "fresh_s": 5.0}
        options = TierOptions(**times, breaker=breaker)
        slot = -(-self.pages.layout.record_bytes // 4096) * 4096
        tiers = tuple((self._maker(store), options) for store in self.stores)
        config = KVortexConfig(cpu_pool_size_bytes=SLOTS * slot, device="host", tiers=tiers, transfer_timeout_s=30.0)
        return KVortexEngine.create(config, self.pages.layout)

    def _maker(self, store: MemoryStore) -> Callable[[RecordFormat], FaultyTier]:
        def make(form: RecordFormat) -> FaultyTier:
            tier = FaultyTier(store, form, self._plan, slow_s=0.002, seed=int(self.rng.integers(1 << 30)))
            self.tiers.append(tier)
            return tier

        return make

    def _plan(self, operation: str) -> str | None:
        """What goes wrong with a call: mostly something."""
        with self._lock:
            if self.injected >= self.faults or self.rng.random() < 0.3:
                return None
            fault = str(self.rng.choice(FAULTS))
            if fault == "hang" and self.rng.random() < 0.95:  # each takes a while
                return None
            self.injected += 1
            return fault

    def _open_gates(self, engine: KVortexEngine) -> None:
        """Calls that hang come back some time after all have given them up."""
        while self.injected < self.faults or any(tier.hung for tier in self.tiers):
            time.sleep(_HUNG_S)
            for tier in self.tiers:
                tier.gate.set()
                tier.gate = threading.Event()

    def _work(self, engine: KVortexEngine, at: int) -> None:
        rng, mine = np.random.default_rng((int(self.rng.integers(1 << 30)), at)), np.arange(at * PAGES, (at + 1) * PAGES)
        while self.injected < self.faults:
            numbers = rng.permutation(KEYS)[: int(rng.integers(1, PAGES))]
            keys, pages, what = keys_of(numbers), mine[: len(numbers)], int(rng.integers(8))
            began = time.monotonic()
            try:
                if what < 3:
                    self.pages.fill(pages, keys)
                    engine.save_blocks(keys, pages).wait()
                elif what < 6:
                    self._load(engine, keys, pages, layerwise=what == 5)
                elif what == 6:
                    engine.prefetch(keys).wait()
                else:
                    engine.check_blocks(keys, timeout=0.01)
            except PoolFullError:
                pass
            except TransferTimeoutError:
                self._count("hangs", 1)
            except Exception:
                self._count("raised", 1)
            # A tier's calls have their deadlines twice over, for asking and for reading; and there are two tiers.
            self._count("hangs", int(time.monotonic() - began > 4 * _READ_S + _SLACK_S))
            self._count("operations", 1)

    def _load(self, engine: KVortexEngine, keys: Any, pages: Any, *, layerwise: bool) -> None:
        self.pages.fill(pages, keys_of(np.arange(1000, 1000 + len(pages))))
        came = engine.load_blocks(keys, pages, layerwise=layerwise).wait()
        untouched = keys_of(np.arange(1000, 1000 + len(pages)))
        self._count("wrong_bytes", self.pages.wrong_bytes(pages[came], keys[came]))
        self._count("wrong_bytes", self.pages.wrong_bytes(pages[~came], untouched[~came]))
        self._count("blocks_right", int(came.sum()))

    def _count(self, name: str, more: int) -> None:
        if more:
            with self._lock:
                self.found[name] += more

    def _serves(self, engine: KVortexEngine) -> bool:
        """Whether every tier takes blocks and gives them back, now that it works."""
        if not _comes_true(lambda: all(each.breaker == "closed" for each in engine.get_stats().tiers), 10.0):
            return False
        fresh, pages = keys_of(2000 + np.arange(PAGES)), np.arange(PAGES)
        for store in self.stores:
            store.objects.clear()
            store.used_bytes = 0
        self.pages.fill(pages, fresh)
        engine._index.drop(fresh)
        for line in engine._cascade.lines if engine._cascade is not None else ():
            line.known.drop(fresh)
        if not engine.save_blocks(fresh, pages).wait().all() or not engine.flush(10.0):
            return False
        if any(len(store.objects) < PAGES for store in self.stores):
            return False
        engine._index.drop(fresh)
        self.pages.clear(pages)
        came = engine.load_blocks(fresh, pages).wait()
        return bool(came.all()) and self.pages.wrong_bytes(pages, fresh) == 0

    def _look_for_leaks(self, engine: KVortexEngine) -> None:
        def held() -> int:
            stats = engine.get_stats()
            return stats.pinned_blocks + stats.reserved_blocks

        _comes_true(lambda: not held(), 10.0)
        self.found["leaked"] += held()
        engine._index.check()
        self.found["raised"] += len(engine.notes)


def _comes_true(true: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def keys_of(numbers: Any) -> Any:
    """(n, 32) uint8."""
    keys = np.zeros((len(numbers), 4), np.int64)
    keys[:, 0], keys[:, 1] = numbers, 7
    return keys.view(np.uint8).reshape(-1, 32)
