"""An interrupt at any line of a call, with tiers below: no pin, no slot and no thread is lost, and no wrong byte comes."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

from kvortex.devices import HostDevice
from kvortex.tiers.memory import MemoryStore
from tests.engine.test_interrupts import Place, Trap
from tests.engine.tiered import Tiers, nothing_is_held, save
from tests.pages import PagedCache, assert_same, keys_of

CALLS: dict[str, Callable[[Any], Any]] = {
    "load": lambda engine: engine.load_blocks(keys_of(1, 2, 99), [20, 21, 22]),
    "prefetch": lambda engine: engine.prefetch(keys_of(1, 2)),
    "check": lambda engine: engine.check_blocks(keys_of(1, 2, 98)),
    "save": lambda engine: engine.save_blocks(keys_of(5, 6), [5, 6]),
}
LONG_CALLS: dict[str, Callable[[Any], Any]] = {
    "load and wait": lambda engine: engine.load_blocks(keys_of(1, 2), [20, 21]).wait(),
    "load and add": lambda engine: engine.load_blocks(keys_of(1, 2), [20, 21]).add_to(None),
    "save, wait and flush": lambda engine: (engine.save_blocks(keys_of(5, 6), [5, 6]).wait(), engine.flush(5.0)),
    "prefetch and wait": lambda engine: engine.prefetch(keys_of(1, 2)).wait(),
}


class LeavingLocks:
    """Keeps a trap from springing where a ``with`` is left, before its lock is released. Python tells a tracer of that line,
    but looks for signals only where calls end and loops turn back, so none is taken there. The engine alone would never
    notice such a lock, which its own thread may take again; threads of tiers would wait for it for ever."""

    been: dict[int, set[int]]

    def enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.__dict__.setdefault("been", {})[id(frame)] = set()  # a frame itself would be kept alive
        return super().enter(frame, event, argument)  # type: ignore[misc]

    def step(self, frame: FrameType, event: str, argument: Any) -> Any:
        seen = self.been.setdefault(id(frame), set())
        line = frame.f_lineno
        if event == "line" and line in seen and linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("with "):
            return self.step
        seen.add(line)
        return super().step(frame, event, argument)  # type: ignore[misc]


class AnyLine(LeavingLocks, Trap):
    """Springs at the n-th line."""


class AnyPlace(LeavingLocks, Place):
    """Springs where this thread first comes by a line."""


class Scene:
    """Blocks 1 to 4 in a store; each interrupted call has an engine of its own above that."""

    def __init__(self) -> None:
        self.cache, self.store = PagedCache.plain(HostDevice()), MemoryStore()
        self.before = self.cache.randomize()
        with self.cache.engine(tiers=Tiers(self.store).config) as engine:
            save(engine, self.cache, keys_of(1, 2, 3, 4), [1, 2, 3, 4])

    def interrupted(self, call: Callable[[Any], Any], trap: Trap) -> bool:
        """Whether the trap was sprung in a call, after which everything must be as it should."""
        cache = self.cache
        for tensor, old in zip(cache.tensors, self.before, strict=True):
            tensor.buffer.write(old)
        with cache.engine(slots=8, tiers=Tiers(self.store).config, transfer_timeout_s=5.0) as engine:
            trap.run(lambda: call(engine))
            if not trap.sprung:
                return False
            nothing_is_held(engine)
            assert engine.save_blocks(keys_of(5, 6), [5, 6]).wait().all(), trap.sprung
            assert engine.load_blocks(keys_of(1, 2, 5, 6), [10, 11, 12, 13]).wait().all(), trap.sprung
            for tensor, old, new in zip(cache.tensors, self.before, cache.memory(), strict=True):
                seen, wanted = tensor.view(new)[:, [10, 11, 12, 13]], tensor.view(old)[:, [1, 2, 5, 6]]
                np.testing.assert_array_equal(seen, wanted, err_msg=trap.sprung)
            assert engine.flush(5.0) and not engine.notes, trap.sprung
            nothing_is_held(engine)
        return True


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_line(name: str) -> None:
    scene, line = Scene(), 1
    while scene.interrupted(CALLS[name], AnyLine(line)):
        line += 1
    assert line > 10


@pytest.mark.parametrize("name", LONG_CALLS)
def test_an_interrupt_in_any_place_of_a_long_wait(name: str) -> None:
    scene, every = Scene(), AnyPlace(None)
    assert not scene.interrupted(LONG_CALLS[name], every)
    places = [place for place in every.seen if scene.interrupted(LONG_CALLS[name], AnyPlace(place))]
    assert len(places) > 20


def test_what_was_interrupted_between_its_commit_and_its_offer_is_in_ram_alone() -> None:
    """An offer may be lost to an interrupt; a pin may not, since an offer takes none."""
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    before = cache.randomize()
    with cache.engine(tiers=Tiers(store).config) as engine:
        offer = engine._cascade.offer  # type: ignore[union-attr]

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        ticket = engine.save_blocks(keys_of(1), [1])
        engine._flight._saved = interrupt
        with pytest.raises(KeyboardInterrupt):
            ticket.wait()
        engine._flight._saved = offer
        assert ticket.wait().all() and engine.check_blocks(keys_of(1), tiers=False).all()
        nothing_is_held(engine)
        assert engine.load_blocks(keys_of(1), np.array([9])).wait().all()
        assert_same(cache.memory(), cache.expected(before, before, [(1, 9)]))
