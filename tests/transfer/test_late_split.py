"""Blocks that DMAs and a kernel share, on a GPU made of RAM that works late: both parts wait for the caller's stream, both
ways, and whoever waits for the transfer waits for both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.routes import Route
from tests.fake_gpu import fake_gpu
from tests.late_gpu import LateGpu
from tests.pages import Bytes, PagedCache, Tensor, assert_same, keys_of

LAYERS, BLOCKS, CALLER, READER = 8, 16, 0x77, 0x78
SHAPES = [(1, 1), (1, 2), (5, 2), (5, 3)]  # blocks, streams
WAYS = ["short", "left", "layerwise"]


@pytest.fixture(params=range(3))
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LateGpu]:
    with fake_gpu(monkeypatch, LateGpu(request.param)) as made:
        yield made


def cache_of() -> PagedCache:
    """Sixteen fragments of a block, of which DMAs take seven."""
    return PagedCache(CudaDevice(), [Tensor(CudaDevice(), (2 * LAYERS, BLOCKS, 3, 100))], 1)


def by_way(monkeypatch: pytest.MonkeyPatch, way: str) -> bool:
    """Whether layer by layer; ``left`` plans are issued by the lane's thread."""
    if way == "left":
        monkeypatch.setattr("kvortex.transfer.lane._AT_ONCE", -1)
    return way == "layerwise"


def engine_of(cache: PagedCache, streams: int, digests: bool = True) -> Any:
    options = {"num_transfer_streams": streams, "staging_buffers": streams, "digests": digests}
    return cache.engine(slots=BLOCKS, transfer_route="split", **options)


def memory_of(gpu: LateGpu, cache: PagedCache) -> Bytes:
    """What is in the pages at this moment of the GPU's, and no copy."""
    return gpu.memory[cache.tensors[0].buffer.address].array


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("count", "streams"), SHAPES)
@pytest.mark.parametrize("digests", [True, False])
def test_a_load_waits_for_who_reads_and_is_waited_for_by_who_reads_next(
    gpu: LateGpu, monkeypatch: pytest.MonkeyPatch, count: int, streams: int, way: str, digests: bool
) -> None:
    cache, layerwise = cache_of(), by_way(monkeypatch, way)
    with engine_of(cache, streams, digests) as engine:
        before = cache.randomize()
        keys, source, target = keys_of(*range(count)), np.arange(count), BLOCKS - 1 - 2 * np.arange(count)
        assert engine.save_blocks(keys, source).wait().all()
        poisoned = cache.randomize()
        gpu.finish()
        pages, seen = memory_of(gpu, cache), []
        for _ in range(20):  # of a model that still attends to the old pages
            gpu.enqueue(CALLER, lambda: seen.append(pages.copy()))
        ticket = engine.load_blocks(keys, target, stream=CALLER, layerwise=layerwise)
        if layerwise:
            ticket.wait_layer(0, READER)
        else:
            ticket.add_to(READER)
        gpu.enqueue(READER, lambda: seen.append(pages.copy()))
        assert ticket.wait(20).all() and ticket.error is None and engine.get_stats().routes[-1].route == "split"
        gpu.finish()
        wanted = cache.expected(poisoned, before, list(zip(source.tolist(), target.tolist(), strict=True)))
        assert_same(seen, [poisoned[0]] * 20 + wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("count", "streams"), SHAPES)
@pytest.mark.parametrize("digests", [True, False])
def test_a_save_waits_for_who_writes_and_is_waited_for_by_who_writes_next(
    gpu: LateGpu, monkeypatch: pytest.MonkeyPatch, count: int, streams: int, way: str, digests: bool
) -> None:
    cache, layerwise = cache_of(), by_way(monkeypatch, way)
    with engine_of(cache, streams, digests) as engine:
        wanted = cache.randomize()
        poison, keys, source = np.roll(wanted[0], 1), keys_of(*range(count)), np.arange(0, 3 * count, 3)
        pages = memory_of(gpu, cache)
        pages[:] = poison
        parts = np.array_split(np.arange(len(pages)), 20)
        fills = [lambda part=part: pages.__setitem__(part, wanted[0][part]) for part in parts]
        if layerwise:  # each layer is told when it is on the stream
            ticket = engine.save_blocks(keys, source, stream=CALLER, layerwise=True)
        for fill in fills:
            gpu.enqueue(CALLER, fill)
        if layerwise:
            for layer in range(engine.layout.num_layers):
                ticket.save_layer(layer)
        else:
            ticket = engine.save_blocks(keys, source, stream=CALLER)
        ticket.add_to(READER)
        gpu.enqueue(READER, lambda: pages.__setitem__(slice(None), poison))
        assert ticket.wait(20).all() and engine.get_stats().routes[-1].route == "split"
        gpu.finish()
        assert engine.load_blocks(keys, source).wait().all(), "what was digested is what was saved"
        gpu.finish()
        saved = [(block, block) for block in source.tolist()]
        assert_same(cache.memory(), cache.expected([poison], wanted, saved))


@pytest.mark.parametrize("other", [Route.STAGED, Route.RESIDENT, Route.STRIDED, Route.BATCHED, Route.MAPPED])
def test_between_others_nothing_is_mixed_up(gpu: LateGpu, monkeypatch: pytest.MonkeyPatch, other: Route) -> None:
    """Streams, events and their turns are those of other routes, too."""
    order = [other, Route.SPLIT, other, Route.SPLIT, Route.SPLIT, other] * 2
    monkeypatch.setattr("kvortex.transfer.cuda.choose", lambda *_, **__: order.pop(0))
    cache = cache_of()
    with cache.engine(slots=BLOCKS, num_transfer_streams=3, gpu_pool_size_bytes=12 * 4096) as engine:
        before = cache.randomize()
        some = [np.arange(at, at + 1 + at % 2) for at in (0, 1, 3, 4, 6, 7)]
        saves = [engine.save_blocks(keys_of(*blocks.tolist()), blocks, stream=CALLER) for blocks in some]
        assert all(save.wait(20).all() for save in saves)
        poisoned = cache.randomize()
        gpu.finish()
        loads = [engine.load_blocks(keys_of(*blocks.tolist()), blocks, stream=CALLER) for blocks in some]
        assert all(load.wait(20).all() for load in loads)
        gpu.finish()
        moved = [(block, block) for blocks in some for block in blocks.tolist()]
        assert_same(cache.memory(), cache.expected(poisoned, before, moved))


def test_a_damaged_byte_fails_its_block_on_either_side_of_the_cut(gpu: LateGpu) -> None:
    """In a slot: the first and last byte of what DMAs move, and of what the kernel does."""
    cache = cache_of()
    with engine_of(cache, 2) as engine:
        cache.randomize()
        fragment, whole = 600, cache.layout.record_bytes
        for at, byte in enumerate((0, 7 * fragment - 1, 7 * fragment, whole - 1)):
            keys, blocks = keys_of(10 * at, 10 * at + 1), np.array([2, 9])
            assert engine.save_blocks(keys, blocks).wait().all()
            slot = int(engine._index.acquire(keys[:1])[0])
            engine._parts.arena.view(slot * engine._executor._pool.slot_bytes, whole)[byte] ^= 1
            engine._index.release(np.array([slot]))
            assert engine.load_blocks(keys, blocks + 1).wait().tolist() == [False, True]
