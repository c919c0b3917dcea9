"""Layer by layer behind a model: what is saved, when it is seen, and what becomes of saves that never get all their layers."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvortex import KVortexEngine, Ticket
from kvortex.devices import Device, HostDevice, HostStream
from kvortex.errors import (
    ArgumentError,
    EngineClosedError,
    LayersMissingError,
    PoolFullError,
    TransferError,
    TransferTimeoutError,
)
from kvortex.transfer import host
from tests.engine.on_routes import on_every_route
from tests.engine.test_layers import BLOCKS, COUNT, LAYERS, cache_of
from tests.engine.test_order import Gate, gate, pause  # noqa: F401
from tests.pages import PagedCache, assert_same, keys_of

KEYS = keys_of(*range(COUNT))
GROUP = LAYERS // 4  # layers in a group of cache_of


def announce(ticket: Ticket, *layers: int, stream: Any = None) -> None:
    for layer in layers or range(LAYERS):
        ticket.save_layer(layer, stream)


def assert_nothing_is_taken(engine: KVortexEngine, resident: int) -> None:
    stats = engine.get_stats()
    assert (stats.reserved_blocks, stats.pinned_blocks, stats.resident_blocks) == (0, 0, resident)
    engine._index.check()


@on_every_route
@pytest.mark.parametrize("kind", ["layers", "odd", "one tensor"])
def test_round_trip(device: Device, kind: str, route: str) -> None:
    cache = cache_of(device, kind)
    rng = np.random.default_rng(5)
    with cache.engine(slots=40, transfer_route=route, gpu_pool_size_bytes=16 << 20) as engine:
        for turn in range(3):
            before = cache.randomize()
            source, target = rng.permutation(BLOCKS)[:COUNT], rng.permutation(BLOCKS)[:COUNT]
            keys = keys_of(*(100 * turn + np.arange(COUNT)))
            ticket = engine.save_blocks(keys, source, layerwise=True)
            announce(ticket, *rng.permutation(LAYERS).tolist())
            assert ticket.wait().all() and ticket.error is None and ticket.seconds > 0
            poisoned = cache.randomize()
            assert engine.load_blocks(keys, target, layerwise=bool(turn % 2)).wait().all()
            wanted = cache.expected(poisoned, before, list(zip(source.tolist(), target.tolist(), strict=True)))
            assert_same(cache.memory(), wanted)
        assert_nothing_is_taken(engine, 40)


@on_every_route
def test_a_layer_is_saved_as_its_stream_leaves_it(device: Device, gate: Gate, route: str) -> None:  # noqa: F811
    """Behind what was on the stream when it was announced, and before what waits for it there."""
    cache = cache_of(device)
    with cache.engine(slots=40, transfer_route=route, gpu_pool_size_bytes=16 << 20) as engine:
        cache.randomize()
        ticket = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True, stream=gate.stream)
        gate.shut()
        for layer, tensor in enumerate(cache.tensors):
            gate.write(tensor.buffer, 0x40 + layer)
            ticket.save_layer(layer)
        ticket.add_to(gate.stream)
        for tensor in cache.tensors:
            gate.write(tensor.buffer, 0xBD)
        pause()
        assert not ticket.done() and not engine.check_blocks(KEYS).any()
        gate.open()
        assert ticket.wait().all() and engine.check_blocks(KEYS).all()
        gate.synchronize()
        cache.randomize()
        assert engine.load_blocks(KEYS, np.arange(COUNT)).wait().all()
        for layer, (tensor, memory) in enumerate(zip(cache.tensors, cache.memory(), strict=True)):
            assert (tensor.view(memory)[:, :COUNT] == 0x40 + layer).all()


@pytest.mark.parametrize("late", range(GROUP))
def test_a_group_waits_for_every_stream_that_a_layer_of_it_was_announced_on(
    device: Device, gate: Gate, late: int  # noqa: F811
) -> None:
    """Also for the one that is not the stream of the last announcement."""
    cache = cache_of(device)
    other = Gate(device)
    with cache.engine(slots=40) as engine:
        cache.randomize()
        ticket = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True)
        gate.shut()
        for layer, tensor in enumerate(cache.tensors):
            slow = layer == late
            (gate if slow else other).write(tensor.buffer, 0x40 + layer)
            ticket.save_layer(layer, (gate if slow else other).stream)
        other.synchronize()
        pause()
        assert not ticket.done()
        gate.open()
        assert ticket.wait().all()
        cache.randomize()
        assert engine.load_blocks(KEYS, np.arange(COUNT)).wait().all()
        for layer, (tensor, memory) in enumerate(zip(cache.tensors, cache.memory(), strict=True)):
            assert (tensor.view(memory)[:, :COUNT] == 0x40 + layer).all()
    other.finish()


def test_the_first_layers_leave_before_the_last_are_computed(device: Device, gate: Gate) -> None:  # noqa: F811
    """A stream that overwrites a layer need only wait for that one."""
    cache = cache_of(device)
    with cache.engine(slots=40) as engine:
        before = cache.randomize()
        ticket = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True)
        announce(ticket, *range(GROUP))
        ticket.wait_layer(0, gate.stream)
        for tensor in cache.tensors[:GROUP]:
            gate.write(tensor.buffer, 0xBD)
        gate.synchronize()
        assert not ticket.done()
        announce(ticket, *range(GROUP, LAYERS))
        assert ticket.wait().all()
        poisoned = cache.randomize()
        assert engine.load_blocks(KEYS, np.arange(COUNT)).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(at, at) for at in range(COUNT)]))


def test_keys_are_visible_when_the_last_layer_is_saved(device: Device) -> None:
    cache = cache_of(device)
    with cache.engine(slots=40) as engine:
        ticket = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True)
        for layer in range(LAYERS):
            assert ticket.missing_layers == tuple(range(layer, LAYERS))
            assert not engine.check_blocks(KEYS).any() and engine.get_stats().reserved_blocks == COUNT
            assert not engine.load_blocks(KEYS[:3], [50, 51, 52]).wait().any()
            assert not ticket.done() and not ticket.mask.any()
            ticket.save_layer(layer)
        assert ticket.wait().all() and engine.check_blocks(KEYS).all() and ticket.missing_layers == ()


def test_a_wait_for_what_was_not_announced_is_refused_at_once(device: Device) -> None:
    cache = cache_of(device)
    with cache.engine(slots=40) as engine:
        ticket = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True)
        announce(ticket, 0, 1, 5)
        began = time.monotonic()

        async def wait() -> None:
            await ticket

        stream = HostStream() if isinstance(device, HostDevice) else 0
        waits: list[Callable[[], Any]] = [ticket.wait, lambda: ticket.wait(0), lambda: asyncio.run(wait()),
                                          lambda: ticket.add_to(stream)]  # fmt: skip
        for call in waits:
            with pytest.raises(LayersMissingError, match=r"layers \[2, 3, 4, 6, 7\] were not announced") as caught:
                call()
            assert caught.value.layers == (2, 3, 4, 6, 7) and isinstance(caught.value, TransferError)
        with pytest.raises(LayersMissingError, match=r"layers \[4\] were"):
            ticket.wait_layer(5, stream)
        ticket.wait_layer(0, stream)
        assert time.monotonic() - began < 10
        announce(ticket, 2, 3, 4, 6, 7)
        assert asyncio.run(asyncio.wait_for(ticket._poll_async(), 20)).all()


def test_a_layer_is_announced_once(device: Device) -> None:
    cache = cache_of(device)
    with cache.engine(slots=40) as engine:
        ticket = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True)
        announce(ticket, 0, 1, 2)
        for layer in (0, 1, 2):
            with pytest.raises(ArgumentError, match=f"layer {layer} was announced already"):
                ticket.save_layer(layer)
        announce(ticket, *range(3, LAYERS))
        assert ticket.wait().all()
        with pytest.raises(ArgumentError, match="already"):
            ticket.save_layer(7)


def test_bad_input(device: Device) -> None:
    cache = cache_of(device)
    buffer = device.allocate(4096)
    with cache.engine(slots=40, max_block_bytes=4096) as engine:
        with pytest.raises(ArgumentError, match="opaque buffers have no layers"):
            engine.save_blocks(keys_of(1), [buffer.address], [4096], layerwise=True)
        with pytest.raises(ArgumentError):
            engine.save_blocks(keys_of(1), [1], layerwise=True, stream="stream")
        assert_nothing_is_taken(engine, 0)
        ticket = engine.save_blocks(keys_of(1), [1], layerwise=True)
        for layer in (-1, LAYERS, True, 0.5, "0", None, 10**4000):
            with pytest.raises(ArgumentError, match="must be an integer from 0 to 7"):
                ticket.save_layer(layer)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError):
            ticket.save_layer(0, "stream")
        assert ticket.missing_layers == tuple(range(LAYERS))
        announce(ticket)
        assert ticket.wait().all()
        for other in (engine.save_blocks(keys_of(2), [1]), engine.load_blocks(keys_of(1), [2], layerwise=True)):
            for call in (lambda other=other: other.save_layer(0), other.abort):
                with pytest.raises(ArgumentError, match="only a save that was asked for with layerwise=True"):
                    call()
            assert other.missing_layers == () and other.wait().all()


def test_where_nothing_has_to_move_nothing_is_wanted(device: Device) -> None:
    cache = cache_of(device)
    with cache.engine(slots=40) as engine:
        engine.save_blocks(KEYS, np.arange(COUNT)).wait()
        for keys in (KEYS, KEYS[:0]):
            ticket = engine.save_blocks(keys, np.arange(len(keys)), layerwise=True)
            assert ticket.done() and ticket.missing_layers == () and ticket.nbytes == 0 and not ticket.abort()
            announce(ticket)
            ticket.wait_layer(3)
            assert ticket.wait().all()


@pytest.mark.parametrize("announced", [0, 1, GROUP, LAYERS - 1])
@pytest.mark.parametrize("how", ["abort", "drop", "shutdown"])
def test_a_save_that_is_given_up_leaves_nothing(device: Device, how: str, announced: int) -> None:
    cache = cache_of(device)
    engine = cache.engine(slots=COUNT, transfer_timeout_s=20.0)
    ticket = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True)
    for layer in range(announced):
        ticket.save_layer(layer)
    began = time.monotonic()
    if how == "shutdown":
        engine.shutdown()
        said = "the engine was shut down before layers"
        with pytest.raises(EngineClosedError):
            ticket.save_layer(LAYERS - 1)
        with pytest.raises(EngineClosedError):
            ticket.abort()
    elif how == "abort":
        assert ticket.abort() and not ticket.abort()
        said = "aborted by its caller"
        announce(ticket, *range(announced, LAYERS))
    else:
        transfer, said = ticket._transfer, "the ticket was dropped before layers"
        del ticket
        assert not engine.check_blocks(KEYS).any()
        ticket = Ticket(transfer, engine._settle, 20.0, engine._executor.check_stream, lambda: None)  # type: ignore[arg-type, return-value]
    assert not ticket.wait().any() and said in str(ticket.error) and isinstance(ticket.error, TransferError)
    assert ticket.missing_layers == () and time.monotonic() - began < 10
    if how == "shutdown":
        return
    assert_nothing_is_taken(engine, 0)
    assert engine.get_stats().failed_blocks == COUNT
    before = cache.randomize()
    again = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True)
    announce(again)
    assert again.wait().all()
    poisoned = cache.randomize()
    assert engine.load_blocks(KEYS, np.arange(COUNT)).wait().all()
    assert_same(cache.memory(), cache.expected(poisoned, before, [(at, at) for at in range(COUNT)]))
    engine.shutdown()


def test_an_abort_after_the_last_layer_keeps_the_blocks_out(device: Device, gate: Gate) -> None:  # noqa: F811
    """The forward pass may fail behind its last layer; the slots are free when the copies have ended."""
    cache = cache_of(device)
    with cache.engine(slots=40) as engine:
        gate.shut()
        ticket = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True, stream=gate.stream)
        announce(ticket)
        assert ticket.abort()
        pause()
        assert not ticket.done() and engine.get_stats().reserved_blocks == COUNT
        gate.open()
        assert not ticket.wait().any()
        assert_nothing_is_taken(engine, 0)
        late = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True)
        announce(late)
        assert late.wait().all() and not late.abort() and engine.check_blocks(KEYS).all()


def test_an_engine_that_is_dropped_with_a_save_that_misses_layers(device: Device) -> None:
    cache = cache_of(device)
    engine = cache.engine(slots=40, transfer_timeout_s=20.0)
    ticket = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True)
    announce(ticket, 0, 1)
    parts = engine._parts
    began = time.monotonic()
    engine.itself, engine.ticket = engine, ticket  # type: ignore[attr-defined]
    del engine, ticket
    gc.collect()
    while parts.arena._mapping is not None:
        assert time.monotonic() - began < 10
        time.sleep(0.01)
    assert parts.index.counts().reserved == 0


def test_a_dropped_ticket_with_all_its_layers_goes_on(device: Device) -> None:
    cache = cache_of(device)
    with cache.engine(slots=40) as engine:
        announce(engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True))
        deadline = time.monotonic() + 10
        while not engine.check_blocks(KEYS).all():
            assert time.monotonic() < deadline


def test_slots_that_are_being_saved_are_not_evicted(device: Device) -> None:
    cache = cache_of(device)
    with cache.engine(slots=COUNT) as engine:
        ticket = engine.save_blocks(KEYS[:-1], np.arange(COUNT - 1), layerwise=True)
        announce(ticket, 0, 1)
        with pytest.raises(PoolFullError, match="2 slots asked for: 1 of 24 are free, 0 may be evicted.* 23 are reserved"):
            engine.save_blocks(keys_of(100, 101), [30, 31])
        assert engine.save_blocks(keys_of(100), [30]).wait().all()
        announce(ticket, *range(2, LAYERS))
        assert ticket.wait().all() and engine.check_blocks(KEYS[:-1]).all()
        assert_nothing_is_taken(engine, COUNT)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("end", ["announced", "abort", "drop"])
def test_another_save_of_the_same_blocks_meanwhile(device: Device, end: str, layerwise: bool) -> None:
    """It moves only the others, and shares the fate of the first one's."""
    cache = cache_of(device)
    with cache.engine(slots=40, transfer_timeout_s=20.0) as engine:
        first = engine.save_blocks(keys_of(1, 2), [1, 2], layerwise=True)
        announce(first, 0)
        second = engine.save_blocks(keys_of(2, 3), [2, 3], layerwise=layerwise)
        assert second.nbytes == cache.layout.record_bytes
        if layerwise:
            announce(second)
        with pytest.raises(TransferTimeoutError, match=r"waits for another save, whose layers \[1, 2, .*\] were not announced"):
            second.wait(0.05)
        with pytest.raises(LayersMissingError):
            second.add_to(HostStream() if isinstance(device, HostDevice) else 0)
        assert not second.mask.any() and not engine.check_blocks(keys_of(2)).any()
        if end == "announced":
            announce(first, *range(1, LAYERS))
            assert second.wait().all() and first.wait().all()
        else:
            if end == "abort":
                first.abort()
            del first
            assert second.wait().tolist() == [False, True] and second.error is not None
        assert_nothing_is_taken(engine, 3 if end == "announced" else 1)


