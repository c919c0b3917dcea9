"""How fast do coded blocks move while a model's prompt is computed, and what does that cost the computation?

A layer of Llama-3-8B over 8,192 tokens runs again and again on a stream of default priority (:mod:`perf.loads`), and blocks of
that model's shape are saved, or loaded, without a pause, two transfers at a time; spans, rates and slowdowns are those of
:mod:`perf.compute`. ``rate``: GB/s of original bytes. ``alone``: the same engine's, where nothing computes, and ``of_alone``
what is left of it; ``ratio``: to contiguous DMAs beside the same loop. A codec's kernels take multiprocessors from
the model for as long as they code: ``rate`` to the kernels' own rate (``perf plane``) is the part of the GPU that they take,
and ``slowdown`` cannot be small where that part is not.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from typing import Any

import kvortex
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceUnavailableError
from perf.coded_pages import SHAPE, WAYS, Coded, Pages, engines
from perf.compute import STAGING_BYTES, beside, beside_copies, told
from perf.flow import tickets
from perf.loads import Loop
from perf.pages import moved
from perf.raw import RawCopy
from perf.report import Report, progress

LOAD = "prefill"
TURNS = 5  # of each engine alone
KEYS = ("codec", "direction")
BETTER = {"rate": "higher", "of_alone": "higher", "ratio": "higher", "slowdown": "lower"}
COLUMNS = (*KEYS, *BETTER, "alone", "raw_rate", "raw_slowdown", "wrong_bytes")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, a row for each codec and direction, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    if not isinstance(device, CudaDevice):
        raise DeviceUnavailableError("this measurement needs a GPU")
    blocks, seconds, rounds = (16, 0.05, 1) if quick else (256, 0.2, 5)
    notes: dict[str, Any] = {"blocks": blocks, "block_bytes": SHAPE.raw_bytes, "rounds": rounds, "loop_seconds": seconds}
    notes |= {"gpu_pool_size_bytes": STAGING_BYTES, "load": LOAD, "unit": "GB/s of original bytes"}
    loop, rows = Loop(LOAD, seconds), []
    with contextlib.ExitStack() as stack:
        pages = Pages(device, blocks, stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(pages.close)
        raw = RawCopy(device, blocks * SHAPE.raw_bytes)
        stack.callback(raw.close)
        notes["raw_wrong_bytes"] = raw.wrong_bytes()  # from here on its bytes are random
        floor = {way: beside_copies(loop, rounds, raw, to_host=way == "save") for way in WAYS}
        for one in engines(pages, STAGING_BYTES >> 20, notes, sets=3):
            with contextlib.ExitStack() as own:
                own.callback(one.engine.shutdown)
                progress(f"{one.name}, beside {LOAD}")
                try:
                    for row in rows_of(one, loop, rounds, floor):
                        progress(f"{one.name}, beside {LOAD}: {told(row)}")
                        rows.append(row)
                except kvortex.TransferError as error:  # it may be too slow beside the loop: the others still count
                    notes.setdefault("failed", {})[one.name] = str(error)
    return device.name, rows, notes


def rows_of(one: Coded, loop: Loop, rounds: int, floor: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Of one engine; ``floor`` has rate and slowdown of contiguous DMAs each way."""
    executor: Any = one.engine._executor
    executor.beside_compute = False
    for turn in range(TURNS + 1):
        one.turn(keep=turn > 0)
    executor.beside_compute = True
    rows = []
    starts: dict[str, Callable[[], kvortex.Ticket]] = {"save": one.save, "load": one.load}
    for way, start in starts.items():
        flow = tickets(start)
        rate, slowdown = beside(loop, rounds, flow, flow.drain)
        row = {"codec": one.name, "direction": way, "rate": rate, "alone": one.rate(way), "slowdown": slowdown}
        raw_rate, raw_slowdown = floor[way]
        rows.append(row | {"of_alone": rate / row["alone"], "ratio": rate / raw_rate, "raw_rate": raw_rate,
                           "raw_slowdown": raw_slowdown})
        moved(one.save())
    wrong = one.facts()["wrong_bytes"]
    return [row | {"wrong_bytes": wrong} for row in rows]


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
