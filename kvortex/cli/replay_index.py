"""``kvortex replay --no-data``: policies and pool sizes on an index alone."""

from __future__ import annotations

import time
from typing import Any

from kvortex.cli import console
from kvortex.traces.belady import bound
from kvortex.traces.format import Trace
from kvortex.traces.sweep import Grid, Run, batches, sweep


def play(trace: Trace, grid: Grid) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What all runs have in common, and a row for each."""
    began = time.perf_counter()
    console.note("replay on the index alone: compiling, where this is the first time")
    with console.Progress("replaying", len(grid) * len(batches(trace)) + len(grid.pool_blocks)) as progress:
        bounds = bounds_of(trace, grid, progress)
        rows = [_row(trace, run) for run in sweep(trace, grid, progress.advance)]
    facts = {"device": None, "bound": bounds}
    return facts | ({} if len(rows) == 1 else {"seconds": time.perf_counter() - began}), rows


def bounds_of(trace: Trace, grid: Grid, progress: console.Progress) -> list[dict[str, Any]]:
    """The most prefix hits that any policy could have, a row a pool size."""
    rows = []
    for size in grid.pool_blocks:
        hits = bound(trace, size)
        rows.append({"pool_blocks": size, "hits": hits, "hit_rate": rate(trace, hits)})
        progress.advance("Belady's bound")
    return rows


def rate(trace: Trace, hits: int) -> float:
    """Of all full blocks that requests asked for, those beyond the pool too."""
    return hits / trace.references if trace.references else 0.0


def _row(trace: Trace, run: Run) -> dict[str, Any]:
    hits = int(run.hits.sum())
    return {
        "policy": run.policy,
        "admit_after": run.admit_after,
        "pool_blocks": run.pool_blocks,
        "prefix_hits": hits,
        "prefix_hit_rate": rate(trace, hits),
        "blocks_beyond_pool": trace.references - trace.within(run.pool_blocks),
        "evictions": run.evictions,
        "seconds": run.seconds,
        "hits": run.hits[~trace.stored].tolist(),
    }
