"""Transfers of all kinds at once on a GPU that does everything as late, and in as odd an order, as it may."""

from __future__ import annotations

import collections
import itertools
import random
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pytest

from kvortex import KVortexEngine, PoolFullError
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import TransferError
from kvortex.transfer.cuda_completion import CudaCompletion
from kvortex.transfer.executor import poll
from kvortex.transfer.layer_load import LayerLoad
from kvortex.transfer.routes import Route
from kvortex.transfer.ticket import Ticket
from tests.fake_gpu import fake_gpu
from tests.late_gpu import LateGpu
from tests.pages import PagedCache, Tensor, keys_of
from tests.transfer.profiles import shape

LAYERS, PAGES, OWNERS = 7, 12, 3  # pages of each owner, which has a stream for all that happens to them
ROUTES = (Route.STAGED, Route.RESIDENT, Route.STRIDED, Route.BATCHED, Route.MAPPED)
STREAM = 0x77000


class Model:
    """One owner of pages: writes them, saves them, loads others over them and reads those, all on one stream."""

    def __init__(self, gpu: LateGpu, cache: PagedCache, engine: KVortexEngine, number: int, shared: dict[int, None]) -> None:
        self.gpu, self.cache, self.engine, self.stream = gpu, cache, engine, STREAM + number
        self.pages = np.arange(number * PAGES, (number + 1) * PAGES)
        self.rng, self.saved = random.Random(number), shared
        self.names = itertools.count(1000 * (number + 1))
        self.open: list[tuple[Ticket, set[int]]] = []
        self.tickets: list[Ticket] = []
        self.checked, self.in_parts, self.wrong = 0, 0, list[str]()

    def _block(self, layer: int, page: int) -> Any:
        tensor = self.cache.tensors[layer]
        return tensor.view(self.gpu.memory[tensor.buffer.address].array)[:, page]

    def _content(self, name: int, layer: int) -> Any:
        shape = self._block(layer, 0).shape
        return np.random.default_rng((name, layer)).integers(0, 256, shape, np.uint8)

    def write(self, page: int, name: int, layer: int) -> None:
        self._block(layer, page)[:] = self._content(name, layer)

    def check(self, page: int, name: int, layer: int, ticket: Ticket) -> None:
        completion = ticket._transfer.completion
        parts = [completion._first, completion._rest] if isinstance(completion, LayerLoad) else [completion]
        # Else it failed, and says so.
        if all(isinstance(part, CudaCompletion) and not part.outcome[1:3].any() for part in parts):
            self.checked += 1
            self.in_parts += len(parts) == 2
            if not np.array_equal(self._block(layer, page), self._content(name, layer)):
                self.wrong.append(f"page {page} is not block {name} in layer {layer}, by {completion.route}")

    def _order(self, pages: list[int]) -> None:
        """Behind everything that still moves these pages."""
        for ticket, theirs in list(self.open):
            if theirs & set(pages):
                self._behind(ticket)
                self.open.remove((ticket, theirs))

    def _behind(self, ticket: Ticket, layer: int | None = None) -> None:
        try:
            if layer is None:
                ticket.add_to(self.stream)
            else:
                ticket.wait_layer(layer, self.stream)
        except TransferError as error:
            assert "has no event that a stream could wait for" in str(error)
            assert poll(ticket.done, time.monotonic() + 5)

    def _some(self, most: int = PAGES) -> list[int]:
        return self.rng.sample(self.pages.tolist(), self.rng.randint(1, most))

    def _keep(self, ticket: Ticket, pages: list[int]) -> None:
        self.open.append((ticket, set(pages)))
        self.tickets.append(ticket)

    def _start(self, names: list[int], pages: list[int], *, layerwise: bool) -> Generator[None, None, Ticket]:
        while True:
            try:
                return self.engine.save_blocks(keys_of(*names), pages, stream=self.stream, layerwise=layerwise)
            except PoolFullError:
                self.gpu.finish()
                yield

    def save(self, layerwise: bool) -> Iterator[None]:
        pages = self._some()
        names = [next(self.names) for _ in pages]
        self._order(pages)
        if layerwise:
            ticket = yield from self._start(names, pages, layerwise=True)
        for layer in self.rng.sample(range(LAYERS), LAYERS):
            for page, name in zip(pages, names, strict=True):
                self.gpu.enqueue(self.stream, self.write, page, name, layer)
            yield
            if layerwise:
                ticket.save_layer(layer)
                if self.rng.random() < 0.05:
                    ticket.abort()
                    break
        if not layerwise:
            ticket = yield from self._start(names, pages, layerwise=False)
        self._keep(ticket, pages)
        yield
        self.saved.update(dict.fromkeys(names))

    def load(self, layerwise: bool) -> Iterator[None]:
        if not self.saved:
            return
        names = self.rng.sample(list(self.saved), min(len(self.saved), self.rng.randint(1, PAGES)))
        pages = self.rng.sample(self.pages.tolist(), len(names))
        self._order(pages)
        ticket = self.engine.load_blocks(keys_of(*names), pages, stream=self.stream, layerwise=layerwise)
        found = [(page, name) for page, name, hit in zip(pages, names, ticket._transfer.mask, strict=True) if hit]
        for layer in range(LAYERS):
            if layerwise or layer == 0:
                self._behind(ticket, layer if layerwise else None)
            for page, name in found:
                self.gpu.enqueue(self.stream, self.check, page, name, layer, ticket)
            yield
        self._keep(ticket, pages)

    def live(self, turns: int) -> Iterator[None]:
        for _ in range(turns):
            yield from self.rng.choice([self.save, self.load])(self.rng.random() < 0.4)


