"""What is put comes back, of any size and mix, within a bound of bytes, and what goes is what the policy says."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.tiers import Call, Outcome, RecordFormat
from kvortex.tiers.disk import DiskTier
from tests.tiers.disk.rig import FORM, NAMESPACE, PAYLOAD, SLOT, Blocks, Failing, assert_whole, opened, soon


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    blocks = Blocks(6)
    with opened(tmp_path) as tier:
        assert not tier.contains(blocks.keys, soon()).any()
        assert (blocks.get(tier).outcomes == Outcome.MISS).all()
        assert (blocks.put(tier) == Outcome.OK).all()
        assert tier.contains(blocks.keys, soon()).all()
        assert (blocks.get(tier).outcomes == Outcome.OK).all()
        assert (blocks.put(tier) == Outcome.OK).all(), "it is there already"
        assert tier.used_bytes() == 6 * SLOT and tier.evictions() == 0 and tier.failures() == {}


@pytest.mark.parametrize("direct", [True, False])
def test_every_length_comes_back_and_nothing_behind_it_is_touched(tmp_path: Path, direct: bool) -> None:
    sizes = [1, 143, 511, 4095, 4096, 4097, 8191, 8192, 12287, 12288]
    blocks = Blocks(len(sizes), sizes)
    form = RecordFormat(NAMESPACE, 12288)
    with opened(tmp_path, 16, form=form, direct=direct) as tier:
        assert (blocks.put(tier) == Outcome.OK).all()
        assert all(blocks.found(tier))
    with opened(tmp_path, 16, form=form, direct=direct) as tier:
        assert all(blocks.found(tier))


def test_a_header_and_a_payload_are_one_write_and_one_read(tmp_path: Path) -> None:
    blocks, system = Blocks(1), Failing()
    with opened(tmp_path, system=system) as tier:
        system.calls.clear()
        blocks.put(tier)
        blocks.get(tier)
        assert [(name, nbytes) for name, _, nbytes in system.calls] == [("pwritev", SLOT), ("preadv", SLOT)]


def test_empty_batches(tmp_path: Path) -> None:
    blocks = Blocks(0)
    with opened(tmp_path) as tier:
        assert len(blocks.put(tier)) == len(blocks.get(tier).outcomes) == len(tier.delete(blocks.keys, soon())) == 0


def test_what_is_too_large_is_refused_and_the_rest_is_stored(tmp_path: Path) -> None:
    blocks = Blocks(3, [PAYLOAD, PAYLOAD + 1, 100])
    with opened(tmp_path) as tier:
        assert blocks.put(tier).tolist() == [Outcome.OK, Outcome.TOO_LARGE, Outcome.OK]
        assert blocks.found(tier) == [True, False, True]


def test_a_record_that_is_larger_than_the_room_is_a_miss(tmp_path: Path) -> None:
    blocks = Blocks(1)
    with opened(tmp_path) as tier:
        blocks.put(tier)
        found = tier.get_into(blocks.keys, blocks.room_addresses, blocks.sizes - 1, soon())
        assert found.outcomes.tolist() == [Outcome.MISS] and not blocks.room.any()
        assert blocks.found(tier) == [True]


def test_a_key_may_stand_twice_in_a_batch(tmp_path: Path) -> None:
    blocks = Blocks(4)
    rows = [0, 1, 0, 2, 1, 0, 3]
    with opened(tmp_path) as tier:
        assert (blocks.put(tier, rows) == Outcome.OK).all()
        assert tier._store.index.counts().resident == 4
        found = tier.get_into(blocks.keys[rows], blocks.room_addresses[[0, 1, 0, 2, 1, 0, 3]], blocks.sizes[rows], soon())
        assert (found.outcomes == Outcome.OK).all()


def test_the_bound_holds_and_the_oldest_go(tmp_path: Path) -> None:
    blocks = Blocks(20)
    with opened([tmp_path / "a", tmp_path / "b"], 4) as tier:
        for row in range(20):
            assert blocks.put(tier, [row]).tolist() == [Outcome.OK]
            assert tier._store.index.counts().resident == min(row + 1, 8)
        assert blocks.found(tier) == [False] * 12 + [True] * 8
        assert tier.evictions() == 12 and tier.used_bytes() == 8 * SLOT
        assert tier.capacity_bytes is not None
        sizes = [os.stat(tmp_path / name / "kvortex.slab") for name in "ab"]
        assert sum(each.st_size for each in sizes) <= tier.capacity_bytes
        assert sum(each.st_blocks * 512 for each in sizes) <= tier.capacity_bytes + (64 << 10), "the file system's own"


@pytest.mark.parametrize("why", [Outcome.TIMEOUT, Outcome.CANCELLED])
def test_what_is_given_up_evicts_nothing(tmp_path: Path, why: Outcome) -> None:
    blocks = Blocks(40)
    with opened(tmp_path, 8) as tier:
        assert (blocks.put(tier, slice(0, 8)) == Outcome.OK).all()
        late = Call(time.monotonic() - 1) if why == Outcome.TIMEOUT else Call(time.monotonic() + 20, lambda: True)
        assert (blocks.put(tier, slice(8, 40), late) == why).all()
        assert all(blocks.found(tier, slice(0, 8))) and tier.evictions() == 0


def test_a_batch_larger_than_the_store_ends_and_keeps_the_last(tmp_path: Path) -> None:
    blocks = Blocks(50)
    with opened(tmp_path, 8) as tier:
        assert (blocks.put(tier) == Outcome.OK).all()
        assert sum(blocks.found(tier)) == 8


def test_records_are_dealt_over_the_paths(tmp_path: Path) -> None:
    blocks = Blocks(6)
    with opened([tmp_path / name for name in "abc"], 4) as tier:
        blocks.put(tier)
        places = tier._store.places.of_slot[tier._store.index.acquire(blocks.keys)]
        tier._store.index.release(np.arange(6))
        assert sorted((places % 3).tolist()) == [0, 0, 1, 1, 2, 2]


def test_another_length_under_a_key_replaces_the_record(tmp_path: Path) -> None:
    blocks, shorter = Blocks(1), Blocks(1, 100, seed=1)
    shorter.keys = blocks.keys
    with opened(tmp_path) as tier:
        blocks.put(tier)
        assert shorter.put(tier).tolist() == [Outcome.OK]
        assert shorter.found(tier) == [True]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("pgdrc"), st.lists(st.integers(0, 11), max_size=8)), max_size=30))
def test_any_sequence_of_calls_agrees_with_a_dict(tmp_path_factory: pytest.TempPathFactory, steps: list) -> None:
    """Nothing is evicted here: 12 keys, 12 slots. ``r`` closes and opens, ``c`` leaves it as kill -9 would."""
    folder = tmp_path_factory.mktemp("machine")
    blocks, there = Blocks(12, [1, 4096, 5000, 8192] * 3), np.zeros(12, np.bool_)
    tier = _open(folder)
    try:
        for what, rows in steps:
            if what == "p":
                assert (blocks.put(tier, rows) == Outcome.OK).all()
                there[rows] = True
            elif what == "g":
                assert blocks.found(tier, rows) == there[rows].tolist()
            elif what == "d":
                rows = sorted(set(rows))
                expected = np.where(there[rows], Outcome.OK, Outcome.MISS)
                assert tier.delete(blocks.keys[rows], soon()).tolist() == expected.tolist()
                there[rows] = False
            else:
                tier = _again(tier, folder, what == "c")
            assert tier.contains(blocks.keys, soon()).tolist() == there.tolist()
            assert_whole(tier)
        assert blocks.found(tier) == there.tolist()
    finally:
        tier.close()


def _open(folder: Path) -> DiskTier:
    from kvortex.tiers.disk import DiskOptions
    from tests.tiers.disk.rig import capacity

    return DiskTier(DiskOptions(paths=[folder], capacity_bytes=capacity(12), readers=2, writers=2), FORM)


def _again(tier: DiskTier, folder: Path, crashes: bool) -> DiskTier:
    from tests.tiers.disk.rig import crash

    if crashes:
        crash(tier)
    else:
        tier.close()
    return _open(folder)


def test_many_threads_at_once(tmp_path: Path) -> None:
    """40 keys, 16 slots, all calls at once: what is OK is right, and nothing stays pinned."""
    errors: list[BaseException] = []
    with opened([tmp_path / "a", tmp_path / "b"], 8) as tier:

        def work(seed: int) -> None:
            try:
                rng, blocks = np.random.default_rng(seed), Blocks(40)  # the same keys and bytes, room of its own
                for _ in range(60):
                    rows = rng.choice(40, rng.integers(1, 12), replace=False)
                    choice = rng.integers(0, 8)
                    if choice < 3:
                        outcomes = blocks.put(tier, rows)
                        assert np.isin(outcomes, [Outcome.OK, Outcome.FULL]).all(), outcomes
                    elif choice < 7:
                        assert np.isin(blocks.get(tier, rows).outcomes, [Outcome.OK, Outcome.MISS]).all()
                    else:
                        assert np.isin(tier.delete(blocks.keys[rows[:2]], soon()), [Outcome.OK, Outcome.MISS]).all()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        if errors:
            raise errors[0]
        assert "corrupt" not in tier.failures()
