"""Plans that a lane's thread issues: the caller goes on meanwhile, and nothing else is different."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

from kvortex.devices.cuda import CudaDevice
from kvortex.devices.native import load_tuple, store_tuple
from kvortex.errors import TransferError, TransferTimeoutError
from kvortex.transfer.cuda import CudaExecutor
from kvortex.transfer.issue import submitting
from kvortex.transfer.transfer import Transfer
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.pages import PagedCache, Tensor, assert_same, keys_of
from tests.transfer.recorder import Call

BLOCKS = 12


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu(monkeypatch) as made:
        monkeypatch.setattr("kvortex.transfer.lane._AT_ONCE", -1)
        yield made


@pytest.fixture
def cache(gpu: FakeGpu) -> PagedCache:
    return PagedCache(CudaDevice(), [Tensor(CudaDevice(), (2, BLOCKS, 5, 60)) for _ in range(3)], 1)


class Gate:
    """Holds the thread that issues back in front of its first call, until it is opened."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.reached, self._open, execute = threading.Event(), threading.Event(), gpu.issued._also
        assert execute is not None

        def held(call: Call) -> None:
            if call.name == "push":
                self.reached.set()
                assert self._open.wait(20)
            execute(call)

        gpu.issued._also = held

    def open(self) -> None:
        self._open.set()


@njit
def stored(address: int, values: Any, like: Any) -> Any:
    return store_tuple(address, values, like)


@njit
def loaded(address: int, like: Any) -> Any:
    return load_tuple(address, like)


def test_a_tuple_comes_back_as_it_was_stored() -> None:
    row = np.zeros(64, np.int64)
    given = (7, np.arange(5), -3, np.arange(6).reshape(2, 3), np.empty((3, 0), np.int64))
    like = (0, np.zeros(1, np.int64), 0, np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64))
    assert 0 < stored(row.ctypes.data, given, like) <= row.nbytes
    number, line, other, table, empty = loaded(row.ctypes.data, like)
    assert (number, other) == (7, -3) and line.tolist() == [0, 1, 2, 3, 4]
    assert table.tolist() == [[0, 1, 2], [3, 4, 5]] and empty.shape == (3, 0)
    given[1][0] = 99
    assert loaded(row.ctypes.data, like)[1][0] == 99, "the array itself, and no copy"


@pytest.mark.parametrize("values", [(np.zeros(2, np.int32),), (np.zeros((4, 2), np.int64)[:, 0],), (1, 2)])
def test_what_would_be_loaded_as_something_else_does_not_compile(values: Any) -> None:
    with pytest.raises(TypingError):
        stored(np.zeros(64, np.int64).ctypes.data, values, (np.zeros(1, np.int64),))


@pytest.mark.parametrize("route", ["staged", "resident", "strided", "batched", "mapped"])
def test_every_byte_arrives(cache: PagedCache, route: str) -> None:
    with cache.engine(slots=BLOCKS, transfer_route=route, gpu_pool_size_bytes=16 * 4096) as engine:
        before = cache.randomize()
        assert engine.save_blocks(keys_of(*range(BLOCKS)), np.arange(BLOCKS)).wait().all()
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(*range(BLOCKS)), np.arange(BLOCKS)[::-1]).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(at, BLOCKS - 1 - at) for at in range(BLOCKS)]))


def test_the_caller_goes_on_while_a_plan_is_issued(gpu: FakeGpu, cache: PagedCache) -> None:
    with cache.engine(slots=BLOCKS) as engine:
        before = cache.randomize()
        gate = Gate(gpu)
        ticket = engine.save_blocks(keys_of(*range(4)), np.arange(4), stream=0x77)
        assert gate.reached.wait(20) and not ticket.done() and engine.get_stats().reserved_blocks == 4
        gate.open()
        assert ticket.wait().all()
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(*range(4)), np.arange(4)).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(at, at) for at in range(4)]))


def test_the_callers_stream_counts_as_it_is_at_the_call(gpu: FakeGpu, cache: PagedCache) -> None:
    """Work that the caller queues behind the call, which may wait for the transfer, must not be waited for."""
    with cache.engine(slots=BLOCKS) as engine:
        gate = Gate(gpu)
        gpu.issued.calls.clear()
        ticket = engine.save_blocks(keys_of(1), [1], stream=0x77)
        [event] = [call.arguments[0] for call in gpu.issued.calls if call.name == "record" and call.arguments[1] == 0x77]
        gate.open()
        assert ticket.wait().all()
        assert [call for call in gpu.issued.calls if call.name == "wait" and call.arguments[1] == event]
        assert sum(call.name == "record" and call.arguments[1] == 0x77 for call in gpu.issued.calls) == 1


