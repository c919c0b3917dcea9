"""What reaches an engine's parts, and what they hold; each of these was once lost without a test that noticed."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvortex import KVLayout, KVortexConfig, KVortexEngine
from kvortex.devices import Device, HostDevice, HostStream
from kvortex.errors import TransferError
from kvortex.memory.arena import PinnedArena
from kvortex.transfer.executor import poll
from kvortex.transfer.host import HostExecutor
from tests.pages import PagedCache, keys_of


def test_ranks_find_nothing_of_each_other(device: Device) -> None:
    """The same tokens, model and layout: only the slice of the model differs."""
    cache, tokens = PagedCache.plain(device), np.arange(64)
    with cache.engine(rank=0, world_size=2) as first, cache.engine(rank=1, world_size=2) as second:
        assert (first.namespace.rank, second.namespace.rank) == (0, 1)
        for mine, other in ((first, second), (second, first)):
            keys = mine.block_keys(tokens)
            mine.save_blocks(keys, [0, 1, 2, 3]).wait()
            assert mine.check_blocks(keys).all()
            assert not mine.check_blocks(other.block_keys(tokens)).any()
            assert not mine.load_blocks(other.block_keys(tokens), [4, 5, 6, 7]).wait().any()


@pytest.mark.parametrize("wanted", [True, False])
def test_enable_numa_reaches_the_arena(device: Device, monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    asked: list[bool] = []

    def arena(*arguments: Any, numa: bool) -> PinnedArena:
        asked.append(numa)
        return PinnedArena(*arguments, numa=False)

    monkeypatch.setattr("kvortex.parts.PinnedArena", arena)
    PagedCache.plain(device).engine(enable_numa=wanted).shutdown()
    assert asked == [wanted]


@pytest.mark.parametrize("threads", [1, 5])
def test_as_many_threads_as_the_config_says(threads: int) -> None:
    with PagedCache.plain(HostDevice()).engine(num_transfer_streams=threads) as engine:
        executor = engine._executor
        assert isinstance(executor, HostExecutor) and len(executor._threads) == threads


def test_the_layouts_arrays_outlive_a_dropped_engines_last_transfer() -> None:
    class Array(np.ndarray):
        pass

    array = np.zeros((2, 8, 4096), np.uint8).view(Array)
    alive = weakref.ref(array)
    layout = KVLayout.from_arrays([array], block_axis=1)
    gate, stream = threading.Event(), HostStream()
    stream.enqueue(gate.wait)
    engine = KVortexEngine.create(KVortexConfig(cpu_pool_size_bytes=1 << 20, device="host", transfer_timeout_s=20.0), layout)
    engine.save_blocks(keys_of(1), [1], stream=stream)
    del array, layout, engine
    gc.collect()
    assert alive() is not None, "a thread is about to read it"
    gate.set()

    def gone() -> bool:
        gc.collect()
        return alive() is None

    assert poll(gone, time.monotonic() + 20)
    stream.close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_pending_save_that_ended_meanwhile(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Between the look into the index, where it was pending, and the look for the transfer, which is settled and gone."""

    def refuse(*_: object) -> None:
        raise MemoryError("planted")

    if fails:
        monkeypatch.setattr("kvortex.transfer.host.copy_paged", refuse)
    gate, stream = threading.Event(), HostStream()
    stream.enqueue(gate.wait)
    with PagedCache.plain(HostDevice()).engine() as engine:
        first = engine.save_blocks(keys_of(1, 2), [1, 2], stream=stream)
        reserve = engine._index.reserve

        def slow(*arguments: Any, **keywords: Any) -> Any:
            found = reserve(*arguments, **keywords)
            gate.set()
            assert first.wait(10).all() != fails
            return found

        monkeypatch.setattr(engine._index, "reserve", slow)
        second = engine.save_blocks(keys_of(2, 1), [3, 4])
        assert second.nbytes == 0 and second.wait(10).tolist() == [not fails] * 2
        assert engine.check_blocks(keys_of(1, 2)).tolist() == [not fails] * 2
    stream.close()


@pytest.mark.parametrize("step", ["commit", "release", "abort"])
def test_what_is_settled_twice_counts_once(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A finaliser may settle the same transfer in the middle of settling it, before and after the index's step."""
    with PagedCache.plain(HostDevice()).engine() as engine:
        engine.save_blocks(keys_of(1, 2), [1, 2]).wait()
        before = engine.get_stats()
        do, flight, depth = getattr(engine._index, step), engine._flight, [0]

        def twice(held: Any, *, once: Any) -> bool:
            depth[0] += 1
            if depth[0] == 1:
                flight.settle(transfer)
            mine = do(held, once=once)
            if depth[0] == 2:
                flight.settle(transfer)
            return bool(mine)

        monkeypatch.setattr(engine._index, step, twice)
        if step == "abort":
            monkeypatch.setattr("kvortex.transfer.host.copy_paged", lambda *_: 1 / 0)
        call: Callable[..., Any] = engine.load_blocks if step == "release" else engine.save_blocks
        ticket = call(keys_of(1, 2) if step == "release" else keys_of(3, 4), [3, 4])
        transfer = ticket._transfer
        assert ticket.wait().all() == (step != "abort") and depth[0] > 1
        stats = engine.get_stats()
        assert stats.saved_blocks - before.saved_blocks == 2 * (step == "commit")
        assert stats.loaded_blocks - before.loaded_blocks == 2 * (step == "release")
        assert stats.failed_blocks - before.failed_blocks == 2 * (step == "abort")
        assert (stats.reserved_blocks, stats.pinned_blocks) == (0, 0)
        assert isinstance(ticket.error, TransferError) == (step == "abort")


def test_seconds_of_a_transfer_are_plausible(device: Device) -> None:
    with PagedCache.plain(device).engine() as engine:
        for call in (engine.save_blocks, engine.load_blocks):
            began = time.perf_counter()
            ticket = call(keys_of(1, 2, 3), [1, 2, 3])
            ticket.wait()
            wall = time.perf_counter() - began
            assert 0 < ticket.seconds <= wall
        stats = engine.get_stats()
        assert stats.save_seconds > 0 and stats.load_seconds > 0