def at_random(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chooser = random.Random(seed)

    def choose(*_: object, layerwise: bool = False, **__: object) -> Route:
        return chooser.choice(ROUTES[:2] if layerwise and chooser.random() < 0.8 else ROUTES)

    monkeypatch.setattr("kvortex.transfer.cuda.choose", choose)
    monkeypatch.setattr("kvortex.memory.ids._READY", ((1024, 2),))
    monkeypatch.setattr("kvortex.memory.arena.SEGMENT_BYTES", 20 * 4096)


def live(gpu: LateGpu, cache: PagedCache, engine: KVortexEngine, seed: int, turns: int = 14) -> int:
    """Lets all owners live, step by step in turn; pieces of blocks that were checked."""
    shared: dict[int, None] = {}
    models = [Model(gpu, cache, engine, number, shared) for number in range(OWNERS)]
    chooser = random.Random(seed)
    for model in models:
        model.rng.seed(seed * OWNERS + model.stream)
    running = [model.live(turns) for model in models]
    while running:
        one = chooser.choice(running)
        if next(one, "end") == "end":
            running.remove(one)
    tickets = [ticket for model in models for ticket in model.tickets]
    for ticket in tickets:
        assert poll(ticket.done, time.monotonic() + 5), f"{ticket} never ends, and {gpu.left} pieces of work are left"
    gpu.finish()
    assert not gpu.left, "work that nothing lets go on"
    assert not sum((model.wrong for model in models), [])
    engine._index.check()
    return sum(model.checked for model in models)


def engine_of(cache: PagedCache, **options: Any) -> KVortexEngine:
    return cache.engine(**{"slots": 60, "gpu_pool_size_bytes": 8 * 8192, "transfer_timeout_s": 20.0, **options})


def cache_of(nbytes: int = 150) -> PagedCache:
    """Fragments of that length or a little more, four bytes aside from layer to layer."""
    device = CudaDevice()
    tensors = [Tensor(device, (2, OWNERS * PAGES, nbytes + 100 * (at % 2)), 1, shift=4 * at) for at in range(LAYERS)]
    return PagedCache(device, tensors, 1)


# Bytes of a fragment, and options.
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "several": (150, {}),
    "one buffer and stream": (150, {"num_transfer_streams": 1, "staging_buffers": 1, "gpu_pool_size_bytes": 2 * 4096}),
    "records longer than a buffer": (1500, {"gpu_pool_size_bytes": 8 * 4096}),
    "layers longer than a buffer": (9000, {"gpu_pool_size_bytes": 8 * 4096}),
    "slots longer than a buffer": (150, {"max_block_bytes": 9000, "gpu_pool_size_bytes": 8 * 4096}),
    "records that fill their slots": (462, {"num_transfer_streams": 3, "gpu_pool_size_bytes": 8 * 3 * 4096}),
    "more streams than work": (150, {"num_transfer_streams": 7, "gpu_pool_size_bytes": 14 * 8192}),
}


