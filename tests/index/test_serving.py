"""Whole requests in one compiled call, against the same requests one operation after another."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex.errors import ArgumentError
from kvortex.index import NEW, POLICIES, BlockIndex
from kvortex.index.serving import serve
from kvortex.traces.format import Trace
from tests.conversations import conversations


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("admit_after", [1, 2])
@pytest.mark.parametrize("capacity", [1, 7, 30, 1000])
def test_it_does_what_an_engine_asks_for(policy: str, admit_after: int, capacity: int) -> None:
    trace = Trace.of(conversations(200))
    one, other = (BlockIndex(capacity, policy, admit_after=admit_after) for _ in range(2))
    hits = []
    for first, end in zip(trace.starts.tolist(), trace.starts[1:].tolist(), strict=False):
        keys = trace.keys[first : min(end, first + capacity)]
        hits.append(one.match(keys))
        one.release(one.acquire(keys[: hits[-1]]))
        slots, status, _ = one.reserve(keys[hits[-1] :])
        one.commit(slots[status == NEW])
    half = len(trace) // 2
    served = [serve(other, trace.keys, part, capacity).tolist() for part in (trace.starts[: half + 1], trace.starts[half:])]
    assert sum(served, []) == hits and (capacity == 1 or sum(hits) > 0)
    assert one.counts() == other.counts() and one.lookup(trace.keys).tolist() == other.lookup(trace.keys).tolist()
    other.check()


def test_a_request_that_names_a_key_twice() -> None:
    index = BlockIndex(9)
    trace = Trace.of([[1, 2], [3, 3]])
    with pytest.raises(ArgumentError, match="request 1 names a key twice"):
        serve(index, trace.keys, trace.starts, 9)
    assert index.counts().resident == 2
    index.check()


def test_nothing_to_serve() -> None:
    index = BlockIndex(3)
    assert serve(index, np.empty((0, 32), np.uint8), np.zeros(1, np.int64), 3).tolist() == []
    assert serve(index, np.empty((0, 32), np.uint8), np.zeros(3, np.int64), 3).tolist() == [0, 0]
