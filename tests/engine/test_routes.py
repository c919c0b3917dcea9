"""Every route on every kind of layout: the same bytes, in the same order with the caller's stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.devices import Device
from kvortex.transfer.routes import Route
from tests.engine.test_order import Gate
from tests.pages import PagedCache, Tensor, assert_same, keys_of

ROUTES = ["staged", "resident", "strided", "batched", "mapped", "auto", "turns"]
SLOTS = 150


@pytest.fixture(autouse=True)
def turns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the route is "turns", each transfer takes another one, and buffers pass from hand to hand."""
    if request.node.callspec.params["route"] == "turns":
        order = itertools.cycle(
            [
                Route.RESIDENT,
                Route.STAGED,
                Route.STAGED,
                Route.MAPPED,
                Route.BATCHED,
                Route.RESIDENT,
                Route.STRIDED,
                Route.BATCHED,
            ]
        )
        monkeypatch.setattr("kvortex.transfer.cuda.choose", lambda *_, **__: next(order))


def options_of(route: str) -> dict[str, Any]:
    return {"slots": SLOTS, "gpu_pool_size_bytes": 8 * 65536, "transfer_route": "auto" if route == "turns" else route}


def cache_of(device: Device, kind: str) -> PagedCache:
    if kind == "even":
        return PagedCache(device, [Tensor(device, (16, 200, 4, 256))], 1)
    if kind == "odd":
        return PagedCache(device, [Tensor(device, (200, 333), 1, shift=1), Tensor(device, (2, 200, 77), 1, shift=3)], [0, 1])
    return PagedCache(device, [Tensor(device, (2, 200, 16, 72)) for _ in range(5)], 1)


@pytest.fixture
def gate(device: Device) -> Iterator[Gate]:
    made = Gate(device)
    yield made
    made.finish()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["even", "odd", "layers"])
def test_many_transfers_through_small_buffers(device: Device, kind: str, route: str) -> None:
    """Buffers of 64 KiB are filled again and again, in one transfer and from one transfer to the next."""
    cache = cache_of(device, kind)
    rng = np.random.default_rng(5)
    with cache.engine(**options_of(route)) as engine:
        for turn in range(6):
            before = cache.randomize()
            count = int(rng.integers(1, SLOTS + 1))
            source = rng.permutation(200)[:count]
            keys = keys_of(*(1000 * turn + np.arange(count)).tolist())
            assert engine.save_blocks(keys, source).wait().all()
            poisoned = cache.randomize()
            chosen = rng.permutation(count)[: int(rng.integers(1, count + 1))]
            target = rng.permutation(200)[: len(chosen)]
            ticket = engine.load_blocks(keys[chosen], target)
            assert ticket.wait().all() and ticket.error is None
            pairs = list(zip(source[chosen].tolist(), target.tolist(), strict=True))
            assert_same(cache.memory(), cache.expected(poisoned, before, pairs))


@pytest.mark.parametrize("route", ROUTES)
def test_many_at_once_both_ways(device: Device, route: str) -> None:
    cache = cache_of(device, "layers")
    with cache.engine(**options_of(route)) as engine:
        before = cache.randomize()
        saves = [engine.save_blocks(keys_of(*range(at, at + 25)), np.arange(at, at + 25)) for at in range(0, 100, 25)]
        assert all(save.wait().all() for save in saves)
        tickets = []
        for at in range(0, 50, 10):
            tickets.append(engine.load_blocks(keys_of(*range(at, at + 10)), np.arange(150 + at, 160 + at)))
            tickets.append(engine.save_blocks(keys_of(*range(500 + at, 510 + at)), np.arange(100 + at, 110 + at)))
        assert all(ticket.wait().all() for ticket in tickets)
        moved = [(at, 150 + at) for at in range(50)]
        assert_same(cache.memory(), cache.expected(before, before, moved))
        assert engine.load_blocks(keys_of(*range(500, 550)), np.arange(50)).wait().all()
        assert_same(cache.memory(), cache.expected(before, before, moved + [(100 + at, at) for at in range(50)]))


@pytest.mark.parametrize("route", ROUTES)
def test_a_save_sees_what_the_stream_writes_first(device: Device, gate: Gate, route: str) -> None:
    cache = cache_of(device, "even")
    with cache.engine(**options_of(route)) as engine:
        cache.randomize()
        assert engine.save_blocks(keys_of(*range(120)), np.arange(120)).wait().all()  # buffers and flags are in use
        gate.shut()
        tensor = cache.tensors[0]
        gate.write(tensor.buffer, 0x5A)
        ticket = engine.save_blocks(keys_of(*range(200, 280)), np.arange(80), stream=gate.stream)
        assert not ticket.done()
        gate.open()
        assert ticket.wait(20).all()
        cache.randomize()
        assert engine.load_blocks(keys_of(*range(200, 280)), np.arange(80)).wait().all()
        view = tensor.view(cache.memory()[0])
        assert (view[:, :80] == 0x5A).all() and not (view[:, 80:] == 0x5A).all()


@pytest.mark.parametrize("route", ROUTES)
def test_a_load_waits_until_the_stream_has_read(device: Device, gate: Gate, route: str) -> None:
    cache = cache_of(device, "even")
    with cache.engine(**options_of(route)) as engine:
        before = cache.randomize()
        assert engine.save_blocks(keys_of(*range(100)), np.arange(100)).wait().all()
        tensor = cache.tensors[0]
        copy = device.allocate(tensor.buffer.nbytes)
        gate.shut()
        gate.copy(copy, tensor.buffer)
        ticket = engine.load_blocks(keys_of(*range(100)), np.arange(100, 200), stream=gate.stream)
        assert not ticket.done()
        gate.open()
        assert ticket.wait(20).all()
        assert_same([copy.read()], before)
        assert_same(cache.memory(), cache.expected(before, before, [(at, 100 + at) for at in range(100)]))
        copy.free()


@pytest.mark.parametrize("route", ["strided", "mapped", "auto"])
def test_one_block_keeps_the_callers_order_both_ways(device: Device, gate: Gate, route: str) -> None:
    """Which the caller's thread issues: a plan of so few calls is not left to another one."""
    cache = cache_of(device, "even")
    with cache.engine(**options_of(route)) as engine:
        cache.randomize()
        assert engine.save_blocks(keys_of(1), [5]).wait().all()
        tensor = cache.tensors[0]
        copy = device.allocate(tensor.buffer.nbytes)
        gate.shut()
        gate.write(tensor.buffer, 0x5A)
        save = engine.save_blocks(keys_of(2), [7], stream=gate.stream)
        gate.copy(copy, tensor.buffer)
        load = engine.load_blocks(keys_of(1), [9], stream=gate.stream)
        assert not save.done() and not load.done()
        gate.open()
        assert save.wait(20).all() and load.wait(20).all()
        assert (copy.read() == 0x5A).all(), "the page was still read when the load wrote it"
        before = cache.randomize()
        assert engine.load_blocks(keys_of(2), [3]).wait().all()
        wanted = [memory.copy() for memory in before]
        tensor.view(wanted[0])[:, 3] = 0x5A
        assert_same(cache.memory(), wanted)
        copy.free()
