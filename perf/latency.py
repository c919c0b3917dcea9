"""How long does one block of 2 MiB take, from the call to the end, against one DMA of as many bytes?

``device``: between events before and after, on the GPU. ``host``: from the call until the host has seen the end, by polling.
For kvortex that is the whole public call, with its look-ups and checks in Python; for the DMA two calls of the driver.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy as np

import kvortex
from perf.pages import Pages, moved
from perf.raw import RawCopy
from perf.report import Report

FRAGMENT_BYTES = 32 << 10
_TIMES = ("device_us", "device_p99_us", "host_us", "host_p99_us")
COLUMNS = ("route", "direction", *_TIMES, "device_ratio", "host_ratio", "wrong_bytes")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, one row a route and direction, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    rounds = 20 if quick else 500
    routes = ("auto", "mapped", "strided", "staged", "resident") if device.name.startswith("cuda") else ("auto",)
    rows, nbytes = [], 64 * FRAGMENT_BYTES
    for route in routes:
        print(f"{route} …", file=sys.stderr, flush=True)
        pages, raw = Pages(device, FRAGMENT_BYTES, nbytes, transfer_route=route), RawCopy(device, nbytes)
        wrong = pages.round_trip()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("raw save", "save", "raw load", "load")}
        for _ in range(rounds):
            _once(pages, raw, times)
        pages.close()
        raw.close()
        rows += [_row(route, "raw " + way, times["raw " + way], times["raw " + way], 0) for way in ("save", "load")]
        rows += [_row(route, way, times[way], times["raw " + way], wrong) for way in ("save", "load")]
    return device.name, rows, {"nbytes": nbytes, "rounds": rounds, "fragment_bytes": FRAGMENT_BYTES}


def _once(pages: Pages, raw: RawCopy, times: dict[str, list[tuple[float, float]]]) -> None:
    source, target = pages.halves()
    keys = pages.keys()
    times["raw save"].append(_timed(lambda: raw.seconds(to_host=True)))
    times["save"].append(_timed(lambda: _seconds(pages.engine.save_blocks(keys, source))))
    times["raw load"].append(_timed(lambda: raw.seconds(to_host=False)))
    times["load"].append(_timed(lambda: _seconds(pages.engine.load_blocks(keys, target))))


def _seconds(ticket: kvortex.Ticket) -> float:
    return moved(ticket).seconds


def _timed(call: Any) -> tuple[float, float]:
    began = time.perf_counter()
    device = call()
    return device, time.perf_counter() - began


def _row(route: str, direction: str, times: Any, raw: Any, wrong: int) -> dict[str, Any]:
    device, host = (np.array(column) * 1e6 for column in zip(*times, strict=True))
    raw_device, raw_host = (statistics.median(column) * 1e6 for column in zip(*raw, strict=True))
    return {
        "route": route,
        "direction": direction,
        "device_us": float(np.median(device)),
        "device_p99_us": float(np.percentile(device, 99)),
        "host_us": float(np.median(host)),
        "host_p99_us": float(np.percentile(host, 99)),
        "device_ratio": float(np.median(device)) / raw_device,
        "host_ratio": float(np.median(host)) / raw_host,
        "wrong_bytes": wrong,
    }


def draw(axes: Any, report: Report) -> None:
    """Times on the device, and seen from the host."""
    rows = report.rows
    at = np.arange(len(rows))
    axes.barh(at + 0.2, [row["host_us"] for row in rows], 0.38, label="host", color="#d0792a")
    axes.barh(at - 0.2, [row["device_us"] for row in rows], 0.38, label="device", color="#27608f")
    axes.set_yticks(at, [f"{row['route']}: {row['direction']}" for row in rows])
    axes.set_xlabel("µs for one block of 2 MiB (median)")
    axes.legend()
