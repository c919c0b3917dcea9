"""Lanes with telling numbers in every cell, and plans to issue on them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from kvortex.transfer import digesting as dg
from kvortex.transfer.coded.plans import plan_coded
from kvortex.transfer.issue import cells
from kvortex.transfer.issue.dma import SCRATCH_CELLS
from kvortex.transfer.issue.pacing import addresses
from kvortex.transfer.issue.plans import issue
from kvortex.transfer.layers import cut_layers, cut_sections, group_layers, in_order, plan_layers
from kvortex.transfer.plan import (
    ARGUMENTS,
    BUFFER,
    COUNTER,
    FIRST_LAUNCH,
    LAUNCH_COLUMNS,
    N_COPIES,
    N_LAUNCHES,
    N_PIECES,
    PARAMETERS,
    RELATIVE,
    WORK,
    Int64s,
    Plan,
    Pool,
    plan_batched,
    plan_direct,
    plan_staged,
    split_pieces,
)
from kvortex.transfer.plan import IDS as IDS_BASE
from kvortex.transfer.plan import STATUS as STATUS_BASE
from kvortex.transfer.plan import SUMS as SUMS_BASE
from tests.naive_plan import VRAM
from tests.transfer.plans import HOST, fragments_of
from tests.transfer.recorder import Recorder

CONTEXT, KERNEL, THREADS, TABLE, JOIN_STREAM, CALLER_EVENT = 0xC0, 0xF0, 64, 0x7AB1E000, 0x5000, 0xE000
COPY_STREAM, COPY_EVENT, COUNTERS = 0x5CC00, 0xECC00, 0xC0C000
CALLER, START, DONE, IDS, MARK = 0x5CA11, 0xE111, 0xE222, 0x1D5000, 0xE30000
IDS_IN_VRAM, SUMS, STATUS = 0x1D6000, 0x50000, 0x57A700
SLOT_BYTES, PIECE_BYTES = 128, 16


@dataclass
class Lane:
    """What ``issue`` takes besides the plan; stream k is 0x5001 + k, its buffer 0xB0000 * (k + 1), its events 0xE001 + k,
    0xD001 + k and 0xC001 + k. ``after`` are events to wait for in the place of the caller's stream; ``place`` is that in the
    queue of a thread that paces what it issues, or 0; ``raised`` what the flag for early reading was raised to last."""

    count: int
    to_host: bool
    turn: int = 0
    max_ctas: int = 3
    after: list[int] | None = None
    digest: Int64s | None = None
    place: int = 0
    raised: int = 0
    cells: Int64s = field(init=False)

    def __post_init__(self) -> None:
        at = np.arange(self.count, dtype=np.int64)
        self.streams, self.joins, self.buffers = 0x5001 + at, 0xE001 + at, 0xB0000 * (at + 1)
        self.turns = np.stack((0xD001 + at, 0xC001 + at))
        self.works = 0x330000 + 0x1000 * at
        self.cells = np.zeros(cells.LANE_CELLS, np.int64)
        self.cells[cells.CONTEXT] = CONTEXT
        self.cells[cells.KERNEL] = KERNEL
        self.cells[cells.THREADS] = THREADS
        self.cells[cells.MAX_CTAS] = self.max_ctas
        self.cells[cells.TABLE] = TABLE
        self.cells[cells.JOIN_STREAM] = JOIN_STREAM
        self.cells[cells.CALLER_EVENT] = CALLER_EVENT
        self.cells[cells.TO_HOST] = self.to_host
        self.cells[cells.COPY_STREAM], self.cells[cells.COPY_EVENT] = COPY_STREAM, COPY_EVENT
        self.cells[cells.COUNTERS], self.cells[cells.RAISED] = COUNTERS, self.raised
        self.cells[cells.NAP], self.cells[cells.CLOCK] = addresses()

    def issue(self, recorder: Recorder, plan: Plan) -> tuple[int, int]:
        """The two codes."""
        parameters = np.zeros(PARAMETERS, np.int64)
        pointers = parameters.ctypes.data + 8 * np.arange(PARAMETERS, dtype=np.int64)
        turn, outcome = np.array([self.turn]), np.zeros(cells.OUTCOME_CELLS, np.int64)
        outcome[cells.QUEUED], outcome[cells.PACED] = self.place, self.place > 0
        scratch = np.zeros(SCRATCH_CELLS, np.int64)
        caller, after = (CALLER, [CALLER_EVENT]) if self.after is None else (cells.NO_STREAM, self.after)
        fixed = (self.cells, self.streams, self.buffers, self.joins, self.turns, turn, caller, np.array(after, np.int64))
        marks = MARK + np.arange(len(plan.marks), dtype=np.int64)
        table = (plan.chunks, plan.copies, plan.batch, plan.pitch, plan.marks, marks)
        digest = (dg.NO_DIGESTS if self.digest is None else self.digest).copy()
        digest[dg.IDS] = IDS
        rows = plan.launches, self.works, np.array([0, 0, 0, IDS_IN_VRAM, SUMS, STATUS, 0], np.int64)
        last = (*rows, parameters, pointers, scratch, outcome)
        issue(recorder.functions, *fixed, START, DONE, *table, digest, *last)
        assert outcome[cells.ISSUED] == 1
        pushed = len(recorder.calls) > 1
        moved = len(plan.chunks) if pushed and not digest[dg.FLAG] else 0
        assert turn[0] == (self.turn + moved) % self.count
        return int(outcome[cells.ERROR]), int(outcome[cells.LAST])

    def apart(self, plan: Plan) -> bool:
        """Whether copies have a stream of their own: those between several staging buffers and the host."""
        return bool(self.count > 1 and plan.chunks[0, N_PIECES] and plan.chunks[0, N_COPIES])

    def used(self, plan: Plan) -> list[int]:
        """Streams that get chunks, in the order of chunks."""
        order = [(self.turn + chunk) % self.count for chunk in range(len(plan.chunks))]
        return [int(self.streams[at]) for at in dict.fromkeys(order)]


def staged(n: int = 9, streams: int = 3, *, buffer_bytes: int = 2 * SLOT_BYTES) -> Plan:
    """Records of 60 + 40 bytes, in pieces of 16, in slots with a hole and a segment border."""
    fragments, _ = fragments_of([60, 40], 100, 0, interleaved=False)
    slots = np.arange(n) + (np.arange(n) >= 4)
    pieces = split_pieces(fragments, PIECE_BYTES)
    return plan_staged(np.arange(n)[::-1].copy(), slots, pieces, Pool(HOST, SLOT_BYTES, 7), buffer_bytes, streams, 64)


def direct(n: int = 9, streams: int = 3) -> Plan:
    """Buffers of 100 bytes each, with no kernel."""
    return plan_direct(VRAM + 1000 * np.arange(n), np.full(n, 100), np.arange(n), Pool(HOST, SLOT_BYTES, 7), streams)


def layers(n: int = 9) -> Plan:
    """The same records in three groups of layers, some of which are cut once more."""
    fragments, _ = fragments_of([60, 40], 100, 0, interleaved=False)
    edges = np.array([0, 30, 64, 100])
    pieces = split_pieces(cut_layers(fragments, edges), PIECE_BYTES)
    sections, pool = cut_sections(pieces, edges, group_layers(edges, 3), 32), Pool(HOST, SLOT_BYTES, 7)
    return plan_layers(in_order(np.arange(n)[::-1].copy(), np.arange(n)), sections, pool, 96, 64)


def batched(n: int = 9, streams: int = 3) -> Plan:
    """The same records again, fragment by fragment in one call a stream; a hole in the slots and a segment border."""
    fragments, _ = fragments_of([60, 40], 100, 0, interleaved=False)
    slots, pool = np.arange(n) + (np.arange(n) >= 4), Pool(HOST, SLOT_BYTES, 7)
    return plan_batched(np.arange(n)[::-1].copy(), slots, fragments, np.zeros(2, np.int64), pool, streams, one_call=True)


def coded(n: int = 9, streams: int = 3) -> Plan:
    """Records of up to 112 bytes that a codec's launches, two a chunk, bring into slots; copies are as long as the longest."""
    slots, room, used = np.arange(n) + (np.arange(n) >= 4), 112, 64 + np.arange(n) % 5 * 8
    starts = np.arange(0, n, 2)
    plan = plan_coded(np.arange(n)[::-1].copy(), slots, used, Pool(HOST, SLOT_BYTES, 7), room, starts)
    chunks, count = plan.chunks, len(starts)
    chunks[:, FIRST_LAUNCH], chunks[:, N_LAUNCHES] = 2 * np.arange(count), 2
    launches = np.zeros((2 * count, LAUNCH_COLUMNS), np.int64)
    launches[:, :RELATIVE] = np.arange(2 * count)[:, None] + (0xF100, 5, 96)
    launches[:, RELATIVE] = BUFFER | WORK << 4 | 0 << 8 | IDS_BASE << 12 | SUMS_BASE << 16 | STATUS_BASE << 20
    launches[:, RELATIVE] |= COUNTER << 24
    launches[:, ARGUMENTS:] = 1000 * np.arange(2 * count)[:, None] + np.arange(PARAMETERS)
    return dataclasses.replace(plan, launches=launches)


PLANS = {
    "coded": coded(),
    "one coded": coded(1),
    "batched": batched(),
    "one in a batch": batched(1, 1),
    "layers": layers(),
    "staged": staged(),
    "one record": staged(1),
    "parts": staged(3, buffer_bytes=SLOT_BYTES // 2),
    "direct": direct(),
    "one buffer": direct(1),
}
