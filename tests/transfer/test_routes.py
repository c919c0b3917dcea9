"""Which route a transfer takes: by the rankings of a profile, of what a layout and a device allow."""

from __future__ import annotations

from typing import Any

import pytest

from kvortex.transfer.executor import Direction
from kvortex.transfer.profiles.profile import guess
from kvortex.transfer.routes import Ability, Ranking, Route, choose, tabulate
from tests.transfer.profiles import H100

KIB, MUCH = 1 << 10, 1 << 30


def both(
    fragment: int, nbytes: int, busy: bool, layerwise: bool = False, profile: Any = H100, **ability: bool
) -> tuple[Route, Route]:
    """Of a save and of a load."""
    able = Ability(fragment, **{"strided": False, "batched": False, "resident": True, "deep": False} | ability)
    save, load = (
        choose(tabulate(profile.rankings, able), direction, nbytes, beside_compute=busy, layerwise=layerwise)
        for direction in Direction
    )
    return save, load


def of(*kind: Any, **options: Any) -> Route:
    """The same of both."""
    save, load = both(*kind, **options)
    assert save is load, "a guess knows no difference"
    return save


def test_what_is_guessed_of_an_idle_gpu() -> None:
    every = {"strided": True, "batched": True, "deep": True}
    assert of(4 * KIB, MUCH, False, **every) is of(64 * KIB, MUCH, False, **every) is Route.RESIDENT
    assert of(4 * KIB, MUCH, False, resident=False) is Route.STAGED
    assert of(16 * KIB, 2 << 20, False, strided=True) is Route.STRIDED and of(16 * KIB, 2 << 20, False) is Route.MAPPED
    assert of(32 * KIB, MUCH, False, strided=True) is Route.RESIDENT
    assert of(4 * KIB, 4 << 20, False, strided=True) is Route.MAPPED, "lines are short"
    assert of(4 * KIB, 4 << 20, False) is Route.MAPPED and of(4 * KIB, (4 << 20) + 1, False) is Route.RESIDENT


def test_what_is_guessed_beside_a_computing_model() -> None:
    assert of(32 * KIB, MUCH, True, strided=True) is of(32 * KIB, 2 << 20, True, strided=True) is Route.STRIDED
    assert of(4 * KIB, MUCH, True, strided=True) is of(32 * KIB, MUCH, True) is Route.RESIDENT
    assert of(4 * KIB, 2 << 20, True, strided=True) is Route.MAPPED
    assert of(4 * KIB, MUCH, True, deep=True) is Route.STAGED, "a launch takes nothing from the next kernel"
    assert of(4 * KIB, MUCH, True, deep=True, resident=False) is of(4 * KIB, MUCH, True, resident=False) is Route.STAGED
    assert of(18 * KIB, MUCH, True, strided=True) is Route.STRIDED
    assert of(18 * KIB, MUCH, True, strided=True, deep=True) is Route.STAGED
    assert of(32 * KIB, MUCH, True, strided=True, deep=True) is Route.STAGED, "copy engines lose more beside models"


def test_when_batches_are_guessed_to_be_best() -> None:
    assert of(64 * KIB, MUCH, True, batched=True) is Route.BATCHED, "long, and nowhere evenly spaced"
    assert of(64 * KIB, MUCH, True, batched=True, strided=True) is Route.STRIDED
    assert of(64 * KIB, MUCH, True, batched=True, strided=True, deep=True) is Route.STAGED
    assert of(64 * KIB, 1 << 20, True, batched=True) is Route.BATCHED
    assert of(64 * KIB, MUCH, True) is of(64 * KIB - 1, MUCH, True, batched=True) is Route.RESIDENT
    assert of(64 * KIB, MUCH, False, batched=True) is Route.RESIDENT


@pytest.mark.parametrize("fragment", [4 * KIB, 18 * KIB, 64 * KIB, 1 << 20])
def test_one_dma_for_all_layers_is_no_use_to_who_waits_for_the_first(fragment: int) -> None:
    every = {"strided": True, "batched": True}
    assert both(fragment, 2 << 20, False, layerwise=True, **every) == (Route.MAPPED, Route.MAPPED)
    assert of(fragment, MUCH, True, layerwise=True, **every) is Route.RESIDENT
    assert of(fragment, MUCH, True, layerwise=True, **every, deep=True) is Route.STAGED
    assert of(fragment, MUCH, True, layerwise=True, **every, resident=False) is Route.STAGED


def test_each_direction_has_rankings_of_its_own_by_length_and_payload() -> None:
    rows = []
    for direction in Direction:
        for beside in (False, True):
            rows.append(Ranking(direction, beside, 0, 0, (Route.STAGED,)))
    rows += [
        Ranking(Direction.LOAD, False, 100, 0, (Route.MAPPED, Route.STAGED)),
        Ranking(Direction.LOAD, False, 100, 50, (Route.RESIDENT, Route.STAGED)),
        Ranking(Direction.LOAD, False, 200, 0, (Route.STRIDED, Route.BATCHED, Route.STAGED)),
    ]

    def load(fragment: int, nbytes: int, **ability: bool) -> Route:
        able = Ability(fragment, **{"strided": True, "batched": True, "resident": True, "deep": True} | ability)
        table = tabulate(rows[::-1], able)
        assert choose(table, Direction.SAVE, nbytes, beside_compute=False) is Route.STAGED
        assert choose(table, Direction.LOAD, nbytes, beside_compute=True) is Route.STAGED
        return choose(table, Direction.LOAD, nbytes, beside_compute=False)

    assert load(99, 1000) is Route.STAGED
    assert load(100, 49) is Route.MAPPED and load(199, 50) is load(100, 1000) is Route.RESIDENT
    assert load(100, 1000, resident=False) is Route.STAGED
    assert load(200, 1) is load(1000, 1000) is Route.STRIDED
    assert load(200, 1, strided=False) is Route.BATCHED and load(200, 1, strided=False, batched=False) is Route.STAGED


def test_shallow_staging_comes_behind_all_but_kernels_over_the_link() -> None:
    order = (Route.STAGED, Route.RESIDENT, Route.MAPPED)
    rows = [Ranking(direction, beside, 0, 0, order) for direction in Direction for beside in (False, True)]
    for deep, resident, wanted in ((True, True, Route.STAGED), (False, True, Route.RESIDENT), (False, False, Route.STAGED)):
        table = tabulate(rows, Ability(0, strided=True, batched=True, resident=resident, deep=deep))
        assert choose(table, Direction.SAVE, 1, beside_compute=True) is wanted
        assert choose(table, Direction.SAVE, 1, beside_compute=False) is Route.STAGED


@pytest.mark.parametrize("routes", [(), (Route.RESIDENT,), (Route.DIRECT, Route.STAGED), (Route.STAGED, Route.STAGED)])
def test_rankings_that_cannot_be(routes: tuple[Route, ...]) -> None:
    with pytest.raises(ValueError, match="a ranking of"):
        Ranking(Direction.SAVE, False, 0, 0, routes)
    with pytest.raises(ValueError, match="less than nothing"):
        Ranking(Direction.SAVE, False, 0, -1, (Route.STAGED,))


def test_a_slower_link_makes_shorter_lines_worth_it() -> None:
    slow = guess(16e9, 40)
    assert of(4 * KIB, MUCH, True, profile=slow, strided=True) is Route.STRIDED
    assert of(4 * KIB, 2 << 20, False, profile=slow) is Route.RESIDENT
