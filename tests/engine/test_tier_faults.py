"""Tiers that are dead, hang, are slow or damage what they keep: loads miss, saves go on, and nothing stays held."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from typing import Any

import numpy as np
import pytest

from kvortex import parts as parts_module
from kvortex.devices import HostDevice
from kvortex.errors import ArgumentError, PoolFullError, TransferTimeoutError
from kvortex.tiers.memory import MemoryStore
from perf.faulty import RECORD_FAULTS
from tests.engine.tiered import Tiers, nothing_is_held, save, until
from tests.pages import PagedCache, assert_same, keys_of


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that hang are found out soon."""
    monkeypatch.setattr("kvortex.tiers.guarded._GRACE_S", 0.05)


def filled(store: MemoryStore, blocks: int = 12) -> tuple[PagedCache, list[Any]]:
    cache = PagedCache.plain(HostDevice())
    before = cache.randomize()
    with cache.engine(slots=16, tiers=Tiers(store).config) as engine:
        save(engine, cache, keys_of(*range(blocks)), np.arange(blocks))
    assert len(store.objects) == blocks
    return cache, before


def threads_of_tiers(*others: str) -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("kvortex-tiers", "kvortex-memory", *others))]


@pytest.mark.parametrize("fault", ["raise", "failed", "timeout", "nonsense"])
def test_a_dead_tier_opens_its_breaker_and_comes_back(fault: str) -> None:
    store = MemoryStore()
    cache, _ = filled(store)
    tiers = Tiers(store, breaker={"failures": 3, "pause_s": 0.05})
    with cache.engine(slots=8, tiers=tiers.config) as engine:
        tiers[0].plan = lambda _: fault
        for at in range(3):
            assert not engine.prefetch(keys_of(at)).wait().any()
            time.sleep(0.06)  # as long as nothing is asked again
        until(lambda: engine.get_stats().tiers[0].breaker != "closed")
        stats = engine.get_stats().tiers[0]
        assert stats.breaker_trips == 1 and stats.breaker_reason and sum(stats.errors.values()) >= 3
        until(lambda: tiers[0].calls.get("probe"))
        calls = {name: count for name, count in tiers[0].calls.items() if name != "probe"}
        assert not engine.check_blocks(keys_of(1, 2), timeout=1.0).any()
        assert engine.load_blocks(keys_of(1, 2), [20, 21]).wait().tolist() == [False, False]
        assert engine.prefetch(keys_of(1, 2)).wait().tolist() == [False, False]
        save(engine, cache, keys_of(50), [3])
        assert engine.flush(1.0)
        assert {name: count for name, count in tiers[0].calls.items() if name != "probe"} == calls, "nobody calls it"
        assert engine.get_stats().tiers[0].dropped["breaker"] == 1
        tiers[0].plan = lambda _: None
        until(lambda: engine.get_stats().tiers[0].breaker == "closed")
        assert engine.prefetch(keys_of(1, 2)).wait().all()
        save(engine, cache, keys_of(51), [4])
        assert engine.flush(5.0) and len(store.objects) == 13
        nothing_is_held(engine)


