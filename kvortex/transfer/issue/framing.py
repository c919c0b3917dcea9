"""What each way of issuing a plan begins and ends with, whatever fails between: in calls of compiled code that holds no GIL."""

from __future__ import annotations

from kvortex.devices.driver import CTX_POP, CTX_PUSH, EVENT_RECORD
from kvortex.devices.native import call, release
from kvortex.jit import njit
from kvortex.transfer.issue.cells import CALLER_EVENT, CONTEXT, ERROR, ISSUED, LAST, NO_STREAM


@njit(nogil=True)
def _tell(outcome, error, last):  # type: ignore[no-untyped-def]
    outcome[ERROR] = error
    outcome[LAST] = last
    release()
    outcome[ISSUED] = 1


@njit(nogil=True)
def begin(functions, lane, caller, outcome):  # type: ignore[no-untyped-def]
    """Makes a lane's context current, and records its event on the caller's stream, if there is one: whether that context is,
    and the error code. If it is not, nothing is issued, and ``outcome`` says so: an event that was never recorded counts as
    passed."""
    error = call(functions[CTX_PUSH], (lane[CONTEXT],))
    if error:
        _tell(outcome, error, 0)
        return False, error
    if caller != NO_STREAM:
        error = call(functions[EVENT_RECORD], (lane[CALLER_EVENT], caller))
    return True, error


@njit(nogil=True)
def end(functions, done, behind, error, last, scratch, outcome):  # type: ignore[no-untyped-def]
    """Records ``done`` on the stream ``behind``, puts the context back, and tells the first error code of the work, and the
    first of the events behind it: ``last``, if that is not 0."""
    code = call(functions[EVENT_RECORD], (done, behind))
    call(functions[CTX_POP], (scratch.ctypes.data,))
    _tell(outcome, error, last if last else code)
