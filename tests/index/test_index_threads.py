"""Eight threads on a small pool: no bytes of another key under a pin, no slot twice, nothing leaked.

``STRESS_OPERATIONS=1000000 python -m pytest tests/index/test_index_threads.py`` makes each thread call the index so many times.
"""

from __future__ import annotations

import gc
import os
import threading

import numpy as np
import pytest

from kvortex.errors import PoolFullError
from kvortex.index import NEW, POLICIES, RESIDENT, BlockIndex

THREADS, CAPACITY, UNIVERSE = 8, 48, 96
OPERATIONS = int(os.environ.get("STRESS_OPERATIONS", "3000"))  # of each thread


def worker(index: BlockIndex, keys: np.ndarray, pool: np.ndarray, seed: int, full: list[int]) -> None:
    """``pool[slot]`` stands for a record's bytes: the number of the key that was written there, or -1 while it is written."""
    rng, calls = np.random.default_rng(seed), 0
    while calls < OPERATIONS:
        calls += 1
        chosen = rng.permutation(UNIVERSE)[: rng.integers(1, 9)]
        kind = rng.integers(0, 8)
        if kind < 3:
            try:
                slots, status, _ = index.reserve(keys[chosen])
            except PoolFullError:
                full.append(seed)
                continue
            mine = slots[status == NEW]
            pool[mine] = -1
            calls += 2
            assert not index.lookup(keys[chosen[status == NEW]]).any()
            pool[mine] = chosen[status == NEW]
            if rng.random() < 0.2:
                index.abort(mine)
            else:
                index.commit(mine)
        elif kind < 6:
            slots = index.acquire(keys[chosen])
            found = slots >= 0
            for _ in range(2):  # what is pinned is whole, and stays
                assert np.array_equal(pool[slots[found]], chosen[found])
                index.match(keys[chosen])
            index.release(slots)
            calls += 3
        elif kind < 7:
            index.drop(keys[chosen[:2]])
        else:
            counts = index.counts()
            assert counts.free + counts.reserved + counts.resident == CAPACITY
            assert counts.pinned <= counts.resident


@pytest.mark.parametrize(("policy", "admit_after"), [*((policy, 1) for policy in POLICIES), ("lru", 2)])
def test_threads_leak_nothing_and_never_read_another_record(policy: str, admit_after: int) -> None:
    index = BlockIndex(CAPACITY, policy, admit_after=admit_after)
    keys = np.random.default_rng(0).integers(0, 256, (UNIVERSE, 32), dtype=np.uint8)
    pool = np.full(CAPACITY, -1)
    index.check()  # compile before the race
    failures: list[BaseException] = []
    full: list[int] = []

    def guarded(seed: int) -> None:
        try:
            worker(index, keys, pool, seed, full)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120 + OPERATIONS / 500)
        assert not thread.is_alive()
    if failures:
        raise failures[0]
    index.check()
    counts = index.counts()
    assert counts.pinned == counts.reserved == 0 and counts.evictions > 0
    assert len(full) < THREADS * OPERATIONS // 12  # most of the work was done, not refused
    slots, status, _ = index.reserve(keys[index.lookup(keys)])
    assert (status == RESIDENT).all() and len(set(slots.tolist())) == counts.resident
    assert np.array_equal(pool[slots], np.flatnonzero(index.lookup(keys)))


def test_one_key_is_given_to_one_writer() -> None:
    """All threads ask for the same keys at once: each key is NEW exactly once."""
    index = BlockIndex(256)
    keys = np.random.default_rng(1).integers(0, 256, (256, 32), dtype=np.uint8)
    start = threading.Barrier(THREADS)
    news: list[np.ndarray] = []

    def ask() -> None:
        start.wait()
        for row in range(256):
            slots, status, _ = index.reserve(keys[row : row + 1])
            news.append(slots[status == NEW])

    threads = [threading.Thread(target=ask) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(np.concatenate(news).tolist()) == list(range(256))


@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("reserve", "keys"),
        ("commit", "slots"),
        ("abort", "slots"),
        ("acquire", "keys"),
        ("release", "slots"),
        ("drop", "keys"),
        ("size_of", "slots"),
        ("counts", None),
        ("check", None),
    ],
)
def test_every_call_but_those_that_look_waits_for_the_one_before(method: str, argument: str | None) -> None:
    """Calls are so short that a race almost never shows a missing lock; a lock that is held does."""
    index = BlockIndex(4)
    arguments = {"keys": [np.zeros((1, 32), np.uint8)], "slots": [[]], None: []}[argument]
    thread = threading.Thread(target=getattr(index, method), args=arguments, daemon=True)
    with index._lock:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()


def test_a_finaliser_may_release_while_its_thread_is_inside_the_index() -> None:
    """The garbage collector may run anywhere, and a lost ticket gives back its pins from there."""
    index = BlockIndex(4)
    keys = np.zeros((1, 32), np.uint8)
    index.commit(index.reserve(keys).slots)

    class Ticket:
        def __init__(self) -> None:
            self.slots, self.itself = index.acquire(keys), self

        def __del__(self) -> None:
            index.release(self.slots)

    Ticket()
    done = threading.Event()

    def collect() -> None:
        with index._lock:
            gc.collect()
        done.set()

    threading.Thread(target=collect, daemon=True).start()
    assert done.wait(30)
    assert index.counts().pinned == 0
