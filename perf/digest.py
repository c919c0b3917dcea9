"""What do digests cost, and does a flipped bit ever pass?

``transfer``: two engines over the same pages, one with digests and one without, take turns at transfers that are each waited
for; GB/s by the device's clock, and the ratio is the median of turns. ``host``: the CPU's digests on one thread, beside
hashlib's BLAKE2b, and copies with digests beside copies. ``flips``: bits flipped one a record, at random, in pinned RAM
between save and load, and in a staging buffer in VRAM between gather and scatter; the ratio is the share that was seen.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import kvortex
from kvortex.devices import Device
from kvortex.devices.cuda import CudaDevice
from kvortex.devices.native import memcpy_address
from kvortex.digests import digest_records
from kvortex.digests.host import numbers
from kvortex.transfer.copies import copy_buffers
from perf.flips import in_pinned_ram, in_staging
from perf.pages import Pages, moved, routes_of
from perf.report import Report, progress

FRAGMENT_BYTES = (4 << 10, 18 << 10, 32 << 10, 128 << 10)
LEAST_BY_DMA = 16 << 10  # below it, DMAs of single fragments or lines are too slow to be compared
KEYS = ("measure", "fragment_kib", "route", "direction")
BETTER = {"without": "higher", "with": "higher", "ratio": "higher"}
COLUMNS = (*KEYS, *BETTER, "tries", "seen", "wrong_bytes")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, the rows, and what they have in common."""
    device = kvortex.open_device(device_name)
    payload, rounds, tries = (8 << 20, 3, 100) if quick else (512 << 20, 11, 10_000)
    rows: list[dict[str, Any]] = []
    for fragment_bytes in FRAGMENT_BYTES[:: 3 if quick else 1]:
        for route in routes_of(device):
            if fragment_bytes >= LEAST_BY_DMA or route not in ("strided", "batched"):
                progress(f"fragments of {fragment_bytes >> 10} KiB, {route}")
                rows += _transfers(device, fragment_bytes, payload, route, rounds)
    progress("the host's digests")
    rows += _host(4 << 20 if quick else 256 << 20, rounds)
    for route in routes_of(device):
        progress(f"bits in pinned RAM, {route}")
        rows.append(_flips(device, route, tries))
    if isinstance(device, CudaDevice):
        progress("bits in staging")
        rows.append(_row("flips", 8, "staging", "load", 0.0, 0.0, in_staging(device, tries) / tries, tries=tries))
    return device.name, rows, {"payload_bytes": payload, "rounds": rounds, "unit": "GB/s of payload"}


def _row(
    measure: str, kib: int, route: str, way: str, without: float, with_: float, ratio: float, *, wrong: int = 0, tries: int = 0
) -> dict[str, Any]:
    row = {"measure": measure, "fragment_kib": kib, "route": route, "direction": way, "without": without, "with": with_}
    return row | {"ratio": ratio, "tries": tries, "seen": round(tries * ratio), "wrong_bytes": wrong}


def _transfers(device: Device, fragment_bytes: int, payload: int, route: str, rounds: int) -> list[dict[str, Any]]:
    pages = Pages(device, fragment_bytes, payload, transfer_route=route, digests=False)
    plain = pages.engine
    try:
        with kvortex.KVortexEngine.create(_with_digests(plain.config), pages.layout) as digesting:
            digesting.wait_ready()
            wrong = 0
            for pages.engine in (plain, digesting):
                wrong += pages.round_trip()
            found = [_turn(pages, plain, digesting, at % 2 > 0) for at in range(rounds + 1)][1:]  # the first pays for clocks
            pages.engine = digesting
            wrong += pages.round_trip()
    finally:
        pages.engine = plain
        pages.close()
    rows = []
    for way in ("save", "load"):
        without, with_ = ([turn[way, digests] for turn in found] for digests in (False, True))
        ratio = statistics.median(a / b for a, b in zip(without, with_, strict=True))
        rates = (pages.moved / statistics.median(times) / 1e9 for times in (without, with_))
        rows.append(_row("transfer", fragment_bytes >> 10, route, way, *rates, ratio, wrong=wrong))
    return rows


def _with_digests(config: kvortex.KVortexConfig) -> kvortex.KVortexConfig:
    return kvortex.KVortexConfig(**{**vars(config), "digests": True})


def _turn(
    pages: Pages, plain: kvortex.KVortexEngine, digesting: kvortex.KVortexEngine, swapped: bool
) -> dict[tuple[str, bool], float]:
    """Seconds of the device, by direction and whether with digests."""
    keys = pages.keys()
    source, target = pages.halves()
    pair = [(False, plain), (True, digesting)]
    seconds = {}
    for digests, engine in pair[::-1] if swapped else pair:
        seconds["save", digests] = moved(engine.save_blocks(keys, source)).seconds
        seconds["load", digests] = moved(engine.load_blocks(keys, target)).seconds
    return seconds


def _host(nbytes: int, rounds: int) -> list[dict[str, Any]]:
    """One thread, records of 2 MiB."""
    size = min(nbytes, 2 << 20)
    data, copy = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    at, sizes = data.ctypes.data + np.arange(0, nbytes, size), np.full(nbytes // size, size)
    records, sums = copy.ctypes.data + np.arange(0, nbytes, size), np.zeros((len(sizes), 2), np.uint64)
    out, fixed = np.empty((len(sizes), 16), np.uint8), numbers(size)
    hashed = memoryview(data)[: min(nbytes, 16 << 20)]

    def copied(sums: Any) -> Callable[[], None]:
        return lambda: copy_buffers(memcpy_address(), at, sizes, records, sums, True, fixed)

    blake = len(hashed) / _best(lambda: hashlib.blake2b(hashed).digest(), rounds) / 1e9
    own = nbytes / _best(lambda: digest_records(at, sizes, out), rounds) / 1e9
    plain, digesting = (nbytes / _best(copied(each), rounds) / 1e9 for each in (sums[:0], sums))
    return [
        _row("host, beside BLAKE2b", size >> 10, "digest", "-", blake, own, own / blake),
        _row("host, beside memcpy", size >> 10, "copy", "-", plain, digesting, digesting / plain),
    ]


def _best(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of the thread."""
    times = []
    for _ in range(rounds + 1):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return statistics.median(times[1:])


def _flips(device: Device, route: str, tries: int) -> dict[str, Any]:
    pages = Pages(device, 4096, 32 << 20, transfer_route=route)
    try:
        seen = in_pinned_ram(pages, tries)
    finally:
        pages.close()
    return _row("flips", 4, f"pinned RAM, {route}", "load", 0.0, 0.0, seen / tries, tries=tries)


def draw(axes: Any, report: Report) -> None:
    """Ratio with and without digests, a bar a transfer."""
    rows = [row for row in report.rows if row["measure"] == "transfer"]
    at = np.arange(len(rows))
    colours = ["#27608f" if row["direction"] == "save" else "#d0792a" for row in rows]
    axes.barh(at, [row["ratio"] for row in rows], 0.7, color=colours)
    axes.set_yticks(at, [f"{row['fragment_kib']} KiB, {row['route']}: {row['direction']}" for row in rows], fontsize=6)
    axes.axvline(0.98, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, max(1.1, *(row["ratio"] for row in rows)))
    flips = [row for row in report.rows if row["measure"] == "flips"]
    seen, tries = (sum(row[name] for row in flips) for name in ("seen", "tries"))
    axes.set_xlabel(f"rate with digests over rate without; {seen} of {tries} flipped bits seen")
    axes.set_title(f"Digests while blocks move, {report.device}", fontsize=10)
