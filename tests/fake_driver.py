"""A stand-in for ``cuda.bindings.driver``: records every call, answers with new handles, and fails where it is told to."""

from __future__ import annotations

import contextlib
import enum
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import cuda.bindings

from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaBuffer, CudaDevice

# Functions of the driver that give nothing but a code, told apart by their names.
_NO_VALUE = ("Destroy", "Free", "Synchronize", "Set", "Push", "Record", "Wait", "Init", "Register", "Unload", "Memcpy")


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_CONTEXT_IS_DESTROYED = 709
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906


class FakeDriver:
    """Any ``cuSomething`` can be called.

    Attributes
    ----------
    calls : list of (name, arguments)
    answers : dict
        Values of a function, or a callable that makes the whole answer, code included.
    fails : dict
        Of a function: the code, and how many calls go well before.
    """

    CUresult = Result

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.answers = answers
        self.fails: dict[str, tuple[int, int]] = {}
        self._handles = itertools.count(0x1000)

    def cuGetErrorString(self, code: int) -> tuple[int, bytes | None]:
        return 0, {2: b"out of memory", 100: b"no CUDA-capable device is detected"}.get(int(code))

    def CUmemPoolProps(self) -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace())

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        """Arguments of the calls of these functions, in order."""
        return [arguments for name, arguments in self.calls if name in names]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("CU_"):
            return 1
        if not name.startswith("cu"):
            return SimpleNamespaceOf(name)
        return self._function(name)

    def _function(self, name: str) -> Callable[..., tuple[Any, ...]]:
        no_value = _has_no_value(name)

        def function(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            code, spare = self.fails.get(name, (0, 0))
            if code and len(self.named(name)) > spare:
                return (Result(code),) if no_value else (Result(code), None)
            if name in self.answers:
                answer = self.answers[name]
                return answer(*arguments) if callable(answer) else (Result(0), answer)
            if no_value:
                return (Result(0),)
            return Result(0), next(self._handles)

        return function


@functools.cache
def _has_no_value(name: str) -> bool:
    return any(word.lower() in name.lower() for word in _NO_VALUE)


class SimpleNamespaceOf:
    """An enumeration whose members are their own names."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, member: str) -> str:
        return f"{self._name}.{member}"


@contextlib.contextmanager
def installed(driver: Any) -> Iterator[Any]:
    """Puts a module in the place of ``cuda.bindings.driver``, and afterwards everything back.

    Buffers that outlive this are disarmed: their collection would take an invented context to the driver of a real GPU,
    which crashes on it.
    """
    import cuda.bindings.driver as real

    made: list[weakref.ref[CudaBuffer]] = []
    init = CudaBuffer.__init__

    def noted(self: CudaBuffer, device: CudaDevice, nbytes: int) -> None:
        made.append(weakref.ref(self))
        init(self, device, nbytes)

    def forget() -> None:
        cu.api.cache_clear()
        cu.functions.cache_clear()

    forget()
    cuda.bindings.driver = driver
    CudaBuffer.__init__ = noted  # type: ignore[method-assign]
    try:
        yield driver
    finally:
        CudaBuffer.__init__ = init  # type: ignore[method-assign]
        for reference in made:
            if (buffer := reference()) is not None:
                buffer.address = 0
        cuda.bindings.driver = real
        forget()
