"""``kvortex replay`` with data: blocks are saved and loaded for each request, and every byte is verified."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from kvortex.cli import console
from kvortex.cli.pages import Pages
from kvortex.cli.replay_index import bounds_of, rate
from kvortex.cli.serve import Server, open_engine, warm_up
from kvortex.devices import Device, open_device
from kvortex.errors import ArgumentError, cut
from kvortex.traces.format import Trace
from kvortex.traces.sweep import Grid, label

# The pages of the stand-in model hold 16 tokens of 4 layers, whatever a block of the trace holds: 8 fragments a record.
_LAYERS, _TOKENS, _LEAST_DIM = 4, 16, 4
_RECORD_UNIT = _LAYERS * 2 * _TOKENS * _LEAST_DIM * 2
_MOST_RECORD = 1 << 40


def check_record_bytes(record_bytes: int) -> None:
    """Refuses what no record of the stand-in model is."""
    if not 0 < record_bytes <= _MOST_RECORD or record_bytes % _RECORD_UNIT:
        size = cut(str(record_bytes))
        raise ArgumentError(f"--record-bytes {size}: must be a multiple of {_RECORD_UNIT}, {_MOST_RECORD} at most")


def play(
    trace: Trace, grid: Grid, record_bytes: int, device_name: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What all runs have in common, and a row for each."""
    began, device = time.perf_counter(), open_device(device_name)
    console.note(f"replay on {device.name}: compiling, where this is the first time")
    with console.Progress("replaying", len(grid) * len(trace) + len(grid.pool_blocks)) as progress:
        rows = [_replay(trace, point, record_bytes, device, progress) for point in grid]
        bounds = bounds_of(trace, grid, progress)
    facts = {"device": device.describe(), "record_bytes": record_bytes, "bound": bounds}
    return facts | ({} if len(rows) == 1 else {"seconds": time.perf_counter() - began}), rows


def _replay(
    trace: Trace, point: tuple[str, int, int], record_bytes: int, device: Device, progress: console.Progress
) -> dict[str, Any]:
    """Serves the requests one after the other, and counts. "hits" has one number for each request."""
    policy, admit_after, blocks = point
    # A request moves in one load and one save: in parts, what is evicted for its head could be blocks of its own tail.
    dim = record_bytes // (_RECORD_UNIT // _LEAST_DIM)
    with Pages(device, max(1, min(trace.longest, blocks)), _LAYERS, _TOKENS, 1, dim) as pages:
        warm_up(pages, "--record-bytes")
        options = {"eviction_policy": policy, "admit_after": admit_after}
        with open_engine(pages, blocks, trace.block_tokens, "--pool-blocks", options) as engine:
            server, hits, began = Server(engine, pages), [], time.perf_counter()
            bounds = zip(trace.starts.tolist(), trace.starts[1:].tolist(), trace.stored.tolist(), strict=False)
            for first, end, stored in bounds:
                keys = trace.keys[first : min(end, first + blocks)]
                if stored:
                    server.store(keys, np.arange(len(keys)))
                else:
                    hits.append(server.serve(keys, np.arange(len(keys))))
                progress.advance(f"{label(policy, admit_after)}, {blocks} blocks")
            seconds, stats = time.perf_counter() - began, engine.get_stats()
        return {
            "policy": policy,
            "admit_after": admit_after,
            "pool_blocks": stats.capacity_blocks,
            "prefix_hits": server.hits,
            "prefix_hit_rate": rate(trace, server.hits),
            "blocks_beyond_pool": trace.references - server.blocks,
            "evictions": stats.evictions,
            "saved_blocks": stats.saved_blocks,
            "saved_bytes": stats.saved_bytes,
            "loaded_blocks": stats.loaded_blocks,
            "loaded_bytes": stats.loaded_bytes,
            "failed_blocks": stats.failed_blocks,
            "corrupt_blocks": stats.corrupt_blocks,
            "verified_bytes": server.verified_bytes,
            "wrong_bytes": server.wrong_bytes,
            "seconds": seconds,
            "save_bytes_per_second": stats.save_bytes_per_second,
            "load_bytes_per_second": stats.load_bytes_per_second,
            "hits": hits,
        }
