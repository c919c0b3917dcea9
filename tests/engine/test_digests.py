"""Blocks that are not what was saved: seen when they are loaded, told, dropped, and nobody else's trouble."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvortex import KVortexEngine
from kvortex.devices import Device, HostDevice, HostStream
from kvortex.devices.cuda import CudaDevice
from kvortex.digests import DIGEST_BYTES, digest_records
from kvortex.errors import CorruptBlocksError
from perf.flips import in_staging
from tests.fake_gpu import fake_gpu
from tests.naive_digest import digest
from tests.pages import PagedCache, Tensor, assert_same, keys_of

ROUTES = ["staged", "resident", "strided", "batched", "mapped"]
KINDS = ["layers", "odd", "bytes", "one piece"]
BLOCKS = 12


@pytest.fixture(params=["host", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def any_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The host, a GPU made of RAM, and a GPU."""
    from kvortex.devices import open_device

    with fake_gpu(monkeypatch) if request.param == "fake" else contextlib.nullcontext():
        yield CudaDevice() if request.param == "fake" else open_device(request.param)


def cache_of(device: Device, kind: str) -> PagedCache:
    if kind == "one piece":  # so long that it goes by DMA alone, whatever the route
        return PagedCache(device, [Tensor(device, (BLOCKS, 600_000), 1)], 0)
    if kind == "odd":  # of which no offset in the record is a multiple of 16 but the first
        tensors = [Tensor(device, (BLOCKS, 333), 1, shift=1), Tensor(device, (2, BLOCKS, 77), 1, shift=3)]
        return PagedCache(device, tensors, [0, 1])
    if kind == "bytes":
        return PagedCache(device, [Tensor(device, (BLOCKS, 1042), 1), Tensor(device, (BLOCKS, 514), 1)], 0)
    return PagedCache(device, [Tensor(device, (2, BLOCKS, 4, 128)) for _ in range(4)], 1)


def engine_of(cache: PagedCache, route: str, **options: Any) -> KVortexEngine:
    return cache.engine(slots=BLOCKS, transfer_route=route, gpu_pool_size_bytes=1 << 20, **options)


def records(cache: PagedCache, memory: list[npt.NDArray[np.uint8]], blocks: list[int]) -> list[bytes]:
    """The bytes of blocks, fragment after fragment."""
    bases = np.cumsum([0, *(len(m) for m in memory)])
    whole, found = np.concatenate(memory), []
    starts = [tensor.buffer.address for tensor in cache.tensors]
    for block in blocks:
        record = b""
        for base, stride, _, nbytes in cache.layout.fragments.tolist():
            tensor = max((start, at) for at, start in enumerate(starts) if start <= base)[1]
            first = int(bases[tensor]) + base + block * stride - starts[tensor]
            record += whole[first : first + nbytes].tobytes()
        found.append(record)
    return found


def digest_of(data: bytes) -> bytes:
    """As defined; of what is long by the host's own function, which has tests of its own."""
    if len(data) < 1 << 16:
        return digest(data)
    array, out = np.frombuffer(data, np.uint8), np.empty((1, DIGEST_BYTES), np.uint8)
    digest_records(np.array([array.ctypes.data]), np.array([len(data)]), out)
    return out.tobytes()


def slot_of(engine: KVortexEngine, key: int) -> int:
    slots = engine._index.acquire(keys_of(key))
    engine._index.release(slots)
    return int(slots[0])


