"""Loops that transfers are measured beside: what they put on the GPU, and when."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvortex.errors import TransferError
from perf import foreign, loads, turns
from perf.flow import TwoInFlight
from perf.loads import Loop
from perf.turns import PRIMING, Mover, Turns, beside, nothing_moves

PASS_S = 0.01


class _Gpu:
    """One stream: passes one after another, each of ``PASS_S``; time goes on when told, or when somebody asks and ``step`` says
    by how much. Each pass takes longer than the one before by ``drift`` of that, which shrinks by ``bend`` with each."""

    def __init__(self) -> None:
        self.now = self.end = self.step = self.drift = 0.0
        self.bend = 1.0
        self.most, self.length = 0, PASS_S
        self.events: list[Any] = []

    def delay(self, seconds: float) -> None:
        """All that is still to come ends later."""
        self.end += seconds
        for event in self.events:
            if event.at > self.now:
                event.at += seconds

    def run(self) -> None:
        self.length += self.drift * PASS_S
        self.drift *= self.bend
        self.end = max(self.end, self.now) + self.length
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
    time = SimpleNamespace(sleep=lambda seconds: setattr(fake, "now", fake.now + seconds), perf_counter=lambda: fake.now)
    for module in (loads, turns):
        monkeypatch.setattr(module, "time", time)
    yield fake


def test_spans_are_as_long_as_was_asked_and_few_passes_wait(gpu: _Gpu) -> None:
    loop = Loop("any", 0.5)
    assert loop.passes == 50
    gpu.step, gpu.most = 1e-4, 0
    loop.start()
    first = loop.span
    for span in range(first, first + 20):
        assert loop.running(span) and loop.span == span
        while loop.running(span):
            assert loop.running(span + 1)
    assert [loop.seconds(span) for span in range(first, first + 20)] == pytest.approx([0.5] * 20)
    assert 9 <= gpu.most <= 11, "a driver makes who launches wait where too many do"


def test_nobody_looks_at_a_loop_before_clocks_have_settled(gpu: _Gpu) -> None:
    loop = Loop("any", 0.5)
    gpu.step = 1e-4
    for _ in range(2):
        gpu.now += 10.0
        began = gpu.now
        loop.start()
        assert gpu.now - began == pytest.approx(Loop.SETTLE_SPANS * 0.5, abs=0.2)
        assert nothing_moves(loop) == loop.span - 1 and loop.seconds(loop.span - 1) == pytest.approx(0.5)


def test_a_loop_that_was_left_alone_too_long_says_so(gpu: _Gpu) -> None:
    loop = Loop("any", 0.5)
    gpu.step = 1e-4
    loop.start()
    gpu.now += 2 * Loop.AHEAD_S
    with pytest.raises(TransferError, match="nothing left to do"):
        loop.running(loop.span)


def _flow(gpu: _Gpu, seconds: float, taken: float, nbytes: int = 1000) -> TwoInFlight:
    """Transfers of so many seconds each, that take the GPU for some of them."""

    def wait() -> int:
        gpu.now += seconds
        gpu.delay(taken)
        return nbytes

    return TwoInFlight(lambda: (lambda: True, wait))


def test_what_costs_a_loop_time_is_told_from_its_neighbours(gpu: _Gpu) -> None:
    """Transfers that take a tenth of the GPU, in the span that they are in and no other; and what takes none of it."""
    loop = Loop("any", 0.5)
    gpu.step = 1e-5
    movers = {"costly": Mover(_flow(gpu, 0.02, 0.002)), "free": Mover(_flow(gpu, 0.02, 0.0))}
    every = Turns(movers)
    every.run(loop, 3, "any")
    assert every.control() == pytest.approx(dict.fromkeys(("slowdown", "slowdown_least", "slowdown_most"), 1), abs=1e-3)
    assert movers["costly"].slowdowns == pytest.approx([1.11] * 3, abs=0.02)
    assert movers["free"].slowdowns == pytest.approx([1] * 3, abs=1e-3)
    assert all(rate == pytest.approx(1000 / 0.02 / 1e9, rel=0.05) for mover in movers.values() for rate in mover.rates)
    assert not any(mover.flow._running for mover in movers.values()), "what runs on would cost the spans behind"


def test_a_turn_takes_three_spans_of_a_loop_that_never_pauses(gpu: _Gpu) -> None:
    loop = Loop("any", 0.5)
    gpu.step = 1e-5
    loop.start()
    began = gpu.now
    movers = {name: Mover(_flow(gpu, 0.02, 0.0), lambda: setattr(gpu, "now", gpu.now + 0.05)) for name in "abc"}
    Turns(movers).run(loop, 4, "any")
    assert gpu.now - began == pytest.approx((Loop.SETTLE_SPANS + 3 * 4 * 4 + 2) * 0.5, abs=0.6)
    assert gpu.end - gpu.now > 0, "it went on until the end"


def test_the_first_transfers_do_not_count(gpu: _Gpu) -> None:
    """They find buffers empty, or full."""
    loop, ended = Loop("any", 0.5), []
    gpu.step = 1e-5

    def wait() -> int:
        ended.append(gpu.now)
        gpu.now += 1e-4 if len(ended) < PRIMING else 0.02
        return 10**6 if len(ended) < PRIMING else 1000

    loop.start()
    assert beside(loop, TwoInFlight(lambda: (lambda: True, wait))) == pytest.approx(1000 / 0.02 / 1e9, rel=0.05)


@pytest.mark.parametrize("phase", [0.0, 0.001, 0.003, 0.006])
def test_ends_that_wait_for_a_kernel_of_the_loop_do_not_shift_a_rate(gpu: _Gpu, phase: float) -> None:
    """Of 8.5 ms each, told at multiples of 7 ms: from the first end to the last one the rate is wrong by up to 4 percent."""
    loop, count, begin = Loop("any", 0.2), [0], gpu.now
    gpu.step = 1e-6

    def wait() -> int:
        count[0] += 1
        gpu.now = max(gpu.now, begin + math.ceil((phase + 0.0085 * count[0]) / 0.007) * 0.007)
        return 1000

    loop.start()
    begin = gpu.now
    assert beside(loop, TwoInFlight(lambda: (lambda: True, wait))) == pytest.approx(1000 / 0.0085 / 1e9, rel=0.015)


def test_transfers_that_end_too_late_are_told(gpu: _Gpu) -> None:
    """And nothing of them runs on."""
    loop = Loop("any", 0.05)
    gpu.step = 1e-5
    loop.start()

    def wait() -> int:
        gpu.now += 0.03
        return 1000

    flow = TwoInFlight(lambda: (lambda: True, wait))
    with pytest.raises(TransferError, match="did not end soon enough"):
        beside(loop, flow)
    assert not flow._running


def test_clocks_that_fall_steadily_are_no_cost(gpu: _Gpu) -> None:
    loop = Loop("any", 0.5)
    gpu.step, gpu.drift = 1e-5, 1e-4
    mover = Mover(_flow(gpu, 0.02, 0.0))
    Turns({"any": mover}).run(loop, 3, "any")
    assert mover.slowdowns == pytest.approx([1] * 3, abs=1e-4)


def test_all_take_turns_and_who_is_too_slow_takes_no_more(gpu: _Gpu) -> None:
    loop, order = Loop("any", 0.5), []
    gpu.step = 1e-5
    movers = {
        "fast": Mover(_flow(gpu, 0.02, 0.0), lambda: order.append("fast")),
        "slow": Mover(_flow(gpu, 0.09, 0.0, nbytes=0), lambda: order.append("slow")),
        "slowest": Mover(_flow(gpu, 0.4, 0.0), lambda: order.append("slowest")),
        "last": Mover(_flow(gpu, 0.01, 0.001), lambda: order.append("last")),
    }
    every = Turns(movers)
    every.run(loop, 3, "any")
    assert sorted(order[:4]) == ["fast", "last", "slow", "slowest"]
    assert sorted(order[4:6]) == sorted(order[6:]) == ["fast", "last"]
    assert sorted(every.failed) == ["slow", "slowest"] and "did not end soon enough" in every.failed["slow"]
    assert "nothing left to do" in every.failed["slowest"]
    assert len(movers["fast"].rates) == len(movers["last"].slowdowns) == 3 and not movers["slow"].rates
    assert movers["last"].rate == pytest.approx(2 * movers["fast"].rate, rel=0.05)
    assert movers["fast"].slowdowns == pytest.approx([1] * 3, abs=1e-3)
    assert movers["last"].slowdowns == pytest.approx([1.11] * 3, abs=0.02)


def test_clocks_that_settle_are_no_cost_either(gpu: _Gpu) -> None:
    """Only spans beside a turn tell what it would have taken: those of the end would say otherwise by percents."""
    loop = Loop("any", 0.2)
    gpu.step, gpu.drift, gpu.bend = 1e-5, 1e-3, 0.9995
    movers = {name: Mover(_flow(gpu, 0.02, 0.0)) for name in "ab"}
    Turns(movers).run(loop, 3, "any")
    assert [each for mover in movers.values() for each in mover.slowdowns] == pytest.approx([1] * 6, abs=5e-4)
    assert gpu.length > 1.3 * PASS_S


def test_what_is_prepared_counts_for_nobody(gpu: _Gpu) -> None:
    loop = Loop("any", 0.5)
    gpu.step = 1e-5
    movers = {name: Mover(_flow(gpu, 0.02, 0.0), lambda: gpu.delay(0.09)) for name in "ab"}
    Turns(movers).run(loop, 3, "any")
    assert [each for mover in movers.values() for each in mover.slowdowns] == pytest.approx([1] * 6, abs=1e-3)


def test_orders_differ_and_figures_are_those_of_their_rounds(gpu: _Gpu) -> None:
    loop, order, taken = Loop("any", 0.5), [], iter([0.0, 0.001, 0.002, 0.003])
    gpu.step = 1e-5
    cost = [0.0]

    def wait() -> int:
        gpu.now += 0.02
        gpu.delay(cost[0])
        return round(1e6 / (1 + cost[0]))

    def next_cost() -> None:
        order.append("a")
        cost[0] = next(taken)

    movers = {"a": Mover(TwoInFlight(lambda: (lambda: True, wait)), next_cost)}
    movers |= {name: Mover(_flow(gpu, 0.02, 0.0), lambda name=name: order.append(name)) for name in "bcd"}  # type: ignore[misc]
    Turns(movers).run(loop, 4, "any")
    rounds = [tuple(order[4 * at : 4 * at + 4]) for at in range(4)]
    assert len(set(rounds)) > 1 and all(sorted(each) == list("abcd") for each in rounds)
    one = movers["a"]
    assert one.slowdowns == sorted(one.slowdowns) and one.rates == sorted(one.rates, reverse=True)
    assert movers["a"].slowdowns[3] == pytest.approx(1.17, abs=0.03)


def test_a_thread_that_was_kept_from_the_loop_costs_one_turn(gpu: _Gpu) -> None:
    """That of nothing is no failure; who has lost the span behind it is compared with the one before; all else goes on."""
    loop = Loop("any", 0.5)
    gpu.step = 1e-5
    every = Turns({"a": Mover(_flow(gpu, 0.02, 0.002)), "b": Mover(_flow(gpu, 0.02, 0.0))})
    late = iter([0.4, 0.005, 0.4])
    usual = every.nothing.flow

    def flow() -> int:
        gpu.now += next(late, 0.005)
        return usual()

    flow.drain = usual.drain  # type: ignore[attr-defined]
    every.nothing.flow = flow  # type: ignore[assignment]
    every.run(loop, 3, "any")
    assert not every.failed and len(every.nothing.slowdowns) == 1
    assert every.movers["a"].slowdowns == pytest.approx([1.11] * 3, abs=0.02)  # type: ignore[index]
    assert every.movers["b"].slowdowns == pytest.approx([1] * 3, abs=1e-3)  # type: ignore[index]


def test_a_last_span_that_is_lost_leaves_the_one_before(gpu: _Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, usual = [0], nothing_moves

    def lost(loop: Loop) -> int:
        calls[0] += 1
        gpu.now += 0.3 * (calls[0] == 3)  # behind the turns of nothing and of the mover
        return usual(loop)

    monkeypatch.setattr(turns, "nothing_moves", lost)
    gpu.step = 1e-5
    mover = Mover(_flow(gpu, 0.02, 0.002))
    Turns({("a", "save"): mover}).run(Loop("any", 0.5), 1, "any")
    assert calls == [3] and mover.slowdowns == pytest.approx([1.11], abs=0.02)


def test_no_control_is_no_end(gpu: _Gpu) -> None:
    every = Turns({"a": Mover(_flow(gpu, 0.02, 0.0))})  # type: ignore[dict-item]
    every.nothing.flow = _flow(gpu, 0.4, 0.0)
    gpu.step = 1e-5
    every.run(Loop("any", 0.5), 2, "any")
    assert every.control() == {} and not every.failed and len(every.movers["a"].slowdowns) == 2  # type: ignore[index]


def test_who_cannot_prepare_takes_no_more_turns_either(gpu: _Gpu) -> None:
    def broken() -> None:
        raise TransferError("no block was saved")

    gpu.step = 1e-5
    movers = {"broken": Mover(_flow(gpu, 0.02, 0.0), broken), "good": Mover(_flow(gpu, 0.02, 0.0))}
    every = Turns(movers)
    every.run(Loop("any", 0.5), 2, "any")
    assert every.failed == {"broken": "no block was saved"} and len(movers["good"].rates) == 2
