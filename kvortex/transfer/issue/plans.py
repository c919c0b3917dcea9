"""Issuing a whole plan to a GPU in one call that holds no GIL.

With eight Python threads fighting for the GIL, a Python loop of the same launches and copies fell from 54 to 0.07 GB/s
on an H100; this function had the plan on the GPU in milliseconds.
"""

from __future__ import annotations

import numpy as np

from kvortex.devices.driver import EVENT_RECORD, STREAM_WAIT
from kvortex.devices.native import call
from kvortex.jit import njit
from kvortex.transfer import digesting
from kvortex.transfer.digesting import EVENT, FLAG, PIECE_BYTES, STREAM, SUMS_BYTES, read, read_back, send
from kvortex.transfer.issue.cells import (
    COPIED,
    COPY_EVENT,
    COPY_STREAM,
    HANDED,
    JOIN_STREAM,
    PACED,
    TO_HOST,
)
from kvortex.transfer.issue.dma import copy_batch, copy_chunk
from kvortex.transfer.issue.early import issue_early
from kvortex.transfer.issue.framing import begin, end
from kvortex.transfer.issue.launching import aim_chunk, run_chunk
from kvortex.transfer.issue.ordering import follow, follow_stream, join
from kvortex.transfer.issue.pacing import begin_turns, has_passed, is_due, nap, take_turn
from kvortex.transfer.plan import N_COPIES, N_PIECES

_READS = digesting.KERNEL


