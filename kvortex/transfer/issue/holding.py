"""Who holds a lane's staging buffers, asked and answered in the same compiled step as a plan is issued.

A finaliser or a signal's handler may make a transfer of its own between any two steps of Python, also in the middle of
another one's. Between finding who holds the buffers and issuing there is no such step.
"""

from __future__ import annotations

from kvortex.jit import njit
from kvortex.transfer.issue.cells import ERROR, ISSUED
from kvortex.transfer.issue.ordering import hand_over
from kvortex.transfer.issue.plans import issue
from kvortex.transfer.issue.resident import issue_resident

# What keeps the next chunk out of a staging buffer that is in use: nothing, since none is used; the order of the buffer's
# stream; flags.
NOTHING, STREAMS, FLAGS = range(3)


@njit(nogil=True)
def _take(kind, holder, streams, joins, functions, lane, scratch, outcome):  # type: ignore[no-untyped-def]
    """Whether the buffers are free for ``kind``, or were handed over; else nothing is to be issued, as ``outcome`` says."""
    if kind != NOTHING:
        if holder[0] != NOTHING and holder[0] != kind:
            hand_over(functions, lane, streams, joins, scratch, outcome)
            if outcome[ERROR]:  # the events, never recorded, count as passed
                outcome[ISSUED] = 1
                return False
        holder[0] = kind
    return True


@njit(nogil=True)
def issue_holding(kind, holder, streams, joins, arguments):  # type: ignore[no-untyped-def]
    """:func:`kvortex.transfer.issue.plans.issue`, with the staging buffers in hand.

    Parameters
    ----------
    kind : int
        ``STREAMS``, or ``NOTHING`` where no staging buffer is used.
    holder : (1,) int64
        Who had the staging buffers last; gets ``kind``.
    streams, joins : (s,) int64
        All of the lane.
    arguments : tuple
        All of that function.
    """
    if _take(kind, holder, streams, joins, arguments[0], arguments[1], arguments[-2], arguments[-1]):
        issue(*arguments)


@njit(nogil=True)
def issue_resident_holding(holder, streams, joins, arguments):  # type: ignore[no-untyped-def]
    """:func:`kvortex.transfer.issue.resident.issue_resident` likewise, as ``FLAGS``."""
    if _take(FLAGS, holder, streams, joins, arguments[0], arguments[1], arguments[-2], arguments[-1]):
        issue_resident(*arguments)
