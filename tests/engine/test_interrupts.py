"""An interrupt at any line of the library: nothing stays taken, nothing is done twice, and no wrong byte is handed out."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

import kvortex
from kvortex import KVortexEngine
from kvortex.devices import HostDevice, HostStream
from kvortex.errors import PoolFullError
from kvortex.transfer import host
from kvortex.transfer.executor import poll
from kvortex.transfer.layers import Least
from tests.pages import PagedCache, assert_same, keys_of

LIBRARY = os.path.dirname(kvortex.__file__) + os.sep


def save_layers(engine: Any, *, end: str) -> None:
    """In two groups of one layer each."""
    ticket = engine.save_blocks(keys_of(5, 6), [5, 6], layerwise=True)
    ticket.save_layer(1)
    if end == "abort":
        ticket.abort()
        return
    ticket.save_layer(0)
    ticket.wait()


CALLS: dict[str, Callable[[Any, PagedCache], Any]] = {
    "save": lambda engine, _: engine.save_blocks(keys_of(5, 6), [5, 6]),
    "save of what is there": lambda engine, _: engine.save_blocks(keys_of(1, 2), [1, 2]),
    "load": lambda engine, _: engine.load_blocks(keys_of(1, 2, 9), [3, 4, 7]),
    "check": lambda engine, _: engine.check_blocks(keys_of(1)),
    "save and wait": lambda engine, _: engine.save_blocks(keys_of(5, 6), [5, 6]).wait(),
    "load and wait": lambda engine, _: engine.load_blocks(keys_of(1, 2), [3, 4]).wait(),
    "layer-wise save": lambda engine, _: engine.save_blocks(keys_of(5, 6), [5, 6], layerwise=True),
    "layers and wait": lambda engine, _: save_layers(engine, end="wait"),
    "layers and abort": lambda engine, _: save_layers(engine, end="abort"),
}


class Trap:
    """Raises KeyboardInterrupt at the n-th line that this thread executes in the library."""

    def __init__(self, line: int) -> None:
        self.left, self.sprung = line, ""

    def enter(self, frame: FrameType, event: str, _: Any) -> Any:
        return self.step if frame.f_code.co_filename.startswith(LIBRARY) else None

    def step(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and not self.sprung:
            self.left -= 1
            if self.left == 0:
                self.sprung = f"{os.path.relpath(frame.f_code.co_filename, LIBRARY)}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self.step

    def run(self, call: Callable[[], Any]) -> None:
        old = sys.gettrace()
        sys.settrace(self.enter)
        try:
            call()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(old)


class Place(Trap):
    """Raises KeyboardInterrupt where this thread comes by a line of the library, the first time or another; or, without one,
    notes all lines in order."""

    def __init__(self, place: str | None, visit: int = 1) -> None:
        super().__init__(visit)
        self.lines: list[str] = []
        self.waits_from: int | None = None
        self._place = place

    @property
    def seen(self) -> dict[str, None]:
        """Each line once."""
        return dict.fromkeys(self.lines)

    def step(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and not self.sprung:
            here = f"{os.path.relpath(frame.f_code.co_filename, LIBRARY)}:{frame.f_lineno}"
            if self.waits_from is None and frame.f_code.co_name == "wait":
                self.waits_from = len(self.lines)
            self.lines.append(here)
            self.left -= here == self._place
            if self._place and self.left == 0:
                self.sprung = here
                raise KeyboardInterrupt
        return self.step


def anywhere(interrupted: Callable[[Trap], bool]) -> None:
    """Springs at each line before a wait, by count, and where the wait comes by each of its lines for the first and the second
    time: how often it goes round is not the same from run to run, nor is what it finds there."""
    every = Place(None)
    assert not interrupted(every)
    before = every.lines[: every.waits_from]
    assert sum(interrupted(Trap(line)) for line in range(1, len(before) + 1)) > max(10, 0.9 * len(before))
    if every.waits_from is not None:
        visits = Counter(every.lines[every.waits_from :])
        again = [(place, before.count(place) + visit) for place in visits for visit in range(1, min(visits[place], 2) + 1)]
        assert sum(interrupted(Place(place, visit)) for place, visit in again) > 40


@pytest.fixture(autouse=True)
def a_group_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "LEAST", Least(1, 1, 1))


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_line(name: str) -> None:
    anywhere(lambda trap: interrupted(name, trap))


@pytest.mark.parametrize("name", ["save and wait", "load and wait", "layers and wait"])
def test_an_interrupt_in_any_place_of_a_long_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted lines are not the same ones from run to run when a wait goes round and round; places are."""
    copy = host.copy_paged

    def slow(*arguments: Any) -> None:
        time.sleep(1e-3)
        copy(*arguments)

    monkeypatch.setattr(host, "copy_paged", slow)
    every = Place(None)
    assert not interrupted(name, every)
    places = [place for place in every.seen if interrupted(name, Place(place))]
    assert len(places) > 100 and {place.split(":")[0] for place in places} >= {"flight.py", "engine.py", "transfer/ticket.py"}


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_whose_announcement_was_interrupted(layer: int) -> None:
    """It was announced, or can be again, or the save has failed; and nothing waits for ever."""
    outcomes, line = [], 1
    while True:
        cache = PagedCache.plain(HostDevice())
        with cache.engine(transfer_timeout_s=5.0) as engine:
            before = cache.randomize()
            ticket = engine.save_blocks(keys_of(5, 6), [5, 6], layerwise=True)
            trap = Trap(line)
            trap.run(lambda: ticket.save_layer(layer))  # noqa: B023
            if not trap.sprung:
                break
            announced = layer not in ticket.missing_layers
            ticket.done()
            for left in ticket.missing_layers:
                ticket.save_layer(left)
            saved = bool(ticket.wait().all())
            outcomes.append((announced, saved))
            assert saved == (ticket.error is None), trap.sprung
            assert engine.check_blocks(keys_of(5, 6)).tolist() == [saved] * 2 and not engine.get_stats().reserved_blocks
            if saved:
                poisoned = cache.randomize()
                assert engine.load_blocks(keys_of(5, 6), [7, 8]).wait().all()
                assert_same(cache.memory(), cache.expected(poisoned, before, [(5, 7), (6, 8)]))
        line += 1
    assert {(False, True), (True, False), (True, True)} == set(outcomes)


