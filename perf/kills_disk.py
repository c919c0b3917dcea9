"""Processes that are killed while they write to a disk tier, again and again, and what is found afterwards.

A child stores and deletes records through several threads, and says through a pipe what was acknowledged. It gets SIGKILL at a
random moment. What was acknowledged must be there, whole; what was deleted must not; and anything else is either whole or not
there. Children are forked by a process that has loaded everything and has no threads: a kill costs a tenth of a second.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from kvortex.tiers import Call, Outcome
from kvortex.tiers.disk import DiskOptions, DiskTier
from kvortex.tiers.disk.slab import START, slot_bytes_for
from perf.faults_disk import FORM, KEYS, PAYLOAD, Content

THREADS = 3
_WAIT = 30.0


def _tier(folder: str) -> DiskTier:
    """Room for every key: nothing is evicted, so what was acknowledged must be there."""
    return DiskTier(DiskOptions(paths=folder, capacity_bytes=START + KEYS * slot_bytes_for(PAYLOAD)), FORM)


def _write(folder: str, seed: int, content: Content) -> None:
    """The child: each thread has keys of its own, stores what is not there and deletes some of it. Until it is killed."""
    tier = _tier(folder)
    os.write(1, b"open\n")

    def work(thread: int) -> None:
        draw = random.Random(seed * THREADS + thread)
        while True:
            rows = draw.sample(range(thread, KEYS, THREADS), draw.randrange(1, 8))
            text = " ".join(map(str, rows))
            if draw.random() < 0.35:
                os.write(1, f"deleting {text}\n".encode())
                outcomes = tier.delete(content.keys[rows], Call(time.monotonic() + _WAIT))
                if np.isin(outcomes, [Outcome.OK, Outcome.MISS]).all():
                    os.write(1, f"deleted {text}\n".encode())
                continue
            os.write(1, f"storing {text}\n".encode())
            data = content.at(content.data)[rows]
            call = Call(time.monotonic() + _WAIT)
            outcomes = tier.put_from(content.keys[rows], data, content.sizes[rows], content.digests[rows], call)
            if (outcomes == Outcome.OK).all():
                os.write(1, f"stored {text}\n".encode())

    for thread in range(THREADS):
        threading.Thread(target=work, args=(thread,), daemon=True).start()
    threading.Event().wait(_WAIT)
    os._exit(3)


def serve() -> None:
    """The process that forks children: one for each line ``folder seed``."""
    content = Content(int(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:  # loads what is compiled; and its threads have ended
        tier = _tier(folder)
        key, size, call = content.keys[:1], content.sizes[:1], Call(time.monotonic() + _WAIT)
        tier.put_from(key, content.at(content.data)[:1], size, content.digests[:1], call)
        tier.get_into(key, content.at(content.room)[:1], size, call)
        tier.delete(key, call)
        tier.close()
    for line in sys.stdin:
        folder, seed = line.split()
        child = os.fork()
        if child == 0:
            try:
                _write(folder, int(seed), content)
            except BaseException as error:
                os.write(2, f"child: {error!r}\n".encode())
            os._exit(2)
        os.write(1, f"child {child}\n".encode())
        os.waitpid(child, 0)
        os.write(1, b"gone\n")


class Server:
    """The process that forks, from outside. Lines come whole: each is one write of less than a pipe's atomic 4 KiB."""

    def __init__(self, seed: int) -> None:
        command = [sys.executable, "-c", "from perf.kills_disk import serve; serve()", str(seed)]
        root = Path(__file__).resolve().parents[1]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)
        self._left = b""

    def kill_one(self, folder: Path, seed: int, seconds: float) -> list[str]:
        """What one child said until it was killed, so long after it had opened its tier."""
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(f"{folder} {seed}\n".encode())
        stdin.flush()
        lines: list[str] = []
        child, kill_at = 0, float("inf")
        ends = time.monotonic() + _WAIT
        while "gone" not in lines[-1:]:
            if time.monotonic() > ends or (child and time.monotonic() >= kill_at):
                kill_at = float("inf")
                if child:
                    os.kill(child, signal.SIGKILL)
                if time.monotonic() > ends:
                    raise TimeoutError(f"the child does not come; it said {lines[-3:]}")
            for line in self._lines(min(kill_at, ends) - time.monotonic()):
                lines.append(line)
                if line.startswith("child "):
                    child = int(line.split()[1])
                if line == "open":
                    kill_at = time.monotonic() + seconds
        return lines

    def _lines(self, seconds: float) -> list[str]:
        stdout: IO[bytes] | None = self.process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], max(0.0, min(seconds, 1.0)))[0]:
            return []
        data = os.read(stdout.fileno(), 1 << 16)
        if not data:
            raise TimeoutError("the process that forks children has ended")
        *whole, self._left = (self._left + data).split(b"\n")
        return [line.decode() for line in whole]

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Expected:
    """What must be on disk, by what children said: by key, there, gone, or either."""

    def __init__(self) -> None:
        self.there: set[int] = set()
        self.gone: set[int] = set(range(KEYS))
        self.acknowledged = 0

    def hear(self, line: str) -> None:
        """One line of a child. A thread's lines are in order, and no other has its keys."""
        what, *rows = line.split()
        keys = set(map(int, rows)) if what in ("storing", "stored", "deleting", "deleted") else set()
        if what in ("storing", "deleting"):
            self.gone -= keys if what == "storing" else set()
            self.there -= keys if what == "deleting" else set()
        elif what == "stored":
            self.there |= keys
            self.acknowledged += len(keys)
        elif what == "deleted":
            self.gone |= keys
            self.acknowledged += len(keys)


