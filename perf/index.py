"""How long does the index take, against dicts under a lock; with more entries; with more threads; and beside Python threads?

Keys are random, resident blocks are asked for in random order, and were last used in random order, so nothing is near
anything else. No device is needed. Rows of each ``what``:

- ``against dict``: a batch of each operation, by turns with ``perf/baselines/dictionary.py``, which is given ``bytes`` that are
  made already. Every policy is compared with the same dicts, which do LRU.
- ``entries``: the same from few entries to many, beside what random memory of the same size costs by itself: a load that
  waits for the one before (``chase_ns``) and one that does not (``gather_ns``), see ``perf/walks.py``. ``other_ms`` is what
  the lines of memory that an operation cannot do without would cost one after the other: two for a look-up (bucket, slot),
  four for reserve + commit with eviction (the key's bucket, the victim's line and bucket, its neighbour in the order).
- ``threads``: look-ups by 8 threads at once; ``other_ms`` is one thread's time for a batch, ``ratio`` the gain of all together.
- ``spin``: how fast a Python thread counts while another calls the index without a pause; ``ratio`` is to its rate alone.

The last two have rows of ``arithmetic`` that touches neither memory nor the GIL, measured by turns with the others: what other
programs left of the processor's cores meanwhile. Medians are over the third of all rounds in which that was most.

``wrong_bytes`` counts wrong answers.
"""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import kvortex
from kvortex.index import NEW, POLICIES, BlockIndex, load_compiled
from perf.baselines.dictionary import DictIndex
from perf.gil import Spinners
from perf.report import Report, progress
from perf.walks import Walks, reckon

BATCH = 8192
ENTRIES = 1_000_000
CURVE = (10_000, 30_000, 100_000, 300_000, 1_000_000, 2_000_000, 4_000_000)
THREADS = 8
MISSES = {"lookup": 2, "reserve+commit": 4}
KEYS = ("what", "operation", "policy", "entries", "batch", "threads")
BETTER = {"ms": "lower", "ratio": "higher"}
COLUMNS = (*KEYS, "ms", "ns_per_key", "other_ms", "ratio", "gather_ns", "chase_ns", "wrong_bytes")

KeyArray = npt.NDArray[np.uint8]


class Filled:
    """An index, and dicts if they are wanted, full of random keys that were last used in random order.

    ``wrong`` counts answers that are not what they must be.
    """

    def __init__(self, entries: int, policy: str, batch: int, *, dicts: bool) -> None:
        self.rng, self.batch, self.wrong = np.random.default_rng(entries), batch, 0
        self.index = BlockIndex(entries, policy)
        self.dicts = DictIndex(entries) if dicts else None
        self.keys = self._random(entries)
        for start in range(0, entries, batch):
            self.store(self.keys[start : start + batch])
        order = self.rng.permutation(entries)
        for start in range(0, entries, batch):
            self.use(self.keys[order[start : start + batch]])

    def _random(self, count: int) -> KeyArray:
        return self.rng.integers(-(2**63), 2**63, (count, 4), dtype=np.int64).view(np.uint8).reshape(-1, 32)

    def store(self, keys: KeyArray) -> None:
        self.index.commit(self.index.reserve(keys).slots)
        if self.dicts is not None:
            self.dicts.commit(self.dicts.reserve(as_bytes(keys), 0)[0])

    def use(self, keys: KeyArray) -> None:
        self.index.release(self.index.acquire(keys))
        if self.dicts is not None:
            self.dicts.release(self.dicts.acquire(as_bytes(keys)))

    def resident(self) -> KeyArray:
        """A batch of keys that are there, as long as nothing was evicted."""
        return self.keys[self.rng.choice(len(self.keys), min(self.batch, len(self.keys)), replace=False)]

    def fresh(self) -> KeyArray:
        """A batch of keys that are nowhere."""
        return self._random(min(self.batch, len(self.keys)))

    def expect(self, right: bool | np.bool_) -> None:
        self.wrong += not right


def as_bytes(keys: KeyArray) -> list[bytes]:
    """Keys as objects that nobody has hashed yet."""
    whole = keys.tobytes()
    return [whole[start : start + 32] for start in range(0, len(whole), 32)]


