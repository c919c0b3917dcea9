"""Issuing a plan around one resident kernel, in one call that holds no GIL.

The kernel (:mod:`kvortex.kernels.resident`) is launched first; the copies follow on another stream. Each staging buffer has
two flags in VRAM, which only grow: ``ready`` counts its DMAs, ``done`` counts threads of kernels that are through with it.
A save's DMA waits for ``done``, and when it has ended ``ready`` is raised, which lets the kernel fill the buffer again; a
load's DMA waits until the kernel has emptied the buffer, fills it, and then ``ready`` is raised.

Copies are on one stream: two DMAs at once would share the link and end together, and nothing would be left to do meanwhile.
``ready`` is written on a stream of its own. Where the copies' stream writes it, the link stands still for longer between
two copies (docs/transfers.md).

Nothing can wait for what is issued behind it: everything is issued in the order in which it can run. So a stream that
shares a hardware queue with another one is slower, and never stuck.
"""

from __future__ import annotations

from kvortex.devices.asking import ask_relaxed
from kvortex.devices.driver import (
    COPY_TO_DEVICE,
    EVENT_QUERY,
    EVENT_RECORD,
    LAUNCH,
    STREAM_WAIT_VALUE,
    STREAM_WRITE_VALUE,
)
from kvortex.devices.native import call
from kvortex.jit import njit
from kvortex.transfer.digesting import NUMBERS, SUMS, SUMS_BYTES, read_back
from kvortex.transfer.issue.cells import (
    JOIN_STREAM,
    TABLE,
    TO_HOST,
)
from kvortex.transfer.issue.dma import MODE, copy_chunk
from kvortex.transfer.issue.framing import begin, end
from kvortex.transfer.issue.ordering import follow, follow_stream, join
from kvortex.transfer.plan import FIRST_BLOCK, FIRST_PIECE, N_BLOCKS, N_PIECES

# Cells of ``ring``: what a lane has for resident kernels beside its other cells.
STREAM, EVENT, KERNEL, THREADS, FLAGS, FLAG_STREAM, COPIED = range(RING_CELLS := 7)
FLAG_BYTES = 64  # a sector and more to each, so that who polls one does not slow who raises another
PARAMETERS = 7
ROW_CELLS = 8  # of kvortex.kernels.resident, which needs numba.cuda to import
_STAGING, _FIRST_BLOCK, _N_BLOCKS, _FIRST_PIECE, _N_PIECES, _READY, _READY_VALUE, _DONE = range(ROW_CELLS)
_WORD = 0xFFFFFFFF
_GREATER_OR_EQUAL = 0  # CU_STREAM_WAIT_VALUE_GEQ: cyclic


@njit(nogil=True)
def _write_rows(to_host, ring, buffers, first, filled, offsets, chunks, rows, values):  # type: ignore[no-untyped-def]
    """Fills ``rows``, and ``values`` with the flags' values that each chunk's DMA raises and waits for."""
    depth = len(buffers)
    ready, done, uses, threads = values[0], values[1], values[2], values[3]
    uses[:depth], threads[:depth] = filled[0], filled[1]
    for c in range(len(chunks)):
        at = (first + c) % depth
        flag = ring[FLAGS] + 2 * FLAG_BYTES * at
        chunk = chunks[c]
        rows[c, _STAGING] = buffers[at] - offsets[chunk[FIRST_PIECE]]
        rows[c, _FIRST_BLOCK] = chunk[FIRST_BLOCK]
        rows[c, _N_BLOCKS] = chunk[N_BLOCKS]
        rows[c, _FIRST_PIECE] = chunk[FIRST_PIECE]
        rows[c, _N_PIECES] = chunk[N_PIECES]
        rows[c, _READY] = flag
        rows[c, _READY_VALUE] = uses[at] if to_host else uses[at] + 1
        rows[c, _DONE] = flag + FLAG_BYTES
        uses[at] += 1
        ready[c] = uses[at] & _WORD
        if to_host:
            threads[at] += ring[THREADS]
        done[c] = threads[at] & _WORD
        if not to_host:
            threads[at] += ring[THREADS]


@njit(nogil=True)
def _have_passed(functions, events, scratch):  # type: ignore[no-untyped-def]
    """Whether nothing is to be waited for."""
    passed = True
    for event in events:
        passed = passed and not ask_relaxed(functions, EVENT_QUERY, event, 0, 0, scratch[MODE:])
    return passed


@njit(nogil=True)
def _move(to_host, functions, flag, done, copies, chunk, buffer, stream, scratch):  # type: ignore[no-untyped-def]
    """The copies of a chunk, when the kernels are through with its buffer; the first error code."""
    error = call(functions[STREAM_WAIT_VALUE], (stream, flag + FLAG_BYTES, done, _GREATER_OR_EQUAL))
    if not error:
        error = copy_chunk(to_host, functions, copies, chunk, buffer, stream, scratch)
    return error


