"""Copies by threads: every byte, after the caller's stream, on as many threads as pay, with errors told and not raised."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvortex.devices import HostStream
from kvortex.devices.host import HostBuffer
from kvortex.errors import ArgumentError, TransferError, TransferTimeoutError
from kvortex.transfer import host as module
from kvortex.transfer.executor import Completion, Direction, poll
from kvortex.transfer.host import HostExecutor
from kvortex.transfer.plan import Pool
from tests.naive_plan import VRAM
from tests.transfer.plans import fragments_of
from tests.transfer.submitting import submit_blocks, submit_buffers

SIZES, BLOCKS, SLOT, SLOTS = [100, 7, 33], 20, 160, 30


class Bench:
    """Pages and slots in RAM, and an executor between them."""

    def __init__(self, threads: int) -> None:
        fragments, nbytes = fragments_of(SIZES, BLOCKS, 5, interleaved=False)
        rng = np.random.default_rng(1)
        self.pages, self.slots = HostBuffer(nbytes), HostBuffer(SLOTS * SLOT)
        self.pages.write(rng.integers(0, 256, nbytes, np.uint8))
        self.slots.write(rng.integers(0, 256, SLOTS * SLOT, np.uint8))
        fragments[:, 0] += self.pages.address - VRAM
        self.fragments = fragments
        self.executor = HostExecutor(fragments, np.cumsum([0, *SIZES]), Pool(self.slots.address, SLOT, SLOTS), threads)

    def page(self, block: int) -> np.ndarray:
        """Positions of a block's bytes, in record order."""
        rows = self.fragments.tolist()
        return np.concatenate([base - self.pages.address + block * stride + np.arange(n) for base, stride, _, n in rows])

    def record(self, slot: int) -> slice:
        return slice(slot * SLOT, slot * SLOT + sum(SIZES))


@pytest.fixture
def bench() -> Iterator[Callable[[int], Bench]]:
    made: list[Bench] = []

    def make(threads: int) -> Bench:
        made.append(Bench(threads))
        return made[-1]

    yield make
    for one in made:
        one.executor.close()


def finish(completion: Completion) -> Completion:
    assert poll(completion.query, time.monotonic() + 20)
    return completion


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 20])
def test_pages_to_slots_and_back(bench: Callable[[int], Bench], threads: int, count: int) -> None:
    b = bench(threads)
    rng = np.random.default_rng(count)
    blocks, slots = rng.permutation(BLOCKS)[:count], rng.permutation(SLOTS)[:count]
    pages, wanted = b.pages.read(), b.slots.read()
    for block, slot in zip(blocks.tolist(), slots.tolist(), strict=True):
        wanted[b.record(slot)] = pages[b.page(block)]
    save = finish(submit_blocks(b.executor, Direction.SAVE, blocks, slots, None))
    assert save.error is None and save.seconds > 0
    assert (b.slots.read() == wanted).all() and (b.pages.read() == pages).all()
    targets = rng.permutation(BLOCKS)[:count]
    loaded = pages.copy()
    for block, slot in zip(targets.tolist(), slots.tolist(), strict=True):
        loaded[b.page(block)] = wanted[b.record(slot)]
    finish(submit_blocks(b.executor, Direction.LOAD, targets, slots, None))
    assert (b.pages.read() == loaded).all() and (b.slots.read() == wanted).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_buffers_to_slots_and_back(bench: Callable[[int], Bench], threads: int) -> None:
    b = bench(threads)
    sizes, slots = np.array([1, 160, 33, 90, 2, 160, 7, 8, 9]), np.array([4, 3, 0, 29, 7, 8, 20, 21, 1])
    offsets = np.cumsum(sizes + 3) - sizes
    pages, wanted = b.pages.read(), b.slots.read()
    for offset, size, slot in zip(offsets.tolist(), sizes.tolist(), slots.tolist(), strict=True):
        wanted[slot * SLOT : slot * SLOT + size] = pages[offset : offset + size]
    finish(submit_buffers(b.executor, Direction.SAVE, b.pages.address + offsets, sizes, slots, None))
    assert (b.slots.read() == wanted).all()
    b.pages.write(np.zeros(b.pages.nbytes, np.uint8))
    finish(submit_buffers(b.executor, Direction.LOAD, b.pages.address + offsets, sizes, slots, None))
    kept = np.zeros(len(pages), bool)
    for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
        kept[offset : offset + size] = True
    assert (b.pages.read() == np.where(kept, pages, 0)).all()