def nothing_is_taken(engine: KVortexEngine, trap: Trap) -> None:
    """No slot is reserved and no block pinned, as soon as what moves has moved."""

    def ended() -> bool:
        stats = engine.get_stats()
        return not stats.reserved_blocks and not stats.pinned_blocks

    assert poll(ended, time.monotonic() + 20), f"{trap.sprung}: {engine.get_stats()}"


def interrupted(name: str, trap: Trap) -> bool:
    """Whether the trap was sprung in a call, after which everything must be as it should."""
    cache = PagedCache.plain(HostDevice())
    with cache.engine(transfer_timeout_s=5.0) as engine:
        before = cache.randomize()
        assert engine.save_blocks(keys_of(1, 2), [1, 2]).wait().all()
        trap.run(lambda: CALLS[name](engine, cache))
        if not trap.sprung:
            return False
        nothing_is_taken(engine, trap)
        engine._index.check()
        found = engine.check_blocks(keys_of(5, 6))
        assert engine.save_blocks(keys_of(5, 6), [5, 6]).wait().all(), trap.sprung
        assert found.all() or not found.any()
        pages = np.array([1, 2, 5, 6])
        for tensor, old in zip(cache.tensors, before, strict=True):
            new = tensor.view(cache.memory()[cache.tensors.index(tensor)])
            np.testing.assert_array_equal(new[:, pages], tensor.view(old)[:, pages])
        assert engine.load_blocks(keys_of(1, 2, 5, 6), [10, 11, 12, 13]).wait().all(), trap.sprung
        for tensor, old in zip(cache.tensors, before, strict=True):
            new = tensor.view(cache.memory()[cache.tensors.index(tensor)])
            np.testing.assert_array_equal(new[:, [10, 11, 12, 13]], tensor.view(old)[:, pages], err_msg=trap.sprung)
    return True


@pytest.mark.slow
def test_a_thousand_real_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals at any moment, also inside compiled calls, where Python only hears of them when they return; and some of
    them while the one before is being dealt with."""
    cache = PagedCache.plain(HostDevice())
    pid, stop, rng = os.getpid(), threading.Event(), np.random.default_rng(3)
    shots, left = 0, 0

    def handle(*_: object) -> None:
        nonlocal shots, left
        if left:  # only the library is shot at: others have finalisers that do not bear it (llvmlite's abort)
            left -= 1
            shots += 1
            raise KeyboardInterrupt

    def shoot() -> None:
        gaps = np.random.default_rng(4)
        while not stop.is_set():
            time.sleep(float(gaps.uniform(0, 4e-4)))
            os.kill(pid, signal.SIGINT)

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # where a finaliser is hit, Python goes on
    shooter = threading.Thread(target=shoot)
    before = signal.signal(signal.SIGINT, handle)
    with cache.engine() as engine:
        cache.randomize()
        for _ in range(60):  # everything compiled is loaded by now: an interrupt in the middle of that aborts in LLVM
            keys = keys_of(*rng.permutation(60)[:4].tolist())
            engine.save_blocks(keys, np.arange(4)).wait()
            engine.load_blocks(keys, np.arange(4)).wait()
        none = np.empty(0, np.int64)
        engine._index.abort(none, once=np.zeros(1, np.uint8))
        engine._index.check()
        gc.collect()
        gc.disable()
        shooter.start()
        try:
            while shots < 1000:
                keys, pages = keys_of(*rng.permutation(60)[:4].tolist()), rng.permutation(24)[:4]
                try:
                    try:
                        left = int(rng.integers(1, 3))
                        ticket = engine.save_blocks(keys, pages, layerwise=bool(shots % 2))
                        for layer in ticket.missing_layers:
                            ticket.save_layer(layer)
                        engine.load_blocks(keys, pages).wait()
                        left = 0
                    except PoolFullError:
                        left = 0
                    except (KeyboardInterrupt, TypeError):  # NumPy hides some interrupts behind errors of its own
                        left = 0
                except KeyboardInterrupt:
                    left = 0
        finally:
            left = 0
            stop.set()
            shooter.join(20)
            signal.signal(signal.SIGINT, before)
            gc.enable()
        gc.collect()
        deadline = time.monotonic() + 10
        while (stats := engine.get_stats()).reserved_blocks or stats.pinned_blocks:
            assert time.monotonic() < deadline, stats
        engine._index.check()


def test_a_finaliser_may_ask_its_ticket_in_the_middle_of_anything() -> None:
    """The collector runs finalisers wherever something is allocated, also inside the engine."""
    cache = PagedCache.plain(HostDevice())

    class Request:
        def __init__(self, ticket: Any) -> None:
            self.ticket, self.itself = ticket, self

        def __del__(self) -> None:
            self.ticket.done()
            self.ticket.mask  # noqa: B018

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        with cache.engine() as engine:
            stream = HostStream()
            for turn in range(300):
                Request(engine.save_blocks(keys_of(turn % 40), [turn % 24], stream=stream))
                Request(engine.load_blocks(keys_of(turn % 7), [turn % 24], stream=stream))
                if turn % 8 == 0:
                    stream.synchronize()
    except PoolFullError:
        pass
    finally:
        gc.set_threshold(*threshold)
