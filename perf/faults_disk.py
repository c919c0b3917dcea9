"""What a disk tier hands out while its disk fails in every way that is known here.

:func:`campaign` injects so many faults and counts what must never be: wrong bytes, calls that come back after their deadline,
pins that are left, errors that are raised, and deleted records that are found again.
"""

from __future__ import annotations

import collections
import itertools
import mmap
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.digests import digest_records
from kvortex.tiers import Call, Outcome, RecordFormat
from kvortex.tiers.disk import DiskOptions, DiskTier
from kvortex.tiers.disk.slab import NAME, START, slot_bytes_for
from perf.faults_system import SLOW, AtRest, FaultySystem

PAYLOAD = 8192
KEYS, SLOTS, PATHS = 192, 64, 2  # fewer slots than keys: records are evicted all the time
BATCH = 32
_DEADLINE = 10.0
_SLACK = 2.0  # seconds by which a busy machine may be late
_A_LIFE, _ROUNDS_A_LIFE = 500, 30  # faults, and rounds of calls, between two openings at most
FORM = RecordFormat(bytes(range(32)), PAYLOAD)


class Content:
    """What each key's bytes are, and room to read into."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.data, self.room = (
            np.frombuffer(mmap.mmap(-1, KEYS * PAYLOAD), np.uint8).reshape(KEYS, PAYLOAD) for _ in range(2)
        )
        self.data[:] = rng.integers(0, 256, (KEYS, PAYLOAD), np.uint8)
        self.keys = rng.integers(0, 256, (KEYS, 32), np.uint8)
        self.sizes = rng.choice([PAYLOAD, PAYLOAD - 1, 4096, 5000, 100], KEYS)
        self.digests = np.empty((KEYS, 16), np.uint8)
        digest_records(self.at(self.data), self.sizes, self.digests)

    @staticmethod
    def at(memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Addresses of all rows."""
        found: npt.NDArray[np.int64] = memory.ctypes.data + PAYLOAD * np.arange(KEYS)
        return found


