"""Short questions to the driver, each in one call of compiled code.

Through cuda-python a question takes five calls: the context and the capture mode are set before and put back behind it. Each of
them gives the GIL up, and where other threads want it, that is five times their switch interval.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvortex.devices.driver import CAPTURE_MODE, CTX_GET, CTX_SET, STREAM_CAPTURING, STREAM_QUERY
from kvortex.devices.native import call
from kvortex.devices.threads import busy_address
from kvortex.jit import njit

NOT_READY = 600  # CUDA_ERROR_NOT_READY
CAPTURE_IMPLICIT = 906  # CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: see kvortex.devices.driver.current
_SAVED, _MODE, _STATUS = range(_CELLS := 3)
Functions: TypeAlias = npt.NDArray[np.int64]
Streams: TypeAlias = npt.NDArray[np.int64]


@njit(nogil=True)
def _relax(functions, mode):  # type: ignore[no-untyped-def]
    """Has questions not end a graph that another thread captures; whether that could not be done. ``mode`` is (1,) int64."""
    mode[0] = _RELAXED
    return call(functions[CAPTURE_MODE], (mode.ctypes.data,))


@njit(nogil=True)
def _enter(functions, context, cells):  # type: ignore[no-untyped-def]
    """Makes a context current, and keeps which one was; a code."""
    code = call(functions[CTX_GET], (cells[_SAVED:].ctypes.data,))
    if not code and cells[_SAVED] != context:
        code = call(functions[CTX_SET], (context,))
    return code


@njit(nogil=True)
def _leave(functions, context, cells):  # type: ignore[no-untyped-def]
    if cells[_SAVED] != context:
        call(functions[CTX_SET], (cells[_SAVED],))


@njit(nogil=True)
def ask_relaxed(functions, which, a, b, c, mode):  # type: ignore[no-untyped-def]
    """Asks in the context that is current, so that a graph which another thread captures goes on; ``mode`` is (1,) int64, of
    nothing that outlives the call."""
    unset = _relax(functions, mode)
    code = call(functions[which], (a, b, c))  # of which a function takes as many as it has parameters
    if not unset:
        call(functions[CAPTURE_MODE], (mode.ctypes.data,))
    return code


@njit(nogil=True)
def _ask(functions, context, which, a, b, c, cells):  # type: ignore[no-untyped-def]
    code = _enter(functions, context, cells)
    if code:
        return code
    code = ask_relaxed(functions, which, a, b, c, cells[_MODE:])
    _leave(functions, context, cells)
    return code


@njit(nogil=True)
def _ask_capture(functions, context, stream, cells):  # type: ignore[no-untyped-def]
    return _ask(functions, context, STREAM_CAPTURING, stream, cells[_STATUS:].ctypes.data, 0, cells)


@njit(nogil=True)
def _ask_streams(functions, context, streams, cells):  # type: ignore[no-untyped-def]
    code = _enter(functions, context, cells)
    if code:
        return code
    mode = cells[_MODE:]
    unset = _relax(functions, mode)
    for stream in streams:
        code = call(functions[STREAM_QUERY], (stream, 0, 0))
        if code:
            break
    if not unset:
        call(functions[CAPTURE_MODE], (mode.ctypes.data,))
    _leave(functions, context, cells)
    return code


@functools.cache
def load_compiled() -> None:
    """Loads what is compiled, once in a process: an interrupt in the middle of that can abort the process inside LLVM."""
    ask(np.full(CTX_GET + 1, busy_address()), 0, 0, 0)
    ask_capture(np.full(CTX_GET + 1, busy_address()), 0, 0)
    ask_streams(np.full(CTX_GET + 1, busy_address()), 0, np.zeros(1, np.int64))


def ask(functions: Functions, context: int, which: int, a: int, b: int = 0, c: int = 0) -> int:
    """Calls a function of the driver that does not block, and gives its code.

    Parameters
    ----------
    functions
        Of :func:`kvortex.devices.driver.functions`.
    context
        In which; the calling thread gets its own one back.
    which
        Index of a function of up to three integers.
    a, b, c
        Its arguments.
    """
    return int(_ask(functions, context, which, a, b, c, np.zeros(_CELLS, np.int64)))


def ask_capture(functions: Functions, context: int, stream: int) -> tuple[int, int]:
    """The code and the status of ``cuStreamIsCapturing``; see :func:`ask`."""
    cells = np.zeros(_CELLS, np.int64)
    return int(_ask_capture(functions, context, stream, cells)), int(cells[_STATUS])


def ask_streams(functions: Functions, context: int, streams: Streams) -> int:
    """The first code of ``cuStreamQuery`` of some streams, (n,), that is not 0, or 0; see :func:`ask`. The context and the mode
    are set once for all; asked one by one from Python they take some 5 us each, on caches that Python has emptied."""
    return int(_ask_streams(functions, context, streams, np.zeros(_CELLS, np.int64)))