@njit(nogil=True)
def issue(  # type: ignore[no-untyped-def]
    functions, lane, streams, buffers, joins, turns, turn, caller, after, start, done, chunks, copies, batch, pitch, marks,
    events, digest, launches, works, bases, parameters, pointers, scratch, outcome,
):
    """Puts a plan on its streams, after the caller's and before ``done``.

    ``done`` is on the stream of the only chunk, and on the join stream where there are several, copies have one of their own,
    or sums of a load are read back. A load that a kernel reads early goes to :func:`kvortex.transfer.issue.early.issue_early`.

    Parameters
    ----------
    functions : (n,) int64
        Of :func:`kvortex.devices.driver.functions`.
    lane : (LANE_CELLS,) int64
        Context, kernel, launch shape, piece table, join stream, event for the caller's stream, direction, stream for copies
        between staging buffers and the host, the event that joins it, and counters of shares, one for each of ``streams``;
        and what :mod:`kvortex.transfer.issue.pacing` needs.
    streams, buffers, joins : (s,) int64
        Each stream with its staging buffer and the event that joins it. Kernels of a buffer are on its stream; its copies
        too where there is one buffer alone.
    turns : (2, s) int64
        Of each buffer the events behind its last kernel, and behind its last copies: each waits for the other. All copies are
        on one stream, one chunk after another, so that the first buffer is free again when a part of the time has passed and
        not all of it; and a copy that finds its buffer ready waits for nobody on another stream when the one before it ends.
    turn : (1,) int64
        Stream of the first chunk, the rest follow in a ring; moved on to the one behind the last.
    caller : int
        Stream on which the lane's event for it is recorded now, or ``NO_STREAM``.
    after : (e,) int64
        Events that all work waits for: the lane's, or those that were recorded before.
    start, done : int
        Timing events recorded before and after.
    chunks, copies, batch : (c, 9), (m, 6), (3, m) int64
        Of :class:`kvortex.transfer.plan.Plan`.
    pitch, marks : int, (g,) int64
        Of the plan.
    events : (g,) int64
        Each is recorded when everything up to its mark has been issued.
    digest : (DIGEST_CELLS,) int64
        Of :mod:`kvortex.transfer.digesting`; says where the plan's block ids are, also where nothing is digested.
    launches : (l, 16) int64
        Of the plan.
    works : (s,) int64
        What else than a staging buffer belongs to each stream; 0 where nothing does.
    bases : (BASE_CELLS,) int64
        What the parameters of ``launches`` are relative to; those of a chunk's buffer are filled in here.
    parameters, pointers : (PARAMETERS,) int64
        Values of the kernel's parameters, and their addresses. The driver copies them at each launch.
    scratch : (SCRATCH_CELLS,) int64
        Nothing that outlives the call.
    outcome : (OUTCOME_CELLS,) int64
        Gets ``ISSUED`` = 1, the first error code of the work, and that of the events behind it; 0 for none. When the last
        is 0, ``done`` follows everything that was issued, also after an error. Told through an array, because an
        interrupt that comes during the call takes the place of its return value. ``QUEUED`` and ``PACED`` say whether this
        waits until kernels can begin, each time before it issues one.
    """
    if digest[FLAG] != 0:
        issue_early(
            functions, lane, streams, caller, after, start, done, chunks, copies, digest, parameters, pointers, scratch, outcome
        )
        return
    n = len(streams)
    first = turn[0]
    used = min(n, len(chunks))
    to_host = lane[TO_HOST] != 0
    mark = 0
    entered, error = begin(functions, lane, caller, outcome)
    if not entered:
        return
    digests, reads = digest[SUMS_BYTES] > 0, digest[_READS] != 0
    sends, beside = digests and digest[PIECE_BYTES] == 0, reads and to_host
    apart = n > 1 and len(chunks) > 0 and chunks[0, N_PIECES] > 0 and chunks[0, N_COPIES] > 0
    copies_on = lane[COPY_STREAM]
    early, ahead = sends and apart and to_host and not reads, sends and apart and not to_host
    sends_beside = sends and not ahead  # ahead of its long copies a load sends on their stream, for which its kernels wait
    if sends_beside and not error:
        error = send(functions, digest, digest[STREAM])
        if not error:
            error = call(functions[EVENT_RECORD], (digest[EVENT], digest[STREAM]))
    for at in range(used):
        if not error:
            error = follow(functions, streams[(first + at) % n], after)
        if not error and sends_beside and not reads:
            error = call(functions[STREAM_WAIT], (streams[(first + at) % n], digest[EVENT], 0))
    if apart and not to_host and not error:
        error = follow(functions, copies_on, after)
    if not error:
        error = call(functions[EVENT_RECORD], (start, copies_on if apart and not to_host else streams[first % n]))
    if not error and ahead:
        error = send(functions, digest, copies_on)
    begin_turns(lane, scratch, outcome)
    # Copies of a paced load are issued as far ahead of kernels as there are buffers.
    room = n if apart and not to_host and outcome[PACED] != 0 else 1
    here = there = 0  # chunks whose first part was issued, and whose second: of a load what follows its copies
    while there < len(chunks) and not error:
        at = (first + there) % n
        chunk, stream = chunks[there], streams[at]
        # The last kernel is issued when the copies before its own have ended: then another plan's follow without a gap.
        awaited = turns[COPIED, at if there < len(chunks) - 1 else (at + n - 1) % n]
        if there < here and (room == 1 or has_passed(functions, lane, awaited, scratch, outcome)):
            if apart and not to_host:
                error = call(functions[STREAM_WAIT], (stream, turns[COPIED, at], 0))
            if not error and not to_host and chunk[N_PIECES] > 0:
                aim_chunk(lane, chunk, at, buffers, works, bases)
                error = run_chunk(functions, lane, launches, chunk, digest, bases, pitch, stream, parameters, pointers)
                if not error and apart:
                    error = call(functions[EVENT_RECORD], (turns[HANDED, at], stream))
            there += 1
            while not error and mark < len(marks) and marks[mark] == there:
                error = join(functions, lane, streams, joins, first, min(n, there))
                if not error and apart and to_host:
                    error = follow_stream(functions, lane[JOIN_STREAM], copies_on, lane[COPY_EVENT])
                if not error:
                    error = call(functions[EVENT_RECORD], (events[mark], lane[JOIN_STREAM]))
                mark += 1
            continue
        at = (first + here) % n
        goes_on = here < len(chunks) and here - there < room and is_due(lane, scratch, outcome)
        if goes_on and apart and to_host:
            goes_on = has_passed(functions, lane, turns[COPIED, at], scratch, outcome)
        if not goes_on:
            nap(lane, scratch)
            continue
        chunk, stream = chunks[here], streams[at]
        base = aim_chunk(lane, chunk, at, buffers, works, bases)
        copying = copies_on if apart else stream
        take_turn(lane, copies, chunk, scratch, outcome)
        if apart:  # until the buffer has been emptied
            waits, event = (stream, turns[COPIED, at]) if to_host else (copying, turns[HANDED, at])
            error = call(functions[STREAM_WAIT], (waits, event, 0))
        if not error and to_host and chunk[N_PIECES] > 0:
            error = run_chunk(functions, lane, launches, chunk, digest, bases, pitch, stream, parameters, pointers)
        if not error and apart and to_host:
            error = follow_stream(functions, copying, stream, turns[HANDED, at])
            # Before the last copies, when all kernels are through: behind them it would wait for the next transfer's copies,
            # which the same engine of the GPU makes, one long one after another.
            if not error and early and here == len(chunks) - 1:
                error = read_back(functions, digest, copying)
        if not error and batch.shape[1] > 0:
            error = copy_batch(to_host, functions, batch, chunk, copying, scratch)
        elif not error:
            error = copy_chunk(to_host, functions, copies, chunk, base, copying, scratch)
        if not error and beside and here == 0:  # once the link is busy: these calls of the driver take microseconds
            error = follow(functions, digest[STREAM], after)
            if not error:
                error = read(functions, digest, digest[STREAM], parameters, pointers)
        if not error and apart:
            error = call(functions[EVENT_RECORD], (turns[COPIED, at], copying))
        here += 1
    last, behind = np.int32(0), streams[first % n]
    if used > 1 or apart:  # joining streams takes microseconds on the GPU, and of one there is nothing to join
        last, behind = join(functions, lane, streams, joins, first, used), lane[JOIN_STREAM]
    if apart:
        code = follow_stream(functions, behind, copies_on, lane[COPY_EVENT])
        if not last:
            last = code
    if sends_beside or beside:  # also after an error: what was sent and launched is in memory that is others' after ``done``
        code = follow_stream(functions, behind, digest[STREAM], digest[EVENT])
        if not last:
            last = code
    if not error and reads and not to_host:
        error = read(functions, digest, behind, parameters, pointers)
    if not error and sends and not to_host and behind != lane[JOIN_STREAM]:
        # Its copies go the other way, and a stream that has copied both ways may wait for ever: see docs/transfers.md.
        error = follow_stream(functions, lane[JOIN_STREAM], behind, joins[first % n])
        if not error:
            behind = lane[JOIN_STREAM]
    if not error and sends and not early:
        error = read_back(functions, digest, behind)
    turn[0] = (first + len(chunks)) % n
    end(functions, done, behind, error, last, scratch, outcome)
