"""Whatever comes out of a tier: it is counted by its cause, and an outcome for each key."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from kvortex.digests import digest_records
from kvortex.tiers import Call, Outcome, RecordFormat
from kvortex.tiers.breaker import Breaker, BreakerOptions
from kvortex.tiers.guarded import Guarded
from kvortex.tiers.memory import MemoryStore
from kvortex.tiers.metrics import BUCKETS
from perf.faulty import FaultyTier
from tests.pages import keys_of

SIZE = 4096


class Bench:
    """A guarded tier, and blocks in memory."""

    def __init__(self, **options: float) -> None:
        self.tier = FaultyTier(MemoryStore(), RecordFormat(bytes(32), SIZE))
        self.breaker = Breaker(BreakerOptions(**options))  # type: ignore[arg-type]
        self.guard = Guarded(self.tier, self.breaker)
        self.blocks = np.random.default_rng(1).integers(0, 256, (4, SIZE), np.uint8)
        self.at = self.blocks.ctypes.data + SIZE * np.arange(4)
        self.sizes = np.full(4, SIZE)
        self.digests = np.empty((4, 16), np.uint8)
        digest_records(self.at, self.sizes, self.digests)
        self.keys = keys_of(1, 2, 3, 4)

    def call(self, seconds: float = 5.0) -> Call:
        return Call(time.monotonic() + seconds)

    def put(self) -> list[int]:
        return self.guard.put_from(self.keys, self.at, self.sizes, self.digests, self.call()).tolist()


def test_what_goes_well_is_counted() -> None:
    bench = Bench()
    assert bench.put() == [Outcome.OK] * 4
    old = bench.blocks.copy()
    bench.blocks[:] = 0
    found = bench.guard.get_into(keys_of(1, 2, 3, 9), bench.at, bench.sizes, bench.call())
    assert found.outcomes.tolist() == [Outcome.OK] * 3 + [Outcome.MISS] and (bench.blocks[:3] == old[:3]).all()
    assert (found.digests[:3] == bench.digests[:3]).all() and found.sizes.tolist() == [SIZE] * 3 + [0]
    asked = bench.guard.contains(keys_of(4, 5), bench.call())
    assert asked is not None and asked.tolist() == [True, False]
    assert bench.guard.delete(keys_of(4, 5), bench.call()).tolist() == [Outcome.OK, Outcome.MISS]
    by_name = {entry.operation: entry for entry in bench.guard.tally.operations()}
    assert (by_name["get"].calls, by_name["get"].keys, by_name["get"].nbytes) == (1, 4, 3 * SIZE)
    assert by_name["get"].outcomes == {"ok": 3, "miss": 1} and by_name["put"].nbytes == 4 * SIZE
    assert all(sum(entry.histogram) == entry.calls and len(entry.histogram) == len(BUCKETS) + 1 for entry in by_name.values())
    assert not bench.guard.tally.errors() and bench.breaker.closed


@pytest.mark.parametrize(
    ("fault", "cause"), [("raise", "OSError"), ("failed", "FAILED"), ("timeout", "TIMEOUT"), ("nonsense", "TypeError")]
)
def test_what_goes_wrong_is_counted_by_its_cause_and_opens_the_breaker(fault: str, cause: str) -> None:
    bench = Bench(failures=3)
    bench.tier.plan = lambda _: fault
    for operation in range(3):
        assert bench.breaker.closed
        if operation == 0:
            assert Outcome.OK not in bench.put()
        else:
            found = bench.guard.get_into(bench.keys, bench.at, bench.sizes, bench.call())
            assert Outcome.OK not in found.outcomes.tolist() and found.outcomes.shape == (4,)
    assert not bench.breaker.closed and bench.guard.tally.errors() == {cause: 3}
    assert cause in bench.breaker.reason


def test_contains_tells_not_there_from_not_known() -> None:
    bench = Bench()
    assert bench.guard.contains(bench.keys, bench.call()) is not None
    bench.tier.plan = lambda _: "raise"
    assert bench.guard.contains(bench.keys, bench.call()) is None


def test_misses_and_damage_open_nothing() -> None:
    bench = Bench(failures=1)
    bench.put()
    bench.tier.plan = lambda _: "flip"
    for _ in range(4):
        bench.guard.get_into(bench.keys, bench.at, bench.sizes, bench.call())
    assert bench.breaker.closed and bench.guard.tally.corrupt() > 0 and not bench.guard.tally.errors()


def test_a_call_that_hangs_opens_it_once_and_is_no_news_when_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.tiers.guarded._GRACE_S", 0.02)
    bench = Bench(failures=1, pause_s=0.01, slow_s=0.001, lost_s=0.001)  # as it has lost more, it would open it again
    bench.tier.plan = lambda _: "hang"
    thread = threading.Thread(target=lambda: bench.guard.contains(bench.keys, bench.call(0.02)))
    thread.start()
    assert bench.guard.overdue() == 0
    deadline = time.monotonic() + 5
    while not bench.guard.overdue():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert bench.guard.overdue() == bench.guard.running() == 1
    assert bench.guard.tally.errors() == {"Overdue": 1} and "a contains has not come back" in bench.breaker.reason
    time.sleep(0.02)
    assert bench.breaker.wants_probe()
    bench.tier.plan = lambda _: None
    assert bench.guard.probe(bench.call()) is None and bench.breaker.closed
    bench.tier.gate.set()
    thread.join(5)
    assert bench.guard.overdue() == bench.guard.running() == 0 and bench.breaker.closed


@pytest.mark.parametrize("fault", ["raise", "failed", "slow"])
def test_a_probe_that_fails_or_is_late_keeps_it_open(fault: str) -> None:
    bench = Bench(pause_s=0.001)
    bench.breaker.trip("told so")
    time.sleep(0.01)
    assert bench.breaker.wants_probe()
    bench.tier.plan = lambda _: fault
    assert bench.guard.probe(bench.call(0.01))
    assert not bench.breaker.closed
