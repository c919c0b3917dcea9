"""What measurements of routes say: pure functions of tables of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from kvortex.transfer.executor import Direction
from kvortex.transfer.routes import Ranking, Route

ENOUGH, BEARABLE = 0.9, 1.03  # of the link's rate, and times a computation's time: beyond, transfers need not be better
# Of the link's rate, by which a route of copy engines counts for less than was measured: beside attention and a model's layers
# loads of 32 KiB in batches had 0.87 and 0.83 of the link that had 1.0 beside a calibration's computation. Strided saves had
# 0.07 less; they count for as little, since what digests their blocks is a kernel too and spares a model little
# (docs/transfers.md).
_LESS_BESIDE_MODELS = 0.15
_EQUAL = 0.01  # of the link's rate: less than that comes and goes from run to run
_ALIKE = 0.02  # of what is missed beside a computation: so much comes and goes too
# What a kernel that keeps multiprocessors costs beyond what was measured: a calibration's computation is shared out anew among
# CTAs that find room, and a GEMM of a CTA a multiprocessor took 1.07 to 1.13 of its time (docs/transfers.md).
_KEEPS = 0.06
_SLOW = 0.5  # of the fastest rate: a copy engine that is slower than that is not worth having a multiprocessor spared
# Fewest multiprocessors first, which decides between equals.
_SPARING = (Route.STRIDED, Route.BATCHED, Route.STAGED, Route.RESIDENT, Route.MAPPED)
COPY_ENGINES_ONLY = frozenset({Route.STRIDED, Route.BATCHED})
_T = TypeVar("_T")


@dataclass(frozen=True)
class Measurement:
    """How one route did.

    Parameters
    ----------
    direction, fragment_bytes, nbytes, route
        What moved: fragments of one length, so many bytes a transfer.
    rate
        Bytes per second.
    slowdown
        Time of a computation beside it over its time alone; None where there was none.
    """

    direction: Direction
    fragment_bytes: int
    nbytes: int
    route: Route
    rate: float
    slowdown: float | None = None


def shortfall(share: float, slowdown: float) -> float:
    """By how much a route misses ``ENOUGH`` of the link's rate and ``BEARABLE`` cost to a computation, taken together."""
    return max(0.0, ENOUGH - share) + max(0.0, slowdown - BEARABLE)


def least_short(found: Mapping[_T, Iterable[tuple[float, float]]]) -> _T:
    """The first of the keys whose pairs (share of the link's rate, slowdown), one a direction, fall short of least."""

    def cost(key: _T) -> float:
        return sum(shortfall(*pair) for pair in found[key])

    least = min(map(cost, found))
    return next(key for key in found if cost(key) <= least + _EQUAL)


def first_of_the_best(rates: Mapping[_T, float], tolerance: float) -> _T:
    """The first of the keys whose rate is the highest, but for a ``tolerance``, as a share of it."""
    best = max(rates.values())
    return next(key for key in rates if rates[key] >= (1 - tolerance) * best)


def long_enough(rates: Mapping[int, float], link: float) -> int:
    """The least length of copies whose rate is enough; the longest where none is."""
    return next((nbytes for nbytes in sorted(rates) if rates[nbytes] >= ENOUGH * link), max(rates))


def seconds_each(ends: Iterable[float], span: float) -> float:
    """How long each transfer takes of a row of them, two in flight, that ended at these times in a span of so many seconds.

    Two that are in flight may share the link and end together, and whether the first end or the last of a row is that of such a
    pair's first or second is chance. So time is taken from each end to the next but one. Of fewer than three ends nothing can
    be said but how many they are: they are slow.
    """
    ordered = sorted(ends)
    pairs = [last - first for first, last in zip(ordered, ordered[2:], strict=False)]
    return max(statistics.median(pairs) / 2 if pairs else span / max(len(ordered), 0.5), 1e-9)


def rank(table: Iterable[Measurement], link: Mapping[Direction, float]) -> tuple[Ranking, ...]:
    """Rankings of routes.

    With the GPU idle the fastest one is the best. Beside a computation it is, of long transfers, the one that comes closest to
    ``ENOUGH`` of the link at no cost, and of equals none whose kernel keeps multiprocessors; and of the rest the fastest
    without a kernel, if it is not slow: a kernel would first wait for the model's. What copy engines have of the link beside a
    computation counts for ``_LESS_BESIDE_MODELS`` less.

    Parameters
    ----------
    table
        With the GPU idle, of each direction the same routes at each length and payload; beside a computation at each
        length the largest payload, of those routes that are worth it.
    link
        Bytes per second of one long DMA each way.
    """
    rows = list(table)
    found: list[Ranking] = []
    for direction in Direction:
        mine = [row for row in rows if row.direction is direction]
        for fragment, from_fragment in _bounds(row.fragment_bytes for row in mine):
            of_length = [row for row in mine if row.fragment_bytes == fragment]
            beside = {row.route: row for row in of_length if row.slowdown is not None}
            bounds = _bounds(row.nbytes for row in of_length)
            for nbytes, from_nbytes in bounds:
                these = [row for row in of_length if row.nbytes == nbytes and row.slowdown is None]
                idle = {row.route: row.rate / link[direction] for row in these}
                where = direction, from_fragment, from_nbytes
                found.append(_ranking(*where, False, _fastest(idle)))
                long = (nbytes, from_nbytes) == bounds[-1]
                order = _least_cost(beside, link[direction], idle) if long and beside else _soonest(idle)
                found.append(_ranking(*where, True, order))
    return tuple(found)


def _bounds(values: Iterable[int]) -> list[tuple[int, int]]:
    """Each of the values, and from where on it stands for what is near it: from halfway between it and the one before."""
    ordered = sorted(set(values))
    return [(value, math.isqrt(below * value) if below else 0) for below, value in zip([0, *ordered], ordered, strict=False)]


def _fastest(shares: Mapping[Route, float]) -> list[Route]:
    return sorted(shares, key=lambda route: (-round(shares[route] / _EQUAL), _SPARING.index(route)))


def _soonest(shares: Mapping[Route, float]) -> list[Route]:
    order, best = _fastest(shares), max(shares.values())
    spared = [route for route in order if route in COPY_ENGINES_ONLY and shares[route] >= _SLOW * best]
    return [*spared, *(route for route in order if route not in spared)]


def _least_cost(beside: Mapping[Route, Measurement], link: float, idle: Mapping[Route, float]) -> list[Route]:
    def cost(route: Route) -> tuple[int, float, float]:
        share, slowdown = beside[route].rate / link, beside[route].slowdown or 1.0
        if route in COPY_ENGINES_ONLY:
            share -= _LESS_BESIDE_MODELS
        paid = slowdown + _KEEPS * (route is Route.RESIDENT) - min(share, ENOUGH)  # more than enough is no gain
        return int(shortfall(share, slowdown) / _ALIKE), paid, -share

    return [*sorted(beside, key=cost), *(route for route in _fastest(idle) if route not in beside)]


def _ranking(direction: Direction, fragment: int, nbytes: int, beside: bool, order: list[Route]) -> Ranking:
    """Staging, which always can run, comes last where it was not measured."""
    return Ranking(direction, beside, fragment, nbytes, tuple(dict.fromkeys([*order, Route.STAGED])))
