"""What invented measurements say: which route is the best one, and from where on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvortex.transfer.executor import Direction
from kvortex.transfer.profiles.measurements import (
    Measurement,
    first_of_the_best,
    least_short,
    long_enough,
    rank,
    seconds_each,
    shortfall,
)
from kvortex.transfer.profiles.profile import guess
from kvortex.transfer.routes import Ability, Ranking, Route, choose, tabulate

S, R, L, B, M = Route.STAGED, Route.RESIDENT, Route.STRIDED, Route.BATCHED, Route.MAPPED
LINK = {Direction.SAVE: 50.0, Direction.LOAD: 40.0}


def rows(
    fragment: int, nbytes: int, shares: dict[Route, float], slowdowns: dict[Route, float] | None = None
) -> list[Measurement]:
    """The same in both directions, as shares of the link's rate."""
    return [
        Measurement(d, fragment, nbytes, route, share * LINK[d], None if slowdowns is None else slowdowns[route])
        for d in Direction
        for route, share in shares.items()
    ]


def order(table: list[Measurement], beside: bool, direction: Direction = Direction.SAVE) -> list[tuple[int, int, str]]:
    """From which length and payload on which routes, by their first letters; t for strided."""
    letters = {S: "s", R: "r", L: "t", B: "b", M: "m"}
    return [
        (row.fragment_bytes, row.nbytes, "".join(letters[route] for route in row.routes))
        for row in rank(table, LINK)
        if row.direction is direction and row.beside_compute is beside
    ]


def test_the_fastest_is_the_best_of_an_idle_gpu() -> None:
    table = rows(100, 1000, {S: 0.96, R: 0.99, L: 0.6, B: 0.1, M: 0.93})
    assert order(table, False) == order(table, False, Direction.LOAD) == [(0, 0, "rsmtb")]


def test_of_equals_the_one_that_needs_the_fewest_multiprocessors() -> None:
    assert order(rows(1, 1, {M: 0.98, R: 0.984, S: 0.982, B: 0.981, L: 0.979}), False) == [(0, 0, "tbsrm")]
    assert order(rows(1, 1, {M: 0.95, R: 0.99, S: 0.98, B: 0.97, L: 0.96}), False) == [(0, 0, "rsbtm")]


def test_what_was_measured_stands_for_what_is_near_it() -> None:
    table = [row for f in (100, 400) for n in (1000, 9000) for row in rows(f, n, {S: 0.5, R: 0.9 if n > 1000 else 0.4})]
    assert order(table, False) == [(0, 0, "sr"), (0, 3000, "rs"), (200, 0, "sr"), (200, 3000, "rs")]


def test_directions_are_ranked_by_their_own_measurements() -> None:
    table = [row for row in rows(1, 1, {S: 0.5, R: 0.9}) if row.direction is Direction.SAVE]
    table += [row for row in rows(1, 1, {S: 0.9, R: 0.5}) if row.direction is Direction.LOAD]
    assert order(table, False) == [(0, 0, "rs")] and order(table, False, Direction.LOAD) == [(0, 0, "sr")]


@pytest.mark.parametrize(
    ("beside", "best"),
    [
        ({S: (0.91, 1.00), R: (0.95, 1.08), L: (0.60, 1.00)}, "srt"),
        ({S: (0.91, 1.00), R: (0.95, 1.02), L: (0.97, 1.00)}, "srt"),
        ({S: (0.99, 1.02), R: (0.99, 1.00), L: (0.99, 1.00)}, "srt"),  # beside a model copy engines have less of the link
        ({S: (0.70, 1.02), R: (0.80, 1.20), L: (0.96, 1.00)}, "tsr"),
        ({S: (0.91, 1.01), R: (0.91, 1.02), L: (0.93, 1.02)}, "srt"),  # enough, and the model pays less
        ({S: (0.97, 1.034), R: (0.98, 1.03), L: (0.60, 1.01)}, "srt"),  # equals, and one keeps multiprocessors
        ({S: (0.97, 1.06), R: (0.98, 1.03), L: (0.60, 1.01)}, "rst"),
        ({S: (0.30, 1.00), R: (0.92, 1.08), L: (0.62, 1.01)}, "rts"),
        ({S: (0.30, 1.00), R: (0.92, 1.50), L: (0.62, 1.01)}, "trs"),
        ({S: (0.895, 1.00), R: (0.99, 1.04), L: (0.10, 1.00)}, "srt"),
    ],
)
def test_beside_a_computation_a_full_link_that_costs_nothing(beside: dict[Route, tuple[float, float]], best: str) -> None:
    idle = rows(1, 1, dict.fromkeys((S, R, L), 0.99))
    busy = rows(1, 1, {r: share for r, (share, _) in beside.items()}, {r: slow for r, (_, slow) in beside.items()})
    assert order(idle + busy, True) == order(idle + busy, True, Direction.LOAD) == [(0, 0, best)]


