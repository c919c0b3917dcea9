"""A restart finds what was stored, and what was deleted stays away."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from kvortex.tiers import Outcome
from kvortex.tiers.disk import recovery, snapshot
from kvortex.tiers.disk.places import marks_of
from kvortex.tiers.disk.system import System
from tests.tiers.disk.rig import EIO, Blocks, Failing, Patch, crash, opened, raising, shorter, soon

ENDINGS = pytest.mark.parametrize("closed", [True, False])


@ENDINGS
def test_a_restart_finds_everything(tmp_path: Path, closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, blocks = [tmp_path / "a", tmp_path / "b"], Blocks(10, [8192, 77] * 5)
    with opened(folders) as tier:
        blocks.put(tier)
        if not closed:
            crash(tier)
    scans = []
    real = recovery.scan
    monkeypatch.setattr(recovery, "scan", lambda slab: scans.append(slab) or real(slab))
    with opened(folders[::-1]) as tier:  # the order of paths does not matter
        assert tier.recovered == 10 and all(blocks.found(tier))
        assert len(scans) == (0 if closed else 2)
        assert not (folders[0] / "kvortex.snapshot").exists(), "it is true no longer"


@ENDINGS
def test_what_was_not_committed_is_not_found(tmp_path: Path, closed: bool) -> None:
    """A record that was reserved and not written whole, and one whose write failed."""
    blocks, system = Blocks(4), Failing()
    with opened(tmp_path, system=system, direct=False) as tier:
        blocks.put(tier, [0])
        system.rule = shorter("pwritev", 4096)
        blocks.put(tier, [1])
        system.rule = raising("pwritev", EIO)
        blocks.put(tier, [2])
        tier._store.index.reserve(blocks.keys[3:4])
        system.rule = lambda *_: None
        crash(tier) if not closed else tier.close()
        tier._store.index.abort(tier._store.index.reserve(blocks.keys[3:4]).slots)
    with opened(tmp_path) as tier:
        assert blocks.found(tier) == [True, False, False, False]


@ENDINGS
@pytest.mark.parametrize("slots", [8, 300])
def test_what_was_deleted_stays_away(tmp_path: Path, closed: bool, slots: int) -> None:
    blocks = Blocks(6)
    with opened(tmp_path, slots) as tier:
        blocks.put(tier)
        assert tier.delete(blocks.keys[:3], soon()).tolist() == [Outcome.OK] * 3
        assert tier.delete(blocks.keys[:3], soon()).tolist() == [Outcome.MISS] * 3
        assert blocks.found(tier) == [False] * 3 + [True] * 3
        if not closed:
            crash(tier)
    with opened(tmp_path, slots) as tier:
        assert blocks.found(tier) == [False] * 3 + [True] * 3


@pytest.mark.parametrize("closed_between", [False, True])
def test_what_was_evicted_and_then_deleted_stays_away(tmp_path: Path, closed_between: bool) -> None:
    """Its header is still on disk, since the record that took its place was never written."""
    blocks, system = Blocks(2), Failing()
    with opened(tmp_path, 1, system=system) as tier:
        blocks.put(tier, [0])
        system.rule = raising("pwritev", EIO)
        assert blocks.put(tier, [1]).tolist() == [Outcome.FAILED]
        assert not tier.contains(blocks.keys, soon()).any()
        system.rule = lambda *_: None
        assert Patch(tmp_path).read(Patch(tmp_path).slot(0), 8) == b"KVXRECRD", "else this shows nothing"
        if not closed_between:
            assert tier.delete(blocks.keys[:1], soon()).tolist() == [Outcome.MISS]
            crash(tier)
    if closed_between:
        with opened(tmp_path, 1) as tier:
            assert tier._store.places.before[0] == marks_of(blocks.keys[:1])[0]
            assert tier.delete(blocks.keys[:1], soon()).tolist() == [Outcome.MISS]
            crash(tier)
    with opened(tmp_path, 1) as tier:
        assert blocks.found(tier) == [False, False]


@pytest.mark.parametrize("failures", [1, 2, 3, 4])
def test_what_was_evicted_stays_away_however_often_its_place_was_not_written(tmp_path: Path, failures: int) -> None:
    blocks, system = Blocks(6), Failing()
    with opened(tmp_path, 1, system=system) as tier:
        blocks.put(tier, [0])
        system.rule = raising("pwritev", EIO)
        for row in range(1, failures + 1):
            assert blocks.put(tier, [row]).tolist() == [Outcome.FAILED]
        system.rule = lambda *_: None
        assert tier.delete(blocks.keys[:1], soon()).tolist() == [Outcome.MISS]
        assert Patch(tmp_path).read(Patch(tmp_path).slot(0), 8) == bytes(8)
        crash(tier)
    with opened(tmp_path, 1) as tier:
        assert not tier.contains(blocks.keys, soon()).any()


def test_of_two_records_of_a_key_the_newer_is_found_and_both_are_deleted(tmp_path: Path) -> None:
    blocks, patch = Blocks(1), Patch(tmp_path)
    newer = Blocks(1, 5000, seed=1)
    newer.keys = blocks.keys
    with opened(tmp_path, 4) as tier:
        blocks.put(tier)
        newer.put(tier)
        first = patch.read(patch.slot(0), 3 * 4096)
        if first[64:96] != blocks.keys[0].tobytes():
            pytest.fail("the first record is not in the first slot")
        old = tier.form.headers(blocks.keys, blocks.sizes, blocks.digests, 1)
        patch.write(patch.slot(2), old.tobytes().ljust(4096, b"\0") + blocks.data[0].tobytes())
        crash(tier)
    with opened(tmp_path, 4) as tier:
        assert newer.found(tier) == [True]
        assert tier._store.places.next_generation > int(tier._store.places.generations.max())
        assert tier.delete(blocks.keys, soon()).tolist() == [Outcome.OK]
        crash(tier)
    with opened(tmp_path, 4) as tier:
        assert tier.recovered == 0


def test_a_delete_that_did_not_reach_the_disk_says_so(tmp_path: Path) -> None:
    blocks, system = Blocks(2), Failing()
    with opened(tmp_path, system=system) as tier:
        blocks.put(tier)
        for name in ("pwritev", "fdatasync"):
            system.rule = raising(name, EIO)
            assert tier.delete(blocks.keys[:1], soon()).tolist() == [Outcome.FAILED]
            assert not tier.contains(blocks.keys[:1], soon()).any()
        system.rule = lambda *_: None
        assert tier.delete(blocks.keys[:1], soon()).tolist() == [Outcome.MISS]


@ENDINGS
def test_what_was_stored_first_is_evicted_first_after_a_restart(tmp_path: Path, closed: bool) -> None:
    blocks = Blocks(12)
    with opened(tmp_path, 8) as tier:
        for row in range(8):
            blocks.put(tier, [row])
        if not closed:
            crash(tier)
    with opened(tmp_path, 8) as tier:
        blocks.put(tier, slice(8, 12))
        assert blocks.found(tier) == [False] * 4 + [True] * 8


@pytest.mark.parametrize("how", ["flipped", "cut", "old", "gone", "of another slab"])
def test_a_snapshot_that_is_not_the_last_one_is_not_believed(tmp_path: Path, how: str) -> None:
    """The record was deleted after the old snapshot was made, and is in it."""
    blocks, path = Blocks(3), tmp_path / "kvortex.snapshot"
    with opened(tmp_path) as tier:
        blocks.put(tier)
    old = path.read_bytes()
    with opened(tmp_path) as tier:
        tier.delete(blocks.keys[:1], soon())
    new = path.read_bytes()
    if how == "flipped":
        path.write_bytes(new[:200] + bytes([new[200] ^ 1]) + new[201:])
    elif how == "cut":
        path.write_bytes(new[:-1])
    elif how == "old":
        path.write_bytes(old)
    elif how == "gone":
        path.unlink()
    else:
        with opened(tmp_path / "other") as tier:
            blocks.put(tier)
        path.write_bytes((tmp_path / "other" / "kvortex.snapshot").read_bytes())
    with opened(tmp_path) as tier:
        assert tier.contains(blocks.keys, soon()).tolist() == [False, True, True]
        assert blocks.found(tier) == [False, True, True]


def test_a_snapshot_is_worth_nothing_after_a_crash(tmp_path: Path) -> None:
    blocks = Blocks(4)
    with opened(tmp_path) as tier:
        blocks.put(tier, [0, 1])
    old = (tmp_path / "kvortex.snapshot").read_bytes()
    with opened(tmp_path) as tier:
        blocks.put(tier, [2, 3])
        crash(tier)
    (tmp_path / "kvortex.snapshot").write_bytes(old)
    with opened(tmp_path) as tier:
        assert tier.recovered == 4 and all(blocks.found(tier))


def test_a_snapshot_of_a_store_that_is_not_said_to_be_closed_is_not_believed(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        Blocks(1).put(tier)
    now = tier._store.slabs[0].now
    assert now.closed and snapshot.read(str(tmp_path), now, System()) is not None
    assert snapshot.read(str(tmp_path), dataclasses.replace(now, closed=False), System()) is None


@ENDINGS
def test_a_store_grows_and_shrinks(tmp_path: Path, closed: bool) -> None:
    blocks = Blocks(8)
    for slots, there in ((4, 0), (8, 4), (3, 3), (8, 3)):
        with opened(tmp_path, slots) as tier:
            assert tier.recovered == there
            assert sum(blocks.found(tier)) == there
            blocks.put(tier)
            if not closed:
                crash(tier)


def test_headers_that_cannot_be_read_are_left_alone(tmp_path: Path) -> None:
    blocks, system = Blocks(4), Failing()
    with opened(tmp_path) as tier:
        blocks.put(tier)
        crash(tier)
    spot = Patch(tmp_path).slot(1)

    def rule(name: str, fd: int, buffers: list, offset: int) -> None:
        if name == "preadv" and offset <= spot < offset + sum(map(len, buffers)) and offset:
            raise OSError(EIO, "here")

    system.rule = rule
    with opened(tmp_path, system=system) as tier:
        assert tier.recovered == 3
        system.rule = lambda *_: None
        assert sum(blocks.found(tier)) == 3
        lost = blocks.keys[~np.array(blocks.found(tier))]
        assert tier.delete(lost, soon()).tolist() == [Outcome.MISS]
        crash(tier)
    with opened(tmp_path) as tier:
        assert tier.recovered == 3, "what could not be read was deleted all the same"


def test_one_record_a_megabyte_is_scanned_by_its_first_page(tmp_path: Path) -> None:
    from kvortex.tiers import RecordFormat

    form, blocks, system = RecordFormat(bytes(32), 1 << 20), Blocks(3, 1 << 20), Failing()
    with opened(tmp_path, 4, form=form) as tier:
        blocks.put(tier)
        crash(tier)
    with opened(tmp_path, 4, form=form, system=system) as tier:
        assert {nbytes for name, offset, nbytes in system.calls if name == "preadv" and offset} == {4096}
        assert all(blocks.found(tier))


def test_a_large_disk_is_scanned_in_little_memory() -> None:
    """As many slots as there may be do not all wait for a thread at once."""

    class Large:
        slots, slot_bytes = 20_000, 2 << 20

        def offset(self, slot: int) -> int:
            return slot

        def read_run(self, offset: int, buffer: memoryview) -> None:
            buffer[:8] = offset.to_bytes(8, "little")

    tracemalloc.start()
    try:
        headers, unread = recovery.scan(Large())  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (headers["magic"] == np.arange(Large.slots)).all() and not unread.any()
    assert peak < 3 * headers.nbytes
