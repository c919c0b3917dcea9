"""Traces on an index alone: the hits of the naive reference, request by request."""

from __future__ import annotations

import pytest

from kvortex.errors import ConfigError
from kvortex.index import POLICIES
from kvortex.traces import sweep as module
from kvortex.traces.belady import bound
from kvortex.traces.format import Trace, read_trace
from kvortex.traces.sweep import batches, play, sweep
from tests.conversations import MOONCAKE, conversations
from tests.naive import replay_lru

SIZES = [1000, 3000, 10000, 30000]


@pytest.mark.parametrize("blocks", [1, 7, 30, 1000])
def test_random_traces(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", 64)
    requests = conversations(150)
    trace, told = Trace.of(requests), []
    assert len(batches(trace)) > 5
    run = play(trace, "lru", blocks, lambda: told.append(1))
    assert run.hits.tolist() == replay_lru(requests, blocks) and len(told) == len(batches(trace))


def test_batches_are_whole_requests() -> None:
    assert batches(Trace.of([])) == [] and batches(Trace.of([[], []])) == [(0, 2)]
    trace = Trace.of([[1], list(range(module._BATCH * 2)), [1]])
    assert batches(trace)[0][0] == 0 and batches(trace)[-1][1] == 3
    assert all(a[1] == b[0] and a[0] < a[1] for a, b in zip(batches(trace), batches(trace)[1:], strict=False))
    assert play(trace, "lru", module._BATCH * 3).hits.tolist() == [0, 0, 1]


def test_every_policy_on_every_size() -> None:
    trace, told = Trace.of(conversations(50)), []
    runs = list(sweep(trace, list(POLICIES), [3, 9], told.append))
    assert [(run.policy, run.pool_blocks) for run in runs] == [(name, blocks) for name in POLICIES for blocks in (3, 9)]
    assert told[0] == "lru, 3 blocks" and len(told) == len(runs)


def test_what_is_no_policy() -> None:
    with pytest.raises(ConfigError, match="policy = 'fifo': unknown"):
        play(Trace.of([[1]]), "fifo", 3)


@pytest.mark.skipif(not MOONCAKE.exists(), reason="the Mooncake conversation trace is not beside the checkout")
@pytest.mark.parametrize("blocks", SIZES)
def test_the_recorded_trace_hits_as_the_reference_does(blocks: int) -> None:
    trace = read_trace(MOONCAKE)
    hits = play(trace, "lru", blocks).hits
    assert hits.tolist() == replay_lru(trace.requests(), blocks)
    assert 0 < hits.sum() <= bound(trace, blocks)
