"""How long is the caller's thread busy when it starts a transfer of 1 GiB, by each route?

``wall``: from the call of ``save_blocks`` or ``load_blocks`` to its return. ``cpu``: what the thread computed meanwhile.
One transfer runs at a time; each is waited for before the next call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

import kvortex
from perf.pages import Pages, moved, routes_of
from perf.report import Report, progress

FRAGMENT_BYTES = (4 << 10, 32 << 10)
KEYS = ("fragment_kib", "route", "direction")
BETTER = {"wall_us": "lower", "wall_p90_us": "lower", "cpu_us": "lower"}
COLUMNS = (*KEYS, "wall_us", "wall_p90_us", "cpu_us", "wrong_bytes")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, one row a fragment size, route and direction, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    payload, rounds = (8 << 20, 3) if quick else (1 << 30, 15)
    rows = []
    for fragment_bytes in FRAGMENT_BYTES:
        for route in routes_of(device) if fragment_bytes == FRAGMENT_BYTES[-1] else ("auto",):
            progress(f"fragments of {fragment_bytes >> 10} KiB, {route}")
            pages = Pages(device, fragment_bytes, payload, transfer_route=route)
            try:
                wrong = pages.round_trip()
                found = _times(pages, rounds)
            finally:
                pages.close()
            names = {"fragment_kib": fragment_bytes >> 10, "route": route}
            rows += [names | {"direction": way} | _figures(times) | {"wrong_bytes": wrong} for way, times in found.items()]
    return device.name, rows, {"payload_bytes": payload, "rounds": rounds, "unit": "µs, medians"}


def _times(pages: Pages, rounds: int) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {"save": [], "load": []}
    for _ in range(rounds):
        keys = pages.keys()
        source, target = pages.halves()
        found["save"].append(_timed(lambda: pages.engine.save_blocks(keys, source)))  # noqa: B023
        found["load"].append(_timed(lambda: pages.engine.load_blocks(keys, target)))  # noqa: B023
    return found


def _timed(call: Callable[[], kvortex.Ticket]) -> tuple[float, float]:
    began, computed = time.perf_counter(), time.thread_time()
    ticket = call()
    times = time.perf_counter() - began, time.thread_time() - computed
    moved(ticket)
    return times


def _figures(times: list[tuple[float, float]]) -> dict[str, float]:
    wall, cpu = (np.array(column) * 1e6 for column in zip(*times, strict=True))
    return {
        "wall_us": float(np.median(wall)),
        "wall_p90_us": float(np.percentile(wall, 90)),
        "cpu_us": float(np.median(cpu)),
    }


def draw(axes: Any, report: Report) -> None:
    """Time of the call, a bar a row."""
    at = np.arange(len(report.rows))
    axes.barh(at + 0.2, [row["wall_us"] for row in report.rows], 0.38, label="wall", color="#27608f")
    axes.barh(at - 0.2, [row["cpu_us"] for row in report.rows], 0.38, label="cpu", color="#d0792a")
    axes.set_yticks(at, [f"{row['fragment_kib']} KiB, {row['route']}: {row['direction']}" for row in report.rows], fontsize=7)
    axes.axvline(100, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel(f"µs of the caller's thread for {report.notes['payload_bytes'] >> 20} MiB")
    axes.set_title(f"Starting a transfer, {report.device}", fontsize=10)
    axes.legend()
