"""The spec's two halves together, over pages of the host: promises that hold, chunks of several blocks, groups."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.config import KVortexConfig
from kvortex.devices import open_device
from kvortex.integrations.vllm import manager as manager_module
from kvortex.integrations.vllm.ledger import Ledger
from kvortex.integrations.vllm.manager import Change, Manager
from kvortex.integrations.vllm.mover import Mover
from kvortex.integrations.vllm.store import Store
from kvortex.keys import Namespace
from tests.pages import PagedCache, assert_same


def names(*numbers: int) -> list[bytes]:
    return [number.to_bytes(36, "big") for number in numbers]


class World:
    def __init__(self, chunks: int, per_chunk: int, linked: bool = True) -> None:
        self.cache = PagedCache.plain(open_device("host"), blocks=40)
        self.before = self.cache.randomize()
        size = chunks * per_chunk * (-(-self.cache.layout.record_bytes // 4096) * 4096)
        store = Store(KVortexConfig(cpu_pool_size_bytes=size, device="host"), self.cache.layout, chunks * per_chunk)
        self.mover = Mover(store, per_chunk, lambda: None)
        self.manager = Manager(Ledger(chunks, "lru", 1, Namespace()), lambda: self.mover if linked else None, events=True)
        self._job = 0

    def store(self, these: list[bytes], pages: list[int], groups: Any = None, *, finish: bool = True) -> Any:
        made = self.manager.prepare_store(these)
        assert made is not None
        self._job += 1
        self.mover.save(self._job, pages, made.place, groups)
        if finish:
            self.end(True)
            self.manager.complete_store(set(made.names), True)
        return made

    def load(self, these: list[bytes], pages: list[int], groups: Any = None) -> None:
        place = self.manager.prepare_load(these)
        self._job += 1
        self.mover.load(self._job, pages, place, groups)
        self.end(False)
        self.manager.complete_load(set(these))

    def end(self, saved: bool) -> None:
        self.mover.wait([self._job])
        assert [(done.saved, done.failed) for done in self.mover.poll()] == [(saved, ())]

    def damage(self, name: bytes, within: int = 0) -> None:
        store, slot = self.mover.store, self.manager.ledger.slot_of(name)
        assert slot is not None
        (there,) = store.engine._index.acquire(store._keys[[slot * self.mover._per_chunk + within]])
        store.engine._index.release([there])
        store.engine._parts.arena.view(int(there))[9] ^= 2

    def expect(self, *moves: tuple[int, int]) -> None:
        assert_same(self.cache.memory(), self.cache.expected(self.before, self.before, moves))


@pytest.fixture
def world() -> Iterator[World]:
    made = World(8, 1)
    yield made
    close(made)


def close(world: World) -> None:
    counts = world.manager.ledger.counts()
    assert (counts.pinned, counts.reserved) == (0, 0) and not world.manager._pins
    world.mover.store.close()


def test_a_chunk_is_a_hit_when_it_was_stored(world: World) -> None:
    made = world.store(names(1, 2), [3, 4], finish=False)
    assert [world.manager.lookup(name) for name in names(1, 9)] == ["pending", "miss"]
    world.end(True)
    world.manager.complete_store(made.names, True)
    assert [world.manager.lookup(name) for name in names(1, 2)] == ["hit", "hit"]
    world.load(names(2, 1), [20, 21])
    world.expect((4, 20), (3, 21))


def test_a_damaged_chunk_is_never_promised(world: World) -> None:
    world.store(names(1, 2), [3, 4])
    world.damage(names(2)[0])
    assert [world.manager.lookup(name) for name in names(1, 2, 2)] == ["hit", "miss", "miss"]
    assert world.manager.ledger.slot_of(names(2)[0]) is None
    assert world.store(names(1, 2), [30]).names == names(2)  # computed again, and stored again
    assert world.manager.lookup(names(2)[0]) == "hit"


def test_a_chunk_is_looked_at_again_after_a_load(world: World) -> None:
    world.store(names(1), [3])
    assert world.manager.lookup(names(1)[0]) == "hit"
    world.load(names(1), [20])
    world.damage(names(1)[0])
    assert world.manager.lookup(names(1)[0]) == "miss"


def test_a_chunk_is_looked_at_again_after_a_while(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.store(names(1), [3])
    assert world.manager.lookup(names(1)[0]) == "hit"
    world.damage(names(1)[0])
    now = time.monotonic()
    monkeypatch.setattr(manager_module.time, "monotonic", lambda: now + manager_module._LOOKED_AT_FOR_S + 0.1)
    assert world.manager.lookup(names(1)[0]) == "miss"


def test_a_store_that_failed_is_a_miss_though_vllm_was_told_otherwise(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = world.mover.store.engine
    made = world.manager.prepare_store(names(1))
    assert made is not None
    with monkeypatch.context() as broken:
        broken.setattr(engine, "save_blocks", lambda *a, **k: (_ for _ in ()).throw(manager_error()))
        world.mover.save(1, [3], made.place, None)
    (done,) = world.mover.poll()
    assert done.saved and done.failed == (0,)
    world.manager.complete_store(names(1), True)
    assert world.manager.lookup(names(1)[0]) == "miss" and world.manager.ledger.slot_of(names(1)[0]) is None


def manager_error() -> Exception:
    from kvortex.errors import TransferError

    return TransferError("planted")


def test_while_it_is_written_a_chunk_that_vllm_takes_for_stored_is_a_miss_and_stays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.store(names(1), [3], finish=False)
    monkeypatch.setattr(world.mover.store, "is_writing", lambda slots: True)
    world.manager.complete_store(names(1), True)  # 0.15 does so at a preemption
    assert world.manager.lookup(names(1)[0]) == "miss"
    monkeypatch.undo()
    world.end(True)
    assert world.manager.lookup(names(1)[0]) == "hit"


def test_pinned_chunks_stay_and_none_means_no_room(world: World) -> None:
    world.store(names(*range(8)), list(range(8)))
    place = world.manager.prepare_load(names(*range(6)))
    made = world.manager.prepare_store(names(10, 11, 12))
    assert made is not None and made.names == names(10, 11) and set(made.evicted) == set(names(6, 7))
    assert world.manager.prepare_store(names(13)) is None
    assert world.manager.prepare_store(names(1, 2)).names == []  # type: ignore[union-attr]
    world.manager.complete_store(names(10, 11), False)
    world.manager.complete_load(names(*range(6)))
    assert place.slots.tolist() == [world.manager.ledger.slot_of(name) for name in names(*range(6))]


def test_a_chunk_that_is_not_admitted_yet_is_no_want_of_room() -> None:
    """vLLM would warn, and offer it again with each step of the same request, until that had admitted it."""
    manager = Manager(Ledger(2, "lru", 2, Namespace()), lambda: None, events=False)
    first, second = manager.prepare_store(names(1, 2)), manager.prepare_store(names(1, 2))
    assert first is not None and first.names == [] and second is not None and second.names == names(1, 2)
    assert manager.prepare_store(names(3)) is not None and manager.prepare_store(names(3)) is None  # now it is one
    manager.complete_store(names(1, 2), False)


def test_a_chunk_that_is_loaded_twice_is_pinned_twice(world: World) -> None:
    world.store(names(1), [3])
    world.manager.prepare_load(names(1))
    world.manager.prepare_load(names(1))
    world.manager.complete_load(names(1))
    assert world.manager.ledger.counts().pinned == 1
    world.manager.complete_load(names(1))
    world.manager.complete_load(names(1))  # of one that is over: nothing
    assert world.manager.ledger.counts().pinned == 0


def test_what_came_and_went_is_told(world: World) -> None:
    world.store(names(*range(8)), list(range(8)))
    (came,) = world.manager.take_changes()
    assert sorted(came.names) == names(*range(8)) and not came.removed
    world.store(names(20), [1])
    (gone, came) = world.manager.take_changes()
    assert gone.removed and len(gone.names) == 1 and came == Change(names(20), False)
    assert world.manager.take_changes() == []


def test_reset_forgets_pins_and_reservations(world: World) -> None:
    world.store(names(1, 2), [3, 4])
    world.manager.prepare_load(names(1))
    world.manager.prepare_store(names(5))
    world.manager.reset()
    assert [world.manager.lookup(name) for name in names(1, 2, 5)] == ["miss"] * 3
    world.manager.complete_load(names(1))  # late word of what was reset
    world.manager.complete_store(names(5), True)
    world.store(names(1), [7])
    world.load(names(1), [20])
    world.expect((7, 20))


def test_chunks_of_several_blocks_and_loads_that_begin_inside_one() -> None:
    world = World(4, 3)
    world.store(names(1, 2), [3, 4, 5, 6, 7, 8])
    world.load(names(1, 2), [20, 21, 22, 23], None)  # the last four of six, as 0.15 says it
    world.load(names(1, 2), [30, 31], [(2, 2)])  # the third and fourth, as newer versions do
    world.expect((5, 20), (6, 21), (7, 22), (8, 23), (5, 30), (6, 31))
    world.damage(names(1)[0], within=2)
    assert [world.manager.lookup(name) for name in names(1, 2)] == ["miss", "hit"]
    close(world)


def test_groups_one_behind_another() -> None:
    world = World(6, 2)
    world.store(names(1, 2, 3), [3, 4, 5, 6, 7, 8], [(4, 0), (2, 8)])
    world.load(names(2, 3), [20, 21], [(1, 3), (1, 8)])
    world.expect((6, 20), (7, 21))
    world.load(names(3), [22, 23], [(0, 0), (2, 8)])
    world.expect((6, 20), (7, 21), (7, 22), (8, 23))
    close(world)


def test_a_chunk_of_which_a_window_had_left_a_part() -> None:
    world = World(4, 4)
    world.store(names(1), [3, 4], [(2, 2)])
    assert world.manager.lookup(names(1)[0]) == "hit"
    world.load(names(1), [20, 21], [(2, 2)])
    world.expect((3, 20), (4, 21))
    world.damage(names(1)[0], within=3)
    world.manager._looked_at.clear()
    assert world.manager.lookup(names(1)[0]) == "miss"
    close(world)


def test_without_a_worker_in_the_process_a_damaged_chunk_fails_its_load() -> None:
    world = World(4, 1, linked=False)
    world.store(names(1), [3])
    world.damage(names(1)[0])
    assert world.manager.lookup(names(1)[0]) == "hit"
    world.mover.load(9, np.array([20], np.int32), world.manager.prepare_load(names(1)), [(1, 0)])
    world.mover.wait([9])
    (done,) = world.mover.poll()
    assert not done.saved and done.failed == (0,)
    world.manager.complete_load(names(1))
    close(world)
