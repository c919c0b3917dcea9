"""Layer-wise loads in two parts on a GPU made of RAM that works late: what streams and events leave open, and failures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceError
from kvortex.transfer.layer_load import LayerLoad
from kvortex.transfer.routes import Route
from tests.fake_gpu import fake_gpu
from tests.late_gpu import LateGpu
from tests.pages import PagedCache, Tensor, assert_same, keys_of
from tests.transfer.profiles import shape

LAYERS, BLOCKS = 8, 12


def cache_of() -> PagedCache:
    device = CudaDevice()
    return PagedCache(device, [Tensor(device, (2, BLOCKS, 301 + at), 1, shift=at) for at in range(LAYERS)], 1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateGpu]:
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    with fake_gpu(monkeypatch, LateGpu(1)) as made:
        yield made


@pytest.mark.parametrize("route", ["staged", "resident"])
@pytest.mark.parametrize("what", ["device", "memory", "event"])
def test_who_has_no_ticket_has_no_bytes_that_still_move(
    gpu: LateGpu, monkeypatch: pytest.MonkeyPatch, what: str, route: str
) -> None:
    """What fails when the first layers are on their way fails the ticket, and not the call."""
    cache = cache_of()
    with cache.engine(slots=BLOCKS, transfer_route=route) as engine:
        cache.randomize()
        assert engine.save_blocks(keys_of(*range(9)), np.arange(9)).wait().all()
        executor: Any = engine._executor
        name = "lend_event" if what == "event" else "lend"
        real, calls = getattr(executor, name), 0

        def second_fails(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise MemoryError if what == "memory" else DeviceError("planted")
            return real(*arguments)

        if what == "event":
            monkeypatch.setattr("kvortex.transfer.lane._AT_ONCE", 0)  # all is left to the lane's thread
        monkeypatch.setattr(executor, name, second_fails)
        gpu.patience = 0
        ticket = engine.load_blocks(keys_of(*range(9)), np.arange(9), stream=0x77, layerwise=True)
        gpu.patience = 12
        assert not ticket.wait(10).any() and "beyond layer 1" in str(ticket.error)
        gpu.finish()
        assert engine.get_stats().pinned_blocks == 0
        assert sorted(executor._events._free) == sorted(executor._events._all)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("route", ["staged", "resident"])
def test_a_layer_that_is_waited_for_has_all_before_it(monkeypatch: pytest.MonkeyPatch, route: str, seed: int) -> None:
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    missing: list[tuple[int, int]] = []
    with fake_gpu(monkeypatch, LateGpu(seed)) as gpu:
        cache = cache_of()
        with cache.engine(slots=BLOCKS, transfer_route=route, num_transfer_streams=3) as engine:
            before = cache.randomize()
            assert engine.save_blocks(keys_of(*range(9)), np.arange(9)).wait().all()
            poisoned = cache.randomize()
            gpu.finish()
            wanted = cache.expected(poisoned, before, [(block, block) for block in range(9)])
            ticket = engine.load_blocks(keys_of(*range(9)), np.arange(9), stream=0x77, layerwise=True)
            assert isinstance(ticket._transfer.completion, LayerLoad)

            def look(layer: int) -> None:
                seen = [gpu.memory[tensor.buffer.address].array for tensor in cache.tensors]
                missing.extend((layer, at) for at in range(layer + 1) if (seen[at] != wanted[at]).any())

            for layer in (1, 2, 3, LAYERS - 1):
                ticket.wait_layer(layer, 0x78 + layer)
                gpu.enqueue(0x78 + layer, lambda layer=layer: look(layer))
            assert ticket.wait().all()
            gpu.finish()
            assert not missing
            assert_same(cache.memory(), wanted)


class Refused(dict[int, int]):
    """The n-th call of a name is refused."""

    def __init__(self, gpu: LateGpu, name: str, nth: int) -> None:
        super().__init__()
        self._gpu, self._name, self._left = gpu, name, nth

    def get(self, at: int, default: Any = None) -> Any:
        self._left -= self._gpu.issued.calls[at].name == self._name
        refused, self._left = self._left == 0, self._left if self._left else -1
        return 2 if refused else 0


REFUSED = [("launch", 1), ("launch", 2), ("to_device", 1), ("wait", 1), ("wait", 2), ("lines", 1), ("record", 2), ("record", 3)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "nth"), [*REFUSED, ("wait_value", 1)])
def test_an_early_copy_whose_transfer_fails_does_no_harm_to_the_next_ones(
    monkeypatch: pytest.MonkeyPatch, name: str, nth: int, seed: int
) -> None:
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    order = [Route.STAGED, Route.RESIDENT, Route.STAGED, Route.RESIDENT, Route.RESIDENT]
    monkeypatch.setattr("kvortex.transfer.cuda.choose", lambda *_, **__: order.pop(0))
    with fake_gpu(monkeypatch, LateGpu(seed)) as gpu:
        cache = cache_of()
        options = {"num_transfer_streams": 3, "gpu_pool_size_bytes": 8 * 4096, "beside_compute": False}
        with cache.engine(slots=BLOCKS, **options) as engine:
            before = cache.randomize()
            assert engine.save_blocks(keys_of(*range(12)), np.arange(12)).wait().all()
            poisoned = cache.randomize()
            gpu.finish()
            gpu.patience = 0 if seed % 2 else 2
            gpu.issued.fails = Refused(gpu, name, nth)
            layerwise = seed % 3 == 0
            ways = ((0x77, layerwise), (0x78, layerwise), (0x78, not layerwise), (0x78, False))
            tickets = []
            for at, (stream, by_layers) in enumerate(ways):
                some = np.arange(3 * at, 3 * at + 3)
                tickets.append(engine.load_blocks(keys_of(*some), some, stream=stream, layerwise=by_layers))
            gpu.patience = 12
            good = np.repeat([bool(ticket.wait(10).all()) for ticket in tickets], 3)
            assert good.sum() >= 9, "one call was refused"
            gpu.finish()
            wanted = cache.expected(poisoned, before, [(block, block) for block in range(12)])
            for tensor, mine, right in zip(cache.tensors, cache.memory(), wanted, strict=True):
                assert (tensor.view(mine)[:, good] == tensor.view(right)[:, good]).all()
            executor: Any = engine._executor
            assert sorted(executor._events._free) == sorted(executor._events._all)
            assert engine.get_stats().pinned_blocks == 0