class Campaign:
    """One run; :meth:`figures` are what came of it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self.content, self.random = Content(seed), random.Random(seed)
        self.system = FaultySystem(seed)
        slot_bytes = slot_bytes_for(PAYLOAD)
        folders = [folder / str(number) for number in range(PATHS)]
        self.slabs = [AtRest(str(each / NAME), slot_bytes, SLOTS, seed + number) for number, each in enumerate(folders)]
        total = PATHS * (START + SLOTS * slot_bytes)
        self.options: dict[str, Any] = {"paths": folders, "capacity_bytes": total, "readers": 2, "writers": 2}
        self.lives: collections.Counter[str] = collections.Counter()
        self.deleted: set[int] = set()  # keys that must not be found until they are stored again
        self._ends = itertools.cycle(["killed", "closed", "snapshot", "superblock"])
        self.operations = self.outcomes_ok = 0
        self.wrong_bytes = self.hangs = self.leaked = self.raised = self.returned = 0
        self.tier = self._open(reset=True)

    def _open(self, *, reset: bool = False) -> DiskTier:
        self.system.dead, rate = False, self.system.rate
        self.system.rate = 0.0
        tier = DiskTier(DiskOptions(**self.options, reset=reset), FORM, system=self.system)
        self.system.rate = rate
        return tier

    @property
    def injected(self) -> collections.Counter[str]:
        """How often what, so far."""
        total = self.system.injected + self.lives
        for slab in self.slabs:
            total += slab.injected
        return total

    def life(self, *, lies: bool, most: int) -> None:
        """A tier from one opening to its end, under up to about ``most`` faults."""
        if self.system.lies and not lies:  # what a lie has left may come back
            self._end("closed")
            self.tier, self.deleted = self._open(reset=True), set()
        self.system.lies = lies
        before = self.injected.total()
        for _ in range(_ROUNDS_A_LIFE):
            if self.injected.total() - before >= most:
                break
            self.system.rate = self.random.choice([0.05, 0.3, 0.6])
            self._round(lies)
            self.system.rate = 0.0
            if self.system.dead:
                break
            self._count_leaks()
        self._end("killed" if self.system.dead else next(self._ends))
        self.tier = self._open()
        if lies:
            self.deleted = set()
        self._get(range(KEYS), _DEADLINE)

    def _round(self, lies: bool) -> None:
        """A few calls, with damage in between."""
        draw = self.random
        for what in draw.choices(("put", "get", "delete"), (6, 6, 1), k=8):
            rows = draw.sample(range(KEYS), draw.randrange(1, BATCH))
            seconds = draw.choice([_DEADLINE, _DEADLINE, SLOW / 2])
            getattr(self, f"_{what}")(rows[:4] if what == "delete" else rows, seconds)
            if lies and what == "put":
                draw.choice(self.slabs).damage(draw.randrange(1, SLOTS // 4))

    def _call(self, seconds: float, work: Callable[[Call], Any]) -> Any:
        began = time.monotonic()
        self.operations += 1
        try:
            return work(Call(began + seconds))
        except Exception:  # it never raises; and if it does, the others are asked all the same
            self.raised += 1
            return None
        finally:
            self.hangs += time.monotonic() - began > seconds + BATCH * SLOW + _SLACK

    def _put(self, rows: list[int], seconds: float) -> None:
        content = self.content
        self.deleted -= set(rows)  # from now on it may be there, whatever the outcome
        self._call(
            seconds,
            lambda call: self.tier.put_from(
                content.keys[rows], content.at(content.data)[rows], content.sizes[rows], content.digests[rows], call
            ),
        )

    def _get(self, rows: Any, seconds: float) -> int:
        """How many were right; the others are counted."""
        content, rows = self.content, np.array(rows)
        content.room[rows] = 0
        found = self._call(
            seconds,
            lambda call: self.tier.get_into(content.keys[rows], content.at(content.room)[rows], content.sizes[rows], call),
        )
        if found is None:
            return 0
        good = rows[found.outcomes == Outcome.OK]
        self.returned += len(self.deleted & set(good.tolist()))
        for row in good.tolist():
            size = int(content.sizes[row])
            self.wrong_bytes += int((content.room[row, :size] != content.data[row, :size]).sum())
        ok = found.outcomes == Outcome.OK
        self.wrong_bytes += int((found.sizes[ok] != content.sizes[good]).sum())
        self.wrong_bytes += int((found.digests[ok] != content.digests[good]).sum())
        self.outcomes_ok += len(good)
        return len(good)

    def _delete(self, rows: list[int], seconds: float) -> None:
        outcomes = self._call(seconds, lambda call: self.tier.delete(self.content.keys[rows], call))
        if outcomes is not None and not self.system.lies:
            done = np.isin(outcomes, [Outcome.OK, Outcome.MISS])
            self.deleted |= set(np.array(rows)[done].tolist())

    def _count_leaks(self) -> None:
        store = self.tier._store
        counts = store.index.counts()
        self.leaked += counts.reserved + abs(counts.pinned - store.quarantined())
        store.index.check()

    def _end(self, how: str) -> None:
        """Closes it, or leaves it as ``kill -9`` does; with what then happens to its files."""
        self.system.rate = 0.0
        if how == "killed":
            self.lives["killed between calls"] += not self.system.dead
            self.system.dead = True
        self.tier.close()
        for slab in self.tier._store.slabs:
            slab.close()
        path = Path(self.random.choice(self.slabs).path)
        if how == "snapshot":
            self.lives["damaged snapshot"] += 1
            _flip(path.with_name("kvortex.snapshot"), self.random)
        elif how == "superblock":
            self.lives["damaged superblock"] += 1
            _flip(path, self.random, 112)

    def serves_again(self) -> bool:
        """Whether, with the disk in order, everything is stored and found as it should be."""
        self.system.rate, self.system.lies = 0.0, False
        self.deleted = set()
        whole = self.tier.probe(Call(time.monotonic() + _DEADLINE)) is None
        for start in range(0, KEYS, BATCH):
            rows = list(range(start, start + BATCH))
            self._put(rows, _DEADLINE)
            self._get(rows, _DEADLINE)  # what is left of them from before may be damaged, and is found to be
            self._put(rows, _DEADLINE)
            whole &= self._get(rows, _DEADLINE) == BATCH
        self._count_leaks()
        return whole

    def figures(self) -> dict[str, Any]:
        """For reports."""
        return {
            "tier": "disk",
            "seed": self.seed,
            "faults": self.injected.total(),
            "kinds": dict(sorted(self.injected.items())),
            "operations": self.operations,
            "records_right": self.outcomes_ok,
            "wrong_bytes": self.wrong_bytes,
            "hangs": self.hangs,
            "leaked": self.leaked,
            "raised": self.raised,
            "returned_after_delete": self.returned,
        }


def _flip(path: Path, draw: random.Random, nbytes: int | None = None) -> None:
    if not path.exists():
        return
    at = draw.randrange(nbytes or path.stat().st_size)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))
        file.flush()
        os.fsync(file.fileno())


def campaign(
    seed: int, faults: int, folder: str | os.PathLike[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Injects at least ``faults`` faults into a disk tier at work.

    Half of the lives of the tier are under a disk that tells what went wrong, or the process is killed: then what was deleted
    must stay away too. In the others it also lies.

    Parameters
    ----------
    seed
        Of all that is random; threads take turns as they like all the same.
    faults
    folder
        Where the files are made; None for a new one of the system's.
    progress
        Told how many of how many faults were injected.

    Returns
    -------
    dict
        ``faults`` and ``kinds`` (how many of each), ``operations``, ``records_right``; all of ``wrong_bytes``, ``hangs``,
        ``leaked``, ``raised`` and ``returned_after_delete`` must be 0, and ``served_again`` true. ``seconds`` it took.
    """
    began = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="kvortex-faults-", dir=folder))
    try:
        run = Campaign(seed, home)
        lies = False
        while (done := run.injected.total()) < faults:
            run.life(lies=lies, most=max(20, min(_A_LIFE, faults // 4)))
            lies = not lies
            if progress is not None:
                progress(min(faults, done), faults)
        served = run.serves_again()
        run.tier.close()
        return run.figures() | {"served_again": served, "seconds": time.monotonic() - began}
    finally:
        shutil.rmtree(home, ignore_errors=True)
