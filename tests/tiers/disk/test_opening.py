"""Whose a folder is, what is refused and why, and what a file system cannot do."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.errors import ConfigError
from kvortex.tiers import Outcome, RecordFormat
from kvortex.tiers.disk import DiskOptions, DiskTier
from kvortex.tiers.disk.slab import lock
from tests.tiers.disk.rig import (
    EINVAL,
    EIO,
    ENOSPC,
    FORM,
    NAMESPACE,
    PAYLOAD,
    Blocks,
    Failing,
    Patch,
    capacity,
    crash,
    opened,
    raising,
    soon,
)

BAD = [
    ({"paths": ()}, "paths"),
    ({"paths": 7}, "paths"),
    ({"paths": [""]}, "no path"),
    ({"paths": ["a\0b"]}, "no path"),
    ({"paths": ["x", "./x"]}, "twice"),
    ({"capacity_bytes": 0}, "capacity_bytes"),
    ({"capacity_bytes": True}, "capacity_bytes"),
    ({"capacity_bytes": 1.5}, "capacity_bytes"),
    ({"policy": "mru"}, "policy = 'mru': must be one of arc, lfu, lru, s3fifo"),
    ({"sync": "always"}, "none, group, dsync"),
    ({"sync_seconds": 0}, "sync_seconds"),
    ({"readers": 0}, "readers"),
    ({"writers": 65}, "writers"),
    ({"direct": 1}, "direct"),
    ({"reset": "yes"}, "reset"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_impossible_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiskOptions(**{"paths": "x", "capacity_bytes": 1 << 20} | options)


def test_a_path_of_bytes_is_the_folder_that_it_names(tmp_path: Path) -> None:
    with os.scandir(os.fsencode(tmp_path.parent)) as entries:
        found = next(entry for entry in entries if os.fsdecode(entry.name) == tmp_path.name)
    assert DiskOptions(paths=[found], capacity_bytes=1).paths == (os.path.realpath(tmp_path),)


def test_one_path_may_be_given_as_it_is(tmp_path: Path) -> None:
    assert DiskOptions(paths=tmp_path, capacity_bytes=1).paths == (str(tmp_path),)


def test_a_capacity_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not hold one block each, which takes"):
        DiskTier(DiskOptions(paths=[tmp_path / "a", tmp_path / "b"], capacity_bytes=2 * capacity(1) - 1), FORM)
    assert not (tmp_path / "a").exists()


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    blocks = Blocks(1)
    with opened(tmp_path) as tier:
        blocks.put(tier)
        message = "in use by another engine; give each engine a folder of its own"
        with pytest.raises(ConfigError, match=message), opened(tmp_path):
            pass
        assert all(blocks.found(tier))
        code = "import sys; from kvortex.tiers.disk import *; from kvortex.tiers import RecordFormat\n"
        code += "DiskTier(DiskOptions(paths=[sys.argv[1]], capacity_bytes=1 << 20), RecordFormat(bytes(range(32)), 8192))"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
        assert done.returncode and "ConfigError" in done.stderr and "in use by another engine" in done.stderr
    with opened(tmp_path) as tier:
        assert all(blocks.found(tier))


def test_a_file_that_its_owner_removes_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before a purge and locked after it, it has no name: all that went into it would be lost."""
    blocks = Blocks(4)
    with opened(tmp_path) as tier:
        blocks.put(tier)
    locked: list[str] = []

    def lock_late(fd: int, path: str) -> None:
        if not locked:
            os.unlink(path)
        locked.append(path)
        lock(fd, path)

    monkeypatch.setattr("kvortex.tiers.disk.slab.lock", lock_late)
    with opened(tmp_path) as tier:
        assert len(locked) == 2 and not tier.recovered
        assert (blocks.put(tier) == Outcome.OK).all()
    with opened(tmp_path) as tier:
        assert all(blocks.found(tier))


def test_a_second_folder_in_use_frees_the_first(tmp_path: Path) -> None:
    with opened(tmp_path / "b"):
        with pytest.raises(ConfigError, match="in use"), opened([tmp_path / "a", tmp_path / "b"]):
            pass
        with opened(tmp_path / "a"):
            pass


