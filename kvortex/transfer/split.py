"""Splitting records: copy engine and kernel bring parts of the same blocks over the link at the same time.

A kernel that reaches over the link alone, or a DMA and then a kernel that digests what it brought, takes longer for one block
than a DMA of so many bytes. Together they come close to it: what the kernel digests on the way, nobody has to read again, and
what the DMA brought is read while the kernel still moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvortex.transfer.plan import (
    BASE,
    BYTES,
    CHUNK_COLUMNS,
    COPY_BYTES,
    COPY_COLUMNS,
    DEVICE_SIDE,
    FIRST_BLOCK,
    FIRST_COPY,
    FIRST_PIECE,
    HOST_PITCH,
    HOST_SIDE,
    INSTEAD,
    LINES,
    LINES_OF_RUN,
    N_BLOCKS,
    N_COPIES,
    N_PIECES,
    OFFSET,
    PITCH,
    STRIDE,
    Int64s,
    Plan,
    Pool,
    plan_mapped,
)

# Parts of a record in sixteenths that DMAs move. Of 64 fragments of 32 KiB, 24 to 32 took 1.05 to 1.06 times as long as one DMA
# on an H200, 20 took 1.07, 16 took 1.12 and 40 took 1.19: see docs/transfers.md.
_WANTED, _LEAST, _MOST = 7, 6, 8
_WHOLE = 16


@dataclass(frozen=True)
class Cut:
    """Where records are cut: DMAs move what comes before, a kernel what comes behind.

    Attributes
    ----------
    nbytes
        Of a record, that DMAs move; 0 where all is the kernel's, since there is one fragment.
    n_pieces
        Of a record, in these.
    copies : (k, 6) int64
        Of block 0 and slot 0, with an address of 0.
    strides : (k,) int64
        Bytes from block to block, of each of these.
    behind : (9,) int64
        What a chunk of :func:`kvortex.transfer.plan.plan_mapped` has more, or less, where it is left what comes behind.
    alone : (2, 9) int64
        The chunks of one block, with a slot at address 0.
    record_bytes
        Of both parts together.
    balanced
        Whether neither part takes much longer than the other.
    """

    nbytes: int
    n_pieces: int
    copies: Int64s
    strides: Int64s
    behind: Int64s
    alone: Int64s
    record_bytes: int
    balanced: bool

    @property
    def rectangle_bytes(self) -> int:
        """Of one DMA, on average."""
        return self.nbytes // max(1, len(self.copies))


def cut_record(fragments: Int64s, runs: Int64s, pieces: Int64s) -> Cut:
    """The best place between two fragments.

    Parameters
    ----------
    fragments : (F, 4) int64
    runs : (R, 6) int64
        Of :func:`kvortex.transfer.plan.strides`, the one with the cut in it is shortened.
    pieces : (P, 4) int64
        Of the same fragments.
    """
    whole = int(fragments[:, BYTES].sum())
    starts = np.append(fragments[:, OFFSET], whole)
    lines = int(np.argmin(np.abs(_WHOLE * starts - _WANTED * whole)))
    nbytes = int(starts[lines])
    ends = np.cumsum(runs[:, LINES_OF_RUN])
    rows = runs[: int(np.searchsorted(ends, lines)) + 1].copy() if lines else runs[:0]
    if lines:
        rows[-1, LINES_OF_RUN] -= ends[len(rows) - 1] - lines
    copies = np.empty((len(rows), COPY_COLUMNS), np.int64)
    copies[:, DEVICE_SIDE], copies[:, HOST_SIDE] = rows[:, BASE], rows[:, OFFSET]
    copies[:, COPY_BYTES] = copies[:, HOST_PITCH] = rows[:, BYTES]
    copies[:, LINES], copies[:, PITCH] = rows[:, LINES_OF_RUN], rows[:, LINES_OF_RUN + 1]
    balanced = _LEAST * whole <= _WHOLE * nbytes <= _MOST * whole and nbytes > 0
    n_pieces, behind = int(np.searchsorted(pieces[:, OFFSET], nbytes)), np.zeros(CHUNK_COLUMNS, np.int64)
    behind[[FIRST_PIECE, N_PIECES, INSTEAD]] = n_pieces, -n_pieces, nbytes
    alone = np.zeros((2, CHUNK_COLUMNS), np.int64)
    alone[0, N_COPIES], alone[1, N_BLOCKS], alone[1, N_PIECES] = len(copies), 1, len(pieces)
    alone[1] += behind
    return Cut(nbytes, n_pieces, copies, rows[:, STRIDE].copy(), behind, alone, whole, balanced)


def plan_split(blocks: Int64s, slots: Int64s, pieces: Int64s, cut: Cut, pool: Pool, max_blocks: int) -> Plan:
    """A transfer by strided DMAs and by kernels that reach into the slots, at the same time.

    Parameters are those of :func:`kvortex.transfer.plan.plan_mapped`. Before each chunk of that, which takes the pieces behind
    the cut, comes one with the copies of the same records: on two streams DMAs are on the one and launches on the other.
    """
    if cut.n_pieces and len(blocks) == 1:  # what there is to do for many takes three times as long
        return _plan_one(blocks, pool.address + int(slots[0]) * pool.slot_bytes, cut, pool.slot_bytes)
    mapped = plan_mapped(blocks, slots, pieces, pool, max_blocks)
    if not cut.n_pieces:
        return mapped
    blocks, slots = blocks[mapped.order], slots[mapped.order]
    count, each = len(blocks), len(cut.copies)
    copies = np.repeat(cut.copies[None], count, axis=0)
    copies[..., DEVICE_SIDE] += blocks[:, None] * cut.strides
    copies[..., HOST_SIDE] += pool.address + slots[:, None] * pool.slot_bytes
    chunks = np.repeat(mapped.chunks, 2, axis=0)
    dmas, kernels = chunks[::2], chunks[1::2]
    dmas[:, FIRST_COPY], dmas[:, N_COPIES] = each * dmas[:, FIRST_BLOCK], each * dmas[:, N_BLOCKS]
    dmas[:, [FIRST_BLOCK, N_BLOCKS, N_PIECES, INSTEAD]] = 0
    kernels += cut.behind
    return Plan(mapped.ids, chunks, copies.reshape(-1, COPY_COLUMNS), mapped.nbytes, mapped.pitch, order=mapped.order)


def _plan_one(blocks: Int64s, slot: int, cut: Cut, pitch: int) -> Plan:
    """The same of one block, to or from the address ``slot``."""
    copies, chunks = cut.copies.copy(), cut.alone.copy()
    copies[:, DEVICE_SIDE] += blocks[0] * cut.strides
    copies[:, HOST_SIDE] += slot
    chunks[1, INSTEAD] += slot
    return Plan(blocks.astype(np.int32), chunks, copies, cut.record_bytes, pitch)
