"""Loops that transfers are measured beside: what they put on the GPU, and when."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from perf import foreign, loads
from perf.compute import beside
from perf.loads import Loop

PASS_S = 0.01


class _Gpu:
    """One stream: passes one after another, each of ``PASS_S``; time goes on when told, or when somebody asks and ``step`` says
    by how much."""

    def __init__(self) -> None:
        self.now = self.end = self.step = 0.0
        self.most = 0
        self.events: list[Any] = []

    def delay(self, seconds: float) -> None:
        """All that is still to come ends later."""
        self.end += seconds
        for event in self.events:
            if event.at > self.now:
                event.at += seconds

    def run(self) -> None:
        self.end = max(self.end, self.now) + PASS_S
        self.most = max(self.most, round((self.end - self.now) / PASS_S))

    def event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        gpu = self

        class Event:
            at = -1.0

            def record(self) -> None:
                self.at = max(gpu.end, gpu.now)

            def query(self) -> bool:
                gpu.now += gpu.step
                return self.at <= gpu.now

            def elapsed_time(self, other: Any) -> float:
                return float(other.at - self.at) * 1e3

        self.events.append(Event())
        return self.events[-1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Gpu]:
    fake = _Gpu()
    context = contextlib.nullcontext
    cuda = SimpleNamespace(Stream=object, Event=fake.event, stream=lambda _: context())
    monkeypatch.setattr(foreign, "torch", lambda: SimpleNamespace(cuda=cuda, no_grad=context))
    monkeypatch.setattr(loads, "make", lambda name: fake.run)
    monkeypatch.setattr(loads.time, "sleep", lambda seconds: setattr(fake, "now", fake.now + seconds))
    yield fake


def test_spans_are_as_long_as_was_asked_and_few_passes_wait(gpu: _Gpu) -> None:
    loop = Loop("any", 0.5)
    assert loop.passes == 50
    gpu.step, gpu.most = 1e-4, 0
    loop.start()
    for span in range(Loop.SPANS):
        assert loop.running(span)
        while loop.running(span):
            assert loop.running(Loop.AFTER)
    assert loop.seconds() == pytest.approx([0.5] * Loop.SPANS)
    assert 9 <= gpu.most <= 11, "a driver makes who launches wait where too many do"


def test_a_loop_that_was_left_alone_too_long_says_so(gpu: _Gpu) -> None:
    loop = Loop("any", 0.5)
    loop.start()
    gpu.now += 2 * Loop.AHEAD_S
    with pytest.raises(RuntimeError, match="nothing left to do"):
        loop.running(Loop.WARM)


def test_what_costs_a_loop_time_is_told_from_its_neighbours(gpu: _Gpu) -> None:
    """Transfers that take a tenth of the GPU, in the span that they are in and no other."""
    loop, ended = Loop("any", 0.5), []
    gpu.step = 1e-5

    def move() -> int:
        gpu.now += 0.02
        gpu.delay(0.002)
        ended.append(gpu.now)
        return 1000

    rate, slowdown = beside(loop, 2, move)
    assert slowdown == pytest.approx(1.11, abs=0.02)
    assert len(ended) >= 2 * 20 and rate > 0
