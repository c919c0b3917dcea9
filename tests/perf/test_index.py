"""What the index is compared with does the same, and a wrong answer is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvortex.index import BlockIndex
from perf import index as question
from perf.baselines import dictionary
from perf.baselines.dictionary import DictIndex
from perf.walks import LINE_BYTES, Walks, _chase, reckon

UNIVERSE = 60
KEYS = np.random.default_rng(0).integers(0, 256, (UNIVERSE, 32), dtype=np.uint8)


@pytest.mark.parametrize("capacity", [1, 5, 20])
def test_the_dicts_do_what_the_index_does(capacity: int) -> None:
    rng, index, dicts = np.random.default_rng(capacity), BlockIndex(capacity), DictIndex(capacity)
    held: list[tuple[np.ndarray, list[int]]] = []
    full = 0
    for _ in range(2000):
        chosen = KEYS[rng.permutation(min(UNIVERSE, 2 * capacity + 2))[: rng.integers(1, capacity + 2)]]
        names = question.as_bytes(chosen)
        kind = rng.integers(0, 4)
        if kind == 0 and len(held) < 3:
            held.append((index.acquire(chosen), dicts.acquire(names)))
            assert held[-1][0].tolist() == held[-1][1]
        elif kind == 1 and held:
            slots, others = held.pop(int(rng.integers(0, len(held))))
            index.release(slots)
            dicts.release(others)
        else:
            try:
                slots, status, _ = index.reserve(chosen, 7)
            except Exception:
                full += 1
                with pytest.raises(MemoryError):
                    dicts.reserve(names, 7)
                continue
            assert (slots.tolist(), status.tolist()) == dicts.reserve(names, 7)
            index.commit(slots[status == dictionary.NEW])
            dicts.commit(slots[status == dictionary.NEW].tolist())
        assert index.lookup(KEYS).tolist() == dicts.lookup(question.as_bytes(KEYS))
        assert index.counts().evictions == dicts.evictions
    assert full > 0 and dicts.evictions > 100


def test_the_dicts_refuse_what_the_index_refuses() -> None:
    dicts, names = DictIndex(4), question.as_bytes(KEYS[:3])
    slots, _ = dicts.reserve(names[:2], 5)
    with pytest.raises(ValueError, match="length"):
        dicts.reserve(names, 6)
    with pytest.raises(ValueError, match="once"):
        dicts.reserve([names[2], names[2]], 5)
    dicts.commit(slots)
    with pytest.raises(ValueError, match="not reserved"):
        dicts.commit(slots)


def test_a_wrong_answer_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    lookup, calls = BlockIndex.lookup, [0]

    def wrong(self: BlockIndex, keys: Any) -> Any:
        found = lookup(self, keys)
        calls[0] += 1
        if calls[0] == 3:
            found[-1] ^= True
        return found

    monkeypatch.setattr(BlockIndex, "lookup", wrong)
    rows = question._against_dict(600, "lru", 64, 3)
    assert {row["wrong_bytes"] for row in rows} == {1}


def test_damage_and_what_was_not_given_back_are_counted() -> None:
    filled = question.Filled(100, "arc", 16, dicts=False)
    assert question._damaged(filled.index) == 0
    held = filled.index.acquire(filled.keys[:1])
    assert question._damaged(filled.index) == 1
    filled.index.release(held)
    filled.index._table.counters[0] = 5
    assert question._damaged(filled.index) == 1


def test_residents_are_in_the_order_of_their_last_use_and_not_of_their_slots() -> None:
    filled = question.Filled(1000, "lru", 64, dicts=True)
    there = filled.resident()
    assert filled.index.lookup(there).all() and len(np.unique(there, axis=0)) == 64
    assert not filled.index.lookup(filled.fresh()).any()
    filled.use(there)
    filled.store(filled.fresh())
    gone = np.flatnonzero(~filled.index.lookup(filled.keys))
    assert len(gone) == 64 and np.ptp(gone) > 500
    assert filled.dicts is not None
    assert filled.dicts.lookup(question.as_bytes(filled.keys)) == filled.index.lookup(filled.keys).tolist()


def test_a_chain_goes_through_all_lines() -> None:
    walks = Walks(100 * LINE_BYTES, 10, np.random.default_rng(0))
    assert len({int(_chase(walks._lines, 0, steps)) for steps in range(100)}) == 100
    assert _chase(walks._lines, 0, 100) == 0
    gather, chase = walks.medians(3)
    assert gather > 0 and chase > 0 and reckon(10) != reckon(11)
