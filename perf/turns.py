"""What moves beside a load, by turns, and what that costs the load.

Two transfers at a time of each kind run in one span of a loop (:class:`perf.loads.Loop`); the rate is that of what ended
meanwhile, but for the first few, which fill staging buffers. The slowdown is the time of this span against the spans before and
after, where nothing moves: two thirds of the one, whose middle is a span away, and a third of the other, which is two away.
Clocks wander by a percent or two from span to span, and what was measured behind a pause differs from what was not: so all that
is to be compared takes turns, in many rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvortex.errors import TransferError
from perf.flow import TwoInFlight, copies
from perf.loads import Loop
from perf.pages import WAYS
from perf.raw import RawCopy
from perf.report import progress

PRIMING = 3  # transfers that are not counted
_NAP_S = 1e-4


@dataclass
class Mover:
    """What one turn moves.

    Parameters
    ----------
    flow
    prepare
        Called before each turn.

    Attributes
    ----------
    rates, slowdowns : list of float
        GB/s, and a load's time beside it to its time alone; one a round.
    """

    flow: TwoInFlight
    prepare: Callable[[], object] = lambda: None
    rates: list[float] = field(default_factory=list)
    slowdowns: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)

    @property
    def slowdown(self) -> float:
        """The median."""
        return statistics.median(self.slowdowns)


def raw_movers(raw: RawCopy) -> dict[tuple[None, str], Mover]:
    """Contiguous DMAs each way, one behind the other without a gap: what all kinds of movers are compared with."""
    movers = {}
    for way in WAYS:
        raw.seconds(to_host=way == "save")  # compiled now, and not beside the loop
        movers[None, way] = Mover(copies(raw, to_host=way == "save"))
    return movers


@dataclass
class Turns:
    """Movers that take turns beside a loop.

    Parameters
    ----------
    movers
        By their kind and way.

    Attributes
    ----------
    failed : dict
        Why one takes no more turns: it may be too slow beside the loop, and the others still count.
    """

    movers: Mapping[tuple[Any, str], Mover]
    failed: dict[tuple[Any, str], str] = field(default_factory=dict)

    def run(self, loop: Loop, rounds: int, name: str) -> None:
        """So many turns of each, beside a load with that name."""
        for at in range(rounds):
            progress(f"beside {name}, round {at + 1} of {rounds}")
            for key, mover in self.movers.items():
                if key not in self.failed:
                    try:
                        mover.prepare()
                        rate, slowdown = beside(loop, mover.flow)
                    except TransferError as error:
                        self.failed[key] = str(error)
                    else:
                        mover.rates.append(rate)
                        mover.slowdowns.append(slowdown)

    def ended(self, kind: Any) -> list[str]:
        """Ways of a kind that there are :meth:`figures` of."""
        return [way for way in WAYS if (kind, way) not in self.failed and (None, way) not in self.failed]

    def figures(self, kind: Any, way: str) -> dict[str, Any]:
        """What one mover came to, beside contiguous DMAs."""
        mover, raw = self.movers[kind, way], self.movers[None, way]
        made = {"rate": mover.rate, "ratio": mover.rate / raw.rate, "slowdown": mover.slowdown}
        made |= {"raw_rate": raw.rate, "raw_slowdown": raw.slowdown}
        made |= {"slowdown_least": min(mover.slowdowns), "slowdown_most": max(mover.slowdowns)}
        return made | {"raw_slowdown_least": min(raw.slowdowns), "raw_slowdown_most": max(raw.slowdowns)}


def beside(loop: Loop, flow: TwoInFlight) -> tuple[float, float]:
    """GB/s of one flow beside the loop, and what that costs the loop."""
    loop.start()
    while loop.running(Loop.BEFORE):
        time.sleep(_NAP_S)
    try:
        for _ in range(PRIMING):  # what counts is how it goes on
            flow()
            loop.running(Loop.BESIDE)
        nbytes, began = 0, time.perf_counter()
        ended = began
        while loop.running(Loop.BESIDE):
            nbytes += flow()
            ended = time.perf_counter()
    finally:
        flow.drain()
    if not nbytes or not loop.running(Loop.DRAIN):
        raise TransferError("transfers did not end soon enough beside the computation that they were measured with")
    times = loop.seconds()
    return nbytes / (ended - began) / 1e9, 3 * times[Loop.BESIDE] / (2 * times[Loop.BEFORE] + times[Loop.AFTER])
