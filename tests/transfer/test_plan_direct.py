"""Plans without a kernel: contiguous buffers, merged where both sides continue and one registration holds them."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.transfer.plan import FIRST_COPY, N_COPIES, N_PIECES, Int64s, Plan, Pool, plan_direct
from tests.naive_plan import VRAM, Machine
from tests.transfer.plans import HOST, slots_of

NO_PIECES = np.empty((0, 4), np.int64)


@st.composite
def buffers(draw: st.DrawFn) -> tuple[Pool, int, Int64s, Int64s, Int64s, int]:
    """Pool, its slots, then addresses, sizes and slots of buffers that do not overlap, and streams."""
    slot_bytes = draw(st.sampled_from([16, 64]))
    pool_slots = draw(st.integers(1, 40))
    count = draw(st.integers(1, pool_slots))
    size = st.one_of(st.just(slot_bytes), st.integers(1, slot_bytes))
    sizes = draw(st.lists(size, min_size=count, max_size=count))
    gaps = draw(st.lists(st.sampled_from([0, 0, 0, 3]), min_size=count, max_size=count))
    ends = np.cumsum(np.array(sizes) + np.array(gaps))
    addresses = VRAM + ends - np.array(sizes)
    order = np.array(draw(st.one_of(st.just(list(range(count))), st.permutations(range(count)))))
    slots = draw(slots_of(pool_slots, count))
    pool = Pool(HOST, slot_bytes, draw(st.integers(1, pool_slots + 1)))
    return pool, pool_slots, addresses[order], np.array(sizes)[order], slots, draw(st.integers(1, 4))


@settings(max_examples=200)
@given(buffers(), st.booleans())
def test_every_byte_goes_once_to_its_place_and_no_other(case: tuple, to_host: bool) -> None:
    pool, pool_slots, addresses, sizes, slots, streams = case
    rng = np.random.default_rng(5)
    vram = rng.integers(0, 256, int((addresses + sizes).max()) - VRAM + 9, np.uint8)
    host = rng.integers(0, 256, pool_slots * pool.slot_bytes, np.uint8)
    machine = Machine(vram.copy(), host.copy(), pool, NO_PIECES, 0, streams)
    plan = plan_direct(addresses, sizes, slots, pool, streams)
    machine.run(plan, to_host=to_host)
    written = np.zeros(len(host if to_host else vram), np.int64)
    wanted = (host if to_host else vram).copy()
    for address, size, slot in zip((addresses - VRAM).tolist(), sizes.tolist(), slots.tolist(), strict=True):
        page, record = slice(address, address + size), slice(slot * pool.slot_bytes, slot * pool.slot_bytes + size)
        there, here, source = (record, page, vram) if to_host else (page, record, host)
        wanted[there] = source[here]
        written[there] += 1
    assert ((machine.host if to_host else machine.vram) == wanted).all()
    assert ((machine.host_writes if to_host else machine.device_writes) == written).all()
    assert plan.nbytes == sizes.sum() and len(plan.ids) == 0 and not plan.chunks[:, N_PIECES].any()


@settings(max_examples=100)
@given(buffers())
def test_chunks_share_the_copies_out(case: tuple) -> None:
    pool, _, addresses, sizes, slots, streams = case
    chunks = plan_direct(addresses, sizes, slots, pool, streams).chunks
    copies = plan_direct(addresses, sizes, slots, pool, streams).copies
    assert chunks[0, FIRST_COPY] == 0 and chunks[:, N_COPIES].sum() == len(copies) and (chunks[:, N_COPIES] > 0).all()
    assert (chunks[1:, FIRST_COPY] == (chunks[:-1, FIRST_COPY] + chunks[:-1, N_COPIES])).all()
    assert min(streams, len(copies)) <= len(chunks) <= 8 * streams


def runs(plan: Plan) -> list[tuple[int, int, int]]:
    return [(device - VRAM, host - HOST, nbytes) for device, host, nbytes in plan.copies[:, :3].tolist()]


def direct(addresses: list[int], sizes: list[int], slots: list[int], segment: int = 100) -> list[tuple[int, int, int]]:
    pool = Pool(HOST, 64, segment)
    return runs(plan_direct(VRAM + np.array(addresses), np.array(sizes), np.array(slots), pool, 2))


def test_whole_slots_that_continue_on_both_sides_are_one_copy() -> None:
    assert direct([0, 64, 128], [64, 64, 64], [4, 5, 6]) == [(0, 256, 192)]
    assert direct([128, 0, 64], [64, 64, 64], [6, 4, 5]) == [(0, 256, 192)]
    assert direct([0, 64, 128], [64, 64, 10], [4, 5, 6]) == [(0, 256, 138)]


def test_what_does_not_continue_is_a_copy_of_its_own() -> None:
    assert direct([0, 64], [64, 64], [4, 6]) == [(0, 256, 64), (64, 384, 64)]
    assert direct([0, 65], [64, 64], [4, 5]) == [(0, 256, 64), (65, 320, 64)]
    assert direct([64, 0], [64, 64], [4, 5]) == [(64, 256, 64), (0, 320, 64)]
    assert direct([0, 63], [63, 64], [4, 5]) == [(0, 256, 63), (63, 320, 64)]


def test_a_segment_border_ends_a_copy() -> None:
    assert direct([0, 64, 128], [64, 64, 64], [4, 5, 6], segment=5) == [(0, 256, 64), (64, 320, 128)]


def test_planning_a_hundred_thousand_buffers_takes_no_loop_over_them() -> None:
    n = 100_000
    rng = np.random.default_rng(0)
    addresses, slots = VRAM + rng.permutation(n) * 4096, rng.permutation(n)
    began = time.perf_counter()
    plan = plan_direct(addresses, np.full(n, 4096), slots, Pool(HOST, 4096, 1 << 24), 3)
    assert time.perf_counter() - began < 0.5 and plan.nbytes == n * 4096


def test_buffers_of_a_caller_are_never_joined() -> None:
    """Neighbours in VRAM may be two allocations, and a DMA must not cross from one into the other."""
    pool = Pool(HOST, 4096, 100)
    addresses, sizes, slots = VRAM + 4096 * np.arange(3), np.full(3, 4096), np.arange(3)
    assert len(plan_direct(addresses, sizes, slots, pool, 2).copies) == 1
    plan = plan_direct(addresses, sizes, slots, pool, 2, one_tensor=False)
    assert plan.copies[:, :4].tolist() == [[VRAM + 4096 * i, HOST + 4096 * i, 4096, 1] for i in range(3)]
