"""Hit counts of whole traces: BlockIndex, driven as an engine drives it, against references in dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kvortex.index import NEW, POLICIES, BlockIndex
from kvortex.traces.format import read_trace
from tests import naive
from tests.naive import replay_lru

TRACE = Path(__file__).resolve().parents[2] / "../shared/data/mooncake_conversation_trace.jsonl"


def numbered(blocks: Sequence[int]) -> np.ndarray:
    words = np.zeros((len(blocks), 4), np.uint64)
    words[:, 0] = blocks
    return words.view(np.uint8)


def replay(
    requests: Sequence[Sequence[int]], capacity: int, policy: str = "lru", admit_after: int = 1
) -> tuple[list[int], BlockIndex]:
    index, hits = BlockIndex(capacity, policy, admit_after=admit_after), []
    for request in requests:
        keys = numbered(request[:capacity])
        hits.append(index.match(keys))
        index.release(index.acquire(keys[: hits[-1]]))
        slots, status, _ = index.reserve(keys[hits[-1] :])
        index.commit(slots[status == NEW])
    index.check()
    return hits, index


def conversations(seed: int, count: int) -> list[list[int]]:
    """Requests that share prefixes, as turns of conversations do, and some that jump into the middle."""
    rng = np.random.default_rng(seed)
    requests: list[list[int]] = []
    fresh = 0
    for _ in range(count):
        request: list[int] = []
        if requests and rng.random() < 0.8:
            old = requests[-int(rng.integers(1, min(len(requests), 12) + 1))]
            request = old[int(rng.random() < 0.1) : int(rng.integers(0, len(old) + 1))]
        grow = int(rng.integers(0, 8))
        requests.append(request + list(range(fresh, fresh + grow)))
        fresh += grow
        if rng.random() < 0.2:  # residents behind a gap, in another order
            requests[-1] = rng.permutation(requests[-1]).tolist()
    return requests


@pytest.mark.parametrize("capacity", [1, 2, 5, 16, 50, 2000])
@pytest.mark.parametrize("seed", range(4))
def test_random_traces_hit_as_the_reference_does(capacity: int, seed: int) -> None:
    requests = conversations(seed, 400)
    hits, _ = replay(requests, capacity)
    assert hits == replay_lru(requests, capacity)
    assert capacity < 5 or sum(hits) > 0


def test_the_reference_by_hand() -> None:
    # 3 slots: the tail 3 goes for 4, then 2 and 4 are hit by nobody; a request longer than the pool is cut.
    assert replay_lru([[1, 2, 3], [4], [1, 2, 3], [1, 2, 3, 9], [9]], 3) == [0, 0, 2, 3, 0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("admit_after", [1, 3])
@pytest.mark.parametrize("capacity", [1, 2, 5, 16, 50, 2000])
def test_random_traces_hit_as_each_policy_says(policy: str, admit_after: int, capacity: int) -> None:
    requests = conversations(capacity, 300)
    hits, _ = replay(requests, capacity, policy, admit_after)
    assert hits == naive.replay(requests, capacity, policy, admit_after)
    assert sum(hits) > 0 or capacity < 5 or admit_after > 1


def test_both_references_say_the_same() -> None:
    requests = conversations(7, 400)
    for capacity in (1, 3, 20):
        assert naive.replay(requests, capacity, "lru") == replay_lru(requests, capacity)


POOLS = (1000, 3000, 10_000, 30_000)


@pytest.fixture(scope="module")
def trace() -> list[list[int]]:
    if not TRACE.exists():
        pytest.skip("the Mooncake conversation trace is not beside the checkout")
    return read_trace(TRACE).requests()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", POOLS)
def test_a_recorded_trace_hits_as_the_reference_does(trace: list[list[int]], policy: str, capacity: int) -> None:
    hits, index = replay(trace, capacity, policy)
    assert hits == naive.replay(trace, capacity, policy)
    assert sum(hits) > 0 and index.counts().evictions > 0


@pytest.mark.parametrize("capacity", POOLS)
def test_a_recorded_trace_hits_as_the_reference_does_with_admission(trace: list[list[int]], capacity: int) -> None:
    hits, index = replay(trace, capacity, admit_after=2)
    assert hits == naive.replay(trace, capacity, "lru", admit_after=2)
    assert sum(hits) > 0 and index.counts().evictions > 0
