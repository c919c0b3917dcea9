"""Blocks go down into tiers and come back exact, through any engine that means the same by them, and through no other."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import pytest

from kvortex import KVortexConfig, KVortexEngine
from kvortex.devices import Device, HostDevice, HostStream
from kvortex.errors import ArgumentError, ConfigError, EngineClosedError
from kvortex.tiers.memory import MemoryStore
from tests import pages
from tests.engine.tiered import Tiers, nothing_is_held, save, until
from tests.pages import assert_same, keys_of


class PagedCache(pages.PagedCache):
    """Whose engines do not wait long for a tier that a failed test has left hanging."""

    def engine(self, slots: int = 32, **options: Any) -> KVortexEngine:
        return super().engine(slots, **({"transfer_timeout_s": 10.0} | options))


def fill(cache: PagedCache, store: MemoryStore, blocks: int = 12, **options: object) -> list[np.ndarray]:
    """Blocks 0 to ``blocks`` - 1 are saved and flushed to a store; what they hold."""
    before = cache.randomize()
    with cache.engine(slots=16, tiers=Tiers(store).config, **options) as engine:
        save(engine, cache, keys_of(*range(blocks)), np.arange(blocks))
        assert engine.flush(10)
    return before


def test_a_restarted_engine_reads_back_exact(device: Device) -> None:
    cache, store = PagedCache.plain(device), MemoryStore()
    before = fill(cache, store)
    poisoned = cache.randomize()
    tiers = Tiers(store)
    with cache.engine(slots=6, tiers=tiers.config) as engine:
        assert not engine.check_blocks(keys_of(3), tiers=False).any()
        ticket = engine.load_blocks(keys_of(3, 99, 5, 3), [20, 21, 22, 23])
        assert ticket.wait().tolist() == [True, False, True, True] and ticket.error is None
        assert ticket.nbytes == 3 * cache.layout.record_bytes
        assert_same(cache.memory(), cache.expected(poisoned, before, [(3, 20), (5, 22), (3, 23)]))
        assert engine.check_blocks(keys_of(3, 5), tiers=False).all()
        stats = engine.get_stats()
        assert stats.missed_blocks == 1 and stats.loaded_blocks == 3 and stats.tiers[0].promoted_blocks == 2
        nothing_is_held(engine)
    assert tiers[0].closed


def test_what_is_in_ram_does_not_wait_for_what_is_not(device: Device) -> None:
    cache, store = PagedCache.plain(device), MemoryStore()
    before = fill(cache, store)
    tiers = Tiers(store, read_timeout_s=10.0)
    with cache.engine(slots=6, tiers=tiers.config) as engine:
        save(engine, cache, keys_of(1), [1])
        poisoned = cache.randomize()
        tiers[0].plan = lambda operation: "hang" if operation == "get" else None
        ticket = engine.load_blocks(keys_of(1, 2), [20, 21])
        until(lambda: tiers[0].hung)
        until(lambda: not engine.get_stats().pinned_blocks)
        assert not ticket.done() and not ticket.mask.any() and ticket.nbytes == cache.layout.record_bytes
        assert_same(cache.memory(), cache.expected(poisoned, before, [(1, 20)]))
        tiers[0].gate.set()
        assert ticket.wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(1, 20), (2, 21)]))


def test_a_load_without_fetching_is_of_ram_alone(device: Device) -> None:
    cache, store = PagedCache.plain(device), MemoryStore()
    fill(cache, store)
    tiers = Tiers(store)
    with cache.engine(slots=6, tiers=tiers.config) as engine:
        assert not engine.load_blocks(keys_of(1, 2), [20, 21], fetch=False).wait().any()
        assert "get" not in tiers[0].calls and engine.get_stats().missed_blocks == 2


def test_the_second_part_waits_for_the_callers_stream() -> None:
    """What is on the stream when the load is called may still read the pages; what comes later waits for the load."""
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    before = fill(cache, store)
    with cache.engine(slots=6, tiers=Tiers(store).config) as engine:
        stream, may_go, seen = HostStream(), threading.Event(), []
        poisoned = cache.randomize()
        stream.enqueue(lambda: (may_go.wait(10), seen.append(cache.memory())))
        ticket = engine.load_blocks(keys_of(4), [20], stream=stream)
        until(lambda: ticket.nbytes)
        time.sleep(0.02)
        assert not ticket.done()
        may_go.set()
        ticket.add_to(stream)
        stream.enqueue(lambda: seen.append(cache.memory()))
        stream.synchronize()
        assert_same(seen[0], poisoned)
        assert_same(seen[1], cache.expected(poisoned, before, [(4, 20)]))
        assert ticket.wait().all()


def test_add_to_and_wait_layer_wait_for_what_is_not_issued_yet() -> None:
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    before = fill(cache, store)
    tiers = Tiers(store, read_timeout_s=5.0)
    with cache.engine(slots=6, tiers=tiers.config) as engine:
        poisoned = cache.randomize()
        tiers[0].plan = lambda operation: "hang" if operation == "get" else None
        ticket = engine.load_blocks(keys_of(4, 6), [20, 21], layerwise=True)
        until(lambda: tiers[0].hung)
        threading.Timer(0.05, tiers[0].gate.set).start()
        for layer in range(cache.layout.num_layers):
            ticket.wait_layer(layer)
        ticket.add_to(None)
        assert_same(cache.memory(), cache.expected(poisoned, before, [(4, 20), (6, 21)]))


def test_two_engines_share_a_store(device: Device) -> None:
    store = MemoryStore()
    one, other = PagedCache.plain(device), PagedCache.plain(device)
    tiers = Tiers(store), Tiers(store)
    with one.engine(slots=6, tiers=tiers[0].config) as a, other.engine(slots=6, tiers=tiers[1].config) as b:
        source = one.randomize()
        assert not b.check_blocks(keys_of(1, 2), timeout=5.0).any()
        save(a, one, keys_of(1, 2), [1, 2])
        assert a.flush(10)
        until(lambda: b.check_blocks(keys_of(1, 2)).all())
        target = other.randomize()
        assert b.load_blocks(keys_of(1, 2), [8, 9]).wait().all()
        assert_same(other.memory(), other.expected(target, source, [(1, 8), (2, 9)]))


RANK = {"rank": 1, "world_size": 2}
OTHERS: list[dict[str, Any]] = [{"model": "b"}, {"dtype": "fp8"}, {"salt": "tenant"}, RANK, {"lora": "l"}]


@pytest.mark.parametrize("about", OTHERS)
def test_namespaces_never_meet(about: dict[str, Any]) -> None:
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    fill(cache, store)
    with cache.engine(slots=6, tiers=Tiers(store).config, **about) as engine:
        assert not engine.check_blocks(keys_of(1, 2), timeout=5.0).any()
        assert not engine.load_blocks(keys_of(1, 2), [20, 21]).wait().any()


def test_another_layout_is_another_namespace() -> None:
    store = MemoryStore()
    fill(PagedCache.plain(HostDevice(), page=(16, 4, 32)), store)
    other = PagedCache.plain(HostDevice(), page=(16, 8, 16))  # as many bytes, in another order
    with other.engine(slots=6, tiers=Tiers(store).config) as engine:
        assert not engine.load_blocks(keys_of(1, 2), [20, 21]).wait().any()


def test_prefetch_brings_blocks_into_ram_once_for_all_who_ask(device: Device) -> None:
    cache, store = PagedCache.plain(device), MemoryStore()
    before = fill(cache, store)
    tiers = Tiers(store, read_timeout_s=5.0)
    with cache.engine(slots=24, tiers=tiers.config) as engine:  # of which a thread may hold three
        tiers[0].plan = lambda operation: "hang" if operation == "get" else None
        first = engine.prefetch(keys_of(1, 2, 3))
        until(lambda: tiers[0].hung)
        tiers[0].plan = lambda _: None
        second = engine.prefetch(keys_of(2, 3, 4, 99))
        load = engine.load_blocks(keys_of(3), [20])
        assert not first.done() and not first.wait(0.02).any() and not load.done()
        tiers[0].gate.set()
        assert first.wait().all() and second.wait().tolist() == [True, True, True, False]
        poisoned = cache.memory()
        assert load.wait().all() and first.done() and second.done()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(3, 20)]))
        assert engine.check_blocks(keys_of(1, 2, 3, 4), tiers=False).all()
        assert engine.get_stats().tiers[0].of("get").keys == 4, "each block was fetched once"
        nothing_is_held(engine)


def test_prefetch_without_tiers_tells_what_is_there(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        save(engine, cache, keys_of(1), [1])
        handle = engine.prefetch(keys_of(1, 2))
        assert handle.done() and handle.wait().tolist() == [True, False] and engine.flush(1)


def test_opaque_buffers_go_down_and_come_up() -> None:
    store, config = MemoryStore(), {"device": "host", "max_block_bytes": 5000, "cpu_pool_size_bytes": 4 * 8192}

    source = np.random.default_rng(2).integers(0, 256, 9000, np.uint8)
    with KVortexEngine.create(KVortexConfig(**config, tiers=Tiers(store).config)) as engine:  # type: ignore[arg-type]
        engine.save_blocks(keys_of(1, 2), [source.ctypes.data, source.ctypes.data + 5000], [5000, 4000]).wait()
    target = np.zeros(9000, np.uint8)
    with KVortexEngine.create(KVortexConfig(**config, tiers=Tiers(store).config)) as engine:  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="no layout: pass sizes"):
            engine.prefetch(keys_of(1))
        assert not engine.prefetch(keys_of(1), [4999]).wait().any(), "a record of another length is a miss"
        assert engine.prefetch(keys_of(1), [5000]).wait().all()
        assert engine.load_blocks(keys_of(1, 2), [target.ctypes.data, target.ctypes.data + 5000], [5000, 4000]).wait().all()
        nothing_is_held(engine)
    assert (target == source).all()


def test_a_block_goes_up_to_faster_tiers_and_not_back(device: Device) -> None:
    cache, fast, slow = PagedCache.plain(device), MemoryStore(), MemoryStore()
    fill(cache, slow)
    tiers = Tiers(fast, slow)
    with cache.engine(slots=6, tiers=tiers.config) as engine:
        assert engine.prefetch(keys_of(1, 2)).wait().all()
        assert engine.flush(10) and len(fast.objects) == 2
        assert "put" not in tiers[1].calls
        assert [entry.tier for entry in engine.get_stats().tiers] == ["memory", "memory-2"]
    assert set(fast.objects) < set(slow.objects)


def test_what_a_tier_has_is_not_offered_again(device: Device) -> None:
    cache, store = PagedCache.plain(device), MemoryStore()
    tiers = Tiers(store)
    with cache.engine(slots=4, tiers=tiers.config) as engine:
        for turn in range(3):
            for key in range(8):
                save(engine, cache, keys_of(key), [key])
                assert engine.flush(10)
            assert engine.get_stats().tiers[0].of("put").keys == 8, turn


@pytest.mark.parametrize("policy", ["lru", "lfu", "arc", "s3fifo"])
def test_writing_a_block_down_is_no_use_of_it(policy: str) -> None:
    """Under a policy that counts uses, what was only written down must not outlive what was asked for twice."""
    cache, evicted = PagedCache.plain(HostDevice()), []
    for tiers in ((), Tiers(MemoryStore()).config):
        with cache.engine(slots=6, eviction_policy=policy, tiers=tiers) as engine:
            for key in range(6):
                save(engine, cache, keys_of(key), [key])
                assert engine.flush(10)
            for key in (0, 1):
                assert engine.load_blocks(keys_of(key), [20]).wait().all()
            for key in (10, 11, 12):
                save(engine, cache, keys_of(key), [key])
                assert engine.flush(10)
            evicted.append(engine.check_blocks(keys_of(*range(13)), tiers=False).tolist())
    assert evicted[0] == evicted[1]


def test_write_back_waits_and_is_flushed_at_the_end(device: Device) -> None:
    cache, store = PagedCache.plain(device), MemoryStore()
    tiers = Tiers(store, mode="back", write_delay_s=1000.0)
    with cache.engine(slots=10, tiers=tiers.config) as engine:
        save(engine, cache, keys_of(1, 2, 3), [1, 2, 3])
        engine.get_stats()
        until(lambda: engine.get_stats().tiers[0].queue_blocks == 3)
        assert not store.objects
        save(engine, cache, keys_of(4, 5, 6), [4, 5, 6])  # more than half the pool waits now
        engine.get_stats()
        until(lambda: len(store.objects) >= 1)
        assert engine.get_stats().tiers[0].dropped == {}
    assert len(store.objects) == 6


def test_write_back_after_its_delay() -> None:
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    with cache.engine(slots=10, tiers=Tiers(store, mode="back", write_delay_s=0.05).config) as engine:
        save(engine, cache, keys_of(1), [1])
        engine.get_stats()
        until(lambda: store.objects)


def test_what_is_evicted_before_its_turn_is_counted() -> None:
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    tiers = Tiers(store, write_timeout_s=60.0)
    with cache.engine(slots=4, tiers=tiers.config) as engine:
        tiers[0].plan = lambda operation: "hang" if operation == "put" else None
        for key in range(20):
            save(engine, cache, keys_of(key), [key])
            if key == 0:  # which the tier is to have before others take its slot
                until(lambda: engine.get_stats() and tiers[0].hung)
        engine.get_stats()
        until(lambda: tiers[0].hung and engine.get_stats().tiers[0].queue_blocks == 20)
        tiers[0].plan = lambda _: None
        tiers[0].gate.set()
        assert engine.flush(10)
        stats = engine.get_stats().tiers[0]
        assert stats.dropped["evicted"] + stats.of("put").keys == 20 and stats.dropped["evicted"] >= 15
        assert stats.queue_blocks == stats.queue_bytes == 0


def test_what_waits_already_is_not_offered_again() -> None:
    cache, tiers = PagedCache.plain(HostDevice()), Tiers(MemoryStore(), write_timeout_s=60.0)
    with cache.engine(slots=4, tiers=tiers.config) as engine:
        tiers[0].plan = lambda operation: "hang" if operation == "put" else None
        for key in (0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5):  # each was evicted when it is saved again
            save(engine, cache, keys_of(key), [key])
        engine.get_stats()
        save(engine, cache, keys_of(6), [6])
        until(lambda: engine.get_stats().tiers[0].queue_blocks == 7)
        tiers[0].gate.set()
        assert engine.flush(10.0)


def test_a_full_queue_drops_and_never_blocks_a_save() -> None:
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    tiers = Tiers(store, queue_blocks=3, write_timeout_s=60.0)
    with cache.engine(slots=16, tiers=tiers.config) as engine:
        tiers[0].plan = lambda operation: "hang" if operation == "put" else None
        for key in range(10):
            save(engine, cache, keys_of(key), [key])
        engine.get_stats()
        until(lambda: engine.get_stats().tiers[0].dropped.get("queue_full") == 7)
        tiers[0].gate.set()
        assert engine.flush(10) and len(store.objects) == 3
        save(engine, cache, keys_of(9), [9])  # in RAM already: nothing is saved, and nothing offered
        assert engine.flush(10) and len(store.objects) == 3


@pytest.mark.parametrize("options", [{"admit_after": 2}, {"most_bytes": 4096}, {"least_bytes": 1 << 20}, {"mode": "read"}, {}])
def test_admission(options: dict[str, Any]) -> None:
    stored = 0 if options else 2
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    with cache.engine(slots=2, tiers=Tiers(store, **options).config) as engine:
        save(engine, cache, keys_of(1, 2), [1, 2])
        assert engine.flush(10) and len(store.objects) == stored
        save(engine, cache, keys_of(3, 4), [3, 4])
        save(engine, cache, keys_of(1, 2), [1, 2])
        assert engine.flush(10)
        if options == {"admit_after": 2}:
            assert len(store.objects) == 2 and engine.get_stats().tiers[0].dropped["admission"] == 4


def test_admission_to_ram_does_not_keep_a_promotion_out() -> None:
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    fill(cache, store)
    with cache.engine(slots=4, admit_after=3, tiers=Tiers(store).config) as engine:
        assert engine.prefetch(keys_of(1, 2)).wait().all()


def test_what_is_known_grows_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that others share may lose a key: that is true for as long as it is fresh, and then asked again."""
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    fill(cache, store)
    tiers = Tiers(store, fresh_s=0.2)
    with cache.engine(slots=4, tiers=tiers.config) as engine:
        assert engine.check_blocks(keys_of(1, 2, 77), timeout=5.0).tolist() == [True, True, False]
        asked = tiers[0].calls["contains"]
        for _ in range(20):
            assert engine.check_blocks(keys_of(1, 2)).all()
        assert tiers[0].calls["contains"] == asked, "no round trip for what is known"
        store.objects.clear()
        until(lambda: not engine.check_blocks(keys_of(1, 2)).any())
        assert not engine.check_blocks(keys_of(1), timeout=5.0).any()


