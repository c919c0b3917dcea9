"""Kernels that are put on the GPU when they can begin, and not before.

A stream whose kernel waits on the GPU for the end of a copy costs others: with five of them DMAs took 2.67 ms where they take
2.43, and a prefill lost half a percent of its time (``docs/transfers.md``). So beside a computing model a lane's thread asks
whether the copy has ended, and issues the kernel then. Copies are issued ahead as ever, so the link does not wait for that
thread. Who needs the events behind a transfer at once, to make a stream wait for it, says so (``HURRIED``); from then on
everything is issued without a pause.
"""

from __future__ import annotations

import ctypes

from kvortex.devices.asking import NOT_READY, ask_relaxed
from kvortex.devices.driver import EVENT_QUERY
from kvortex.devices.native import call
from kvortex.jit import njit
from kvortex.transfer.cells import HURRIED, NAP, PACED, QUEUED

_NAP_US = 100  # the other buffers hold some milliseconds of the link
PACED_BYTES = 32 << 20  # what takes the link less than a few naps is not worth one


@njit(nogil=True)
def wait_for_event(functions, lane, event, scratch, outcome):  # type: ignore[no-untyped-def]
    """Naps until an event has passed, a plan is not to be paced or hurried on, or the driver has another answer, which the
    next call to it will give too."""
    while outcome[PACED] != 0 and outcome[QUEUED] > lane[HURRIED]:
        if ask_relaxed(functions, EVENT_QUERY, event, 0, 0, scratch) != NOT_READY:
            return
        call(lane[NAP], (_NAP_US,))


def nap_address() -> int:
    """Address of the C library's ``usleep``."""
    return ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value or 0
