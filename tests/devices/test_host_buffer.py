"""The host device's memory: aligned, bounded, and copied in and out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvortex.devices import HostDevice
from kvortex.devices.host import HostBuffer
from kvortex.errors import ArgumentError, DeviceError


@pytest.mark.parametrize("nbytes", [1, 255, 256, 257, 4096, 100_001])
def test_buffers_are_aligned_and_as_long_as_asked(nbytes: int) -> None:
    for _ in range(5):
        buffer = HostDevice().allocate(nbytes)
        assert buffer.address % 256 == 0 and buffer.nbytes == nbytes == len(buffer.array)
        assert buffer.array.ctypes.data == buffer.address


def test_a_buffer_of_no_bytes() -> None:
    buffer = HostBuffer(0)
    buffer.write(np.empty(0, np.uint8))
    assert buffer.nbytes == len(buffer.read()) == 0


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ArgumentError, match="a buffer of -1 bytes cannot be"):
        HostBuffer(-1)


@pytest.mark.parametrize("nbytes", [-1, 0, True, np.True_, 1.5, 1 << 63, 1 << 70, 10**5000, "x", None, np.array([1]), int],
                         ids=lambda nbytes: type(nbytes).__name__)  # fmt: skip
def test_what_is_no_size(nbytes: Any) -> None:
    device = HostDevice()
    for call in (device.allocate, device.allocate_pinned):
        with pytest.raises(ArgumentError, match="nbytes = .*: must be an integer from 1 to "):
            call(nbytes)


@pytest.mark.parametrize("nbytes", [1 << 62, (1 << 63) - 1])
def test_more_memory_than_there_is(nbytes: int) -> None:
    device = HostDevice()
    for call in (device.allocate, device.allocate_pinned):
        with pytest.raises(DeviceError, match=f"cannot allocate {nbytes} bytes"):
            call(nbytes)


def test_sizes_of_any_integer_type() -> None:
    for nbytes in (np.int64(8), np.uint8(8), np.array(8)):
        assert HostDevice().allocate(nbytes).nbytes == 8


def test_write_and_read_at_an_offset() -> None:
    buffer = HostBuffer(64)
    buffer.write(np.full(64, 7, np.uint8))
    buffer.write(np.arange(4, dtype=np.int32), 8)
    seen = buffer.read()
    assert seen[8:24].view(np.int32).tolist() == [0, 1, 2, 3]
    assert (seen[:8] == 7).all() and (seen[24:] == 7).all()
    assert (buffer.read(8, 16) == seen[8:24]).all() and (buffer.read(60) == 7).all() and len(buffer.read(64)) == 0


def test_write_takes_what_is_not_contiguous() -> None:
    buffer = HostBuffer(12)
    whole = np.arange(12, dtype=np.uint8).reshape(3, 4)
    buffer.write(whole.T)
    assert buffer.read().tolist() == whole.T.ravel().tolist()


def test_read_is_a_copy() -> None:
    buffer = HostBuffer(8)
    buffer.write(np.zeros(8, np.uint8))
    buffer.read()[:] = 9
    assert not buffer.read().any()


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 65), (1, 64), (64, 1), (65, 0), (-1, 1), (1000, 1)])
def test_bounds(offset: int, nbytes: int) -> None:
    buffer = HostBuffer(64)
    buffer.write(np.zeros(64, np.uint8))
    with pytest.raises(ArgumentError, match="are not inside a buffer of 64 bytes"):
        buffer.write(np.ones(nbytes, np.uint8), offset)
    with pytest.raises(ArgumentError, match="are not inside a buffer of 64 bytes"):
        buffer.read(offset, nbytes)
    assert not buffer.read().any()


@pytest.mark.parametrize(("offset", "nbytes"), [(65, None), (0, -1), (5, -5)])
def test_bounds_of_reads_alone(offset: int, nbytes: int | None) -> None:
    with pytest.raises(ArgumentError, match="are not inside"):
        HostBuffer(64).read(offset, nbytes)


def test_free_may_be_called_twice() -> None:
    buffer = HostBuffer(8)
    buffer.free()
    buffer.free()


def test_pinned_memory_is_kept_until_it_is_freed() -> None:
    device = HostDevice()
    first, second = device.allocate_pinned(100), device.allocate_pinned(100)
    assert first != second and first % 256 == second % 256 == 0
    device.free_pinned(first)
    with pytest.raises(KeyError):
        device.free_pinned(first)
    device.free_pinned(second)


def test_what_the_host_says_of_itself() -> None:
    device = HostDevice()
    assert device.name == device.describe()["device"] == "host" and device.describe()["cores"] > 0
    assert device.numa_node() is None and device.owner_of(1234) is None
