"""Every policy and admission against references in dictionaries: the same hits, the same victims, in the same order."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.errors import PoolFullError
from kvortex.index import DECLINED, NEW, PENDING, POLICIES, RESIDENT, BlockIndex, _hash
from kvortex.index._ghosts import listing
from kvortex.index._hash import fingerprint
from kvortex.index._order import OWN
from tests.naive import NaiveIndex, Record
from tests.naive_policies import NAIVE_POLICIES, PAPERS

UNIVERSE = 400
KEYS = np.random.default_rng(0).integers(0, 256, (UNIVERSE, 32), dtype=np.uint8)
PRINTS = [fingerprint(KEYS.view(np.int64), row) for row in range(UNIVERSE)]
NAMES = {NEW: "new", PENDING: "pending", RESIDENT: "resident", DECLINED: "declined"}


class Twins:
    """An index and its reference, told the same; every difference is an error. ``slot_of`` ties records to slots."""

    def __init__(self, capacity: int, policy: str, admit_after: int = 1, ready: int | None = None) -> None:
        self.index = BlockIndex(capacity, policy, admit_after=admit_after, ready=ready)
        self.naive = NaiveIndex(capacity if ready is None else ready, policy, admit_after)
        self.slot_of: dict[Record, int] = {}
        self.held: list[Record] = []
        self.hits = 0

    def slots(self, records: Any) -> list[int]:
        return [self.slot_of[record] for record in records]

    def grow(self, ready: int) -> None:
        self.index.grow(ready)
        self.naive.capacity = self.naive.policy.slots = ready
        self.naive.admission.most = 4 * ready

    def reserve(self, names: list[int]) -> bool:
        expected = self.naive.reserve(names)
        if expected is None:
            with pytest.raises(Exception, match="slots asked for"):
                self.index.reserve(KEYS[names])
            return False
        slots, status, _ = self.index.reserve(KEYS[names])
        assert [NAMES[each] for each in status.tolist()] == [expected[name] for name in names]
        for name, slot in zip(names, slots.tolist(), strict=True):
            if expected[name] == "declined":
                assert slot == -1
                continue
            if expected[name] == "new":
                self.slot_of[self.naive.named[name]] = slot
            assert self.slot_of[self.naive.named[name]] == slot
        self.hits += sum(what == "resident" for what in expected.values())
        return True

    def commit(self, records: list[Record]) -> None:
        self.index.commit(self.slots(records))
        self.naive.commit(records)

    def abort(self, records: list[Record]) -> None:
        self.index.abort(self.slots(records))
        self.naive.abort(records)

    def acquire(self, names: list[int]) -> None:
        records = self.naive.acquire(names)
        assert self.index.acquire(KEYS[names]).tolist() == [-1 if each is None else self.slot_of[each] for each in records]
        self.held += [record for record in records if record]

    def release(self, records: list[Record]) -> None:
        for record in records:
            self.held.remove(record)
        self.index.release([*self.slots(records), -1])
        self.naive.release(records)

    def drop(self, names: list[int]) -> None:
        assert self.index.drop(KEYS[names]) == self.naive.drop(names)

    def agree(self) -> None:
        """Queues, ghosts, numbers and offers are the same."""
        self.index.check()
        order, policy = self.index._table.order, self.naive.policy
        ours = [queue for queue in POLICIES[self.index.policy].queues(order) if queue]
        assert ours == [self.slots(queue) for queue in policy.queues() if queue]
        ghosts = {"s3fifo": lambda: [policy.ghosts], "arc": lambda: list(policy.b)}.get(self.index.policy, list)()
        for ring, keys in enumerate(ghosts):
            assert [each for each, _ in listing(order.ghosts, ring)] == [PRINTS[key] for key in keys]
        if self.index.policy == "arc":
            assert order.head[OWN : OWN + 3].tolist() == [policy.size[0], policy.size[1], policy.p]
        offers = [(PRINTS[key], count) for key, count in self.naive.admission.offers.items()]
        assert listing(self.index._table.offers, 0) == offers
        counts = self.index.counts()
        assert counts.evictions == self.naive.evictions and counts.reserved == len(self.naive.reserved)
        assert counts.pinned == len(self.naive.pinned) and counts.free == self.naive.free()
        found = self.index.lookup(KEYS)
        assert {name for name in range(UNIVERSE) if found[name]} == {
            name for name in self.naive.named if self.naive.resident(name)
        }

    def end(self) -> None:
        """Gives everything back; nothing is left behind."""
        self.release(list(self.held))
        self.abort(list(self.naive.reserved))
        self.agree()
        assert self.index.counts().pinned == self.index.counts().reserved == 0


def names(rng: np.random.Generator, kind: str, most: int, count: int) -> list[int]:
    """Different keys of one request: uniform, skewed to a few popular ones, or a run out of a sequence, as prefixes are."""
    if kind == "runs":
        start = int(rng.zipf(1.3) * 7 % most)
        return [(start + step) % most for step in range(count)]
    drawn = rng.integers(0, most, 4 * count) if kind == "uniform" else rng.zipf(1.2, 4 * count) % most
    return list(dict.fromkeys(drawn.tolist()))[:count]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["uniform", "skewed", "runs"])
@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 50])
def test_random_streams_with_pins_drops_and_aborts(policy: str, kind: str, capacity: int) -> None:
    """A few keys more than slots, so that what was evicted comes back soon, or many more."""
    evictions = hits = 0
    for seed, (most, admit_after) in enumerate([(capacity + 2, 1), (2 * capacity + 1, 1), (UNIVERSE, 1), (2 * capacity, 2)]):
        rng, twins = np.random.default_rng(seed), Twins(capacity, policy, admit_after)
        for turn in range(250):
            play(twins, rng, names(rng, kind, most, int(rng.integers(1, min(most, capacity + 2) + 1))))
            if turn % 5 == 0:
                twins.agree()
        twins.end()
        evictions, hits = evictions + twins.naive.evictions, hits + twins.hits
    assert evictions > 50 and hits > 0


def play(twins: Twins, rng: np.random.Generator, chosen: list[int]) -> None:
    """One call or two, of any kind."""
    what = rng.random()
    if what < 0.45:
        if twins.reserve(chosen) and rng.random() < 0.9:
            mine = [twins.naive.named[name] for name in chosen if name in twins.naive.named]
            mine = [record for record in mine if record in twins.naive.reserved]
            (twins.abort if rng.random() < 0.1 else twins.commit)(mine)
    elif what < 0.75:
        twins.acquire(chosen[: int(rng.integers(1, 4))])
        if rng.random() < 0.8:
            twins.release(list(twins.held))
    elif what < 0.85:
        twins.release([twins.held[at] for at in rng.permutation(len(twins.held))[:2]])
    elif what < 0.93:
        pending = list(twins.naive.reserved)
        twins.commit([pending[at] for at in rng.permutation(len(pending))])
    else:
        twins.drop(chosen[:2])


@pytest.mark.parametrize("admit_after", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_and_admission_grow_with_the_pool(policy: str, admit_after: int) -> None:
    rng, twins, capacity = np.random.default_rng(7), Twins(60, policy, admit_after, ready=3), 3
    for turn in range(600):
        play(twins, rng, names(rng, "skewed", 90, int(rng.integers(1, capacity + 2))))
        if turn % 40 == 39:
            capacity = min(60, capacity + 5)
            twins.grow(capacity)
        if turn % 5 == 0:
            twins.agree()
    twins.end()
    assert capacity == 60 and twins.naive.evictions > 50 and twins.hits > 50


@pytest.mark.parametrize("admit_after", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_pool_that_is_not_there_yet_stores_nothing(policy: str, admit_after: int) -> None:
    index, answers = BlockIndex(4, policy, admit_after=admit_after, ready=0), list[str]()

    def ask() -> None:
        for _ in range(2):
            try:
                answers.append(str(index.reserve(KEYS[:1]).status.tolist()))
            except PoolFullError:
                answers.append("full")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(60)
    assert answers == (["full"] * 2 if admit_after == 1 else [str([DECLINED])] * 2)
    index.check()


def keys_of_one_hash(count: int) -> np.ndarray:
    """Different keys with the same 64 bits of hash: of each the last word undoes what the others have made of it."""
    word, start, mask = int(_hash._WORD), int(_hash._START), 2**64 - 1
    keys = np.zeros((count, 4), np.uint64)
    for row in range(count):
        state = start
        for at, value in enumerate((row + 1, 7 * row, 3)):
            keys[row, at] = value
            state = (state ^ value) * word & mask
            state ^= state >> 32
        wanted = 0x0123456789ABCDEF
        keys[row, 3] = state ^ ((wanted ^ (wanted >> 32)) * pow(word, -1, 2**64) & mask)
    return keys.view(np.uint8)


@pytest.mark.parametrize("policy", ["arc", "s3fifo"])
def test_keys_that_share_a_fingerprint_are_remembered_once(policy: str) -> None:
    twins, others = keys_of_one_hash(3), KEYS[:200]
    prints = {_hash.fingerprint(twins.view(np.int64), row) for row in range(3)}
    assert len(prints) == 1
    index = BlockIndex(20, policy)
    for _ in range(2):
        index.commit(index.reserve(twins).slots) if not index.lookup(twins).any() else None
        index.release(index.acquire(twins))
        for at in range(0, 200, 10):
            found = index.reserve(others[at : at + 10])
            index.commit(found.slots[found.status == NEW])
            if at % 40 == 0:
                index.release(index.acquire(others[at : at + 10]))
            index.check()
        assert not index.lookup(twins).any()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60)
@given(data=st.data(), capacity=st.integers(1, 12))
def test_single_requests_hit_as_the_paper_says(policy: str, data: st.DataObject, capacity: int) -> None:
    """One key at a time and no pins across requests: exactly the published algorithm."""
    requests = data.draw(st.lists(st.integers(0, min(2 * capacity + 3, UNIVERSE - 1)), max_size=150))
    compare_with_paper(policy, capacity, requests)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 20, 50])
def test_long_streams_hit_as_the_paper_says(policy: str, capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    requests = [*(rng.zipf(1.1, 3000) % UNIVERSE).tolist(), *rng.integers(0, 2 * capacity + 1, 1000).tolist()]
    loop = list(range(capacity + 2)) * 5
    assert compare_with_paper(policy, capacity, requests + loop + requests[:1000]) > 0


def compare_with_paper(policy: str, capacity: int, requests: list[int]) -> int:
    index, paper, hits = BlockIndex(capacity, policy), PAPERS[policy](capacity), 0
    for at, name in enumerate(requests):
        key = KEYS[name : name + 1]
        slots = index.acquire(key)
        index.release(slots)
        if slots[0] < 0:
            index.commit(index.reserve(key).slots)
        assert (slots[0] >= 0) == paper.request(name), f"request {at}"
        hits += slots[0] >= 0
    index.check()
    return hits


def test_every_policy_has_its_references() -> None:
    assert set(POLICIES) == set(NAIVE_POLICIES) == set(PAPERS)
    kinds = [policy.kind for policy in POLICIES.values()]
    assert len(set(kinds)) == len(kinds)


def test_uses_are_counted_up_to_a_limit() -> None:
    """Beyond it recency decides: one use more makes no difference."""
    index = BlockIndex(2, "lfu")
    index.commit(index.reserve(KEYS[:2]).slots)
    for _ in range(1100):
        index.release(index.acquire(KEYS[:1]))
    for _ in range(1023):
        index.release(index.acquire(KEYS[1:2]))
    index.commit(index.reserve(KEYS[2:3]).slots)
    assert index.lookup(KEYS[:3]).tolist() == [False, True, True]
