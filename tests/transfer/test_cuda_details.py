"""Details of the executor of a GPU that no byte would tell: what is shared, what is given back, and what is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import EngineClosedError, LayoutError, TransferError
from kvortex.memory.ids import _READY, IdPool
from kvortex.transfer.cuda_completion import Events
from kvortex.transfer.executor import Direction
from kvortex.transfer.profiles.profile import most_resident_ctas
from tests.fake_driver import Result
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.pages import PagedCache, Tensor, keys_of
from tests.transfer.recorder import Call
from tests.transfer.submitting import submit_blocks


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu(monkeypatch) as made:
        yield made


@pytest.fixture
def cache(gpu: FakeGpu) -> PagedCache:
    return PagedCache(CudaDevice(), [Tensor(CudaDevice(), (2, 12, 5, 60)) for _ in range(3)], 1)


def test_ids_are_given_back_to_the_pool(cache: PagedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    give = IdPool.give
    monkeypatch.setattr(IdPool, "give", lambda pool, buffer: (given.append(buffer), give(pool, buffer))[1])
    with cache.engine() as engine:
        for turn in range(3):
            assert engine.save_blocks(keys_of(turn), [turn]).wait().all()
        assert len(given) == 3 and len({id(buffer) for buffer in given}) == 1, "the same one again and again"


def test_events_that_are_taken_in_the_middle_of_another_taking_are_others(gpu: FakeGpu) -> None:
    """By a finaliser, which may run between any two steps."""
    events, found = Events(CudaDevice()), []

    class Meddling(list):  # type: ignore[type-arg]
        def append(self, item: object) -> None:
            super().append(item)
            if not found:
                found.append(0)
                found.append(events.take())

    events._all = Meddling()
    assert events.take() not in found and len(events._all) == 2


def test_what_was_lent_comes_back_once(gpu: FakeGpu, cache: PagedCache) -> None:
    """Whoever finds that a transfer has ended, or gives it up, and whoever does so after that."""
    with cache.engine() as engine:
        executor = engine._executor
        completion = executor.prepare_blocks(Direction.SAVE, np.array([1]), np.array([1]), None)
        completion.cancel()
        completion.cancel()
        assert completion.query() and isinstance(completion.error, TransferError)
        assert sorted(executor._events._free) == sorted(set(executor._events._all))
        assert len({id(ids) for kind in executor._ids._free.values() for ids in kind}) == sum(n for _, n in _READY)
        assert sum(map(len, executor._ids._free.values())) == sum(n for _, n in _READY)


def test_a_layer_wise_load_beside_a_model_has_the_ctas_for_that(gpu: FakeGpu, cache: PagedCache) -> None:
    """And with the GPU idle half as many as resident kernels may have, up to four times those of other transfers."""
    most = most_resident_ctas(CudaDevice().multiprocessors)
    few = max(1, min(4, most // 2))
    for ctas, beside, wanted in (((4, 2), False, 4), ((4, 2), True, 2), ((1, 1), False, few), ((1, 1), True, 1)):
        with cache.engine(transfer_route="resident", beside_compute=beside) as engine:
            engine._executor.resident_ctas = ctas
            assert engine.save_blocks(keys_of(0), [0]).wait().all()
            gpu.issued.calls.clear()
            assert engine.load_blocks(keys_of(0), [1], layerwise=True).wait().all()
            assert [call.arguments[1] for call in gpu.issued.calls if call.name == "launch"] == [wanted]


def test_a_callers_buffers_are_never_joined(gpu: FakeGpu, cache: PagedCache) -> None:
    """They may lie side by side and yet in two allocations, which no DMA may cross."""
    nbytes = -(-cache.layout.record_bytes // 4096) * 4096  # a slot's, so that neighbours touch
    with cache.engine(max_block_bytes=nbytes, digests=False) as engine:
        memory = engine.device.allocate(2 * nbytes)
        first, second = memory.address, memory.address + nbytes
        gpu.issued.calls.clear()
        assert engine.save_blocks(keys_of(1, 2), [first, second], [nbytes, nbytes]).wait().all()
        sides = sorted(call.arguments[:2] for call in gpu.issued.calls if call.name == "to_host")
        assert len(sides) == 2 and abs(sides[1][0] - sides[0][0]) == nbytes, "neighbours, which one DMA could have moved"


def test_two_threads_do_not_issue_on_one_lane_at_once(gpu: FakeGpu, cache: PagedCache) -> None:
    inside, most, execute = [0], [0], gpu.issued._also
    assert execute is not None

    def watched(call: Call) -> None:
        if call.name == "push":
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
        inside[0] -= call.name == "pop"
        execute(call)

    gpu.issued._also = watched
    kept = []  # who leaves a plan to the lane's thread keeps its arrays
    with cache.engine(transfer_route="staged") as engine:

        def save(n: int) -> None:
            kept.append(submit_blocks(engine._executor, Direction.SAVE, np.array([n]), np.array([n]), None))

        threads = [threading.Thread(target=save, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert most[0] == 1


def test_loads_come_before_saves_and_neither_waits_for_the_default_stream(gpu: FakeGpu, cache: PagedCache) -> None:
    """The fake's priorities go from 0, the lowest, to -5, the highest."""
    with cache.engine() as engine:
        calls = gpu.named("cuStreamCreateWithPriority")
        saves = len(engine._executor._lanes[Direction.SAVE]._streams)
        assert [priority for _, priority in calls[:saves]] == [-4] * saves
        assert {priority for _, priority in calls[saves:]} == {-5}
        assert {str(flags) for flags, _ in calls} == {"CUstream_flags.CU_STREAM_NON_BLOCKING"}


