"""How fast do blocks of small fragments cross the link, against one contiguous DMA of as many bytes, and other ways?

A block is 32 layers of K and V, so 64 fragments. As many blocks as make the payload are saved from, and loaded to,
pages drawn at random from twice as many. All methods take turns on the same pages; the slower ones every other time.
Figures are medians of device-timed runs. Every byte of every method is verified before the timed rounds, and those of
kvortex behind them too.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

import kvortex
from kvortex.devices import Device
from perf.baselines import open_baselines
from perf.methods import Kvortex, Method, Raw
from perf.pages import LAYERS, Pages
from perf.raw import RawCopy
from perf.report import Report, progress

FRAGMENT_BYTES = (4 << 10, 16 << 10, 18 << 10, 32 << 10, 128 << 10)
KEYS = ("fragment_kib", "method")
BETTER = {"save": "higher", "save_ratio": "higher", "load": "higher", "load_ratio": "higher"}
COLUMNS = (*KEYS, "blocks", *BETTER, "wrong_bytes")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, one row a fragment size and method, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    payload, rounds = (8 << 20, 2) if quick else (512 << 20, 8)
    notes = {"payload_bytes": payload, "rounds": rounds, "fragments_per_block": 2 * LAYERS, "unit": "GB/s of payload, medians"}
    methods: dict[str, str] = {Raw.name: Raw.how, Kvortex.name: Kvortex.how}
    raw, rows = Raw(RawCopy(device, payload)), []
    try:
        wrong = raw.check()
        for fragment_bytes in FRAGMENT_BYTES:
            progress(f"fragments of {fragment_bytes >> 10} KiB")
            rows += _one_size(device, raw, wrong, fragment_bytes, payload, rounds, methods)
    finally:
        raw.close()
    return device.name, rows, notes | {"methods": methods}


def _one_size(
    device: Device, raw: Raw, raw_wrong: int, fragment_bytes: int, payload: int, rounds: int, notes: dict[str, str]
) -> list[dict[str, Any]]:
    pages = Pages(device, fragment_bytes, payload)
    baselines: list[Any] = []
    try:
        baselines += open_baselines(pages, notes)
        kvortex_itself = Kvortex(pages)
        methods: list[Method] = [raw, kvortex_itself, *baselines]
        wrong = {method.name: method.check() for method in methods[1:]} | {raw.name: raw_wrong}
        times = _times(methods, len(baselines), pages, rounds)
        wrong[Kvortex.name] += kvortex_itself.check()
    finally:
        for baseline in baselines:
            baseline.close()
        pages.close()
    floor = times[raw.name]
    names = {"fragment_kib": fragment_bytes >> 10, "fragment_bytes": fragment_bytes, "blocks": pages.count}
    rows = []
    for method in methods:
        row = names | {"method": method.name, "moved_bytes": method.nbytes, "wrong_bytes": wrong[method.name]}
        for way, seconds in times[method.name].items():
            row[way] = method.nbytes / seconds / 1e9
            row[f"{way}_ratio"] = row[way] / (raw.nbytes / floor[way] / 1e9)
        rows.append(row)
    return rows


def _times(methods: list[Method], n_slow: int, pages: Pages, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each method and direction; the last ``n_slow`` methods run every other time."""
    found: dict[str, dict[str, list[float]]] = {method.name: {"save": [], "load": []} for method in methods}
    for turn in range(rounds + 1):
        for method in methods[: len(methods) - n_slow * (turn % 2)]:
            source, target = pages.halves()
            save, load = method.save(source), method.load(target)
            if turn:  # the first round pays for clocks
                found[method.name]["save"].append(save)
                found[method.name]["load"].append(load)
    return {name: {way: statistics.median(seconds) for way, seconds in ways.items()} for name, ways in found.items()}


def draw(axes: Any, report: Report) -> None:
    """Share of a raw DMA by fragment size and method, both ways."""
    methods = [name for name in dict.fromkeys(row["method"] for row in report.rows) if name != Raw.name]
    sizes = list(dict.fromkeys(row["fragment_kib"] for row in report.rows))
    colours = ("#27608f", "#d0792a", "#5c8a3a", "#8a5ca0", "#777777")
    width = 0.84 / (2 * len(methods))
    for index, method in enumerate(methods):
        rows = [row for row in report.rows if row["method"] == method]
        for half, way in enumerate(("save", "load")):
            at = np.arange(len(sizes)) - 0.42 + (2 * index + half + 0.5) * width
            heights = [row[f"{way}_ratio"] for row in rows]
            label = method if way == "save" else None
            axes.bar(at, heights, width, color=colours[index % len(colours)], alpha=1 if way == "save" else 0.6, label=label)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(np.arange(len(sizes)), [f"{size} KiB" for size in sizes])
    axes.set_ylim(0, 1.25 * max(1.0, *(row[f"{way}_ratio"] for row in report.rows for way in ("save", "load"))))
    axes.set_xlabel("fragment")
    axes.set_ylabel("share of one contiguous DMA (full: save, pale: load)")
    axes.set_title(f"Paged blocks between device and pinned RAM, {report.device}", fontsize=10)
    axes.legend(loc="upper right", ncols=3, fontsize=8)
