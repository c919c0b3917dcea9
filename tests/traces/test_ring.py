"""The ring without a lock: threads that never hold the GIL push, one takes, and nothing is torn, lost or twice."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest
from numba import njit

from kvortex.traces import _lines, _naming, _ring

THREADS, KEYS = 3, 24


@njit(nogil=True)
def push_many(ring: Any, keys: Any, calls: int, stop: Any) -> int:
    """Pushes calls of 1, 2, ... keys, each until the ring takes it; how often it did not."""
    refused = 0
    for at in range(calls):
        while not _ring.push(ring, keys[: 1 + at % keys.shape[0]], 0, 0):
            refused += 1
            if stop[0]:
                return refused
    return refused


@pytest.mark.parametrize(("rows", "count"), [(64, 1500), (4096, 20_000)])
def test_pushes_beside_each_other_and_beside_the_reader(rows: int, count: int) -> None:
    ring, names, out = _ring.new_ring(rows), _naming.new_names(4096), np.empty(_lines.room(rows), np.uint8)
    keys = [np.arange(1 + KEYS * 4 * one, 1 + KEYS * 4 * (one + 1), dtype=np.int64).reshape(-1, 4) for one in range(THREADS)]
    stop = np.zeros(1, np.int64)
    push_many(ring, keys[0], 0, stop)  # compiled, while there are two cores for that
    _lines.write_lines(ring, names, _lines.opening(16), 16, out)
    refused: list[int] = []
    threads = [threading.Thread(target=lambda own=own: refused.append(push_many(ring, own, count, stop))) for own in keys]
    for thread in threads:
        thread.start()
    lines: list[list[int]] = []
    dropped, calls, alive, deadline = 0, 1, True, time.monotonic() + 60
    while (calls or alive) and time.monotonic() < deadline:
        alive = any(thread.is_alive() for thread in threads)  # first, so that the last calls are taken too
        nbytes, calls = _lines.write_lines(ring, names, _lines.opening(16), 16, out)
        for line in out[:nbytes].tobytes().splitlines():
            record = json.loads(line)
            lines.append(record["hash_ids"])
            dropped += record.get("dropped", 0)
    stop[0] = 1
    for thread in threads:
        thread.join()
    assert len(lines) == THREADS * count and dropped == sum(refused) == ring.marks[_ring.DROPPED]
    # A key that was read before it was there would have a number of its own.
    longest = {ids[0]: ids for ids in sorted(lines, key=len)}
    assert sorted(sum(longest.values(), [])) == list(range(THREADS * KEYS))
    assert all(ids == longest[ids[0]][: len(ids)] for ids in lines)
    for first in longest:
        assert [len(ids) for ids in lines if ids[0] == first] == [1 + at % KEYS for at in range(count)], "in their order"


def test_a_call_that_fills_the_ring_and_one_that_is_too_long() -> None:
    ring = _ring.new_ring(8)
    assert not _ring.push(ring, np.zeros((8, 4), np.int64), 0, 0) and ring.marks[_ring.DROPPED] == 1
    assert _ring.push(ring, np.zeros((7, 4), np.int64), 2, 5) and not _ring.push(ring, np.zeros((0, 4), np.int64), 0, 0)
    assert ring.rows[0].tolist() == [7, 2, 5, 1] and _ring.is_ready(ring, 0) and not _ring.is_ready(ring, 8)
    _ring.give_back(ring, 8)
    assert _ring.push(ring, np.zeros((7, 4), np.int64), 0, 0) and _ring.is_ready(ring, 8) and not _ring.is_ready(ring, 0)
