"""The bound: no policy is above it, and where ids are chained one that knows the future reaches it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from kvortex.traces.belady import bound
from kvortex.traces.format import Trace, read_trace
from tests.conversations import MOONCAKE, conversations
from tests.naive import replay_lru

Requests = list[list[int]]


def most_hits(requests: Requests, capacity: int, stored: Sequence[bool] | None = None) -> int:
    """The most prefix hits that any policy can have which stores nothing but what is asked for: it tries all of them."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for request, unasked in zip(requests, stored or [False] * len(requests), strict=True):
        after: dict[frozenset[int], int] = {}
        for held, before in best.items():
            run = 0 if unasked else len(list(itertools.takewhile(held.__contains__, request[:capacity])))
            there = held.union(request[:capacity])
            for size in range(min(capacity, len(there)) + 1):
                for kept in map(frozenset, itertools.combinations(sorted(there), size)):
                    after[kept] = max(after.get(kept, 0), before + run)
        best = after
    return max(best.values())


def naive_min(requests: Requests, capacity: int) -> int:
    """MIN with bypass, which looks through the whole future each time."""
    blocks = [block for request in requests for block in request[:capacity]]
    held: set[int] = set()
    hits = 0
    for at, block in enumerate(blocks):
        future = blocks[at + 1 :]
        hits += block in held
        held.add(block)
        if len(held) > capacity:
            held.remove(max(held, key=lambda one: future.index(one) if one in future else len(future) + (one == block)))
    return hits


def chained(rng: np.random.Generator) -> Requests:
    """Paths from the root of a small tree: an id always has the same predecessor."""
    paths: Requests = [[0]]
    for node in range(1, 6):
        paths.append([*paths[int(rng.integers(len(paths)))], node])
    return [paths[int(rng.integers(len(paths)))] for _ in range(8)]


def unchained(rng: np.random.Generator) -> Requests:
    return [rng.permutation(6)[: int(rng.integers(0, 6))].tolist() for _ in range(8)]


@pytest.mark.parametrize("seed", range(12))
def test_the_bound_is_the_optimum_of_chained_traces(seed: int) -> None:
    requests = chained(np.random.default_rng(seed))
    for capacity in range(1, 6):
        assert bound(Trace.of(requests), capacity) == most_hits(requests, capacity)


def test_no_policy_is_above_the_bound_of_any_trace() -> None:
    gaps = []
    for seed in range(12):
        requests = unchained(np.random.default_rng(seed))
        for capacity in range(1, 5):
            gaps.append(bound(Trace.of(requests), capacity) - most_hits(requests, capacity))
            assert bound(Trace.of(requests), capacity) == naive_min(requests, capacity)
    assert min(gaps) == 0 < max(gaps)  # a block behind a gap counts for the bound, and for no replay


def test_what_is_stored_unasked_is_no_hit_and_costs_nothing() -> None:
    gaps = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        requests, stored = unchained(rng), (rng.random(8) < 0.4).tolist()
        trace = Trace.of(requests, stored=stored)
        gaps += [bound(trace, capacity) - most_hits(requests, capacity, stored) for capacity in range(1, 6)]
    assert min(gaps) == 0 < max(gaps)
    twice = Trace.of([[1], [2], [1], [2], [1]], stored=[False, False, True, False, False])
    assert bound(twice, 1) == 1 and bound(twice, 2) == 2  # the 1 is not kept for where it is stored again: 2 is


@pytest.mark.parametrize("capacity", [1, 3, 10, 40, 500])
def test_random_traces(capacity: int) -> None:
    for seed in range(3):
        requests = conversations(150, seed)
        hits = bound(Trace.of(requests), capacity)
        assert hits == naive_min(requests, capacity) >= sum(replay_lru(requests, capacity))


def test_traces_with_nothing_in_them() -> None:
    assert bound(Trace.of([[], []]), 1) == 0 and bound(Trace.of([[1], [2], [3]]), 5) == 0
    assert bound(Trace.of([[1], [2], [1]]), 1) == 1  # the 2 is not stored


@pytest.mark.skipif(not MOONCAKE.exists(), reason="the Mooncake conversation trace is not beside the checkout")
def test_a_pool_for_everything_hits_all_that_comes_again() -> None:
    trace = read_trace(MOONCAKE)
    assert len(trace.ids) == 276_491 and trace.distinct == 170_899
    assert bound(trace, trace.distinct) == 276_491 - 170_899 == 105_592