def test_routes_that_were_not_measured_beside_a_computation_come_last() -> None:
    idle = rows(1, 1, {S: 0.9, R: 0.99, L: 0.3, B: 0.2, M: 0.95})
    assert order(idle + rows(1, 1, {S: 0.4, R: 0.8}, {S: 1.0, R: 1.3}), True) == [(0, 0, "rsmtb")]


def test_a_short_transfer_beside_a_computation_starts_at_once_where_it_can() -> None:
    """A kernel would first wait for the model's."""
    small = rows(1, 1000, {S: 0.5, R: 0.4, L: 0.45, B: 0.1, M: 0.8})
    large = rows(1, 4000, {S: 0.9, R: 0.99, L: 0.7, B: 0.2, M: 0.9})
    busy = rows(1, 4000, {S: 0.9, R: 0.9, L: 0.6}, {S: 1.0, R: 1.1, L: 1.0})
    assert order(small + large + busy, True) == [(0, 0, "tmsrb"), (0, 2000, "srtmb")]
    slow = rows(1, 1000, {S: 0.5, R: 0.4, L: 0.39, B: 0.1, M: 0.8})
    assert order(slow + large + busy, True)[0] == (0, 0, "msrtb"), "but not at less than half of the rate"


def test_staging_is_always_there_to_fall_back_on() -> None:
    assert order(rows(1, 1, {R: 0.9}), False) == order(rows(1, 1, {R: 0.9}), True) == [(0, 0, "rs")]


def test_rankings_are_for_every_transfer() -> None:
    """A profile refuses others."""
    table = [row for f in (10, 100, 1000) for n in (5000, 90_000) for row in rows(f, n, {S: 0.5, R: 0.9})]
    found = rank(table, LINK)
    profile = replace(guess(None, 8), rankings=found)
    for fragment in (0, 1, 99, 10**9):
        able = Ability(fragment, strided=True, batched=True, resident=True, deep=True)
        choices = tabulate(profile.rankings, able)
        for direction in Direction:
            for nbytes in (0, 1, 10**12):
                assert choose(choices, direction, nbytes, beside_compute=False) is R
    assert all(isinstance(row, Ranking) for row in found)


def test_the_measure_of_a_route_beside_a_computation() -> None:
    assert shortfall(0.9, 1.03) == shortfall(1.0, 0.9) == 0
    assert shortfall(0.8, 1.0) == pytest.approx(0.1) and shortfall(0.8, 1.13) == pytest.approx(0.2)


def test_the_first_of_those_that_fall_short_of_least() -> None:
    found = {1: 2 * [(0.5, 1.0)], 2: [(0.9, 1.035), (0.9, 1.0)], 4: 2 * [(0.95, 1.0)], 8: 2 * [(0.99, 1.2)]}
    assert least_short(found) == 2, "less than one percent is no difference"
    found[2] = [(0.9, 1.03), (0.8, 1.0)]
    assert least_short(found) == 4, "both directions count"


def test_the_first_of_those_that_are_as_good_as_the_best() -> None:
    assert first_of_the_best({"a": 97.0, "b": 99.7, "c": 100.0}, 0.005) == "b"
    assert first_of_the_best({"a": 97.0, "b": 99.7, "c": 100.0}, 0.0) == "c"


def test_how_long_a_copy_is_to_be() -> None:
    assert long_enough({512: 48.0, 64: 20.0, 128: 44.9, 256: 45.1}, 50.0) == 256
    assert long_enough({64: 20.0, 128: 30.0}, 50.0) == 128


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_transfers_that_end_in_pairs_are_no_faster_than_those_that_end_one_by_one(first: float) -> None:
    """Two ends of a pair and the first of the next are three transfers in the time of two."""
    one_by_one = [first + 5 * k for k in range(5)]
    in_pairs = [4.9, 5.0, 14.9, 15.0, 24.9][int(first) :]
    assert seconds_each(one_by_one, 24.0) == 5.0
    assert seconds_each(in_pairs, 26.0) == pytest.approx(5.0)
    assert seconds_each(reversed(in_pairs), 26.0) == pytest.approx(5.0), "in any order"


@pytest.mark.parametrize(("ends", "seconds"), [([], 48.0), ([3.0], 24.0), ([3.0, 3.1], 12.0)])
def test_of_few_transfers_that_ended_only_their_number_counts(ends: list[float], seconds: float) -> None:
    assert seconds_each(ends, 24.0) == seconds
