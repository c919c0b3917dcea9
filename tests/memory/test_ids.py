"""Pinned arrays of block ids: few sizes, reused, never handed to two at once, all freed at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from kvortex.errors import DeviceError
from kvortex.memory import ids as module
from kvortex.memory.ids import IdBuffer, IdPool
from tests.memory.recording import RecordingDevice

SIZES = [
    (0, 1024),
    (1, 1024),
    (1024, 1024),
    (1025, 4096),
    (4096, 4096),
    (4097, 16384),
    (16385, 65536),
    (100_000, 262_144),
]


def inside(device: RecordingDevice, buffer: IdBuffer) -> bool:
    """Whether a buffer lies in one of the device's pinned allocations."""
    end = buffer.address + 4 * buffer.capacity
    return any(at <= buffer.address and end <= at + memory.nbytes for at, memory in device._pinned.items())


@pytest.mark.parametrize(("count", "capacity"), SIZES)
def test_sizes_are_powers_of_four(count: int, capacity: int) -> None:
    device = RecordingDevice()
    pool = IdPool(device)
    buffer = pool.take(count)
    assert buffer.capacity == len(buffer.ids) == capacity >= count and inside(device, buffer)
    assert buffer.ids.dtype == np.int32 and buffer.ids.ctypes.data == buffer.address
    pool.close()


def test_buffers_do_not_overlap() -> None:
    """Those that are made at the start share an allocation."""
    device = RecordingDevice()
    pool = IdPool(device)
    buffers = [pool.take(count) for count in [1] * 20 + [4000] * 10 + [10_000] * 6 + [60_000] * 2]
    for number, buffer in enumerate(buffers):
        buffer.ids[:] = number
    assert all((buffer.ids == number).all() and inside(device, buffer) for number, buffer in enumerate(buffers))
    pool.close()


def test_usual_transfers_allocate_nothing() -> None:
    """Pinning while a GPU is busy may wait for it, so that must not happen at a transfer."""
    device = RecordingDevice()
    pool = IdPool(device)
    made = len(device.log)
    ready = [pool.take(capacity) for capacity, count in module._READY for _ in range(count)]
    assert len(device.log) == made and len({buffer.address for buffer in ready}) == len(ready)
    pool.take(1)
    assert len(device.log) == made + 1
    pool.close()


def test_a_buffer_is_reused_after_it_was_given_back_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READY", ((1024, 1),))
    device = RecordingDevice()
    pool = IdPool(device)
    first, second = pool.take(10), pool.take(20)
    assert first is not second and first.address != second.address
    pool.give(first)
    assert pool.take(5000) is not first, "another size"
    assert pool.take(1000) is first
    pool.give(first)
    pool.give(second)
    assert {id(pool.take(1)), id(pool.take(1))} == {id(first), id(second)}
    assert len(device._pinned) == 3
    pool.close()


def test_close_frees_everything_once_also_what_was_not_given_back() -> None:
    device = RecordingDevice()
    pool = IdPool(device)
    pool.take(100_000)
    pool.give(pool.take(100_000))
    allocations = len(device._pinned)
    assert allocations == 3
    pool.close()
    pool.close()
    assert not device._pinned and [word for word, _ in device.log].count("free") == allocations


def test_close_goes_on_where_the_driver_refuses() -> None:
    """After a GPU fault every free fails; whoever closes has more to free behind this."""
    device = RecordingDevice()
    pool = IdPool(device)
    for count in (20_000, 20_000, 80_000):
        pool.take(count)
    device.refuses_to_undo = True
    pool.close()
    assert not device._pinned


def test_a_refused_allocation_leaves_the_pool_usable() -> None:
    device = RecordingDevice(allocations_before_refusal=2)
    pool = IdPool(device)
    first = pool.take(50_000)
    with pytest.raises(DeviceError, match="no memory left"):
        pool.take(50_000)
    pool.give(first)
    assert pool.take(50_000) is first
    pool.close()
    assert not device._pinned


def test_threads_never_share_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READY", ((1024, 1),))
    device = RecordingDevice()
    pool = IdPool(device)
    wrong: list[int] = []

    def work(me: int) -> None:
        for turn in range(300):
            buffer = pool.take(1 if turn % 3 else 2000)
            buffer.ids[:512] = me
            if (buffer.ids[:512] != me).any():
                wrong.append(me)
            buffer.ids[512:1024] = me
            if (buffer.ids[:1024] != me).any():
                wrong.append(me)
            pool.give(buffer)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(device._pinned) <= 12
    pool.close()
    assert not device._pinned


class Meddling(list):  # type: ignore[type-arg]
    """Lets another thread in right behind an ``append``, which is where the interpreter may."""

    def __init__(self, other: Callable[[], object]) -> None:
        self._other: Callable[[], object] | None = other

    def append(self, item: object) -> None:
        super().append(item)
        other, self._other = self._other, None
        if other is not None:
            other()


@pytest.mark.parametrize("which", ["_all", "_mirrors"])
def test_a_thread_in_the_middle_of_another_gets_memory_of_its_own(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    pool, found = IdPool(RecordingDevice()), []
    monkeypatch.setattr(pool, which, Meddling(lambda: found.append(pool.take(100_000))))
    found.append(pool.take(100_000))
    (first, second) = found
    assert first.address != second.address and first.mirror != second.mirror


@pytest.mark.gpu
def test_pinned_by_a_gpu() -> None:
    from kvortex.devices.cuda import CudaDevice

    device = CudaDevice()
    pool = IdPool(device)
    for count in (1, 2000, 100_000):
        buffer = pool.take(count)
        buffer.ids[:] = 5
        assert device.owner_of(buffer.address) == "host"
    pool.close()
