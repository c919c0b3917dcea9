"""Order with the caller's stream, and who sees what when. ``Gate`` holds a stream of either device until it is opened."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import numpy as np
import pytest

from kvortex.devices import Device, HostDevice, HostStream
from kvortex.devices import driver as cu
from kvortex.errors import PoolFullError, TransferTimeoutError
from kvortex.transfer.executor import poll
from tests.pages import PagedCache, assert_same, host_array, keys_of


class Gate:
    """A stream that can be shut: later work on it waits until :meth:`open`.

    While it is shut, nothing may be read from or written to the GPU's memory directly: that would wait for the gate.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._turn = 0
        self._opener: threading.Timer | None = None
        if isinstance(device, HostDevice):
            self._flag = threading.Event()
            self.stream: Any = HostStream()
            return
        with cu.current(device.context) as driver:  # type: ignore[attr-defined]
            flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
            self.stream = int(cu.check(driver.cuStreamCreate(flags), "cuStreamCreate"))
        self._word = device.allocate_pinned(4096)
        self._value = ctypes.c_uint32.from_address(self._word)
        self._value.value = 0

    def shut(self) -> None:
        # A test that fails leaves the gate shut, and freeing GPU memory would then wait for ever.
        self._opener = threading.Timer(5.0, self.open)
        self._opener.daemon = True
        self._opener.start()
        if isinstance(self.device, HostDevice):
            self.stream.enqueue(self._flag.wait)
            return
        self._turn += 1
        with cu.current(self.device.context) as driver:  # type: ignore[attr-defined]
            geq = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
            cu.check(driver.cuStreamWaitValue32(self.stream, self._word, self._turn, geq), "cuStreamWaitValue32")

    def write(self, buffer: Any, byte: int) -> None:
        """Enqueues a fill of a whole buffer."""
        if isinstance(self.device, HostDevice):
            array = host_array(buffer)
            self.stream.enqueue(lambda: array.fill(byte))
            return
        with cu.current(self.device.context) as driver:  # type: ignore[attr-defined]
            call = driver.cuMemsetD8Async(buffer.address, byte, buffer.nbytes, self.stream)
            cu.check(call, "cuMemsetD8Async")

    def copy(self, target: Any, source: Any) -> None:
        """Enqueues a copy between buffers."""
        if isinstance(self.device, HostDevice):
            to, of = host_array(target), host_array(source)
            self.stream.enqueue(lambda: np.copyto(to, of))
            return
        with cu.current(self.device.context) as driver:  # type: ignore[attr-defined]
            call = driver.cuMemcpyDtoDAsync(target.address, source.address, source.nbytes, self.stream)
            cu.check(call, "cuMemcpyDtoDAsync")

    def open(self) -> None:
        if self._opener is not None:
            self._opener.cancel()
        if isinstance(self.device, HostDevice):
            self._flag.set()
        else:
            self._value.value = self._turn

    def synchronize(self) -> None:
        """Waits for all that is on the stream."""
        if isinstance(self.device, HostDevice):
            self.stream.synchronize()
            return
        with cu.current(self.device.context) as driver:  # type: ignore[attr-defined]
            cu.check(driver.cuStreamSynchronize(self.stream), "cuStreamSynchronize")

    def finish(self) -> None:
        self.open()
        if isinstance(self.device, HostDevice):
            self.stream.synchronize()
            self.stream.close()
            return
        with cu.current(self.device.context) as driver:  # type: ignore[attr-defined]
            cu.check(driver.cuStreamSynchronize(self.stream), "cuStreamSynchronize")
            cu.check(driver.cuStreamDestroy(self.stream), "cuStreamDestroy")
        self.device.free_pinned(self._word)


@pytest.fixture
def gate(device: Device):  # type: ignore[no-untyped-def]
    made = Gate(device)
    yield made
    made.finish()


def pause() -> None:
    """Long enough for a transfer that does not wait to go wrong."""
    time.sleep(0.05)


def test_a_save_sees_what_the_stream_still_writes(device: Device, gate: Gate) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        cache.randomize()
        gate.shut()
        for tensor in cache.tensors:
            gate.write(tensor.buffer, 0x5A)
        ticket = engine.save_blocks(keys_of(1, 2), [3, 4], stream=gate.stream)
        pause()
        assert not ticket.done()
        gate.open()
        assert ticket.wait().all()
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(1, 2), [0, 1]).wait().all()
        written = [np.full_like(memory, 0x5A) for memory in poisoned]
        assert_same(cache.memory(), cache.expected(poisoned, written, [(3, 0), (4, 1)]))


def test_a_load_waits_for_what_the_stream_still_reads(device: Device, gate: Gate) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        cache.randomize()
        engine.save_blocks(keys_of(1), [3]).wait()
        still_read = cache.randomize()
        copies = [device.allocate(tensor.buffer.nbytes) for tensor in cache.tensors]
        gate.shut()
        for copy, tensor in zip(copies, cache.tensors, strict=True):
            gate.copy(copy, tensor.buffer)
        ticket = engine.load_blocks(keys_of(1), [0], stream=gate.stream)
        pause()
        assert not ticket.done() and not ticket.mask.any()
        gate.open()
        assert ticket.wait().all()
        assert_same([copy.read() for copy in copies], still_read)


