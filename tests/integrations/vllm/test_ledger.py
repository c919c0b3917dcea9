"""The scheduler's ledger, beside a dictionary that does the same slowly."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex.integrations.vllm.ledger import Ledger
from kvortex.keys import Namespace


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def names(*numbers: int) -> list[bytes]:
    return [name(number) for number in numbers]


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(4, "lru", 1, Namespace())


def store(ledger: Ledger, *numbers: int) -> list[bytes]:
    made = ledger.reserve(names(*numbers))
    ledger.commit(names(*numbers))
    return made.evicted


def test_a_name_is_here_when_it_was_committed(ledger: Ledger) -> None:
    made = ledger.reserve(names(1, 2))
    assert ledger.slot_of(name(1)) is None and ledger.is_pending(name(1)) and ledger.run(names(1, 2)) == 0
    assert ledger.commit(names(1, 2, 9)) == names(1, 2)
    assert ledger.run(names(1, 2, 3)) == 2 and [ledger.slot_of(n) for n in names(1, 2)] == made.slots.tolist()
    assert not ledger.is_pending(name(1))


def test_aborted_names_are_gone_and_their_slots_free(ledger: Ledger) -> None:
    ledger.reserve(names(1, 2))
    ledger.abort(names(1, 2, 3))
    assert ledger.counts().free == 4 and not ledger.is_pending(name(1)) and ledger.commit(names(1)) == []


def test_who_goes_for_others_is_told_and_a_pin_keeps(ledger: Ledger) -> None:
    store(ledger, 1, 2, 3, 4)
    pins = ledger.pin(names(1, 2, 77))
    assert pins[2] == -1
    assert set(store(ledger, 5, 6)) == set(names(3, 4))
    assert ledger.run(names(1, 2)) == 2
    ledger.unpin(pins)
    assert ledger.counts().pinned == 0
    assert set(store(ledger, 7, 8, 9, 10)) == set(names(1, 2, 5, 6))


def test_as_many_as_fit_are_reserved_from_the_first_on(ledger: Ledger) -> None:
    store(ledger, 1, 2, 3, 4)
    pins = ledger.pin(names(1, 2))
    made = ledger.reserve(names(5, 6, 7, 8))
    assert made.positions.tolist() == [0, 1]
    assert ledger.reserve(names(9)).positions.tolist() == []
    ledger.commit(names(5, 6))
    ledger.unpin(pins)
    assert ledger.counts().resident == 4


def test_a_dropped_pinned_slot_comes_back_when_its_pins_do(ledger: Ledger) -> None:
    store(ledger, 1, 2, 3, 4)
    pins = ledger.pin(names(2))
    ledger.drop(names(2, 55))
    assert ledger.slot_of(name(2)) is None and ledger.counts().free == 0
    made = ledger.reserve(names(2))  # anew, in another slot
    assert made.slots.tolist() != pins.tolist()
    ledger.commit(names(2))
    ledger.unpin(pins)
    store(ledger, 6)  # takes the slot that was dropped: 2 must stay where it is now
    assert ledger.slot_of(name(2)) == made.slots[0]


def test_names_of_several_lengths(ledger: Ledger) -> None:
    ledger.reserve([b"a" * 32, b"b" * 36])
    ledger.commit([b"a" * 32, b"b" * 36])
    assert ledger.run([b"a" * 32, b"b" * 36]) == 2
    assert (ledger.pin([b"b" * 36, b"a" * 36]) >= 0).tolist() == [True, False]


@pytest.mark.parametrize("policy", ["lru", "s3fifo", "arc", "lfu"])
def test_the_dictionary_and_the_index_agree(policy: str) -> None:
    ledger, rng = Ledger(16, policy, 1, Namespace()), np.random.default_rng(5)
    held: list[tuple[bytes, int]] = []
    for _ in range(800):
        batch = [name(int(n)) for n in rng.choice(40, rng.integers(1, 6), replace=False)]
        what = rng.integers(6)
        if what < 2:
            made = ledger.reserve(batch)
            mine = [batch[i] for i in made.positions]
            ledger.commit(mine) if rng.random() < 0.8 else ledger.abort(mine)
        elif what == 2 and len(held) < 8:
            held += [(n, int(s)) for n, s in zip(batch, ledger.pin(batch), strict=True) if s >= 0]
        elif what == 3 and held:
            ledger.unpin([held.pop(int(rng.integers(len(held))))[1]])
        elif what == 4:
            ledger.touch(batch)
        else:
            ledger.drop(batch[:1])
        everything = [name(n) for n in range(40)]
        assert [ledger.slot_of(n) is not None for n in everything] == ledger._index.lookup(ledger._keys(everything)).tolist()
        slots = [ledger.slot_of(n) for n in ledger.names()]
        assert len(set(slots)) == len(slots)
    ledger.unpin([slot for _, slot in held])
    assert ledger.counts().pinned == 0 and ledger.counts().reserved == 0
    ledger._index.check()
