"""How long does one block of 2 MiB take, from the call to the end, against one DMA of as many bytes?

``device``: between events before and after, on the GPU. ``host``: from the call until the host has seen the end, by polling.
For kvortex that is the whole public call, with its look-ups and checks in Python; for the DMA one compiled call, with nothing
between its events but the copy, and the wait.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import kvortex
from perf.baselines import open_baselines
from perf.methods import Kvortex, Method, Raw
from perf.pages import Pages, routes_of
from perf.raw import RawCopy
from perf.report import Report, progress

FRAGMENT_BYTES = 32 << 10
KEYS = ("route", "direction")
_TIMES = ("device_us", "device_p99_us", "host_us", "host_p99_us")
BETTER = dict.fromkeys((*_TIMES, "device_ratio", "host_ratio"), "lower")
COLUMNS = (*KEYS, *BETTER, "wrong_bytes")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, one row a route and direction, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    rounds = 20 if quick else 500
    rows, nbytes = [], 64 * FRAGMENT_BYTES
    methods: dict[str, str] = {Raw.name: Raw.how, Kvortex.name: Kvortex.how}
    raw = Raw(RawCopy(device, nbytes))
    try:
        for route in routes_of(device):
            progress(route)
            pages = Pages(device, FRAGMENT_BYTES, nbytes, transfer_route=route)
            try:
                rows += _rows(route, raw, Kvortex(pages), pages, rounds)
            finally:
                pages.close()
        pages = Pages(device, FRAGMENT_BYTES, nbytes)
        baselines = []
        try:
            baselines += open_baselines(pages, methods)
            for baseline in baselines:
                progress(baseline.name)
                rows += _rows(baseline.name, raw, baseline, pages, rounds)
        finally:
            for baseline in baselines:
                baseline.close()
            pages.close()
    finally:
        raw.close()
    return device.name, rows, {"nbytes": nbytes, "rounds": rounds, "fragment_bytes": FRAGMENT_BYTES, "methods": methods}


def _rows(name: str, raw: Raw, method: Method, pages: Pages, rounds: int) -> list[dict[str, Any]]:
    wrong = {raw.name: raw.check(), method.name: method.check()}
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        source, target = pages.halves()
        for one in (raw, method):
            times.setdefault(f"{one.name} save", []).append(_timed(lambda: one.save(source)))  # noqa: B023
            times.setdefault(f"{one.name} load", []).append(_timed(lambda: one.load(target)))  # noqa: B023
    rows = []
    for one in (raw, method):
        for way in ("save", "load"):
            direction = f"raw {way}" if one is raw else way
            rows.append(_row(name, direction, times[f"{one.name} {way}"], times[f"{raw.name} {way}"], wrong[one.name]))
    return rows


def _timed(call: Callable[[], float]) -> tuple[float, float]:
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
