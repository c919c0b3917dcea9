"""Keys that a caller chose: spread over the buckets, and told apart where they meet in one."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex.index import NEW, BlockIndex
from kvortex.index._hash import bucket_count, home


def words(count: int, word: int, shift: int) -> np.ndarray:
    rows = np.zeros((count, 4), np.uint64)
    rows[:, word] = np.arange(count, dtype=np.uint64) << np.uint64(shift)
    return rows


@pytest.mark.parametrize("word", range(4))
@pytest.mark.parametrize("shift", [0, 20, 40, 54])
def test_keys_that_count_in_one_place_are_spread(word: int, shift: int) -> None:
    rows = words(1000, word, shift)
    mask = bucket_count(1000) - 1
    load = np.bincount([home(rows, row, mask) for row in range(1000)])
    assert load.max() <= 8  # a random function gives at most 6 or 7


def test_differences_in_several_words_do_not_cancel() -> None:
    """Every choice of the three highest bits of each word: what a product of odd factors only moves upwards."""
    rows = np.array([[(row >> 3 * word & 7) << 61 for word in range(4)] for row in range(4096)], np.uint64)
    mask = bucket_count(4096) - 1
    assert np.bincount([home(rows, row, mask) for row in range(4096)]).max() <= 8


@pytest.mark.parametrize("word", range(4))
def test_keys_of_one_bucket_are_told_apart(word: int) -> None:
    """Keys that differ in one word and start their search in the last bucket: every probe is long and wraps around."""
    index = BlockIndex(16)
    mask = index._table.buckets.size - 1
    rows = words(4000, word, 0)
    same = rows[[home(rows, row, mask) == mask for row in range(4000)]][:40].view(np.uint8)
    assert len(same) == 40
    rng = np.random.default_rng(1)
    present: set[int] = set()
    for _ in range(400):
        chosen = rng.permutation(40)[: rng.integers(1, 5)]
        if rng.random() < 0.5 and len(present | set(chosen.tolist())) <= 16:
            slots, status, _ = index.reserve(same[chosen])
            index.commit(slots[status == NEW])
            present |= set(chosen.tolist())
        else:
            assert index.drop(same[chosen]) == len(present & set(chosen.tolist()))
            present -= set(chosen.tolist())
        assert set(np.flatnonzero(index.lookup(same)).tolist()) == present
        index.check()
