"""Whatever becomes of the bytes on disk, and whatever the system answers: right bytes come back, or none; and nothing leaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.tiers import HEADER_BYTES, Outcome, RecordFormat
from kvortex.tiers.disk import DiskTier
from kvortex.tiers.disk.slab import START
from tests.tiers.disk.rig import (
    EINVAL,
    EIO,
    ENODEV,
    ENOSPC,
    EROFS,
    FORM,
    PAYLOAD,
    SLOT,
    Blocks,
    Failing,
    Patch,
    assert_whole,
    crash,
    opened,
    raising,
    shorter,
    soon,
)


def slot_of(tier: DiskTier, key: np.ndarray) -> int:
    held = tier._store.index.acquire(key[None])
    tier._store.index.release(held)
    return int(tier._store.places.of_slot[held[0]])


def test_every_byte_of_a_header_counts(tmp_path: Path) -> None:
    """Each byte of 144 with a bit flipped, a record each."""
    blocks, patch = Blocks(HEADER_BYTES), Patch(tmp_path)
    with opened(tmp_path, HEADER_BYTES) as tier:
        assert (blocks.put(tier) == Outcome.OK).all()
        for row in range(HEADER_BYTES):
            patch.flip(patch.slot(slot_of(tier, blocks.keys[row])) + row, row % 8)
        outcomes = blocks.get(tier).outcomes
        assert (outcomes == Outcome.CORRUPT).all()
        assert tier.failures() == {"corrupt": HEADER_BYTES}
        assert not tier.contains(blocks.keys, soon()).any(), "what was damaged is forgotten"
        assert (blocks.put(tier) == Outcome.OK).all() and all(blocks.found(tier))


def test_a_flipped_bit_anywhere_in_a_payload_is_seen(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    blocks, patch = Blocks(200, [PAYLOAD, 5000] * 100), Patch(tmp_path)
    with opened(tmp_path, 200) as tier:
        blocks.put(tier)
        for row in range(200):
            at = [0, int(blocks.sizes[row]) - 1, int(rng.integers(0, blocks.sizes[row]))][row % 3]
            patch.flip(patch.slot(slot_of(tier, blocks.keys[row])) + 4096 + at, int(rng.integers(0, 8)))
        assert (blocks.get(tier).outcomes == Outcome.CORRUPT).all()


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(
    ("torn", "kept"),
    [
        ("new header, old payload", False),
        ("old header, new payload", False),
        ("new header, half of the payload", False),
        ("a stray sector", False),
        ("all of it", True),
    ],
)
def test_torn_writes(tmp_path: Path, torn: str, kept: bool, restarted: bool) -> None:
    """Record 1 over record 0 in a slot, of which some parts reached the disk."""
    blocks, patch, system = Blocks(2), Patch(tmp_path), Failing()
    start, page = patch.slot(0), 4096
    with opened(tmp_path, 1, system=system) as tier:
        blocks.put(tier, [0])
        old = patch.read(start, SLOT)
        blocks.put(tier, [1])
        new = patch.read(start, SLOT)
        parts = {
            "new header, old payload": new[:page] + old[page:],
            "old header, new payload": old[:page] + new[page:],
            "new header, half of the payload": new[: page + PAYLOAD // 2] + old[page + PAYLOAD // 2 :],
            "a stray sector": new[: page + 512] + old[page + 512 : page + 1024] + new[page + 1024 :],
            "all of it": new,
        }
        patch.write(start, parts[torn])
        if not restarted:
            assert blocks.found(tier, [1]) == [kept]
            assert blocks.found(tier, [0]) == [False]
        else:
            crash(tier)
    if restarted:
        with opened(tmp_path, 1) as tier:
            assert blocks.found(tier) == [False, kept]


def test_a_write_that_the_drive_forgot_is_not_taken_for_the_old_record(tmp_path: Path) -> None:
    """The slot still holds a whole record of the same key: an older one, of other bytes."""
    old, new, system = Blocks(1), Blocks(1, seed=1), Failing()
    new.keys = old.keys
    with opened(tmp_path, 1, system=system) as tier:
        old.put(tier)
        tier._store.index.drop(old.keys)
        system.rule = lambda name, fd, buffers, offset: sum(map(len, buffers)) if name == "pwritev" else None
        assert new.put(tier).tolist() == [Outcome.OK], "the drive said so"
        assert new.found(tier) == [False] and tier.failures() == {"corrupt": 1}


def test_a_whole_record_of_another_key_is_not_taken_for_it(tmp_path: Path) -> None:
    blocks, patch = Blocks(2), Patch(tmp_path)
    with opened(tmp_path, 2) as tier:
        blocks.put(tier)
        first, second = (patch.slot(slot_of(tier, key)) for key in blocks.keys)
        patch.write(first, patch.read(second, SLOT))
        assert blocks.found(tier) == [False, True]


@pytest.mark.parametrize("field", ["namespace", "version", "size"])
def test_a_foreign_record_is_not_found_after_a_restart(tmp_path: Path, field: str) -> None:
    blocks, patch = Blocks(1), Patch(tmp_path)
    with opened(tmp_path, 2) as tier:
        blocks.put(tier)
        at = patch.slot(slot_of(tier, blocks.keys[0]))
        form = RecordFormat(bytes(32), PAYLOAD) if field == "namespace" else FORM
        sizes = np.array([PAYLOAD + 1 if field == "size" else PAYLOAD])
        header = form.headers(blocks.keys, sizes, blocks.digests, 99)
        if field == "version":
            header["version"] = 7
        patch.write(at, header.tobytes())
        crash(tier)
    with opened(tmp_path, 2) as tier:
        assert tier.recovered == 0 and blocks.found(tier) == [False]


ERRORS = [("pwritev", EIO), ("pwritev", EROFS), ("pwritev", ENODEV), ("preadv", EIO), ("preadv", ENODEV), ("preadv", EINVAL)]


@pytest.mark.parametrize(("name", "number"), ERRORS)
def test_an_error_is_an_outcome_and_the_tier_goes_on(tmp_path: Path, name: str, number: int) -> None:
    blocks, system = Blocks(40), Failing()
    with opened(tmp_path, 32, system=system) as tier:
        if name == "preadv":
            blocks.put(tier, slice(0, 32))
        system.rule = raising(name, number)
        rows = slice(0, 8)
        outcomes = blocks.put(tier, rows) if name == "pwritev" else blocks.get(tier, rows).outcomes
        assert (outcomes == Outcome.FAILED).all() and sum(tier.failures().values()) == 8
        assert_whole(tier)
        assert tier._store.quarantined() == (2 if number == EIO else 0), "one slot in sixteen, not more"
        system.rule = lambda *_: None
        there = name == "preadv" and number != EIO
        assert blocks.found(tier, rows) == [there] * 8, "a disk that is back has its records"
        assert (blocks.put(tier) == Outcome.OK).all() and sum(blocks.found(tier)) >= 30


def test_a_bad_spot_is_not_met_again(tmp_path: Path) -> None:
    blocks, system = Blocks(64), Failing()
    with opened(tmp_path, 32, system=system) as tier:
        spot = Patch(tmp_path).slot(3)
        fail = raising("pwritev", EIO)
        system.rule = lambda name, fd, buffers, offset: fail(name, fd, buffers, offset) if offset == spot else None
        for row in range(64):
            blocks.put(tier, [row])
        assert tier.failures() == {"EIO": 1} and tier._store.quarantined() == 1
        assert tier._store.index.counts().resident == 32 and tier.used_bytes() == 31 * SLOT


def test_a_bad_spot_does_not_keep_others_from_being_deleted(tmp_path: Path) -> None:
    """Only what may lie there must be erased there: the record that was to be written, and the one before it."""
    system, blocks = Failing(), Blocks(9)

    def broken(name: str, fd: int, buffers: Any, offset: int) -> int | None:
        if name == "pwritev" and offset == START:
            raise OSError(EIO, "a bad spot")
        return None

    with opened(tmp_path, 8, system=system) as tier:
        assert (blocks.put(tier, slice(0, 8)) == Outcome.OK).all()
        old = int(np.flatnonzero((tier._store.places.keys[0] == blocks.keys).all(1))[0])
        assert tier.delete(blocks.keys[[old]], soon())[0] == Outcome.OK
        assert blocks.put(tier, [old])[0] == Outcome.OK
        system.rule = broken
        assert tier.delete(blocks.keys[[old]], soon())[0] == Outcome.FAILED
        assert blocks.put(tier, [8])[0] == Outcome.FAILED, "the only free place is the bad one"
        assert tier.delete(blocks.keys[[old]], soon())[0] == tier.delete(blocks.keys[[8]], soon())[0] == Outcome.FAILED
        others = [row for row in range(8) if row != old]
        assert (tier.delete(blocks.keys[others], soon()) == Outcome.OK).all()


def test_no_space_is_said_so(tmp_path: Path) -> None:
    blocks, system = Blocks(4), Failing()
    with opened(tmp_path, system=system) as tier:
        system.rule = raising("pwritev", ENOSPC)
        assert (blocks.put(tier) == Outcome.FULL).all()
        system.rule = lambda *_: None
        assert (blocks.put(tier) == Outcome.OK).all()


@pytest.mark.parametrize("missing", [SLOT - 200, SLOT - 4096, 4096, 1])
def test_short_writes_and_reads(tmp_path: Path, missing: int) -> None:
    """A record of which a part was written, over another: neither is found, now or after a restart."""
    blocks, system = Blocks(3), Failing()
    with opened(tmp_path, 1, system=system, direct=False) as tier:
        blocks.put(tier, [0])
        system.rule = shorter("pwritev", missing)
        assert blocks.put(tier, [1]).tolist() == [Outcome.FAILED]
        assert blocks.found(tier) == [False] * 3 and tier.failures() == {"short": 1}
        system.rule = lambda *_: None
        crash(tier)
    with opened(tmp_path, 1, system=system, direct=False) as tier:
        assert blocks.found(tier) == [False] * 3
        assert blocks.put(tier, [2]).tolist() == [Outcome.OK]
        system.rule = shorter("preadv", missing)
        assert blocks.get(tier, [2]).outcomes.tolist() == [Outcome.FAILED]


def test_a_truncated_file_is_misses_and_is_written_again(tmp_path: Path) -> None:
    blocks = Blocks(8)
    with opened(tmp_path) as tier:
        blocks.put(tier)
        with open(tmp_path / "kvortex.slab", "r+b") as file:
            file.truncate(Patch(tmp_path).slot(4))
        assert blocks.found(tier) == [True] * 4 + [False] * 4
        assert (blocks.put(tier) == Outcome.OK).all() and all(blocks.found(tier))


def test_a_folder_that_vanished_does_no_harm(tmp_path: Path) -> None:
    blocks, folder = Blocks(4), tmp_path / "gone"
    with opened(folder) as tier:
        blocks.put(tier)
        (folder / "kvortex.slab").unlink()
        folder.rmdir()
        assert np.isin(blocks.get(tier).outcomes, [Outcome.OK, Outcome.FAILED, Outcome.MISS]).all()
        blocks.put(tier)
    with opened(folder) as tier:
        assert tier.recovered == 0
