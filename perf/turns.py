"""What moves beside a load, by turns, and what that costs the load.

Two transfers at a time of each kind run in one span of an endless loop (:class:`perf.loads.Loop`); the rate is that at which
they end, but for the first few, which fill staging buffers. In the next span the last ones end, and what moves next is
prepared; in the one behind that nothing moves. The slowdown is the time of the first against those in which nothing moves,
before and behind it: two thirds of the one, which is a span away, and a third of the other, which is two away. Clocks wander by
a percent or two from span to span: so all that is to be compared takes turns, in many rounds. In one more turn of each round
nothing moves: what that seems to cost, no slowdown can be told from.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvortex.errors import TransferError
from perf.flow import TwoInFlight, copies
from perf.loads import Loop
from perf.pages import WAYS
from perf.raw import RawCopy
from perf.report import progress

PRIMING = 3  # transfers that are not counted
_NAP_S, _STILL_S = 1e-4, 5e-3
_NOTHING = "nothing", "still"


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
    nothing : Mover
        Of nothing, for each round.
    failed : dict
        Why one takes no more turns: it may be too slow beside the loop, and the others still count.
    """

    movers: Mapping[tuple[Any, str], Mover]
    nothing: Mover = field(default_factory=lambda: Mover(_still()))
    failed: dict[tuple[Any, str], str] = field(default_factory=dict)

    def run(self, loop: Loop, rounds: int, name: str) -> None:
        """So many turns of each, beside a load with that name."""
        loop.start()
        taken: list[tuple[Mover, int, int]] = []  # who, in which span, and the one before in which nothing moved
        for at in range(rounds):
            progress(f"beside {name}, round {at + 1} of {rounds}")
            for key, mover in {_NOTHING: self.nothing, **self.movers}.items():
                if key in self.failed:
                    continue
                try:
                    mover.prepare()
                    idle = nothing_moves(loop)
                    rate = beside(loop, mover.flow)
                except TransferError as error:
                    self.failed[key] = str(error)
                    loop.start()
                else:
                    mover.rates.append(rate)
                    taken.append((mover, idle + 1, idle))
        idle = nothing_moves(loop)
        for mover, span, before in reversed(taken):
            mover.slowdowns.append(_slowdown(loop, span, before, idle))
            idle = before
        progress(f"beside {name}, nothing moves at {self.nothing.slowdown:.4f}")

    def control(self) -> dict[str, float]:
        """What it seems to cost where nothing moves: the median, and that of all rounds."""
        found = self.nothing.slowdowns
        return {"slowdown": self.nothing.slowdown, "slowdown_least": min(found), "slowdown_most": max(found)}

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


def _still() -> TwoInFlight:
    """Transfers of nothing."""

    def nap() -> int:
        time.sleep(_STILL_S)
        return 1

    return TwoInFlight(lambda: (lambda: True, nap))


def nothing_moves(loop: Loop) -> int:
    """Waits for the end of a span that has not begun yet; its number."""
    loop.running(loop.span)
    span = loop.span + 1
    while loop.running(span):
        time.sleep(_NAP_S)
    return span


def beside(loop: Loop, flow: TwoInFlight) -> float:
    """GB/s of one flow in the span of the loop that has just begun; nothing runs any more when this returns.

    A load ends when a kernel of the loop does, which may be some milliseconds later than it could: so the rate is that of the
    straight line through all ends, and not from the first to the last of them.
    """
    span, ends = loop.span, []
    try:
        for _ in range(PRIMING):  # what counts is how it goes on
            flow()
            loop.running(span)
        moved, at, began = 0, 0.0, time.perf_counter()
        while loop.running(span):
            ends.append((at, moved))
            moved += flow()
            at = time.perf_counter() - began
    finally:
        flow.drain()
    loop.running(span)
    ends.append((at, moved))
    if not moved:
        raise TransferError("transfers did not end soon enough beside the computation that they were measured with")
    return float(np.polyfit(*zip(*ends, strict=True), 1)[0]) / 1e9


def _slowdown(loop: Loop, span: int, before: int, after: int) -> float:
    """The time of a span to that which it would have taken between two others, if clocks fell or rose evenly."""
    weight = (span - before) / (after - before)
    return loop.seconds(span) / ((1 - weight) * loop.seconds(before) + weight * loop.seconds(after))
