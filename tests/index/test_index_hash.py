"""Keys that a caller chose: spread over the buckets, and told apart where they meet in one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.index import NEW, BlockIndex
from kvortex.index._hash import fingerprint, home, tag_of


def words(count: int, word: int, shift: int) -> np.ndarray:
    rows = np.zeros((count, 4), np.uint64)
    rows[:, word] = np.arange(count, dtype=np.uint64) << np.uint64(shift)
    return rows.view(np.int64)


def homes(rows: np.ndarray, buckets: int) -> np.ndarray:
    """Where the search for each key starts."""
    return np.array([home(tag_of(fingerprint(rows, row)), buckets) for row in range(len(rows))])


@pytest.mark.parametrize("word", range(4))
@pytest.mark.parametrize("shift", [0, 20, 40, 54])
def test_keys_that_count_in_one_place_are_spread(word: int, shift: int) -> None:
    rows = words(1000, word, shift)
    for buckets in (2000, 2048, 1999):
        load = np.bincount(homes(rows, buckets), minlength=buckets)
        assert load.max() <= 8 and len(load) == buckets  # a random function gives at most 6 or 7


def test_differences_in_several_words_do_not_cancel() -> None:
    """Every choice of the three highest bits of each word: what a product of odd factors only moves upwards."""
    rows = np.array([[(row >> 3 * word & 7) << 61 for word in range(4)] for row in range(4096)], np.uint64)
    assert np.bincount(homes(rows.view(np.int64), 8192)).max() <= 8
    assert len({fingerprint(rows.view(np.int64), row) for row in range(4096)}) == 4096


@given(key=st.binary(min_size=32, max_size=32), buckets=st.integers(2, 1 << 31))
def test_a_search_starts_at_a_bucket(key: bytes, buckets: int) -> None:
    tag = tag_of(fingerprint(np.frombuffer(key, np.int64).reshape(1, 4).copy(), 0))
    assert 0 <= tag < 1 << 31 and 0 <= home(tag, buckets) < buckets
    assert home((1 << 31) - 1, buckets) == buckets - 1 and home(0, buckets) == 0


@pytest.mark.parametrize("word", range(4))
def test_keys_of_one_bucket_are_told_apart(word: int) -> None:
    """Keys that differ in one word and start their search in the last bucket: every probe is long and wraps around."""
    index = BlockIndex(16)
    buckets = index._table.buckets.size
    rows = words(4000, word, 0)
    same = rows[homes(rows, buckets) == buckets - 1][:40].view(np.uint8)
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


def test_keys_of_one_hash_are_told_apart() -> None:
    """A bucket has 31 bits of a key's hash. Keys that share them are compared as a whole; here by buckets that lie."""
    index = BlockIndex(8)
    rows, buckets = words(50, 0, 0), index._table.buckets
    index.commit(index.reserve(rows[:1].view(np.uint8)).slots)
    (at,) = np.flatnonzero(buckets)
    other = int(np.flatnonzero(homes(rows, buckets.size) != at)[0])
    tag = tag_of(fingerprint(rows, other))
    buckets[home(tag, buckets.size)] = tag << 32 | buckets[at] & (1 << 32) - 1
    assert index.lookup(rows[[0, other]].view(np.uint8)).tolist() == [True, False]


def test_keys_that_share_all_of_the_hash_in_their_buckets() -> None:
    """Of so many random keys a few pairs agree in 31 bits: the search goes on behind the first of such a pair."""
    rng = np.random.default_rng(3)
    rows = rng.integers(-(2**63), 2**63, (300_000, 4), dtype=np.int64)
    tags = np.array([tag_of(fingerprint(rows, row)) for row in range(len(rows))])
    order = np.argsort(tags, kind="stable")
    firsts = np.flatnonzero(np.diff(tags[order]) == 0)
    pairs = np.stack([order[firsts], order[firsts + 1]], 1)
    assert len(pairs) > 5
    for a, b in pairs.tolist():
        index, two = BlockIndex(4), rows[[a, b]].view(np.uint8)
        slots = index.reserve(two).slots
        index.commit(slots)
        assert index.lookup(two).all() and index.match(two) == 2 and index.acquire(two).tolist() == slots.tolist()
        index.release(slots)
        assert (index.reserve(two).slots == slots).all()
        index.check()
        assert index.drop(two[:1]) == 1 and index.lookup(two).tolist() == [False, True]
        index.check()