def test_a_question_for_many_keys_is_one_round_trip() -> None:
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    fill(cache, store)
    tiers = Tiers(store)
    with cache.engine(slots=4, tiers=tiers.config) as engine:
        assert engine.check_blocks(keys_of(*range(40)), timeout=5.0).sum() == 12
        assert tiers[0].calls["contains"] == 1


def test_no_threads_without_tiers_and_none_left_after(device: Device) -> None:
    cache, store = PagedCache.plain(device), MemoryStore()

    def mine() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread.name.startswith(("kvortex-tiers", "kvortex-memory"))}

    with cache.engine() as engine:
        save(engine, cache, keys_of(1), [1])
        assert not mine()
    with cache.engine(tiers=Tiers(store, read_threads=3).config) as engine:
        assert len(mine()) == 1 + 3 + 1
    assert not mine()


def test_a_fork_leaves_the_tiers_to_the_parent() -> None:
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    with cache.engine(slots=6, tiers=Tiers(store).config) as engine:
        save(engine, cache, keys_of(1), [1])
        assert engine.flush(10)
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            code = 1
            try:
                engine.prefetch(keys_of(1))
            except EngineClosedError:
                engine.shutdown()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert engine.check_blocks(keys_of(1)).all() and engine.prefetch(keys_of(1)).wait().all()


