"""Short copies beside long ones: one engine of the GPU makes all of a way, and may let a short one of another stream wait until
nothing long is queued any more. So they are on the long ones' stream, and ahead of the last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.plan import N_COPIES
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


@pytest.mark.parametrize("name", ["staged", "parts", "one record", "coded"])
def test_sums_of_a_staged_save_are_read_back_ahead_of_its_last_copies(name: str) -> None:
    lane, plan, recorder = Lane(3, True, 1, digest=digest_of(reads=False, apart=0)), PLANS[name], Recorder()
    assert lane.issue(recorder, plan) == (0, 0)
    calls, before = recorder.calls, predecessors(recorder.calls)
    _, back = copies_of_sums(calls)
    done = next(at for at, call in enumerate(calls) if call.name == "record" and call.arguments[0] == DONE)
    launches = [at for at, call in enumerate(calls) if call.name == "launch"]
    copies = [at for at, call in enumerate(calls) if call.name in WORK and call.stream == COPY_STREAM and at != back]
    last = int(plan.chunks[-1, N_COPIES])
    assert calls[back].stream == COPY_STREAM and set(launches) <= before[back] and back in before[done]
    assert [at > back for at in copies] == [False] * (len(copies) - last) + [True] * last
