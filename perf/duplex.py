"""How fast do blocks move both ways at once, against two contiguous DMAs at once?

Saves and loads go on without a pause, two transfers of each direction in flight; raw copies go in the same way, and both
take turns. A rate is that of the transfers which ended while both directions ran. What was loaded, and what was saved last,
is verified afterwards. Other ways to move blocks run at one size, each direction in a thread of its own that waits for one
transfer before it starts the next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import kvortex
from kvortex.devices import Device
from perf.baselines import ALL, Baseline, open_baseline
from perf.flow import NothingMeasuredError, at_once, copies, medians, side_by_side, tickets
from perf.methods import Kvortex, Raw
from perf.pages import Pages, differing, moved
from perf.raw import RawCopy
from perf.report import Report, progress

FRAGMENT_BYTES = (4 << 10, 16 << 10, 18 << 10, 32 << 10, 128 << 10)
BASELINE_BYTES = (32 << 10,)
KEYS = ("fragment_kib", "method", "direction")
BETTER = {"rate": "higher", "ratio": "higher"}
COLUMNS = (*KEYS, "rate", "raw_rate", "ratio", "wrong_bytes")
Rates = dict[str, float]


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, one row a fragment size, method and direction, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    payload, seconds, rounds = (4 << 20, 0.05, 1) if quick else (512 << 20, 0.6, 3)
    methods: dict[str, str] = {
        Raw.name: "two contiguous DMAs in flight each way",
        Kvortex.name: "save_blocks and load_blocks of one engine, two tickets in flight each way",
    }
    rows: list[dict[str, Any]] = []
    raws: list[RawCopy] = []
    try:
        raws += [RawCopy(device, payload) for _ in range(2)]
        wrong = sum(raw.wrong_bytes() for raw in raws)
        for fragment_bytes in FRAGMENT_BYTES:
            progress(f"fragments of {fragment_bytes >> 10} KiB")
            rows += _one_size(device, raws, wrong, fragment_bytes, payload, seconds, rounds, methods)
    finally:
        for raw in raws:
            raw.close()
    notes = {"payload_bytes": payload, "window_seconds": seconds, "rounds": rounds, "unit": "GB/s of payload, medians"}
    return device.name, rows, notes | {"methods": methods}


def _one_size(
    device: Device,
    raws: list[RawCopy],
    raw_wrong: int,
    fragment_bytes: int,
    payload: int,
    seconds: float,
    rounds: int,
    notes: dict[str, str],
) -> list[dict[str, Any]]:
    # Of four sets of slots one is loaded, two are being saved, and one may be evicted.
    pages = Pages(device, fragment_bytes, payload, sets=4)
    try:
        floor, ours, wrong = _kvortex(pages, raws, seconds, rounds)
        row = partial(_rows, fragment_bytes >> 10, floor)
        rows = row(Raw.name, floor, raw_wrong) + row(Kvortex.name, ours, wrong)
        for kind in ALL if fragment_bytes in BASELINE_BYTES else ():
            if (found := _baseline(kind, pages, seconds, notes)) is not None:
                rows += row(kind.name, *found)
    finally:
        pages.close()
    return rows


def _kvortex(pages: Pages, raws: list[RawCopy], seconds: float, rounds: int) -> tuple[Rates, Rates, int]:
    """Rates of raw copies, and of the engine; wrong bytes."""
    before = pages.fill()
    source, target = pages.halves()
    known, last = pages.keys(), [pages.keys()]
    moved(pages.engine.save_blocks(known, source))

    def save() -> kvortex.Ticket:
        last[0] = pages.keys()
        return pages.engine.save_blocks(last[0], source)

    floors, found = [], []
    for _ in range(rounds):
        # Loads first, and all from one thread: with two of them in flight, what is loaded stays pinned and is not evicted.
        load = tickets(lambda: pages.engine.load_blocks(known, target))
        progress("  raw")
        floors.append(side_by_side({"load": copies(raws[1], to_host=False), "save": copies(raws[0], to_host=True)}, seconds))
        progress("  kvortex")
        found.append(side_by_side({"load": load, "save": tickets(save)}, seconds))
    progress("  bytes")
    wrong = pages.wrong_bytes(before, pages.memory.read(), source, target)
    noise = pages.fill()
    moved(pages.engine.load_blocks(last[0], target))
    wrong += pages.wrong_bytes(noise, pages.memory.read(), source, target, pages.view(before)[:, source])
    return medians(floors), medians(found), wrong


def _baseline(kind: type[Baseline], pages: Pages, seconds: float, notes: dict[str, str]) -> tuple[Rates, int] | None:
    """Rates of another method, each direction with memory and a stream of its own; wrong bytes. None where it cannot run."""
    pair: list[Baseline] = []
    try:
        for _ in range(2):
            baseline = open_baseline(kind, pages, notes)
            if baseline is None:
                return None
            pair.append(baseline)
        saver, loader = pair
        before, (source, target) = pages.fill(), pages.halves()
        old, records = pages.view(before), loader.records()
        np.invert(old[:, source], out=records)
        moves = {"save": _blocking(saver.save, source, saver), "load": _blocking(loader.load, target, loader)}
        try:
            rates = at_once(moves, seconds)
        except NothingMeasuredError as error:
            notes[kind.name] = f"not compared: {error}"
            return None
        wrong = differing(saver.records(), lambda at: old[at][source])
        wrong += pages.wrong_bytes(before, pages.memory.read(), source, target, records)
    finally:
        for baseline in pair:
            baseline.close()
    return rates, wrong


def _blocking(move: Callable[[Any], float], blocks: Any, method: Baseline) -> Callable[[], int]:
    def one() -> int:
        move(blocks)
        return method.nbytes

    return one


def _rows(fragment_kib: int, floor: Rates, method: str, rates: Rates, wrong: int) -> list[dict[str, Any]]:
    rows = []
    for way, ways in (("save", ["save"]), ("load", ["load"]), ("both", ["save", "load"])):
        rate, raw_rate = (sum(found[one] for one in ways) for found in (rates, floor))
        row = {"fragment_kib": fragment_kib, "method": method, "direction": way, "rate": rate, "raw_rate": raw_rate}
        rows.append(row | {"ratio": rate / raw_rate, "wrong_bytes": wrong})
    return rows


def draw(axes: Any, report: Report) -> None:
    """Rates of the engine, stacked save upon load, beside the raw ones; a mark for each other method."""
    sizes = list(dict.fromkeys(row["fragment_kib"] for row in report.rows))
    at = {size: position for position, size in enumerate(sizes)}
    for shift, method in ((-0.2, Raw.name), (0.2, Kvortex.name)):
        bottom = np.zeros(len(sizes))
        for way, colour in (("load", "#d0792a"), ("save", "#27608f")):
            rows = [row for row in report.rows if (row["method"], row["direction"]) == (method, way)]
            heights = np.array([row["rate"] for row in rows])
            look = {"color": colour, "alpha": 1 if shift > 0 else 0.5, "label": f"{method}: {way}"}
            axes.bar(np.arange(len(sizes)) + shift, heights, 0.38, bottom, **look)
            bottom += heights
    for mark, kind in zip("v^sD", ALL, strict=True):
        rows = [row for row in report.rows if (row["method"], row["direction"]) == (kind.name, "both")]
        if rows:
            places = [at[row["fragment_kib"]] for row in rows]
            axes.plot(places, [row["rate"] for row in rows], mark, color="black", label=kind.name)
    for row in report.rows:
        if (row["method"], row["direction"]) == (Kvortex.name, "both"):
            axes.text(at[row["fragment_kib"]] + 0.2, row["rate"], f"{row['ratio']:.2f}", ha="center", va="bottom", fontsize=9)
    axes.set_xticks(list(at.values()), [f"{size} KiB" for size in sizes])
    axes.set_ylim(0, 1.35 * max(row["rate"] for row in report.rows))
    axes.set_xlabel("fragment")
    axes.set_ylabel("GB/s both ways (above bars: share of raw)")
    axes.set_title(f"Saves and loads at once, {report.device}", fontsize=10)
    axes.legend(loc="upper right", ncols=3, fontsize=8)
