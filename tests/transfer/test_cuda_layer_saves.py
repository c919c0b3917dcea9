"""Layer-wise saves on a GPU made of RAM: a group leaves when its layers were announced, behind the streams of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.devices.cuda import CudaDevice
from kvortex.errors import ArgumentError, DeviceError, LayersMissingError, TransferError
from kvortex.memory.ids import _READY
from kvortex.transfer.executor import Direction
from tests.engine.test_interrupts import Trap
from tests.fake_driver import Result
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.pages import PagedCache, Tensor, assert_same, keys_of
from tests.transfer.profiles import H100, shape
from tests.transfer.recorder import Call, predecessors

LAYERS, BLOCKS = 6, 12
WORK = ("launch", "to_host", "lines", "batch")
ROUTES = ["staged", "resident", "strided", "batched", "mapped"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    with fake_gpu(monkeypatch) as made:
        # What Python records is put among what compiled code records, so that one account tells what waits for what.
        made.answers["cuEventRecord"] = lambda event, stream: (
            made.issued.calls.append(Call("record", (int(event), int(stream)))),
            (Result(0),),
        )[1]
        yield made


def cache_of(kind: str = "layers") -> PagedCache:
    device = CudaDevice()
    if kind == "direct":
        return PagedCache(device, [Tensor(device, (BLOCKS, LAYERS, 50_000), 1)], 0, 1)
    return PagedCache(device, [Tensor(device, (2, BLOCKS, 300 + 7 * at), 1, shift=at) for at in range(LAYERS)], 1)


def in_pairs(monkeypatch: pytest.MonkeyPatch, cache: PagedCache) -> None:
    shape(monkeypatch, line_bytes=1, copy_bytes=cache.layout.record_bytes // 3, group_bytes=1)


def write_layer(cache: PagedCache, layer: int, byte: int) -> None:
    if len(cache.tensors) == 1:
        [tensor] = cache.tensors
        memory = tensor.buffer.read()
        tensor.view(memory)[:, layer] = byte
        tensor.buffer.write(memory)
    else:
        cache.tensors[layer].buffer.write(np.full(cache.tensors[layer].buffer.nbytes, byte, np.uint8))


def all_given_back(engine: Any) -> bool:
    events, ids = engine._executor._events, engine._executor._ids
    every = sum(count for _, count in _READY)
    return sorted(events._free) == sorted(events._all) and sum(map(len, ids._free.values())) == every


@pytest.mark.parametrize("order", [list(range(LAYERS)), [5, 1, 0, 4, 3, 2]])
@pytest.mark.parametrize("grouped", [1, 2])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("staging", [4096, 1 << 20])
@pytest.mark.parametrize("kind", ["direct", "layers"])
def test_each_group_takes_the_bytes_of_its_moment(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, kind: str, staging: int, route: str, grouped: int, order: list[int]
) -> None:
    cache = cache_of(kind)
    if grouped == 2:
        in_pairs(monkeypatch, cache)
    together = LAYERS if route in ("strided", "batched", "mapped") and kind != "direct" else grouped
    with cache.engine(slots=BLOCKS, gpu_pool_size_bytes=2 * H100.buffers * staging, transfer_route=route) as engine:
        cache.randomize()
        ticket = engine.save_blocks(keys_of(*range(9)), np.arange(9), layerwise=True, stream=0x5)
        assert ticket.nbytes == 9 * cache.layout.record_bytes
        gpu.issued.calls.clear()
        announced: set[int] = set()
        for layer in order:
            assert ticket.missing_layers == tuple(sorted(set(range(LAYERS)) - announced)) and not ticket.done()
            assert not engine.check_blocks(keys_of(*range(9))).any()
            write_layer(cache, layer, 0x10 + layer)
            before = len([call for call in gpu.issued.calls if call.name in WORK])
            ticket.save_layer(layer)
            announced.add(layer)
            group = set(range(layer // together * together, layer // together * together + together))
            work = [call for call in gpu.issued.calls if call.name in WORK][before:]
            assert bool(work) == (group <= announced)
            assert sum(call.name == "launch" for call in work) == 1 or not (work and route == "resident" and kind == "layers")
            for done in group if work else ():
                write_layer(cache, done, 0xBD)
        assert ticket.missing_layers == () and ticket.wait().all() and ticket.error is None
        assert ticket.seconds == pytest.approx(0.5e-3 * LAYERS / together)
        cache.randomize()
        assert engine.load_blocks(keys_of(*range(9)), np.arange(9)).wait().all()
        for layer, memory in enumerate(cache.memory() * (LAYERS // len(cache.tensors))):
            tensor = cache.tensors[layer % len(cache.tensors)]
            seen = tensor.view(memory)[:9, layer] if kind == "direct" else tensor.view(memory)[:, :9]
            assert (seen == 0x10 + layer).all()
        assert all_given_back(engine)
        [saved] = [entry for entry in engine.get_stats().routes if entry.direction == "save"]
        assert (saved.transfers, saved.blocks, saved.nbytes) == (1, 9, ticket.nbytes)


@pytest.mark.parametrize("route", ROUTES)
def test_all_work_of_a_group_waits_for_the_streams_of_all_its_layers(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    cache = cache_of()
    in_pairs(monkeypatch, cache)
    with cache.engine(slots=BLOCKS, transfer_route=route) as engine:
        ticket = engine.save_blocks(keys_of(*range(9)), np.arange(9), layerwise=True, stream=0x1)
        gpu.issued.calls.clear()
        streams = {0: 0x50, 1: 0x51, 2: None, 3: 0x1, 4: 2, 5: 2}  # 2: each thread's own, by one name
        ends = {}
        for layer in (0, 2, 4, 1, 3, 5):
            ticket.save_layer(layer, streams[layer])
            ends[layer] = len(gpu.issued.calls)
        calls, before = gpu.issued.calls, predecessors(gpu.issued.calls)
        records = {
            layer: next(at for at in range(ends.get(previous, 0), ends[layer]) if calls[at].name == "record")
            for previous, layer in zip((None, 0, 2, 4, 1, 3), (0, 2, 4, 1, 3, 5), strict=True)
        }
        for layer, at in records.items():
            assert calls[at].arguments[1] == (streams[layer] or 0x1)
        together = range(LAYERS)
        for last, previous in ((1, 4), (3, 1), (5, 3)):
            if route in ("staged", "resident"):
                together = range(last - 1, last + 1)
            # Copies beside a resident kernel wait for its flags, of which the account knows nothing.
            kinds = ("launch",) if route == "resident" else WORK
            work = [at for at in range(ends[previous], ends[last]) if calls[at].name in kinds]
            assert all({records[layer] for layer in together} <= before[at] for at in work)
            assert work or (together == range(LAYERS) and last != 5)
        assert ticket.wait().all()


def test_what_is_on_a_stream_later_is_not_waited_for(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a stream that goes on to wait for the save would wait for itself."""
    cache = cache_of()
    in_pairs(monkeypatch, cache)
    with cache.engine(slots=BLOCKS, transfer_route="staged") as engine:
        ticket = engine.save_blocks(keys_of(1), [1], layerwise=True)
        ticket.save_layer(0, 0x50)
        gpu.issued.calls.clear()
        ticket.save_layer(1, 0x51)
        assert 0x50 not in [call.stream for call in gpu.issued.calls if call.name == "record"]
        ticket.abort()