def test_a_tier_that_hangs_holds_nobody_up() -> None:
    store = MemoryStore()
    cache, before = filled(store)
    tiers = Tiers(store, breaker={"failures": 100, "pause_s": 0.05}, read_threads=2)
    with cache.engine(slots=16, tiers=tiers.config) as engine:
        tiers[0].plan = lambda operation: "hang" if operation in ("get", "put") else None
        poisoned = cache.randomize()
        began = time.monotonic()
        loads = [engine.load_blocks(keys_of(at), [20 + at]) for at in range(3)]
        save(engine, cache, keys_of(70, 71), [10, 11])
        for load in loads:
            assert not load.wait().any() and load.error is None
        assert time.monotonic() - began < 2.0, "two calls' time at most"
        assert_same(cache.memory(), poisoned)
        assert tiers[0].hung == 3  # two readers and the writer
        stats = engine.get_stats()
        assert stats.reserved_blocks == 2, "slots that the tier may still be writing to are not given to others"
        assert stats.tiers[0].breaker != "closed" and "has not come back" in stats.tiers[0].breaker_reason
        assert stats.tiers[0].errors["Overdue"] == 3
        for turn in range(3):  # saves have the rest of the pool
            save(engine, cache, keys_of(*range(100 + 10 * turn, 110 + 10 * turn)), np.arange(10))
        time.sleep(0.2)
        assert "probe" not in tiers[0].calls, "it is not probed before its calls have come back"
        tiers[0].plan = lambda _: None
        tiers[0].gate.set()
        nothing_is_held(engine)
        until(lambda: engine.get_stats().tiers[0].breaker == "closed")
        poisoned = cache.memory()
        assert engine.load_blocks(keys_of(0, 1, 2), [20, 21, 22]).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(0, 20), (1, 21), (2, 22)]))


def test_a_question_that_hangs_is_noticed() -> None:
    store = MemoryStore()
    cache, _ = filled(store)
    tiers = Tiers(store, breaker={"pause_s": 60.0})
    with cache.engine(slots=8, tiers=tiers.config) as engine:
        tiers[0].plan = lambda _: "hang"
        began = time.monotonic()
        assert not engine.check_blocks(keys_of(1)).any() and time.monotonic() - began < 3.0
        until(lambda: engine.get_stats().tiers[0].breaker != "closed")
        tiers[0].gate.set()


def test_a_tier_behind_one_that_hangs_serves_still() -> None:
    first, second = MemoryStore(), MemoryStore()
    cache, before = filled(second)
    tiers = Tiers(first, second, breaker={"pause_s": 30.0})
    with cache.engine(slots=16, tiers=tiers.config) as engine:
        tiers[0].plan = lambda _: "hang"
        began = time.monotonic()
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(4, 5), [20, 21]).wait().all()
        assert time.monotonic() - began < 3.0
        assert_same(cache.memory(), cache.expected(poisoned, before, [(4, 20), (5, 21)]))
        assert engine.load_blocks(keys_of(6, 7), [22, 23]).wait().all()
        tiers[0].gate.set()


def test_a_slow_tier_is_a_miss_at_the_deadline_of_who_waits() -> None:
    store = MemoryStore()
    cache, _ = filled(store)
    tiers = Tiers(store, read_timeout_s=5.0)
    with cache.engine(slots=16, tiers=tiers.config) as engine:
        tiers[0].slow_s, tiers[0].plan = 1.0, lambda operation: "late" if operation == "get" else None
        began = time.monotonic()
        handle = engine.prefetch(keys_of(1), timeout=0.05)
        assert not handle.wait().any() and 0.04 < time.monotonic() - began < 0.9
        until(lambda: handle.done())
        assert not handle.mask.any() and engine.get_stats().reserved_blocks == 1
        until(lambda: engine.check_blocks(keys_of(1), tiers=False).all())
        nothing_is_held(engine)


def test_a_call_that_writes_into_slots_after_all_have_given_up_hurts_nobody() -> None:
    """The slots stay reserved until the call comes back, so that what it writes lies in nobody's record."""
    store = MemoryStore()
    cache, before = filled(store)
    tiers = Tiers(store)
    with cache.engine(slots=8, tiers=tiers.config) as engine:
        tiers[0].plan = lambda operation: "hang" if operation == "get" else None
        assert not engine.load_blocks(keys_of(1), [20]).wait().any()
        save(engine, cache, keys_of(*range(100, 107)), np.arange(7))
        tiers[0].plan = lambda _: None
        tiers[0].gate.set()
        nothing_is_held(engine)
        poisoned = cache.memory()
        assert engine.load_blocks(keys_of(*range(100, 107)), np.arange(12, 19), fetch=False).wait().sum() >= 6
        loaded = engine.load_blocks(keys_of(1), [20])
        if loaded.wait().all():
            assert_same(cache.memory(), cache.expected(cache.memory(), before, [(1, 20)]))
        for at in range(7):
            if engine.check_blocks(keys_of(100 + at), tiers=False).all():
                assert_same(cache.memory(), cache.expected(cache.memory(), poisoned, [(at, 12 + at)]))


