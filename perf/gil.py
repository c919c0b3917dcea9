"""What do Python threads that fight for the GIL cost transfers, and what do transfers cost such a thread?

Transfers run with nothing beside them, and beside eight threads that count in plain Python; both take turns. ``rate`` is by
the device's own events, ``ms`` what the caller waited, from the call until it saw the end. The other way round, one thread
counts alone, and while transfers run one after another: ``spin_ratio``. The host device has no such events; there its threads
tell the time, and they need the GIL too.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import kvortex
from kvortex.devices import Device
from perf.baselines import open_baselines
from perf.methods import Kvortex, Method, Raw
from perf.pages import Ids, Pages
from perf.raw import RawCopy
from perf.report import Report, progress

FRAGMENT_BYTES = (4 << 10, 32 << 10)
SPINNERS = 8
KEYS = ("fragment_kib", "method", "direction")
BETTER = {"rate_idle": "higher", "rate_busy": "higher", "ratio": "higher", "ms_idle": "lower", "ms_busy": "lower"} | {
    "spin_ratio": "higher"
}
COLUMNS = (*KEYS, *BETTER, "wrong_bytes")


class Spinners:
    """Threads that count in plain Python as long as the context lasts."""

    def __init__(self, count: int) -> None:
        self._counts = [0] * count
        self._stop = False
        self._threads = [threading.Thread(target=self._spin, args=(at,), name=f"spin-{at}") for at in range(count)]

    def _spin(self, at: int) -> None:
        counts = self._counts
        while not self._stop:
            counts[at] += 1

    def total(self) -> int:
        """What all threads have counted up to."""
        return sum(self._counts)

    def delay(self) -> float:
        """Seconds for which the first thread could have run and waited for a CPU, as the kernel tells; 0 where it does not."""
        try:
            return int(Path(f"/proc/self/task/{self._threads[0].native_id}/schedstat").read_text().split()[1]) * 1e-9
        except (OSError, ValueError, IndexError):
            return 0.0

    def computed(self) -> float:
        """Seconds for which the first thread had a CPU."""
        return time.clock_gettime(time.pthread_getcpuclockid(self._threads[0].ident or 0))

    def __enter__(self) -> Spinners:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, one row a fragment size, method and direction, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    payload, seconds, rounds = (4 << 20, 0.02, 1) if quick else (512 << 20, 0.2, 3)
    methods: dict[str, str] = {Raw.name: Raw.how, Kvortex.name: Kvortex.how}
    raw, rows = Raw(RawCopy(device, payload)), []
    try:
        for fragment_bytes in FRAGMENT_BYTES[-1:] if quick else FRAGMENT_BYTES:
            rows += _one_size(device, raw, fragment_bytes, payload, seconds, rounds, methods)
    finally:
        raw.close()
    notes = {"payload_bytes": payload, "rounds": rounds, "rounds_of_others": 1, "spinning_threads": SPINNERS}
    notes["unit"] = "GB/s of payload, medians"
    return device.name, rows, notes | {"methods": methods}


def _one_size(
    device: Device, raw: Raw, fragment_bytes: int, payload: int, seconds: float, rounds: int, notes: dict[str, str]
) -> list[dict[str, Any]]:
    pages = Pages(device, fragment_bytes, payload)
    baselines: list[Any] = []
    rows = []
    try:
        if fragment_bytes == FRAGMENT_BYTES[-1]:  # copies of short fragments one by one take minutes beside spinning threads
            baselines += open_baselines(pages, notes)
        methods: list[Method] = [raw, Kvortex(pages), *baselines]
        for method in methods:
            progress(f"fragments of {fragment_bytes >> 10} KiB, {method.name}")
            wrong = method.check()
            source, target = pages.halves()
            method.save(source)  # a load needs something
            for way, move, blocks in (("save", method.save, source), ("load", method.load, target)):
                names = {"fragment_kib": fragment_bytes >> 10, "method": method.name, "direction": way}
                often = rounds if method in methods[:2] else 1  # what others do takes long beside spinning threads
                figures = _beside(move, blocks, method.nbytes, often)
                figures["spin_ratio"] = statistics.median(_spin_ratio(move, blocks, seconds) for _ in range(often))
                rows.append(names | figures | {"wrong_bytes": wrong})
    finally:
        for baseline in baselines:
            baseline.close()
        pages.close()
    return rows


def _beside(move: Callable[[Ids], float], blocks: Ids, nbytes: int, rounds: int) -> dict[str, float]:
    """Rates and waits with nothing beside the transfers, and beside spinning threads."""
    found: dict[str, list[float]] = {"idle": [], "busy": [], "ms_idle": [], "ms_busy": []}
    for _ in range(rounds):
        for name, count in (("idle", 0), ("busy", SPINNERS)):
            with Spinners(count):
                for _ in range(2):  # a thread that was just woken has the GIL for a while
                    began = time.perf_counter()
                    device = move(blocks)
                    found[f"ms_{name}"].append((time.perf_counter() - began) * 1e3)
                    found[name].append(device)
    median = {name: statistics.median(values) for name, values in found.items()}
    idle, busy = (nbytes / median[name] / 1e9 for name in ("idle", "busy"))
    waits = {name: median[name] for name in ("ms_idle", "ms_busy")}
    return {"rate_idle": idle, "rate_busy": busy, "ratio": busy / idle} | waits


def _spin_ratio(move: Callable[[Ids], float], blocks: Ids, seconds: float) -> float:
    """How fast one thread counts while transfers run one after another, against alone."""
    with Spinners(1) as spinner:
        alone = _counted(spinner, lambda: time.sleep(seconds))

        def transfers() -> None:
            ends = time.perf_counter() + seconds
            while time.perf_counter() < ends:
                move(blocks)

        return _counted(spinner, transfers) / alone


def _counted(spinner: Spinners, work: Callable[[], None]) -> float:
    """Counts a second while ``work`` is done."""
    before, began = spinner.total(), time.perf_counter()
    work()
    return (spinner.total() - before) / (time.perf_counter() - began)


def draw(axes: Any, report: Report) -> None:
    """Rates of transfers beside spinning threads, and of a spinning thread beside transfers."""
    rows = report.rows
    at = np.arange(len(rows))
    axes.barh(at + 0.2, [row["ratio"] for row in rows], 0.38, label="transfers, beside 8 spinning threads", color="#27608f")
    axes.barh(at - 0.2, [row["spin_ratio"] for row in rows], 0.38, label="a spinning thread, beside transfers", color="#d0792a")
    axes.set_yticks(at, [f"{row['fragment_kib']} KiB, {row['method']}: {row['direction']}" for row in rows], fontsize=7)
    axes.axvline(0.9, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel("rate, against that alone (transfers: by the device's events)")
    axes.set_title(f"Transfers and the GIL, {report.device}", fontsize=10)
    axes.legend(fontsize=8)