@pytest.mark.parametrize("other", [RecordFormat(bytes(32), PAYLOAD), RecordFormat(NAMESPACE, 4 * PAYLOAD)])
def test_other_records_are_refused_or_removed_and_never_mixed(tmp_path: Path, other: RecordFormat) -> None:
    blocks = Blocks(4)
    with opened(tmp_path) as tier:
        blocks.put(tier)
    with pytest.raises(ConfigError, match="reset=True"), opened(tmp_path, form=other):
        pass
    with opened(tmp_path) as tier:
        assert all(blocks.found(tier)), "a refusal leaves everything as it was"
    with opened(tmp_path, form=other, reset=True) as tier:
        assert tier.recovered == 0 and not any(blocks.found(tier))
        crash(tier)
    with opened(tmp_path, reset=True) as tier:
        crash(tier)
    with opened(tmp_path) as tier:
        assert tier.recovered == 0 and not any(blocks.found(tier)), "the records of before came back"


def test_reset_empties_what_is_ones_own_too(tmp_path: Path) -> None:
    blocks = Blocks(4)
    with opened(tmp_path) as tier:
        blocks.put(tier)
    with opened(tmp_path, reset=True) as tier:
        assert tier.recovered == 0
        crash(tier)
    with opened(tmp_path) as tier:
        assert tier.recovered == 0


@pytest.mark.parametrize("copies", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("at", [0, 8, 20, 40, 70, 90, 111])
def test_a_damaged_superblock(tmp_path: Path, copies: tuple[int, ...], at: int) -> None:
    blocks, patch = Blocks(4), Patch(tmp_path)
    with opened(tmp_path) as tier:
        blocks.put(tier)
    for copy in copies:
        patch.flip(4096 * copy + at)
    if len(copies) == 2:
        with pytest.raises(ConfigError, match="is damaged; name another folder in paths, or start empty"), opened(tmp_path):
            pass
        with opened(tmp_path, reset=True) as tier:
            assert not any(blocks.found(tier))
    else:
        with opened(tmp_path) as tier:
            assert all(blocks.found(tier))


@pytest.mark.parametrize("zeros", [0, 100, 1 << 20])
def test_a_file_whose_maker_was_killed_is_taken(tmp_path: Path, zeros: int) -> None:
    (tmp_path / "kvortex.slab").write_bytes(bytes(zeros))
    with opened(tmp_path) as tier:
        assert tier.recovered == 0


def test_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "kvortex.slab"
    path.write_text("my diary")
    with pytest.raises(ConfigError, match="no slab"), opened(tmp_path):
        pass
    assert path.read_text() == "my diary"
    path.unlink()
    target = tmp_path / "target"
    target.write_text("x")
    path.symlink_to(target)
    with pytest.raises(ConfigError, match="symbolic link, which is not followed"), opened(tmp_path):
        pass
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="kvortex.slab"), opened(tmp_path):
        pass


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "deep"
    before = os.umask(0)
    try:
        with opened(folder) as tier:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert stat.S_IMODE((folder / "kvortex.slab").stat().st_mode) == 0o600
            assert not os.get_inheritable(tier._store.slabs[0]._fd)
        assert stat.S_IMODE((folder / "kvortex.snapshot").stat().st_mode) == 0o600
        (folder / "kvortex.slab").chmod(0o644)
        with opened(folder):
            assert stat.S_IMODE((folder / "kvortex.slab").stat().st_mode) == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize("new", [True, False])
def test_a_full_disk_is_told_at_the_start(tmp_path: Path, new: bool) -> None:
    blocks, system = Blocks(1), Failing()
    if not new:
        with opened(tmp_path) as tier:
            blocks.put(tier)
    system.rule = raising("fallocate", ENOSPC)
    message = "bytes cannot be had .* are free beside the .* that the slab has; lower capacity_bytes, or make room"
    with pytest.raises(ConfigError, match=message), opened(tmp_path, 100, system=system):
        pass
    assert (tmp_path / "kvortex.slab").stat().st_size == (0 if new else capacity(8))
    with opened(tmp_path) as tier:
        assert blocks.found(tier) == [not new]


def test_a_really_full_disk_is_told_at_the_start(tmp_path: Path) -> None:
    slots = os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize // capacity(1) + 1000
    system = Failing()
    system.rule = lambda name, fd, buffers, offset: pytest.fail("it was tried") if name == "fallocate" else None
    with pytest.raises(ConfigError, match="cannot be had"), opened(tmp_path, slots, system=system):
        pass
    assert (tmp_path / "kvortex.slab").stat().st_blocks == 0


def test_a_disk_that_fails_at_the_start_is_told(tmp_path: Path) -> None:
    for name in ("pwritev", "fdatasync"):
        system = Failing()
        system.rule = raising(name, EIO, least=0)
        with pytest.raises(ConfigError, match="Input/output error; name another folder"), opened(tmp_path, system=system):
            pass