@pytest.mark.parametrize("fault", RECORD_FAULTS)
def test_a_damaged_record_is_a_miss(fault: str) -> None:
    store = MemoryStore()
    cache, before = filled(store)
    tiers = Tiers(store, absent_s=0.001)
    with cache.engine(slots=16, tiers=tiers.config) as engine:
        tiers[0].plan = lambda operation: fault if operation == "get" else None
        poisoned = cache.randomize()
        ticket = engine.load_blocks(keys_of(3), [20])
        assert not ticket.wait().any() and ticket.error is None
        assert_same(cache.memory(), poisoned)
        stats = engine.get_stats().tiers[0]
        assert stats.breaker == "closed" and stats.corrupt == (fault in ("flip", "longer", "torn"))
        tiers[0].plan = lambda _: None
        assert engine.load_blocks(keys_of(4), [21]).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(4, 21)]))
        nothing_is_held(engine)


def test_a_record_that_was_damaged_is_written_again() -> None:
    store = MemoryStore()
    cache, before = filled(store)
    tiers = Tiers(store, absent_s=0.001)
    with cache.engine(slots=16, tiers=tiers.config) as engine:
        tiers[0].plan = lambda operation: "flip" if operation == "get" else None
        assert not engine.prefetch(keys_of(3)).wait().any()
        tiers[0].plan = lambda _: None
        cache.tensors[0].buffer.write(before[0])
        cache.tensors[1].buffer.write(before[1])
        save(engine, cache, keys_of(3), [3])
        assert engine.flush(5.0)
    poisoned = cache.randomize()
    with cache.engine(slots=16, tiers=Tiers(store).config) as engine:
        assert engine.load_blocks(keys_of(3), [20]).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(3, 20)]))


def test_a_full_pool_makes_promotions_misses() -> None:
    from kvortex.devices import HostStream

    store = MemoryStore()
    cache, _ = filled(store)
    with cache.engine(slots=2, tiers=Tiers(store).config) as engine:
        stream, may_go = HostStream(), threading.Event()
        stream.enqueue(lambda: may_go.wait(10))
        running = engine.save_blocks(keys_of(60, 61), [1, 2], stream=stream)  # all slots are reserved
        assert not engine.prefetch(keys_of(1, 2)).wait().any()
        assert engine.get_stats().tiers[0].dropped["pool_full"] == 2
        may_go.set()
        assert running.wait().all()
        nothing_is_held(engine)


def test_a_save_of_the_whole_pool_waits_for_what_a_tier_has_but_not_for_one_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvortex.tiers.cascade._PATIENCE_S", 5.0)
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    tiers = Tiers(store, write_timeout_s=0.05, breaker={"pause_s": 60.0})
    with cache.engine(slots=4, tiers=tiers.config) as engine:
        tiers[0].slow_s, tiers[0].plan = 0.02, lambda operation: "slow" if operation == "put" else None
        for turn in range(8):
            keys = keys_of(*range(10 * turn, 10 * turn + 4))
            assert engine.save_blocks(keys, np.arange(4)).wait().all()
            engine.get_stats()
            time.sleep(0.005)  # the tier has begun to write
        assert engine.flush(5.0)
        tiers[0].plan = lambda operation: "hang" if operation == "put" else None
        save(engine, cache, keys_of(100), [1])
        engine.get_stats()
        until(lambda: engine.get_stats().tiers[0].breaker != "closed")
        began = time.monotonic()
        with pytest.raises(PoolFullError, match="1 are pinned"):
            engine.save_blocks(keys_of(110, 111, 112, 113), np.arange(4))
        assert time.monotonic() - began < 5
        save(engine, cache, keys_of(110, 111, 112), np.arange(3))
        tiers[0].gate.set()
        nothing_is_held(engine)