FATAL = {4: "DEINITIALIZED", 201: "INVALID_CONTEXT", 214: "ECC_UNCORRECTABLE", 220: "NVLINK_UNCORRECTABLE",
         226: "CONTAINED", 700: "ILLEGAL_ADDRESS", 702: "LAUNCH_TIMEOUT", 709: "CONTEXT_IS_DESTROYED", 710: "ASSERT",
         714: "HARDWARE_STACK_ERROR", 715: "ILLEGAL_INSTRUCTION", 716: "MISALIGNED_ADDRESS", 717: "INVALID_ADDRESS_SPACE",
         718: "INVALID_PC", 719: "LAUNCH_FAILED", 721: "TENSOR_MEMORY_LEAK", 810: "MPS_CLIENT_TERMINATED",
         911: "EXTERNAL_DEVICE"}  # fmt: skip


@pytest.mark.parametrize("code", FATAL)
def test_codes_after_which_nothing_runs_any_more(code: int) -> None:
    from cuda.bindings import driver

    assert cu.is_fatal(code) and FATAL[code] in driver.CUresult(code).name


@pytest.mark.parametrize("code", [0, 1, 2, 101, 600, 704, 712, 801, 900, 906, 999])
def test_codes_after_which_work_may_still_run(code: int) -> None:
    assert not cu.is_fatal(code)


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_layout_of_another_gpu_is_refused_by_its_first_and_last_bytes(gpu: FakeGpu, cache: PagedCache, where: str) -> None:
    base, stride, _, nbytes = cache.layout.fragments[-1].tolist()
    foreign = base if where == "first" else base + stride * (cache.layout.num_blocks - 1) + nbytes - 1

    def attribute(name: str, address: int) -> tuple[Result, Any]:
        if name.endswith("MEMORY_TYPE"):
            return Result(0), 2
        return Result(0), 1 if address == foreign else 0

    class MemoryType:
        CU_MEMORYTYPE_HOST = 1

    gpu.CUmemorytype = MemoryType  # type: ignore[attr-defined]
    gpu.answers["cuPointerGetAttribute"] = attribute
    with pytest.raises(LayoutError, match=f"{foreign:#x} of the layout belongs to cuda:1, not to cuda:0"):
        cache.engine()
    foreign = 0
    cache.engine().shutdown()


def test_a_forked_child_is_refused_before_the_driver_is_asked(
    gpu: FakeGpu, cache: PagedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the driver can answer nothing, and its error would hide the reason."""
    with cache.engine() as engine:
        ticket = engine.save_blocks(keys_of(1), [1])
        gpu.calls.clear()
        monkeypatch.setattr("kvortex.engine.os.getpid", lambda: -1)
        for call in (
            lambda: engine.save_blocks(keys_of(2), [2]),
            lambda: engine.load_blocks(keys_of(1), [2]),
            lambda: engine.check_blocks(keys_of(1)),
            lambda: ticket.add_to(7),
            ticket.wait,
        ):
            with pytest.raises(EngineClosedError, match="forked"):
                call()
        assert not gpu.calls
        monkeypatch.undo()
        assert ticket.wait().all()
