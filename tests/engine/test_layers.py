"""Layer by layer: a stream that waits for a layer finds its bytes, before the last ones are there, on every route."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from kvortex.devices import Device, HostDevice
from kvortex.devices import driver as cu
from kvortex.errors import ArgumentError, TransferError
from kvortex.transfer import host
from tests.engine.on_routes import on_every_route
from tests.engine.test_order import Gate, gate  # noqa: F401
from tests.pages import PagedCache, Tensor, assert_same, keys_of

LAYERS, BLOCKS, COUNT = 8, 64, 24


def cache_of(device: Device, kind: str = "layers") -> PagedCache:
    """Records of 1 MiB and more, so that layers travel in four groups."""
    if kind == "one tensor":  # [block, layer, ...]: a record is one contiguous fragment
        return PagedCache(device, [Tensor(device, (BLOCKS, LAYERS, 2, 32 << 10))], 0, 1)
    if kind == "odd":
        shapes = [(2, BLOCKS, 33_000 + 1111 * layer) for layer in range(LAYERS)]
        return PagedCache(device, [Tensor(device, shape, shift=layer) for layer, shape in enumerate(shapes)], 1)
    return PagedCache(device, [Tensor(device, (2, BLOCKS, 4, 8 << 10)) for _ in range(LAYERS)], 1)


@on_every_route
@pytest.mark.parametrize("kind", ["layers", "odd", "one tensor"])
def test_a_layer_is_there_when_its_wait_is_over(device: Device, gate: Gate, kind: str, route: str) -> None:  # noqa: F811
    cache = cache_of(device, kind)
    copies = [device.allocate(tensor.buffer.nbytes) for tensor in cache.tensors]
    rng = np.random.default_rng(2)
    with cache.engine(slots=40, transfer_route=route, gpu_pool_size_bytes=16 << 20) as engine:
        before = cache.randomize()
        source, target = rng.permutation(BLOCKS)[:COUNT], rng.permutation(BLOCKS)[:COUNT]
        keys = keys_of(*range(COUNT))
        assert engine.save_blocks(keys, source).wait().all()
        poisoned = cache.randomize()
        ticket = engine.load_blocks(keys, target, layerwise=True)
        for layer in range(LAYERS):
            ticket.wait_layer(layer, gate.stream)
            if kind != "one tensor":
                gate.copy(copies[layer], cache.tensors[layer].buffer)
        if kind == "one tensor":
            gate.copy(copies[0], cache.tensors[0].buffer)
        gate.synchronize()
        wanted = cache.expected(poisoned, before, list(zip(source.tolist(), target.tolist(), strict=True)))
        assert_same([copy.read() for copy in copies], wanted)
        assert ticket.wait().all() and ticket.error is None
        assert_same(cache.memory(), wanted)


def test_the_first_layers_do_not_wait_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host device, where a layer can be held up."""
    cache = cache_of(HostDevice())
    copy, held, first = host.copy_paged, threading.Event(), cache.layout.fragments[0, 0]

    def hold(memcpy: int, rows: Any, *others: Any) -> None:
        if rows[0, 0] != first and not others[-2]:
            assert held.wait(20)
        copy(memcpy, rows, *others)

    with cache.engine(slots=40) as engine:
        before = cache.randomize()
        engine.save_blocks(keys_of(*range(COUNT)), np.arange(COUNT)).wait()
        monkeypatch.setattr(host, "copy_paged", hold)
        poisoned = cache.randomize()
        ticket = engine.load_blocks(keys_of(*range(COUNT)), np.arange(COUNT) + COUNT, layerwise=True)
        ticket.wait_layer(0)
        ticket.wait_layer(1)  # of the same group
        wanted = cache.expected(poisoned, before, [(block, block + COUNT) for block in range(COUNT)])
        assert_same(cache.memory()[:2], wanted[:2])
        assert not ticket.done()
        held.set()
        ticket.wait_layer(LAYERS - 1)
        assert_same(cache.memory()[-1:], wanted[-1:])
        assert ticket.wait().all()