@pytest.mark.parametrize("route", ["staged", "resident"])
def test_a_stream_waits_for_the_layer_that_it_will_overwrite(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    cache = cache_of()
    in_pairs(monkeypatch, cache)
    with cache.engine(slots=BLOCKS, transfer_route=route) as engine:
        ticket = engine.save_blocks(keys_of(*range(9)), np.arange(9), layerwise=True)
        ticket.save_layer(1)
        with pytest.raises(LayersMissingError, match=r"layers \[0\] were not"):
            ticket.wait_layer(1, 0x77)
        ticket.save_layer(0)
        gpu.event_code = 600
        gpu.issued.calls.clear()
        gpu.calls.clear()
        ticket.wait_layer(1, 0x77)
        [(stream, event, _)] = gpu.named("cuStreamWaitEvent")
        part = ticket._transfer.completion._parts[0]  # type: ignore[union-attr]
        assert stream == 0x77 and event == int(part._events[1])
        for layer in range(2, LAYERS):
            ticket.save_layer(layer)
        gpu.calls.clear()
        ticket.add_to(0x78)
        assert len({event for _, event, _ in gpu.named("cuStreamWaitEvent")}) == 3
        gpu.event_code = 0
        assert ticket.wait().all()


@pytest.mark.parametrize("at", range(0, 120, 2))
@pytest.mark.parametrize("route", ["staged", "resident"])
def test_a_refusal_while_issuing(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, at: int, route: str) -> None:
    cache = cache_of()
    in_pairs(monkeypatch, cache)
    del gpu.answers["cuEventRecord"]
    with cache.engine(slots=BLOCKS, num_transfer_streams=2, transfer_route=route) as engine:
        before = cache.randomize()
        ticket = engine.save_blocks(keys_of(*range(9)), np.arange(9), layerwise=True)
        gpu.issued.calls.clear()
        gpu.issued.fails[at] = 700
        for layer in range(LAYERS):
            ticket.save_layer(layer)
            ticket.done()
        gone = gpu.issued.names[at : at + 1] == ["write_value"]
        if gone:
            gpu.resident.clear()  # the context is gone when even that fails, and the kernel with it
        failed = not ticket.wait().all()
        assert failed == (ticket.error is not None) == (gpu.issued.names[at : at + 1] not in ([], ["pop"]))
        assert not failed or ("of a save" not in str(ticket.error) and "could not be issued" in str(ticket.error))
        assert engine.check_blocks(keys_of(*range(9))).any() == (not failed)
        assert engine.get_stats().reserved_blocks == 0 and all_given_back(engine)
        gpu.issued.fails.clear()
        if gone:
            return
        again = engine.save_blocks(keys_of(*range(9)), np.arange(9), layerwise=True)
        for layer in range(LAYERS):
            again.save_layer(layer)
        assert again.wait().all(), "the next transfer is not affected"
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(*range(9)), np.arange(9)).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(block, block) for block in range(9)]))


