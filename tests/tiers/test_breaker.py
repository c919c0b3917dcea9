"""When a tier is left alone, for how long, and what brings it back; by a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest

from kvortex.errors import ConfigError
from kvortex.tiers.breaker import Breaker, BreakerOptions, BreakerState


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(draw: float = 0.0, **options: Any) -> tuple[Breaker, Clock]:
    clock = Clock()
    common: dict[str, Any] = {"failures": 3, "lost_s": 5.0, "slow_s": 1.0, "window_s": 10.0}
    common |= {"pause_s": 2.0, "longest_pause_s": 7.0} | options
    return Breaker(BreakerOptions(**common), clock, lambda: draw), clock


def test_failures_within_the_window_open_it() -> None:
    breaker, clock = make()
    for _ in range(2):
        breaker.record(0.01, True)
    clock.now += 10.1  # those two are forgotten
    for _ in range(2):
        breaker.record(0.01, True, "OSError")
        assert breaker.closed and breaker.state is BreakerState.CLOSED
    breaker.record(0.01, True, "OSError")
    assert not breaker.closed and breaker.trips == 1 and breaker.state is BreakerState.OPEN
    assert breaker.reason == "3 calls failed within 10 s; the last one: OSError"


def test_calls_that_go_well_quickly_never_open_it() -> None:
    breaker, _ = make()
    for _ in range(1000):
        breaker.record(1.0, False)
    assert breaker.closed


def test_time_that_is_lost_opens_it() -> None:
    breaker, clock = make(failures=100)
    breaker.record(3.0, False)  # 2 s beyond what a call may take
    breaker.record(2.5, True)  # all of it
    assert breaker.closed
    clock.now += 5
    breaker.record(1.6, False)
    assert not breaker.closed and "5.1 s were lost" in breaker.reason


def test_one_probe_at_a_time_and_longer_pauses() -> None:
    breaker, clock = make(draw=1.0)
    breaker.trip("told so")
    pauses = []
    for _ in range(4):
        began = clock.now
        while not breaker.wants_probe():
            clock.now += 0.125
        assert not breaker.wants_probe() and breaker.state is BreakerState.HALF_OPEN and not breaker.closed
        pauses.append(clock.now - began)
        breaker.probed("still dead")
        assert breaker.reason == "still dead" and breaker.state is BreakerState.OPEN
    assert pauses == [2.5, 5.0, 8.75, 8.75]  # a quarter longer than 2, 4 and 7, as drawn
    clock.now += 100
    assert breaker.wants_probe()
    breaker.probed(None)
    assert breaker.closed and breaker.state is BreakerState.CLOSED and breaker.trips == 1
    breaker.trip("again")
    clock.now += 2.5
    assert breaker.wants_probe(), "the pause begins anew"


def test_what_was_lost_before_it_opened_does_not_count_after() -> None:
    breaker, clock = make()
    for _ in range(3):
        breaker.record(0.0, True)
    clock.now += 2
    assert breaker.wants_probe()
    breaker.probed(None)
    breaker.record(0.0, True)
    assert breaker.closed


def test_a_closed_one_wants_no_probe() -> None:
    breaker, clock = make()
    clock.now += 1000
    assert not breaker.wants_probe()


BAD = [("failures", 0), ("failures", True), ("pause_s", 0), ("lost_s", "5"), ("window_s", -1)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_impossible_options_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = "):
        BreakerOptions(**{name: value})
