"""Plans without staging: every byte goes where it belongs, once, whatever the layout."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings

from kvortex.transfer.plan import (
    FIRST_COPY,
    INSTEAD,
    LINES,
    N_BLOCKS,
    N_COPIES,
    PITCH,
    Plan,
    Pool,
    plan_batched,
    plan_mapped,
    plan_strided,
    split_pieces,
    strides,
)
from tests.naive_plan import VRAM, Machine
from tests.transfer.plans import HOST, Case, cases, fragments_of


def made(case: Case, route: str) -> Plan:
    if route == "strided":
        found = strides(case.fragments, 1 << 31, np.zeros(len(case.fragments), np.int64))
        return plan_strided(case.blocks, case.slots, found, case.pool, case.streams)
    if route in ("batched", "one by one"):
        where, one_call = np.zeros(len(case.fragments), np.int64), route == "batched"
        return plan_batched(case.blocks, case.slots, case.fragments, where, case.pool, case.streams, one_call=one_call)
    return plan_mapped(case.blocks, case.slots, case.pieces, case.pool, case.max_blocks)


@pytest.mark.parametrize("route", ["strided", "batched", "one by one", "mapped"])
@settings(max_examples=150)
@given(case=cases())
def test_every_byte_once(route: str, case: Case) -> None:
    rng = np.random.default_rng(0)
    vram = rng.integers(0, 256, case.vram_bytes, np.uint8)
    host = rng.integers(0, 256, case.pool_slots * case.pool.slot_bytes, np.uint8)
    plan = made(case, route)
    run = Machine(vram.copy(), host.copy(), case.pool, case.pieces, case.buffer_bytes, case.streams, case.turn)
    run.run(plan, to_host=True)
    wanted = host.copy()
    for block, slot in zip(case.blocks.tolist(), case.slots.tolist(), strict=True):
        wanted[case.slot_bytes(slot, case.record_bytes)] = vram[case.page_bytes(block)]
    assert (run.host == wanted).all() and (run.vram == vram).all() and run.host_writes.max(initial=0) <= 1
    target = rng.integers(0, 256, case.vram_bytes, np.uint8)
    back = Machine(target.copy(), wanted.copy(), case.pool, case.pieces, case.buffer_bytes, case.streams, case.turn)
    back.run(plan, to_host=False)
    for block in case.blocks.tolist():
        target[case.page_bytes(block)] = vram[case.page_bytes(block)]
    assert (back.vram == target).all() and back.device_writes.max(initial=0) <= 1
    assert plan.nbytes == case.record_bytes * len(case.blocks)


def rows(*bases: int, nbytes: int = 64, stride: int = 64) -> np.ndarray:
    offsets = nbytes * np.arange(len(bases))
    return np.array([(VRAM + base, stride, offset, nbytes) for base, offset in zip(bases, offsets, strict=True)], np.int64)


def runs(fragments: np.ndarray, max_pitch: int = 1 << 31, allocations: list[int] | None = None) -> list[tuple[int, int, int]]:
    where = np.zeros(len(fragments), np.int64) if allocations is None else np.array(allocations)
    return [(base - VRAM, lines, pitch) for base, _, _, _, lines, pitch in strides(fragments, max_pitch, where).tolist()]


def test_evenly_spaced_fragments_are_one_run() -> None:
    assert runs(rows(0, 1000, 2000, 3000)) == [(0, 4, 1000)]
    assert runs(rows(0, 1000, 2000, 3001)) == [(0, 3, 1000), (3001, 1, 64)]
    assert runs(rows(0, 1000, 5000, 6000)) == [(0, 2, 1000), (5000, 2, 1000)]
    assert runs(rows(3000, 2000, 1000)) == [(3000, 1, 64), (2000, 1, 64), (1000, 1, 64)], "a pitch is never negative"
    assert runs(rows(0, 1000, 2000), max_pitch=999) == [(0, 1, 64), (1000, 1, 64), (2000, 1, 64)]
    assert runs(np.empty((0, 4), np.int64)) == []


def test_a_run_stays_in_one_allocation() -> None:
    """The driver refuses a rectangle that spans two, however evenly they lie."""
    assert runs(rows(0, 1000, 2000, 3000), allocations=[5, 5, 9, 9]) == [(0, 2, 1000), (2000, 2, 1000)]
    assert runs(rows(0, 1000, 2000), allocations=[-1, -1, -1]) == [(0, 1, 64), (1000, 1, 64), (2000, 1, 64)]


def test_fragments_that_differ_are_not_one_run() -> None:
    mixed = np.concatenate([rows(0, 1000, nbytes=64), rows(2000, 3000, nbytes=32)])
    mixed[:, 2] = [0, 64, 128, 160]
    assert runs(mixed) == [(0, 2, 1000), (2000, 2, 1000)]
    other_stride = rows(0, 1000, 2000)
    other_stride[1, 1] = 128
    assert runs(other_stride) == [(0, 1, 64), (1000, 1, 64), (2000, 1, 64)]


def test_a_block_of_even_layers_is_one_copy() -> None:
    fragments, _ = fragments_of([64] * 8, 10, 0, interleaved=False)
    found = strides(fragments, 1 << 31, np.zeros(8, np.int64))
    plan = plan_strided(np.array([3, 7]), np.array([5, 2]), found, Pool(HOST, 4096, 100), 3)
    assert plan.copies[:, LINES].tolist() == [8, 8] and plan.copies[:, PITCH].tolist() == [640, 640]


def batches(
    fragments: np.ndarray,
    blocks: list[int],
    slots: list[int],
    pool: Pool,
    streams: int = 1,
    allocations: list[int] | None = None,
) -> list[list[tuple[int, int, int]]]:
    """Of each call: where in VRAM, where in the pool, and bytes. A call for each copy must move the same."""
    where = np.zeros(len(fragments), np.int64) if allocations is None else np.array(allocations)
    made = (np.array(blocks), np.array(slots), fragments, where, pool, streams)
    plan, each = (plan_batched(*made, one_call=one_call) for one_call in (True, False))
    copies = [(device - VRAM, host - HOST, nbytes) for device, host, nbytes in plan.batch.T.tolist()]
    assert not len(plan.copies) and not each.batch.size and (plan.batch.T == each.copies[:, :3]).all()
    assert (each.copies[:, 3:] == [1, 0, 0]).all() and plan.nbytes == each.nbytes == plan.batch[2].sum()
    assert plan.chunks[0, FIRST_COPY] == 0 and plan.chunks[:, N_COPIES].sum() == len(copies) and len(plan.chunks) <= streams
    return [copies[first : first + count] for first, count in plan.chunks[:, [FIRST_COPY, N_COPIES]].tolist()]


def test_fragments_that_touch_on_both_sides_are_one_copy_of_a_batch() -> None:
    pool = Pool(HOST, 128, 100)
    apart, together = rows(0, 1000, stride=64), rows(0, 64, stride=128)
    assert batches(apart, [1, 5], [2, 9], pool) == [[(64, 256, 64), (1064, 320, 64), (320, 1152, 64), (1320, 1216, 64)]]
    assert batches(together, [1, 5], [2, 9], pool) == [[(128, 256, 128), (640, 1152, 128)]]
    assert batches(together, [5, 1, 6], [3, 9, 4], pool) == [[(640, 384, 256), (128, 1152, 128)]], "over the ends of records"
    assert batches(together, [5, 6], [4, 3], pool) == [[(768, 384, 128), (640, 512, 128)]], "the other way round in VRAM"
    assert batches(together, [5, 6], [3, 4], Pool(HOST, 129, 100)) == [[(640, 387, 128), (768, 516, 128)]], "a gap in the pool"
    assert batches(rows(0, stride=64), [4, 5, 6], [7, 8, 9], Pool(HOST, 64, 100)) == [[(256, 448, 192)]]


def test_no_copy_of_a_batch_crosses_a_border_of_memory() -> None:
    """Neither that of a registration of host memory nor that of an allocation in VRAM."""
    together, pool = rows(0, 64, stride=128), Pool(HOST, 128, 100)
    assert batches(together, [1, 2, 3], [4, 5, 6], Pool(HOST, 128, 5)) == [[(128, 512, 128), (256, 640, 256)]]
    for allocations in ([7, 9], [-1, -1], [7, -1]):
        wanted = [[(128, 512, 64), (192, 576, 64), (256, 640, 64), (320, 704, 64)]]
        assert batches(together, [1, 2], [4, 5], pool, allocations=allocations) == wanted
    outer = rows(0, 64, 128, stride=192)
    wanted = [[(192, 576, 64), (256, 640, 128), (384, 768, 64), (448, 832, 128)]]
    assert batches(outer, [1, 2], [3, 4], Pool(HOST, 192, 100), allocations=[7, 9, 9]) == wanted
    inner = [[(192, 576, 64), (256, 640, 64), (320, 704, 128), (448, 832, 64), (512, 896, 64)]]
    assert batches(outer, [1, 2], [3, 4], Pool(HOST, 192, 100), allocations=[7, 9, 7]) == inner, "from a record to the next"


def test_batches_are_of_about_as_many_bytes_each() -> None:
    mixed = rows(0, 1000, 2000, 3000, nbytes=100, stride=10_000)
    mixed[:, 3] = [700, 100, 100, 100]
    mixed[:, 2] = [0, 700, 800, 900]
    assert [sum(copy[2] for copy in call) for call in batches(mixed, [0, 1], [0, 1], Pool(HOST, 1000, 9), 2)] == [1000, 1000]
    mixed[:, 3], mixed[:, 2] = [100, 100, 100, 700], [0, 100, 200, 300]
    assert [sum(copy[2] for copy in call) for call in batches(mixed, [0], [0], Pool(HOST, 1000, 9), 2)] == [300, 700]
    even = batches(rows(0, 1000, 2000, 3000, stride=5000), [0, 1, 2], [0, 1, 2], Pool(HOST, 256, 9), 5)
    assert sorted(len(call) for call in even) == [2, 2, 2, 3, 3]
    assert len(batches(rows(0, stride=64), [4], [7], Pool(HOST, 64, 9), 5)) == 1, "no call without a copy"


def test_planning_two_million_copies_takes_no_loop_over_them() -> None:
    fragments, _ = fragments_of([64] * 64, 30_000, 0, interleaved=False)
    rng = np.random.default_rng(0)
    blocks, slots = rng.permutation(30_000), rng.permutation(30_000)
    where, pool = np.zeros(64, np.int64), Pool(HOST, 4096, 1 << 24)
    began = time.perf_counter()
    plan = plan_batched(blocks, slots, fragments, where, pool, 4, one_call=True)
    assert time.perf_counter() - began < 2 and plan.batch.shape[1] > 1_900_000


def test_neighbours_in_the_pool_are_one_launch() -> None:
    fragments, _ = fragments_of([64, 32], 10, 0, interleaved=False)
    plan = plan_mapped(np.arange(6), np.array([4, 5, 6, 9, 2, 1]), split_pieces(fragments), Pool(HOST, 128, 6), 2)
    assert plan.ids.tolist() == [5, 4, 0, 1, 2, 3]
    assert plan.chunks[:, N_BLOCKS].tolist() == [2, 2, 1, 1], "at most two ids a launch, and a segment ends behind slot 5"
    assert plan.chunks[:, INSTEAD].tolist() == [HOST + 128 * slot for slot in (1, 4, 6, 9)]