def flip(engine: KVortexEngine, key: int, bit: int) -> None:
    """One bit of a block in pinned RAM."""
    view = engine._parts.arena.view(slot_of(engine, key))
    view[bit // 8] ^= np.uint8(1 << bit % 8)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_a_flipped_bit_in_pinned_ram(
    any_device: Device, route: str, kind: str, layerwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "bytes":  # as in transfers that are too long to have sums for each piece
        monkeypatch.setattr("kvortex.transfer.digesting.MOST_APART", 0)
    cache = cache_of(any_device, kind)
    record = cache.layout.record_bytes
    with engine_of(cache, route) as engine:
        before = cache.randomize()
        ticket = engine.save_blocks(keys_of(*range(8)), np.arange(8)[::-1], layerwise=layerwise)
        for layer in range(cache.layout.num_layers if layerwise else 0):
            ticket.save_layer(layer)
        assert ticket.wait().all()
        wanted = [digest_of(part) for part in records(cache, before, [7 - key for key in range(8)])]
        kept = engine._parts.digests[[slot_of(engine, key) for key in range(8)]]
        assert [row.tobytes() for row in kept] == wanted, "what is kept are the pages' digests"
        flip(engine, 2, 8 * record - 1)
        flip(engine, 5, int(np.random.default_rng(1).integers(8 * record)))
        poisoned = cache.randomize()
        ticket = engine.load_blocks(keys_of(5, 0, 2, 6), [8, 9, 10, 11], layerwise=layerwise)
        assert ticket.wait().tolist() == [False, True, False, True]
        assert isinstance(ticket.error, CorruptBlocksError) and ticket.error.blocks == 2
        assert "2 of 4 blocks" in str(ticket.error) and "compute" in str(ticket.error)
        wanted_memory = cache.expected(poisoned, before, [(7, 9), (1, 11)])
        loaded = records(cache, cache.memory(), [9, 11])
        assert loaded == records(cache, wanted_memory, [9, 11]), "the others are right"
        assert engine.check_blocks(keys_of(*range(8))).tolist() == [True, True, False, True, True, False, True, True]
        stats = engine.get_stats()
        assert stats.corrupt_blocks == 2 and stats.failed_blocks == 0 and stats.pinned_blocks == 0
        assert engine.save_blocks(keys_of(2, 5), [5, 2]).wait().all()  # as a caller does that computed them again
        again = engine.load_blocks(keys_of(2, 5), [0, 1])
        assert again.wait().all() and again.error is None and engine.get_stats().corrupt_blocks == 2
        engine._index.check()


@pytest.mark.parametrize("route", ["auto", *ROUTES])
def test_opaque_buffers(any_device: Device, route: str) -> None:
    sizes = np.array([1, 100, 4096, 4097, 50_000])
    cache = cache_of(any_device, "layers")
    data = np.random.default_rng(3).integers(0, 256, int(sizes.sum()) + 64, np.uint8)
    memory = any_device.allocate(data.size)
    memory.write(data)
    starts = np.cumsum([1, *sizes[:-1] + 3])
    with engine_of(cache, route, max_block_bytes=50_000, cpu_pool_size_bytes=1 << 20) as engine:
        assert engine.save_blocks(keys_of(*range(5)), memory.address + starts, sizes).wait().all()
        kept = engine._parts.digests[[slot_of(engine, key) for key in range(5)]]
        assert [row.tobytes() for row in kept] == [
            digest_of(data[start:][:size].tobytes()) for start, size in zip(starts, sizes, strict=True)
        ]
        flip(engine, 0, 3)
        flip(engine, 4, 8 * 50_000 - 8)
        memory.write(np.zeros(data.size, np.uint8))
        ticket = engine.load_blocks(keys_of(*range(5)), memory.address + starts, sizes)
        assert ticket.wait().tolist() == [False, True, True, True, False] and isinstance(ticket.error, CorruptBlocksError)
        for at in (1, 2, 3):
            np.testing.assert_array_equal(memory.read()[starts[at] :][: sizes[at]], data[starts[at] :][: sizes[at]])


def test_without_digests_nothing_is_kept_or_compared(any_device: Device) -> None:
    cache = cache_of(any_device, "layers")
    with engine_of(cache, "auto", digests=False) as engine:
        assert engine.save_blocks(keys_of(1), [1]).wait().all()
        assert engine._parts.digests is None
        flip(engine, 1, 77)
        ticket = engine.load_blocks(keys_of(1), [2])
        assert ticket.wait().all() and ticket.error is None


@pytest.mark.parametrize("route", ["staged", "resident"])
def test_a_flipped_bit_in_staging(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind each DMA into a staging buffer of a load, before the kernel that empties it; on a GPU made of RAM."""
    with fake_gpu(monkeypatch) as gpu:
        cache = cache_of(CudaDevice(), "layers")
        with engine_of(cache, route) as engine:
            cache.randomize()
            assert engine.save_blocks(keys_of(*range(8)), np.arange(8)).wait().all()
            made, flips = gpu._execute, []

            def damaging(call: Any) -> None:
                made(call)
                if call.name in ("to_device", "lines") and not flips and engine._executor._lanes:  # type: ignore[attr-defined]
                    staging = min(engine._executor._staging.addresses)  # type: ignore[attr-defined]
                    span = staging, staging + gpu.memory[staging].nbytes
                    target = call.arguments[0] if call.name == "to_device" else call.parameters[7 + 4]
                    if span[0] <= target < span[1]:
                        flips.append(target)
                        ctypes.c_uint8.from_address(target + 11).value ^= 4

            gpu.issued._also = damaging
            ticket = engine.load_blocks(keys_of(*range(8)), np.arange(8))
            mask = ticket.wait()
            gpu.issued._also = made
            assert flips and (~mask).sum() == 1 and isinstance(ticket.error, CorruptBlocksError)


@pytest.mark.gpu
def test_flipped_bits_in_staging_on_a_gpu() -> None:
    assert in_staging(CudaDevice(), 1500) == 1500


@pytest.mark.parametrize("route", ["staged", "resident", "strided", "batched", "mapped", "direct"])
def test_a_driver_that_refuses_any_call(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transfer fails or is right; no block is dropped as damaged, and nothing that it used is lost."""
    with fake_gpu(monkeypatch) as gpu:
        cache = cache_of(CudaDevice(), "one piece" if route == "direct" else "layers")
        with engine_of(cache, "auto" if route == "direct" else route) as engine:
            before, at, failed = cache.randomize(), 0, 0
            assert engine.save_blocks(keys_of(0), [0]).wait().all()
            while True:
                gpu.issued.fails = {len(gpu.issued.calls) + at: 2}
                ticket = engine.load_blocks(keys_of(0), [1])
                mask = ticket.wait()
                gpu.issued.fails = {}
                if ticket.error is None and mask.all():
                    assert records(cache, cache.memory(), [1]) == records(cache, before, [0])
                failed += ticket.error is not None
                assert not isinstance(ticket.error, CorruptBlocksError)
                if ticket.error is None and at > 60:
                    break
                at += 1
            assert failed >= 5 and engine.check_blocks(keys_of(0)).all() and not engine.get_stats().corrupt_blocks
            assert sorted(engine._executor._events._free) == sorted(engine._executor._events._all)  # type: ignore[attr-defined]


def test_another_thread_that_settles_late_harms_nobody(any_device: Device) -> None:
    """It has seen that a save ended, and comes back when the slot holds another block."""
    cache = cache_of(any_device, "layers")
    with cache.engine(slots=1) as engine:
        old = engine.save_blocks(keys_of(1), [1])
        assert old.wait().all()
        transfer = old._transfer
        assert engine.save_blocks(keys_of(2), [2]).wait().all()  # in the same slot
        kept = engine._parts.digests.copy()
        transfer.ended = transfer.settled = False
        engine._flight.settle(transfer)
        np.testing.assert_array_equal(engine._parts.digests, kept)
        assert engine.load_blocks(keys_of(2), [3]).wait().all()


def test_memory_is_checked_as_it_was_read(any_device: Device) -> None:
    """All blocks of a pool, each damaged in its own place: not one is handed out, and none is lost that was whole."""
    cache = cache_of(any_device, "bytes")
    rng = np.random.default_rng(5)
    with engine_of(cache, "auto") as engine:
        cache.randomize()
        for _ in range(20):
            assert engine.save_blocks(keys_of(*range(BLOCKS)), np.arange(BLOCKS)).wait().all()
            damaged = rng.random(BLOCKS) < 0.5
            for key in np.flatnonzero(damaged).tolist():
                flip(engine, key, int(rng.integers(8 * cache.layout.record_bytes)))
            assert (engine.load_blocks(keys_of(*range(BLOCKS)), np.arange(BLOCKS)).wait() == ~damaged).all()
            cache.randomize()
            engine._index.drop(keys_of(*range(BLOCKS)))


def test_same(any_device: Device) -> None:
    cache = cache_of(any_device, "odd")
    with engine_of(cache, "auto") as engine:
        before = cache.randomize()
        assert engine.save_blocks(keys_of(*range(BLOCKS)), np.arange(BLOCKS)).wait().all()
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(*range(BLOCKS)), np.arange(BLOCKS)[::-1]).wait().all()
        moves = [(at, BLOCKS - 1 - at) for at in range(BLOCKS)]
        assert_same(cache.memory(), cache.expected(poisoned, before, moves))


def test_a_block_that_was_saved_anew_meanwhile_stays() -> None:
    """Of two loads of a damaged block the second ends when the block is there again, whole and in another slot."""
    cache = cache_of(HostDevice(), "layers")
    cache.randomize()
    stream, gate = HostStream(), threading.Event()
    with cache.engine(slots=BLOCKS) as engine:
        assert engine.save_blocks(keys_of(1), [1]).wait().all()
        flip(engine, 1, 77)
        stream.enqueue(gate.wait)
        late = engine.load_blocks(keys_of(1), [10], stream=stream)
        assert not engine.load_blocks(keys_of(1), [11]).wait().any() and not engine.check_blocks(keys_of(1)).any()
        assert engine.save_blocks(keys_of(1), [1]).wait().all()
        gate.set()
        assert not late.wait().any()
        assert engine.check_blocks(keys_of(1)).all() and engine.load_blocks(keys_of(1), [10]).wait().all()
        engine._index.check()
    stream.close()
