"""Waiting by asking: at once where the answer is yes, with short naps, and never past the deadline."""

from __future__ import annotations

import time

import pytest

from kvortex.errors import TransferError
from kvortex.transfer import executor
from kvortex.transfer.executor import Completion, Direction, Failed, poll


class Clock:
    """Time that passes only in naps, and a little at each question."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float = 10e-6) -> None:
        self.now, self.naps, self._step = 1000.0, [], step
        monkeypatch.setattr(executor.time, "monotonic", self._monotonic)
        monkeypatch.setattr(executor.time, "sleep", self._sleep)

    def _monotonic(self) -> float:
        self.now += self._step
        return self.now

    def _sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds


def test_what_is_ready_needs_no_nap_and_no_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert poll(lambda: True, clock.now + 1) and poll(lambda: True, clock.now - 1)
    assert not clock.naps


def test_it_spins_first_and_then_naps_longer_and_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    started = clock.now
    assert poll(lambda: clock.now > started + 0.1, started + 10)
    assert clock.naps[0] == pytest.approx(300e-6 / 64, rel=0.1) and max(clock.naps) == pytest.approx(1e-3)
    assert clock.naps == sorted(clock.naps) and len(clock.naps) < 420
    assert clock.now < started + 0.102, "noticed at most a nap late"


def test_a_nap_is_a_small_part_of_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    started = clock.now
    assert poll(lambda: clock.now > started + 0.01, started + 10)
    assert clock.now - started < 0.01 * (1 + 1.5 / 64)


def test_short_waits_do_not_nap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    started = clock.now
    assert poll(lambda: clock.now > started + 80e-6, started + 10)
    assert not clock.naps


def test_the_deadline_is_kept_to_the_nap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    deadline = clock.now + 0.05
    asked = []
    assert not poll(lambda: asked.append(clock.now), deadline)
    assert deadline <= clock.now < deadline + 100e-6
    assert asked[-1] >= deadline - 20e-6, "asked once more before giving up"


def test_a_deadline_that_has_passed_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    asked = []
    assert not poll(lambda: asked.append(1), clock.now - 5)
    assert len(asked) == 1 and not clock.naps


def test_an_error_of_the_question_comes_out() -> None:
    def ask() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        poll(ask, time.monotonic() + 1)


def test_a_transfer_that_could_not_be_issued_has_ended() -> None:
    error = TransferError("no")
    failed = Failed(error)
    assert isinstance(failed, Completion) and failed.query() and failed.error is error and failed.seconds == 0.0
    failed.start()
    failed.cancel()
    failed.add_to(object(), 1)


def test_directions_have_the_names_of_the_public_calls() -> None:
    assert [direction.value for direction in Direction] == ["save", "load"]
