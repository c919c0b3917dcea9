"""Memory is faulted in from its beginning on, by several threads, each page once, until somebody stops it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import pytest

from kvortex.memory import filling
from kvortex.memory.filling import Filler
from kvortex.memory.mapping import HUGE_PAGE, Mapping
from tests.memory.smaps import PAGE, resident_pages


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "TOUCH_BYTES", 3 * PAGE)
    monkeypatch.setattr(filling.os, "cpu_count", lambda: 5)


@pytest.fixture
def mapping() -> Iterator[Mapping]:
    made = Mapping(100 * PAGE + 17)
    yield made
    made.close()


def test_every_page_is_touched_once(small: None, mapping: Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[tuple[int, int]] = []
    memset = ctypes.memset

    def record(address: int, byte: int, nbytes: int) -> int:
        touched.append((address - mapping.address, nbytes))
        return memset(address, byte, nbytes)

    monkeypatch.setattr(filling.ctypes, "memset", record)
    filler = Filler(mapping.address, mapping.nbytes)
    assert resident_pages(mapping.address, mapping.nbytes) == 0, "not before start"
    filler.start()
    assert filler.wait(mapping.nbytes) and resident_pages(mapping.address, mapping.nbytes) == 101
    filler.close()
    ends = [start + size for start, size in sorted(touched)]
    assert [start for start, _ in sorted(touched)] == [0, *ends[:-1]] and ends[-1] == mapping.nbytes


def test_the_beginning_is_there_before_the_rest(small: None, mapping: Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    memset, gate = ctypes.memset, threading.Event()

    def slow(address: int, byte: int, nbytes: int) -> int:
        if address - mapping.address >= 30 * PAGE:
            assert gate.wait(20)
        return memset(address, byte, nbytes)

    monkeypatch.setattr(filling.ctypes, "memset", slow)
    filler = Filler(mapping.address, mapping.nbytes)
    filler.start()
    assert filler.wait(30 * PAGE) and resident_pages(mapping.address, mapping.nbytes) == 30
    later: list[bool] = []
    waiter = threading.Thread(target=lambda: later.append(filler.wait(31 * PAGE)))
    waiter.start()
    waiter.join(0.05)
    assert not later
    gate.set()
    waiter.join(20)
    assert later == [True]
    filler.close()


def test_stopping_ends_all_writing_and_all_waiting(small: None, mapping: Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    memset, gate, writing = ctypes.memset, threading.Event(), threading.Semaphore(0)

    def slow(address: int, byte: int, nbytes: int) -> int:
        writing.release()
        assert gate.wait(20)
        return memset(address, byte, nbytes)

    monkeypatch.setattr(filling.ctypes, "memset", slow)
    filler = Filler(mapping.address, mapping.nbytes)
    filler.start()
    for _ in range(5):
        assert writing.acquire(timeout=20)
    ended: list[object] = []
    waiter = threading.Thread(target=lambda: ended.append(filler.wait(mapping.nbytes)))
    closer = threading.Thread(target=lambda: ended.append(filler.close()))
    waiter.start()
    closer.start()
    waiter.join(20)
    assert ended == [False], "a wait ends at once, and the memory stays until the last write has ended"
    gate.set()
    closer.join(20)
    assert ended == [False, None] and resident_pages(mapping.address, mapping.nbytes) == 15
    filler.close()


def test_one_that_never_began() -> None:
    mapping = Mapping(HUGE_PAGE)
    Filler(mapping.address, mapping.nbytes).close()
    mapping.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_ends_all_waiting(small: None, mapping: Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    memset = ctypes.memset

    def fails(address: int, byte: int, nbytes: int) -> int:
        if address - mapping.address == 30 * PAGE:
            raise MemoryError("planted")
        return memset(address, byte, nbytes)

    monkeypatch.setattr(filling.ctypes, "memset", fails)
    filler = Filler(mapping.address, mapping.nbytes)
    filler.start()
    assert filler.wait(30 * PAGE) or filler._stopped
    assert not filler.wait(mapping.nbytes)
    filler.close()