@pytest.mark.parametrize(
    ("threads", "count", "parts"), [(1, 20, 1), (4, 1, 1), (4, 7, 1), (4, 8, 2), (4, 15, 3), (4, 20, 4), (16, 20, 5)]
)
def test_work_is_shared_where_there_is_enough(
    bench: Callable[[int], Bench], monkeypatch: pytest.MonkeyPatch, threads: int, count: int, parts: int
) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(module, "copy_paged", lambda _m, _f, blocks, *_: seen.append(blocks.tolist()))
    finish(submit_blocks(bench(threads).executor, Direction.SAVE, np.arange(count), np.arange(count), None))
    assert sorted(sum(seen, [])) == list(range(count)) and len(seen) == parts
    assert parts == 1 or all(len(part) >= 4 for part in seen)


def test_an_error_in_one_thread_is_told_after_all_have_ended(
    bench: Callable[[int], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def copy(_m: int, _f: object, blocks: np.ndarray, *_: object) -> None:
        if 0 in blocks:
            raise MemoryError("no more")
        gate.wait(20)

    monkeypatch.setattr(module, "copy_paged", copy)
    completion = submit_blocks(bench(2).executor, Direction.SAVE, np.arange(8), np.arange(8), None)
    time.sleep(0.02)
    assert not completion.query(), "another thread is still copying"
    gate.set()
    error = finish(completion).error
    assert isinstance(error, TransferError) and str(error) == "a host copy failed: no more"


def test_a_transfer_waits_for_its_stream_and_blocks_no_other(bench: Callable[[int], Bench]) -> None:
    b = bench(1)
    gate, stream = threading.Event(), HostStream()
    stream.enqueue(gate.wait)
    stream.enqueue(lambda: b.pages.write(np.zeros(b.pages.nbytes, np.uint8)))
    waiting = submit_blocks(b.executor, Direction.SAVE, np.array([3]), np.array([5]), stream)
    free = finish(submit_blocks(b.executor, Direction.SAVE, np.array([4]), np.array([6]), None))
    assert free.error is None and not waiting.query(), "one thread only, and it is not held by the one that waits"
    gate.set()
    finish(waiting)
    assert not b.slots.read()[b.record(5)].any() and b.slots.read()[b.record(6)].any()
    stream.close()


def test_what_is_enqueued_later_is_not_waited_for(bench: Callable[[int], Bench]) -> None:
    b = bench(1)
    gate, stream = threading.Event(), HostStream()
    completion = submit_blocks(b.executor, Direction.SAVE, np.array([3]), np.array([5]), stream)
    stream.enqueue(gate.wait)
    finish(completion)
    gate.set()
    stream.close()


def test_slots_are_resolved_at_the_call(bench: Callable[[int], Bench]) -> None:
    """Records' addresses are computed at the call: the caller of the executor may reuse its array of slots."""
    b = bench(1)
    gate, stream = threading.Event(), HostStream()
    stream.enqueue(gate.wait)
    slots = np.array([5])
    completion = submit_blocks(b.executor, Direction.SAVE, np.array([3]), slots, stream)
    before = b.slots.read()
    slots[0] = 6
    gate.set()
    finish(completion)
    changed = np.flatnonzero(b.slots.read() != before) // SLOT
    assert set(changed.tolist()) == {5}
    stream.close()


def held(b: Bench) -> tuple[Completion, threading.Event]:
    """A transfer that runs until the event is set."""
    gate, stream = threading.Event(), HostStream()
    stream.enqueue(gate.wait)
    completion = submit_blocks(b.executor, Direction.SAVE, np.array([3]), np.array([5]), stream)
    stream.close()
    return completion, gate


def test_add_to_a_stream_holds_its_later_work(bench: Callable[[int], Bench]) -> None:
    completion, gate = held(bench(1))
    stream, seen = HostStream(), []
    stream.enqueue(lambda: seen.append("before"))
    completion.add_to(stream, 20)
    stream.enqueue(lambda: seen.append(completion.query()))
    time.sleep(0.02)
    assert seen == ["before"]
    gate.set()
    stream.synchronize()
    assert seen == ["before", True]
    stream.close()


def test_add_to_none_holds_the_caller(bench: Callable[[int], Bench]) -> None:
    completion, gate = held(bench(1))
    threading.Timer(0.03, gate.set).start()
    completion.add_to(None, 20)
    assert completion.query()


@pytest.mark.parametrize("stream", [0, 5, "stream", object()])
def test_other_streams_are_refused_everywhere(bench: Callable[[int], Bench], stream: object) -> None:
    b = bench(1)
    completion = finish(submit_blocks(b.executor, Direction.SAVE, np.array([3]), np.array([5]), None))
    before = b.slots.read()
    with pytest.raises(ArgumentError, match="is no stream of the host device: pass a HostStream or None"):
        b.executor.check_stream(stream)
    with pytest.raises(ArgumentError):
        completion.add_to(stream, 20)
    assert (b.slots.read() == before).all()
    b.executor.check_stream(None)


def test_close_waits_for_the_copies_and_may_be_called_twice(
    bench: Callable[[int], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(1)
    monkeypatch.setattr(module, "copy_paged", lambda *_: time.sleep(0.02))
    completion = submit_blocks(b.executor, Direction.SAVE, np.array([3]), np.array([5]), None)
    b.executor.close()
    assert completion.query()
    b.executor.close()


def test_close_does_not_wait_for_ever(bench: Callable[[int], Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    gate, b = threading.Event(), bench(2)
    monkeypatch.setattr(module, "copy_paged", lambda *_: gate.wait(20))
    monkeypatch.setattr(module, "_LONGEST_END_S", 0.05)
    submit_blocks(b.executor, Direction.SAVE, np.array([3]), np.array([5]), None)
    began = time.monotonic()
    with pytest.raises(TransferTimeoutError, match="kvortex-host-copy-. still copies after 0.05 s"):
        b.executor.close()
    assert time.monotonic() - began < 5
    gate.set()


def test_close_in_a_thread_that_copies_does_not_wait_for_itself(bench: Callable[[int], Bench]) -> None:
    """The collector may drop an engine in any thread."""
    b, told = bench(2), []
    threads = list(b.executor._threads)

    def close() -> None:
        try:
            b.executor.close()
        except BaseException as error:
            told.append(error)

    b.executor._work.put(close)
    for thread in threads:
        thread.join(10)
    assert not told and not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_as_many_threads_as_were_asked_for(bench: Callable[[int], Bench], threads: int) -> None:
    executor = bench(threads).executor
    assert len(executor._threads) == threads and all(thread.is_alive() and thread.daemon for thread in executor._threads)
    assert {thread.name for thread in executor._threads} == {f"kvortex-host-copy-{at}" for at in range(threads)}


def test_seconds_are_those_of_the_copies(bench: Callable[[int], Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start of the first part to the end of the last; what it waited for its stream does not count."""
    b, gate, stream = bench(2), threading.Event(), HostStream()
    monkeypatch.setattr(module, "copy_paged", lambda *_: time.sleep(0.03))
    began = time.perf_counter()
    stream.enqueue(gate.wait)
    completion = submit_blocks(b.executor, Direction.SAVE, np.arange(8), np.arange(8), stream)
    time.sleep(0.05)
    opened = time.perf_counter()
    gate.set()
    finish(completion)
    ended = time.perf_counter()
    assert 0.03 <= completion.seconds <= ended - opened < ended - began
    stream.close()
