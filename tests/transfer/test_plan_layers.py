"""Layer-wise plans: every byte once to its place, and at each mark the layers that it stands for, whatever their sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.transfer.layers import (
    Least,
    Sections,
    cut_layers,
    cut_sections,
    group_count,
    group_layers,
    in_order,
    join_groups,
    plan_direct_layers,
    plan_layers,
    run_count,
    split_groups,
)
from kvortex.transfer.plan import BYTES, COPY_BYTES, LINES, N_BLOCKS, OFFSET, Int64s, Plan, Pool, split_pieces
from tests.naive_plan import VRAM, Machine
from tests.transfer.plans import HOST, Case, cases, fragments_of


@st.composite
def layers_of(draw: st.DrawFn, record: int) -> Int64s:
    """Where layers begin: anywhere, also inside fragments."""
    inner = draw(st.lists(st.integers(1, record - 1), unique=True, max_size=6)) if record > 1 else []
    return np.array([0, *sorted(inner), record], np.int64)


def put(case: Case, layers: Int64s, groups: int, *, ctas: int = 0) -> tuple[Plan, Sections, Machine, Any]:
    pieces = split_pieces(cut_layers(case.fragments, layers), case.piece_bytes)
    buffer_bytes = max(64, case.buffer_bytes) // 16 * 16
    most = max(buffer_bytes, -(-int(pieces[:, BYTES].max()) // 16) * 16)
    sections = cut_sections(pieces, layers, group_layers(layers, groups), most)
    buffer_bytes = max(buffer_bytes, sections.pitch)
    plan = plan_layers(in_order(case.blocks, case.slots), sections, case.pool, buffer_bytes, case.max_blocks, ctas=ctas)
    rng = np.random.default_rng(3)
    vram = rng.integers(1, 256, case.vram_bytes, np.uint8)
    host = rng.integers(1, 256, case.pool_slots * case.pool.slot_bytes, np.uint8)
    machine = Machine(vram.copy(), host.copy(), case.pool, pieces, buffer_bytes, case.streams, case.turn)
    return plan, sections, machine, (vram, host)


def test_sections_are_as_far_apart_in_a_buffer_as_16_byte_lanes_want_them() -> None:
    pieces = split_pieces(fragments_of([33, 20], 4, 0, interleaved=False)[0])
    assert cut_sections(pieces, np.array([0, 33, 53]), np.arange(3), 64).pitch == 48


@settings(max_examples=150)
@given(st.data(), cases(), st.integers(1, 7))
def test_a_load(data: st.DataObject, case: Case, groups: int) -> None:
    layers = data.draw(layers_of(case.record_bytes))
    plan, sections, machine, (vram, host) = put(case, layers, groups)
    assert plan.nbytes == case.record_bytes * len(case.blocks) and len(plan.marks) == len(set(sections.group_of)) <= groups
    done = 0
    for group, mark in enumerate(plan.marks.tolist()):
        part = Plan(plan.ids, plan.chunks[done:mark], plan.copies, 0, plan.pitch)
        machine.run(part, to_host=False)
        done = mark
        last = int(np.flatnonzero(sections.group_of == group)[-1])
        here = slice(0, int(layers[last + 1]))
        for block, slot in zip(case.blocks.tolist(), case.slots.tolist(), strict=True):
            record = host[case.slot_bytes(slot, case.record_bytes)]
            at = np.arange(len(vram))[case.page_bytes(block)]
            assert (machine.vram[at[here]] == record[here]).all(), f"layers up to {last} are not there at mark {group}"
            assert (machine.vram[at[here.stop :]] == vram[at[here.stop :]]).all()
    assert done == len(plan.chunks) and machine.device_writes.max() == 1
    assert machine.device_writes.sum() == plan.nbytes and (machine.host == host).all()


@settings(max_examples=100)
@given(st.data(), cases(), st.integers(1, 7))
def test_a_save_writes_records_and_nothing_else(data: st.DataObject, case: Case, groups: int) -> None:
    plan, _, machine, (vram, host) = put(case, data.draw(layers_of(case.record_bytes)), groups)
    machine.run(plan, to_host=True)
    wanted = host.copy()
    for block, slot in zip(case.blocks.tolist(), case.slots.tolist(), strict=True):
        wanted[case.slot_bytes(slot, case.record_bytes)] = vram[case.page_bytes(block)]
    assert (machine.host == wanted).all() and machine.host_writes.max() == 1


@settings(max_examples=100)
@given(st.data(), cases(), st.integers(1, 7), st.randoms())
def test_groups_of_a_save_in_any_order(data: st.DataObject, case: Case, groups: int, rng: Any) -> None:
    """Each one takes its layers as they are by then, and no byte of another."""
    layers = data.draw(layers_of(case.record_bytes))
    plan, sections, machine, (vram, host) = put(case, layers, groups)
    parts = split_groups(plan)
    assert len(parts) == len(plan.marks) and sum(part.nbytes for part in parts) == plan.nbytes
    assert not any(len(part.marks) for part in parts)
    order = rng.sample(range(len(parts)), len(parts))
    wanted = host.copy()
    for step, group in enumerate(order):
        machine.vram[:] = now = vram + np.uint8(step)
        machine.run(parts[group], to_host=True)
        mine = np.flatnonzero(sections.group_of == group)
        here = slice(int(layers[mine[0]]), int(layers[mine[-1] + 1]))
        assert parts[group].nbytes == len(case.blocks) * (here.stop - here.start)
        for block, slot in zip(case.blocks.tolist(), case.slots.tolist(), strict=True):
            wanted[case.slot_bytes(slot, case.record_bytes)][here] = now[case.page_bytes(block)][here]
        assert (machine.host == wanted).all()
    assert machine.host_writes.max() == 1 and machine.host_writes.sum() == plan.nbytes


@settings(max_examples=100)
@given(st.data(), st.integers(1, 400), st.integers(1, 12), st.integers(1, 7), st.integers(1, 4))
def test_records_that_are_one_fragment(data: st.DataObject, nbytes: int, count: int, groups: int, streams: int) -> None:
    fragments, vram_bytes = fragments_of([nbytes], count, 5, interleaved=False)
    layers = data.draw(layers_of(nbytes))
    pool = Pool(HOST, nbytes + 3, 4)
    rng = np.random.default_rng(0)
    blocks, slots = rng.permutation(count), rng.permutation(2 * count)[:count]
    pieces = split_pieces(cut_layers(fragments, layers))
    sections = cut_sections(pieces, layers, group_layers(layers, groups), None)
    plan = plan_direct_layers(in_order(blocks, slots), fragments[0], sections, pool, streams)
    vram, host = rng.integers(0, 256, vram_bytes, np.uint8), rng.integers(0, 256, 2 * count * (nbytes + 3), np.uint8)
    machine = Machine(vram.copy(), host, pool, pieces, 16, streams)
    done = 0
    for group, mark in enumerate(plan.marks.tolist()):
        machine.run(Plan(plan.ids, plan.chunks[done:mark], plan.copies, 0), to_host=False)
        done, end = mark, int(layers[np.flatnonzero(sections.group_of == group)[-1] + 1])
        for block, slot in zip(blocks.tolist(), slots.tolist(), strict=True):
            page = int(fragments[0, 0] + block * fragments[0, 1]) - VRAM
            record = slot * (nbytes + 3)
            assert (machine.vram[page : page + end] == host[record : record + end]).all()
            assert (machine.vram[page + end : page + nbytes] == vram[page + end : page + nbytes]).all()
    assert done == len(plan.chunks) and machine.device_writes.max() == 1 and plan.nbytes == nbytes * count


def test_fragments_are_cut_where_layers_begin() -> None:
    fragments = np.array([[1000, 50, 0, 100], [5000, 70, 100, 60]], np.int64)
    assert cut_layers(fragments, np.array([0, 30, 100, 130, 160])).tolist() == [
        [1000, 50, 0, 30],
        [1030, 50, 30, 70],
        [5000, 70, 100, 30],
        [5030, 70, 130, 30],
    ]
    assert cut_layers(fragments, np.array([0, 160])).tolist() == fragments.tolist()
    assert cut_layers(fragments[:0], np.zeros(1, np.int64)).tolist() == []


@pytest.mark.parametrize(
    ("layers", "count", "edges"),
    [([10] * 8, 4, [0, 2, 4, 6, 8]), ([10] * 8, 1, [0, 8]), ([10] * 8, 8, list(range(9))), ([100, 1, 1], 3, [0, 1, 3])],
)
def test_groups_are_about_equal(layers: list[int], count: int, edges: list[int]) -> None:
    assert group_layers(np.cumsum([0, *layers]), count).tolist() == edges


@pytest.mark.parametrize(
    ("count", "edges"),
    [
        (32, [0, 1, 2, 4, 7, 10, 13, 16, 19, 22, 25, 27, 29, 30, 31, 32]),
        (80, [0, 1, 2, *range(4, 74, 3), 75, 77, 78, 79, 80]),
        (11, [0, 1, 2, 4, 6, 8, 9, 10, 11]),
        (10, list(range(11))),
        (1, [0, 1]),
    ],
)
def test_groups_in_the_middle_are_joined(count: int, edges: list[int]) -> None:
    whole = np.arange(count + 1) * 2
    joined = join_groups(whole)
    assert (joined // 2).tolist() == edges
    there = done = 0.0
    for layers in np.diff(joined) / 2:
        there += layers
        done = max(done, there) + 2 / 3 * layers
    assert done - there == pytest.approx(2 / 3), "a model that needs two thirds of that for a layer is done one layer later"


def test_how_many_groups_pay() -> None:
    record, least = 32 * 64 << 10, Least(line=16 << 10, copy=256 << 10, group=2 << 20)
    assert group_count(32, record, 1000, 1000, least) == 8  # a copy for each record
    assert group_count(4, record, 1000, 1000, least) == 4 and group_count(32, record, 1, 1, least) == 1
    assert group_count(32, record, 2, 2, least) == 2 and group_count(32, 4096, 1_000_000, 1_000_000, least) == 1
    assert group_count(32, record, 1000, 1, least) == 32 and group_count(32, record, 1000, 300, least) == 26
    assert group_count(32, record, 20, 1, least) == 20  # 2 MiB a group
    assert group_count(32, 32 * 8 << 10, 1000, 1, least) == 16  # 16 KiB a line


def test_runs_of_neighbours() -> None:
    for slots, runs in (([7], 1), ([2, 1, 3], 1), ([3, 1], 2), ([9, 8, 4, 5, 1], 3)):
        assert run_count(np.array(sorted(slots))) == in_order(np.arange(len(slots)), np.array(slots)).runs == runs


def test_neighbours_of_a_layer_are_one_rectangle() -> None:
    fragments, _ = fragments_of([64] * 8, 10, 0, interleaved=False)
    layers = np.arange(0, 513, 64)
    sections = cut_sections(split_pieces(fragments), layers, np.arange(9), 1 << 20)
    plan = plan_layers(in_order(np.arange(6), np.array([1, 2, 3, 7, 8, 9])), sections, Pool(HOST, 4096, 100), 1 << 20, 2048)
    assert plan.pitch == 64 and plan.chunks[:, N_BLOCKS].tolist() == [6] * 8
    assert plan.copies[:, LINES].tolist() == [3, 3] * 8 and set(plan.copies[:, COPY_BYTES].tolist()) == {64}
    assert sections.offsets.tolist() == split_pieces(fragments)[:, OFFSET].tolist()
