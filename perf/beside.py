"""How fast do coded blocks move while a model's prompt is computed, and what does that cost the computation?

A layer of Llama-3-8B over 8,192 tokens runs again and again on a stream of default priority (:mod:`perf.loads`), and blocks of
that model's shape are saved, or loaded, without a pause, two transfers at a time; all codecs take turns, and spans, rates and
slowdowns are those of :mod:`perf.compute`. Each codec's engine has the share of the link by which its blocks move at ``ASKED``
of contiguous DMAs, so that rows say what that costs. ``rate``: GB/s of original bytes. ``alone``: the same engine's, where
nothing computes, and ``of_alone`` what is left of it; ``ratio``: to contiguous DMAs beside the same loop. A codec's kernels
take multiprocessors from the model for as long as they code: ``rate`` to the kernels' own rate (``perf plane``) is the part of
the GPU that they take, and ``slowdown`` cannot be small where that part is not. All engines are open at once, each with 1.25
GiB of staging buffers.
"""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any

import kvortex
from perf.coded import BARS
from perf.coded_pages import SHAPE, Coded, Pages, engines
from perf.flow import tickets
from perf.loads import Loop
from perf.moving import STAGING_BYTES, open_gpu, told
from perf.pages import moved
from perf.raw import RawCopy
from perf.report import Report, progress
from perf.turns import Mover, Turns, raw_movers

LOAD = "prefill"
TURNS = 5  # of each engine alone
# Rates to be reached, of a contiguous DMA: nine tenths of what each codec is to bring where nothing computes.
ASKED = {"raw": 0.9} | {name: 0.9 * bar for name, bar in BARS.items()}
_MORE = 1.006  # of the link, whose rate is that of a profile, a little below what DMAs have here
KEYS = ("codec", "direction")
BETTER = {"rate": "higher", "of_alone": "higher", "ratio": "higher", "slowdown": "lower"}
COLUMNS = (*KEYS, *BETTER, "asked", "slowdown_least", "slowdown_most", "alone", "raw_rate", "raw_slowdown", "wrong_bytes")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, a row for each codec and direction, and what the rows have in common."""
    device = open_gpu(device_name)
    blocks, seconds, rounds = (16, 0.05, 1) if quick else (256, 0.2, 9)
    notes: dict[str, Any] = {"blocks": blocks, "block_bytes": SHAPE.raw_bytes, "rounds": rounds, "loop_seconds": seconds}
    notes |= {"gpu_pool_size_bytes": STAGING_BYTES, "load": LOAD, "unit": "GB/s of original bytes"}
    with contextlib.ExitStack() as stack:
        pages = Pages(device, blocks, stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(pages.close)
        raw = RawCopy(device, blocks * SHAPE.raw_bytes)
        stack.callback(raw.close)
        notes["raw_wrong_bytes"] = raw.wrong_bytes()  # from here on its bytes are random
        movers: dict[Any, Mover] = dict(raw_movers(raw))
        coded: dict[str, Coded] = {}
        failed: dict[str, str] = {}
        for one in engines(pages, STAGING_BYTES >> 20, notes, sets=3, own=own_share):
            stack.callback(one.engine.shutdown)
            progress(f"{one.name} alone")
            try:
                alone(one)
            except kvortex.TransferError as error:  # the others still count
                failed[f"{one.name} alone"] = str(error)
                continue
            coded[one.name] = one
            movers[one.name, "save"] = Mover(tickets(one.save))
            movers[one.name, "load"] = Mover(tickets(one.load), lambda one=one: moved(one.save()))  # type: ignore[misc]
        turns = Turns(movers)
        turns.run(Loop(LOAD, seconds), rounds, LOAD)
        notes["nothing_moves"] = turns.control()
        failed |= {f"{name or 'one DMA'}, {way}": why for (name, way), why in turns.failed.items()}
        rows = []
        for name, one in coded.items():
            ways = turns.ended(name)
            try:
                wrong = _wrong_bytes(one) if ways else 0
            except kvortex.TransferError as error:
                failed[f"{name}, behind its turns"] = str(error)
                continue
            for way in ways:
                row = {"codec": name, "direction": way, "asked": ASKED[name], "alone": one.rate(way), "wrong_bytes": wrong}
                row |= turns.figures(name, way)
                rows.append(row | {"of_alone": row["rate"] / row["alone"]})
                progress(f"{name}, beside {LOAD}: {told(rows[-1])}")
        if failed:
            notes["failed"] = failed
    return device.name, rows, notes


def own_share(name: str, slot: float, used: float) -> dict[str, Any]:
    """Options by which blocks have the rate that is asked for, where a save moves slots and a load what records use of them,
    these parts of an original."""
    save, load = (min(1.0, _MORE * ASKED.get(name, 1.0) * part) for part in (slot, used))
    return {"link_share_beside_compute": (save, load)}


def alone(one: Coded) -> None:
    """Some saves and loads where nothing computes; from here on something does."""
    executor: Any = one.engine._executor
    executor.beside_compute = False
    for turn in range(TURNS + 1):
        one.turn(keep=turn > 0)
    executor.beside_compute = True


def _wrong_bytes(one: Coded) -> int:
    """Of a save and a load behind all turns."""
    moved(one.save())
    return int(one.facts()["wrong_bytes"])


def draw(axes: Any, report: Report) -> None:
    """GB/s against the loop's slowdown, a mark a row: filled for saves."""
    names = list(dict.fromkeys(row["codec"] for row in report.rows))
    for at, name in enumerate(names):
        for row in (row for row in report.rows if row["codec"] == name):
            fill = "full" if row["direction"] == "save" else "none"
            label = name if row["direction"] == "save" else None
            axes.plot(row["slowdown"], row["rate"], "o", color=f"C{at}", fillstyle=fill, label=label)
    axes.axvline(1.05, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel("time of the computation, against its time alone")
    axes.set_ylabel("GB/s of original bytes")
    axes.set_title(f"Coded blocks moving while a prompt is computed, {report.device}", fontsize=10)
    axes.legend(fontsize=8)
