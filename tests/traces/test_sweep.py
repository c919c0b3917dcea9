"""Traces on an index alone: the hits of the naive reference, request by request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvortex.errors import ConfigError
from kvortex.index import POLICIES
from kvortex.traces import sweep as module
from kvortex.traces.belady import bound
from kvortex.traces.format import Trace, read_trace
from kvortex.traces.sweep import Grid, batches, label, play, sweep
from tests.conversations import MOONCAKE, conversations
from tests.naive import replay, replay_lru

SIZES = [1000, 3000, 10000, 30000]


@pytest.mark.parametrize("blocks", [1, 7, 30, 1000])
def test_random_traces(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", 64)
    requests = conversations(150)
    trace, told = Trace.of(requests), []
    assert len(batches(trace)) > 5
    run = play(trace, "lru", blocks, tell=lambda: told.append(1))
    assert run.hits.tolist() == replay_lru(requests, blocks) and len(told) == len(batches(trace))


def test_batches_are_whole_requests() -> None:
    assert batches(Trace.of([])) == [] and batches(Trace.of([[], []])) == [(0, 2)]
    trace = Trace.of([[1], list(range(module._BATCH * 2)), [1]])
    assert batches(trace)[0][0] == 0 and batches(trace)[-1][1] == 3
    assert all(a[1] == b[0] and a[0] < a[1] for a, b in zip(batches(trace), batches(trace)[1:], strict=False))
    assert play(trace, "lru", module._BATCH * 3).hits.tolist() == [0, 0, 1]


def test_every_policy_on_every_size() -> None:
    trace, told = Trace.of(conversations(50)), []
    grid = Grid(list(POLICIES), [1, 2], [3, 9])
    runs = list(sweep(trace, grid, told.append))
    assert [(run.policy, run.admit_after, run.pool_blocks) for run in runs] == list(grid) and len(runs) == len(grid)
    assert list(grid)[:3] == [("lru", 1, 3), ("lru", 1, 9), ("lru", 2, 3)] and label("lru", 2) == "lru, offer 2"
    assert told[:3] == ["lru, 3 blocks", "lru, 9 blocks", "lru, offer 2, 3 blocks"] and len(told) == len(runs)
    for run in runs:
        assert run.hits.tolist() == replay(trace.requests(), run.pool_blocks, run.policy, run.admit_after)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("blocks", [1, 7, 30, 1000])
def test_what_is_stored_unasked(policy: str, blocks: int) -> None:
    requests = conversations(150)
    stored = [at % 3 == 1 for at in range(150)]
    trace = Trace.of(requests, stored=stored)
    hits = play(trace, policy, blocks).hits
    assert hits[~trace.stored].tolist() == replay(requests, blocks, policy, stored=stored)
    assert not hits[trace.stored].any() and hits.sum() <= bound(trace, blocks)
    asked = [ids for ids, unasked in zip(requests, stored, strict=True) if not unasked]
    assert trace.asked == len(asked) == 100 and trace.references == sum(map(len, asked))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("admit_after", [1, 3])
def test_a_pool_that_is_larger_than_the_trace(policy: str, admit_after: int) -> None:
    requests = conversations(100)
    trace = Trace.of(requests)
    run = play(trace, policy, 1 << 62, admit_after)
    assert run.hits.tolist() == replay(requests, 10**6, policy, admit_after)
    assert run.evictions == 0 and run.pool_blocks == 1 << 62 and run.hits.sum() > 0


def test_what_is_no_policy() -> None:
    with pytest.raises(ConfigError, match="policy = 'fifo': unknown"):
        play(Trace.of([[1]]), "fifo", 3)


DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_documented_table_is_the_figures_that_were_measured() -> None:
    documented = {}
    for row in (DOCS / "hit-rates.md").read_text().splitlines():
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        if len(cells) == 4 and cells[0].endswith("%"):
            documented[name] = cells
    report = json.loads((DOCS / "hit-rates.json").read_text())
    measured: dict[str, list[str]] = {}
    for run in report["runs"]:
        name = f"`{run['policy']}`" + ", stored at the 2nd offer" * (run["admit_after"] == 2)
        measured.setdefault(name, []).append(f"{run['prefix_hit_rate']:.2%}".replace("%", " %"))
    measured["at most (Belady)"] = [f"{row['hit_rate']:.2%}".replace("%", " %") for row in report["bound"]]
    assert documented == measured and len(measured) == 9


@pytest.mark.skipif(not MOONCAKE.exists(), reason="the Mooncake conversation trace is not beside the checkout")
def test_the_figures_that_were_measured_are_so_still() -> None:
    trace, report = read_trace(MOONCAKE), json.loads((DOCS / "hit-rates.json").read_text())
    for run in report["runs"]:
        again = play(trace, run["policy"], run["pool_blocks"], run["admit_after"])
        assert (int(again.hits.sum()), again.evictions) == (run["prefix_hits"], run["evictions"])
    assert [bound(trace, row["pool_blocks"]) for row in report["bound"]] == [row["hits"] for row in report["bound"]]


@pytest.mark.skipif(not MOONCAKE.exists(), reason="the Mooncake conversation trace is not beside the checkout")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("blocks", SIZES)
def test_the_recorded_trace_hits_as_the_reference_does(policy: str, blocks: int) -> None:
    trace = read_trace(MOONCAKE)
    hits = play(trace, policy, blocks).hits
    assert hits.tolist() == replay(trace.requests(), blocks, policy)
    assert 0 < hits.sum() <= bound(trace, blocks)
