"""Transfers beside a computing model: kernels are issued when they can begin, and copies at the pace of a share of the link.

A stream whose kernel waits on the GPU for the end of a copy costs others: with five of them DMAs took 2.67 ms where they take
2.43, and a prefill lost half a percent of its time (``docs/transfers.md``). So a lane's thread asks whether the copy has ended,
and issues the kernel then. And the fewer bytes move, the less that costs a model: so a share of the link can be set. Who needs
the events behind a transfer at once, to make a stream wait for it, says so (``HURRIED``); from then on everything is issued
without a pause.
"""

from __future__ import annotations

from kvortex.devices.asking import NOT_READY, ask_relaxed
from kvortex.devices.driver import EVENT_QUERY
from kvortex.devices.native import call, libc_address
from kvortex.jit import njit
from kvortex.transfer.issue.cells import CLOCK, DUE, FS_OF_BYTE, HURRIED, NAP, PACED, QUEUED
from kvortex.transfer.issue.dma import MODE, TIME
from kvortex.transfer.plan import COPY_BYTES, FIRST_COPY, LINES, N_COPIES

# For so long the link is to have something before it while this thread naps, as a plan and in the other buffers. Each nap costs
# some 10 or 20 µs of a CPU, so one that is known to be long is one nap.
PACED_S = 0.75e-3
_NAP_US, _LONG_NAP_US = 200, 300
_MONOTONIC = 1  # CLOCK_MONOTONIC
_MOST_FS = 1_000_000_000  # a microsecond for a byte: times the bytes of a buffer, that is a number of 64 bits
# So much of what copies of a plan, or of several without a pause, are late they may make up for, as when a model's kernel kept
# buffers from them. At 0.92 of the link a millisecond takes 12 to make up for.
_LATE_NS = 3_000_000


@njit(nogil=True)
def is_paced(lane, outcome):  # type: ignore[no-untyped-def]
    """Whether a plan waits for what comes now."""
    return outcome[PACED] != 0 and outcome[QUEUED] > lane[HURRIED]


@njit(nogil=True)
def has_passed(functions, lane, event, scratch, outcome):  # type: ignore[no-untyped-def]
    """Whether nothing is to be waited for: an event has passed, or the plan is not paced, or the driver has another answer,
    which the next call to it will give too."""
    return not is_paced(lane, outcome) or ask_relaxed(functions, EVENT_QUERY, event, 0, 0, scratch[MODE:]) != NOT_READY


@njit(nogil=True)
def _now(lane, scratch):  # type: ignore[no-untyped-def]
    call(lane[CLOCK], (_MONOTONIC, scratch[TIME:].ctypes.data))
    return scratch[TIME] * 1_000_000_000 + scratch[TIME + 1]


@njit(nogil=True)
def begin_turns(lane, scratch, outcome):  # type: ignore[no-untyped-def]
    """Ahead of a plan: who comes behind a pause is not late."""
    if lane[FS_OF_BYTE] != 0 and is_paced(lane, outcome):
        now = _now(lane, scratch)
        if now - lane[DUE] > _LATE_NS:
            lane[DUE] = now


@njit(nogil=True)
def is_due(lane, scratch, outcome):  # type: ignore[no-untyped-def]
    """Whether the next copies' turn has come."""
    return lane[FS_OF_BYTE] == 0 or not is_paced(lane, outcome) or _now(lane, scratch) >= lane[DUE]


@njit(nogil=True)
def take_turn(lane, copies, chunk, scratch, outcome):  # type: ignore[no-untyped-def]
    """Puts off the next turn by what the copies of a chunk are to take; not for who is hurried: no other owes those bytes."""
    if lane[FS_OF_BYTE] != 0 and is_paced(lane, outcome):
        nbytes = 0
        for at in range(chunk[FIRST_COPY], chunk[FIRST_COPY] + chunk[N_COPIES]):
            nbytes += copies[at, COPY_BYTES] * copies[at, LINES]
        lane[DUE] = max(lane[DUE], _now(lane, scratch) - _LATE_NS) + nbytes * lane[FS_OF_BYTE] // 1_000_000


@njit(nogil=True)
def nap(lane, scratch):  # type: ignore[no-untyped-def]
    """A pause, after which things may be otherwise; until the next turn comes, but no longer than who hurries may wait."""
    pause = _NAP_US
    if lane[FS_OF_BYTE] != 0:
        pause = min(max((lane[DUE] - _now(lane, scratch)) // 1000, pause), _LONG_NAP_US)
    call(lane[NAP], (pause,))


def pace(link_rate: float, share: float) -> int:
    """Femtoseconds that a byte is to take, at a share of so many bytes per second; 0 for as few as it takes."""
    return min(round(1e15 / (link_rate * share)), _MOST_FS) if share < 1 else 0


@njit()
def hurry(lane, place):  # type: ignore[no-untyped-def]
    """Paces no plan any more up to that place of the lane's queue. Holds the GIL: no call takes back what another one said."""
    lane[HURRIED] = max(lane[HURRIED], place)


def addresses() -> tuple[int, int]:
    """Of the C library's ``usleep`` and ``clock_gettime``."""
    return libc_address("usleep"), libc_address("clock_gettime")
