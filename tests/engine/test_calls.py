"""What each call does and refuses; a refused call has done nothing."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from kvortex import KVLayout, KVortexConfig, KVortexEngine
from kvortex.devices import Device
from kvortex.errors import (
    ArgumentError,
    ConfigError,
    DeviceUnavailableError,
    EngineClosedError,
    LayoutError,
    PoolFullError,
)
from tests.pages import PagedCache, Tensor, assert_same, keys_of


def idle(engine: KVortexEngine) -> tuple[int, int]:
    stats = engine.get_stats()
    return stats.reserved_blocks, stats.pinned_blocks


def test_saving_what_is_there_moves_nothing(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        first = cache.randomize()
        engine.save_blocks(keys_of(1, 2), [3, 4]).wait()
        second = cache.randomize()
        ticket = engine.save_blocks(keys_of(2, 5), [6, 7])
        assert ticket.wait().tolist() == [True, True]
        assert ticket.nbytes == cache.layout.record_bytes
        again = engine.save_blocks(keys_of(1, 2, 5), [8, 9, 10])
        assert again.done() and again.nbytes == 0 and again.seconds == 0.0 and again.mask.all()
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(2, 5), [0, 1]).wait().all()
        wanted = cache.expected(cache.expected(poisoned, first, [(4, 0)]), second, [(7, 1)])
        assert_same(cache.memory(), wanted)


def test_a_miss_leaves_its_page_alone(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        before = cache.randomize()
        engine.save_blocks(keys_of(1, 3), [1, 3]).wait()
        ticket = engine.load_blocks(keys_of(1, 2, 3, 4), [10, 11, 12, 13])
        assert ticket.wait().tolist() == [True, False, True, False]
        assert ticket.error is None
        assert_same(cache.memory(), cache.expected(before, before, [(1, 10), (3, 12)]))
        assert engine.load_blocks(keys_of(8, 9), [0, 1]).wait().tolist() == [False, False]
        assert engine.get_stats().missed_blocks == 4


def test_one_block_into_several_pages(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        before = cache.randomize()
        engine.save_blocks(keys_of(1), [5]).wait()
        assert engine.load_blocks(keys_of(1, 1, 1), [0, 7, 2]).wait().all()
        assert_same(cache.memory(), cache.expected(before, before, [(5, 0), (5, 7), (5, 2)]))
        assert idle(engine) == (0, 0)


def test_nothing_to_do(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        assert engine.check_blocks([]).shape == (0,)
        assert engine.save_blocks([], []).wait().shape == (0,)
        assert engine.load_blocks(np.empty((0, 32), np.uint8), np.empty(0, np.int64)).wait().shape == (0,)


def test_least_recently_used_goes_first(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine(slots=4) as engine:
        cache.randomize()
        for number in range(4):
            engine.save_blocks(keys_of(number), [number]).wait()
        engine.load_blocks(keys_of(0), [9]).wait()
        engine.check_blocks(keys_of(1))  # a look is no use
        engine.save_blocks(keys_of(7, 8), [7, 8]).wait()
        assert engine.check_blocks(keys_of(0, 1, 2, 3, 7, 8)).tolist() == [True, False, False, True, True, True]
        assert engine.get_stats().evictions == 2


def test_the_tail_of_a_prefix_goes_before_its_head(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine(slots=4) as engine:
        engine.save_blocks(keys_of(0, 1, 2, 3), [0, 1, 2, 3]).wait()
        engine.save_blocks(keys_of(9), [9]).wait()
        assert engine.check_blocks(keys_of(0, 1, 2, 3, 9)).tolist() == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("keys", "blocks", "message"),
    [
        (keys_of(1, 2), [1], "block_ids has 1 entries for 2 keys"),
        (keys_of(1), [24], r"block_ids\[0\] = 24: the layout has blocks 0 to 23"),
        (keys_of(1, 2), [0, -1], r"block_ids\[1\] = -1"),
        (keys_of(1, 2, 3), [4, 5, 4], r"block_ids\[0\] and block_ids\[2\] are both 4"),
        (keys_of(1), [1.0], "1-d integers; seen among them: float"),
        (keys_of(1), np.ones(1), "1-d integers; seen: shape \\(1,\\), dtype float64"),
        (keys_of(1), [True], "among them: bool"),
        (keys_of(1, 2), [True, 2], "among them: bool"),
        (keys_of(1), np.ones(1, bool), "dtype bool"),
        (keys_of(1), np.ma.array([1], mask=[True]), "block_ids is a masked array"),
        (np.ma.array(keys_of(1)), [1], "keys is a masked array"),
        (keys_of(1), b"\1", "seen: bytes"),
        (keys_of(1), [[1]], "among them: list"),
        (keys_of(1), np.ones((1, 1), int), r"shape \(1, 1\)"),
        (keys_of(1), None, "block_ids are missing"),
        (np.zeros((1, 31), np.uint8), [1], "32"),
        ([b"short"], [1], "32"),
    ],
)
def test_arguments_that_do_not_fit(device: Device, keys: object, blocks: object, message: str) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        before = cache.randomize()
        for call in (engine.save_blocks, engine.load_blocks):
            with pytest.raises(ArgumentError, match=message):
                call(keys, blocks)
        assert idle(engine) == (0, 0) and engine.get_stats().resident_blocks == 0
        assert_same(cache.memory(), before)


def test_a_key_twice_in_one_save(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        with pytest.raises(ArgumentError, match=r"keys\[0\] and keys\[2\]"):
            engine.save_blocks(keys_of(1, 2, 1), [1, 2, 3])
        assert idle(engine) == (0, 0) and not engine.check_blocks(keys_of(1, 2)).any()


@pytest.mark.parametrize("stream", [object(), "stream", 1.5, True, -1])
def test_add_to_what_is_no_stream(device: Device, stream: object) -> None:
    """Also of a ticket that has nothing to wait for."""
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        tickets = [engine.save_blocks(keys_of(5), [5]), engine.save_blocks([], []), engine.load_blocks(keys_of(6), [6])]
        for ticket in (*tickets, engine.save_blocks(keys_of(5), [5])):
            for _ in range(2):
                with pytest.raises(ArgumentError, match="stream"):
                    ticket.add_to(stream)
                ticket.add_to(None)
                ticket.wait()


@pytest.mark.parametrize("stream", [object(), "stream", 1.5, True, -1])
def test_what_is_no_stream(device: Device, stream: object) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        engine.save_blocks(keys_of(5), [5]).wait()
        for call in (engine.save_blocks, engine.load_blocks):
            with pytest.raises(ArgumentError, match="stream"):
                call(keys_of(5), [1], stream=stream)
        assert idle(engine) == (0, 0)


def test_more_blocks_than_slots(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine(slots=4) as engine:
        engine.save_blocks(keys_of(0, 1), [0, 1]).wait()
        with pytest.raises(PoolFullError, match="5 slots asked for"):
            engine.save_blocks(keys_of(2, 3, 4, 5, 6), [2, 3, 4, 5, 6])
        assert engine.check_blocks(keys_of(0, 1)).all()
        assert engine.get_stats().evictions == 0
        assert engine.save_blocks(keys_of(2, 3, 4, 5), [2, 3, 4, 5]).wait().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_ptrs": [4096]}, "need pointers and sizes"),
        ({"data_ptrs": [4096], "sizes": [0]}, r"sizes\[0\] = 0"),
        ({"data_ptrs": [4096], "sizes": [1 << 40]}, "a slot holds 1 to"),
        ({"data_ptrs": [0], "sizes": [8]}, "is no address"),
        ({"data_ptrs": [-5], "sizes": [8]}, "is no address"),
        ({"data_ptrs": [4096, 8192], "sizes": [8]}, "pointers has 2 entries for 1 keys"),
        ({"data_ptrs": [4096], "sizes": [8, 8]}, "sizes has 2 entries"),
        ({"data_ptrs": [4096], "sizes": [8], "block_ids": [1]}, "no block_ids"),
        ({"data_ptrs": np.array([1 << 63], np.uint64), "sizes": [8]}, "63 bits"),
        ({"data_ptrs": np.array([1 << 63], ">u8"), "sizes": [8]}, "63 bits"),
        ({"data_ptrs": [1 << 63], "sizes": [8]}, "64 bits"),
        ({"data_ptrs": [(1 << 63) - 8], "sizes": [8]}, "buffer 0 of 8 bytes at 0x7ffffffffffffff8 ends past the last address"),
        ({"data_ptrs": [4096], "sizes": [(1 << 63) - 1]}, "a slot holds 1 to"),
        ({"data_ptrs": [4096], "sizes": [1 << 64]}, "64 bits"),
        ({"data_ptrs": [4096], "sizes": [True]}, "sizes must be 1-d integers; seen among them: bool"),
        ({"data_ptrs": np.ma.array([4096]), "sizes": [8]}, "pointers is a masked array"),
    ],
)
def test_buffers_that_do_not_fit(device: Device, arguments: dict, message: str) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        with pytest.raises(ArgumentError, match=message):
            engine.save_blocks(keys_of(1), **arguments)
        if "data_ptrs" in arguments:
            arguments = {**arguments, "output_ptrs": arguments["data_ptrs"]}
            del arguments["data_ptrs"]
        with pytest.raises(ArgumentError, match=message):
            engine.load_blocks(keys_of(1), **arguments)


def test_buffers_of_another_size_than_saved(device: Device) -> None:
    cache = PagedCache.plain(device)
    buffer = device.allocate(8192)
    with cache.engine() as engine:
        engine.save_blocks(keys_of(1, 2), [buffer.address, buffer.address + 100], [100, 200]).wait()
        with pytest.raises(ArgumentError, match=r"keys\[1\] has a record of 200 bytes, not of 100"):
            engine.load_blocks(keys_of(1, 2), [buffer.address, buffer.address + 4096], [100, 100])
        with pytest.raises(ArgumentError, match="has a record of 100 bytes, not of"):
            engine.load_blocks(keys_of(1), [0])
        with pytest.raises(ArgumentError, match="buffers 0 and 1 overlap"):
            engine.load_blocks(keys_of(1, 2), [buffer.address, buffer.address + 99], [100, 200])
        assert idle(engine) == (0, 0)


def test_an_engine_without_a_layout_has_no_pages(device: Device) -> None:
    with pytest.raises(ConfigError, match="max_block_bytes"):
        KVortexEngine.create(KVortexConfig(device=device.name))
    config = KVortexConfig(device=device.name, max_block_bytes=100, cpu_pool_size_bytes=1 << 20)
    with KVortexEngine.create(config) as engine, pytest.raises(ArgumentError, match="no layout"):
        engine.save_blocks(keys_of(1), [1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("x", "config must be a KVortexConfig; seen: str 'x'. Pass KVortexConfig"),
        (KVortexConfig, "config must be a KVortexConfig; seen: type <class"),
        ({"device": "host"}, "config must be a KVortexConfig; seen: dict {'device'"),
        ([np.zeros((4, 8))] * 1000, "seen: list"),
    ],
)
def test_what_is_no_config(config: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        KVortexEngine.create(config)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("layout", [[np.zeros((4, 8))], np.zeros((1000, 8)), KVLayout, KVortexConfig(), "x" * 10**6, 0, False])
def test_what_is_no_layout(layout: object) -> None:
    with pytest.raises(LayoutError, match="layout must be a KVLayout; seen: .*Pass KVLayout.from_arrays") as caught:
        KVortexEngine.create(KVortexConfig(device="host"), layout)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300


def test_budgets_are_exact(device: Device) -> None:
    cache = PagedCache.plain(device)
    slot = -(-cache.layout.record_bytes // 4096) * 4096
    config = KVortexConfig(cpu_pool_size_bytes=5 * slot + 17, device=device.name, gpu_pool_size_bytes=8 << 20)
    with KVortexEngine.create(config, cache.layout) as engine:
        assert engine.get_stats().capacity_blocks == 5
    with pytest.raises(ConfigError, match="cpu_pool_size_bytes"):
        KVortexEngine.create(KVortexConfig(cpu_pool_size_bytes=slot - 1, device=device.name), cache.layout)


def test_layout_and_config_name_different_devices() -> None:
    layout = KVLayout.from_pointers([(4096, (4, 64), (64, 1), 1)], device="cuda:0")
    with pytest.raises((LayoutError, DeviceUnavailableError)):
        KVortexEngine.create(KVortexConfig(device="host"), layout)
    with pytest.raises(DeviceUnavailableError):
        KVortexEngine.create(KVortexConfig(device="cuda:99"), layout)


@pytest.mark.gpu
def test_a_layout_of_host_memory_on_a_gpu() -> None:
    array = np.zeros((4, 4096), np.uint8)
    layout = KVLayout.from_pointers([(array.ctypes.data, (4, 4096), (4096, 1), 1)], device="cuda:0")
    from kvortex.devices import open_device

    device = open_device("cuda")
    device.pin(array.ctypes.data, array.nbytes)
    with pytest.raises(LayoutError, match="belongs to host"):
        KVortexEngine.create(KVortexConfig(), layout)
    device.unpin(array.ctypes.data)


def test_keys_of_different_namespaces_never_meet(device: Device) -> None:
    cache = PagedCache.plain(device)
    other = PagedCache(device, [Tensor(device, (24, 2, 16, 4, 16)) for _ in range(2)], 0)
    tokens = np.arange(64)
    seen = set()
    for config in (
        KVortexConfig(cpu_pool_size_bytes=1 << 20),
        KVortexConfig(cpu_pool_size_bytes=1 << 20, model="m"),
        KVortexConfig(cpu_pool_size_bytes=1 << 20, dtype="m"),
        KVortexConfig(cpu_pool_size_bytes=1 << 20, rank=1, world_size=2),
        KVortexConfig(cpu_pool_size_bytes=1 << 20, lora="m"),
        KVortexConfig(cpu_pool_size_bytes=1 << 20, salt="m"),
    ):
        for source in (cache, other):
            with KVortexEngine.create(config, source.layout) as engine:
                keys = engine.block_keys(tokens)
                assert len(keys) == 4
                np.testing.assert_array_equal(engine.block_keys(tokens[32:], parent=keys[1]), keys[2:])
                seen.update(map(bytes, keys))
                seen.update(map(bytes, engine.block_keys(tokens, lora="request")))
                seen.update(map(bytes, engine.block_keys(tokens, salt="request")))
    assert len(seen) == 6 * 2 * 4 * 3 - 2 * 4 * 2  # a lora or salt of the config that the request replaces counts once


def test_tickets_can_be_awaited(device: Device) -> None:
    cache = PagedCache.plain(device)

    async def both(engine: KVortexEngine) -> None:
        assert (await engine.save_blocks(keys_of(1, 2), [1, 2])).all()
        masks = await asyncio.gather(*(turn(engine, page) for page in (3, 4, 5)))
        assert all(mask.all() for mask in masks)

    async def turn(engine: KVortexEngine, page: int) -> np.ndarray:
        return await engine.load_blocks(keys_of(1), [page])

    with cache.engine() as engine:
        before = cache.randomize()
        asyncio.run(both(engine))
        assert_same(cache.memory(), cache.expected(before, before, [(1, 3), (1, 4), (1, 5)]))


def test_stats_add_up(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        record = cache.layout.record_bytes
        assert engine.get_stats().cache_hit_rate == 0.0
        engine.save_blocks(keys_of(1, 2, 3), [1, 2, 3]).wait()
        engine.check_blocks(keys_of(1, 2, 3, 4))
        engine.load_blocks(keys_of(1, 2, 9), [4, 5, 6]).wait()
        stats = engine.get_stats()
        assert (stats.checked_blocks, stats.hit_blocks, stats.cache_hit_rate) == (4, 3, 0.75)
        assert (stats.saved_blocks, stats.saved_bytes) == (3, 3 * record)
        assert (stats.loaded_blocks, stats.loaded_bytes, stats.missed_blocks) == (2, 2 * record, 1)
        assert 0 < stats.save_seconds < 60 and 0 < stats.load_seconds < 60
        assert stats.save_bytes_per_second > 0 and stats.load_bytes_per_second > 0
        assert (stats.resident_blocks, stats.reserved_blocks, stats.pinned_blocks) == (3, 0, 0)
        assert stats.capacity_blocks == 32


def test_use_after_shutdown(device: Device) -> None:
    cache = PagedCache.plain(device)
    engine = cache.engine()
    ticket = engine.save_blocks(keys_of(1), [1])
    engine.shutdown()
    engine.shutdown()
    assert ticket.done() and ticket.wait().all()
    ticket.add_to(None)
    for call in (
        lambda: engine.check_blocks(keys_of(1)),
        lambda: engine.save_blocks(keys_of(1), [1]),
        lambda: engine.load_blocks(keys_of(1), [1]),
        engine.get_stats,
    ):
        with pytest.raises(EngineClosedError):
            call()
    assert "closed" in repr(engine)


def test_dropped_blocks_are_misses_and_their_slots_are_free(device: Device) -> None:
    cache = PagedCache.plain(device)
    cache.randomize()
    with cache.engine(slots=4) as engine:
        engine.save_blocks(keys_of(1, 2, 3), [0, 1, 2]).wait()
        assert engine.drop_blocks(keys_of(1, 3, 9)) == 2
        assert engine.check_blocks(keys_of(1, 2, 3)).tolist() == [False, True, False]
        engine.save_blocks(keys_of(4, 5, 6), [3, 4, 5]).wait()
        stats = engine.get_stats()
        assert (stats.resident_blocks, stats.evictions) == (4, 0)
        assert engine.drop_blocks(keys_of()) == 0