@pytest.mark.parametrize("operation", ["get", "put", "contains"])
def test_shutdown_with_a_tier_that_hangs_keeps_its_deadline_and_the_memory(operation: str) -> None:
    store = MemoryStore()
    cache, _ = filled(store)
    tiers = Tiers(store)
    engine = cache.engine(slots=8, tiers=tiers.config)
    tiers[0].plan = lambda asked: "hang" if asked == operation else None
    engine.load_blocks(keys_of(1), [20])
    save(engine, cache, keys_of(80), [2])
    engine.get_stats()
    until(lambda: tiers[0].hung)
    began = time.monotonic()
    with pytest.raises(TransferTimeoutError, match="1 calls of tiers below RAM are still running"):
        engine.shutdown(0.5)
    assert 0.4 < time.monotonic() - began < 5
    view = engine._parts.arena.view(0)
    assert view.nbytes and int(view[0]) >= 0, "the tier may still be in there"
    assert not tiers[0].closed
    tiers[0].gate.set()
    engine.shutdown(5.0)
    assert tiers[0].closed and not threads_of_tiers()


def test_an_engine_that_is_dropped_flushes_in_the_background() -> None:
    store = MemoryStore()
    cache = PagedCache.plain(HostDevice())
    cache.randomize()
    engine = cache.engine(slots=8, tiers=Tiers(store, mode="back", write_delay_s=100.0).config)
    save(engine, cache, keys_of(1, 2), [1, 2])
    del engine
    gc.collect()
    until(lambda: len(store.objects) == 2)
    until(lambda: not threads_of_tiers("kvortex-dispose"))


def test_a_dropped_engine_whose_tier_hangs_keeps_its_memory() -> None:
    store = MemoryStore()
    cache, _ = filled(store)
    tiers = Tiers(store)
    engine = cache.engine(slots=8, tiers=tiers.config, transfer_timeout_s=0.5)
    tiers[0].plan = lambda operation: "hang" if operation == "get" else None
    engine.load_blocks(keys_of(1), [20])
    until(lambda: tiers[0].hung)
    parts = engine._parts
    del engine
    gc.collect()
    until(lambda: parts in parts_module._KEPT)
    assert int(parts.arena.view(0)[0]) >= 0
    tiers[0].gate.set()
    parts_module._KEPT.remove(parts)
    until(lambda: parts.end(5.0) == "")
    parts.dispose(1.0)


def test_a_tier_that_cannot_be_closed_does_not_hold_shutdown_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedCache.plain(HostDevice())
    tiers, may_go = Tiers(MemoryStore()), threading.Event()
    engine = cache.engine(slots=8, tiers=tiers.config)
    monkeypatch.setattr(tiers[0], "close", lambda: may_go.wait(10))
    with pytest.raises(TransferTimeoutError):
        engine.shutdown(0.2)
    may_go.set()
    engine.shutdown(5.0)


