"""Every rule of BlockIndex on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest

from kvortex.errors import ArgumentError, ConfigError, KVortexError, PoolFullError
from kvortex.index import NEW, PENDING, RESIDENT, BlockIndex, IndexStateError


def keys(numbers: str | Iterable[int]) -> np.ndarray:
    """One key a letter or number, which differ only in one word."""
    codes = [ord(number) if isinstance(number, str) else number for number in numbers]
    words = np.zeros((len(codes), 4), np.uint64)
    words[:, 3] = codes
    return words.view(np.uint8)


def fill(index: BlockIndex, names: str) -> np.ndarray:
    slots = index.reserve(keys(names)).slots
    index.commit(slots)
    return slots


def resident(index: BlockIndex, names: str) -> str:
    """Those of the names that are resident."""
    return "".join(name for name, found in zip(names, index.lookup(keys(names)), strict=True) if found)


def snapshot(index: BlockIndex) -> list[bytes]:
    return [array.tobytes() for array in index._table]


def refused(index: BlockIndex, error: type[KVortexError], match: str, call: Callable[[], object]) -> None:
    """The call raises, and not one byte of the index has changed."""
    before = snapshot(index)
    with pytest.raises(error, match=match):
        call()
    assert snapshot(index) == before
    index.check()


@pytest.mark.parametrize("capacity", [0, -1, 1.0, True, None, 2**31])
def test_impossible_capacity_is_refused(capacity: object) -> None:
    with pytest.raises(ConfigError, match="capacity"):
        BlockIndex(capacity)


def test_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'arc'.*lru"):
        BlockIndex(4, policy="arc")


def test_a_fresh_pool_hands_out_slots_in_order() -> None:
    index = BlockIndex(5)
    reservation = index.reserve(keys("abc"))
    assert reservation.slots.tolist() == [0, 1, 2] and reservation.slots.dtype == np.int64
    assert reservation.status.tolist() == [NEW] * 3 and reservation.status.dtype == np.uint8
    index.abort(reservation.slots)
    assert index.reserve(keys("abcde")).slots.tolist() == [0, 1, 2, 3, 4]


def test_reserved_keys_are_invisible_until_committed() -> None:
    index = BlockIndex(4)
    slots = index.reserve(keys("ab")).slots
    assert index.lookup(keys("ab")).tolist() == [False, False]
    assert index.match(keys("ab")) == 0
    assert index.acquire(keys("ab")).tolist() == [-1, -1]
    assert index.drop(keys("ab")) == 0
    index.commit(slots[:1])
    assert index.lookup(keys("ab")).tolist() == [True, False]
    assert index.counts()._asdict() == dict(capacity=4, free=2, reserved=1, resident=1, pinned=0, evictions=0)
    index.check()


def test_reserve_tells_new_resident_and_pending_apart() -> None:
    index = BlockIndex(6)
    (a,) = fill(index, "a")
    (b,) = index.reserve(keys("b")).slots
    slots, status, _ = index.reserve(keys("abc"))
    assert status.tolist() == [RESIDENT, PENDING, NEW]
    assert slots.tolist()[:2] == [a, b] and slots[2] not in (a, b)
    index.check()


def test_aborted_keys_are_gone_and_their_slots_free() -> None:
    index = BlockIndex(3)
    index.abort(index.reserve(keys("abc")).slots)
    assert index.counts().free == 3 and resident(index, "abc") == ""
    assert index.reserve(keys("abc")).status.tolist() == [NEW] * 3
    index.check()


def test_match_counts_the_leading_run() -> None:
    index = BlockIndex(8)
    fill(index, "abde")
    assert [index.match(keys(names)) for names in ("ab", "abcde", "cab", "", "edba")] == [2, 2, 0, 0, 4]


def test_the_least_recent_goes_first_and_no_more_than_needed() -> None:
    index = BlockIndex(4)
    for name in "abcd":
        fill(index, name)
    fill(index, "e")
    assert resident(index, "abcde") == "bcde" and index.counts().evictions == 1
    fill(index, "fg")
    assert resident(index, "abcdefg") == "defg" and index.counts().evictions == 3


def test_the_tail_of_a_batch_goes_before_its_head() -> None:
    index = BlockIndex(4)
    fill(index, "abcd")
    fill(index, "e")
    assert resident(index, "abcde") == "abce"


def test_lookup_and_match_touch_nothing() -> None:
    index = BlockIndex(2)
    fill(index, "a")
    fill(index, "b")
    before = snapshot(index)
    index.lookup(keys("a"))
    index.match(keys("a"))
    index.counts()
    index.size_of([0, 1, -1])
    assert snapshot(index) == before


def test_reserving_a_resident_key_touches_it() -> None:
    index = BlockIndex(3)
    fill(index, "cba")  # oldest first: a, b, c
    index.reserve(keys("ab"))  # c, b, a
    fill(index, "d")
    assert resident(index, "abcd") == "abd"
    fill(index, "e")
    assert resident(index, "abcde") == "ade"


def test_acquire_then_release_touches_and_the_tail_is_older() -> None:
    index = BlockIndex(3)
    fill(index, "cba")
    index.release(index.acquire(keys("ab")))  # oldest first: c, b, a
    fill(index, "d")
    fill(index, "e")
    assert resident(index, "abcde") == "ade"


def test_the_last_release_decides_the_place() -> None:
    index = BlockIndex(3)
    fill(index, "cba")
    a, b = index.acquire(keys("ab"))
    index.release([b])
    index.release([a])  # oldest first: c, b, a
    a1, a2 = index.acquire(keys("aa"))
    index.release([a1])
    index.release(index.acquire(keys("b")))  # while a is still pinned
    index.release([a2])  # c, b, a
    fill(index, "de")
    assert resident(index, "abcde") == "ade"


def test_a_pinned_slot_is_never_evicted() -> None:
    index = BlockIndex(3)
    fill(index, "a")
    fill(index, "bc")
    held = index.acquire(keys("a"))
    fill(index, "de")
    assert resident(index, "abcde") == "ade"
    refused(index, PoolFullError, "3 slots asked for: 0 of 3 are free, 2 may be evicted", lambda: index.reserve(keys("xyz")))
    assert resident(index, "ade") == "ade"
    index.release(held)
    fill(index, "xyz")
    assert resident(index, "adexyz") == "xyz"


def test_reserve_never_evicts_a_key_of_its_own_batch() -> None:
    index = BlockIndex(3)
    fill(index, "a")  # the oldest
    fill(index, "bc")
    slots, status, _ = index.reserve(keys("xay"))
    assert status.tolist() == [NEW, RESIDENT, NEW] and resident(index, "abc") == "a"
    index.commit(slots[[0, 2]])
    refused(index, PoolFullError, "3 slots asked for.* 2 may be evicted", lambda: index.reserve(keys("pqra")))
    assert resident(index, "axy") == "axy"


def test_a_full_pool_says_why_and_changes_nothing() -> None:
    index = BlockIndex(6)
    fill(index, "abc")
    index.reserve(keys("d"))
    index.acquire(keys("a"))
    said = "5 slots asked for: 2 of 6 are free, 2 may be evicted beside the keys of this batch, 1 are pinned, 1 are reserved"
    refused(index, PoolFullError, said, lambda: index.reserve(keys("vwxyz")))
    said = "4 slots asked for: 2 of 6 are free, 1 may be evicted"
    refused(index, PoolFullError, said, lambda: index.reserve(keys("bwxyz")))
    assert index.reserve(keys("wxyz")).status.tolist() == [NEW] * 4
    index.check()


def test_a_batch_larger_than_the_pool_is_refused() -> None:
    index = BlockIndex(2)
    refused(index, PoolFullError, "1000 slots asked for", lambda: index.reserve(keys(range(1000))))


@pytest.mark.parametrize(("batch", "rows"), [("aa", "0.*1"), ("xyx", "0.*2"), ("bab", "0.*2"), ("ax" * 400, "0.*2")])
def test_a_batch_that_names_a_key_twice_is_refused(batch: str, rows: str) -> None:
    index = BlockIndex(4)
    fill(index, "b")
    index.reserve(keys("a"))
    refused(index, ArgumentError, rf"keys\[{rows}\] are the same", lambda: index.reserve(keys(batch)))


@pytest.mark.parametrize("call", ["commit", "abort"])
@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ([1, 2, 1], r"slots\[2\] = 1 is twice"),
        ([1, 2, 0], r"slots\[2\] = 0 is resident, not reserved"),
        ([1, 3], r"slots\[1\] = 3 is free, not reserved"),
        ([2, 4], r"slots\[1\] = 4 is outside 0 to 3"),
        ([2, -1], r"slots\[1\] = -1 is outside 0 to 3"),
        ([2**62], r"slots\[0\] = 4611686018427387904 is outside 0 to 3"),
    ],
)
def test_only_reserved_slots_are_committed_or_aborted(call: str, slots: list[int], said: str) -> None:
    index = BlockIndex(4)
    fill(index, "a")
    index.reserve(keys("bc"))
    refused(index, IndexStateError, f"{call}: {said}", lambda: getattr(index, call)(slots))


def test_pins_count_each_occurrence() -> None:
    index = BlockIndex(4)
    (a,) = fill(index, "a")
    assert index.acquire(keys("axa")).tolist() == [a, -1, a]
    assert index.counts().pinned == 1
    refused(index, IndexStateError, rf"slots\[2\] = {a} is resident with 2 pins", lambda: index.release([a, a, a]))
    index.release([a, -1])
    assert index.counts().pinned == 1
    index.release([a])
    assert index.counts().pinned == 0
    refused(index, IndexStateError, "0 pins", lambda: index.release([a]))


@pytest.mark.parametrize("slots", [[0, 1], [0, 2], [0, 3], [0, -2], [0, 0]])
def test_a_release_without_a_pin_changes_nothing(slots: list[int]) -> None:
    index = BlockIndex(3)
    fill(index, "ab")
    index.acquire(keys("a"))
    refused(index, IndexStateError, r"slots\[1\]", lambda: index.release(slots))


def test_drop_forgets_at_once_and_frees_with_the_last_pin() -> None:
    index = BlockIndex(3)
    a, b = fill(index, "ab")
    index.acquire(keys("aa"))
    assert index.drop(keys("abxa")) == 2
    assert resident(index, "ab") == "" and index.match(keys("a")) == 0 and index.acquire(keys("a")).tolist() == [-1]
    assert index.counts()._asdict() == dict(capacity=3, free=2, reserved=0, resident=1, pinned=1, evictions=0)
    slots, status, _ = index.reserve(keys("ac"))  # the key may come back while its old slot is still held
    assert status.tolist() == [NEW, NEW] and a not in slots
    index.check()
    refused(index, PoolFullError, "1 are pinned, 2 are reserved", lambda: index.reserve(keys("d")))
    index.commit(slots)
    index.release([a])
    assert index.counts().free == 0
    index.release([a])
    assert index.counts().free == 1 and resident(index, "abc") == "ac"
    index.check()


def test_dropped_slots_leave_the_eviction_order() -> None:
    index = BlockIndex(3)
    for name in "abc":
        fill(index, name)
    assert index.drop(keys("b")) == 1
    fill(index, "d")
    assert index.counts().evictions == 0
    fill(index, "e")
    assert resident(index, "abcde") == "cde"
    index.check()


def test_sizes_are_kept() -> None:
    index = BlockIndex(4)
    slots = index.reserve(keys("ab"), [10, 20]).slots
    assert index.size_of(slots).tolist() == [10, 20] and index.size_of(slots).dtype == np.int64
    index.commit(slots)
    more = index.reserve(keys("abc"), [10, 20, 7]).slots
    assert index.size_of(more).tolist() == [10, 20, 7]
    assert index.size_of([-1, 3]).tolist() == [0, 0]
    index.drop(keys("a"))
    assert index.size_of(slots).tolist() == [0, 20]
    assert index.size_of(index.reserve(keys("z")).slots).tolist() == [0]
    for bad in ([4], [-2, 0]):
        refused(index, IndexStateError, "from -1 to 3", lambda bad=bad: index.size_of(bad))


def test_a_key_has_one_size() -> None:
    index = BlockIndex(4)
    index.commit(index.reserve(keys("a"), 10).slots)
    index.reserve(keys("b"), 20)
    refused(index, ArgumentError, r"keys\[1\] has a record of 10 bytes, not of 11", lambda: index.reserve(keys("ca"), [5, 11]))
    refused(index, ArgumentError, r"keys\[0\] has a record of 20 bytes, not of 10", lambda: index.reserve(keys("bd"), 10))
    refused(index, ArgumentError, r"keys\[1\] has a record of 10 bytes, not of 0", lambda: index.acquire(keys("xa"), 0))
    assert index.acquire(keys("xab"), [3, 10, 3]).tolist() == [-1, 0, -1]


def test_what_is_taken_is_known_before_the_call_returns() -> None:
    """An interrupt between the compiled call and the return of the method loses the result, and must not lose the slots."""
    index, taken = BlockIndex(3), np.full(3, -1, np.int64)
    index.commit(index.reserve(keys("b")).slots)
    index.reserve(keys("abc"), owner=7, taken=taken)
    assert taken.tolist() == [1, -1, 2]
    found = index.reserve(keys("cab"), owner=9)
    assert found.owners.tolist() == [7, 7, 0] and found.status.tolist() == [PENDING, PENDING, RESIDENT]
    none, pins = np.full(2, -1, np.int64), np.full(2, -1, np.int64)
    refused(index, PoolFullError, "1 slots", lambda: index.reserve(keys("bx"), taken=none))
    assert none.tolist() == [-1, -1]
    assert index.acquire(keys("ab"), taken=pins) is pins and pins.tolist() == [-1, 0]


@pytest.mark.parametrize("call", ["commit", "abort", "release"])
def test_a_call_with_a_set_cell_does_nothing(call: str) -> None:
    index, once = BlockIndex(3), np.zeros(1, np.uint8)
    slots = index.reserve(keys("a")).slots
    if call == "release":
        index.commit(slots)
        index.acquire(keys("aa"))
    with pytest.raises(IndexStateError):
        getattr(index, call)([2], once=once)
    assert once[0] == 0, "a call that was refused has done nothing"
    assert getattr(index, call)(slots, once=once) is True and once[0] == 1
    before = index.counts()
    assert getattr(index, call)(slots, once=once) is False
    assert index.counts() == before
    index.check()


@pytest.mark.parametrize("nbytes", [-1, [1, -1], 1.0, [1], [1, 2, 3], True, "1", [[1, 2]], np.array([1, 2], np.uint64)])
def test_bad_sizes_are_refused(nbytes: object) -> None:
    index = BlockIndex(4)
    refused(index, ArgumentError, "nbytes", lambda: index.reserve(keys("ab"), nbytes))


@pytest.mark.parametrize("slots", [[0.0], [True], [[0]], 0, "0", None, np.array([0], np.uint64)])
@pytest.mark.parametrize("call", ["commit", "abort", "release", "size_of"])
def test_bad_slots_are_refused(call: str, slots: object) -> None:
    index = BlockIndex(4)
    index.reserve(keys("a"))
    refused(index, ArgumentError, "slots", lambda: getattr(index, call)(slots))


def test_empty_batches_do_nothing() -> None:
    index = BlockIndex(2)
    before = snapshot(index)
    assert index.lookup([]).shape == (0,) and index.match([]) == 0 and index.drop([]) == 0
    assert index.reserve([]).slots.shape == (0,) and index.reserve([], []).status.shape == (0,)
    assert index.acquire([]).shape == (0,) and index.size_of([]).shape == (0,)
    for call in (index.commit, index.abort, index.release):
        call([])
        call(np.empty(0, np.int32))
    assert snapshot(index) == before


def test_any_form_of_keys_and_slots_works_without_another_compilation() -> None:
    from kvortex.index import core

    index = BlockIndex(8)
    plain = keys("abcd")
    slots = index.reserve(plain).slots
    index.commit(slots)
    index.lookup(plain)
    compiled = len(core.lookup.signatures), len(core.commit.signatures)
    frozen = plain.copy()
    frozen.flags.writeable = False
    crooked = np.frombuffer(b"?" + plain.tobytes(), np.uint8)[1:].reshape(4, 32)
    spread = np.repeat(plain, 2, axis=0)[::2]
    listed = [row.tobytes() for row in plain]
    for form in (frozen, crooked, spread, listed, tuple(listed), np.asfortranarray(plain)):
        assert index.lookup(form).all()
    new = index.reserve(keys("efgh")).slots
    index.commit(new[::2].astype(np.int32))
    index.commit(new[1::2].tolist())
    assert (len(core.lookup.signatures), len(core.commit.signatures)) == compiled
    index.check()


def test_capacity_one() -> None:
    index = BlockIndex(1)
    for turn, name in enumerate("abab"):
        assert fill(index, name).tolist() == [0] and resident(index, "ab") == name
        assert index.counts().evictions == turn
    held = index.acquire(keys("bb"))
    refused(index, PoolFullError, "1 are pinned", lambda: index.reserve(keys("a")))
    assert index.reserve(keys("b")).status.tolist() == [RESIDENT]
    refused(index, ArgumentError, "same key", lambda: index.reserve(keys("aa")))
    index.drop(keys("b"))
    refused(index, PoolFullError, "1 are pinned", lambda: index.reserve(keys("b")))
    index.release(held)
    assert fill(index, "b").tolist() == [0]


def test_nbytes_is_what_the_docstring_says() -> None:
    for capacity in (1 << 10, (1 << 10) + 1):
        assert 74 <= BlockIndex(capacity).nbytes / capacity < 83


@pytest.mark.parametrize(
    ("array", "place", "value"),
    [
        ("keys", (0, 0), 99),
        ("buckets", slice(None), 0),
        ("buckets", slice(None), 3),
        ("state", 0, 0),
        ("state", 2, 7),
        ("doomed", 0, 1),
        ("pins", 0, 1),
        ("pins", 0, -1),
        ("sizes", 3, 5),
        ("stack", 0, 0),
        ("stack", 0, 100),
        ("order", (0, 0), -1),
        ("order", (1, 1), 1),
        ("order", (4, 1), 4),
        ("counters", 0, 3),
        ("counters", 1, 1),
        ("counters", 2, 1),
    ],
)
def test_check_sees_damage(array: str, place: object, value: int) -> None:
    index = BlockIndex(4)
    fill(index, "ab")
    index.check()
    getattr(index._table, array)[place] = value
    with pytest.raises(IndexStateError, match="damaged"):
        index.check()
