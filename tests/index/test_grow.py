"""Slots that come later: neither free nor anything else before, and like all others afterwards."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex import PoolFullError
from kvortex.index import BlockIndex
from kvortex.index._check import first_problem
from kvortex.index._lines import RESERVED, STATE
from kvortex.index.core import N_ABSENT
from tests.pages import keys_of


def fill(index: BlockIndex, first: int, count: int) -> list[int]:
    slots = index.reserve(keys_of(*range(first, first + count))).slots
    index.commit(slots)
    index.check()
    return slots.tolist()


def test_slots_are_handed_out_when_they_are_there() -> None:
    index = BlockIndex(10, ready=3)
    index.check()
    assert index.counts()[:4] == (3, 3, 0, 0) and index.ready == 3
    assert fill(index, 0, 3) == [0, 1, 2]
    with pytest.raises(PoolFullError, match="4 slots asked for: 0 of 3 are free, 3 may be evicted"):
        index.reserve(keys_of(*range(10, 14)))
    index.grow(7)
    index.check()
    assert index.counts()[:4] == (7, 4, 0, 3) and index.ready == 7
    assert fill(index, 10, 4) == [3, 4, 5, 6] and index.counts().evictions == 0
    assert len(fill(index, 20, 2)) == 2 and index.counts().evictions == 2
    index.grow(10)
    assert fill(index, 30, 3) == [7, 8, 9] and index.counts()[:4] == (10, 0, 0, 10)


def test_slots_never_go_and_nothing_grows_twice() -> None:
    index = BlockIndex(10, ready=4)
    for ready in (2, 4, 6, 6, 3, 99, 10):
        index.grow(ready)
        index.check()
    assert index.ready == 10 and index.counts().free == 10
    assert sorted(fill(index, 0, 10)) == list(range(10))


@pytest.mark.parametrize(("counter", "problem"), [(4, 8), (7, 7), (-1, 7), (11, 7)])
def test_damage_is_seen(counter: int, problem: int) -> None:
    index = BlockIndex(10, ready=5)
    index._table.counters[N_ABSENT] = counter
    if counter == 4:  # as many free slots as counted, and one of them is not there
        index._table.counters[N_ABSENT] = 5
        index._table.stack[2] = 7
    assert first_problem(index._table)[0] == problem


def test_a_state_on_a_slot_that_is_not_there() -> None:
    index = BlockIndex(10, ready=5)
    index._table.shorts[8, STATE] = RESERVED
    assert first_problem(index._table) == (2, 8)


def test_all_are_there_unless_somebody_says_otherwise() -> None:
    index = BlockIndex(4)
    assert index.ready == 4 and np.array_equal(sorted(fill(index, 0, 4)), range(4))