def test_a_layer_wise_save_of_what_an_ordinary_one_saves(device: Device, gate: Gate) -> None:  # noqa: F811
    cache = cache_of(device)
    with cache.engine(slots=40) as engine:
        gate.shut()
        first = engine.save_blocks(keys_of(1, 2), [1, 2], stream=gate.stream)
        second = engine.save_blocks(keys_of(2, 1), [2, 1], layerwise=True)
        assert second.missing_layers == () and second.nbytes == 0 and not second.done()
        announce(second)
        gate.open()
        assert second.wait().all() and first.wait().all()


def fail(*_: object) -> None:
    raise MemoryError("planted")


def test_a_copy_that_fails_fails_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(HostDevice())
    with cache.engine(slots=40) as engine:
        ticket = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True)
        announce(ticket, 0, 1)
        monkeypatch.setattr(host, "copy_paged", fail)
        other = engine.save_blocks(keys_of(100), [30], layerwise=True)
        monkeypatch.undo()
        announce(other)
        announce(ticket, *range(2, LAYERS))
        assert not other.wait().any() and "planted" in str(other.error) and ticket.wait().all()
        assert_nothing_is_taken(engine, COUNT)


@pytest.mark.parametrize("which", [0, 3])
def test_a_stream_whose_work_raised_fails_the_save(which: int) -> None:
    """Whichever of a group's streams it is."""
    cache = cache_of(HostDevice())
    bad, good = HostStream(), HostStream()
    bad.enqueue(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    with cache.engine(slots=40) as engine:
        ticket = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True)
        for layer in range(LAYERS):
            ticket.save_layer(layer, bad if layer == which else good)
        assert not ticket.wait().any() and "ZeroDivisionError" in str(ticket.error)
        assert_nothing_is_taken(engine, 0)
        late = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True, stream=good)
        good.close()
        with pytest.raises(ArgumentError, match="was closed"):
            late.save_layer(0)
        assert late.missing_layers == tuple(range(LAYERS))
        late.abort()
    bad.close()