@pytest.mark.parametrize("when", ["open", "first read", "first write"])
def test_a_file_system_without_direct_io(tmp_path: Path, when: str) -> None:
    blocks = Blocks(4, [8192, 4095, 4097, 1])
    if when == "first read":
        with opened(tmp_path):
            pass

    class Without(Failing):
        def open(self, path: str, flags: int) -> int:
            if when == "open" and flags & os.O_DIRECT:
                raise OSError(EINVAL, "no O_DIRECT")
            return super().open(path, flags)

    system = Without()

    def rule(name: str, fd: int, buffers: Any, offset: int) -> None:
        import fcntl

        name_at = {"first read": "preadv", "first write": "pwritev"}.get(when)
        if name == name_at and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(EINVAL, "no O_DIRECT")

    system.rule = rule  # type: ignore[assignment]
    with opened(tmp_path, system=system) as tier:
        assert not tier._store.slabs[0].direct and len(tier.notes) == 1 and "page cache" in tier.notes[0]
        assert (blocks.put(tier) == Outcome.OK).all() and all(blocks.found(tier))
    with opened(tmp_path) as tier:
        assert all(blocks.found(tier))


def test_a_file_system_that_reserves_nothing_is_noted(tmp_path: Path) -> None:
    blocks, system = Blocks(2), Failing()
    system.rule = raising("fallocate", errno.EOPNOTSUPP)
    with opened(tmp_path, system=system) as tier:
        assert "reserves no space" in tier.notes[0]
        blocks.put(tier)
    with opened(tmp_path) as tier:
        assert all(blocks.found(tier))


def test_a_file_system_whose_space_is_reserved_by_writing(tmp_path: Path) -> None:
    """The C library then writes bytes, which O_DIRECT refuses."""
    system = Failing()
    system.rule = raising("fallocate", EINVAL)
    with opened(tmp_path, system=system) as tier:
        assert any("reserves no space" in note for note in tier.notes)
        assert (Blocks(4).put(tier) == Outcome.OK).all()


def test_blocks_that_no_call_of_the_system_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="blocks of 2147475456 bytes at most"), opened(
        tmp_path, 1, form=RecordFormat(NAMESPACE, 2**31)
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_closed_tier_fails_and_closes_twice(tmp_path: Path) -> None:
    blocks = Blocks(2)
    with opened(tmp_path) as tier:
        blocks.put(tier)
    tier.close()
    assert not tier.contains(blocks.keys, soon()).any()
    assert (blocks.put(tier) == Outcome.FAILED).all() and (blocks.get(tier).outcomes == Outcome.FAILED).all()
    assert (tier.delete(blocks.keys, soon()) == Outcome.FAILED).all() and tier.probe(soon()) == "it is closed"


def test_a_forked_child_touches_nothing(tmp_path: Path) -> None:
    """Its writes would be in nobody's index, and its descriptor would keep the slab locked."""
    code = """
import os, signal, sys, time, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import numpy as np
sys.path.insert(0, os.getcwd())
from tests.tiers.disk.rig import Blocks, opened, crash
blocks = Blocks(2)
with opened(Path(sys.argv[1])) as tier:
    blocks.put(tier, [0])
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        wrong = (blocks.put(tier, [1]) != 5).any() or (blocks.get(tier).outcomes != 5).any()
        wrong |= tier.contains(blocks.keys, None).any()
        tier.close()
        os.write(1, b"bad" if wrong else b"good")
        time.sleep(20)
        os._exit(0)
    crash(tier)
    time.sleep(0.5)
    with opened(Path(sys.argv[1])) as again:
        assert blocks.found(again) == [True, False]
    os.kill(child, 9)
    os.waitpid(child, 0)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "good" and done.returncode == 0, done.stderr


def test_what_is_kept_on_disk_is_what_the_docs_say(tmp_path: Path) -> None:
    blocks = Blocks(1)
    with opened(tmp_path) as tier:
        blocks.put(tier)
        patch = Patch(tmp_path)
        assert patch.read(0, 8) == b"KVXSLAB0" and patch.read(0, 4096) == patch.read(4096, 4096)
        assert patch.read(patch.slot(0), 8) == b"KVXRECRD"
        assert patch.read(patch.slot(0) + 4096, PAYLOAD) == blocks.data[0].tobytes()
        assert sorted(each.name for each in tmp_path.iterdir()) == ["kvortex.slab"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["kvortex.slab", "kvortex.snapshot"]
    assert np.frombuffer(Patch(tmp_path).read(0, 112), np.uint8)[32:64].tobytes() == NAMESPACE
