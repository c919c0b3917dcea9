"""What waits for what on a GPU, by streams and events: calls of compiled code that holds no GIL."""

from __future__ import annotations

import numpy as np

from kvortex.devices.driver import CTX_POP, CTX_PUSH, EVENT_RECORD, STREAM_WAIT
from kvortex.devices.native import call
from kvortex.jit import njit
from kvortex.transfer.issue.cells import CALLER_EVENT, CONTEXT, ERROR, JOIN_STREAM


@njit(nogil=True)
def follow_stream(functions, stream, other, event):  # type: ignore[no-untyped-def]
    """Makes a stream wait for what is on another one now, by an event; the first error code."""
    code = call(functions[EVENT_RECORD], (event, other))
    if not code:
        code = call(functions[STREAM_WAIT], (stream, event, 0))
    return code


@njit(nogil=True)
def join(functions, lane, streams, joins, first, used):  # type: ignore[no-untyped-def]
    """Makes the join stream wait for ``used`` streams from ``first`` on, all of them whatever fails; the first error code."""
    error = np.int32(0)
    for at in range(used):
        k = (first + at) % len(streams)
        code = follow_stream(functions, lane[JOIN_STREAM], streams[k], joins[k])
        if not error:
            error = code
    return error


@njit(nogil=True)
def hand_over(functions, lane, streams, joins, scratch, outcome):  # type: ignore[no-untyped-def]
    """Makes every stream of a lane wait for all that is on the others: staging buffers pass from one route to another.

    ``streams`` and ``joins`` are (s,) int64. ``outcome`` gets the first error, and nothing else.
    """
    error = call(functions[CTX_PUSH], (lane[CONTEXT],))
    if error:
        outcome[ERROR] = error
        return
    error = join(functions, lane, streams, joins, 0, len(streams))
    if not error:
        error = call(functions[EVENT_RECORD], (lane[CALLER_EVENT], lane[JOIN_STREAM]))
    for stream in streams:
        if not error:
            error = call(functions[STREAM_WAIT], (stream, lane[CALLER_EVENT], 0))
    call(functions[CTX_POP], (scratch.ctypes.data,))
    outcome[ERROR] = error


@njit(nogil=True)
def follow(functions, stream, events):  # type: ignore[no-untyped-def]
    """Makes a stream wait for events that are recorded already; the first error code."""
    for event in events:
        code = call(functions[STREAM_WAIT], (stream, event, 0))
        if code:
            return code
    return np.int32(0)
