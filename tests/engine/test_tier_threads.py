"""Many threads save, prefetch and load at random on a tiny pool above tiers that misbehave: never a wrong byte."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest

from kvortex.devices import HostDevice
from kvortex.errors import PoolFullError
from kvortex.tiers.memory import MemoryStore
from perf.faulty import CALL_FAULTS, RECORD_FAULTS
from tests.engine.tiered import Tiers, nothing_is_held
from tests.pages import PagedCache, keys_of

KEYS, THREADS, PAGES = 40, 4, 6


def stamp(key: int, nbytes: int) -> np.ndarray:
    """What the block of a key holds."""
    return np.random.default_rng(key).integers(0, 256, nbytes, np.uint8)


class Worker:
    """Has pages of its own, and knows what each block must hold."""

    def __init__(self, cache: PagedCache, engine: object, at: int) -> None:
        self.cache, self.engine = cache, engine
        self.rng, self.pages = np.random.default_rng(at), np.arange(at * PAGES, (at + 1) * PAGES)
        self.loaded = self.wrong = 0
        self.errors: list[BaseException] = []

    def views(self, page: int) -> list[np.ndarray]:
        found = []
        for tensor in self.cache.tensors:
            memory = tensor.buffer.array  # type: ignore[attr-defined]
            shape, strides = (*tensor.shape, tensor.itemsize), (*tensor.strides, 1)
            found.append(np.lib.stride_tricks.as_strided(memory[tensor.shift :], shape, strides)[:, page])
        return found

    def write(self, page: int, key: int) -> None:
        for view in self.views(page):
            view[...] = stamp(key, view.size).reshape(view.shape)

    def is_right(self, page: int, key: int) -> bool:
        return all((view == stamp(key, view.size).reshape(view.shape)).all() for view in self.views(page))

    def run(self, turns: int) -> None:
        try:
            for _ in range(turns):
                self.turn()
        except BaseException as error:
            self.errors.append(error)

    def turn(self) -> None:
        numbers = self.rng.permutation(KEYS)[: int(self.rng.integers(1, 4))].tolist()
        pages = self.pages[: len(numbers)]
        what, engine = int(self.rng.integers(8)), self.engine
        if what < 3:
            for page, number in zip(pages.tolist(), numbers, strict=True):
                self.write(page, number)
            with contextlib.suppress(PoolFullError):
                engine.save_blocks(keys_of(*numbers), pages).wait()  # type: ignore[attr-defined]
        elif what < 6:
            for page in pages.tolist():
                self.write(page, 10**6)
            mask = engine.load_blocks(keys_of(*numbers), pages, layerwise=what == 5).wait()  # type: ignore[attr-defined]
            for page, number, came in zip(pages.tolist(), numbers, mask.tolist(), strict=True):
                self.loaded += came
                self.wrong += not self.is_right(page, number if came else 10**6)
        elif what == 6:
            engine.prefetch(keys_of(*numbers), timeout=0.2).wait(float(self.rng.uniform(0, 0.1)))  # type: ignore[attr-defined]
        else:
            engine.check_blocks(keys_of(*numbers))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("slots", "policy"), [(3, "lru"), (8, "arc")])
def test_many_threads_on_a_tiny_pool(slots: int, policy: str) -> None:
    cache = PagedCache.plain(HostDevice(), blocks=THREADS * PAGES, page=(4, 4, 32))
    never = {"failures": 1000, "lost_s": 1000.0}
    tiers = Tiers(MemoryStore(capacity_bytes=60_000), MemoryStore(), breaker=never, absent_s=0.001)
    faults, rng = [fault for fault in CALL_FAULTS + RECORD_FAULTS if fault != "hang"], np.random.default_rng(9)

    def plan(_: str) -> str | None:
        return str(rng.choice(faults)) if rng.random() < 0.15 else None

    with cache.engine(slots=slots, eviction_policy=policy, tiers=tiers.config, transfer_timeout_s=20.0) as engine:
        for tier in tiers.made:
            tier.plan, tier.slow_s = plan, 0.002
        workers = [Worker(cache, engine, at) for at in range(THREADS)]
        threads = [threading.Thread(target=worker.run, args=(150,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert [error for worker in workers for error in worker.errors] == []
        assert sum(worker.wrong for worker in workers) == 0
        assert sum(worker.loaded for worker in workers) > 100
        assert sum(tier.injected.get(fault, 0) for tier in tiers.made for fault in faults) > 50
        assert sum(entry.promoted_blocks for entry in engine.get_stats().tiers) > 20
        nothing_is_held(engine)
        assert not engine.notes and not any("internal" in cause for each in engine.get_stats().tiers for cause in each.errors)
