"""How fast do blocks move while the GPU computes, and what does that cost the computation?

A loop of passes runs on a stream of default priority, without a pause or an end. In one span of it blocks are saved, or loaded,
two transfers at a time, and in spans before and after nothing moves (:mod:`perf.turns`). What is asked is the cost to a loop on
a GPU that has come to the end of its power, and a span is as long as several of the transfers, so that those with which it
begins and ends count for little. Contiguous DMAs of random bytes, one behind the other beside the same loop, are what ``ratio``
is to; ``raw_slowdown`` is what these cost, and ``nothing_moves`` what a span seems to cost in which nothing moves either.
``slowdown_least`` and ``slowdown_most`` are those of all rounds: they show how well any slowdown can be told. ``wrong_bytes``
are those of a round trip ahead, and in all pages behind each load's last turn.
"""

from __future__ import annotations

import contextlib
from typing import Any

import kvortex
from perf import moving
from perf.loads import LOADS, Loop
from perf.moving import BUFFERS, STAGING_BYTES, Blocks, open_gpu, rows_of
from perf.pages import WAYS
from perf.raw import RawCopy
from perf.report import Report, progress
from perf.turns import Mover, Turns, raw_movers

FRAGMENT_BYTES = (4 << 10, 18 << 10, 32 << 10)
ROUTES = ("auto",)  # transfer_route
KEYS = ("load", "fragment_kib", "route", "direction")
BETTER, COLUMNS = moving.BETTER, (*KEYS, *moving.FIGURES)


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, one row a load, fragment size, route and direction, and what the rows have in common."""
    device = open_gpu(device_name)
    payload, seconds, rounds = (32 << 20, 0.05, 1) if quick else (512 << 20, 0.2, 9)
    notes: dict[str, Any] = {"payload_bytes": payload, "gpu_pool_size_bytes": STAGING_BYTES, "staging_buffers": BUFFERS}
    notes |= {"loop_seconds": seconds, "rounds": rounds, "unit": "GB/s of payload"}
    notes["link_share_beside_compute"] = kvortex.KVortexConfig().link_share_beside_compute
    rows = []
    with contextlib.ExitStack() as stack:
        raw = RawCopy(device, payload)
        stack.callback(raw.close)
        notes["raw_wrong_bytes"] = raw.wrong_bytes()  # from here on its bytes are random
        kinds = {}
        for fragment_bytes in FRAGMENT_BYTES:
            for route in ROUTES:
                progress(f"fragments of {fragment_bytes >> 10} KiB, {route}")
                kinds[fragment_bytes, route] = Blocks(device, fragment_bytes, payload, transfer_route=route)
                stack.callback(kinds[fragment_bytes, route].close)
        for name in LOADS:
            found: dict[Any, Mover] = dict(raw_movers(raw))
            for kind, blocks in kinds.items():
                found |= zip([(kind, way) for way in WAYS], blocks.movers(), strict=True)
            turns = Turns(found)
            turns.run(Loop(name, seconds), rounds, name)
            notes.setdefault("nothing_moves", {})[name] = turns.control()
            for (kind, way), why in turns.failed.items():
                what = f"{kind[0] >> 10} KiB, {kind[1]}" if kind else "one DMA"
                notes.setdefault("failed", {})[f"{name}, {what}, {way}"] = why
            for kind, blocks in kinds.items():
                kib, route = kind[0] >> 10, kind[1]
                named = {"load": name, "fragment_kib": kib, "route": route}
                rows += rows_of(turns, kind, blocks, named, f"{name}, fragments of {kib} KiB, {route}")
    return device.name, rows, notes


def draw(axes: Any, report: Report) -> None:
    """Share of a contiguous DMA against the loop's slowdown, a mark a row: filled for saves. In grey what a DMA costs, at 1."""
    colours = dict(zip((4, 18, 32), ("#27608f", "#d0792a", "#5c8a3a"), strict=True))
    marks = dict(zip(LOADS, ("s", "^", "o"), strict=True))
    for row in report.rows:
        fill = "full" if row["direction"] == "save" else "none"
        axes.plot(row["slowdown"], row["ratio"], marks[row["load"]], color=colours[row["fragment_kib"]], fillstyle=fill)
        axes.plot(row["raw_slowdown"], 1, marks[row["load"]], color="grey", fillstyle=fill)
    for kib, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=f"{kib} KiB")
    axes.plot([], [], "o", color="grey", label="one DMA")
    for load, mark in marks.items():
        axes.plot([], [], mark, color="black", label=load)
    axes.axhline(0.9, color="black", linewidth=0.6, linestyle=":")
    axes.axvline(1.03, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel("time of the computation, against its time alone")
    axes.set_ylabel("rate, against one contiguous DMA")
    axes.set_title(f"Blocks moving while the GPU computes, {report.device}", fontsize=10)
    axes.legend(fontsize=8, ncols=2)
