"""Loads that a kernel reads while DMAs bring them, on a GPU made of RAM that works late: the kernel waits for all that it
reads, the copies wait for the caller's stream, and whoever waits for the load waits for both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import kvortex
from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.routes import Route
from tests.engine.test_late import as_if_alone
from tests.fake_gpu import fake_gpu
from tests.late_gpu import _WAITING, LateGpu
from tests.pages import Bytes, PagedCache, Tensor, assert_same, keys_of
from tests.transfer.recorder import Call

BLOCKS, CALLER, READER = 16, 0x77, 0x78
SHAPES = [(1, 2), (5, 2), (5, 3)]  # blocks, streams


@pytest.fixture(params=range(3))
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LateGpu]:
    with fake_gpu(monkeypatch, LateGpu(request.param)) as made:
        yield made


def cache_of() -> PagedCache:
    return PagedCache(CudaDevice(), [Tensor(CudaDevice(), (16, BLOCKS, 3, 100))], 1)


def engine_of(cache: PagedCache, streams: int) -> Any:
    options: dict[str, Any] = {"num_transfer_streams": streams, "staging_buffers": streams, "beside_compute": False}
    return cache.engine(slots=BLOCKS, transfer_route="strided", **options)


def memory_of(gpu: LateGpu, cache: PagedCache) -> Bytes:
    """What is in the pages at this moment of the GPU's, and no copy."""
    return gpu.memory[cache.tensors[0].buffer.address].array


@pytest.mark.parametrize("way", ["short", "left", "layerwise"])
@pytest.mark.parametrize(("count", "streams"), SHAPES)
def test_a_load_waits_for_who_reads_and_is_waited_for_by_who_reads_next(
    gpu: LateGpu, monkeypatch: pytest.MonkeyPatch, count: int, streams: int, way: str
) -> None:
    """``left`` plans are issued by the lane's thread. Work that comes between the question and the copies counts, too."""
    as_if_alone(monkeypatch)
    if way == "left":
        monkeypatch.setattr("kvortex.transfer.lane._AT_ONCE", -1)
    cache = cache_of()
    with engine_of(cache, streams) as engine:
        before = cache.randomize()
        keys, source, target = keys_of(*range(count)), np.arange(count), BLOCKS - 1 - 2 * np.arange(count)
        assert engine.save_blocks(keys, source).wait().all()
        poisoned = cache.randomize()
        gpu.finish()
        pages, seen = memory_of(gpu, cache), []
        for _ in range(20):  # of a model that still attends to the old pages
            gpu.enqueue(CALLER, lambda: seen.append(pages.copy()))
        ticket = engine.load_blocks(keys, target, stream=CALLER, layerwise=way == "layerwise")
        if way == "layerwise":
            ticket.wait_layer(0, READER)
        else:
            ticket.add_to(READER)
        gpu.enqueue(READER, lambda: seen.append(pages.copy()))
        assert ticket.wait(20).all() and ticket.error is None
        gpu.finish()
        assert [call for call in gpu.issued.calls if call.name == "write_value"], "nothing was read early"
        wanted = cache.expected(poisoned, before, list(zip(source.tolist(), target.tolist(), strict=True)))
        assert_same(seen, [poisoned[0]] * 20 + wanted)


@pytest.mark.parametrize("other", [Route.STAGED, Route.RESIDENT, Route.STRIDED, Route.BATCHED, Route.MAPPED])
def test_between_others_nothing_is_mixed_up(gpu: LateGpu, monkeypatch: pytest.MonkeyPatch, other: Route) -> None:
    """Streams, events and their turns are those of other routes, too; and the flag is raised in the order of its values."""
    order = [other, Route.STRIDED, other, Route.STRIDED, Route.STRIDED, other] * 2
    as_if_alone(monkeypatch)
    monkeypatch.setattr("kvortex.transfer.cuda.choose", lambda *_, **__: order.pop(0))
    cache = cache_of()
    with cache.engine(slots=BLOCKS, num_transfer_streams=3, gpu_pool_size_bytes=12 * 4096, beside_compute=False) as engine:
        before = cache.randomize()
        some = [np.arange(at, at + 1 + at % 2) for at in (0, 1, 3, 4, 6, 7)]
        saves = [engine.save_blocks(keys_of(*blocks.tolist()), blocks, stream=CALLER) for blocks in some]
        assert all(save.wait(20).all() for save in saves)
        poisoned = cache.randomize()
        gpu.finish()
        loads = [engine.load_blocks(keys_of(*blocks.tolist()), blocks, stream=CALLER) for blocks in some]
        assert all(load.wait(20).all() for load in loads)
        gpu.finish()
        raised = [call.arguments[2] for call in gpu.issued.calls if call.name == "write_value"]
        assert other is Route.RESIDENT or raised == [*range(1, 1 + (6 if other is Route.STRIDED else 3))]
        moved = [(block, block) for blocks in some for block in blocks.tolist()]
        assert_same(cache.memory(), cache.expected(poisoned, before, moved))