def test_a_stream_is_made_to_wait_when_there_is_something_to_wait_for(gpu: FakeGpu, cache: PagedCache) -> None:
    with cache.engine(slots=BLOCKS, transfer_timeout_s=0.3) as engine:
        gate = Gate(gpu)
        ticket = engine.save_blocks(keys_of(1), [1])
        with pytest.raises(TransferTimeoutError, match="was not issued after 0.3 s"):
            ticket.add_to(0x77)
        assert not gpu.named("cuStreamWaitEvent"), "an event that was not recorded yet would not be waited for"
        gpu.event_code = 600
        gate.open()
        ticket.add_to(0x77)
        assert [stream for stream, _, _ in gpu.named("cuStreamWaitEvent")] == [0x77]
        gpu.event_code = 0
        assert ticket.wait(20).all()


def test_a_stream_that_no_event_can_be_recorded_on(gpu: FakeGpu, cache: PagedCache) -> None:
    with cache.engine(slots=BLOCKS) as engine:
        gpu.issued.calls.clear()
        gpu.issued.fails = {0: 400}
        ticket = engine.save_blocks(keys_of(1), [1])
        assert not ticket.wait().any() and isinstance(ticket.error, TransferError)
        assert gpu.issued.names == ["record"] and engine.get_stats().reserved_blocks == 0
        gpu.issued.fails = {}
        assert engine.save_blocks(keys_of(1), [1]).wait().all()


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_around_the_queue(
    gpu: FakeGpu, cache: PagedCache, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """What another thread may issue by now is not given up."""
    real = submitting._queue

    def interrupted(*arguments: Any) -> None:
        if when == "after":
            real(*arguments)
        raise KeyboardInterrupt

    with cache.engine(slots=BLOCKS) as engine:
        gate = Gate(gpu)
        monkeypatch.setattr(submitting, "_queue", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.save_blocks(keys_of(1), [1])
        monkeypatch.setattr(submitting, "_queue", real)
        assert engine.get_stats().reserved_blocks == (when == "after")
        gate.open()
        while engine.get_stats().reserved_blocks:
            pass
        assert engine.check_blocks(keys_of(1)).tolist() == [when == "after"]
        assert sorted(engine._executor._events._free) == sorted(engine._executor._events._all)


def test_who_finds_no_room_waits_for_some(gpu: FakeGpu, cache: PagedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "_CAPACITY", 2)
    with cache.engine(slots=BLOCKS) as engine:
        gate = Gate(gpu)
        tickets = [engine.save_blocks(keys_of(at), [at]) for at in range(2)]
        assert gate.reached.wait(20)
        rest = threading.Thread(target=lambda: tickets.extend(engine.save_blocks(keys_of(at), [at]) for at in range(2, BLOCKS)))
        rest.start()
        rest.join(0.3)
        assert rest.is_alive() and len(tickets) == 2, "it waits for the lane, like the plans before it"
        gate.open()
        rest.join(20)
        assert len(tickets) == BLOCKS and all(ticket.wait().all() for ticket in tickets)
        assert engine.check_blocks(keys_of(*range(BLOCKS))).all()


def test_who_finds_no_room_for_long_is_told(gpu: FakeGpu, cache: PagedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "_CAPACITY", 1)
    monkeypatch.setattr(submitting, "_ROOM_S", 0.2)
    with cache.engine(slots=BLOCKS) as engine:
        gate = Gate(gpu)
        ticket = engine.save_blocks(keys_of(0), [0])
        assert gate.reached.wait(20)
        with pytest.raises(TransferTimeoutError, match="1 transfers wait to be issued"):
            engine.save_blocks(keys_of(1), [1])
        assert engine.get_stats().reserved_blocks == 1, "nothing is held by the call that raised"
        gate.open()
        assert ticket.wait().all() and engine.check_blocks(keys_of(0, 1)).tolist() == [True, False]


def test_a_short_plan_does_not_wait_for_a_lane_that_another_thread_is_at(
    gpu: FakeGpu, cache: PagedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left to the lane's thread: its caller could not be interrupted while it waits."""
    with cache.engine(slots=BLOCKS) as engine:
        gate = Gate(gpu)
        first = engine.save_blocks(keys_of(0), [0])
        assert gate.reached.wait(20)
        monkeypatch.setattr("kvortex.transfer.lane._AT_ONCE", 1 << 62)
        second = engine.save_blocks(keys_of(1), [1])
        assert not second.done()
        gate.open()
        assert first.wait().all() and second.wait().all()


@pytest.mark.parametrize("kind", ["save", "load"])
def test_a_transfer_is_not_given_up_while_its_call_ends(
    gpu: FakeGpu, cache: PagedCache, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Another thread looks whether it has ended: between two looks it gets its completion, and its call returns."""
    looked, returned = threading.Event(), threading.Event()
    issued, prepare = Transfer.issued, CudaExecutor.prepare_blocks

    def slowly(transfer: Transfer) -> bool:
        if threading.current_thread().name == "other" and not looked.is_set():
            looked.set()
            assert returned.wait(20)
        return issued(transfer)

    with cache.engine(slots=1) as engine:
        if kind == "load":
            assert engine.save_blocks(keys_of(1), [0]).wait().all()
        other = threading.Thread(target=lambda: engine.check_blocks(keys_of(9)), name="other")

        def beside(*arguments: Any, **options: Any) -> Any:
            other.start()
            assert looked.wait(20)
            return prepare(*arguments, **options)

        gate = Gate(gpu)
        monkeypatch.setattr(Transfer, "issued", slowly)
        monkeypatch.setattr(CudaExecutor, "prepare_blocks", beside)
        ticket = (engine.save_blocks if kind == "save" else engine.load_blocks)(keys_of(1), [1])
        returned.set()
        other.join(20)
        monkeypatch.undo()
        stats = engine.get_stats()
        assert not ticket.done() and (stats.reserved_blocks, stats.pinned_blocks) == ((1, 0) if kind == "save" else (0, 1))
        gate.open()
        assert ticket.wait().all()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("save", [True, False])
def test_a_resident_kernel_ends_whatever_call_is_refused(
    gpu: FakeGpu, cache: PagedCache, monkeypatch: pytest.MonkeyPatch, save: bool, at_once: bool
) -> None:
    """Also where the last flag cannot be written: no later value would let the kernel go on."""
    if at_once:
        monkeypatch.setattr("kvortex.transfer.lane._AT_ONCE", 1 << 62)
    with cache.engine(slots=BLOCKS, transfer_route="resident", gpu_pool_size_bytes=8 * 4096) as engine:
        blocks, before = np.arange(BLOCKS), cache.randomize()
        keys = keys_of(*range(BLOCKS))
        assert engine.save_blocks(keys, blocks).wait().all()
        gpu.issued.calls.clear()
        assert engine.load_blocks(keys, blocks).wait().all()
        total, writes = len(gpu.issued.calls), 0
        for at in range(total):
            gpu.issued.calls.clear()
            gpu.issued.fails = {at: 2}
            fresh = keys_of(*range(100 * (at + 1), 100 * (at + 1) + BLOCKS))
            ticket = engine.save_blocks(fresh, blocks) if save else engine.load_blocks(keys, blocks)
            ticket.wait(20)
            assert not gpu.resident, f"a kernel that never ends: call {at}, {gpu.issued.names[at]}"
            writes += gpu.issued.names[at] == "write_value"
            gpu.issued.fails = {}
            if save:
                assert engine.save_blocks(keys, blocks).wait().all()
        assert writes > 3
        poisoned = cache.randomize()
        assert engine.load_blocks(keys, blocks).wait().all()
        if not save:
            assert_same(cache.memory(), cache.expected(poisoned, before, [(at, at) for at in range(BLOCKS)]))


def test_threads_end_with_their_engine(gpu: FakeGpu, cache: PagedCache) -> None:
    def alive() -> list[str]:
        return sorted(thread.name for thread in threading.enumerate() if thread.name in ("kvortex-load", "kvortex-save"))

    before = alive()
    with cache.engine(slots=BLOCKS):
        assert alive() == sorted([*before, "kvortex-load", "kvortex-save"])
    assert alive() == before
    engine = cache.engine(slots=BLOCKS)
    del engine
    assert alive() == before, "also where it is dropped"
