"""Copies of the driver, issued between two events by compiled loops that hold no GIL: what compiled engines do."""

from __future__ import annotations

import numpy as np

from kvortex.devices.driver import CTX_POP, CTX_PUSH, EVENT_RECORD
from kvortex.devices.native import call
from kvortex.jit import njit

CONTEXT, STREAM, FIRST, LAST, POPPED = range(CLOCK_CELLS := 5)  # cells of a :class:`perf.clock.CudaClock`
TARGETS, SOURCES, SIZES = range(TABLE_ROWS := 3)  # rows of a table of copies


@njit(nogil=True)
def copy_each(functions, clock, which, table):  # type: ignore[no-untyped-def]
    """One call of the driver a copy.

    Parameters
    ----------
    functions : int64
        Of :func:`kvortex.devices.driver.functions`.
    clock : (CLOCK_CELLS,) int64
    which : int
        Index of ``cuMemcpyDtoHAsync`` or ``cuMemcpyHtoDAsync``.
    table : (TABLE_ROWS, m) int64
        Target and source addresses, and bytes.

    Returns
    -------
    int
        The first error code. The last event is recorded in any case.
    """
    code = call(functions[CTX_PUSH], (clock[CONTEXT],))
    if code:
        return code
    stream = clock[STREAM]
    code = call(functions[EVENT_RECORD], (clock[FIRST], stream))
    for at in range(table.shape[1]):
        if code:
            break
        code = call(functions[which], (table[TARGETS, at], table[SOURCES, at], table[SIZES, at], stream))
    last = call(functions[EVENT_RECORD], (clock[LAST], stream))
    call(functions[CTX_POP], (clock[POPPED:].ctypes.data,))
    return code if code else last


@njit(nogil=True)
def copy_batch(functions, clock, batch, with_fail_index, table, attributes):  # type: ignore[no-untyped-def]
    """All copies in one call of ``cuMemcpyBatchAsync``, whose address is ``batch``; otherwise as :func:`copy_each`.

    Parameters
    ----------
    with_fail_index : bool
        Whether the function takes the address of a failed copy's index, as that of CUDA 12.8 does.
    attributes : (3,) int64
        A ``CUmemcpyAttributes`` (cuda.h), the same for all copies.
    """
    code = call(functions[CTX_PUSH], (clock[CONTEXT],))
    if code:
        return code
    stream, count = clock[STREAM], table.shape[1]
    targets, sources, sizes = table[TARGETS].ctypes.data, table[SOURCES].ctypes.data, table[SIZES].ctypes.data
    for_all, failed = np.zeros(1, np.int64), np.zeros(1, np.int64)  # the attributes hold from copy 0 on
    head = (targets, sources, sizes, count, attributes.ctypes.data, for_all.ctypes.data, 1)
    code = call(functions[EVENT_RECORD], (clock[FIRST], stream))
    if not code:
        code = call(batch, (*head, failed.ctypes.data, stream)) if with_fail_index else call(batch, (*head, stream))
    last = call(functions[EVENT_RECORD], (clock[LAST], stream))
    call(functions[CTX_POP], (clock[POPPED:].ctypes.data,))
    return code if code else last