def test_a_stream_that_takes_no_event_announces_nothing(gpu: FakeGpu) -> None:
    cache = cache_of()
    del gpu.answers["cuEventRecord"]
    with cache.engine(slots=BLOCKS, transfer_route="staged") as engine:
        ticket = engine.save_blocks(keys_of(1), [1], layerwise=True)
        gpu.fails["cuEventRecord"] = (700, 0)
        with pytest.raises(DeviceError, match="stream of a layer: CUDA_ERROR_ILLEGAL_ADDRESS"):
            ticket.save_layer(0, 0x50)
        gpu.fails.clear()
        gpu.capturing[7] = "CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE"
        with pytest.raises(ArgumentError, match="captured into a CUDA graph"):
            ticket.save_layer(0, 7)
        assert ticket.missing_layers == tuple(range(LAYERS))
        for layer in range(LAYERS):
            ticket.save_layer(layer, 0x51)
        assert ticket.wait().all() and all_given_back(engine)


@pytest.mark.parametrize("spare", range(0, 2 * LAYERS, 3))
def test_a_save_that_cannot_be_prepared_fails_and_leaks_nothing(gpu: FakeGpu, spare: int) -> None:
    cache = cache_of()
    with cache.engine(slots=BLOCKS, transfer_route="staged") as engine:
        gpu.fails["cuEventCreate"] = (2, len(gpu.named("cuEventCreate")) + spare)
        ticket = engine.save_blocks(keys_of(1), [1], layerwise=True)
        assert not ticket.wait().any() and "could not be prepared" in str(ticket.error)
        ticket.save_layer(0)
        assert ticket.missing_layers == () and not ticket.abort() and all_given_back(engine)
        gpu.fails.clear()


@pytest.mark.parametrize("how", ["abort", "drop"])
@pytest.mark.parametrize("announced", [0, 1, 3])
def test_what_is_given_up_gives_everything_back(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, announced: int, how: str
) -> None:
    cache = cache_of()
    in_pairs(monkeypatch, cache)
    with cache.engine(slots=BLOCKS, transfer_route="resident") as engine:
        ticket = engine.save_blocks(keys_of(1, 2), [1, 2], layerwise=True)
        gpu.event_code = 600
        for layer in range(announced):
            ticket.save_layer(layer)
        if how == "abort":
            assert ticket.abort()
        del ticket
        assert engine.get_stats().reserved_blocks == (2 if announced > 1 else 0), "a copy into the slots may still run"
        gpu.event_code = 0
        assert engine.get_stats().reserved_blocks == 0 and not engine.check_blocks(keys_of(1, 2)).any()
        assert all_given_back(engine) and engine.get_stats().failed_blocks == 2


