"""Save, overwrite, load elsewhere: every byte of every layout, and no byte beside."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvortex.devices import Device
from tests.pages import PagedCache, Tensor, assert_same, keys_of

B, N, H, D, L = 13, 16, 2, 24, 3

LAYOUTS: dict[str, Callable[[Device], PagedCache]] = {
    "per layer [2,B,N,H,D]": lambda d: PagedCache(d, [Tensor(d, (2, B, N, H, D)) for _ in range(L)], 1),
    "per layer [B,2,N,H,D]": lambda d: PagedCache(d, [Tensor(d, (B, 2, N, H, D)) for _ in range(L)], 0),
    "[B,H,N,2D]": lambda d: PagedCache(d, [Tensor(d, (B, H, N, 2 * D)) for _ in range(L)], 0),
    "MLA [B,N,576]": lambda d: PagedCache(d, [Tensor(d, (B, N, 576)) for _ in range(L)], 0),
    "MLA fp8 656-byte rows": lambda d: PagedCache(d, [Tensor(d, (B, 1, 656), 1) for _ in range(L)], 0),
    "cross-layer [B,L,2,N,H,D]": lambda d: PagedCache(d, [Tensor(d, (B, L, 2, N, H, D))], 0, 1),
    "large cross-layer block": lambda d: PagedCache(d, [Tensor(d, (B, 8, 2, 32, 8, 64))], 0, 1),
    "specification's [2,L,B,N,H,D]": lambda d: PagedCache(d, [Tensor(d, (2, L, B, N, H, D))], 2, 1),
    "padded strides": lambda d: PagedCache(d, [Tensor(d, (2, B, N, H, D), pad={2: 64, 1: 4096}) for _ in range(L)], 1),
    "padded rows": lambda d: PagedCache(d, [Tensor(d, (B, 4, 32), pad={2: 32}) for _ in range(L)], 0),
    "HND in memory": lambda d: PagedCache(d, [Tensor(d, (2, B, N, H, D), order=(0, 1, 3, 2, 4)) for _ in range(L)], 1),
    "hybrid page sizes": lambda d: PagedCache(d, [Tensor(d, (B, 2, N, H, D)), Tensor(d, (B, 4096)), Tensor(d, (B, 7, 16))], 0),
    "odd bytes": lambda d: PagedCache(d, [Tensor(d, (B, 333), 1, shift=1), Tensor(d, (2, B, 77), 1, shift=3)], [0, 1]),
    "halves": lambda d: PagedCache(d, [Tensor(d, (2, B, 5, 5), 2, shift=2)], 1),
    "one block": lambda d: PagedCache(d, [Tensor(d, (2, 1, N, H, D))], 1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_byte_of_every_layout(device: Device, name: str) -> None:
    cache = LAYOUTS[name](device)
    blocks = cache.layout.num_blocks
    rng = np.random.default_rng(3)
    with cache.engine(slots=blocks + 3) as engine:
        before = cache.randomize()
        saved = rng.permutation(blocks)[: max(1, blocks - 2)]
        keys = engine.block_keys(np.arange(16 * len(saved)))
        assert engine.save_blocks(keys, saved).wait().all()
        assert_same(cache.memory(), before)
        poisoned = cache.randomize()
        order = rng.permutation(len(saved))
        targets = rng.permutation(blocks)[: len(saved)]
        ticket = engine.load_blocks(keys[order], targets)
        assert ticket.wait().all()
        assert ticket.nbytes == cache.layout.record_bytes * len(saved)
        moves = list(zip(saved[order].tolist(), targets.tolist(), strict=True))
        assert_same(cache.memory(), cache.expected(poisoned, before, moves))


@pytest.mark.parametrize("gpu_pool_size_bytes", [2 * 4 * 4096, 2 * 4 * 20480, 8 << 20])
@pytest.mark.parametrize("streams", [1, 3, 5])
def test_records_larger_and_smaller_than_a_staging_buffer(device: Device, gpu_pool_size_bytes: int, streams: int) -> None:
    cache = PagedCache.plain(device, blocks=40)
    options = {"gpu_pool_size_bytes": gpu_pool_size_bytes * streams, "num_transfer_streams": streams}
    with cache.engine(slots=40, **options) as engine:
        before = cache.randomize()
        keys = keys_of(*range(40))
        assert engine.save_blocks(keys, np.arange(40)).wait().all()
        poisoned = cache.randomize()
        assert engine.load_blocks(keys[:30], np.arange(10, 40)).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(i, i + 10) for i in range(30)]))


def test_slots_in_any_order(device: Device) -> None:
    """After evictions slots are scattered over the pool; runs, gaps and single slots must all be right."""
    cache = PagedCache.plain(device, blocks=32)
    rng = np.random.default_rng(5)
    with cache.engine(slots=20) as engine:
        contents: dict[int, tuple[list, int]] = {}
        for turn in range(12):
            before = cache.randomize()
            count = int(rng.integers(1, 12))
            numbers = rng.permutation(60)[:count]
            known = engine.check_blocks(keys_of(*numbers))
            pages = rng.permutation(32)[:count]
            assert engine.save_blocks(keys_of(*numbers), pages).wait().all()
            contents.update({int(n): (before, int(p)) for n, p, k in zip(numbers, pages, known, strict=True) if not k})
            resident = [n for n in contents if engine.check_blocks(keys_of(n))[0]]
            asked = rng.permutation(resident)[:16]
            targets = rng.permutation(32)[: len(asked)]
            poisoned = cache.randomize()
            assert engine.load_blocks(keys_of(*asked), targets).wait().all(), turn
            wanted = poisoned
            for number, target in zip(asked.tolist(), targets.tolist(), strict=True):
                source, page = contents[number]
                wanted = cache.expected(wanted, source, [(page, target)])
            assert_same(cache.memory(), wanted)
        assert engine.get_stats().evictions > 0


@pytest.mark.parametrize("size", [1, 3, 4096, 5000, 65536])
def test_opaque_buffers(device: Device, size: int) -> None:
    from kvortex import KVortexConfig, KVortexEngine

    config = KVortexConfig(cpu_pool_size_bytes=8 * 65536, max_block_bytes=65536, device=device.name)
    rng = np.random.default_rng(size)
    with KVortexEngine.create(config) as engine:
        source, target = device.allocate(4 * 65536 + 64), device.allocate(4 * 65536 + 64)
        data, noise = rng.integers(0, 256, (2, source.nbytes), np.uint8)
        source.write(data)
        target.write(noise)
        sizes = np.array([size, 1, 65536, max(1, size - 1)])
        offsets = np.arange(4) * 65536 + np.array([0, 1, 0, 7])
        keys = keys_of(1, 2, 3, 4)
        assert engine.save_blocks(keys, source.address + offsets, sizes).wait().all()
        source.write(noise)
        shuffled = [3, 1, 0, 2]
        ticket = engine.load_blocks(keys[shuffled], output_ptrs=target.address + offsets, sizes=sizes[shuffled])
        assert ticket.wait().all()
        wanted = noise.copy()
        for place, which in enumerate(shuffled):
            part = data[offsets[which] : offsets[which] + sizes[which]]
            wanted[offsets[place] : offsets[place] + len(part)] = part
        assert_same([target.read()], [wanted])


def test_opaque_buffers_that_are_neighbours_by_chance(device: Device) -> None:
    """Allocations of exactly one slot may touch each other; a copy must not run from one into the next."""
    from kvortex import KVortexConfig, KVortexEngine

    size = 2 << 20
    config = KVortexConfig(cpu_pool_size_bytes=8 * size, max_block_bytes=size, device=device.name)
    rng = np.random.default_rng(1)
    with KVortexEngine.create(config) as engine:
        buffers = sorted((device.allocate(size) for _ in range(8)), key=lambda buffer: buffer.address)
        data = rng.integers(0, 256, (8, size), np.uint8)
        for buffer, row in zip(buffers, data, strict=True):
            buffer.write(row)
        pointers, sizes = [buffer.address for buffer in buffers], [size] * 8
        ticket = engine.save_blocks(keys_of(*range(8)), pointers, sizes)
        assert ticket.wait().all(), ticket.error
        for buffer in buffers:
            buffer.write(np.zeros(size, np.uint8))
        assert engine.load_blocks(keys_of(*range(8)), pointers, sizes).wait().all()
        for buffer, row in zip(buffers, data, strict=True):
            assert_same([buffer.read()], [row])
