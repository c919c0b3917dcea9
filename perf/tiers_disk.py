"""Blocks of 2 MiB through the disk tier, against the same bytes by bare ``pwritev`` and ``preadv`` with O_DIRECT.

Both have a file of their own in one folder, of which every byte was written before, and as many threads, which take one block
after another. They do their passes by turns. ``ratio`` is the median of the rounds' ratios of rates, tier to raw. A put writes
new records over evicted ones; a get also checks digests. ``wrong_bytes`` counts bytes that came back other than they were
stored.
"""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.digests import digest_records
from kvortex.tiers import Call, Outcome, RecordFormat
from kvortex.tiers.disk import DiskOptions, DiskTier
from kvortex.tiers.disk.slab import START, slot_bytes_for
from perf.report import progress

BLOCK = 2 << 20
DEPTHS = (1, 2, 4, 8, 16)
BLOCKS, ROUNDS = 64, 21
_SLOTS = 2  # batches that a file holds
_SECONDS = 120.0
Bytes = npt.NDArray[np.uint8]


class Memory:
    """Blocks to store, and room of the same shape; (n, BLOCK) uint8, page-aligned."""

    def __init__(self, blocks: int, block: int) -> None:
        self.blocks, self.block = blocks, block
        self.data, self.room = (np.frombuffer(mmap.mmap(-1, blocks * block), np.uint8).reshape(blocks, block) for _ in range(2))
        self.data[:] = np.random.default_rng(5).integers(0, 256, (blocks, block), np.uint8)
        self.sizes = np.full(blocks, block)
        self.digests = np.empty((blocks, 16), np.uint8)
        digest_records(self.addresses(self.data), self.sizes, self.digests)

    def addresses(self, memory: Bytes) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = memory.ctypes.data + self.block * np.arange(self.blocks)
        return found

    def wrong(self) -> int:
        """Bytes in the room that are not what was stored; and the room is made wrong for the next time."""
        found = sum(int((mine != theirs).sum()) for mine, theirs in zip(self.room, self.data, strict=True))
        self.room[:, ::4096] ^= 0xFF
        return found


