"""Plans: NumPy arrays that list every launch and every DMA of a transfer. Built without a loop over blocks.

A *chunk* is what one staging buffer takes at a time: consecutive pieces of consecutive records, gathered by one launch
and moved by the DMA copies that belong to it. Records are ordered by slot, so that records which are neighbours in the
host pool leave in one copy. A record larger than a staging buffer is cut into parts at piece boundaries. Copies carry
bytes of records and no padding: a buffer holds other blocks' bytes between its records.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]

# Columns of a fragment or piece: address in block 0, block stride, offset in the record, bytes.
BASE, STRIDE, OFFSET, BYTES = range(4)
LINES_OF_RUN = 4  # column behind these, of what :func:`strides` gives
# Columns of a chunk: range of ids, range of pieces, range of copies, and the address that the kernel uses instead of a
# staging buffer, or 0. n_pieces is 0 where no kernel runs. Then a range of launches: none where the lane's own kernel runs.
(FIRST_BLOCK, N_BLOCKS, FIRST_PIECE, N_PIECES, FIRST_COPY, N_COPIES, INSTEAD, FIRST_LAUNCH,
 N_LAUNCHES) = range(CHUNK_COLUMNS := 9)  # fmt: skip
# Columns of a copy: offset in the staging buffer (or address in VRAM where no kernel runs), host address, bytes of a line,
# lines, and bytes from line to line in VRAM and in the host's memory.
DEVICE_SIDE, HOST_SIDE, COPY_BYTES, LINES, PITCH, HOST_PITCH = range(COPY_COLUMNS := 6)
# Columns of a launch: handle of a kernel, CTAs and threads of each, and its parameters, to each of which one of ``bases`` is
# added; ``RELATIVE`` has four bits for each that say which.
KERNEL, CTAS, THREADS, RELATIVE, ARGUMENTS = range(5)
PARAMETERS = 12
LAUNCH_COLUMNS = ARGUMENTS + PARAMETERS
# Bases: nothing, the chunk's staging buffer, what else belongs to that buffer, the plan's ids, sums and status of its records,
# and the counter of shares of the stream's launches, all in VRAM.
ABSOLUTE, BUFFER, WORK, IDS, SUMS, STATUS, COUNTER = range(BASE_CELLS := 7)

NONE, FIRST, LAST = range(3)  # chunks that are small
_DOUBLINGS = 5
PIECE_BYTES = 4096  # two turns of a warp with four 16-byte loads in flight in each lane


@dataclass(frozen=True)
class Pool:
    """Where slots are: ``address`` of slot 0, bytes from slot to slot, slots in one registration."""

    address: int
    slot_bytes: int
    segment_slots: int


@dataclass(frozen=True)
class Plan:
    """One transfer.

    Attributes
    ----------
    ids : (n,) int32
        Blocks, in the order of chunks; of a codec's plan what its kernels read of each record, so many numbers of each.
    chunks : (c, 9) int64
    copies : (m, 6) int64
    nbytes
        Payload.
    pitch
        Bytes from one record to the next in a staging buffer, or in what a kernel uses instead.
    ctas
        Of one kernel that serves all chunks; 0 where each chunk has a launch of its own, or none.
    marks : (g,) int64
        How many chunks it takes until each group of layers is there; (0,) where nobody asked.
    batch : (3, m) int64
        Rows ``DEVICE_SIDE, HOST_SIDE, COPY_BYTES`` of copies of one line, each row contiguous, as the driver takes them: each
        chunk is one call. Takes the place of ``copies``; (3, 0) where those are used.
    order : (n,) int64
        Of each record of the plan the position in the call; (0,) where that is the same.
    launches : (l, 16) int64
        Of chunks that take more than the lane's own kernel, one behind another on the stream of the chunk's buffer.
    """

    ids: Int32s
    chunks: Int64s
    copies: Int64s
    nbytes: int
    pitch: int = 0
    ctas: int = 0
    marks: Int64s = field(default_factory=lambda: np.empty(0, np.int64))
    batch: Int64s = field(default_factory=lambda: np.empty((3, 0), np.int64))
    order: Int64s = field(default_factory=lambda: np.empty(0, np.int64))
    launches: Int64s = field(default_factory=lambda: np.empty((0, LAUNCH_COLUMNS), np.int64))


def split_pieces(fragments: Int64s, piece_bytes: int = PIECE_BYTES) -> Int64s:
    """Cuts fragments into pieces of at most ``piece_bytes`` (a multiple of 16, so that alignment survives).

    Parameters
    ----------
    fragments : (F, 4) int64
        Rows ``BASE, STRIDE, OFFSET, BYTES``.

    Returns
    -------
    (P, 4) int64
        In record order; each piece lies in one fragment.
    """
    counts = -(-fragments[:, BYTES] // piece_bytes)
    pieces = np.repeat(fragments, counts, axis=0)
    within = (np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)) * piece_bytes
    pieces[:, BASE] += within
    pieces[:, OFFSET] += within
    pieces[:, BYTES] = np.minimum(pieces[:, BYTES] - within, piece_bytes)
    return pieces


def cut_parts(pieces: Int64s, buffer_bytes: int) -> Int64s:
    """First pieces of the parts that a record is cut into, and the number of pieces at the end, (parts + 1,) int64.

    Each part is as long as whole pieces allow within ``buffer_bytes``, which must hold a piece.
    """
    ends = pieces[:, OFFSET] + pieces[:, BYTES]
    cuts = [0]
    while cuts[-1] < len(pieces):
        cuts.append(int(np.searchsorted(ends, pieces[cuts[-1], OFFSET] + buffer_bytes, side="right")))
    return np.array(cuts, np.int64)


def plan_staged(
    blocks: Int64s,
    slots: Int64s,
    pieces: Int64s,
    pool: Pool,
    buffer_bytes: int,
    buffers: int,
    max_blocks: int,
    *,
    ctas: int = 0,
    small: int = 0,
) -> Plan:
    """A transfer through staging buffers.

    Parameters
    ----------
    blocks, slots : (n,) int64
        Pages in VRAM and their records' slots; no slot twice.
    pieces : (P, 4) int64
    pool
    buffer_bytes
        Bytes of one staging buffer.
    buffers
        Staging buffers; without a kernel for the whole plan a small transfer is cut so that each gets a part, and none has to
        wait for a launch that comes after another.
    max_blocks
        Most ids that one launch takes.
    ctas
        CTAs of one kernel for the whole plan, or 0 for a launch a chunk. With one kernel a chunk costs no launch, so chunks
        at one end may be small.
    small
        Which end: ``FIRST``, for the link not to wait for a long gather, ``LAST``, for the end not to wait for a long
        scatter, or ``NONE``.
    """
    order = np.argsort(slots)
    ids, slots = blocks[order].astype(np.int32), slots[order]
    record_bytes = int(pieces[-1, OFFSET] + pieces[-1, BYTES])
    if pool.slot_bytes > buffer_bytes:
        chunks, copies = _chunks_of_parts(slots, pieces, pool, buffer_bytes)
    else:
        per_chunk = buffer_bytes // pool.slot_bytes
        limit = min(per_chunk, max_blocks)
        starts = ramp(len(slots), per_chunk, small) if ctas else even(len(slots), limit, buffers)
        chunks, copies = _chunks_of_records(slots, len(pieces), record_bytes, pool, starts)
    return Plan(ids, chunks, copies, record_bytes * len(slots), pool.slot_bytes, ctas, order=order)


def even(count: int, per_chunk: int, buffers: int) -> Int64s:
    """First records of chunks of at most ``per_chunk``, none much shorter than the others: at least one for each buffer."""
    chunks = max(buffers, -(-count // per_chunk))
    return np.arange(0, count, -(-count // chunks))


def ramp(count: int, per_chunk: int, small: int) -> Int64s:
    """First records of chunks of at most ``per_chunk``, which double from a 32nd of that; or halve down to it; or neither."""
    slope = [max(1, per_chunk >> at) for at in range(_DOUBLINGS if small else 0, 0, -1)]
    while sum(slope) > count:
        slope.pop()
    whole, left = divmod(count - sum(slope), per_chunk)
    body = [per_chunk] * whole + [left] * (left > 0)
    sizes = [*slope, *body] if small == FIRST else [*body[::-1], *slope[::-1]]
    return np.array(list(itertools.accumulate(sizes, initial=0))[:-1], np.int64)


def _chunks_of_records(
    slots: Int64s, n_pieces: int, record_bytes: int, pool: Pool, starts: Int64s
) -> tuple[Int64s, Int64s]:
    n = len(slots)
    heads, lengths, chunk_of = neighbours(slots, starts, pool)
    copies = empty_copies(len(heads))
    copies[:, DEVICE_SIDE] = (heads - starts[chunk_of]) * pool.slot_bytes
    copies[:, HOST_SIDE] = pool.address + slots[heads] * pool.slot_bytes
    if record_bytes == pool.slot_bytes:
        copies[:, COPY_BYTES] = lengths * record_bytes
    else:  # a line a record: what an earlier chunk left between records in the buffer must not reach a slot
        copies[:, COPY_BYTES], copies[:, LINES] = record_bytes, lengths
        copies[:, PITCH] = copies[:, HOST_PITCH] = pool.slot_bytes
    chunks = np.zeros((len(starts), CHUNK_COLUMNS), np.int64)
    chunks[:, FIRST_BLOCK] = starts
    chunks[:, N_BLOCKS] = np.diff(np.append(starts, n))
    chunks[:, N_PIECES] = n_pieces
    chunks[:, FIRST_COPY] = np.searchsorted(heads, starts)
    chunks[:, N_COPIES] = np.diff(np.append(chunks[:, FIRST_COPY], len(heads)))
    return chunks, copies


def neighbours(slots: Int64s, starts: Int64s, pool: Pool) -> tuple[Int64s, Int64s, Int64s]:
    """Runs of slots that one DMA reaches: neighbours in the pool, in one chunk and one registration.

    Parameters
    ----------
    slots : (n,) int64
        Ascending.
    starts : (c,) int64
        First records of chunks.
    pool

    Returns
    -------
    heads, lengths, chunk : (r,) int64
        First record of each run, records in it, and its chunk.
    """
    n = len(slots)
    chunk_of = np.searchsorted(starts, np.arange(n), side="right") - 1
    breaks = np.ones(n, bool)
    breaks[1:] = (np.diff(slots) != 1) | (np.diff(chunk_of) != 0) | (np.diff(slots // pool.segment_slots) != 0)
    heads = np.flatnonzero(breaks)
    return heads, np.diff(np.append(heads, n)), chunk_of[heads]


def _chunks_of_parts(slots: Int64s, pieces: Int64s, pool: Pool, buffer_bytes: int) -> tuple[Int64s, Int64s]:
    cuts = cut_parts(pieces, buffer_bytes)
    parts = len(cuts) - 1
    begin = pieces[cuts[:-1], OFFSET]
    end = pieces[cuts[1:] - 1, OFFSET] + pieces[cuts[1:] - 1, BYTES]
    chunks = np.zeros((len(slots) * parts, CHUNK_COLUMNS), np.int64)
    chunks[:, FIRST_BLOCK] = np.repeat(np.arange(len(slots)), parts)
    chunks[:, N_BLOCKS] = 1
    chunks[:, FIRST_PIECE] = np.tile(cuts[:-1], len(slots))
    chunks[:, N_PIECES] = np.tile(np.diff(cuts), len(slots))
    chunks[:, FIRST_COPY] = np.arange(len(chunks))
    chunks[:, N_COPIES] = 1
    copies = empty_copies(len(chunks))
    copies[:, HOST_SIDE] = np.repeat(pool.address + slots * pool.slot_bytes, parts) + np.tile(begin, len(slots))
    copies[:, COPY_BYTES] = np.tile(end - begin, len(slots))
    return chunks, copies


def plan_direct(
    addresses: Int64s, sizes: Int64s, slots: Int64s, pool: Pool, streams: int, *, one_tensor: bool = True
) -> Plan:
    """A transfer of contiguous pieces of VRAM with no kernel: one DMA for each run that is contiguous on both sides.

    Parameters
    ----------
    addresses, sizes : (n,) int64
        Where each record lies in VRAM, and its bytes.
    slots : (n,) int64
    pool
    streams
        Streams that the copies are dealt to.
    one_tensor
        Whether all addresses lie in one allocation. Those of a caller's buffers may only happen to be neighbours, and a
        DMA must not cross from one allocation into the next, so they are never joined.
    """
    order = np.argsort(slots)
    addresses, sizes, slots = addresses[order], sizes[order], slots[order]
    host = pool.address + slots * pool.slot_bytes
    apart = (np.diff(slots // pool.segment_slots) != 0) | (not one_tensor)
    return _plan_of_copies(_merged(np.stack((addresses, host, sizes)), apart), streams)


def _merged(rows: Int64s, apart: npt.NDArray[np.bool_]) -> Int64s:
    """Joins neighbours that are contiguous on both sides.

    Parameters
    ----------
    rows : (3, n) int64
        ``DEVICE_SIDE, HOST_SIDE, COPY_BYTES``, ascending on the host's side.
    apart : (n - 1,) bool
        Neighbours that no DMA may join, since there is a border of memory between them.
    """
    device, host, nbytes = rows
    breaks = np.ones(len(nbytes), bool)
    breaks[1:] = apart | (device[:-1] + nbytes[:-1] != device[1:]) | (host[:-1] + nbytes[:-1] != host[1:])
    heads = np.flatnonzero(breaks)
    merged = rows.take(heads, axis=1)  # which keeps rows contiguous, as rows[:, heads] does not
    if len(heads) < len(nbytes):
        merged[COPY_BYTES] = np.add.reduceat(nbytes, heads)
    return merged


def _plan_of_copies(rows: Int64s, streams: int) -> Plan:
    copies = empty_copies(rows.shape[1])
    copies[:, : len(rows)] = rows.T
    return Plan(np.empty(0, np.int32), dealt(len(copies), streams), copies, int(rows[COPY_BYTES].sum()))


def strides(fragments: Int64s, max_pitch: int, allocations: Int64s) -> Int64s:
    """Runs of fragments that one strided DMA moves: equally long, and equally far from each other.

    Parameters
    ----------
    fragments : (F, 4) int64
    max_pitch
        Longest distance that the device takes.
    allocations : (F,) int64
        Which allocation each fragment lies in with all its blocks, -1 for none: a DMA must not leave one.

    Returns
    -------
    (R, 6) int64
        The first fragment's columns, then the number of fragments and their distance in block 0.
    """
    count = len(fragments)
    bases, nbytes = fragments[:, BASE], fragments[:, BYTES]
    runs, at = [], 0
    while at < count:
        end, pitch = at + 1, int(nbytes[at])
        if end < count:
            step = int(bases[end] - bases[at])
            fits = nbytes[at] <= step <= max_pitch and allocations[at] >= 0
            same = (np.diff(bases[at:]) == step) & (nbytes[at + 1 :] == nbytes[at]) & (np.diff(fragments[at:, STRIDE]) == 0)
            same &= allocations[at + 1 :] == allocations[at]
            if fits and same[0]:
                end, pitch = at + 1 + (len(same) if same.all() else int(np.argmin(same))), step
        runs.append([*fragments[at].tolist(), end - at, pitch])
        at = end
    return np.array(runs, np.int64).reshape(-1, 6)


def plan_strided(blocks: Int64s, slots: Int64s, runs: Int64s, pool: Pool, streams: int) -> Plan:
    """A transfer by strided DMAs: no kernel and no staging, one copy for each block and run of :func:`strides`.

    Parameters
    ----------
    blocks, slots : (n,) int64
    runs : (R, 6) int64
    pool
    streams
        Streams that the copies are dealt to.
    """
    base, stride, offset, nbytes, lines, pitch = runs.T
    copies = np.empty((len(blocks), len(runs), COPY_COLUMNS), np.int64)
    copies[..., DEVICE_SIDE] = base + blocks[:, None] * stride
    copies[..., HOST_SIDE] = pool.address + slots[:, None] * pool.slot_bytes + offset
    for column, values in ((COPY_BYTES, nbytes), (LINES, lines), (PITCH, pitch), (HOST_PITCH, nbytes)):
        copies[..., column] = values
    count, total = len(blocks) * len(runs), len(blocks) * int(nbytes @ lines)
    return Plan(np.empty(0, np.int32), dealt(count, streams), copies.reshape(count, COPY_COLUMNS), total)


def plan_batched(
    blocks: Int64s,
    slots: Int64s,
    fragments: Int64s,
    allocations: Int64s,
    pool: Pool,
    streams: int,
    *,
    one_call: bool,
) -> Plan:
    """A transfer by contiguous DMAs straight between pages and slots: no kernel, no staging, fragments anywhere.

    Parameters
    ----------
    blocks, slots : (n,) int64
    fragments : (F, 4) int64
    allocations : (F,) int64
        Of :func:`strides`. Fragments that touch are one copy only within an allocation.
    pool
    streams
        Streams that the copies are dealt to.
    one_call
        Whether the driver takes many copies in one call: then one batch a stream, of about as many bytes each. Else a call for
        each copy.
    """
    order = np.argsort(slots)
    blocks, slots = blocks[order], slots[order]
    base, stride, offset, nbytes = fragments.T
    n, count = len(slots), len(fragments)
    rows = np.empty((3, n, count), np.int64)
    rows[DEVICE_SIDE] = base + blocks[:, None] * stride
    rows[HOST_SIDE] = pool.address + slots[:, None] * pool.slot_bytes + offset
    rows[COPY_BYTES] = nbytes
    # Between each fragment and the next, the first one of the next record for the last one.
    apart = np.empty((n, count), bool)
    apart[:] = (allocations != np.roll(allocations, -1)) | (allocations < 0)
    apart[:-1, -1] |= np.diff(slots // pool.segment_slots) != 0
    rows = _merged(rows.reshape(3, -1), apart.ravel()[:-1])
    if not one_call:
        return _plan_of_copies(rows, streams)
    ends = np.cumsum(rows[COPY_BYTES])
    starts = np.unique(np.searchsorted(ends, ends[-1] * np.arange(streams) // streams, side="right"))
    return Plan(np.empty(0, np.int32), _shares(starts, len(ends)), empty_copies(0), int(ends[-1]), batch=rows)


def plan_mapped(blocks: Int64s, slots: Int64s, pieces: Int64s, pool: Pool, max_blocks: int) -> Plan:
    """A transfer by kernels that reach into the slots over the link: no staging, no DMA, and so the least latency.

    Parameters are those of :func:`plan_staged`. A launch takes records that are neighbours in the pool.
    """
    n, record_bytes = len(slots), int(pieces[-1, OFFSET] + pieces[-1, BYTES])
    if n == 1:  # what there is to do for many takes longer than the transfer of one
        chunks = np.zeros((1, CHUNK_COLUMNS), np.int64)
        chunks[0, N_BLOCKS], chunks[0, N_PIECES], chunks[0, INSTEAD] = 1, len(pieces), pool.address + slots[0] * pool.slot_bytes
        return Plan(blocks.astype(np.int32), chunks, empty_copies(0), record_bytes, pool.slot_bytes)
    order = np.argsort(slots)
    ids, slots = blocks[order].astype(np.int32), slots[order]
    breaks = np.ones(n, bool)
    breaks[1:] = (np.diff(slots) != 1) | (np.diff(slots // pool.segment_slots) != 0)
    heads = np.flatnonzero(breaks)
    lengths = np.diff(np.append(heads, n))
    launches = -(-lengths // max_blocks)
    within = (np.arange(launches.sum()) - np.repeat(np.cumsum(launches) - launches, launches)) * max_blocks
    chunks = np.zeros((len(within), CHUNK_COLUMNS), np.int64)
    chunks[:, FIRST_BLOCK] = np.repeat(heads, launches) + within
    chunks[:, N_BLOCKS] = np.minimum(np.repeat(lengths, launches) - within, max_blocks)
    chunks[:, N_PIECES] = len(pieces)
    chunks[:, INSTEAD] = pool.address + slots[chunks[:, FIRST_BLOCK]] * pool.slot_bytes
    return Plan(ids, chunks, empty_copies(0), record_bytes * n, pool.slot_bytes, order=order)


def empty_copies(count: int) -> Int64s:
    """Copies of one line each, to be filled in."""
    copies = np.zeros((count, COPY_COLUMNS), np.int64)
    copies[:, LINES] = 1
    return copies


def dealt(count: int, streams: int) -> Int64s:
    """Chunks without a kernel that share ``count`` copies out, so that each stream gets several."""
    return _shares(np.arange(0, count, max(1, count // (4 * streams))), count)


def in_one_chunk(plan: Plan) -> Plan:
    """The same copies, of a plan without kernels, on one stream."""
    return replace(plan, chunks=_shares(np.zeros(1, np.int64), len(plan.copies)))


def _shares(starts: Int64s, count: int) -> Int64s:
    """Chunks without a kernel, one from each of ``starts`` on, of ``count`` copies in all."""
    chunks = np.zeros((len(starts), CHUNK_COLUMNS), np.int64)
    chunks[:, FIRST_COPY] = starts
    chunks[:-1, N_COPIES] = starts[1:] - starts[:-1]
    chunks[-1:, N_COPIES] = count - starts[-1:]
    return chunks