def test_an_engine_that_cannot_be_made_closes_its_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, tiers = PagedCache.plain(HostDevice()), Tiers(MemoryStore())
    with pytest.raises(ConfigError, match="cpu_pool_size_bytes"):
        cache.engine(cpu_pool_size_bytes=1, tiers=tiers.config)
    assert tiers[0].closed
    tiers = Tiers(MemoryStore())
    monkeypatch.setattr("kvortex.parts.Flight", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.engine(tiers=tiers.config)
    assert tiers[0].closed and not [t for t in threading.enumerate() if t.name.startswith("kvortex-memory")]


def test_a_block_that_waits_is_written_as_long_as_it_is_by_then() -> None:
    """It was evicted while it waited, and saved anew with another length."""
    device, store = HostDevice(), MemoryStore()
    buffer, target = device.allocate(8192), device.allocate(8192)
    buffer.write(np.random.default_rng(1).integers(0, 256, 8192, np.uint8))
    config = {"device": "host", "max_block_bytes": 4096, "cpu_pool_size_bytes": 8 << 12}
    back = Tiers(store, mode="back", write_delay_s=600.0)
    with KVortexEngine.create(KVortexConfig(**config, tiers=back.config)) as engine:
        assert engine.save_blocks(keys_of(1), [buffer.address], [100]).wait().all()
        engine._index.drop(keys_of(1))
        assert engine.save_blocks(keys_of(1), [buffer.address], [3000]).wait().all()
        assert engine.flush(10)
    with KVortexEngine.create(KVortexConfig(**config, tiers=Tiers(store).config)) as engine:
        assert engine.load_blocks(keys_of(1), [target.address], [3000]).wait().all()
        assert (target.read(0, 3000) == buffer.read(0, 3000)).all()


def test_a_block_that_came_with_another_length_meanwhile_is_a_miss() -> None:
    device, tiers = HostDevice(), Tiers(MemoryStore(), read_timeout_s=5.0)
    buffer = device.allocate(4096)
    config = KVortexConfig(device="host", max_block_bytes=4096, cpu_pool_size_bytes=8 << 12, tiers=tiers.config)
    with KVortexEngine.create(config) as engine:
        tiers[0].plan = lambda operation: "hang" if operation == "contains" else None
        ticket = engine.load_blocks(keys_of(1), [buffer.address], [100])
        until(lambda: tiers[0].hung)
        assert engine.save_blocks(keys_of(1), [buffer.address], [200]).wait().all()
        tiers[0].gate.set()
        assert not ticket.wait().any() and ticket.error is None and engine.get_stats().missed_blocks == 1
        nothing_is_held(engine)
