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
def ask_relaxed(functions, which, a, b, c, mode):  # type: ignore[no-untyped-def]
    """Asks in the context that is current, so that a graph which another thread captures goes on; ``mode`` is (1,) int64, of
    nothing that outlives the call."""
    mode[0] = _RELAXED
    unset = call(functions[CAPTURE_MODE], (mode.ctypes.data,))
    code = call(functions[which], (a, b, c))  # of which a function takes as many as it has parameters
    if not unset:
        call(functions[CAPTURE_MODE], (mode.ctypes.data,))
    return code


@njit(nogil=True)
def _ask(functions, context, which, a, b, c, cells):  # type: ignore[no-untyped-def]
    code = call(functions[CTX_GET], (cells[_SAVED:].ctypes.data,))
    if code:
        return code
    foreign = cells[_SAVED] != context
    if foreign:
        code = call(functions[CTX_SET], (context,))
        if code:
            return code
    code = ask_relaxed(functions, which, a, b, c, cells[_MODE:])
    if foreign:
        call(functions[CTX_SET], (cells[_SAVED],))
    return code


@njit(nogil=True)
def _ask_capture(functions, context, stream, cells):  # type: ignore[no-untyped-def]
    return _ask(functions, context, STREAM_CAPTURING, stream, cells[_STATUS:].ctypes.data, 0, cells)


@njit(nogil=True)
def _ask_streams(functions, context, streams, cells):  # type: ignore[no-untyped-def]
    for stream in streams:
        code = _ask(functions, context, STREAM_QUERY, stream, 0, 0, cells)
        if code:
            return code
    return np.int32(0)


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
    """The first code of ``cuStreamQuery`` of some streams, (n,), that is not 0, or 0; see :func:`ask`. Asked one by one from
    Python they take some 5 us each, on caches that Python has emptied."""
    return int(_ask_streams(functions, context, streams, np.zeros(_CELLS, np.int64)))