def kills(
    seed: int, count: int, folder: str | os.PathLike[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Kills ``count`` processes in the middle of their writes, and looks at what is left after each.

    Parameters
    ----------
    seed, folder, progress
        As of :func:`perf.faults_disk.campaign`.
    count

    Returns
    -------
    dict
        ``kills``, ``acknowledged`` (records), ``records_right``; ``lost``, ``wrong_bytes`` and ``returned_after_delete`` must
        be 0, and ``served_again`` true. ``seconds`` it took.
    """
    began, draw = time.monotonic(), random.Random(seed)
    home = Path(tempfile.mkdtemp(prefix="kvortex-kills-", dir=folder))
    found = {"tier": "disk", "seed": seed, "kills": 0, "acknowledged": 0, "records_right": 0}
    found |= {"lost": 0, "wrong_bytes": 0, "returned_after_delete": 0}
    content, expected, server = Content(seed), Expected(), Server(seed)
    try:
        for number in range(count):
            for line in server.kill_one(home, seed + number, draw.uniform(0.0, 0.05)):
                expected.hear(line)
            found["kills"] += 1
            _look(str(home), content, expected, found, closing=draw.random() < 0.5)
            if progress is not None:
                progress(number + 1, count)
        found["acknowledged"] = expected.acknowledged
        return found | {"served_again": _serves_again(str(home), content), "seconds": time.monotonic() - began}
    finally:
        server.close()
        shutil.rmtree(home, ignore_errors=True)


def _look(folder: str, content: Content, expected: Expected, found: dict[str, Any], *, closing: bool) -> None:
    """Reads everything. Every second time the tier is closed, so that the next child opens it by its snapshot."""
    tier = _tier(folder)
    content.room[:] = 0
    got = tier.get_into(content.keys, content.at(content.room), content.sizes, Call(time.monotonic() + _WAIT))
    right = set(np.flatnonzero(got.outcomes == Outcome.OK).tolist())
    for row in right:
        size = int(content.sizes[row])
        found["wrong_bytes"] += int((content.room[row, :size] != content.data[row, :size]).sum())
    found["records_right"] += len(right)
    found["lost"] += len(expected.there - right)
    found["returned_after_delete"] += len(expected.gone & right)
    expected.there, expected.gone = set(right), set(range(KEYS)) - right  # a look settles what was open
    if not closing:  # as if this process had been killed as well
        tier._readers.close(5)
        tier._writers.close(5)
        for slab in tier._store.slabs:
            slab.close()
    else:
        tier.close()


def _serves_again(folder: str, content: Content) -> bool:
    tier = _tier(folder)
    call = Call(time.monotonic() + _WAIT)
    try:
        stored = tier.put_from(content.keys, content.at(content.data), content.sizes, content.digests, call)
        got = tier.get_into(content.keys, content.at(content.room), content.sizes, call)
        return bool((stored == Outcome.OK).all() and (got.outcomes == Outcome.OK).all())
    finally:
        tier.close()