@pytest.mark.gpu
@pytest.mark.parametrize("route", ["staged", "resident"])
def test_the_first_layers_come_early(route: str) -> None:
    """On a GPU, by its own clock."""
    from kvortex.devices.cuda import CudaDevice

    device = CudaDevice()
    cache = PagedCache(device, [Tensor(device, (2, 256, 4, 8 << 10)) for _ in range(LAYERS)], 1)
    keys = keys_of(*range(200))
    with cache.engine(slots=200, transfer_route=route, gpu_pool_size_bytes=64 << 20) as engine:
        engine.save_blocks(keys, np.arange(200)).wait()
        engine.load_blocks(keys, np.arange(200), layerwise=True).wait()
        with cu.current(device.context) as driver:
            stream = cu.check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), "cuStreamCreate")
            events = [cu.check(driver.cuEventCreate(0), "cuEventCreate") for _ in range(2 + LAYERS)]
            cu.check(driver.cuEventRecord(events[0], stream), "cuEventRecord")
        ticket = engine.load_blocks(keys, np.arange(200), layerwise=True, stream=int(stream))
        waits = [lambda at=at: ticket.wait_layer(at, int(stream)) for at in range(LAYERS)]
        for event, wait in zip(events[1:], [*waits, lambda: ticket.add_to(int(stream))], strict=True):
            wait()
            with cu.current(device.context) as driver:
                cu.check(driver.cuEventRecord(event, stream), "cuEventRecord")
        assert ticket.wait().all()
        with cu.current(device.context) as driver:
            cu.check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize")
            took = [cu.check(driver.cuEventElapsedTime(events[0], event), "cuEventElapsedTime") for event in events[1:]]
    assert took == sorted(took)
    assert took[0] < 0.6 * took[-1] and took[LAYERS // 2 - 1] < 0.85 * took[-1], took


def test_any_other_load_is_waited_for_as_a_whole(device: Device, gate: Gate) -> None:  # noqa: F811
    cache = cache_of(device)
    with cache.engine(slots=40) as engine:
        cache.randomize()
        engine.save_blocks(keys_of(1, 2), [1, 2]).wait()
        gate.shut()
        ticket = engine.load_blocks(keys_of(1, 2), [3, 4], stream=gate.stream)
        other = Gate(device)
        ticket.wait_layer(0, other.stream)
        time.sleep(0.05)
        gate.open()
        other.finish()
        assert ticket.done()


def test_misses_are_told_and_wait_for_nothing(device: Device) -> None:
    cache = cache_of(device)
    with cache.engine(slots=40) as engine:
        before = cache.randomize()
        engine.save_blocks(keys_of(*range(20)), np.arange(20)).wait()
        poisoned = cache.randomize()
        ticket = engine.load_blocks(keys_of(77, *range(20)), np.arange(30, 51), layerwise=True)
        assert ticket.wait().tolist() == [False] + [True] * 20
        assert_same(cache.memory(), cache.expected(poisoned, before, [(block, 31 + block) for block in range(20)]))
        nothing = engine.load_blocks(keys_of(88), [1], layerwise=True)
        nothing.wait_layer(3)
        assert nothing.wait().tolist() == [False]


def test_what_has_no_layers(device: Device) -> None:
    cache = cache_of(device)
    buffer = device.allocate(4096)
    with cache.engine(slots=4, max_block_bytes=4096) as engine:
        save = engine.save_blocks(keys_of(1), [1])
        assert save.wait().all()
        engine.save_blocks(keys_of(2), [buffer.address], [4096]).wait()
        with pytest.raises(ArgumentError, match="opaque buffers have no layers"):
            engine.load_blocks(keys_of(2), [buffer.address], [4096], layerwise=True)
        opaque = engine.load_blocks(keys_of(2), [buffer.address], [4096])
        for ticket in (save, opaque):
            with pytest.raises(ArgumentError, match="use add_to"):
                ticket.wait_layer(0)
        assert opaque.wait().all()
        load = engine.load_blocks(keys_of(1), [2], layerwise=True)
        for layer in (-1, LAYERS, True, 0.5, "0", None, 10**4000):
            with pytest.raises(ArgumentError, match="must be an integer from 0 to 7"):
                load.wait_layer(layer)
        with pytest.raises(ArgumentError):
            load.wait_layer(0, "stream")
        assert load.wait().all() and engine.get_stats().pinned_blocks == 0


def test_a_layer_that_fails_is_told_and_lets_all_waiters_go(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(HostDevice())
    copy, last = host.copy_paged, cache.layout.fragments[-1, 2]

    def fail(memcpy: int, rows: Any, *others: Any) -> None:
        if rows[-1, 2] == last and not others[-2]:
            raise MemoryError("planted")
        copy(memcpy, rows, *others)

    with cache.engine(slots=40) as engine:
        engine.save_blocks(keys_of(*range(COUNT)), np.arange(COUNT)).wait()
        monkeypatch.setattr(host, "copy_paged", fail)
        ticket = engine.load_blocks(keys_of(*range(COUNT)), np.arange(COUNT), layerwise=True)
        for layer in range(LAYERS):
            ticket.wait_layer(layer)
        assert not ticket.wait().any() and isinstance(ticket.error, TransferError)
        assert engine.get_stats().pinned_blocks == 0