def test_a_damaged_byte_in_a_slot_fails_its_block(gpu: LateGpu) -> None:
    cache = cache_of()
    with engine_of(cache, 2) as engine:
        cache.randomize()
        whole = cache.layout.record_bytes
        for at, byte in enumerate((0, whole // 2, whole - 1)):
            keys, blocks = keys_of(10 * at, 10 * at + 1), np.array([2, 9])
            assert engine.save_blocks(keys, blocks).wait().all()
            slot = int(engine._index.acquire(keys[:1])[0])
            engine._parts.arena.view(slot * engine._executor._pool.slot_bytes, whole)[byte] ^= 1
            engine._index.release(np.array([slot]))
            assert engine.load_blocks(keys, blocks + 1).wait().tolist() == [False, True]


class SmallGpu(LateGpu):
    """Eight multiprocessors with room for 512 threads each. A kernel begins when one of its CTAs finds room, and has as many as
    do then."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.room = [512] * 8

    def kernel(self, ctas: int, threads: int, work: Iterator[str]) -> Iterator[str]:
        while max(self.room) < threads:
            yield _WAITING
        taken: list[int] = []
        while len(taken) < ctas and max(self.room) >= threads:
            taken.append(int(np.argmax(self.room)))
            self.room[taken[-1]] -= threads
        yield "began"
        yield from work
        for at in taken:
            self.room[at] += threads
        yield "ended"

    def _work(self, call: Call) -> Iterator[str]:
        work = super()._work(call)
        return self.kernel(call.arguments[1], call.arguments[4], work) if call.name == "launch" else work


@pytest.mark.parametrize("count", [1, 2, 4, 32])
@pytest.mark.parametrize("seed", range(3))
def test_a_kernel_that_waits_keeps_no_room_from_what_its_copies_wait_for(
    monkeypatch: pytest.MonkeyPatch, seed: int, count: int
) -> None:
    """Kernels that need whole multiprocessors, for which another load waits that was there before; were the copies behind that
    one, all would wait for ever."""
    as_if_alone(monkeypatch)
    monkeypatch.setattr("kvortex.transfer.cuda.CudaExecutor._is_busy", lambda _, caller, __: caller == CALLER)
    with fake_gpu(monkeypatch, SmallGpu(seed)) as gpu:
        assert isinstance(gpu, SmallGpu)
        cache = PagedCache(CudaDevice(), [Tensor(CudaDevice(), (16, 64, 3, 100))], 1)
        with cache.engine(slots=64, transfer_route="strided") as engine:
            cache.randomize()
            one, others = np.array([0]), np.arange(1, 1 + count)
            assert engine.save_blocks(keys_of(*range(1 + count)), np.arange(1 + count)).wait().all()
            gpu.finish()
            gpu.issued.calls.clear()
            patience, gpu.patience = gpu.patience, 0
            for _ in range(20):
                gpu._put(CALLER, gpu.kernel(8, 512, iter(["computes"] * 2)))
            loads = engine.load_blocks(keys_of(0), one, stream=CALLER), engine.load_blocks(keys_of(*others.tolist()), others)
            assert len([call for call in gpu.issued.calls if call.name == "write_value"]) == 1, "the second one is read early"
            gpu.patience = patience
            gpu.finish()
            left, gpu.room = gpu.left, [1 << 30] * 8
            gpu.finish()
            assert not left, "work that nothing lets go on"
            assert all(load.wait(5).all() for load in loads)


@pytest.mark.parametrize("kind", ["pages", "buffers"])
def test_who_has_nothing_ahead_waits_for_no_other_caller(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A model that does not end before this load has: loads from its stream were there first."""
    as_if_alone(monkeypatch)
    monkeypatch.setattr("kvortex.transfer.cuda.CudaExecutor._is_busy", lambda _, caller, __: caller == CALLER)
    with fake_gpu(monkeypatch, LateGpu(1)) as gpu:
        ended: list[bool] = []

        def model() -> Iterator[str]:
            while not ended:
                yield _WAITING

        cache = cache_of()
        layout = None if kind == "buffers" else cache.layout
        options = {"device": "cuda", "transfer_route": "strided", "cpu_pool_size_bytes": 1 << 20, "max_block_bytes": 4096}
        with kvortex.KVortexEngine.create(kvortex.KVortexConfig(**options), layout) as engine:
            memory = [CudaDevice().allocate(4096) for _ in range(4)]

            def asked(at: int, way: str) -> Any:
                if kind == "pages":
                    return {"block_ids": [at]}
                return {way: [memory[at].address], "sizes": [4096]}

            assert all(engine.save_blocks(keys_of(at), **asked(at, "data_ptrs")).wait(5).all() for at in range(4))
            gpu.finish()
            gpu._put(CALLER, model())
            behind = [engine.load_blocks(keys_of(at), **asked(at, "output_ptrs"), stream=CALLER) for at in range(3)]
            assert engine.load_blocks(keys_of(3), **asked(3, "output_ptrs")).wait(5).all(), "it waits for the model"
            ended.append(True)
            assert all(ticket.wait(5).all() for ticket in behind)