def test_an_event_is_never_recorded_when_it_is_lent_to_others(gpu: FakeGpu) -> None:
    """Who announces a layer of a save that ends at that moment must not touch what the save has given back."""
    cache = cache_of()
    with cache.engine(slots=BLOCKS, transfer_route="staged") as engine:
        ticket = engine.save_blocks(keys_of(1), [1], layerwise=True)
        part = ticket._transfer.completion._parts[0]  # type: ignore[union-attr]
        ticket.abort()
        ticket.wait()
        gpu.issued.calls.clear()
        part.follow(0x50)
        assert not gpu.issued.calls and all_given_back(engine)


@pytest.mark.parametrize("route", ["staged", "resident"])
def test_layers_leave_nothing_in_the_padding_of_later_blocks(gpu: FakeGpu, route: str) -> None:
    """Sections of a layer-wise save lie in the staging buffers where a later save has the padding of its slots."""
    cache = cache_of()
    with cache.engine(slots=2 * BLOCKS, transfer_route=route) as engine:
        arena, record = engine._parts.arena, cache.layout.record_bytes
        assert record < arena.slot_bytes
        for layer in range(LAYERS):
            write_layer(cache, layer, 0x5E)
        lane = engine._executor._lanes[Direction.SAVE]
        for turn in range(8):  # all buffers
            ticket = engine.save_blocks(keys_of(1000 + turn), [turn], layerwise=True)
            for layer in range(LAYERS):
                ticket.save_layer(layer)
            assert ticket.wait().all()
        staged = gpu.memory[int(lane.buffers.min())].array[: len(lane.buffers) * engine._executor._staging.buffer_bytes]
        assert (staged.reshape(2, -1) == 0x5E).any(axis=1).all()
        for layer in range(LAYERS):
            write_layer(cache, layer, 0x11)
        save_twice = [engine.save_blocks(keys_of(*range(at, at + 6)), np.arange(6)) for at in (0, 6)]
        assert all(ticket.wait().all() for ticket in save_twice)
        for slot in range(20):
            view = arena.view(slot)
            assert (view[:record] == view[0]).all() and view[0] in (0x11, 0x5E) and not view[record:].any()


@pytest.mark.parametrize("route", ["staged", "resident"])
@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupt_at_any_line(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, layer: int, route: str) -> None:
    """The layer was announced, or can be again, or the save has failed; and nothing waits for ever."""
    cache, line, outcomes = cache_of(), 1, set()
    in_pairs(monkeypatch, cache)
    with cache.engine(slots=400, transfer_route=route, transfer_timeout_s=5.0) as engine:
        while True:
            ticket = engine.save_blocks(keys_of(line), [1], layerwise=True)
            if layer:
                ticket.save_layer(0)
            trap = Trap(line)
            trap.run(lambda: ticket.save_layer(layer))  # noqa: B023
            announced = layer not in ticket.missing_layers
            ticket.done()
            for left in ticket.missing_layers:
                ticket.save_layer(left)
            saved = bool(ticket.wait().all())
            assert saved == (ticket.error is None) == engine.check_blocks(keys_of(line))[0], trap.sprung
            assert not engine.get_stats().reserved_blocks
            if not trap.sprung:
                break
            outcomes.add((announced, saved))
            line += 1
    assert outcomes == {(False, True), (True, True)} | ({(True, False)} if layer else set())


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_around_the_issue(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    from kvortex.transfer.issue import submitting

    real = submitting._streamed

    def interrupted(*arguments: Any) -> None:
        if when == "after":
            real(*arguments)
        raise KeyboardInterrupt

    cache = cache_of()
    with cache.engine(slots=BLOCKS, transfer_route="staged") as engine:
        ticket = engine.save_blocks(keys_of(1), [1], layerwise=True)
        ticket.save_layer(0)
        monkeypatch.setattr(submitting, "_streamed", interrupted)
        gpu.event_code = 600
        with pytest.raises(KeyboardInterrupt):
            ticket.save_layer(1)
        monkeypatch.undo()
        assert not ticket.done() and ticket.missing_layers == (() if when == "before" else (2, 3, 4, 5))
        gpu.event_code = 0
        for layer in range(2, LAYERS):
            ticket.save_layer(layer)
        assert ticket.wait().all() == (when == "after")
        assert isinstance(ticket.error, TransferError) == (when == "before")
        assert engine.get_stats().reserved_blocks == 0 and all_given_back(engine)
