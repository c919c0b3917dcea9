"""What does a dead tier cost a replay, after its breaker has opened?

The same requests, conversations that share prefixes, are served by three engines with pools of the same size, two without
tiers and one above a tier all of whose calls raise, whose breaker has opened and probes it now and then. They take turns, a
whole replay each; ``ratio`` is the median of the rounds' ratios of rates, with the dead tier to the mean of both without,
``cpu_ratio`` the same of the whole process's CPU time, which other programs disturb less, and ``control`` that of the two
without, which shows how far the ratio is to be trusted. Requests are checked, loaded, verified and saved as by ``kvortex
replay``.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import numpy as np

from kvortex.cli.pages import Pages
from kvortex.cli.serve import Server
from kvortex.config import KVortexConfig
from kvortex.devices import HostDevice
from kvortex.engine import KVortexEngine
from kvortex.errors import KVortexError
from kvortex.tiers import BreakerOptions, RecordFormat, TierOptions
from kvortex.tiers.memory import MemoryStore
from perf.faults_cascade import keys_of
from perf.faulty import FaultyTier
from perf.report import progress

REQUESTS, ROUNDS, POOL = 200, 120, 300
_LONGEST_OPENING_S = 30.0


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """One row. ``quick`` shows that it works."""
    requests, rounds = (20, 3) if quick else (REQUESTS, ROUNDS)
    played = _conversations(requests)
    with (
        Pages(HostDevice(), max(map(len, played)), 4, 16, 4, 32) as pages,
        _engine(pages) as bare,
        _dead(pages) as dead,
        _engine(pages) as control,
    ):
        servers = {"bare": Server(bare, pages), "dead": Server(dead, pages), "control": Server(control, pages)}
        names = list(servers)
        for server in servers.values():
            _play(server, played)
        wall: dict[str, list[float]] = {name: [] for name in servers}
        cpu: dict[str, list[float]] = {name: [] for name in servers}
        gc.collect()
        for at in range(rounds):
            progress(f"replay {at + 1} of {rounds}")
            for name in names[at % 3 :] + names[: at % 3]:
                began, computed = time.perf_counter(), time.process_time()
                _play(servers[name], played)
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - computed)
        stats = dead.get_stats().tiers[0]
        if stats.breaker == "closed":
            raise KVortexError("the breaker of a dead tier has closed")
        if len({server.hits for server in servers.values()}) > 1:
            raise KVortexError("the engines did not serve the same")
        return [
            {
                "tier": "dead",
                "operation": "replay",
                "depth": 1,
                "rounds": rounds,
                "seconds": statistics.median(wall["dead"]),
                "bare_seconds": statistics.median(wall["bare"]),
                "ratio": _ratio(wall),
                "cpu_ratio": _ratio(cpu),
                "control": statistics.median(one / other for one, other in zip(wall["bare"], wall["control"], strict=True)),
                "probes": stats.of("probe").calls,
                "wrong_bytes": sum(server.wrong_bytes for server in servers.values()),
            }
        ]


def _ratio(times: dict[str, list[float]]) -> float:
    turns = zip(times["bare"], times["control"], times["dead"], strict=True)
    return statistics.median((bare + control) / 2 / dead for bare, control, dead in turns)


def _play(server: Server, requests: list[Any]) -> None:
    for keys in requests:
        server.serve(keys, np.arange(len(keys)))


def _engine(pages: Pages, **options: Any) -> KVortexEngine:
    slot = -(-pages.layout.record_bytes // 4096) * 4096
    return KVortexEngine.create(KVortexConfig(cpu_pool_size_bytes=POOL * slot, device="host", **options), pages.layout)


def _dead(pages: Pages) -> KVortexEngine:
    """An engine whose tier is dead, and known to be."""

    def make(form: RecordFormat) -> FaultyTier:
        return FaultyTier(MemoryStore(), form, lambda _: "raise")

    engine = _engine(pages, tiers=((make, TierOptions(absent_s=1e-3, breaker=BreakerOptions(failures=3))),))
    deadline = time.monotonic() + _LONGEST_OPENING_S
    while engine.get_stats().tiers[0].breaker == "closed":
        engine.prefetch(keys_of([0])).wait()
        if time.monotonic() > deadline:
            engine.shutdown()
            raise KVortexError("the breaker of a dead tier does not open")
    return engine


def _conversations(count: int) -> list[Any]:
    """Keys of requests: most continue an earlier one by a few blocks."""
    rng, requests, fresh = np.random.default_rng(4), [], 1
    for _ in range(count):
        request = [0]
        if requests and rng.random() < 0.8:
            old = requests[-int(rng.integers(1, min(len(requests), 8) + 1))]
            request = old[: int(rng.integers(1, len(old) + 1))]
        grow = int(rng.integers(0, 12))
        requests.append(request + list(range(fresh, fresh + grow)))
        fresh += grow
    return [keys_of(np.array(request)) for request in requests]
