"""What a set of keys remembers, and for how long."""

from __future__ import annotations

import threading

import numpy as np

from kvortex.tiers.keyset import KeySet
from tests.pages import keys_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_keys_are_forgotten_between_half_a_lifetime_and_a_whole_one() -> None:
    clock = Clock()
    keys = KeySet(16, 10.0, clock)
    keys.add(keys_of(1, 2))
    clock.now = 4.9
    keys.add(keys_of(3))
    clock.now = 5.0
    keys.add(keys_of(2, 4))
    assert keys.lookup(keys_of(1, 2, 3, 4, 5)).tolist() == [True, True, True, True, False]
    clock.now = 10.0
    assert keys.lookup(keys_of(1, 2, 3, 4)).tolist() == [False, True, False, True]
    clock.now = 30.0
    assert not keys.lookup(keys_of(1, 2, 3, 4)).any()


def test_who_asks_late_gets_no_older_keys() -> None:
    clock = Clock()
    keys = KeySet(16, 10.0, clock)
    keys.add(keys_of(1))
    clock.now = 9.9
    assert keys.lookup(keys_of(1)).all()  # the first call for long
    keys.add(keys_of(2))
    clock.now = 10.0
    assert keys.lookup(keys_of(1, 2)).tolist() == [False, True]
    clock.now = 14.9
    assert keys.lookup(keys_of(2)).all()


def test_it_is_bounded_and_takes_duplicates_and_more_than_it_holds() -> None:
    keys = KeySet(8, float("inf"))
    keys.add(keys_of(*range(100)))
    assert len(keys) == 8
    keys.add(keys_of(7, 7, 7))
    assert keys.lookup(keys_of(7)).all() and len(keys) == 8
    keys.drop(keys_of(7, 999))
    assert not keys.lookup(keys_of(7)).any()


def test_many_threads() -> None:
    clock = Clock()
    keys, errors = KeySet(64, 1.0, clock), []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(200):
                some = keys_of(*rng.integers(0, 200, 8).tolist())
                keys.add(some)
                keys.lookup(some)
                keys.drop(some[:2])
                clock.now += 0.01
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
