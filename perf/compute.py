"""How fast do blocks move while the GPU computes, and what does that cost the computation?

A loop of passes runs on a stream of default priority, without a pause. In one span of it blocks are saved, or loaded, two
transfers at a time; the rate is that of what ended meanwhile, but for the first few, which fill staging buffers. The slowdown
is the time of this span against the mean of the spans before and after, where nothing moves; clocks wander by a percent or
two from span to span, so rounds are many. What is asked is the cost to a loop without an end, on a GPU that has come to the end
of its power: a span ahead brings it there, and a span is as long as several of the transfers, so that those with which it
begins and ends count for little. Contiguous DMAs of random bytes, one behind the other beside the same loop, are what the ratio
is of; ``raw_slowdown`` is what these cost, and shows how well any slowdown can be told.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import kvortex
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceUnavailableError
from perf.flow import copies, tickets
from perf.loads import LOADS, Loop
from perf.pages import Pages, moved
from perf.raw import RawCopy
from perf.report import Report, progress

FRAGMENT_BYTES = (4 << 10, 18 << 10, 32 << 10)
ROUTES = ("auto",)  # transfer_route
_NAP_S = 1e-4
PRIMING = 3  # transfers that are not counted
# All buffers of a direction but one must last the link for longer than a kernel of 7 ms keeps that one; and a kernel that
# serves one should end within the last wave of a product, as a longer buffer's does not.
STAGING_BYTES, BUFFERS = 5 << 28, 5
KEYS = ("load", "fragment_kib", "route", "direction")
BETTER = {"rate": "higher", "ratio": "higher", "slowdown": "lower"}
COLUMNS = (*KEYS, *BETTER, "raw_rate", "raw_slowdown", "wrong_bytes")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, one row a load, fragment size, route and direction, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    if not isinstance(device, CudaDevice):
        raise DeviceUnavailableError("this measurement needs a GPU")
    payload, seconds, rounds = (32 << 20, 0.05, 1) if quick else (512 << 20, 0.2, 6)
    rows = []
    raw = RawCopy(device, payload)
    notes: dict[str, Any] = {"raw_wrong_bytes": raw.wrong_bytes()}  # from here on its bytes are random
    for name in LOADS:
        loop = Loop(name, seconds)
        floor = {to_host: beside_copies(loop, rounds, raw, to_host=to_host) for to_host in (True, False)}
        for fragment_bytes in FRAGMENT_BYTES:
            for route in ROUTES:
                for row in _rows(device, loop, rounds, name, fragment_bytes, route, payload, floor):
                    progress(f"{name}, fragments of {fragment_bytes >> 10} KiB, {route}: {told(row)}")
                    rows.append(row)
    raw.close()
    notes |= {"payload_bytes": payload, "gpu_pool_size_bytes": STAGING_BYTES, "staging_buffers": BUFFERS}
    notes |= {"loop_seconds": seconds, "rounds": rounds}
    notes["unit"] = "GB/s of payload"
    return device.name, rows, notes


def told(row: dict[str, Any]) -> str:
    """A row while the others are still measured."""
    return f"{row['direction']} {row['ratio']:.3f} at {row['slowdown']:.3f}; {row['wrong_bytes']} bytes wrong"


def _rows(
    device: CudaDevice, loop: Loop, rounds: int, load: str, fragment_bytes: int, route: str, payload: int, floor: Any
) -> Iterator[dict[str, Any]]:
    staging = {"gpu_pool_size_bytes": STAGING_BYTES, "staging_buffers": BUFFERS}
    pages = Pages(device, fragment_bytes, payload, sets=3, transfer_route=route, beside_compute=True, **staging)
    wrong = pages.round_trip()
    source, target = pages.halves()
    known = pages.keys()
    moved(pages.engine.save_blocks(known, source))
    for direction in ("save", "load"):
        start = {
            "save": lambda: pages.engine.save_blocks(pages.keys(), source),
            "load": lambda: pages.engine.load_blocks(known, target),
        }[direction]
        flow = tickets(start)
        rate, slowdown = beside(loop, rounds, flow, flow.drain)
        raw_rate, raw_slowdown = floor[direction == "save"]
        row = {"load": load, "fragment_kib": fragment_bytes >> 10, "route": route, "direction": direction}
        row |= {"rate": rate, "ratio": rate / raw_rate, "slowdown": slowdown, "raw_rate": raw_rate}
        yield row | {"raw_slowdown": raw_slowdown, "wrong_bytes": wrong}
        if direction == "save":  # the saves have evicted them
            moved(pages.engine.save_blocks(known := pages.keys(), source))
    pages.close()


def beside(
    loop: Loop, rounds: int, move: Callable[[], int], finish: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """GB/s of ``move``, which gives the bytes that it has seen arrive, beside the loop; and what that costs the loop."""
    slowdowns, rates = [], []
    for _ in range(rounds):
        loop.start()
        while loop.running(Loop.BEFORE):
            time.sleep(_NAP_S)
        for _ in range(PRIMING):  # what counts is how it goes on
            move()
            loop.running(Loop.BESIDE)
        nbytes, began = 0, time.perf_counter()
        ended = began
        while loop.running(Loop.BESIDE):
            nbytes += move()
            ended = time.perf_counter()
        finish()
        if not loop.running(Loop.DRAIN):
            raise kvortex.TransferError("transfers did not end soon enough behind the computation that they were measured with")
        times = loop.seconds()
        slowdowns.append(2 * times[Loop.BESIDE] / (times[Loop.BEFORE] + times[Loop.AFTER]))
        rates.append(nbytes / (ended - began) / 1e9 if nbytes else 0.0)
    return statistics.median(rates), statistics.median(slowdowns)


def beside_copies(loop: Loop, rounds: int, raw: RawCopy, *, to_host: bool) -> tuple[float, float]:
    """:func:`beside` of contiguous DMAs, one behind the other without a gap."""
    raw.seconds(to_host=to_host)  # compiled now, and not beside the loop
    flow = copies(raw, to_host=to_host)
    return beside(loop, rounds, flow, flow.drain)


def draw(axes: Any, report: Report) -> None:
    """Share of a contiguous DMA against the loop's slowdown, a mark a row: filled for saves."""
    colours = dict(zip((4, 18, 32), ("#27608f", "#d0792a", "#5c8a3a"), strict=True))
    marks = dict(zip(LOADS, ("s", "^", "o"), strict=True))
    for row in report.rows:
        fill = "full" if row["direction"] == "save" else "none"
        axes.plot(row["slowdown"], row["ratio"], marks[row["load"]], color=colours[row["fragment_kib"]], fillstyle=fill)
    for kib, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=f"{kib} KiB")
    for load, mark in marks.items():
        axes.plot([], [], mark, color="black", label=load)
    axes.axhline(0.9, color="black", linewidth=0.6, linestyle=":")
    axes.axvline(1.03, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel("time of the computation, against its time alone")
    axes.set_ylabel("rate, against one contiguous DMA")
    axes.set_title(f"Blocks moving while the GPU computes, {report.device}", fontsize=10)
    axes.legend(fontsize=8, ncols=2)