def test_a_probe_that_finds_no_thread_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else would end it, and the breaker would wait for it for ever."""
    cache, tiers = PagedCache.plain(HostDevice()), Tiers(MemoryStore(), breaker={"pause_s": 0.05})
    start, refused = threading.Thread.start, []

    def refuse_once(thread: threading.Thread) -> None:
        if "probe" in thread.name and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    with cache.engine(tiers=tiers.config) as engine:
        monkeypatch.setattr(threading.Thread, "start", refuse_once)
        line = engine._cascade.lines[0]
        line.breaker.trip("as a test wants it")
        engine._cascade._wake()
        until(lambda: line.breaker.closed)
        assert refused and "can't start new thread" in line.breaker.reason


def test_threads_that_cannot_be_had_leave_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, tiers = PagedCache.plain(HostDevice()), Tiers(MemoryStore(), MemoryStore())
    start, before = threading.Thread.start, threading.active_count()

    def refuse(thread: threading.Thread) -> None:
        if "-write-" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        cache.engine(tiers=tiers.config)
    until(lambda: threading.active_count() == before)
    assert tiers[0].closed and tiers[1].closed


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", True])
def test_a_wait_for_a_prefetch_takes_seconds(timeout: Any) -> None:
    with PagedCache.plain(HostDevice()).engine(tiers=Tiers(MemoryStore()).config) as engine, pytest.raises(ArgumentError):
        engine.prefetch(keys_of(1)).wait(timeout)


def test_what_was_damaged_in_ram_before_it_was_written_never_comes_back() -> None:
    """A digest made when the block is written would vouch for the damage: it is that of the save."""
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    before = cache.randomize()
    with cache.engine(slots=8, tiers=Tiers(store, mode="back", write_delay_s=600.0).config) as engine:
        save(engine, cache, keys_of(1, 2), [1, 2])
        slot = np.full(1, -1, np.int64)
        engine._index.release(engine._index.acquire(keys_of(1), taken=slot))
        at = engine._parts.arena.address + int(slot[0]) * engine._parts.arena.slot_bytes
        ctypes.c_uint8.from_address(at + 5).value ^= 4
        assert engine.flush(10)
    poisoned = cache.randomize()
    with cache.engine(slots=8, tiers=Tiers(store).config) as engine:
        assert engine.load_blocks(keys_of(1, 2), [20, 21]).wait().tolist() == [False, True]
        assert engine.get_stats().tiers[0].corrupt == 1
        assert_same(cache.memory(), cache.expected(poisoned, before, [(2, 21)]))


def test_shutdown_ends_loads_that_wait_for_tiers_at_once() -> None:
    cache, tiers = PagedCache.plain(HostDevice()), Tiers(MemoryStore(), read_timeout_s=30.0)
    engine = cache.engine(tiers=tiers.config)
    tiers[0].plan = lambda operation: "hang" if operation == "contains" else None
    ticket = engine.load_blocks(keys_of(1), [2])
    until(lambda: tiers[0].hung)
    ending = threading.Thread(target=engine.shutdown, args=(20.0,))
    ending.start()
    try:
        until(ticket.done, 5.0)
        assert not ticket.mask.any() and ticket.error is None
    finally:
        tiers[0].gate.set()
        ending.join(20)
    assert not ending.is_alive() and tiers[0].closed


def test_while_all_breakers_are_open_calls_do_nothing_for_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither key sets nor the keeper are asked for anything, and what is not stored is counted."""
    cache = PagedCache.plain(HostDevice())
    cache.randomize()
    with cache.engine(tiers=Tiers(MemoryStore(), MemoryStore(), breaker={"pause_s": 60.0}).config) as engine:
        cascade = engine._cascade
        assert cascade is not None and cascade.is_awake()
        cascade.lines[0].breaker.trip("as a test wants it")
        assert cascade.is_awake()
        cascade.lines[1].breaker.trip("as a test wants it")
        assert not cascade.is_awake()
        asked = list[str]()
        with monkeypatch.context() as patch:
            for name in ("check", "may_have", "submit", "_offered"):
                patch.setattr(cascade, name, lambda *_, name=name: asked.append(name))
            save(engine, cache, keys_of(1, 2), [1, 2])
            assert engine.check_blocks(keys_of(1, 9)).tolist() == [True, False]
            assert engine.load_blocks(keys_of(2, 9), [3, 4]).wait().tolist() == [True, False]
            assert engine.flush(5.0)
        assert not asked
        assert [stats.dropped for stats in engine.get_stats().tiers] == [{"breaker": 2}] * 2
