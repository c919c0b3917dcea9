"""Numbers that compiled code shares with Python, by their places in arrays."""

from __future__ import annotations

# Cells of ``lane``: numbers that stay the same for a direction; and behind them when the next paced copies may begin, in ns,
# the place in its queue up to which plans are not paced any more, and what its flag for early reading was raised to last.
(CONTEXT, KERNEL, THREADS, MAX_CTAS, TABLE, JOIN_STREAM, CALLER_EVENT, TO_HOST, COPY_STREAM, COPY_EVENT,
 COUNTERS, NAP, CLOCK, FS_OF_BYTE, DUE, HURRIED, RAISED) = range(LANE_CELLS := 17)  # fmt: skip
HANDED, COPIED = range(2)  # rows of ``turns``: what is recorded behind kernels, and behind copies
# Cells of ``outcome``: whether everything was attempted, the first error of the work, the first of the events behind it, its
# place in the queue of the thread that it is left to, from 1 on, or 0, and whether that thread paces it.
ISSUED, ERROR, LAST, QUEUED, PACED = range(OUTCOME_CELLS := 5)
NO_STREAM = -1  # in the place of the caller's, where only events are waited for
COUNTER_BYTES = 128  # from the counter of one stream's launches to the next one's
