"""Random transfers for the planner: layouts, pools, pages and slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from kvortex.transfer.plan import Int64s, Pool, split_pieces
from tests.naive_plan import VRAM

HOST = 1 << 40  # address of slot 0


@dataclass
class Case:
    """A transfer of ``blocks`` to ``slots``."""

    fragments: Int64s
    piece_bytes: int
    pool: Pool
    pool_slots: int
    vram_bytes: int
    blocks: Int64s
    slots: Int64s
    buffer_bytes: int
    streams: int
    max_blocks: int
    turn: int

    @property
    def pieces(self) -> Int64s:
        return split_pieces(self.fragments, self.piece_bytes)

    @property
    def record_bytes(self) -> int:
        return int(self.fragments[:, 3].sum())

    def page_bytes(self, block: int) -> Int64s:
        """Offsets in VRAM of a block's bytes, in record order."""
        rows = self.fragments.tolist()
        return np.concatenate([base - VRAM + block * stride + np.arange(n) for base, stride, _, n in rows])

    def slot_bytes(self, slot: int, nbytes: int) -> slice:
        """The first bytes of a slot in the host pool."""
        return slice(slot * self.pool.slot_bytes, slot * self.pool.slot_bytes + nbytes)


def fragments_of(sizes: list[int], num_blocks: int, gap: int, *, interleaved: bool) -> tuple[Int64s, int]:
    """Fragments of blocks that lie block by block (``interleaved``) or tensor by tensor; and the bytes of all."""
    offsets = np.cumsum([0, *sizes[:-1]])
    if interleaved:
        stride = sum(sizes) + gap * len(sizes)
        bases = VRAM + offsets + gap * np.arange(len(sizes))
        rows = [(base, stride, offset, size) for base, offset, size in zip(bases, offsets, sizes, strict=True)]
        return np.array(rows, np.int64), stride * num_blocks
    rows, at = [], VRAM
    for offset, size in zip(offsets, sizes, strict=True):
        rows.append((at, size + gap, offset, size))
        at += (size + gap) * num_blocks
    return np.array(rows, np.int64), at - VRAM


@st.composite
def slots_of(draw: st.DrawFn, pool_slots: int, count: int) -> Int64s:
    """Different slots: one run, everything in a random order, or a run with holes."""
    kind = draw(st.sampled_from(["run", "any", "holes"]))
    if kind == "run":
        first = draw(st.integers(0, pool_slots - count))
        slots = np.arange(first, first + count)
    else:
        slots = np.array(draw(st.permutations(range(pool_slots)))[:count])
        slots = np.sort(slots) if kind == "holes" else slots
    return slots.astype(np.int64)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A random transfer through staging buffers."""
    sizes = draw(st.lists(st.integers(1, 200), min_size=1, max_size=6))
    num_blocks = draw(st.integers(1, 24))
    fragments, vram_bytes = fragments_of(sizes, num_blocks, draw(st.sampled_from([0, 5, 64])), interleaved=draw(st.booleans()))
    piece_bytes = draw(st.sampled_from([16, 48, 4096]))
    align = draw(st.sampled_from([1, 32, 64]))
    record = sum(sizes)
    slot_bytes = -(-record // align) * align + draw(st.sampled_from([0, 0, align]))
    pool_slots = draw(st.integers(1, 30))
    count = draw(st.integers(1, min(num_blocks, pool_slots)))
    largest_piece = min(piece_bytes, max(sizes))
    return Case(
        fragments=fragments,
        piece_bytes=piece_bytes,
        pool=Pool(HOST, slot_bytes, draw(st.integers(1, pool_slots + 2))),
        pool_slots=pool_slots,
        vram_bytes=vram_bytes,
        blocks=np.array(draw(st.permutations(range(num_blocks)))[:count], np.int64),
        slots=draw(slots_of(pool_slots, count)),
        buffer_bytes=draw(st.one_of(st.integers(largest_piece, 2 * record), st.integers(slot_bytes, 12 * slot_bytes))),
        streams=draw(st.integers(1, 5)),
        max_blocks=draw(st.integers(1, 8)),
        turn=draw(st.integers(0, 9)),
    )
