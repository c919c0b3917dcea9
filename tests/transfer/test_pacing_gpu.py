"""Paced transfers on a real GPU: every byte, the pace of a share, and who hurries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvortex import KVortexEngine
from kvortex.devices import open_device
from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.issue.cells import PACED
from tests.pages import PagedCache, Tensor, assert_same, keys_of

pytestmark = pytest.mark.gpu
PAGES, COUNT, STAGING = 256, 128, 8 * (16 << 20)  # of 512 KiB: 64 MiB at a time; four buffers each way


@pytest.fixture(scope="module")
def cache() -> PagedCache:
    device = open_device("cuda")
    assert isinstance(device, CudaDevice)
    return PagedCache(device, [Tensor(device, (2, PAGES, 128, 64)) for _ in range(16)], 1)


def engine_of(cache: PagedCache, **options: Any) -> KVortexEngine:
    shape = {"gpu_pool_size_bytes": STAGING, "staging_buffers": 4, "num_transfer_streams": 2}
    return cache.engine(slots=4 * COUNT, transfer_route="staged", beside_compute=True, **shape, **options)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_every_byte_arrives_with_transfers_in_flight_both_ways(cache: PagedCache, share: float) -> None:
    with engine_of(cache, link_share_beside_compute=share) as engine:
        before, rng = cache.randomize(), np.random.default_rng(3)
        order = rng.permutation(PAGES)
        source, target = order[:COUNT], order[COUNT:]
        first = keys_of(*range(COUNT))
        save = engine.save_blocks(first, source)
        assert save._transfer.completion.outcome[PACED] and save.wait().all()
        tickets = []
        for turn in range(1, 4):  # the same pages are read and the others written, again and again
            tickets.append(engine.save_blocks(keys_of(*range(turn * COUNT, (turn + 1) * COUNT)), source))
            tickets.append(engine.load_blocks(first, target))
        assert all(ticket._transfer.completion.outcome[PACED] for ticket in tickets)
        assert all(ticket.wait().all() for ticket in tickets)
        moves = list(zip(source.tolist(), target.tolist(), strict=True))
        wanted = cache.expected(before, before, moves)
        assert_same(cache.memory(), wanted)
        cache.randomize()
        assert engine.load_blocks(keys_of(*range(3 * COUNT, 4 * COUNT)), target).wait().all()
        assert_same(cache.memory(), cache.expected(cache.memory(), before, moves))


@pytest.mark.parametrize("save", [True, False])
def test_a_share_is_kept_and_who_waits_with_a_stream_hurries(cache: PagedCache, save: bool) -> None:
    with engine_of(cache, link_share_beside_compute=0.02) as engine:
        cache.randomize()
        saved = engine.save_blocks(keys_of(*range(COUNT)), np.arange(COUNT))
        saved.add_to(None)
        assert saved.wait().all()
        rate = 0.02 * engine._executor._profile.link_rate
        seconds = []
        for turn, hurried in enumerate((False, True)):
            keys = keys_of(*range(1000 * (turn + 1), 1000 * (turn + 1) + COUNT)) if save else keys_of(*range(COUNT))
            ticket = (engine.save_blocks if save else engine.load_blocks)(keys, np.arange(COUNT))
            if hurried:
                ticket.add_to(None)
            assert ticket.wait().all()
            seconds.append(ticket.seconds)
        assert seconds[0] > 0.6 * ticket.nbytes / rate, "all but the first buffer waited for its turn"
        assert seconds[1] < 0.3 * ticket.nbytes / rate
