"""A worker's pool by slots: what is damaged, replaced, missing or failed is never handed out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.config import KVortexConfig
from kvortex.devices import open_device
from kvortex.errors import ArgumentError, ConfigError
from kvortex.integrations.vllm import store as store_module
from kvortex.integrations.vllm.messages import Blocks, rows_of
from kvortex.integrations.vllm.store import Store
from tests.pages import PagedCache, assert_same

SLOTS = 8


def blocks(slots: list[int], names: list[str], pages: list[int]) -> Blocks:
    return Blocks(np.array(slots), rows_of([name.encode().ljust(32) for name in names]), np.array(pages))


def ended(store: Store, number: int) -> tuple[int, ...]:
    store.wait([number])
    (done,) = store.poll()
    assert done.number == number
    return done.failed


@pytest.fixture
def cache() -> PagedCache:
    made = PagedCache.plain(open_device("host"), blocks=12)
    made.randomize()
    return made


@pytest.fixture
def store(cache: PagedCache) -> Iterator[Store]:
    slot = -(-cache.layout.record_bytes // 4096) * 4096
    made = Store(KVortexConfig(cpu_pool_size_bytes=SLOTS * slot, device="host"), cache.layout, SLOTS)
    yield made
    made.close()


def save(store: Store, number: int, *what: Any) -> None:
    store.save(number, blocks(*what))
    assert ended(store, number) == ()


def damage(store: Store, slot: int) -> None:
    (there,) = store.engine._index.acquire(store._keys[[slot]])
    store.engine._index.release([there])
    store.engine._parts.arena.view(int(there))[5] ^= 1


def test_a_damaged_block_fails_and_others_are_loaded(store: Store, cache: PagedCache) -> None:
    """What the page of the damaged one holds is not promised: whoever is told of it computes it."""
    save(store, 1, [3, 5, 6], ["a", "b", "c"], [0, 1, 2])
    before = cache.memory()
    damage(store, 5)
    assert store.good(blocks([3, 5, 6], ["a", "b", "c"], [0, 0, 0])).tolist() == [True, False, True]
    store.load(2, blocks([3, 5, 6], ["a", "b", "c"], [7, 8, 9]))
    assert ended(store, 2) == (1,)
    want = cache.expected(before, before, [(0, 7), (2, 9)])
    spared = cache.expected(want, cache.memory(), [(8, 8)])  # whatever lies in page 8 now
    assert_same(cache.memory(), spared)
    store.load(3, blocks([5], ["b"], [10]))
    assert ended(store, 3) == (0,) and store.engine.get_stats().corrupt_blocks == 1


def test_a_load_reads_no_record_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine compares digests while it moves blocks; a host that read them before took as long again."""
    save(store, 1, [3, 5], ["a", "b"], [0, 1])
    monkeypatch.setattr(store_module, "undamaged", lambda *a: pytest.fail("a load looked at its records first"))
    store.load(2, blocks([3, 5], ["a", "b"], [7, 8]))
    assert ended(store, 2) == ()


def test_without_digests_nothing_is_compared(cache: PagedCache) -> None:
    slot = -(-cache.layout.record_bytes // 4096) * 4096
    made = Store(KVortexConfig(cpu_pool_size_bytes=SLOTS * slot, device="host", digests=False), cache.layout, SLOTS)
    save(made, 1, [3], ["a"], [0])
    damage(made, 3)
    assert made.good(blocks([3, 4], ["a", "b"], [0, 0])).tolist() == [True, False]
    made.close()


def test_who_is_admitted_is_the_schedulers_to_say_and_what_it_says_is_saved_is_saved(cache: PagedCache) -> None:
    """An engine that counted offers once more would leave out what all ranks' scheduler then promises."""
    slot = -(-cache.layout.record_bytes // 4096) * 4096
    made = Store(KVortexConfig(cpu_pool_size_bytes=SLOTS * slot, device="host", admit_after=2), cache.layout, SLOTS)
    save(made, 1, [3, 4], ["a", "b"], [0, 1])
    assert made.good(blocks([3, 4], ["a", "b"], [0, 0])).all()
    made.close()


def test_a_slot_holds_what_was_saved_last(store: Store, cache: PagedCache) -> None:
    save(store, 1, [3, 4], ["a", "b"], [0, 1])
    save(store, 2, [4], ["a"], [2])  # the same name elsewhere too
    before = cache.memory()
    store.load(3, blocks([3, 4, 4], ["a", "a", "b"], [7, 8, 9]))
    assert ended(store, 3) == (2,)
    assert_same(cache.memory(), cache.expected(before, before, [(0, 7), (2, 8)]))


def test_the_pool_is_as_large_as_its_slots_however_often_they_are_used_anew(store: Store) -> None:
    for turn in range(5):
        save(store, turn, list(range(SLOTS)), [f"{turn}-{i}" for i in range(SLOTS)], list(range(SLOTS)))
    stats = store.engine.get_stats()
    assert (stats.resident_blocks, stats.evictions, stats.saved_blocks) == (SLOTS, 0, 5 * SLOTS)


def test_what_is_not_there_fails(store: Store) -> None:
    store.load(1, blocks([-1, 2], ["a", "b"], [0, 1]))
    assert ended(store, 1) == (0, 1)


def test_a_save_that_fails_is_told_and_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1, [3], ["a"], [0])
    with monkeypatch.context() as broken:
        broken.setattr(store.engine, "save_blocks", lambda *a, **k: (_ for _ in ()).throw(ArgumentError("planted")))
        store.save(2, blocks([3], ["b"], [1]))
    assert ended(store, 2) == (0,)
    assert not store.good(blocks([3], ["a"], [0])).any() and not store.good(blocks([3], ["b"], [0])).any()
    assert store.engine.get_stats().resident_blocks == 0


def test_a_load_that_fails_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1, [3, 4], ["a", "b"], [0, 1])
    monkeypatch.setattr(store.engine, "load_blocks", lambda *a, **k: (_ for _ in ()).throw(ArgumentError("planted")))
    store.load(2, blocks([3, 4], ["a", "b"], [5, 6]))
    assert ended(store, 2) == (0, 1)


def test_a_pool_that_is_smaller_than_the_scheduler_believes_is_refused(cache: PagedCache) -> None:
    slot = -(-cache.layout.record_bytes // 4096) * 4096
    with pytest.raises(ConfigError, match="holds 4 blocks .* counts on 5"):
        Store(KVortexConfig(cpu_pool_size_bytes=4 * slot, device="host"), cache.layout, 5)


def test_a_block_that_is_lost_between_the_look_and_the_load_fails(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1, [3, 4, 5], ["a", "b", "c"], [0, 1, 2])
    damage(store, 3)  # so that positions of the ticket are not those of the call
    there = store._there

    def lose(*given: Any) -> Any:
        found = there(*given)
        store.engine.drop_blocks(store._keys[[5]])
        return found

    monkeypatch.setattr(store, "_there", lose)
    store.load(2, blocks([3, 6, 4, 5], ["a", "d", "b", "c"], [7, 10, 8, 9]))
    assert ended(store, 2) == (0, 1, 3)
