"""What buffers of both devices refuse: offsets, lengths and arrays that are none, and everything once they are free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.devices import Device, DeviceBuffer, HostDevice
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import ArgumentError
from tests.fake_gpu import fake_gpu


@pytest.fixture(params=["host", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    if request.param == "host":
        yield HostDevice()
    else:
        with fake_gpu(monkeypatch):
            yield CudaDevice()


@pytest.fixture
def buffer(device: Device) -> DeviceBuffer:
    made = device.allocate(64)
    made.write(np.arange(64, dtype=np.uint8))
    return made


@pytest.mark.parametrize("bad", [1.5, "1", None, True, np.True_, np.array([1, 2]), 1 << 70, object()], ids=repr)
def test_an_offset_or_length_that_is_no_integer(buffer: DeviceBuffer, bad: Any) -> None:
    with pytest.raises(ArgumentError, match="offset = .*: must be an integer"):
        buffer.read(bad)
    with pytest.raises(ArgumentError, match="offset = .*: must be an integer"):
        buffer.write(np.zeros(1, np.uint8), bad)
    if bad is not None:
        with pytest.raises(ArgumentError, match="nbytes = .*: must be an integer"):
            buffer.read(0, bad)
    assert (buffer.read() == np.arange(64)).all()


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 65), (1, 64), (64, 1), (65, 0), (-1, 1), (1000, 1)])
def test_bounds(buffer: DeviceBuffer, offset: int, nbytes: int) -> None:
    with pytest.raises(ArgumentError, match="are not inside a buffer of 64 bytes"):
        buffer.write(np.ones(nbytes, np.uint8), offset)
    with pytest.raises(ArgumentError, match="are not inside a buffer of 64 bytes"):
        buffer.read(offset, nbytes)
    assert (buffer.read() == np.arange(64)).all()


def test_integers_of_any_type(buffer: DeviceBuffer) -> None:
    buffer.write(np.full((2, 2), 0x0101, np.uint16).T, np.int32(8))
    assert (buffer.read(np.uint8(8), np.int64(8)) == 1).all() and buffer.read(16)[0] == 16


@pytest.mark.parametrize("data", [np.array([object()]), [None], np.array(["x"], object)], ids=["object", "none", "words"])
def test_pointers_are_no_data(buffer: DeviceBuffer, data: Any) -> None:
    with pytest.raises(ArgumentError, match="data must be an array of numbers; seen: dtype object"):
        buffer.write(data)


def test_masked_data(buffer: DeviceBuffer) -> None:
    with pytest.raises(ArgumentError, match="data is a masked array"):
        buffer.write(np.ma.array([1, 2], mask=[0, 1]))


def test_a_freed_buffer_has_no_bytes(buffer: DeviceBuffer) -> None:
    buffer.free()
    for call in (lambda: buffer.read(0, 1), lambda: buffer.write(np.zeros(1, np.uint8))):
        with pytest.raises(ArgumentError, match="are not inside a buffer of 0 bytes"):
            call()