def test_a_stream_waits_for_a_ticket(device: Device, gate: Gate) -> None:
    """The gate holds a save; another stream is told to wait for the save before it overwrites the pages."""
    cache = PagedCache.plain(device)
    writer = Gate(device)
    with cache.engine() as engine:
        before = cache.randomize()
        gate.shut()
        ticket = engine.save_blocks(keys_of(1), [3], stream=gate.stream)
        ticket.add_to(writer.stream)
        for tensor in cache.tensors:
            writer.write(tensor.buffer, 0xEE)
        pause()
        if isinstance(device, HostDevice):  # a read of the GPU would wait for the gate
            assert_same(cache.memory(), before)
        gate.open()
        assert ticket.wait().all()
        writer.finish()
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(1), [9]).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(3, 9)]))


def test_a_key_is_visible_only_when_its_bytes_are_whole(device: Device, gate: Gate) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        cache.randomize()
        gate.shut()
        ticket = engine.save_blocks(keys_of(1, 2), [3, 4], stream=gate.stream)
        pause()
        assert not engine.check_blocks(keys_of(1, 2)).any()
        assert not engine.load_blocks(keys_of(1, 2), [5, 6]).wait().any()
        assert engine.get_stats().reserved_blocks == 2
        gate.open()
        assert ticket.wait().all()
        assert engine.check_blocks(keys_of(1, 2)).all()


def test_a_dropped_ticket_is_settled_by_the_next_call(device: Device, gate: Gate) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        gate.shut()
        engine.save_blocks(keys_of(1), [3], stream=gate.stream)
        gate.open()
        deadline = time.monotonic() + 10
        while not engine.check_blocks(keys_of(1))[0]:
            assert time.monotonic() < deadline
        stats = engine.get_stats()
        assert (stats.resident_blocks, stats.reserved_blocks) == (1, 0)


def test_a_second_save_of_a_running_one_waits_for_it(device: Device, gate: Gate) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        cache.randomize()
        gate.shut()
        first = engine.save_blocks(keys_of(1, 2), [3, 4], stream=gate.stream)
        second = engine.save_blocks(keys_of(2, 7), [5, 6])
        assert second.nbytes == cache.layout.record_bytes
        pause()
        assert not second.done() and not second.mask.any()
        gate.open()
        assert second.wait().all() and first.wait().all()
        assert engine.check_blocks(keys_of(1, 2, 7)).all()


def test_slots_in_use_are_never_evicted(device: Device, gate: Gate) -> None:
    cache = PagedCache.plain(device)
    with cache.engine(slots=4) as engine:
        before = cache.randomize()
        engine.save_blocks(keys_of(1, 2), [1, 2]).wait()
        gate.shut()
        loading = engine.load_blocks(keys_of(1, 2), [8, 9], stream=gate.stream)
        saving = engine.save_blocks(keys_of(3), [3], stream=gate.stream)
        numbers = "2 slots asked for: 1 of 4 are free, 0 may be evicted.*2 are pinned, 1 are reserved"
        with pytest.raises(PoolFullError, match=numbers):
            engine.save_blocks(keys_of(4, 5), [4, 5])
        gate.open()
        assert loading.wait().all() and saving.wait().all()
        assert_same(cache.memory(), cache.expected(before, before, [(1, 8), (2, 9)]))
        assert engine.save_blocks(keys_of(4, 5), [4, 5]).wait().all()


def test_a_wait_has_a_deadline_and_may_be_repeated(device: Device, gate: Gate) -> None:
    cache = PagedCache.plain(device)
    with cache.engine(transfer_timeout_s=0.2) as engine:
        gate.shut()
        ticket = engine.save_blocks(keys_of(1), [3], stream=gate.stream)
        began = time.monotonic()
        with pytest.raises(TransferTimeoutError, match="was not done after 0.05 s"):
            ticket.wait(timeout=0.05)
        with pytest.raises(TransferTimeoutError, match="0.2 s"):
            ticket.wait()
        assert 0.2 < time.monotonic() - began < 5
        assert engine.get_stats().reserved_blocks == 1
        with pytest.raises(TransferTimeoutError, match="1 transfers are still running"):
            engine.shutdown(timeout=0.05)
        gate.open()
        assert ticket.wait(10).all()
        engine.shutdown()


def test_a_dropped_engine_waits_for_its_transfers(device: Device, gate: Gate) -> None:
    cache = PagedCache.plain(device)
    engine = cache.engine(transfer_timeout_s=20.0)
    before = cache.randomize()
    gate.shut()
    engine.save_blocks(keys_of(1), [3], stream=gate.stream)
    parts = engine._parts
    threading.Timer(0.1, gate.open).start()
    del engine
    assert poll(lambda: parts.arena._mapping is None, time.monotonic() + 20)
    assert parts.index.counts().resident == 1 and not parts.arena._registered and parts.arena._mapping is None
    assert_same(cache.memory(), before)