@njit(nogil=True)
def issue_resident(  # type: ignore[no-untyped-def]
    functions, lane, ring, ctas, streams, buffers, joins, turn, filled, offsets, caller, after, start, done_event, chunks,
    copies, pitch, marks, events, rows, upload, digest, values, parameters, pointers, scratch, outcome,
):
    """Puts a plan on its streams, after the caller's and before ``done_event``.

    Parameters
    ----------
    functions, lane, caller, after, start, chunks, copies, pitch, marks, events, scratch, outcome
        As of :func:`kvortex.transfer.issue.plans.issue`; marks of loads only.
    ring : (RING_CELLS,) int64
        Stream and event of the kernel, the kernel, its threads in a CTA times ``ctas``, the flags in VRAM, the stream that
        writes ``ready``, and the event that it waits for each time.
    ctas : int
    streams, joins : (1,) int64
        For copies, and the event that joins it.
    buffers : (b,) int64
        Staging buffers.
    turn : (1,) int64
        Buffer of the first chunk, the rest follow in a ring; moved on.
    filled : (2, b) int64
        Of each buffer the values of its flags; moved on where something was issued.
    offsets : (P,) int64
        Record offsets of the pieces.
    rows : (c, ROW_CELLS) int64
        Pinned memory for what the kernel reads, followed by the block ids.
    upload : (3,) int64
        Address of ``rows``, of as much VRAM, and bytes of rows, ids and sums together.
    digest : (DIGEST_CELLS,) int64
        Of :mod:`kvortex.transfer.digesting`.
    values : (4, max(b, c)) int64
        Room to count in: nothing is allocated here, which could fail with the lane locked.
    parameters, pointers : (PARAMETERS,) int64
        Values of the kernel's parameters, and their addresses.
    """
    stream, depth, first = streams[0], len(buffers), turn[0]
    to_host, sums = lane[TO_HOST] != 0, digest[SUMS_BYTES] > 0
    ready, done = values[0], values[1]
    _write_rows(to_host, ring, buffers, first, filled, offsets, chunks, rows, values)
    entered, error = begin(functions, lane, caller, outcome)
    if not entered:
        return
    kernel_stream = ring[STREAM]
    # What fills the first staging buffer needs no kernel yet. Then the link is busy while all else is issued.
    early = not to_host and not error and _have_passed(functions, after, scratch)
    if early:
        flag = ring[FLAGS] + 2 * FLAG_BYTES * (first % depth)
        error = call(functions[EVENT_RECORD], (start, stream))
        # Ahead of the first copy on its stream: the GPU's one engine for this way may let copies of another stream wait for
        # all that are queued on this one.
        if not error:
            error = call(functions[COPY_TO_DEVICE], (upload[1], upload[0], upload[2], stream))
        if not error:
            error = follow_stream(functions, kernel_stream, stream, ring[EVENT])
        if not error:
            error = _move(to_host, functions, flag, done[0], copies, chunks[0], buffers[first % depth], stream, scratch)
    elif not error:  # the rows do not depend on the caller's work, so they are there when that is done
        error = call(functions[COPY_TO_DEVICE], (upload[1], upload[0], upload[2], kernel_stream))
    if not error:
        error = follow(functions, kernel_stream, after)
    if not error and not early:
        error = call(functions[EVENT_RECORD], (start, kernel_stream))
    if not error:
        parameters[0] = upload[1]
        parameters[1] = len(chunks)
        parameters[2] = lane[TABLE]
        parameters[3] = upload[1] + len(chunks) * ROW_CELLS * 8
        parameters[4] = pitch
        if sums:
            parameters[5] = digest[NUMBERS]
            parameters[6] = digest[SUMS]
        shape = (ring[KERNEL], ctas, 1, 1, ring[THREADS] // ctas, 1, 1, 0, kernel_stream, pointers.ctypes.data, 0)
        error = call(functions[LAUNCH], shape)
    launched, mark, unwritten = not error, 0, False
    for c in range(len(chunks)):
        if not launched:
            break
        at = (first + c) % depth
        flag = ring[FLAGS] + 2 * FLAG_BYTES * at
        if not error and sums and to_host and c == len(chunks) - 1:  # the kernel ends before that: see plans.py
            error = follow_stream(functions, stream, kernel_stream, ring[EVENT])
            if not error:
                error = read_back(functions, digest, stream)
        if not error and (c or not early):
            error = _move(to_host, functions, flag, done[c], copies, chunks[c], buffers[at], stream, scratch)
        if not error:
            error = follow_stream(functions, ring[FLAG_STREAM], stream, ring[COPIED])
        # Also after an error: the kernel waits for each of these values, and would wait for ever. One stream writes them all,
        # so none comes before the one that is less, nor before the copies that came before.
        code = call(functions[STREAM_WRITE_VALUE], (ring[FLAG_STREAM], flag, ready[c], 0))
        if code:
            unwritten = True
        if not error:
            error = code
        filled[0, at] = ready[c]
        filled[1, at] = done[c] if to_host else (done[c] + ring[THREADS]) & _WORD
        while not error and mark < len(marks) and marks[mark] == c + 1:
            # When the kernel is through with the chunk: each of its threads raises the flag, in the order of chunks.
            value = (done[c] + ring[THREADS]) & _WORD
            error = call(functions[STREAM_WAIT_VALUE], (lane[JOIN_STREAM], flag + FLAG_BYTES, value, _GREATER_OR_EQUAL))
            if not error:
                error = call(functions[EVENT_RECORD], (events[mark], lane[JOIN_STREAM]))
            mark += 1
    if unwritten:  # a later value lets a kernel go on, and of the last one there is none
        for at in range(depth):
            call(functions[STREAM_WRITE_VALUE], (ring[FLAG_STREAM], ring[FLAGS] + 2 * FLAG_BYTES * at, filled[0, at], 0))
    last = join(functions, lane, streams, joins, 0, 1)
    code = follow_stream(functions, lane[JOIN_STREAM], kernel_stream, ring[EVENT])
    if not last:
        last = code
    if sums and not to_host and not error and not last:  # on no stream that copies the other way: see docs/transfers.md
        error = read_back(functions, digest, lane[JOIN_STREAM])
    if launched:
        turn[0] = (first + len(chunks)) % depth
    end(functions, done_event, lane[JOIN_STREAM], error, last, scratch, outcome)
