"""What a load finds in RAM is known as soon as it is called: ``Ticket.found``."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex.devices import Device, HostDevice
from kvortex.errors import ArgumentError
from kvortex.tiers.memory import MemoryStore
from tests.engine.coded import Coded
from tests.engine.tiered import Tiers, save
from tests.pages import PagedCache, keys_of


@pytest.mark.parametrize("where", ["host", "fake", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_what_is_in_ram_is_found_at_once_and_stays_there(where: Device) -> None:
    cache = PagedCache.plain(where)
    with cache.engine(slots=4) as engine:
        cache.randomize()
        saving = engine.save_blocks(keys_of(1, 2, 3), np.arange(3))
        assert saving.wait().all()
        load = engine.load_blocks(keys_of(3, 7, 1), [4, 5, 6], layerwise=True)
        assert load.found.tolist() == [True, False, True]
        found = load.found
        found[:] = False
        assert load.wait().tolist() == load.found.tolist() == [True, False, True], "a copy"
        assert engine.load_blocks(keys_of(9), [5]).found.tolist() == [False]
        assert engine.load_blocks(np.empty((0, 32), np.uint8), []).found.tolist() == []
        with pytest.raises(ArgumentError, match="found is for loads"):
            _ = saving.found


def test_what_a_tier_has_is_not_in_ram() -> None:
    cache, store = PagedCache.plain(HostDevice()), MemoryStore()
    cache.randomize()
    with cache.engine(tiers=Tiers(store).config) as engine:
        save(engine, cache, keys_of(1, 2), np.arange(2))
        assert engine.flush(10)
    with cache.engine(tiers=Tiers(store).config) as engine:
        load = engine.load_blocks(keys_of(1, 2, 3), [4, 5, 6])
        assert not load.found.any()
        assert load.wait(10).tolist() == [True, True, False] and not load.found.any()
        assert engine.load_blocks(keys_of(1, 2, 3), [4, 5, 6]).found.tolist() == [True, True, False]


@pytest.mark.parametrize("codec", ["plane", "k4v4"])
def test_first_blocks_in_parts_are_one_block_each(coded: Coded, codec: str) -> None:
    with coded.engine(codec) as engine:
        keys = keys_of(1, 2, 3)
        assert engine.save_blocks(keys, np.arange(3), first=True).wait().all()
        load = engine.load_blocks(keys_of(1, 2, 9), [4, 5, 6], first=True)
        assert load.found.tolist() == [True, True, False] == load.wait().tolist()
