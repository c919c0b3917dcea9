"""Records in memory for disk tiers to store, a system that fails as it is told, and looks at what lies on disk."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.digests import digest_records
from kvortex.tiers import Call, Outcome, RecordFormat
from kvortex.tiers.base import Fetched
from kvortex.tiers.disk import DiskOptions, DiskTier
from kvortex.tiers.disk.slab import START, slot_bytes_for
from kvortex.tiers.disk.system import System

NAMESPACE = bytes(range(32))
PAYLOAD = 8192
FORM = RecordFormat(NAMESPACE, PAYLOAD)
SLOT = slot_bytes_for(PAYLOAD)


def soon(seconds: float = 20.0) -> Call:
    return Call(time.monotonic() + seconds)


def capacity(slots: int, slot_bytes: int = SLOT) -> int:
    """Bytes of one slab of so many slots."""
    return START + slots * slot_bytes


class Blocks:
    """n records of random bytes under random keys, and as much room to read them into.

    ``data`` and ``room`` are (n, stride) uint8 at multiples of 4096.
    """

    def __init__(self, n: int, sizes: Any = PAYLOAD, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.n, self.sizes = n, np.broadcast_to(np.asarray(sizes, np.int64), n).copy()
        self.stride = max(4096, -(-int(self.sizes.max(initial=1)) // 4096) * 4096)
        self._maps = [mmap.mmap(-1, max(1, n) * self.stride) for _ in range(2)]
        self.data, self.room = (np.frombuffer(each, np.uint8)[: n * self.stride].reshape(n, self.stride) for each in self._maps)
        self.data[:] = rng.integers(0, 256, (n, self.stride), np.uint8)
        self.keys = rng.integers(0, 256, (n, 32), np.uint8)
        self.digests = np.empty((n, 16), np.uint8)
        digest_records(self.addresses, self.sizes, self.digests)

    @property
    def addresses(self) -> npt.NDArray[np.int64]:
        return self.data.ctypes.data + self.stride * np.arange(self.n)

    @property
    def room_addresses(self) -> npt.NDArray[np.int64]:
        return self.room.ctypes.data + self.stride * np.arange(self.n)

    def put(self, tier: DiskTier, rows: Any = slice(None), call: Call | None = None) -> npt.NDArray[np.uint8]:
        at = np.arange(self.n)[rows]
        return tier.put_from(self.keys[at], self.addresses[at], self.sizes[at], self.digests[at], call or soon())

    def get(self, tier: DiskTier, rows: Any = slice(None), call: Call | None = None) -> Fetched:
        """What was read, after what claims to be right was seen to be."""
        at = np.arange(self.n)[rows]
        self.room[at] = 0xA5
        found = tier.get_into(self.keys[at], self.room_addresses[at], self.sizes[at], call or soon())
        for row, outcome, size, digest in zip(at, *found, strict=True):
            if outcome != Outcome.OK:
                assert size == 0 and not digest.any()
                continue
            assert size == self.sizes[row] and (digest == self.digests[row]).all()
            assert (self.room[row, :size] == self.data[row, :size]).all(), "wrong bytes were handed out"
            assert (self.room[row, size:] == 0xA5).all(), "bytes behind the payload were written to"
        return found

    def found(self, tier: DiskTier, rows: Any = slice(None)) -> list[bool]:
        return (self.get(tier, rows).outcomes == Outcome.OK).tolist()


@contextlib.contextmanager
def opened(
    folder: Path | Sequence[Path], slots: int = 8, *, form: RecordFormat = FORM, system: System | None = None, **options: Any
) -> Iterator[DiskTier]:
    """A tier of so many slots a folder, which is whole afterwards; closed."""
    folders = [folder] if isinstance(folder, Path) else list(folder)
    total = len(folders) * capacity(slots, slot_bytes_for(form.most_bytes))
    tier = DiskTier(DiskOptions(paths=folders, capacity_bytes=total, **options), form, system=system)
    try:
        yield tier
        assert_whole(tier)
    finally:
        tier.close()


def assert_whole(tier: DiskTier) -> None:
    """Nothing is pinned, reserved or broken while no call runs."""
    counts = tier._store.index.counts()
    assert counts.reserved == 0 and counts.pinned == tier._store.quarantined()
    tier._store.index.check()


def crash(tier: DiskTier) -> None:
    """What kill -9 leaves: nothing is written any more, and the files are free."""
    with tier._quiet:
        tier._closed = True
    tier._readers.close(5)
    tier._writers.close(5)
    for slab in tier._store.slabs:
        slab.close()


class Patch:
    """Bytes of a slab, changed behind the tier's back."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "kvortex.slab"

    def read(self, offset: int, nbytes: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(nbytes)

    def write(self, offset: int, data: bytes) -> None:
        with open(self.path, "r+b") as file:
            file.seek(offset)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def flip(self, offset: int, bit: int = 0) -> None:
        self.write(offset, bytes([self.read(offset, 1)[0] ^ (1 << bit)]))

    def slot(self, number: int, slot_bytes: int = SLOT) -> int:
        return START + number * slot_bytes


class Failing(System):
    """Does what ``rules`` say instead of a call: each is ``rule(name, fd, buffers, offset)``, which returns None for the
    real call, a number for a result, or raises."""

    def __init__(self) -> None:
        self.rule: Callable[..., int | None] = lambda *_: None
        self.calls: list[tuple[str, int, int]] = []

    def _do(self, name: str, fd: int, buffers: Any, offset: int) -> Any:
        self.calls.append((name, offset, sum(map(len, buffers))))
        instead = self.rule(name, fd, buffers, offset)
        return getattr(System, name)(self, fd, buffers, offset) if instead is None else instead

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        return int(self._do("preadv", fd, buffers, offset))

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        return int(self._do("pwritev", fd, buffers, offset))

    def fdatasync(self, fd: int) -> None:
        if self.rule("fdatasync", fd, [], -1) is None:
            super().fdatasync(fd)

    def fallocate(self, fd: int, nbytes: int) -> None:
        if self.rule("fallocate", fd, [], nbytes) is None:
            super().fallocate(fd, nbytes)


def raising(name: str, number: int, least: int = START) -> Callable[..., int | None]:
    """A rule: calls of that name from an offset on fail with that errno."""

    def rule(called: str, fd: int, buffers: Any, offset: int) -> int | None:
        if called == name and (offset >= least or offset < 0):
            raise OSError(number, os.strerror(number))
        return None

    return rule


def shorter(name: str, nbytes: int) -> Callable[..., int | None]:
    """A rule: calls of that name do so much less than they were asked for."""

    def rule(called: str, fd: int, buffers: Any, offset: int) -> int | None:
        if called != name or offset < START:
            return None
        whole = b"".join(map(bytes, buffers))
        part = len(whole) - nbytes
        if name == "pwritev":
            with open(f"/proc/self/fd/{fd}", "r+b") as file:
                file.seek(offset)
                file.write(whole[:part])
        return part

    return rule


class Gate:
    """A rule that holds calls of one name until it is opened."""

    def __init__(self, name: str) -> None:
        self.name, self.open, self.reached = name, threading.Event(), threading.Semaphore(0)

    def __call__(self, called: str, fd: int, buffers: Any, offset: int) -> int | None:
        if called == self.name and offset >= START:
            self.reached.release()
            assert self.open.wait(20)
        return None


EIO, ENOSPC, EROFS, ENODEV, EINVAL = errno.EIO, errno.ENOSPC, errno.EROFS, errno.ENODEV, errno.EINVAL
