"""Plans without staging: every byte goes where it belongs, once, whatever the layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from kvortex.transfer.plan import INSTEAD, LINES, N_BLOCKS, PITCH, Plan, Pool, plan_mapped, plan_strided, split_pieces, strides
from kvortex.transfer.routes import DEEP_BYTES, Route, choose
from tests.naive_plan import VRAM, Machine
from tests.transfer.plans import HOST, Case, cases, fragments_of


def made(case: Case, route: str) -> Plan:
    if route == "strided":
        found = strides(case.fragments, 1 << 31, np.zeros(len(case.fragments), np.int64))
        return plan_strided(case.blocks, case.slots, found, case.pool, case.streams)
    return plan_mapped(case.blocks, case.slots, case.pieces, case.pool, case.max_blocks)


@pytest.mark.parametrize("route", ["strided", "mapped"])
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


def test_neighbours_in_the_pool_are_one_launch() -> None:
    fragments, _ = fragments_of([64, 32], 10, 0, interleaved=False)
    plan = plan_mapped(np.arange(6), np.array([4, 5, 6, 9, 2, 1]), split_pieces(fragments), Pool(HOST, 128, 6), 2)
    assert plan.ids.tolist() == [5, 4, 0, 1, 2, 3]
    assert plan.chunks[:, N_BLOCKS].tolist() == [2, 2, 1, 1], "at most two ids a launch, and a segment ends behind slot 5"
    assert plan.chunks[:, INSTEAD].tolist() == [HOST + 128 * slot for slot in (1, 4, 6, 9)]


def test_which_route() -> None:
    def of(fragment: int, lines: int, nbytes: int, busy: bool) -> Route:
        runs = np.array([[0, fragment, 0, fragment, lines, 1 << 20]], np.int64)
        return choose(runs, nbytes, beside_compute=busy)

    assert of(32 << 10, 64, 1 << 30, True) is Route.STRIDED and of(32 << 10, 64, 1 << 30, False) is Route.RESIDENT
    assert of(4 << 10, 64, 1 << 30, True) is Route.RESIDENT and of(32 << 10, 2, 1 << 30, True) is Route.RESIDENT
    assert of(4 << 10, 64, 2 << 20, False) is Route.MAPPED and of(32 << 10, 64, 2 << 20, True) is Route.STRIDED
    lone = np.array([[0, 4096, 0, 4096, 64, 1 << 20]], np.int64)
    assert choose(lone, 1 << 30, beside_compute=False, resident=False) is Route.STAGED
    deep = {"buffer_bytes": DEEP_BYTES}
    assert choose(lone, 1 << 30, beside_compute=True, **deep) is Route.STAGED, "a launch takes nothing from the next kernel"
    assert choose(lone, 1 << 30, beside_compute=False, **deep) is Route.RESIDENT
    assert choose(lone, 1 << 30, beside_compute=True, buffer_bytes=DEEP_BYTES - 1) is Route.RESIDENT
    middle = np.array([[0, 18432, 0, 18432, 64, 1 << 20]], np.int64)
    assert choose(middle, 1 << 30, beside_compute=True) is Route.STRIDED
    assert choose(middle, 1 << 30, beside_compute=True, **deep) is Route.STAGED
