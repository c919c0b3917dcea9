"""Rates are those of the time in which all directions ran, and no failure is lost."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from kvortex.devices import HostDevice
from kvortex.errors import TransferError
from perf import flow
from perf.raw import RawCopy


def test_a_rate_is_that_of_the_time_when_all_ran() -> None:
    ten = 10**9
    save = [(float(t), ten) for t in range(10)]
    load = [(3.5, ten), (5.5, 2 * ten), (7.0, ten)]
    assert flow.rates({"save": save, "load": load}) == pytest.approx({"save": 1.0, "load": 3 / 3.5})
    # What ended before the other direction began is not counted, however fast it was.
    before = [(t / 10, ten) for t in range(35)]
    assert flow.rates({"save": before + save[4:], "load": load}) == pytest.approx({"save": 1.0, "load": 3 / 3.5})


@pytest.mark.parametrize("load", [[], [(20.0, 1)], [(3.0, 1)]])
def test_too_few_transfers_are_no_measurement(load: Any) -> None:
    with pytest.raises(TransferError, match="nothing was measured"):
        flow.rates({"save": [(float(t), 1) for t in range(10)], "load": load})


class Transfers:
    """Transfers of 10 bytes that end when they are told to."""

    def __init__(self) -> None:
        self.ended: list[bool] = []
        self.finished: list[int] = []

    def start(self) -> flow.Running:
        at = len(self.ended)
        self.ended.append(False)

        def finish() -> int:
            self.finished.append(at)
            return 10 * (at + 1)

        return lambda: self.ended[at], finish


def test_two_are_in_flight() -> None:
    transfers = Transfers()
    two = flow.TwoInFlight(transfers.start)
    assert two.step() == 0 and len(transfers.ended) == 2
    transfers.ended[1] = True
    assert two.step() == 0 and len(transfers.ended) == 2, "the second one does not overtake the first"
    transfers.ended[0] = True
    assert two.step() == 10 and transfers.finished == [0] and len(transfers.ended) == 3
    assert two.step() == 20
    two.drain()
    assert transfers.finished == [0, 1, 2, 3]


def test_a_call_waits_for_the_one_before() -> None:
    transfers = Transfers()
    two = flow.TwoInFlight(transfers.start)
    assert [two() for _ in range(4)] == [0, 10, 20, 30] and transfers.finished == [0, 1, 2]
    two.drain()
    assert transfers.finished == [0, 1, 2, 3]


def test_both_directions_of_raw_copies() -> None:
    raws = [RawCopy(HostDevice(), 1 << 20) for _ in range(2)]
    flows = {"load": flow.copies(raws[0], to_host=False), "save": flow.copies(raws[1], to_host=True)}
    began = time.monotonic()
    rates = flow.side_by_side(flows, 0.05)
    assert time.monotonic() - began >= 0.05
    assert set(rates) == {"save", "load"} and min(rates.values()) > 0
    for raw in raws:
        raw.close()


def test_what_runs_is_waited_for_after_a_failure() -> None:
    good, bad, calls = Transfers(), Transfers(), []

    def start() -> flow.Running:
        calls.append(1)
        if len(calls) > 2:
            raise TransferError("refused")
        return bad.start()

    flows = {"good": flow.TwoInFlight(good.start), "bad": flow.TwoInFlight(start)}
    ender = threading.Timer(0.05, lambda: bad.ended.__setitem__(0, True))
    ender.start()
    with pytest.raises(TransferError, match="refused"):
        flow.side_by_side(flows, 0.5)
    ender.join()
    assert good.finished == [0, 1] and bad.finished == [0, 1]


def test_all_are_waited_for_where_several_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = Transfers()

    def start() -> flow.Running:
        ended, finish = transfers.start()

        def fails() -> int:
            raise TransferError(f"number {finish()} failed")

        return ended, fails

    flows = {"a": flow.TwoInFlight(start), "b": flow.TwoInFlight(start)}
    monkeypatch.setattr(flow, "LEAST_TRANSFERS", 0)
    with pytest.raises(TransferError, match="number"):
        flow.side_by_side(flows, 0.01)
    assert sorted(transfers.finished) == [0, 1, 2, 3], "each one that was started"


def test_threads_end_when_one_fails() -> None:
    def fails() -> int:
        raise TransferError("lost")

    def works() -> int:
        time.sleep(1e-3)
        return 1

    with pytest.raises(TransferError, match="lost"):
        flow.at_once({"a": works, "b": fails}, 60)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("perf-")]


def test_threads_go_on_until_enough_has_ended() -> None:
    calls: list[int] = []

    def slow() -> int:
        time.sleep(0.02)
        calls.append(1)
        return 10**6

    def fast() -> int:
        time.sleep(1e-3)
        return 10**6

    rates = flow.at_once({"slow": slow, "fast": fast}, 0.0)
    assert len(calls) >= flow.LEAST_TRANSFERS and 0.01 < rates["slow"] < 0.06 < rates["fast"] * 2
