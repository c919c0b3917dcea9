"""How fast do blocks of small fragments cross the link, against one contiguous DMA of as many bytes?

A block is 32 layers of K and V, so 64 fragments. As many blocks as make the payload are saved from, and loaded to,
pages drawn at random from twice as many. Raw copies and transfers alternate; figures are medians of device-timed runs;
every byte is verified after the first and the last round.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy as np

import kvortex
from kvortex.devices import Device
from perf.pages import LAYERS, Pages, moved
from perf.raw import RawCopy
from perf.report import Report

FRAGMENT_BYTES = (4 << 10, 16 << 10, 18 << 10, 32 << 10, 128 << 10)
_RATES = ("raw_save", "save", "save_ratio", "raw_load", "load", "load_ratio")
COLUMNS = ("fragment_kib", "blocks", *_RATES, "submit_us", "wrong_bytes")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, one row a fragment size, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    payload, rounds = (8 << 20, 2) if quick else (512 << 20, 9)
    raw = RawCopy(device, payload)
    rows = []
    try:
        for fragment_bytes in FRAGMENT_BYTES:
            print(f"fragments of {fragment_bytes >> 10} KiB …", file=sys.stderr, flush=True)
            rows.append(_one_size(device, raw, fragment_bytes, payload, rounds))
    finally:
        raw.close()
    notes = {"payload_bytes": payload, "rounds": rounds, "fragments_per_block": 2 * LAYERS, "unit": "GB/s of payload, medians"}
    return device.name, rows, notes


def _one_size(device: Device, raw: RawCopy, fragment_bytes: int, payload: int, rounds: int) -> dict[str, Any]:
    pages = Pages(device, fragment_bytes, payload)
    times: dict[str, list[float]] = {name: [] for name in ("raw_save", "save", "raw_load", "load", "submit")}
    wrong = 0
    try:
        for turn in range(rounds):
            verify = turn in (0, rounds - 1)
            source, target = pages.halves()
            if verify:
                before = pages.fill()
            keys = pages.keys()
            raw_save = raw.seconds(to_host=True)
            began = time.perf_counter()
            save = pages.engine.save_blocks(keys, source)
            submitted = time.perf_counter() - began
            moved(save)
            raw_load = raw.seconds(to_host=False)
            load = moved(pages.engine.load_blocks(keys, target))
            if verify:
                wrong += pages.wrong_bytes(before, pages.memory.read(), source, target)
            if turn:  # the first round pays for page tables and clocks
                for name, value in zip(times, (raw_save, save.seconds, raw_load, load.seconds, submitted), strict=True):
                    times[name].append(value)
    finally:
        pages.close()
    median = {name: statistics.median(t) for name, t in times.items()}
    return _row(fragment_bytes, pages.count, raw.nbytes, pages.moved, median, wrong)


def _row(fragment_bytes: int, count: int, raw_bytes: int, moved: int, median: dict[str, float], wrong: int) -> dict[str, Any]:
    rate = {name: (raw_bytes if name.startswith("raw") else moved) / seconds / 1e9 for name, seconds in median.items()}
    return {
        "fragment_kib": fragment_bytes >> 10,
        "fragment_bytes": fragment_bytes,
        "blocks": count,
        "moved_bytes": moved,
        "raw_save": rate["raw_save"],
        "save": rate["save"],
        "save_ratio": rate["save"] / rate["raw_save"],
        "raw_load": rate["raw_load"],
        "load": rate["load"],
        "load_ratio": rate["load"] / rate["raw_load"],
        "submit_us": median["submit"] * 1e6,
        "wrong_bytes": wrong,
    }


def draw(axes: Any, report: Report) -> None:
    """Share of a raw DMA by fragment size, both ways."""
    at = np.arange(len(report.rows))
    for shift, name, colour in ((-0.2, "save", "#27608f"), (0.2, "load", "#d0792a")):
        heights = [row[f"{name}_ratio"] for row in report.rows]
        bars = axes.bar(at + shift, heights, 0.38, label=name, color=colour)
        axes.bar_label(bars, [f"{row[name]:.1f}" for row in report.rows], label_type="center", color="white", fontsize=9)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(at, [f"{row['fragment_kib']} KiB" for row in report.rows])
    axes.set_ylim(0, 1.2 * max(1.0, *(max(row["save_ratio"], row["load_ratio"]) for row in report.rows)))
    axes.set_xlabel("fragment")
    axes.set_ylabel("share of one contiguous DMA (in bars: GB/s)")
    name = report.environment["device"].get("gpu", "host device")
    axes.set_title(f"Paged blocks between device and pinned RAM, {name}", fontsize=10)
    axes.legend(loc="upper right", ncols=2)
