"""CPU seconds of calls and threads are found where they are spent; the interval of a median holds it as often as it says."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from perf.answers import interval
from perf.meter import Meter, calls_of, threads_of


def _spin(seconds: float = 0.02) -> float:
    began = time.thread_time()
    while time.thread_time() < began + seconds:
        pass
    return seconds


class _Work:
    spin = staticmethod(_spin)
    number = 7

    def fail(self) -> None:
        _spin()
        raise KeyError


def test_calls_are_metered_and_what_is_beside_them_is_not() -> None:
    meter = Meter(_Work())
    _spin()
    assert calls_of(meter) == 0
    assert meter.spin() == 0.02 and meter.number == 7
    with pytest.raises(KeyError):
        meter.fail()
    assert 0.04 <= calls_of(meter) < 1


def test_threads_are_metered_by_name() -> None:
    go, stop = threading.Event(), threading.Event()

    def work() -> None:
        _spin()
        go.set()
        stop.wait()

    thread = threading.Thread(target=work, name="mine-1")
    before = threads_of("mine-")
    thread.start()
    try:
        assert go.wait(60)
        assert before == 0 and 0.02 <= threads_of("mine-") < 1
        assert threads_of("other-") == 0
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("n", [1, 2, 5, 6, 9, 12])
def test_the_interval_holds_the_median_as_often_as_it_says(n: int) -> None:
    low, high = interval([float(at) for at in range(n)])
    assert low == n - 1 - high
    # Each sample falls above the median or below it, with equal chances: all ways in which n samples can.
    held = [low < sum(below) < n - low for below in itertools.product((0, 1), repeat=n)]
    chance = sum(held) / len(held)
    assert chance >= 0.95 or low == 0
    inner = [low + 1 < sum(below) < n - low - 1 for below in itertools.product((0, 1), repeat=n)]
    assert sum(inner) / len(inner) < 0.95  # and is no wider than it must be
