"""Streams of the host device keep the rules of CUDA's: in order, asynchronous, ordered among each other by events alone."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest

from kvortex.devices import HostStream
from kvortex.devices.host import HostEvent
from kvortex.errors import ArgumentError, DeviceError, TransferTimeoutError


def pause() -> None:
    """Long enough for work that does not wait to be seen."""
    time.sleep(0.02)


def test_work_is_done_in_order_in_one_other_thread() -> None:
    stream, seen, threads = HostStream(), [], set()
    for number in range(200):
        stream.enqueue(lambda number=number: (seen.append(number), threads.add(threading.get_ident())))
    stream.synchronize()
    assert seen == list(range(200)) and len(threads) == 1 and threading.get_ident() not in threads
    stream.close()


def test_enqueue_does_not_wait() -> None:
    stream, gate, seen = HostStream(), threading.Event(), []
    stream.enqueue(gate.wait)
    stream.enqueue(lambda: seen.append(1))
    event = stream.record()
    pause()
    assert not seen and not event.query() and not event.synchronize(0.01)
    gate.set()
    assert event.synchronize(10) and event.query() and seen == [1]
    stream.close()


def test_an_event_marks_what_was_enqueued_before_it() -> None:
    stream, gate = HostStream(), threading.Event()
    before = stream.record()
    stream.enqueue(gate.wait)
    after = stream.record()
    assert before.synchronize(10) and not after.query()
    gate.set()
    assert after.synchronize(10)
    stream.close()


def test_a_stream_waits_for_an_event_of_another() -> None:
    first, second, gate, seen = HostStream(), HostStream(), threading.Event(), []
    first.enqueue(gate.wait)
    first.enqueue(lambda: seen.append("first"))
    second.enqueue(lambda: seen.append("free"))
    second.wait(first.record())
    second.enqueue(lambda: seen.append("second"))
    pause()
    assert seen == ["free"]
    gate.set()
    second.synchronize()
    assert seen == ["free", "first", "second"]
    first.close()
    second.close()


def test_a_wait_is_for_one_event_and_not_for_the_other_stream() -> None:
    first, second, gate = HostStream(), HostStream(), threading.Event()
    event = first.record()
    first.enqueue(gate.wait)
    second.wait(event)
    second.synchronize(10)
    gate.set()
    first.close()
    second.close()


def test_synchronize_has_a_deadline() -> None:
    stream, gate = HostStream(), threading.Event()
    stream.enqueue(gate.wait)
    with pytest.raises(TransferTimeoutError, match="a host stream was not idle after 0.02 s"):
        stream.synchronize(0.02)
    gate.set()
    stream.synchronize()
    stream.close()


@pytest.mark.parametrize("timeout", ["x", None, float("nan"), -1, -(10**400), True, [1], 1j], ids=lambda t: type(t).__name__)
def test_what_is_no_timeout(timeout: Any) -> None:
    stream = HostStream()
    for call in (stream.synchronize, stream.record().synchronize):
        with pytest.raises(ArgumentError, match="timeout = .*: must be a number of seconds, 0 or more"):
            call(timeout)
    stream.close()


@pytest.mark.parametrize("timeout", [10**400, float("inf"), 1e300], ids=["beyond all floats", "inf", "beyond the clock"])
def test_timeouts_that_no_clock_reaches(timeout: Any) -> None:
    stream = HostStream()
    stream.synchronize(timeout)
    assert stream.record().synchronize(timeout)
    stream.close()


@pytest.mark.parametrize("work", [None, 5, "print", HostEvent()], ids=lambda work: type(work).__name__)
def test_what_cannot_be_called_is_no_work(work: Any) -> None:
    """None would end the thread, and whatever is behind it would never be done."""
    stream, seen = HostStream(), []
    with pytest.raises(ArgumentError, match="is no work for a host stream: pass a function without arguments"):
        stream.enqueue(work)
    stream.enqueue(lambda: seen.append(1))
    stream.synchronize(10)
    assert seen == [1]
    stream.close()


@pytest.mark.parametrize("event", [None, threading.Event(), 5, lambda: None], ids=lambda event: type(event).__name__)
def test_what_is_no_event_is_not_waited_for(event: Any) -> None:
    stream = HostStream()
    with pytest.raises(ArgumentError, match="is no event of a host stream"):
        stream.wait(event)
    stream.synchronize(10)
    stream.close()


def test_a_stream_does_not_wait_for_ever_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.devices.host._LONGEST_WAIT_S", 0.02)
    stream, seen = HostStream(), []
    stream.wait(HostEvent())  # of a stream that died
    stream.enqueue(lambda: seen.append(1))
    with pytest.raises(DeviceError, match="TransferTimeoutError: a host stream waited 0.02 s"):
        stream.synchronize(10)
    assert not seen, "what must come after is not done before"
    stream.close()


def test_when_set_before_and_after() -> None:
    event, seen = HostEvent(), []
    event.when_set(lambda: seen.append(1))
    event.when_set(lambda: seen.append(2))
    assert not seen
    event.set()
    assert seen == [1, 2]
    event.when_set(lambda: seen.append(3))
    assert seen == [1, 2, 3]
    event.set()
    assert seen == [1, 2, 3]


def test_when_set_runs_in_the_thread_that_gets_there() -> None:
    stream, gate, seen = HostStream(), threading.Event(), []
    stream.enqueue(gate.wait)
    stream.record().when_set(lambda: seen.append(threading.current_thread().name))
    gate.set()
    stream.synchronize()
    assert seen == ["kvortex-host-stream"]
    stream.close()


def test_when_set_may_ask_the_event_itself() -> None:
    """No lock is held while the work runs."""
    event, seen = HostEvent(), []
    event.when_set(lambda: event.when_set(lambda: seen.append(event.query())))
    event.set()
    assert seen == [True]


def test_when_set_racing_with_set_runs_everything_once() -> None:
    for _ in range(50):
        event, seen, start = HostEvent(), [], threading.Barrier(3)

        def add(event: HostEvent = event, seen: list = seen, start: threading.Barrier = start) -> None:
            start.wait()
            for number in range(20):
                event.when_set(lambda number=number: seen.append(number))

        threads = [threading.Thread(target=add) for _ in range(2)]
        for thread in threads:
            thread.start()
        start.wait()
        event.set()
        for thread in threads:
            thread.join()
        assert len(seen) == 40


def test_close_ends_the_thread_after_the_work_so_far() -> None:
    stream, seen = HostStream(), []
    stream.enqueue(lambda: (time.sleep(0.02), seen.append(1)))
    stream.close()
    stream.close()
    stream._thread.join(10)
    assert seen == [1] and not stream._thread.is_alive()


def test_the_thread_ends_when_the_stream_is_dropped() -> None:
    stream, gate, seen = HostStream(), threading.Event(), []
    thread = stream._thread
    stream.enqueue(gate.wait)
    stream.enqueue(lambda: seen.append(1))
    event = stream.record()
    del stream
    gc.collect()
    gate.set()
    assert event.synchronize(10), "work of a dropped stream is still done"
    thread.join(10)
    assert seen == [1] and not thread.is_alive()


def test_streams_do_not_keep_the_process_alive() -> None:
    stream = HostStream()
    assert stream._thread.daemon
    stream.close()


def test_an_error_in_work_is_told_and_no_later_work_is_done() -> None:
    stream, other, done = HostStream(), HostStream(), []

    def bad() -> None:
        raise ZeroDivisionError

    before = stream.record()
    stream.enqueue(bad)
    stream.enqueue(lambda: done.append(1))
    after = stream.record()
    other.wait(after)
    other.enqueue(lambda: done.append(2))
    for broken in (stream, other):
        with pytest.raises(DeviceError, match="raised ZeroDivisionError"):
            broken.synchronize(10)
        broken.close()
    assert before.error is None and isinstance(after.error, ZeroDivisionError) and not done


def test_a_closed_stream_takes_no_more_work() -> None:
    stream = HostStream()
    stream.close()
    for call in (stream.record, stream.synchronize, lambda: stream.enqueue(print), lambda: stream.wait(HostEvent())):
        with pytest.raises(ArgumentError, match="was closed"):
            call()