class Clock:
    """Medians of what was timed, in ms, by name."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        self._seconds.setdefault(name, []).append(time.perf_counter() - began)
        return result

    def add(self, name: str, *parts: str) -> None:
        """Times as one what was just timed in parts."""
        self._seconds.setdefault(name, []).append(sum(self._seconds[part][-1] for part in parts))

    def ms(self, name: str) -> float:
        return statistics.median(self._seconds[name]) * 1e3


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, the rows, and what they have in common. The device is only where the result is filed."""
    device = kvortex.open_device(device_name)
    load_compiled()
    entries, batch, rounds = (4000, 256, 2) if quick else (ENTRIES, BATCH, 30)
    progress(f"{THREADS} threads, and a thread that counts")
    filled = Filled(entries, "lru", batch, dicts=False)
    parts = (batch,) if quick else (batch, batch // 8, batch // 64)
    rows = _threads(filled, parts, 2 if quick else 12, 0.02 if quick else 0.2)
    rows += _spin(filled, 1 if quick else 12, 0.05 if quick else 0.25)
    rows[-1]["wrong_bytes"] += _damaged(filled.index)
    for policy in POLICIES:
        progress(f"{policy}: {entries} entries, against dicts")
        rows += _against_dict(entries, policy, batch, rounds)
    for size in (2000, 4000) if quick else CURVE:
        progress(f"{size} entries")
        rows += _at_size(size, batch, rounds)
    per_entry = {policy: BlockIndex(entries, policy).nbytes / entries for policy in POLICIES}
    per_entry["lru, admit_after above 1"] = BlockIndex(entries, admit_after=2).nbytes / entries
    notes = {"batch": batch, "rounds": rounds, "unit": "ms a batch, medians", "bytes_per_entry": per_entry}
    return device.name, rows, notes | {"lines_missed": MISSES, "cpu": _cpu(), "cores": os.cpu_count()}


def _row(what: str, operation: str, filled: Filled, ms: float, other_ms: float, **more: Any) -> dict[str, Any]:
    names = {"what": what, "operation": operation, "policy": filled.index.policy, "entries": filled.index.capacity}
    batch = min(filled.batch, filled.index.capacity)
    names |= {"batch": batch, "threads": 1}
    figures = {"ms": ms, "ns_per_key": ms * 1e6 / batch, "other_ms": other_ms, "ratio": other_ms / ms}
    return names | figures | {"gather_ns": 0.0, "chase_ns": 0.0, "wrong_bytes": filled.wrong} | more


def _against_dict(entries: int, policy: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    filled, clock = Filled(entries, policy, batch, dicts=True), Clock()
    assert filled.dicts is not None
    index, dicts = filled.index, filled.dicts
    for _ in range(rounds):
        there, absent = filled.resident(), filled.fresh()
        names, others = as_bytes(there), as_bytes(absent)
        filled.expect(clock.time("lookup", lambda keys=there: index.lookup(keys)).all())
        filled.expect(all(clock.time("lookup dict", lambda keys=names: dicts.lookup(keys))))
        filled.expect(not clock.time("lookup of absent", lambda keys=absent: index.lookup(keys)).any())
        filled.expect(not any(clock.time("lookup of absent dict", lambda keys=others: dicts.lookup(keys))))
        clock.time("acquire+release", lambda keys=there: index.release(index.acquire(keys)))
        clock.time("acquire+release dict", lambda keys=names: dicts.release(dicts.acquire(keys)))
    for _ in range(rounds):
        keys = filled.fresh()
        names = as_bytes(keys)
        _evicting(filled, clock, keys)
        clock.time("reserve+commit dict", lambda keys=names: dicts.commit(dicts.reserve(keys, 0)[0]))
        filled.expect(all(dicts.lookup(names)))
    filled.expect(dicts.evictions == index.counts().evictions == rounds * len(keys))
    filled.wrong += _damaged(index)
    operations = ("lookup", "lookup of absent", "acquire+release", "reserve+commit")
    return [_row("against dict", each, filled, clock.ms(each), clock.ms(f"{each} dict")) for each in operations]


def _evicting(filled: Filled, clock: Clock, keys: KeyArray) -> None:
    """Stores a batch in place of others."""
    found = clock.time("reserve", lambda: filled.index.reserve(keys))
    clock.time("commit", lambda: filled.index.commit(found.slots))
    filled.expect((found.status == NEW).all() and filled.index.lookup(keys).all())
    clock.add("reserve+commit", "reserve", "commit")


def _at_size(entries: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    filled, clock = Filled(entries, "lru", batch, dicts=False), Clock()
    for _ in range(rounds):
        keys = filled.resident()
        filled.expect(clock.time("lookup", lambda keys=keys: filled.index.lookup(keys)).all())
    for _ in range(rounds):
        _evicting(filled, clock, filled.fresh())
    filled.wrong += _damaged(filled.index)
    gather, chase = Walks(filled.index.nbytes, batch, filled.rng).medians(rounds)
    by_itself = {name: chase * count * min(batch, entries) / 1e6 for name, count in MISSES.items()}
    more = {"gather_ns": gather, "chase_ns": chase}
    return [_row("entries", name, filled, clock.ms(name), by_itself[name], **more) for name in MISSES]


def _threads(filled: Filled, parts: Sequence[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Look-ups of batches of some numbers of keys by one thread and by many, by turns."""
    work: dict[int, Callable[[int], object]] = {0: lambda turn: reckon(1_000_000)}
    for part in parts:
        batches = [filled.resident()[:part] for _ in range(16)]
        work[part] = lambda turn, batches=batches: filled.expect(filled.index.lookup(batches[turn % 16]).all())
    found: dict[tuple[int, int], list[float]] = {}
    for _ in range(rounds):
        for part, call in work.items():
            for threads in (1, THREADS):
                found.setdefault((part, threads), []).append(_calls_per_second(call, threads, seconds))
    # The gain of a round, whose two halves had about the same machine to themselves.
    gains = {part: [many / one for one, many in zip(found[part, 1], found[part, THREADS], strict=True)] for part in work}
    rows = []
    for part in work:
        gain, alone = _undisturbed(gains[part], gains[0]), 1e3 / _undisturbed(found[part, 1], gains[0])
        row = _row("threads", "lookup" if part else "arithmetic", filled, alone / gain, alone)
        rows.append(row | {"batch": part, "threads": THREADS, "ns_per_key": alone / gain / part * 1e6 if part else 0.0})
    return rows


def _undisturbed(figures: list[float], control: list[float]) -> float:
    """Median over the rounds in which ``control`` was highest: a third of all."""
    best = np.argsort(control)[-max(1, len(control) // 3) :]
    return statistics.median(figures[at] for at in best)


def _calls_per_second(call: Callable[[int], object], threads: int, seconds: float) -> float:
    done, start = [0] * threads, threading.Barrier(threads + 1)
    stop = threading.Event()

    def go_on(me: int) -> None:
        start.wait()
        while not stop.is_set():
            call(me + done[me])
            done[me] += 1

    workers = [threading.Thread(target=go_on, args=(me,)) for me in range(threads)]
    for worker in workers:
        worker.start()
    start.wait()
    began = time.perf_counter()
    time.sleep(seconds)
    while not (total := sum(done)) and any(worker.is_alive() for worker in workers):
        time.sleep(1e-3)  # none has come to its first end: others may have all CPUs
    took = time.perf_counter() - began
    stop.set()
    for worker in workers:
        worker.join()
    return total / took


def _spin(filled: Filled, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One thread counts alone, and while another looks up, or stores and evicts, without a pause."""
    found: dict[str, list[float]] = {"arithmetic": [], "lookup": [], "reserve+commit": []}
    there, clock = filled.resident(), Clock()
    # Made before, and so many that the first is gone when the last was stored.
    fresh = itertools.cycle([filled.fresh() for _ in range(len(filled.keys) // filled.batch + 8)])
    work: dict[str, Callable[[], object]] = {
        "arithmetic": lambda: clock.time("arithmetic", lambda: reckon(int(seconds * 1e9))),
        "lookup": lambda: clock.time("lookup", lambda: filled.index.lookup(there)),
        "reserve+commit": lambda: clock.time("reserve+commit", lambda: filled.store(next(fresh))),
    }
    with Spinners(1) as spinner:
        for _ in range(rounds):
            for name, call in work.items():
                alone = _rate(spinner, lambda: time.sleep(seconds))
                ends = time.perf_counter() + seconds

                def busy(call: Callable[[], object] = call, ends: float = ends) -> None:
                    while time.perf_counter() < ends:
                        call()

                found[name].append(_rate(spinner, busy) / alone)
    control = found["arithmetic"]
    return [
        _row("spin", name, filled, clock.ms(name), 0.0) | {"ratio": _undisturbed(ratios, control)}
        for name, ratios in found.items()
    ]


def _rate(spinner: Spinners, work: Callable[[], None]) -> float:
    before, began = spinner.total(), time.perf_counter()
    work()
    return (spinner.total() - before) / (time.perf_counter() - began)


def _damaged(index: BlockIndex) -> int:
    """1 where the index is not whole, or holds something that was given back."""
    counts = index.counts()
    try:
        index.check()
    except kvortex.KVortexError:
        return 1
    return int(counts.pinned > 0 or counts.reserved > 0 or counts.resident != counts.capacity)


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return ""


def draw(axes: Any, report: Report) -> None:
    """Cost of a key by number of entries, beside that of random memory."""
    rows = [row for row in report.rows if row["what"] == "entries"]
    for operation, colour in (("lookup", "#27608f"), ("reserve+commit", "#d0792a")):
        chosen = [row for row in rows if row["operation"] == operation]
        entries = [row["entries"] for row in chosen]
        axes.plot(entries, [row["ns_per_key"] for row in chosen], "o-", color=colour, label=operation)
        waits = [row["chase_ns"] * MISSES[operation] for row in chosen]
        axes.plot(entries, waits, ":", color=colour, label=f"{MISSES[operation]} loads that wait for each other")
    looks = [row for row in rows if row["operation"] == "lookup"]
    gathers = [row["gather_ns"] * MISSES["lookup"] for row in looks]
    axes.plot([row["entries"] for row in looks], gathers, "--", color="#777777", label="2 loads that do not")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("resident blocks")
    axes.set_ylabel(f"ns a key, batches of {report.notes['batch']}")
    axes.set_title(f"The index, and random memory of the same size; {report.notes['cpu']}", fontsize=10)
    axes.legend(fontsize=8)
