"""Interrupts, and calls of a finaliser or a signal's handler, at any line of a transfer on a GPU that works late."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest

from kvortex import KVortexEngine
from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.cuda import CudaExecutor
from kvortex.transfer.executor import poll
from kvortex.transfer.layer_load import LayerLoad
from kvortex.transfer.routes import Route
from tests.engine.test_interrupts import Trap
from tests.fake_gpu import fake_gpu
from tests.late_gpu import LateGpu
from tests.pages import PagedCache, Tensor, assert_same, keys_of
from tests.transfer.profiles import shape

BLOCKS = 8


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateGpu]:
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    with fake_gpu(monkeypatch, LateGpu(1, patience=0)) as made:
        yield made


def engine_of(layers: int = 3) -> tuple[PagedCache, KVortexEngine]:
    device = CudaDevice()
    cache = PagedCache(device, [Tensor(device, (2, 2 * BLOCKS, 300), 1) for _ in range(layers)], 1)
    return cache, cache.engine(slots=4 * BLOCKS, gpu_pool_size_bytes=8 * 4096, beside_compute=False)


def by_turns(monkeypatch: pytest.MonkeyPatch, *routes: Route) -> None:
    order = itertools.cycle(routes)
    monkeypatch.setattr("kvortex.transfer.cuda.choose", lambda *_, **__: next(order))


def ended(engine: KVortexEngine, gpu: LateGpu) -> None:
    """Everything ends, and everything that was lent comes back."""
    gpu.patience = 12

    def nothing_held() -> bool:
        stats = engine.get_stats()
        return not stats.reserved_blocks and not stats.pinned_blocks

    assert poll(nothing_held, time.monotonic() + 5)
    gpu.finish()
    assert not gpu.left
    engine._index.check()
    gpu.patience = 0


class Enter(Trap):
    """Makes a call of its own in the place of an interrupt, at a line of what threads share of a GPU."""

    def __init__(self, line: int, call: Callable[[], Any]) -> None:
        super().__init__(line)
        self._call = call

    def enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        shared = frame.f_code.co_filename.endswith(("transfer/lane.py", "transfer/cuda_completion.py", "memory/ids.py"))
        return super().enter(frame, event, argument) if shared else None

    def step(self, frame: FrameType, event: str, argument: Any) -> Any:
        try:
            return super().step(frame, event, argument)
        except KeyboardInterrupt:
            self._call()
            return self.step


@pytest.mark.parametrize("first", [Route.STAGED, Route.RESIDENT])
@pytest.mark.parametrize("load", [False, True])
def test_a_transfer_in_the_middle_of_another(
    gpu: LateGpu, monkeypatch: pytest.MonkeyPatch, first: Route, load: bool
) -> None:
    """Both use the same staging buffers and streams, by another route, and with another number of CTAs."""
    cache, engine = engine_of()
    second = Route.RESIDENT if first is Route.STAGED else Route.STAGED
    half = np.arange(BLOCKS)
    with engine:
        if load:
            before = cache.randomize()
            gpu.patience = 12
            assert engine.save_blocks(keys_of(*range(2 * BLOCKS)), np.arange(2 * BLOCKS)).wait().all()
            gpu.patience = 0
        for turn in itertools.count(1):
            names = np.arange(2 * BLOCKS) if load else 100 * turn + np.arange(2 * BLOCKS)
            if not load:
                before = cache.randomize()
            poisoned = cache.randomize() if load else before
            executor, found = engine._executor, list[Any]()
            assert isinstance(executor, CudaExecutor)

            def call(at: np.ndarray, names: np.ndarray = names) -> None:
                found.append((engine.load_blocks if load else engine.save_blocks)(keys_of(*names[at].tolist()), at))  # noqa: B023

            def other() -> None:
                executor.resident_ctas = 3, 3  # noqa: B023
                call(half + BLOCKS)  # noqa: B023

            executor.resident_ctas = 1, 1
            by_turns(monkeypatch, first, second)
            trap = Enter(turn, other)
            trap.run(lambda: call(half))  # noqa: B023
            ended(engine, gpu)
            assert all(ticket.wait().all() for ticket in found) and len(found) == 1 + bool(trap.sprung), trap.sprung
            if not load:
                poisoned = cache.randomize()
                by_turns(monkeypatch, first)
                ticket = engine.load_blocks(keys_of(*names.tolist()), np.arange(2 * BLOCKS))
                ended(engine, gpu)
                mask = ticket.wait()
            else:
                mask = np.arange(2 * BLOCKS) < BLOCKS * len(found)
            assert mask.sum() == BLOCKS * len(found)
            assert_same(cache.memory(), cache.expected(poisoned, before, [(at, at) for at in np.flatnonzero(mask).tolist()]))
            if not trap.sprung:
                break
    assert turn > 30


@pytest.mark.parametrize("route", list(Route)[1:])
@pytest.mark.parametrize("kind", ["save", "load", "layers"])
def test_an_interrupt_at_any_line(gpu: LateGpu, monkeypatch: pytest.MonkeyPatch, route: Route, kind: str) -> None:
    """What had been issued goes on, and keeps its ids and events until it has ended; all of them come back."""
    cache, engine = engine_of()
    with engine:
        before = cache.randomize()
        by_turns(monkeypatch, route)
        gpu.patience = 12
        assert engine.save_blocks(keys_of(*range(BLOCKS)), np.arange(BLOCKS)).wait().all()
        gpu.patience = 0
        executor, lost = engine._executor, (0, 0)
        assert isinstance(executor, CudaExecutor) and executor._ids is not None

        def act(turn: int) -> None:
            if kind == "load":
                engine.load_blocks(keys_of(*range(BLOCKS)), BLOCKS + np.arange(BLOCKS))
                return
            keys = keys_of(*(1000 * turn + np.arange(BLOCKS)).tolist())
            ticket = engine.save_blocks(keys, np.arange(BLOCKS), layerwise=kind == "layers")
            for layer in ticket.missing_layers:
                ticket.save_layer(layer)

        for turn in itertools.count(1):
            trap = Trap(turn)
            trap.run(lambda: act(turn))  # noqa: B023
            ended(engine, gpu)
            if kind != "load":
                keys = keys_of(*(1000 * turn + np.arange(BLOCKS)).tolist())
                saved = engine.check_blocks(keys)
                assert saved.all() or not saved.any(), trap.sprung
                poisoned = cache.randomize()
                ticket = engine.load_blocks(keys, np.arange(BLOCKS))
                ended(engine, gpu)
                pairs = [(at, at) for at in range(BLOCKS)] if ticket.wait().all() else []
                assert saved.all() == bool(pairs)
                assert_same(cache.memory(), cache.expected(poisoned, before, pairs))
                for tensor, bytes_ in zip(cache.tensors, before, strict=True):
                    tensor.buffer.write(bytes_)
            events, ids = executor._events, executor._ids._free
            before_it, lost = lost, (len(events._all) - len(events._free), -sum(map(len, ids.values())))
            # One that is just being made cannot be known to anybody yet, and goes with the engine.
            assert lost[0] <= before_it[0] + 2 and lost[1] <= before_it[1] + 1, trap.sprung
            if not trap.sprung:
                break
        assert turn > 50


@pytest.mark.parametrize("route", [Route.STAGED, Route.RESIDENT])
@pytest.mark.parametrize("threaded", [False, True])
def test_an_interrupt_at_any_line_of_a_load_by_layers(
    gpu: LateGpu, monkeypatch: pytest.MonkeyPatch, route: Route, threaded: bool
) -> None:
    """Its first layers are on their way before the others are planned."""
    cache, engine = engine_of(layers=7)
    if threaded:
        monkeypatch.setattr("kvortex.transfer.lane._AT_ONCE", -1)
    blocks = np.arange(BLOCKS)
    with engine:
        before = cache.randomize()
        by_turns(monkeypatch, route)
        gpu.patience = 12
        assert engine.save_blocks(keys_of(*blocks), blocks).wait().all()
        gpu.patience = 0
        executor, lost = engine._executor, 0
        assert isinstance(executor, CudaExecutor)
        for turn in itertools.count(1, 3):
            trap = Trap(turn)
            trap.run(lambda: engine.load_blocks(keys_of(*blocks), BLOCKS + blocks, layerwise=True))
            ended(engine, gpu)
            if turn % 10 == 0 or not trap.sprung:
                poisoned = cache.randomize()
                ticket = engine.load_blocks(keys_of(*blocks), blocks, layerwise=True)
                assert isinstance(ticket._transfer.completion, LayerLoad)
                ended(engine, gpu)
                assert ticket.wait().all()
                assert_same(cache.memory(), cache.expected(poisoned, before, [(at, at) for at in range(BLOCKS)]))
            events = executor._events
            # Between making a part and keeping it an interrupt takes the part's events along: start, end, and one a group.
            assert len(events._all) - len(events._free) <= lost + 2 + 7, trap.sprung
            lost = len(events._all) - len(events._free)
            if not trap.sprung:
                break
        assert turn > 300 and lost < 60
