"""Layer-wise loads on a GPU made of RAM: when a layer's event is recorded, its bytes are there and the rest need not be."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.cuda_completion import CudaCompletion
from kvortex.transfer.issue.cells import ERROR, LAST
from kvortex.transfer.layer_load import LayerLoad
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.pages import PagedCache, Tensor, assert_same, keys_of
from tests.transfer.profiles import H100, shape
from tests.transfer.recorder import Call

LAYERS = 6


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    with fake_gpu(monkeypatch) as made:
        yield made


def cache_of(kind: str) -> PagedCache:
    device = CudaDevice()
    if kind == "direct":
        return PagedCache(device, [Tensor(device, (12, LAYERS, 50_000), 1)], 0, 1)
    return PagedCache(device, [Tensor(device, (2, 12, 300 + 7 * at), 1, shift=at) for at in range(LAYERS)], 1)


@pytest.mark.parametrize("route", ["staged", "resident"])
@pytest.mark.parametrize("staging", [4096, 1 << 20])
@pytest.mark.parametrize("kind", ["direct", "layers"])
def test_an_event_a_layer(gpu: FakeGpu, kind: str, staging: int, route: str) -> None:
    cache = cache_of(kind)
    with cache.engine(slots=12, gpu_pool_size_bytes=2 * H100.buffers * staging, transfer_route=route) as engine:
        before = cache.randomize()
        assert engine.save_blocks(keys_of(*range(9)), np.arange(9)).wait().all()
        poisoned = cache.randomize()
        wanted = cache.expected(poisoned, before, [(at, 11 - at) for at in range(9)])
        there: dict[int, list[bool]] = {}
        execute = gpu.issued._also
        assert execute is not None

        def watch(call: Call) -> None:
            execute(call)
            if call.name == "record":
                there[call.arguments[0]] = layers_there(cache, wanted)

        gpu.issued._also = watch
        gpu.event_code = 600
        ticket = engine.load_blocks(keys_of(*range(9)), np.arange(11, 2, -1), layerwise=True)
        gpu.issued._also = execute
        events = []
        for layer in range(LAYERS):
            gpu.calls.clear()
            ticket.wait_layer(layer, 0x77)
            *_, (stream, event, _) = gpu.named("cuStreamWaitEvent")  # behind that for the first layers, perhaps
            events.append(event)
            assert stream == 0x77 and there[event] == [True] * (layer + 1) + [False] * (LAYERS - layer - 1)
        assert len(set(events)) == LAYERS
        gpu.event_code = 0
        assert ticket.wait().all()
        assert_same(cache.memory(), wanted)
        events = engine._executor._events
        assert sorted(events._free) == sorted(events._all)


def layers_there(cache: PagedCache, wanted: list[np.ndarray]) -> list[bool]:
    if len(cache.tensors) == 1:
        views = [cache.tensors[0].view(memory[0]) for memory in (cache.memory(), wanted)]
        return [bool((views[0][:, at] == views[1][:, at]).all()) for at in range(LAYERS)]
    return [bool((seen == to_be).all()) for seen, to_be in zip(cache.memory(), wanted, strict=True)]


@pytest.mark.parametrize("at", range(100))
@pytest.mark.parametrize("route", ["staged", "resident"])
def test_a_refusal_while_issuing(gpu: FakeGpu, at: int, route: str) -> None:
    """Whoever waits for a layer is let go at the latest when the transfer has ended, and the next transfer is whole."""
    cache = cache_of("layers")
    with cache.engine(slots=12, num_transfer_streams=2, transfer_route=route) as engine:
        before = cache.randomize()
        assert engine.save_blocks(keys_of(*range(9)), np.arange(9)).wait().all()
        gpu.issued.calls.clear()
        gpu.issued.fails[at] = 700
        ticket = engine.load_blocks(keys_of(*range(9)), np.arange(9), layerwise=True)
        gone = gpu.issued.names[at : at + 1] == ["write_value"]
        if gone:
            gpu.resident.clear()  # the context is gone when even that fails, and the kernel with it
        gpu.event_code = 600
        ended = ticket._transfer.completion
        assert isinstance(ended, LayerLoad)
        for part, layer in ((ended._first, 0), (ended._rest, LAYERS - 1)):
            assert isinstance(part, CudaCompletion)
            if not part.outcome[LAST]:
                gpu.calls.clear()
                ticket.wait_layer(layer, 0x77)
                if part.outcome[ERROR]:
                    assert gpu.named("cuStreamWaitEvent")[-1] == (0x77, int(part._events[1]), 0)
        gpu.event_code = 0
        failed = not ticket.wait().all()
        assert failed == (ticket.error is not None)
        gpu.issued.fails.clear()
        if gone:
            return
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(*range(9)), np.arange(9), layerwise=True).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(block, block) for block in range(9)]))
