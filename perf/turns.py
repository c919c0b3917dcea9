"""What moves beside a load, by turns, and what that costs the load.

Two transfers at a time of each kind run in one span of an endless loop (:class:`perf.loads.Loop`); the rate is that at which
they end, but for the first few, which fill staging buffers. In the next span the last ones end, and what moves next is
prepared; in the one behind that nothing moves. The slowdown is the time of the first against those in which nothing moves,
before and behind it: two thirds of the one, which is a span away, and a third of the other, which is two away. Clocks wander by
a percent or two from span to span: so all that is to be compared takes turns, in many rounds. In one more turn of each round
nothing moves: what that seems to cost, no slowdown can be told from.
"""

from __future__ import annotations

import contextlib
import itertools
import random
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
_STILL_S = 5e-3
_NOTHING = "nothing", "still"
_STARTS = 3


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

    def cost(self) -> dict[str, float]:
        """The slowdown, and the least and the largest of all rounds."""
        return {"slowdown": self.slowdown, "slowdown_least": min(self.slowdowns), "slowdown_most": max(self.slowdowns)}


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
        """So many turns of each, beside a load with that name; in each round in another order, since who moves behind somebody
        finds a GPU that he has left warmer, or cooler."""
        _start(loop)
        taken, idle = list[tuple[Mover, int]](), list[int]()  # who, and the span before; spans in which nothing moved
        everybody = {_NOTHING: self.nothing, **self.movers}
        for at in range(rounds):
            progress(f"beside {name}, round {at + 1} of {rounds}")
            for key in random.Random(at).sample(list(everybody), len(everybody)):
                if key in self.failed:
                    continue
                mover = everybody[key]
                try:
                    mover.prepare()
                    idle.append(nothing_moves(loop))
                    rate = beside(loop, mover.flow)
                except TransferError as error:
                    if key != _NOTHING:
                        self.failed[key] = str(error)
                    _start(loop)
                else:
                    mover.rates.append(rate)
                    taken.append((mover, idle[-1]))
        with contextlib.suppress(TransferError):  # then the last turn has no such span behind it
            idle.append(nothing_moves(loop))
        behind = dict(itertools.pairwise(idle))
        for mover, before in taken:
            mover.slowdowns.append(_slowdown(loop, before + 1, before, behind.get(before)))
        if self.nothing.slowdowns:
            progress(f"beside {name}, nothing moves at {self.nothing.slowdown:.4f}")

    def control(self) -> dict[str, float]:
        """What it seems to cost where nothing moves: the median, and that of all rounds; empty where there is none."""
        return self.nothing.cost() if self.nothing.slowdowns else {}

    def ended(self, kind: Any) -> list[str]:
        """Ways of a kind that there are :meth:`figures` of."""
        return [way for way in WAYS if (kind, way) not in self.failed and (None, way) not in self.failed]

    def figures(self, kind: Any, way: str) -> dict[str, Any]:
        """What one mover came to, beside contiguous DMAs."""
        mover, raw = self.movers[kind, way], self.movers[None, way]
        made = {"rate": mover.rate, "ratio": mover.rate / raw.rate, **mover.cost(), "raw_rate": raw.rate}
        return made | {f"raw_{name}": value for name, value in raw.cost().items()}


def _start(loop: Loop) -> None:
    """Starts the loop, once more where this thread was kept from it."""
    for _ in range(_STARTS):
        with contextlib.suppress(TransferError):
            return loop.start()
    loop.start()


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
    loop.wait_for(span)
    return span


def beside(loop: Loop, flow: TwoInFlight) -> float:
    """GB/s of one flow in the span of the loop that has just begun; nothing runs any more when this returns.

    A load ends when a kernel of the loop does, which may be some milliseconds later than it could: so the rate is that of the
    straight line through all ends, whose times are what is uncertain, and not from the first to the last of them.
    """
    span, amounts, times = loop.span, list[int](), list[float]()
    try:
        for _ in range(PRIMING):  # what counts is how it goes on
            flow()
            loop.running(span)
        moved, at, began = 0, 0.0, time.perf_counter()
        while loop.running(span):
            amounts.append(moved)
            times.append(at)
            moved += flow()
            at = time.perf_counter() - began
    finally:
        flow.drain()
    loop.running(span)
    if not moved:
        raise TransferError("transfers did not end soon enough beside the computation that they were measured with")
    return 1e-9 / float(np.polyfit([*amounts, moved], [*times, at], 1)[0])


def _slowdown(loop: Loop, span: int, before: int, after: int | None) -> float:
    """The time of a span to that which it would have taken between two others, if clocks fell or rose evenly; or, where there
    is none behind it, to that of the one before."""
    alone = loop.seconds(before)
    if after is not None:
        alone += (span - before) / (after - before) * (loop.seconds(after) - alone)
    return loop.seconds(span) / alone
