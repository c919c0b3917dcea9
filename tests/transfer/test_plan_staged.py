"""Plans through staging buffers, executed by :mod:`tests.naive_plan`: every byte of every record, once, to its place."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.transfer.plan import (
    COPY_BYTES,
    DEVICE_SIDE,
    FIRST,
    FIRST_BLOCK,
    FIRST_COPY,
    HOST_PITCH,
    HOST_SIDE,
    INSTEAD,
    LAST,
    LINES,
    N_BLOCKS,
    N_COPIES,
    N_PIECES,
    NONE,
    PITCH,
    Plan,
    Pool,
    plan_staged,
    split_pieces,
)
from tests.naive_plan import VRAM, Machine
from tests.transfer.plans import HOST, Case, cases, fragments_of

KINDS = [{}, *({"ctas": 3, "small": small} for small in (NONE, FIRST, LAST))]  # a launch a chunk, and one kernel


def plan_of(case: Case, kind: dict[str, int] | None = None) -> Plan:
    pieces, buffer = case.pieces, case.buffer_bytes
    return plan_staged(case.blocks, case.slots, pieces, case.pool, buffer, case.streams, case.max_blocks, **(kind or {}))


def machine_of(case: Case, seed: int) -> Machine:
    rng = np.random.default_rng(seed)
    vram = rng.integers(1, 256, case.vram_bytes, np.uint8)
    host = rng.integers(1, 256, case.pool_slots * case.pool.slot_bytes, np.uint8)
    return Machine(vram, host, case.pool, case.pieces, case.buffer_bytes, case.streams, case.turn)


@settings(max_examples=150)
@given(cases(), st.sampled_from(KINDS))
def test_a_save_puts_every_byte_of_every_record_once_into_its_slot(case: Case, kind: dict[str, int]) -> None:
    machine = machine_of(case, 1)
    vram, host = machine.vram.copy(), machine.host.copy()
    plan = plan_of(case, kind)
    machine.run(plan, to_host=True)
    assert (machine.vram == vram).all() and plan.nbytes == case.record_bytes * len(case.slots)
    free = np.ones(len(host), bool)
    for block, slot in zip(case.blocks.tolist(), case.slots.tolist(), strict=True):
        record, padding = case.slot_bytes(slot, case.record_bytes), case.slot_bytes(slot, case.pool.slot_bytes)
        assert (machine.host[record] == vram[case.page_bytes(block)]).all()
        assert (machine.host_writes[record] == 1).all()
        assert not machine.host_writes[record.stop : padding.stop].any(), "bytes of another block in the padding of this one"
        free[record] = False
    assert not machine.host_writes[free].any() and (machine.host[free] == host[free]).all()


@settings(max_examples=150)
@given(cases(), st.sampled_from(KINDS))
def test_a_load_puts_every_byte_of_every_record_once_into_its_page(case: Case, kind: dict[str, int]) -> None:
    machine = machine_of(case, 2)
    vram, host = machine.vram.copy(), machine.host.copy()
    machine.run(plan_of(case, kind), to_host=False)
    assert (machine.host == host).all()
    wanted, writes = vram.copy(), np.zeros(len(vram), np.int64)
    for block, slot in zip(case.blocks.tolist(), case.slots.tolist(), strict=True):
        wanted[case.page_bytes(block)] = host[case.slot_bytes(slot, case.record_bytes)]
        writes[case.page_bytes(block)] += 1
    assert (machine.vram == wanted).all() and (machine.device_writes == writes).all()


@settings(max_examples=150)
@given(cases())
def test_chunks_and_copies_keep_their_bounds(case: Case) -> None:
    plan, n = plan_of(case), len(case.slots)
    chunks, copies = plan.chunks, plan.copies
    assert plan.ids.dtype == np.int32 and chunks.dtype == copies.dtype == np.int64
    assert sorted(plan.ids.tolist()) == sorted(case.blocks.tolist())
    assert (chunks[:, N_BLOCKS] >= 1).all() and (chunks[:, N_BLOCKS] <= case.max_blocks).all()
    assert (chunks[:, N_PIECES] >= 1).all()
    assert chunks[0, FIRST_COPY] == 0 and chunks[:, N_COPIES].sum() == len(copies)
    assert (chunks[1:, FIRST_COPY] == (chunks[:-1, FIRST_COPY] + chunks[:-1, N_COPIES])).all()
    ends = copies[:, DEVICE_SIDE] + (copies[:, LINES] - 1) * copies[:, PITCH] + copies[:, COPY_BYTES]
    assert (copies[:, DEVICE_SIDE] >= 0).all() and (ends <= case.buffer_bytes).all()
    if case.pool.slot_bytes <= case.buffer_bytes:
        assert chunks[0, FIRST_BLOCK] == 0 and chunks[:, N_BLOCKS].sum() == n
        assert chunks[:, N_BLOCKS].max() <= -(-n // case.streams), "a small transfer is cut so that every buffer gets a part"


@settings(max_examples=50)
@given(cases())
def test_planning_does_not_change_its_arguments(case: Case) -> None:
    blocks, slots, pieces = case.blocks.copy(), case.slots.copy(), case.pieces
    kept = pieces.copy()
    plan_staged(blocks, slots, pieces, case.pool, case.buffer_bytes, case.streams, case.max_blocks)
    assert (blocks == case.blocks).all() and (slots == case.slots).all() and (pieces == kept).all()


def simple(slots: list[int], *, segment: int = 1000, per_buffer: int = 4, streams: int = 1, max_blocks: int = 2048) -> Plan:
    """Records of 100 bytes in slots of 128."""
    fragments, _ = fragments_of([60, 40], 100, 0, interleaved=False)
    blocks = np.arange(len(slots), dtype=np.int64)
    pool = Pool(HOST, 128, segment)
    return plan_staged(blocks, np.array(slots), split_pieces(fragments), pool, per_buffer * 128, streams, max_blocks)


def copies_of(plan: Plan) -> list[tuple[int, int, int, int]]:
    """(offset in staging, offset in the pool, bytes of a line, lines) of each copy."""
    return [(device, host - HOST, *size) for device, host, *size in plan.copies[:, : LINES + 1].tolist()]


def test_neighbours_leave_in_one_copy() -> None:
    plan = simple([7, 5, 6, 9], streams=2)
    assert plan.chunks[:, N_BLOCKS].tolist() == [2, 2] and plan.ids.tolist() == [1, 2, 0, 3]
    assert copies_of(plan) == [(0, 5 * 128, 100, 2), (0, 7 * 128, 100, 1), (128, 9 * 128, 100, 1)]
    assert plan.copies[:, PITCH].tolist() == plan.copies[:, HOST_PITCH].tolist() == [128] * 3


def test_records_that_fill_their_slots_leave_as_one_line() -> None:
    fragments, _ = fragments_of([60, 68], 100, 0, interleaved=False)
    plan = plan_staged(np.arange(4), np.array([7, 5, 6, 9]), split_pieces(fragments), Pool(HOST, 128, 1000), 512, 2, 2048)
    assert copies_of(plan) == [(0, 5 * 128, 256, 1), (0, 7 * 128, 128, 1), (128, 9 * 128, 128, 1)]


def test_a_segment_border_ends_a_copy() -> None:
    inside = simple(list(range(2, 10)), segment=1000, streams=2)
    across = simple(list(range(2, 10)), segment=5, streams=2)
    assert copies_of(inside) == [(0, 2 * 128, 100, 4), (0, 6 * 128, 100, 4)]
    assert copies_of(across) == [(0, 2 * 128, 100, 3), (384, 5 * 128, 100, 1), (0, 6 * 128, 100, 4)]


@pytest.mark.parametrize(
    ("count", "per_buffer", "streams", "max_blocks", "sizes"),
    [
        (8, 100, 1, 2048, [8]),
        (8, 100, 2, 2048, [4, 4]),
        (7, 100, 3, 2048, [3, 3, 1]),
        (8, 3, 1, 2048, [3, 3, 2]),
        (9, 4, 2, 2048, [3, 3, 3]),
        (8, 100, 1, 3, [3, 3, 2]),
        (3, 100, 4, 2048, [1, 1, 1]),
        (1, 1, 8, 1, [1]),
    ],
)
def test_how_many_records_a_chunk_takes(count: int, per_buffer: int, streams: int, max_blocks: int, sizes: list[int]) -> None:
    plan = simple(list(range(count)), per_buffer=per_buffer, streams=streams, max_blocks=max_blocks)
    assert plan.chunks[:, N_BLOCKS].tolist() == sizes


def test_a_record_larger_than_a_buffer_goes_in_parts() -> None:
    fragments, _ = fragments_of([100, 50, 70], 10, 0, interleaved=False)
    plan = plan_staged(np.array([4, 2]), np.array([1, 0]), split_pieces(fragments, 48), Pool(HOST, 256, 1), 100, 2, 2048)
    # pieces end at 48, 96, 100, 148, 150, 198, 220
    wanted = [(0, at, size, 1) for at, size in ((0, 100), (100, 98), (198, 22), (256, 100), (356, 98), (454, 22))]
    assert copies_of(plan) == wanted and plan.ids.tolist() == [2, 4]
    assert not plan.chunks[:, INSTEAD].any() and plan.chunks[:, :INSTEAD].tolist() == [
        [0, 1, 0, 3, 0, 1],
        [0, 1, 3, 3, 1, 1],
        [0, 1, 6, 1, 2, 1],
        [1, 1, 0, 3, 3, 1],
        [1, 1, 3, 3, 4, 1],
        [1, 1, 6, 1, 5, 1],
    ]


@pytest.mark.parametrize("buffer_bytes", [64 << 20, 64 << 10])
def test_planning_a_hundred_thousand_blocks_takes_no_loop_over_them(buffer_bytes: int) -> None:
    n = 100_000
    fragments = np.array([[VRAM + i * n * 4096, 4096, i * 4096, 4096] for i in range(32)], np.int64)
    rng = np.random.default_rng(0)
    blocks, slots = rng.permutation(n), rng.permutation(n)
    pieces, pool = split_pieces(fragments), Pool(HOST, 32 * 4096, 1 << 19)
    began = time.perf_counter()
    plan = plan_staged(blocks, slots, pieces, pool, buffer_bytes, 3, 2048)
    assert time.perf_counter() - began < 0.5
    assert plan.nbytes == n * 32 * 4096 and plan.copies[:, COPY_BYTES].sum() >= plan.nbytes
    assert (np.diff(plan.copies[:, HOST_SIDE]) > 0).all()


@pytest.mark.parametrize(
    ("small", "wanted"),
    [
        (NONE, [36, 64, 64, 64]),
        (FIRST, [2, 4, 8, 16, 32, 64, 64, 38]),
        (LAST, [38, 64, 64, 32, 16, 8, 4, 2]),
    ],
)
def test_with_one_kernel_chunks_are_small_at_one_end(small: int, wanted: list[int]) -> None:
    """The first of a save are gathered, and the last of a load scattered, while the link stands still."""
    pool, pieces = Pool(HOST, 4096, 1 << 20), split_pieces(np.array([[VRAM, 4096, 0, 4096]]))
    at = np.arange(228)
    plan = plan_staged(at, at, pieces, pool, 64 * 4096, 2, 2048, ctas=4, small=small)
    assert plan.chunks[:, N_BLOCKS].tolist() == wanted and plan.ctas == 4
    few = plan_staged(at[:5], at[:5], pieces, pool, 64 * 4096, 2, 2048, ctas=4, small=small).chunks[:, N_BLOCKS].tolist()
    assert few == {NONE: [5], FIRST: [2, 3], LAST: [3, 2]}[small]