class RawFile:
    """The same by hand: a file of blocks side by side, and threads that each take the next one."""

    def __init__(self, path: Path, memory: Memory) -> None:
        self.memory, flags = memory, os.O_RDWR | os.O_CREAT
        try:
            self.fd, self.direct = os.open(path, flags | os.O_DIRECT, 0o600), True
        except OSError:
            self.fd, self.direct = os.open(path, flags, 0o600), False
        os.posix_fallocate(self.fd, 0, _SLOTS * memory.blocks * memory.block)
        self._half = 0
        self._data = [memoryview(row) for row in memory.data]
        self._room = [memoryview(row) for row in memory.room]

    def write(self, depth: int) -> None:
        """A batch over the one before the last."""
        self._half = (self._half + 1) % _SLOTS
        self._each(depth, lambda at: os.pwritev(self.fd, [self._data[at]], self._offset(at)))

    def read(self, depth: int) -> None:
        """The batch that was written last."""
        self._each(depth, lambda at: os.preadv(self.fd, [self._room[at]], self._offset(at)))

    def _offset(self, at: int) -> int:
        return (self._half * self.memory.blocks + at) * self.memory.block

    def _each(self, depth: int, work: Callable[[int], int]) -> None:
        numbers, short = itertools.count(), []

        def run() -> None:
            while (at := next(numbers)) < self.memory.blocks:
                if work(at) != self.memory.block:
                    short.append(at)

        threads = [threading.Thread(target=run) for _ in range(depth)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if short:
            raise OSError(f"{len(short)} blocks went short")

    def close(self) -> None:
        os.close(self.fd)


class Tiered:
    """A disk tier with as many threads as there are to be requests at once."""

    def __init__(self, folder: Path, memory: Memory, depth: int) -> None:
        self.memory, self._rng = memory, np.random.default_rng(depth)
        total = START + _SLOTS * memory.blocks * slot_bytes_for(memory.block)
        options = DiskOptions(paths=folder, capacity_bytes=total, readers=depth, writers=depth)
        self.tier = DiskTier(options, RecordFormat(bytes(32), memory.block))
        self._data, self._room = memory.addresses(memory.data), memory.addresses(memory.room)
        self.new_keys()

    def new_keys(self) -> None:
        """Of what is written next: what was under these is not there."""
        self.keys = self._rng.integers(0, 256, (self.memory.blocks, 32), np.uint8)

    def write(self) -> None:
        memory, call = self.memory, Call(time.monotonic() + _SECONDS)
        _all_ok(self.tier.put_from(self.keys, self._data, memory.sizes, memory.digests, call))

    def read(self) -> None:
        call = Call(time.monotonic() + _SECONDS)
        _all_ok(self.tier.get_into(self.keys, self._room, self.memory.sizes, call).outcomes)


def _all_ok(outcomes: npt.NDArray[np.uint8]) -> None:
    if (outcomes != Outcome.OK).any():
        raise OSError(f"a batch ended with {sorted({Outcome(each).name for each in outcomes.tolist()})}")


def rows(folder: Path | None = None, *, quick: bool = False) -> list[dict[str, Any]]:
    """Puts and gets at queue depths of 1 to 16, on the file system of ``folder`` (None for the one of temporary files).

    Each row: ``tier``, ``operation`` (``put`` or ``get``), ``block_bytes``, ``depth``, ``gb_per_s``, ``raw_gb_per_s``,
    ``ratio``, ``direct`` (whether O_DIRECT was used by both), ``wrong_bytes``.
    """
    block, blocks, rounds = (64 << 10, 8, 2) if quick else (BLOCK, BLOCKS, ROUNDS)
    home = Path(tempfile.mkdtemp(prefix="kvortex-perf-", dir=folder))
    memory = Memory(blocks, block)
    raw = RawFile(home / "raw", memory)
    found = []
    try:
        for depth in DEPTHS[:2] if quick else DEPTHS:
            progress(f"disk, {depth} at once")
            found += _at_depth(home, memory, raw, depth, rounds)
    finally:
        raw.close()
        shutil.rmtree(home, ignore_errors=True)
    return found


def _at_depth(home: Path, memory: Memory, raw: RawFile, depth: int, rounds: int) -> list[dict[str, Any]]:
    tiered = Tiered(home / "tier", memory, depth)
    times: dict[str, list[float]] = {}
    wrong = 0

    def timed(name: str, work: Callable[[], None]) -> None:
        began = time.perf_counter()
        work()
        times.setdefault(name, []).append(time.perf_counter() - began)

    try:
        for _ in range(_SLOTS):  # what was never written costs more the first time
            tiered.new_keys()
            tiered.write()
            raw.write(depth)
        for turn in range(rounds):
            tiered.new_keys()
            for name, of_tier, of_raw in (
                ("put", tiered.write, lambda: raw.write(depth)),
                ("get", tiered.read, lambda: raw.read(depth)),
            ):
                pair = [(name, of_tier), (f"raw {name}", of_raw)]
                for which, work in pair if turn % 2 else pair[::-1]:
                    timed(which, work)
                    wrong += memory.wrong() if name == "get" else 0
        direct = raw.direct and tiered.tier._store.slabs[0].direct
    finally:
        tiered.tier.close()
    return [
        row("disk", name, memory, depth, times[name], times[f"raw {name}"], direct, wrong if name == "get" else 0)
        for name in ("put", "get")
    ]


def row(
    tier: str, operation: str, memory: Memory, depth: int, mine: list[float], bare: list[float], direct: bool, wrong: int
) -> dict[str, Any]:
    """Of the seconds of rounds, and those of what they are compared with: see :func:`rows`."""
    nbytes = memory.blocks * memory.block
    return {
        "tier": tier,
        "operation": operation,
        "block_bytes": memory.block,
        "depth": depth,
        "gb_per_s": nbytes / statistics.median(mine) / 1e9,
        "raw_gb_per_s": nbytes / statistics.median(bare) / 1e9,
        "ratio": statistics.median(theirs / ours for ours, theirs in zip(mine, bare, strict=True)),
        "direct": direct,
        "wrong_bytes": wrong,
    }
