"""Every rule of BlockIndex on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from kvortex.errors import ArgumentError, ConfigError, KVortexError, PoolFullError
from kvortex.index import DECLINED, NEW, PENDING, RESIDENT, BlockIndex, IndexStateError
from kvortex.index._lines import DOOMED, MARK, NEXT, PINS, PREV, SIZE, STATE


def keys(numbers: str | Iterable[int]) -> np.ndarray:
    """One key a letter or number, which differ only in one word."""
    codes = [ord(number) if isinstance(number, str) else number for number in numbers]
    words = np.zeros((len(codes), 4), np.uint64)
    words[:, 3] = codes
    return words.view(np.uint8)


def fill(index: BlockIndex, names: str) -> np.ndarray:
    for _ in range(index.admit_after):  # the last offer is taken
        slots = index.reserve(keys(names)).slots
    index.commit(slots)
    return slots


def resident(index: BlockIndex, names: str) -> str:
    """Those of the names that are resident."""
    return "".join(name for name, found in zip(names, index.lookup(keys(names)), strict=True) if found)


def snapshot(index: BlockIndex) -> list[bytes]:
    return [array.tobytes() for array in arrays(index._table)]


def arrays(table: object) -> list[np.ndarray]:
    """Every array of a table, however deep."""
    return [table] if isinstance(table, np.ndarray) else [array for part in table for array in arrays(part)]


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


@pytest.mark.parametrize("policy", ["mru", "LRU", "", None, ["lru"]])
def test_unknown_policy_is_refused_by_name(policy: object) -> None:
    with pytest.raises(ConfigError, match="policy = .*: unknown; known are arc, lfu, lru, s3fifo"):
        BlockIndex(4, policy)


@pytest.mark.parametrize("admit_after", [0, -1, 256, 1.0, True, None])
def test_an_impossible_number_of_offers_is_refused(admit_after: object) -> None:
    with pytest.raises(ConfigError, match="admit_after = .*: must be an integer from 1 to 255"):
        BlockIndex(4, admit_after=admit_after)


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


def test_drop_from_slots_spares_what_is_elsewhere_by_now() -> None:
    index = BlockIndex(4)
    index.commit(index.reserve(keys("ab")).slots)
    held = index.acquire(keys("ab"))
    index.drop(keys("a"))
    index.commit(index.reserve(keys("a")).slots)  # anew, in another slot, while the old one is held
    assert index.drop(keys("ab"), slots=held) == 1
    assert index.lookup(keys("ab")).tolist() == [True, False]
    once = np.zeros(1, np.uint8)
    index.release(held, once=once)
    assert index.drop(keys("a"), once=once) == 0 and index.lookup(keys("a")).all()
    with pytest.raises(ArgumentError, match="1 of them for 2 keys"):
        index.drop(keys("ab"), slots=[0])
    index.check()


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


def test_one_length_stands_for_all_and_several_for_each() -> None:
    index = BlockIndex(8)
    for nbytes in (7, np.int64(7), np.array(7), [7, 7, 7], np.array([7, 7, 7], np.uint8), np.array([7, 7, 7])):
        assert index.size_of(index.reserve(keys("abc"), nbytes).slots).tolist() == [7, 7, 7]
    index.commit(index.reserve(keys("d"), [9]).slots)
    assert index.reserve(keys("abc"), 7).status.tolist() == [PENDING] * 3
    refused(index, ArgumentError, r"keys\[2\] has a record of 7 bytes, not of 8", lambda: index.reserve(keys("xya"), 8))
    refused(index, ArgumentError, r"keys\[1\] has a record of 9 bytes, not of 8", lambda: index.acquire(keys("xd"), 8))
    assert index.reserve([], 5).slots.shape == (0,) and index.acquire([], 5).shape == (0,)
    refused(index, ArgumentError, "nbytes", lambda: index.reserve(keys("x"), 2**63))


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
    index._table.sequence[0] = 0  # readers may look again
    assert snapshot(index) == before


def test_any_form_of_keys_and_slots_works_without_another_compilation() -> None:
    from kvortex.index import _reads, core

    index = BlockIndex(8)
    plain = keys("abcd")
    slots = index.reserve(plain).slots
    index.commit(slots)
    index.lookup(plain)
    compiled = len(_reads.lookup.signatures), len(core.commit.signatures)
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
    assert (len(_reads.lookup.signatures), len(core.commit.signatures)) == compiled
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


@pytest.mark.parametrize(
    ("policy", "admit_after", "per_slot"),
    [("lru", 1, 100), ("lfu", 1, 100), ("s3fifo", 1, 129), ("arc", 1, 132), ("lru", 2, 228), ("arc", 9, 260)],
)
def test_nbytes_is_what_the_docstring_says(policy: str, admit_after: int, per_slot: int) -> None:
    for capacity in (1, 7, 1000, 50_000):
        assert BlockIndex(capacity, policy, admit_after=admit_after).nbytes <= per_slot * capacity + (66 << 10)
    large = BlockIndex(200_000, policy, admit_after=admit_after)
    fixed = (66 << 10) if policy == "lfu" else 1 << 10
    assert (per_slot - 1) * 200_000 < large.nbytes <= per_slot * 200_000 + fixed
    memory = {(array.__array_interface__["data"][0], array.nbytes) for array in arrays(large._table)}
    assert large.nbytes == sum(nbytes for _, nbytes in memory), "every array once"


def test_large_tables_lie_on_huge_pages_and_lines_in_cache_lines() -> None:
    for capacity in (3, 1000, 100_000):
        table = BlockIndex(capacity)._table
        assert table.words.ctypes.data % 64 == 0 and table.words.ctypes.data == table.cells.ctypes.data
        assert capacity < 100_000 or table.words.ctypes.data % (2 << 20) == 0


def test_what_is_not_admitted_is_told_and_gets_nothing() -> None:
    index = BlockIndex(4, admit_after=3)
    for _ in range(2):
        taken = np.full(2, -1, np.int64)
        slots, status, owners = index.reserve(keys("ab"), 5, owner=7, taken=taken)
        assert status.tolist() == [DECLINED] * 2 and slots.tolist() == taken.tolist() == [-1, -1]
        assert owners.tolist() == [7, 7] and index.counts().free == 4
        index.check()
    slots, status, _ = index.reserve(keys("ca"), 5)
    assert status.tolist() == [DECLINED, NEW] and slots[0] == -1
    assert index.reserve(keys("ab"), 5).status.tolist() == [PENDING, NEW]
    index.commit(slots[1:])
    assert index.reserve(keys("a"), 5).status.tolist() == [RESIDENT]
    index.drop(keys("a"))
    assert index.reserve(keys("a"), 5).status.tolist() == [DECLINED], "an admitted key is offered anew once it is gone"
    index.check()


def test_a_refused_batch_is_no_offer() -> None:
    index = BlockIndex(2, admit_after=2)
    index.reserve(keys("abcde"))
    refused(index, PoolFullError, "3 slots asked for", lambda: index.reserve(keys("abcx")))
    refused(index, ArgumentError, "same key", lambda: index.reserve(keys("xx")))
    assert index.reserve(keys("xa")).status.tolist() == [DECLINED, NEW]
    index.check()


def test_four_offers_a_slot_are_remembered_and_the_tail_of_a_batch_goes_first() -> None:
    index = BlockIndex(2, admit_after=2)
    index.reserve(keys("abcdefgh"))
    index.reserve(keys("x"))
    assert index.reserve(keys("hg")).status.tolist() == [DECLINED, NEW]
    index.check()


@pytest.mark.parametrize(
    ("array", "place", "value"),
    [
        ("words", (0, 0), 99),
        ("buckets", slice(None), 0),
        ("buckets", slice(None), 3),
        ("buckets", slice(None), 1 << 32 | 1),
        ("shorts", (0, STATE), 0),
        ("shorts", (0, STATE), DOOMED),
        ("shorts", (2, STATE), 7),
        ("shorts", (2, STATE), DOOMED),
        ("cells", (0, PINS), 1),
        ("cells", (0, PINS), -1),
        ("words", (3, SIZE), 5),
        ("words", (0, SIZE), -5),
        ("stack", 0, 0),
        ("stack", 0, 100),
        ("cells", (0, PREV), -1),
        ("cells", (1, NEXT), 1),
        ("cells", (4, NEXT), 4),
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


@pytest.mark.parametrize(
    ("policy", "part", "array", "place", "value"),
    [
        ("arc", "order", "head", 3, 0),
        ("arc", "order", "head", 5, 11),
        ("arc", "order", "shorts", (7, MARK), 1),
        ("s3fifo", "order", "head", 3, 0),
        ("s3fifo", "order", "shorts", (7, MARK), 4),
        ("s3fifo", "order", "shorts", (7, MARK), 8),
        ("lfu", "order", "head", 3, 0),
        ("lfu", "order", "shorts", (7, MARK), 2),
        ("arc", "ghosts", "head", 0, 99),
        ("arc", "ghosts", "head", 2, 0),
        ("arc", "ghosts", "buckets", slice(None), 0),
        ("arc", "ghosts", "prints", (0, 0), 5),
        ("arc", "ghosts", "links", (0, 3), 77),
        ("s3fifo", "ghosts", "head", 2, 0),
        ("lru", "offers", "head", 2, 0),
        ("lru", "offers", "prints", (slice(0, 12), 0), 5),
    ],
)
def test_check_sees_damage_of_a_policy(policy: str, part: str, array: str, place: object, value: int) -> None:
    index = BlockIndex(10, policy, admit_after=2 if part == "offers" else 1)
    for name in range(8):
        fill(index, [chr(97 + name)])
    index.release(index.acquire(keys("abc")))
    fill(index, "ijkl")
    index.reserve(keys("#"))
    index.check()
    order = index._table.order
    target = {"order": order, "ghosts": order.ghosts, "offers": index._table.offers}[part]
    assert not np.array_equal(getattr(target, array)[place], value), "planted"
    getattr(target, array)[place] = value
    with pytest.raises(IndexStateError, match="damaged"):
        index.check()


@pytest.mark.parametrize(
    "taken",
    [
        *(np.zeros(shape, np.int64) for shape in (1, 3, (2, 1))),
        np.zeros(2, np.int32),
        np.zeros(4, np.int64)[::2],
        np.frombuffer(bytes(16), np.int64),
        [0, 0],
        int,
    ],
)
def test_an_array_that_compiled_code_would_write_beyond_is_refused(taken: Any) -> None:
    index, keys = BlockIndex(4), np.arange(64, dtype=np.uint8).reshape(2, 32)
    for call in (index.reserve, index.acquire):
        with pytest.raises(ArgumentError, match=r"taken must be a contiguous, writable \(2,\) int64 array; seen: "):
            call(keys, taken=taken)
    assert index.counts().reserved == index.counts().pinned == 0


@pytest.mark.parametrize("once", [np.zeros(0, np.uint8), np.zeros(2, np.uint8), np.zeros(1, np.int32), 0])
def test_a_cell_that_is_none_is_refused(once: Any) -> None:
    index = BlockIndex(4)
    slots = index.reserve(np.arange(32, dtype=np.uint8).reshape(1, 32)).slots
    with pytest.raises(ArgumentError, match="once must be"):
        index.commit(slots, once=once)
    assert index.counts().reserved == 1


@pytest.mark.parametrize("owner", [1.5, "x", None, True, 1 << 63, -(1 << 63) - 1])
def test_an_owner_that_is_no_number_is_refused(owner: Any) -> None:
    with pytest.raises(ArgumentError, match="owner = "):
        BlockIndex(4).reserve(np.arange(32, dtype=np.uint8).reshape(1, 32), owner=owner)


@pytest.mark.parametrize("ready", [-1, 9, 2.5, "2", True])
def test_slots_that_cannot_be_ready_are_refused(ready: Any) -> None:
    with pytest.raises(ConfigError, match="ready = .*: must be an integer from 0 to 4"):
        BlockIndex(4, ready=ready)
    index = BlockIndex(4, ready=1)
    if ready != 9:
        with pytest.raises(ConfigError, match="ready = .*: must be an integer from 0 on"):
            index.grow(ready)
    index.grow(1 << 70)
    assert index.ready == index.counts().capacity == 4
