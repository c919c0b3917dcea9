"""Hit counts of whole traces: BlockIndex, driven as an engine drives it, against a reference in an OrderedDict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kvortex.index import NEW, BlockIndex
from tests.naive import replay_lru

TRACE = Path(__file__).resolve().parents[2] / "../shared/data/mooncake_conversation_trace.jsonl"


def numbered(blocks: Sequence[int]) -> np.ndarray:
    words = np.zeros((len(blocks), 4), np.uint64)
    words[:, 0] = blocks
    return words.view(np.uint8)


def replay(requests: Sequence[Sequence[int]], capacity: int) -> tuple[list[int], BlockIndex]:
    index, hits = BlockIndex(capacity), []
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


@pytest.mark.skipif(not TRACE.exists(), reason="the Mooncake conversation trace is not beside the checkout")
@pytest.mark.parametrize("capacity", [100, 1000, 3000])
def test_a_recorded_trace_hits_as_the_reference_does(capacity: int) -> None:
    with TRACE.open() as lines:
        records = [json.loads(line) for line, _ in zip(lines, range(300), strict=False)]
    # The last block may be partly filled, and partial blocks have no key.
    requests = [record["hash_ids"][: record["input_length"] // 512] for record in records]
    hits, index = replay(requests, capacity)
    assert hits == replay_lru(requests, capacity)
    assert sum(hits) > 0 and index.counts().evictions > 0
