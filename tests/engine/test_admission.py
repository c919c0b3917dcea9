"""Eviction policies and admission, seen through an engine."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex.config import _POLICIES
from kvortex.devices import Device
from kvortex.index import POLICIES
from tests.pages import PagedCache, assert_same, keys_of


def test_the_config_knows_every_policy_and_no_other() -> None:
    assert sorted(_POLICIES) == list(_POLICIES) == sorted(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_that_is_asked_for_evicts(device: Device, policy: str) -> None:
    """Three slots. Block 1 is loaded twice, then 2 once, then 4 comes, 5, and 6: who is left depends on the policy."""
    cache = PagedCache.plain(device)
    left = {"lru": [4, 5, 6], "s3fifo": [1, 5, 6], "arc": [1, 2, 6], "lfu": [1, 2, 6]}
    with cache.engine(slots=3, eviction_policy=policy) as engine:
        assert engine._index.policy == policy
        for block in (1, 2, 3):
            engine.save_blocks(keys_of(block), [block]).wait()
        for block in (1, 1, 2):
            assert engine.load_blocks(keys_of(block), [9]).wait().all()
        for block in (4, 5, 6):
            assert engine.save_blocks(keys_of(block), [block]).wait().all()
        found = engine.check_blocks(keys_of(*range(1, 7)))
        assert (np.flatnonzero(found) + 1).tolist() == left[policy]
        engine._index.check()


def test_a_block_is_saved_at_the_nth_offer(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine(admit_after=3) as engine:
        before = cache.randomize()
        for _ in range(2):
            ticket = engine.save_blocks(keys_of(1, 2), [1, 2])
            assert ticket.wait().tolist() == [False, False] and ticket.error is None and ticket.nbytes == 0
        ticket = engine.save_blocks(keys_of(3, 1), [3, 1])
        assert ticket.wait().tolist() == [False, True] and ticket.nbytes == cache.layout.record_bytes
        assert engine.check_blocks(keys_of(1, 2, 3)).tolist() == [True, False, False]
        assert engine.save_blocks(keys_of(1, 2), [1, 2]).wait().tolist() == [True, True]
        stats = engine.get_stats()
        assert (stats.declined_blocks, stats.saved_blocks, stats.reserved_blocks) == (5, 2, 0)
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(1, 2, 3), [4, 5, 6]).wait().tolist() == [True, True, False]
        assert_same(cache.memory(), cache.expected(poisoned, before, [(1, 4), (2, 5)]))


def test_a_layerwise_save_of_nothing_that_is_admitted(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine(admit_after=2) as engine:
        ticket = engine.save_blocks(keys_of(1, 2), [1, 2], layerwise=True)
        for layer in range(2):
            ticket.save_layer(layer)
        assert ticket.wait().tolist() == [False, False] and ticket.error is None
        ticket = engine.save_blocks(keys_of(2, 3), [2, 3], layerwise=True)
        for layer in range(2):
            ticket.save_layer(layer)
        assert ticket.wait().tolist() == [True, False]
        assert engine.check_blocks(keys_of(1, 2, 3)).tolist() == [False, True, False]
        engine._index.check()


def test_an_aborted_save_is_offered_anew(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine(admit_after=2) as engine:
        engine.save_blocks(keys_of(1), [1]).wait()
        ticket = engine.save_blocks(keys_of(1), [1], layerwise=True)
        assert ticket.abort() and not ticket.wait().any()
        assert engine.save_blocks(keys_of(1), [1]).wait().tolist() == [False]
        assert engine.save_blocks(keys_of(1), [1]).wait().tolist() == [True]
