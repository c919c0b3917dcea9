"""An engine works with the first part of its pool while the rest is being made."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvortex import KVortexEngine, PoolFullError, PoolTimeoutError
from kvortex.devices import Device
from kvortex.errors import DeviceError
from kvortex.memory import arena
from tests.pages import PagedCache, Tensor, assert_same, keys_of

SLOTS = 12


class Gate:
    """Lets the device register one segment, and others when it is opened, or none where it is broken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
        self.opened, self.broken, self._first = threading.Event(), False, True
        pin = type(device).pin

        def gated(other: Device, address: int, nbytes: int) -> None:
            first, self._first = self._first, False
            if not first:
                assert self.opened.wait(20)
                if self.broken:
                    raise DeviceError("no more of it")
            pin(other, address, nbytes)

        monkeypatch.setattr(type(device), "pin", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, device: Device) -> Iterator[Gate]:
    monkeypatch.setattr(arena, "SEGMENT_BYTES", 3 * 4096)
    made = Gate(monkeypatch, device)
    yield made
    made.opened.set()


def engine_of(device: Device) -> tuple[PagedCache, KVortexEngine]:
    cache = PagedCache(device, [Tensor(device, (2, SLOTS, 5, 60)) for _ in range(3)], 1)
    return cache, cache.engine(slots=SLOTS)


def test_it_works_at_once_and_grows(gate: Gate, device: Device) -> None:
    cache, engine = engine_of(device)
    with engine:
        before = cache.randomize()
        assert engine.get_stats().capacity_blocks == 3
        assert engine.save_blocks(keys_of(0, 1, 2), [0, 1, 2]).wait().all()
        assert engine.save_blocks(keys_of(3), [3]).wait().all() and engine.get_stats().evictions == 1
        with pytest.raises(PoolTimeoutError, match="3 of 12 slots are ready after 0.02 seconds"):
            engine.wait_ready(0.02)
        gate.opened.set()
        assert engine.wait_ready() == SLOTS == engine.get_stats().capacity_blocks
        assert engine.save_blocks(keys_of(*range(4, 12)), np.arange(4, 12)).wait().all()
        assert engine.get_stats().evictions == 1
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(3, 11), [0, 1]).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(3, 0), (11, 1)]))


def test_a_save_that_needs_more_waits_for_it(gate: Gate, device: Device) -> None:
    _, engine = engine_of(device)
    with engine:
        ended: list[bool] = []
        saver = threading.Thread(
            target=lambda: ended.append(bool(engine.save_blocks(keys_of(*range(10)), np.arange(10)).wait().all()))
        )
        saver.start()
        saver.join(0.05)
        assert not ended
        gate.opened.set()
        saver.join(20)
        assert ended == [True] and engine.get_stats().evictions == 0


def test_a_pool_that_stays_small_says_so(gate: Gate, device: Device) -> None:
    gate.broken = True
    _, engine = engine_of(device)
    with engine:
        gate.opened.set()
        assert engine.wait_ready(20) == 3
        assert engine.notes[-1] == "the pool has 3 of 12 slots: no more of it"
        with pytest.raises(PoolFullError, match="4 slots asked for: 3 of 3 are free"):
            engine.save_blocks(keys_of(*range(4)), np.arange(4))
        assert engine.save_blocks(keys_of(*range(3)), np.arange(3)).wait().all()


@pytest.mark.parametrize("how", ["shutdown", "dropped"])
def test_an_engine_that_ends_meanwhile(gate: Gate, device: Device, how: str) -> None:
    _, engine = engine_of(device)
    gate.opened.set()
    if how == "shutdown":
        engine.shutdown()
    del engine
    assert not [t for t in threading.enumerate() if t.name in ("kvortex-fill", "kvortex-arena") and not t.daemon]
