"""Plans: NumPy arrays that list every launch and every DMA of a transfer. Built without a loop over blocks.

A *chunk* is what one staging buffer takes at a time: consecutive pieces of consecutive records, gathered by one launch
and moved by the DMA copies that belong to it. Records are ordered by slot, so that records which are neighbours in the
host pool leave in one copy. A record larger than a staging buffer is cut into parts at piece boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]

# Columns of a fragment or piece: address in block 0, block stride, offset in the record, bytes.
BASE, STRIDE, OFFSET, BYTES = range(4)
# Columns of a chunk: range of ids, range of pieces, range of copies. n_pieces is 0 where no kernel runs.
FIRST_BLOCK, N_BLOCKS, FIRST_PIECE, N_PIECES, FIRST_COPY, N_COPIES = range(6)
# Columns of a copy: offset in the staging buffer (or address in VRAM where no kernel runs), host address, bytes.
DEVICE_SIDE, HOST_SIDE, COPY_BYTES = range(3)

PIECE_BYTES = 4096  # two turns of a warp with four 16-byte loads in flight in each lane


@dataclass(frozen=True)
class Pool:
    """Where slots are: ``address`` of slot 0, bytes from slot to slot, slots in one registration."""

    address: int
    slot_bytes: int
    segment_slots: int


@dataclass(frozen=True)
class Plan:
    """One transfer: ``ids`` (n,) in the order of chunks, ``chunks`` (c, 6), ``copies`` (m, 3), bytes of payload."""

    ids: Int32s
    chunks: Int64s
    copies: Int64s
    nbytes: int


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
    blocks: Int64s, slots: Int64s, pieces: Int64s, pool: Pool, buffer_bytes: int, streams: int, max_blocks: int
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
    streams
        Streams that chunks are dealt to; a small transfer is cut so that each gets some.
    max_blocks
        Most ids that one launch takes.
    """
    order = np.argsort(slots)
    ids, slots = blocks[order].astype(np.int32), slots[order]
    record_bytes = int(pieces[-1, OFFSET] + pieces[-1, BYTES])
    if pool.slot_bytes > buffer_bytes:
        chunks, copies = _chunks_of_parts(slots, pieces, pool, buffer_bytes)
    else:
        even = -(-len(slots) // (2 * streams))
        per_chunk = max(1, min(buffer_bytes // pool.slot_bytes, max_blocks, even))
        chunks, copies = _chunks_of_records(slots, len(pieces), record_bytes, pool, per_chunk)
    return Plan(ids, chunks, copies, record_bytes * len(slots))


def _chunks_of_records(
    slots: Int64s, n_pieces: int, record_bytes: int, pool: Pool, per_chunk: int
) -> tuple[Int64s, Int64s]:
    n = len(slots)
    starts = np.arange(0, n, per_chunk)
    chunk_of = np.arange(n) // per_chunk
    segment = slots // pool.segment_slots
    breaks = np.ones(n, bool)
    breaks[1:] = (np.diff(slots) != 1) | (np.diff(chunk_of) != 0) | (np.diff(segment) != 0)
    heads = np.flatnonzero(breaks)
    lengths = np.diff(np.append(heads, n))
    copies = np.empty((len(heads), 3), np.int64)
    copies[:, DEVICE_SIDE] = (heads - starts[chunk_of[heads]]) * pool.slot_bytes
    copies[:, HOST_SIDE] = pool.address + slots[heads] * pool.slot_bytes
    copies[:, COPY_BYTES] = (lengths - 1) * pool.slot_bytes + record_bytes
    chunks = np.zeros((len(starts), 6), np.int64)
    chunks[:, FIRST_BLOCK] = starts
    chunks[:, N_BLOCKS] = np.diff(np.append(starts, n))
    chunks[:, N_PIECES] = n_pieces
    chunks[:, FIRST_COPY] = np.searchsorted(heads, starts)
    chunks[:, N_COPIES] = np.diff(np.append(chunks[:, FIRST_COPY], len(heads)))
    return chunks, copies


def _chunks_of_parts(slots: Int64s, pieces: Int64s, pool: Pool, buffer_bytes: int) -> tuple[Int64s, Int64s]:
    cuts = cut_parts(pieces, buffer_bytes)
    parts = len(cuts) - 1
    begin = pieces[cuts[:-1], OFFSET]
    end = pieces[cuts[1:] - 1, OFFSET] + pieces[cuts[1:] - 1, BYTES]
    chunks = np.zeros((len(slots) * parts, 6), np.int64)
    chunks[:, FIRST_BLOCK] = np.repeat(np.arange(len(slots)), parts)
    chunks[:, N_BLOCKS] = 1
    chunks[:, FIRST_PIECE] = np.tile(cuts[:-1], len(slots))
    chunks[:, N_PIECES] = np.tile(np.diff(cuts), len(slots))
    chunks[:, FIRST_COPY] = np.arange(len(chunks))
    chunks[:, N_COPIES] = 1
    copies = np.zeros((len(chunks), 3), np.int64)
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
    n = len(slots)
    breaks = np.ones(n, bool)
    joined = one_tensor & (addresses[:-1] + sizes[:-1] == addresses[1:]) & (host[:-1] + sizes[:-1] == host[1:])
    breaks[1:] = ~joined | (np.diff(slots // pool.segment_slots) != 0)
    heads = np.flatnonzero(breaks)
    copies = np.empty((len(heads), 3), np.int64)
    copies[:, DEVICE_SIDE] = addresses[heads]
    copies[:, HOST_SIDE] = host[heads]
    copies[:, COPY_BYTES] = np.add.reduceat(sizes, heads) if n else sizes
    starts = np.arange(0, len(heads), max(1, len(heads) // (4 * streams)))
    chunks = np.zeros((len(starts), 6), np.int64)
    chunks[:, FIRST_COPY] = starts
    chunks[:, N_COPIES] = np.diff(np.append(starts, len(heads)))
    return Plan(np.empty(0, np.int32), chunks, copies, int(sizes.sum()))
