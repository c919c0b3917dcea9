"""Short copies beside long ones: one engine of the GPU makes all of a way, and may let a short one of another stream wait until
nothing long is queued any more. So they are on the long ones' stream, and ahead of the last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.plan import N_COPIES
from kvortex.transfer.routes import Route
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.pages import PagedCache, Tensor, keys_of
from tests.transfer.issuing import PLANS, Lane
from tests.transfer.recorder import Call, Recorder, predecessors
from tests.transfer.test_issue import COPY_STREAM, DONE, WORK, copies_of_sums, digest_of

BLOCKS = 40
COPIES = {"to_host", "to_device", "lines"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu(monkeypatch) as made:
        yield made


def moved(gpu: FakeGpu, *, save: bool) -> tuple[list[Call], Any]:
    """What a save, or a load behind it, puts on the GPU by a resident kernel, and its lane."""
    device = CudaDevice()
    cache = PagedCache(device, [Tensor(device, (2, BLOCKS, 2048), 1) for _ in range(2)], 1)
    options = {"transfer_route": "resident", "beside_compute": False, "gpu_pool_size_bytes": 64 * 8192}
    with cache.engine(slots=BLOCKS, **options) as engine:
        cache.randomize()
        keys, pages = keys_of(*range(BLOCKS)), np.arange(BLOCKS)
        at = len(gpu.issued.calls)
        assert engine.save_blocks(keys, pages).wait().all()
        if not save:
            at = len(gpu.issued.calls)
            assert engine.load_blocks(keys, pages).wait().all()
        executor: Any = engine._executor
        lanes = {direction.value: lane for direction, lane in executor._lanes.items()}
        return gpu.issued.calls[at:], lanes["save" if save else "load"]


def test_sums_of_a_resident_save_are_read_back_ahead_of_its_last_copy(gpu: FakeGpu) -> None:
    calls, lane = moved(gpu, save=True)
    copies = [at for at, call in enumerate(calls) if call.name in COPIES and call.stream == lane.copy_stream]
    assert len(copies) > 3, "several chunks, and the sums"
    (kernel,) = (at for at, call in enumerate(calls) if call.name == "launch")
    sums, last = copies[-2:]
    assert calls[sums].arguments[2] == 16 * BLOCKS, "what is copied before the last chunk are the sums"
    assert kernel in predecessors(calls)[sums], "and all of them"
    assert not any(kernel in predecessors(calls)[at] for at in copies[:-2]), "the others wait for flags alone"
    assert last > sums


def test_what_a_resident_kernel_reads_goes_ahead_of_the_first_copy(gpu: FakeGpu) -> None:
    calls, lane = moved(gpu, save=False)
    (kernel,) = (at for at, call in enumerate(calls) if call.name == "launch")
    copies = [at for at, call in enumerate(calls) if call.name in COPIES and call.stream == lane.copy_stream]
    assert copies[0] < copies[1] < kernel, "the link is busy before the kernel is launched"
    assert calls[copies[0]].arguments[2] < 16384 < calls[copies[1]].arguments[2]
    before = predecessors(calls)[kernel]
    assert copies[0] in before and copies[1] not in before


def staged(name: str, *, to_host: bool) -> tuple[list[Call], list[int], list[int], list[int]]:
    """What a plan puts on the GPU; where among it sums are sent and read back, the long copies, and the launches."""
    lane, recorder = Lane(3, to_host, 1, digest=digest_of(reads=False, apart=0)), Recorder()
    assert lane.issue(recorder, PLANS[name]) == (0, 0)
    calls = recorder.calls
    sums = copies_of_sums(calls)
    copies = [at for at, call in enumerate(calls) if call.name in WORK and call.stream == COPY_STREAM and at not in sums]
    return calls, sums, copies, [at for at, call in enumerate(calls) if call.name == "launch"]


@pytest.mark.parametrize("name", ["staged", "parts", "layers", "coded"])
def test_what_a_staged_load_sends_goes_ahead_of_its_first_copy(name: str) -> None:
    calls, (sent, _), copies, launches = staged(name, to_host=False)
    before = predecessors(calls)
    assert calls[sent].stream == COPY_STREAM and sent < min(copies)
    assert launches and all(sent in before[at] for at in launches)


@pytest.mark.parametrize("name", ["staged", "parts", "one record", "coded"])
def test_sums_of_a_staged_save_are_read_back_ahead_of_its_last_copies(name: str) -> None:
    calls, (_, back), copies, launches = staged(name, to_host=True)
    before = predecessors(calls)
    done = next(at for at, call in enumerate(calls) if call.name == "record" and call.arguments[0] == DONE)
    last = int(PLANS[name].chunks[-1, N_COPIES])
    assert calls[back].stream == COPY_STREAM and set(launches) <= before[back] and back in before[done]
    assert [at > back for at in copies] == [False] * (len(copies) - last) + [True] * last


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_no_stream_copies_both_ways(streams: int, apart: bool, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever routes follow each other, and whatever is read back: such a stream's next copy may wait for ever."""
    routes = [route for route in Route if route is not Route.DIRECT]
    wanted: list[Route] = []
    monkeypatch.setattr("kvortex.transfer.cuda.choose", lambda *_, **__: wanted[0])
    if not apart:
        monkeypatch.setattr("kvortex.transfer.digesting.MOST_APART", 0)
    device = CudaDevice()
    cache = PagedCache(device, [Tensor(device, (16, BLOCKS, 4, 256))], 1)
    options = {"num_transfer_streams": streams, "staging_buffers": streams, "gpu_pool_size_bytes": 64 * 16384}
    with cache.engine(slots=BLOCKS, **options) as engine:
        executor: Any = engine._executor
        cache.randomize()
        buffer, turns = cache.tensors[0].buffer.address, range(2 * len(routes))
        for turn, route, beside, count in ((t, routes[t // 2], bool(t % 2), n) for t in turns for n in (1, 5)):
            wanted[:], executor.beside_compute = [route], beside
            keys, pages = keys_of(*range(100 * turn + 10 * count, 100 * turn + 11 * count)), np.arange(count)
            assert engine.save_blocks(keys, pages).wait().all() and engine.load_blocks(keys, pages).wait().all()
            keys, data, sizes = keys_of(10_000 + 10 * turn + count), np.array([buffer]), np.array([16384])
            assert engine.save_blocks(keys, data_ptrs=data, sizes=sizes).wait().all()
            assert engine.load_blocks(keys, output_ptrs=data, sizes=sizes).wait().all()
        ways = [(call.stream, way_of(call)) for call in gpu.issued.calls if call.name in {*COPIES, "batch", "batch_12"}]
        streams_of = {way: {stream for stream, found in ways if found == way} for way in ("out", "in", "any")}
        assert streams_of["out"] and streams_of["in"] and not streams_of["out"] & streams_of["in"]
        for direction, way in (("save", "in"), ("load", "out")):
            (lane,) = (lane for which, lane in executor._lanes.items() if which.value == direction)
            assert not streams_of["any"] & streams_of[way] & set(lane.every_stream)


def way_of(call: Call) -> str:
    """Which way a copy between VRAM and the host goes; ``any`` for a batch, which does not say so."""
    if call.name == "lines":
        return "in" if call.parameters[2] == 1 else "out"  # CU_MEMORYTYPE_HOST is the source
    return {"to_host": "out", "to_device": "in"}.get(call.name, "any")