def test_a_failure_is_noticed_before_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is not moved for nothing, and the model's loop is not disturbed."""
    cache = cache_of(HostDevice())
    monkeypatch.setattr(host, "copy_paged", fail)
    with cache.engine(slots=40) as engine:
        ticket = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True)
        announce(ticket, 0, 1)
        deadline = time.monotonic() + 10
        while not ticket.done():
            assert time.monotonic() < deadline
        announce(ticket, *range(2, LAYERS))
        assert not ticket.wait().any() and "planted" in str(ticket.error) and ticket.missing_layers == ()
        assert_nothing_is_taken(engine, 0)


def test_threads_feed_one_ticket(device: Device) -> None:
    cache = cache_of(device)
    rng = np.random.default_rng(1)
    with cache.engine(slots=COUNT) as engine:
        for turn in range(20):
            before, keys = cache.randomize(), keys_of(*(100 * turn + np.arange(COUNT)))
            ticket = engine.save_blocks(keys, np.arange(COUNT), layerwise=True)
            order, barrier, refused = rng.permutation(LAYERS).tolist(), threading.Barrier(3), []

            def work(layers: list[int]) -> None:
                barrier.wait()  # noqa: B023
                for layer in layers:
                    try:
                        ticket.save_layer(layer)  # noqa: B023
                    except ArgumentError:
                        refused.append(layer)  # noqa: B023

            threads = [threading.Thread(target=work, args=(order[a:b],)) for a, b in ((0, 4), (3, 8), (2, 5))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            assert ticket.wait().all() and sorted(refused) == sorted(order[2:5] + order[3:4])
            poisoned = cache.randomize()
            assert engine.load_blocks(keys, np.arange(COUNT)).wait().all()
            assert_same(cache.memory(), cache.expected(poisoned, before, [(at, at) for at in range(COUNT)]))


def test_a_shutdown_waits_for_a_layer_that_is_being_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for the copies of the groups that are on their way, not for layers that nobody will announce."""
    cache = cache_of(HostDevice())
    engine = cache.engine(slots=40, transfer_timeout_s=20.0)
    ticket = engine.save_blocks(KEYS, np.arange(COUNT), layerwise=True)
    entered, go_on = threading.Event(), threading.Event()
    follow = host.HostCompletion.follow

    def slow(self: host.HostCompletion, stream: Any) -> None:
        entered.set()
        assert go_on.wait(10)
        follow(self, stream)

    monkeypatch.setattr(host.HostCompletion, "follow", slow)
    thread = threading.Thread(target=ticket.save_layer, args=(0,))
    thread.start()
    assert entered.wait(10)
    with pytest.raises(TransferTimeoutError, match="1 calls of other threads"):
        engine.shutdown(0.05)
    go_on.set()
    thread.join(10)
    engine.shutdown()
    assert not ticket.wait().any() and r"layers [1, 2, 3, 4, 5, 6, 7] were announced" in str(ticket.error)


def test_a_forked_child_can_do_nothing(device: Device) -> None:
    cache = PagedCache.plain(device)
    engine = cache.engine()
    before = cache.randomize()
    ticket = engine.save_blocks(keys_of(1), [1], layerwise=True)
    ticket.save_layer(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, which the child does not use
        child = os.fork()
    if child == 0:
        code = 1
        try:
            for call in (lambda: ticket.save_layer(1), ticket.abort, ticket.wait, lambda: ticket.wait_layer(0)):
                try:
                    call()
                except EngineClosedError:
                    continue
                raise AssertionError("a forked child used the engine")
            engine.shutdown()
            del engine, ticket
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    ticket.save_layer(1)
    assert ticket.wait().all()
    poisoned = cache.randomize()
    assert engine.load_blocks(keys_of(1), [10]).wait().all()
    assert_same(cache.memory(), cache.expected(poisoned, before, [(1, 10)]))
    engine.shutdown()
