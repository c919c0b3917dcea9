"""BlockIndex against a model in dictionaries, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvortex.errors import ArgumentError, PoolFullError
from kvortex.index import DECLINED, NEW, PENDING, POLICIES, RESIDENT, BlockIndex, IndexStateError
from tests.naive import NaiveIndex, Record

KEYS = np.random.default_rng(0).integers(0, 256, (12, 32), dtype=np.uint8)
NAMES = {NEW: "new", PENDING: "pending", RESIDENT: "resident", DECLINED: "declined"}
batches = st.lists(st.integers(0, len(KEYS) - 1), max_size=6)
sets = st.lists(st.integers(0, len(KEYS) - 1), max_size=6, unique=True)


class IndexMachine(RuleBasedStateMachine):
    """``slot_of`` ties the model's records to the real slots; ``held`` has one entry for each pin."""

    policy = "lru"

    @initialize(capacity=st.integers(1, 7), admit_after=st.sampled_from([1, 1, 2, 3]))
    def start(self, capacity: int, admit_after: int) -> None:
        self.index = BlockIndex(capacity, self.policy, admit_after=admit_after)
        self.naive = NaiveIndex(capacity, self.policy, admit_after)
        self.slot_of: dict[Record, int] = {}
        self.held: list[Record] = []

    def slots(self, records: list[Record]) -> list[int]:
        return [self.slot_of[record] for record in records]

    @rule(names=sets, nbytes=st.sampled_from([0, 0, 0, 9]))
    def reserve(self, names: list[int], nbytes: int) -> None:
        if any(self.naive.named[name].nbytes != nbytes for name in names if name in self.naive.named):
            with pytest.raises(ArgumentError, match="has a record of"):
                self.index.reserve(KEYS[names], nbytes)
            return
        expected = self.naive.reserve(names, nbytes)
        if expected is None:
            with pytest.raises(PoolFullError):
                self.index.reserve(KEYS[names], nbytes)
            return
        slots, status, _ = self.index.reserve(KEYS[names], nbytes)
        assert [NAMES[each] for each in status.tolist()] == list(expected.values())
        for name, slot in zip(names, slots.tolist(), strict=True):
            if expected[name] == "declined":
                assert slot == -1
                continue
            if expected[name] == "new":
                self.slot_of[self.naive.named[name]] = slot
            assert self.slot_of[self.naive.named[name]] == slot

    @rule(names=batches.filter(lambda names: len(set(names)) < len(names)))
    def reserve_twice(self, names: list[int]) -> None:
        with pytest.raises(ArgumentError):
            self.index.reserve(KEYS[names])

    @rule(data=st.data(), call=st.sampled_from(["commit", "commit", "abort"]))
    def settle(self, data: st.DataObject, call: str) -> None:
        pending = sorted(self.naive.reserved, key=self.slot_of.__getitem__)
        records = data.draw(st.permutations(pending))[: data.draw(st.integers(0, len(pending)))]
        getattr(self.index, call)(self.slots(records))
        getattr(self.naive, call)(records)

    @rule(data=st.data(), call=st.sampled_from(["commit", "abort", "release"]))
    def refused(self, data: st.DataObject, call: str) -> None:
        """A batch with one bad slot at its end changes nothing."""
        good = sorted({self.slot_of[each] for each in (self.held if call == "release" else self.naive.reserved)})
        bad = data.draw(st.sampled_from(sorted({*range(-2, self.naive.capacity + 1)} - {*good} - {-1})))
        with pytest.raises(IndexStateError):
            getattr(self.index, call)([*good, bad])

    @rule(names=batches)
    def acquire(self, names: list[int]) -> None:
        records = self.naive.acquire(names)
        assert self.index.acquire(KEYS[names]).tolist() == [-1 if each is None else self.slot_of[each] for each in records]
        self.held += [record for record in records if record]

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        order = data.draw(st.permutations(range(len(self.held))))
        count = data.draw(st.integers(0, len(order)))
        records = [self.held[place] for place in order[:count]]
        self.held = [self.held[place] for place in order[count:]]
        self.index.release([*self.slots(records), -1])
        self.naive.release(records)

    @rule(names=batches)
    def drop(self, names: list[int]) -> None:
        assert self.index.drop(KEYS[names]) == self.naive.drop(names)

    @rule(names=batches)
    def match(self, names: list[int]) -> None:
        run = 0
        while run < len(names) and self.naive.resident(names[run]):
            run += 1
        assert self.index.match(KEYS[names]) == run

    @invariant()
    def agree(self) -> None:
        index, naive = self.index, self.naive
        index.check()
        assert index.lookup(KEYS).tolist() == [naive.resident(name) is not None for name in range(len(KEYS))]
        queues = [queue for queue in POLICIES[self.policy].queues(index._table.order) if queue]
        assert queues == [self.slots(queue) for queue in naive.policy.queues() if queue]
        live = [*naive.named.values(), *naive.doomed]
        assert len(set(self.slots(live))) == len(live)
        assert index.size_of(self.slots(live)).tolist() == [record.nbytes for record in live]
        pins: dict[str, Any] = {"pinned": sum(record.pins > 0 for record in live), "evictions": naive.evictions}
        reserved, free = len(naive.reserved), naive.free()
        expected = dict(capacity=naive.capacity, free=free, reserved=reserved, resident=len(live) - reserved, **pins)
        assert index.counts()._asdict() == expected

    def teardown(self) -> None:
        if hasattr(self, "index"):
            self.index.release(self.slots(self.held))
            self.index.abort(self.slots(list(self.naive.reserved)))
            assert self.index.counts()[2] == self.index.counts().pinned == 0
            self.index.check()


class S3FIFOMachine(IndexMachine):
    policy = "s3fifo"


class ARCMachine(IndexMachine):
    policy = "arc"


class LFUMachine(IndexMachine):
    policy = "lfu"


TestIndexMachine, TestS3FIFO = IndexMachine.TestCase, S3FIFOMachine.TestCase
TestARC, TestLFU = ARCMachine.TestCase, LFUMachine.TestCase
for case in (TestIndexMachine, TestS3FIFO, TestARC, TestLFU):
    case.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
del case