def as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads that may not be read early, since something is there, are."""
    monkeypatch.setattr("kvortex.transfer.cuda.CudaExecutor._may_read_early", lambda *_: True)


def issued_by(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """With odd seeds the threads of lanes issue everything, with even ones the callers'; with every second of the odd ones they
    wait with each kernel until it can begin, as beside a model, and with every second of the even ones short loads are read
    early, though there is work ahead of them."""
    if seed % 2:
        monkeypatch.setattr("kvortex.transfer.lane._AT_ONCE", -1)
    if seed % 4 == 3:
        monkeypatch.setattr("kvortex.transfer.lane.PACED_S", 0)
        monkeypatch.setattr("kvortex.transfer.cuda.CudaExecutor._is_busy", lambda *_: True)
    if seed % 4 == 2:
        as_if_alone(monkeypatch)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", SHAPES)
def test_no_order_of_work_gives_wrong_bytes(monkeypatch: pytest.MonkeyPatch, kind: str, seed: int) -> None:
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    at_random(monkeypatch, seed)
    with fake_gpu(monkeypatch, LateGpu(seed)) as gpu:
        issued_by(monkeypatch, seed)
        nbytes, options = SHAPES[kind]
        cache = cache_of(nbytes)
        with engine_of(cache, **options) as engine:
            assert live(gpu, cache, engine, seed) > 5


class Sometimes(dict[int, int]):
    """Codes of calls that are refused: of any, or of those of one name, with a probability. One that lets a kernel go on has
    to be taken, nothing else could; but for a flag behind a copy of its own stream, without which no kernel is launched."""

    def __init__(self, gpu: LateGpu, seed: int, name: str | None = None, probability: float = 0.01) -> None:
        super().__init__()
        self._gpu, self._random, self.refused = gpu, random.Random(seed), 0
        self._name, self._probability = name, probability

    def get(self, at: int, default: Any = None) -> Any:
        call, before = self._gpu.issued.calls[at], self._gpu.issued.calls[at - 1]
        name = call.name
        if name == "write_value" and not (before.name in ("lines", "to_device") and before.stream == call.stream):
            return 0
        if name == "pop" or self._name not in (None, name) or self._random.random() > self._probability:
            return 0
        self.refused += 1
        return 2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", SHAPES)
def test_a_driver_that_refuses_now_and_then_spoils_nothing_else(
    monkeypatch: pytest.MonkeyPatch, kind: str, seed: int
) -> None:
    """And everything ends."""
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    at_random(monkeypatch, seed)
    with fake_gpu(monkeypatch, LateGpu(seed)) as gpu:
        issued_by(monkeypatch, seed)
        nbytes, options = SHAPES[kind]
        cache = cache_of(nbytes)
        with engine_of(cache, **options) as engine:
            gpu.issued.fails = sometimes = Sometimes(gpu, seed)
            live(gpu, cache, engine, seed)
            assert sometimes.refused > 0


@pytest.mark.parametrize("seed", range(8))
def test_flags_never_go_back(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Where a stream could not be made to wait for a resident kernel, it must not write before one that could."""
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    at_random(monkeypatch, seed)
    with fake_gpu(monkeypatch, LateGpu(seed)) as gpu:
        issued_by(monkeypatch, seed)
        cache = cache_of(1500)
        with engine_of(cache, transfer_route="resident", num_transfer_streams=3, gpu_pool_size_bytes=8 * 4096) as engine:
            gpu.issued.fails = sometimes = Sometimes(gpu, seed, "wait_value", 0.05)
            live(gpu, cache, engine, seed)
            assert sometimes.refused > 5


@pytest.mark.parametrize("seed", range(3))
def test_owners_in_threads_of_their_own(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    at_random(monkeypatch, seed)
    with fake_gpu(monkeypatch, LateGpu(seed)) as gpu:
        issued_by(monkeypatch, seed)
        cache = cache_of()
        with engine_of(cache) as engine:
            models = [Model(gpu, cache, engine, number, {}) for number in range(OWNERS)]
            for _ in range(5):  # how many of their blocks are still there to be loaded is chance, and a matter of who is fast
                threads = [threading.Thread(target=collections.deque, args=(model.live(40), 0)) for model in models]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(60)
                assert all(poll(ticket.done, time.monotonic() + 5) for model in models for ticket in model.tickets)
                gpu.finish()
                assert not gpu.left and not any(model.wrong for model in models)
                seen = sum(model.checked for model in models), sum(model.in_parts for model in models)
                if seen[0] > 100 and seen[1] > 5:
                    return
            raise AssertionError(f"{seen}: too little was loaded for this to say anything")
