"""The second part of a load on a GPU that does everything late: behind what was on the caller's stream when it was called."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from kvortex.tiers.memory import MemoryStore
from kvortex.transfer.cuda import CudaExecutor
from tests.engine.test_late import STREAM, cache_of, engine_of, issued_by
from tests.engine.tiered import Tiers, save, until
from tests.fake_gpu import fake_gpu
from tests.late_gpu import LateGpu
from tests.pages import keys_of
from tests.transfer.profiles import shape


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("layerwise", [False, True])
def test_it_waits_for_the_callers_stream(monkeypatch: pytest.MonkeyPatch, seed: int, layerwise: bool) -> None:
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    with fake_gpu(monkeypatch, LateGpu(seed)) as gpu:
        issued_by(monkeypatch, seed)
        cache, store = cache_of(1500), MemoryStore()
        before = cache.randomize()
        with engine_of(cache, tiers=Tiers(store).config) as engine:
            save(engine, cache, keys_of(1, 2, 3), [1, 2, 3])
        with engine_of(cache, tiers=Tiers(store).config) as engine:
            poisoned = cache.randomize()
            gpu.patience = 0  # nothing is done from here on
            seen: list[list[np.ndarray]] = []

            def raw() -> list[np.ndarray]:
                return [gpu.memory[tensor.buffer.address].array.copy() for tensor in cache.tensors]

            gpu.enqueue(STREAM, lambda: seen.append(raw()))
            ticket = engine.load_blocks(keys_of(1, 2, 99, 3), [10, 11, 12, 13], stream=STREAM, layerwise=layerwise)
            until(lambda: ticket.nbytes)  # it is on its way, or its plan with the lane's thread
            if layerwise:
                for layer in range(cache.layout.num_layers):
                    ticket.wait_layer(layer, STREAM)
            ticket.add_to(STREAM)
            gpu.enqueue(STREAM, lambda: seen.append(raw()))
            assert not seen and not ticket.done()
            gpu.patience = 12
            until(lambda: (gpu.finish(), ticket.done() and len(seen) == 2)[1])
            assert ticket.mask.tolist() == [True, True, False, True]
            for at, (tensor, old, first, last) in enumerate(zip(cache.tensors, before, *seen, strict=True)):
                assert (first == poisoned[at]).all(), "nothing had been written when what was on the stream before ran"
                pages = tensor.view(last)[:, [10, 11, 13]]
                np.testing.assert_array_equal(pages, tensor.view(old)[:, [1, 2, 3]])


def test_a_mark_that_nothing_waited_for_gives_its_event_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch, LateGpu(1)):
        cache, store = cache_of(1500), MemoryStore()
        with engine_of(cache, tiers=Tiers(store, absent_s=1e-3).config) as engine:
            executor = engine._executor
            assert isinstance(executor, CudaExecutor)
            for at in range(50):
                assert not engine.load_blocks(keys_of(at), [1], stream=STREAM).wait().any()
            gc.collect()
            assert len(executor._events._all) < 10
