"""How fast do coded blocks cross the link, in bytes of what they were, beside one contiguous DMA of as many bytes?

Pages have Llama-3-8B's shape (32 layers, 8 heads of 128, blocks of 16 tokens: 2 MiB) and hold the numbers of ``perf plane``, in
each block others. Engines save blocks from pages drawn at random and load them into others; a row for each codec that has a way
on this device, and for each size of the staging buffers of both directions together, 0 for what the engine takes by itself.
``save`` and ``load``: GB/s of original bytes, medians of device-timed calls; raw DMAs and all engines take turns. ``bar``: what
both ratios to one DMA are to reach. ``ratio``: bytes of pages to bytes that the records use; ``slot``: what a slot reserves of
them. ``wrong_bytes``: every byte of the pages, behind the timed calls, or with a codec with loss those of a few blocks, against
what the codec's own calls make of them; and the slots of these blocks, against the records of those calls.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from typing import Any

import numpy as np

import kvortex
from kvortex.devices.cuda import CudaDevice
from perf.coded_pages import SHAPE, Coded, Pages, engines
from perf.pages import WAYS
from perf.raw import RawCopy
from perf.report import Report, progress

STAGING_MIB = (0, 256)
BARS = {"plane": 1.40, "int8": 1.75, "k6v4": 2.6, "k4v4": 3.0, "k4v3": 3.3}
KEYS = ("codec", "staging_mib")
BETTER = {"save": "higher", "save_ratio": "higher", "load": "higher", "load_ratio": "higher"}
COLUMNS = (*KEYS, "blocks", "ratio", "slot", *BETTER, "bar", "wrong_bytes")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, a row for each codec and size of buffers, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    on_gpu = isinstance(device, CudaDevice)
    blocks, rounds = (4, 2) if quick else (512, 11) if on_gpu else (32, 5)
    progress(f"{blocks} blocks of {SHAPE.raw_bytes >> 20} MiB")
    found: list[Coded] = []
    notes: dict[str, Any] = {"blocks": blocks, "block_bytes": SHAPE.raw_bytes, "rounds": rounds}
    notes["unit"] = "GB/s of original bytes, medians"
    with contextlib.ExitStack() as stack:
        pages = Pages(device, blocks, stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(pages.close)
        raw = RawCopy(device, blocks * SHAPE.raw_bytes)
        stack.callback(raw.close)
        wrong = raw.wrong_bytes(min(raw.nbytes, 64 << 20))
        for staging in STAGING_MIB if on_gpu else (0,):
            for one in engines(pages, staging, notes):
                stack.callback(one.engine.shutdown)
                found.append(one)
        floor: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(rounds + 1):
            for one in found:
                one.turn(keep=turn > 0)
            for way, seconds in floor.items():
                seconds.append(raw.seconds(to_host=way == "save"))
        rates = {way: raw.nbytes / statistics.median(seconds[1:]) / 1e9 for way, seconds in floor.items()}
        ratios = {f"{way}_ratio": 1.0 for way in rates}
        rows = [{"codec": "one DMA", "staging_mib": 0, "blocks": blocks, "ratio": 1.0, "slot": 1.0, **rates, **ratios}]
        rows[0] |= {"bar": 1.0, "wrong_bytes": wrong}
        for one in found:
            progress(f"checks {one.name}, {one.staging} MiB")
            rows.append(_row(one, rates))
    return device.name, rows, notes


def _row(one: Coded, floor: dict[str, float]) -> dict[str, Any]:
    row = one.facts() | {"bar": BARS.get(one.name, 1.0)}
    for way in WAYS:
        row[way] = one.rate(way)
        row[f"{way}_ratio"] = row[way] / floor[way]
        row[f"{way}_best_ratio"] = one.rate(way, best=True) / floor[way]
    return row


def draw(axes: Any, report: Report) -> None:
    """Bars for each codec, the best of its buffers, and what they are to reach."""
    names = list(dict.fromkeys(row["codec"] for row in report.rows))
    for shift, way, colour in ((-0.2, "save", "#27608f"), (0.2, "load", "#d0792a")):
        rates = [max(row[way] for row in report.rows if row["codec"] == name) for name in names]
        axes.bar(np.arange(len(names)) + shift, rates, 0.4, color=colour, label=way)
        wanted = [rates[0] * BARS.get(name, np.nan) for name in names]
        axes.hlines(wanted, np.arange(len(names)) + shift - 0.2, np.arange(len(names)) + shift + 0.2, color="black", lw=0.8)
        for at, rate in enumerate(rates):
            axes.annotate(f"{rate / rates[0]:.2f}x", (at + shift, rate), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("GB/s of original bytes")
    axes.set_title(f"Coded blocks across the link, {report.device}", fontsize=10)
    axes.legend()
