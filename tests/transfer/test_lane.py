"""Staging buffers that pass from one route to another: all of the first transfer before any of the second."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from kvortex.devices.cuda import CudaDevice
from kvortex.errors import TransferError
from kvortex.transfer.routes import Route
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.pages import PagedCache, Tensor, assert_same, keys_of
from tests.transfer.recorder import predecessors

WORK = {"launch", "to_host", "to_device"}
PAIRS = [(Route.RESIDENT, Route.STAGED), (Route.STAGED, Route.RESIDENT)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu(monkeypatch) as made:
        yield made


@pytest.fixture
def cache(gpu: FakeGpu) -> PagedCache:
    return PagedCache(CudaDevice(), [Tensor(CudaDevice(), (2, 40, 5, 60)) for _ in range(3)], 1)


def by_turns(monkeypatch: pytest.MonkeyPatch, routes: tuple[Route, ...]) -> None:
    order = itertools.chain(routes, itertools.repeat(routes[-1]))
    monkeypatch.setattr("kvortex.transfer.cuda.choose", lambda *_, **__: next(order))


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("routes", PAIRS)
def test_nothing_of_the_second_runs_before_the_end_of_the_first(
    gpu: FakeGpu, cache: PagedCache, monkeypatch: pytest.MonkeyPatch, routes: tuple[Route, Route], save: bool
) -> None:
    with cache.engine(slots=40, gpu_pool_size_bytes=8 * 8192, digests=False) as engine:
        if not save:
            engine.save_blocks(keys_of(*range(40)), np.arange(40)).wait()
        by_turns(monkeypatch, routes)
        gpu.issued.calls.clear()
        halves = []
        for half in (0, 20):
            keys, blocks = keys_of(*range(half, half + 20)), np.arange(half, half + 20)
            (engine.save_blocks if save else engine.load_blocks)(keys, blocks).wait()
            halves.append(len(gpu.issued.calls))
        calls, before = gpu.issued.calls, predecessors(gpu.issued.calls)
        first, second = ({at for at in range(*span) if calls[at].name in WORK} for span in ((0, halves[0]), tuple(halves)))
        # The rows that a resident kernel reads are sent ahead of everything, to memory of their own.
        assert len(first) >= 6 and all(first <= before[at] for at in second)


def test_transfers_of_one_route_overlap(gpu: FakeGpu, cache: PagedCache) -> None:
    with cache.engine(slots=40, gpu_pool_size_bytes=8 * 8192, transfer_route="staged") as engine:
        engine.save_blocks(keys_of(0), [0]).wait()
        gpu.issued.calls.clear()
        engine.save_blocks(keys_of(*range(1, 5)), np.arange(1, 5)).wait()
        engine.save_blocks(keys_of(*range(5, 9)), np.arange(5, 9)).wait()
        calls, before = gpu.issued.calls, predecessors(gpu.issued.calls)
        launches = [at for at, call in enumerate(calls) if call.name == "launch"]
        assert len(launches) == 8 and before[launches[4]] & set(launches) == {launches[0]}, "only for the buffer that it needs"


@pytest.mark.parametrize("routes", PAIRS)
def test_a_driver_that_refuses_while_buffers_change_hands(
    gpu: FakeGpu, cache: PagedCache, monkeypatch: pytest.MonkeyPatch, routes: tuple[Route, Route]
) -> None:
    """Nothing was issued then, the transfer says why, and the next one begins with the handing over."""
    with cache.engine(slots=40, gpu_pool_size_bytes=8 * 8192) as engine:
        before = cache.randomize()
        by_turns(monkeypatch, routes)
        assert engine.save_blocks(keys_of(*range(20)), np.arange(20)).wait().all()
        streams = 4 + 1
        for at in range(1 + 2 * streams + 1 + streams):  # the context; joined; an event; which all wait for
            gpu.issued.calls.clear()
            gpu.issued.fails = {at: 2}
            ticket = engine.save_blocks(keys_of(100 + at), [30])
            assert not ticket.wait().any() and isinstance(ticket.error, TransferError)
            assert "could not be issued: CUDA_ERROR_OUT_OF_MEMORY" in str(ticket.error)
            assert not WORK & set(gpu.issued.names) and gpu.issued.names.count("push") == 1
            assert gpu.issued.names.count("pop") == (at > 0)
        gpu.issued.fails = {}
        assert engine.save_blocks(keys_of(*range(20, 40)), np.arange(20, 40)).wait().all()
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(*range(40)), np.arange(40)[::-1]).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(at, 39 - at) for at in range(40)]))
