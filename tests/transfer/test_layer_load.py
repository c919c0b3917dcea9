"""A layer-wise load in two parts: the first is on its way before the other one is planned, and both are one transfer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.devices.cuda import CudaDevice
from kvortex.digests.host import add_lengths
from kvortex.errors import DeviceError, TransferError, TransferTimeoutError
from kvortex.transfer.cuda import CudaExecutor
from kvortex.transfer.executor import Part
from kvortex.transfer.layer_load import LayerLoad
from kvortex.transfer.layers import Sections, split_sections
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.pages import PagedCache, Tensor, assert_same, keys_of
from tests.transfer.profiles import shape

LAYERS, BLOCKS = 8, 12
SIZES = np.array([100, 200])


class Piece(Part):
    """A transfer that ends when it is told to."""

    route = "planted"

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name, self.over = log, name, False

    def start(self) -> None:
        self._log.append(f"start {self._name}")
        self.started = True

    def cancel(self) -> None:
        self._log.append(f"cancel {self._name}")
        self.started = self.over = True
        self.error = TransferError("interrupted")

    def query(self) -> bool:
        return self.over

    def follow(self, stream: Any) -> None:
        raise AssertionError("no load is told of streams")

    def add_to(self, stream: Any, timeout: float, layer: int | None = None) -> None:
        self._log.append(f"wait {self._name} {layer}")

    def end(self, *sums: int) -> None:
        self.over, self.seconds = True, 2.0
        self.sums = np.array(sums, np.uint64).reshape(2, 2)


def test_the_rest_is_made_when_the_first_layers_are_on_their_way() -> None:
    log: list[str] = []
    first, rest = Piece(log, "first"), Piece(log, "rest")

    def make() -> Part:
        log.append("make")
        return rest

    load = LayerLoad(first, make, 3, SIZES)
    assert log == [] and not load.query() and load.route == "planted"
    load.start()
    assert log == ["start first", "make", "start rest"] and load.started
    log.clear()
    for layer in (2, 3, None):
        load.add_to(7, 1.0, layer)
    assert log == ["wait first 2", "wait rest 3", "wait first None", "wait rest None"]
    rest.end(1, 2, 3, 4)
    assert not load.query(), "the first part has not ended"
    first.end(10, 20, 30, 40)
    assert load.query() and load.error is None and load.seconds == 4.0
    assert load.digests is not None
    assert (load.digests == add_lengths(np.array([[11, 22], [33, 44]], np.uint64), SIZES)).all()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_part_that_fails_fails_the_load(failing: int) -> None:
    first, rest = Piece([], "first"), Piece([], "rest")
    load = LayerLoad(first, lambda: rest, 3, SIZES)
    load.start()
    (first, rest)[failing].error = error = TransferError("planted")
    first.end(1, 1, 1, 1), rest.end(1, 1, 1, 1)
    assert load.query() and load.error is error and load.digests is None


def test_a_rest_that_cannot_be_made_fails_the_load_when_the_first_part_has_ended() -> None:
    first = Piece([], "first")

    def make() -> Part:
        raise DeviceError("no memory for ids")

    load = LayerLoad(first, make, 3, SIZES)
    load.start()
    load.add_to(7, 1.0, 5)  # who waits for a layer that never comes is let go, and the ticket tells
    assert load.started and not load.query()
    first.end(1, 1, 1, 1)
    assert load.query() and load.digests is None
    assert "beyond layer 2" in str(load.error) and "no memory for ids" in str(load.error)


def test_interrupts() -> None:
    log: list[str] = []
    first, rest = Piece(log, "first"), Piece(log, "rest")
    load = LayerLoad(first, lambda: rest, 3, SIZES)
    load.cancel()  # before anything
    assert log == ["cancel first"] and load.query() and "interrupted" in str(load.error)

    def make() -> Part:
        raise KeyboardInterrupt

    log.clear()
    first = Piece(log, "first")
    load = LayerLoad(first, make, 3, SIZES)
    with pytest.raises(KeyboardInterrupt):
        load.start()
    with pytest.raises(TransferTimeoutError, match="not planned"):
        load.add_to(7, 0.01, 3)
    assert not load.started and not load.query()
    load.cancel()
    assert log == ["start first"] and not load.query(), "what is on its way ends first"
    first.end(1, 1, 1, 1)
    assert load.query() and "before all layers" in str(load.error)


def test_sections_are_split_between_groups() -> None:
    whole = Sections(np.array([0, 2, 5, 6, 9]), np.array([0, 20, 50, 60]), np.array([20, 30, 10, 30]), np.array([1, 3, 4]),
                     np.array([0, 0, 1, 2]))  # fmt: skip
    first, others = split_sections(whole, 2)
    assert first.first_pieces.tolist() == [0, 2, 5, 6] and others.first_pieces.tolist() == [6, 9]
    assert first.ends.tolist() == [1, 3] and others.ends.tolist() == [1]
    assert others.offsets.tolist() == [60] and others.nbytes.tolist() == [30] and first.pitch == 32
    assert first.group_of.tolist() == [0, 0, 1, 2] and others.group_of.tolist() == [-2, -2, -1, 0]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    with fake_gpu(monkeypatch) as made:
        yield made


def cache_of() -> PagedCache:
    device = CudaDevice()
    return PagedCache(device, [Tensor(device, (2, BLOCKS, 301 + at), 1, shift=at) for at in range(LAYERS)], 1)


@pytest.mark.parametrize("busy", [False, True])
def test_the_first_copy_of_an_idle_load_comes_before_all_else(gpu: FakeGpu, busy: bool) -> None:
    """And is timed; where the caller's stream has work the timing begins behind that, as the kernel does."""
    cache = cache_of()
    with cache.engine(slots=BLOCKS, transfer_route="resident", beside_compute=False) as engine:
        before = cache.randomize()
        assert engine.save_blocks(keys_of(*range(9)), np.arange(9)).wait().all()
        poisoned = cache.randomize()
        gpu.issued.calls.clear(), gpu.calls.clear()
        gpu.event_code = 600 if busy else 0
        ticket = engine.load_blocks(keys_of(*range(9)), np.arange(9), stream=0x77, layerwise=True)
        names, completion = gpu.issued.names, ticket._transfer.completion
        assert isinstance(completion, LayerLoad)
        copy_stream = engine._executor._lanes[ticket._transfer.direction].copy_stream
        start = int(completion._first._events[0])  # type: ignore[attr-defined]
        [timed] = [call for call in gpu.issued.calls if call.name == "record" and call.arguments[0] == start]
        assert (names.index("lines") < names.index("launch")) is not busy
        assert (timed.stream == copy_stream) is not busy
        if not busy:
            assert gpu.issued.calls.index(timed) < names.index("lines")
            exchanged = [call for call in gpu.calls if call[0] == "cuThreadExchangeStreamCaptureMode"]
            assert len(exchanged) % 2 == 0, "a thread has its own mode of capture back"
        gpu.event_code = 0
        assert ticket.wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(block, block) for block in range(9)]))


@pytest.mark.parametrize("at", range(8))
def test_a_driver_without_memory_for_the_rest(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The load fails, nothing that it held stays held, and the next one is whole."""
    cache = cache_of()
    with cache.engine(slots=BLOCKS, transfer_route="resident") as engine:
        before = cache.randomize()
        assert engine.save_blocks(keys_of(*range(9)), np.arange(9)).wait().all()
        executor = engine._executor
        assert isinstance(executor, CudaExecutor)
        real, lent = executor.lend, 0

        def lend(*arguments: Any) -> Any:
            nonlocal lent
            lent += 1
            if lent == 2:
                raise DeviceError("planted")
            return real(*arguments)

        monkeypatch.setattr(executor, "lend", lend)
        ticket = engine.load_blocks(keys_of(*range(9)), np.arange(9), layerwise=True)
        ticket.wait_layer(at, 0x77)
        assert not ticket.wait().any() and "planted" in str(ticket.error)
        monkeypatch.setattr(executor, "lend", real)
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(*range(9)), np.arange(9), layerwise=True).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(block, block) for block in range(9)]))
        events = executor._events
        assert sorted(events._free) == sorted(events._all)
