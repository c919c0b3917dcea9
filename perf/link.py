"""What can the link do? One contiguous copy between VRAM and pinned memory at a time, by size.

``device``: between events right before and behind the copy. ``host``: from the call until the host has seen the end. Both
directions alternate; figures are medians, and bytes are verified at each size.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import kvortex
from perf.raw import RawCopy
from perf.report import Report, progress

SIZES = tuple(1 << shift for shift in range(16, 29))
KEYS = ("size_kib", "direction")
BETTER = {"rate": "higher", "device_us": "lower", "host_us": "lower"}
COLUMNS = (*KEYS, "rate", "device_us", "host_us", "wrong_bytes")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, one row a size and direction, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    sizes, rounds = (SIZES[:6], 3) if quick else (SIZES, 51)
    raw, rows = RawCopy(device, sizes[-1]), []
    try:
        for nbytes in sizes:
            progress(f"{nbytes >> 10} KiB")
            wrong = raw.wrong_bytes(nbytes)
            times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
            for _ in range(rounds):
                for to_host, found in times.items():
                    began = time.perf_counter()
                    seconds = raw.seconds(to_host=to_host, nbytes=nbytes)
                    found.append((seconds, time.perf_counter() - began))
            rows += [_row(nbytes, to_host, found, wrong) for to_host, found in times.items()]
    finally:
        raw.close()
    return device.name, rows, {"rounds": rounds, "unit": "GB/s, medians"}


def _row(nbytes: int, to_host: bool, times: list[tuple[float, float]], wrong: int) -> dict[str, Any]:
    device, host = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "size_kib": nbytes >> 10,
        "direction": "save" if to_host else "load",
        "rate": nbytes / device / 1e9,
        "device_us": device * 1e6,
        "host_us": host * 1e6,
        "wrong_bytes": wrong,
    }


def draw(axes: Any, report: Report) -> None:
    """Rate by size, and time by size on a second scale."""
    times = axes.twinx()
    for direction, colour in (("save", "#27608f"), ("load", "#d0792a")):
        rows = [row for row in report.rows if row["direction"] == direction]
        sizes = [row["size_kib"] for row in rows]
        axes.plot(sizes, [row["rate"] for row in rows], "o-", color=colour, label=direction)
        times.plot(sizes, [row["device_us"] for row in rows], ":", color=colour)
    axes.set_xscale("log", base=2)
    times.set_yscale("log")
    axes.set_ylim(0)
    axes.set_xlabel("KiB in one contiguous DMA")
    axes.set_ylabel("GB/s (lines)")
    times.set_ylabel("µs (dotted)")
    axes.set_title(f"The link, {report.device}", fontsize=10)
    axes.legend(loc="upper left")
