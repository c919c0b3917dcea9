"""A system whose disk fails at random: what it does to single calls, and what it does to bytes at rest."""

from __future__ import annotations

import collections
import contextlib
import errno
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvortex.tiers import HEADER_BYTES, RecordFormat
from kvortex.tiers.disk.pages import PAGE
from kvortex.tiers.disk.slab import START
from kvortex.tiers.disk.system import System

SLOW = 0.02  # seconds that a slow call takes longer

# What the system tells about, or a kill leaves; the tier keeps all its promises.
HONEST_WRITES = ("EIO while writing", "ENOSPC", "short write", "slow write", "killed while writing")
HONEST_READS = ("EIO while reading", "short read", "slow read")
# What a drive does and says nothing of: bytes are checked, and what was deleted may come back.
LYING_WRITES = ("torn write", "lost write", "misdirected write")
LYING_READS = ("bit flip while reading", "another slot's bytes")
_SELDOM = {"slow write": 0.05, "slow read": 0.05, "killed while writing": 0.01}


class FaultySystem(System):
    """The real one, except that a part of its calls fails.

    Attributes
    ----------
    rate : float
        Of calls on slots that fail; 0 for none.
    lies : bool
        Whether it also fails without a word.
    dead : bool
        Set by a kill: nothing is read or written any more.
    injected : Counter
        How often what.
    """

    def __init__(self, seed: int) -> None:
        self.rate, self.lies, self.dead = 0.0, False, False
        self.injected: collections.Counter[str] = collections.Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()

    def _fault(self, honest: tuple[str, ...], lying: tuple[str, ...], offset: int) -> tuple[str, float]:
        """What becomes of a call, and a random number for how."""
        with self._lock:
            if self.dead:
                raise OSError(errno.EBADF, "killed")
            draw = self._random
            if offset < START or draw.random() >= self.rate:
                return "", 0.0
            kinds = honest + (lying if self.lies else ())
            kind = draw.choice(kinds)
            if draw.random() >= _SELDOM.get(kind, 1.0):
                kind = kinds[0]
            self.injected[kind] += 1
            self.dead = kind == "killed while writing"
            return kind, draw.random()

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        honest = HONEST_WRITES if len(buffers) > 1 else HONEST_WRITES[:1]  # a page is erased, or not
        kind, how = self._fault(honest, LYING_WRITES if len(buffers) > 1 else (), offset)
        nbytes = sum(map(len, buffers))
        part = PAGE * int(how * (nbytes // PAGE))
        if kind in ("EIO while writing", "ENOSPC"):
            raise OSError(errno.EIO if kind[1] == "I" else errno.ENOSPC, "injected")
        if kind == "slow write":
            time.sleep(SLOW)
        if kind == "lost write":
            return nbytes
        if kind == "misdirected write":
            slots = (os.fstat(fd).st_size - START) // nbytes
            return super().pwritev(fd, buffers, START + nbytes * int(how * slots))
        if kind in ("short write", "torn write", "killed while writing"):
            self._write_part(fd, buffers, offset, part)
            if kind == "killed while writing":
                raise OSError(errno.EBADF, "killed")
            return part if kind == "short write" else nbytes
        return super().pwritev(fd, buffers, offset)

    def _write_part(self, fd: int, buffers: Any, offset: int, nbytes: int) -> None:
        """The first so many bytes, a multiple of ``PAGE``."""
        parts = []
        for buffer in buffers:
            parts.append(buffer[: min(len(buffer), nbytes)])
            nbytes -= len(parts[-1])
        if parts := [each for each in parts if len(each)]:
            super().pwritev(fd, parts, offset)

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        scan = len(buffers) == 1
        kind, how = self._fault(HONEST_READS[:1] if scan else HONEST_READS, () if scan else LYING_READS, offset)
        if kind == "EIO while reading":
            raise OSError(errno.EIO, "injected")
        if kind == "slow read":
            time.sleep(SLOW)
        nbytes = sum(map(len, buffers))
        if kind == "another slot's bytes":
            slots = (os.fstat(fd).st_size - START) // nbytes
            return super().preadv(fd, buffers, START + nbytes * int(how * slots))
        got = super().preadv(fd, buffers, offset)
        if kind == "bit flip while reading":
            bit = int(how * 8 * (HEADER_BYTES + nbytes - PAGE))  # not in the zeros behind the header, which mean nothing
            at = bit // 8 if bit // 8 < HEADER_BYTES else bit // 8 - HEADER_BYTES + PAGE
            for buffer in buffers:
                if at < len(buffer):
                    buffer[at] ^= 1 << bit % 8
                    break
                at -= len(buffer)
        return got - PAGE if kind == "short read" else got

    def fdatasync(self, fd: int) -> None:
        if self.dead:
            raise OSError(errno.EBADF, "killed")
        super().fdatasync(fd)


class AtRest:
    """What becomes of a slab while nobody looks; one slot at a time, through O_DIRECT where the file system has it.

    Parameters
    ----------
    path
    slot_bytes, slots
    seed
    """

    KINDS = ("bit flip in a header", "bit flip in a payload", "zeroed page", "foreign record", "older version", "wrong length")

    def __init__(self, path: str, slot_bytes: int, slots: int, seed: int) -> None:
        self.path, self.slot_bytes, self.slots = path, slot_bytes, slots
        self.injected: collections.Counter[str] = collections.Counter()
        self._random = random.Random(seed)
        self._page = memoryview(mmap.mmap(-1, PAGE))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        except OSError:
            fd = os.open(self.path, os.O_RDWR)
        try:
            yield fd
        finally:
            os.close(fd)

    def damage(self, count: int) -> None:
        """So many slots, each in one of the ways."""
        draw = self._random
        with self._opened() as fd:
            for slot in draw.sample(range(self.slots), min(count, self.slots)):
                kind = draw.choice(self.KINDS)
                self.injected[kind] += 1
                start = START + slot * self.slot_bytes
                in_payload = kind in ("bit flip in a payload", "zeroed page")
                at = start + (PAGE * draw.randrange(1, self.slot_bytes // PAGE) if in_payload else 0)
                os.preadv(fd, [self._page], at)
                self._change(kind)
                os.pwritev(fd, [self._page], at)

    def _change(self, kind: str) -> None:
        draw, page = self._random, self._page
        if kind.startswith("bit flip"):
            page[draw.randrange(HEADER_BYTES if kind.endswith("header") else PAGE)] ^= 1 << draw.randrange(8)
        elif kind == "zeroed page":
            page[:] = bytes(PAGE)
        else:
            page[:HEADER_BYTES] = self._header(kind)

    def _header(self, kind: str) -> bytes:
        """One that is whole, but not this engine's."""
        draw = self._random
        key = np.frombuffer(bytes(self._page[64:96]), np.uint8).reshape(1, 32)
        other = bytes(32) if kind == "foreign record" else bytes(self._page[32:64])
        size = np.array([draw.randrange(1, 1 << 40) if kind == "wrong length" else self.slot_bytes - PAGE])
        header = RecordFormat(other, 1 << 41).headers(key, size, np.zeros((1, 16), np.uint8), draw.randrange(1 << 20))
        if kind == "older version":
            header["version"] = 0
        return header.tobytes()
