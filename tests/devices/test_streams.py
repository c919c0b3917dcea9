"""Every kind of object that callers pass as a CUDA stream, and those that are none."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from kvortex.devices.streams import cuda_stream_handle
from kvortex.errors import ArgumentError


class Protocol:
    """As cuda.core has it: a method."""

    def __init__(self, pair: Any) -> None:
        self._pair = pair

    def __cuda_stream__(self) -> Any:
        return self._pair


class PropertyProtocol:
    """The older form: an attribute."""

    def __init__(self, pair: Any) -> None:
        self.__cuda_stream__ = pair


class With:
    """An object with one attribute."""

    def __init__(self, name: str, value: Any) -> None:
        setattr(self, name, value)


class OnlyInt:
    """A driver handle of cuda-python before 13, which has ``__int__`` and no ``__index__``."""

    def __int__(self) -> int:
        return 77


GOOD = {
    "none": (None, 0),
    "the default stream": (0, 0),
    "the legacy stream": (1, 1),
    "the per-thread stream": (2, 2),
    "a handle": (0x7F00_1234_5678, 0x7F00_1234_5678),
    "int32": (np.int32(5), 5),
    "int64": (np.int64(1 << 40), 1 << 40),
    "uint64": (np.uint64(1 << 47), 1 << 47),
    "an array of no axis": (np.array(9), 9),
    "a method": (Protocol((0, 41)), 41),
    "a method that gives a list": (Protocol([0, 41]), 41),
    "an attribute": (PropertyProtocol((0, 42)), 42),
    "a protocol with a numpy handle": (Protocol((np.int64(0), np.uint64(43))), 43),
    "torch": (With("cuda_stream", 44), 44),
    "torch, default": (With("cuda_stream", 0), 0),
    "CuPy": (With("ptr", 45), 45),
    "Numba before 0.27": (With("handle", ctypes.c_void_p(46)), 46),
    "Numba before 0.27, default": (With("handle", ctypes.c_void_p(0)), 0),
    "a handle object": (With("handle", OnlyInt()), 77),
    "a bare handle object": (OnlyInt(), 77),
    "a bare c_void_p": (ctypes.c_void_p(47), 47),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_form_of_a_stream(name: str) -> None:
    stream, wanted = GOOD[name]
    handle = cuda_stream_handle(stream)
    assert handle == wanted and type(handle) is int


def test_a_null_c_void_p_has_no_value() -> None:
    """What makes the default stream of Numba special: ctypes says None for 0."""
    assert ctypes.c_void_p(0).value is None


def test_the_protocol_goes_before_the_attributes() -> None:
    stream = Protocol((0, 1234))
    stream.ptr = stream.handle = stream.cuda_stream = 99  # type: ignore[attr-defined]
    assert cuda_stream_handle(stream) == 1234


def test_driver_handles_of_cuda_python() -> None:
    from cuda.bindings import driver

    assert cuda_stream_handle(driver.CUstream(0x1234)) == 0x1234
    assert cuda_stream_handle(With("handle", driver.CUstream(0x1234))) == 0x1234


def test_streams_of_numba() -> None:
    numba_driver = pytest.importorskip("numba.cuda.cudadrv.driver")
    if not hasattr(numba_driver, "binding"):
        pytest.skip("the simulator has no streams")
    handle = numba_driver.binding.CUstream(0x1234)
    assert cuda_stream_handle(numba_driver.Stream(handle)) == 0x1234
    assert cuda_stream_handle(numba_driver.Stream(numba_driver.binding.CUstream(0))) == 0


@pytest.mark.gpu
def test_streams_of_cuda_core() -> None:
    from cuda.core import Device

    device = Device(0)
    device.set_current()
    stream = device.create_stream()
    assert cuda_stream_handle(stream) == int(stream.handle) > 2
    stream.close()


BAD = {
    "a word": "stream",
    "a number in a word": "5",
    "bytes": b"5",
    "true": True,
    "false": False,
    "negative": -1,
    "negative numpy": np.int64(-5),
    "a float": 3.0,
    "a numpy float": np.float64(3.0),
    "a small float": np.float32(3.0),
    "an object": object(),
    "a list": [1],
    "an array": np.zeros(3, np.int64),
    "the wrong version": Protocol((1, 5)),
    "three numbers": Protocol((0, 5, 5)),
    "one number": Protocol((0,)),
    "no pair": Protocol(5),
    "an attribute of the wrong version": PropertyProtocol((7, 5)),
    "a protocol with a word": Protocol((0, "5")),
    "a protocol with a negative handle": Protocol((0, -5)),
    "torch with a word": With("cuda_stream", "5"),
    "a handle that is a float": With("handle", 2.5),
    "a pointer of a function": With("ptr", print),
    "a protocol with a bool": Protocol((0, True)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_stream_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match="is no (CUDA )?stream|expected \\(0, handle\\)"):
        cuda_stream_handle(BAD[name])


class Raises:
    """As a stream of a library whose GPU is lost."""

    def __init__(self, name: str, error: BaseException) -> None:
        self._name, self._error = name, error

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise self._error
        raise AttributeError(name)


class RaisesWhenCalled:
    def __cuda_stream__(self) -> Any:
        raise RuntimeError("the stream was destroyed")


@pytest.mark.parametrize("name", ["__cuda_stream__", "cuda_stream", "ptr", "handle", "__int__"])
def test_whatever_a_foreign_stream_raises_is_a_refusal(name: str) -> None:
    with pytest.raises(ArgumentError, match="Raises cannot be read as a CUDA stream: ZeroDivisionError: lost") as caught:
        cuda_stream_handle(Raises(name, ZeroDivisionError("lost")))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ArgumentError, match="RuntimeError: the stream was destroyed"):
        cuda_stream_handle(RaisesWhenCalled())
    with pytest.raises(KeyboardInterrupt):
        cuda_stream_handle(Raises(name, KeyboardInterrupt()))


def test_a_refusal_names_the_type_and_the_way_out() -> None:
    with pytest.raises(ArgumentError, match="str 'fast' is no CUDA stream: pass an int handle or an object with __cuda_str"):
        cuda_stream_handle("fast")
    with pytest.raises(ArgumentError, match=r"__cuda_stream__ of Protocol gave \(1, 5\); expected \(0, handle\)"):
        cuda_stream_handle(Protocol((1, 5)))
