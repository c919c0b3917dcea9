"""Deadlines, cancellation, probes, flushes, and threads that take turns."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.tiers import Call, Outcome
from kvortex.tiers.disk import DiskOptions, DiskTier
from kvortex.tiers.disk.crew import Crew
from kvortex.tiers.disk.slab import PROBE, START
from tests.tiers.disk.rig import (
    EIO,
    FORM,
    Blocks,
    Failing,
    Gate,
    Patch,
    assert_whole,
    capacity,
    crash,
    opened,
    raising,
    soon,
)


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew(1, 1, "test")
    yield crew
    assert crew.close(5)


def test_steps_begin_in_order_and_all_end(crew: Crew) -> None:
    begun: list[int] = []
    assert crew.run(lambda at, pages: begun.append(at), 50, soon()) == (50, Outcome.OK)
    assert sorted(begun) == list(range(50))


def test_what_a_step_raises_is_raised_and_the_thread_lives(crew: Crew) -> None:
    def step(at: int, pages: Any) -> None:
        raise ValueError("a defect")

    for _ in range(3):
        with pytest.raises(ValueError, match="a defect"):
            crew.run(step, 4, soon())
    assert crew.run(lambda at, pages: None, 4, soon()) == (4, Outcome.OK)


def test_what_has_not_begun_at_the_deadline_never_begins(crew: Crew) -> None:
    begun: list[int] = []

    def step(at: int, pages: Any) -> None:
        begun.append(at)
        time.sleep(0.05)

    count, why = crew.run(step, 100, Call(time.monotonic() + 0.2))
    assert why == Outcome.TIMEOUT and count == len(begun) < 20
    time.sleep(0.1)
    assert len(begun) == count
    assert crew.run(step, 1, Call(time.monotonic() - 1)) == (0, Outcome.TIMEOUT)


def test_what_has_begun_has_ended_when_the_call_comes_back(crew: Crew) -> None:
    """Late, but nobody writes to the caller's buffers any more."""
    ended: list[int] = []

    def step(at: int, pages: Any) -> None:
        time.sleep(0.3)
        ended.append(at)

    count, why = crew.run(step, 4, Call(time.monotonic() + 0.05))
    assert (count, why, len(ended)) == (2, Outcome.TIMEOUT, 2)


def test_a_cancelled_call_gives_up_what_has_not_begun(crew: Crew) -> None:
    begun: list[int] = []

    def step(at: int, pages: Any) -> None:
        begun.append(at)
        time.sleep(0.01)

    count, why = crew.run(step, 1000, Call(time.monotonic() + 20, lambda: len(begun) >= 5))
    assert why == Outcome.CANCELLED and count == len(begun) < 20


def test_a_short_batch_does_not_wait_for_a_long_one(crew: Crew) -> None:
    done: list[int] = []

    def step(at: int, pages: Any) -> None:
        done.append(at)
        time.sleep(0.01)

    long = threading.Thread(target=lambda: crew.run(step, 200, soon()))
    long.start()
    time.sleep(0.05)
    crew.run(lambda at, pages: None, 2, soon())
    assert len(done) < 100
    long.join()
    assert len(done) == 200


def test_a_crew_whose_threads_hang_gives_up_at_the_deadline(crew: Crew) -> None:
    gate, reached = threading.Event(), threading.Semaphore(0)

    def hang(at: int, pages: Any) -> None:
        reached.release()
        gate.wait(20)

    hung = threading.Thread(target=lambda: crew.run(hang, 2, soon()))
    hung.start()
    assert reached.acquire(timeout=20) and reached.acquire(timeout=20)
    began = time.monotonic()
    assert crew.run(lambda at, pages: None, 1, Call(time.monotonic() + 0.2)) == (0, Outcome.TIMEOUT)
    assert time.monotonic() - began < 5
    gate.set()
    hung.join()


def test_a_call_that_is_interrupted_twice_waits_for_what_has_begun(crew: Crew) -> None:
    """An impatient user's second Ctrl-C does not leave a read at work on memory that is somebody else's by then."""
    ended: list[int] = []

    def step(at: int, pages: Any) -> None:
        time.sleep(1.0)
        ended.append(at)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            crew.run(step, 2, soon())
        assert sorted(ended) == [0, 1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_an_interrupted_call_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    """KeyboardInterrupt while it waits: what has begun ends first, then pins and reservations go."""
    blocks, system = Blocks(8), Failing()
    with opened(tmp_path, system=system, readers=1, writers=1) as tier:
        if name == "preadv":
            blocks.put(tier)
        gate = Gate(name)
        system.rule = gate
        asked = iter([False, False, KeyboardInterrupt()])
        me = threading.get_ident()

        def cancelled() -> bool:
            if threading.get_ident() != me:
                return False
            answer = next(asked)
            if isinstance(answer, BaseException):
                threading.Timer(0.1, gate.open.set).start()
                raise answer
            return answer

        call = Call(time.monotonic() + 20, cancelled)
        with pytest.raises(KeyboardInterrupt):
            if name == "preadv":
                blocks.get(tier, call=call)
            else:
                blocks.put(tier, call=call)
        assert gate.open.is_set(), "it came back while a thread used its buffers"
        assert_whole(tier)
        assert sum(blocks.found(tier)) == (8 if name == "preadv" else 1), "what was prepared and not begun is not written"
        assert tier._store.unsynced, "what was written is to be flushed, however the call ended"


@pytest.mark.parametrize("why", ["deadline", "cancelled"])
def test_records_that_were_given_up_are_told(tmp_path: Path, why: str) -> None:
    blocks, system = Blocks(8), Failing()
    outcome = Outcome.TIMEOUT if why == "deadline" else Outcome.CANCELLED

    def slow(name: str, fd: int, buffers: Any, offset: int) -> None:
        if offset >= START:
            time.sleep(0.1)

    def call() -> Call:
        ends = time.monotonic() + 0.15
        return Call(ends) if why == "deadline" else Call(ends + 20, lambda: time.monotonic() > ends)

    with opened(tmp_path, system=system, readers=1, writers=1) as tier:
        system.rule = slow  # type: ignore[assignment]
        outcomes = blocks.put(tier, call=call())
        assert set(outcomes.tolist()) == {Outcome.OK, outcome}
        assert tier.contains(blocks.keys, soon()).tolist() == (outcomes == Outcome.OK).tolist()
        system.rule = lambda *_: None
        blocks.put(tier)
        system.rule = slow  # type: ignore[assignment]
        assert set(blocks.get(tier, call=call()).outcomes.tolist()) == {Outcome.OK, outcome}
        assert set(tier.delete(blocks.keys, call()).tolist()) == {outcome}
        system.rule = lambda *_: None
        assert not tier.contains(blocks.keys, soon()).any(), "forgotten in memory all the same"


def test_two_puts_of_one_key_store_it_once(tmp_path: Path) -> None:
    blocks, system = Blocks(1), Failing()
    with opened(tmp_path, system=system) as tier:
        gate = Gate("pwritev")
        system.rule = gate
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(blocks.put(tier).tolist())) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert gate.reached.acquire(timeout=20)
        assert blocks.put(tier, call=Call(time.monotonic() + 0.1)).tolist() == [Outcome.TIMEOUT]
        gate.open.set()
        for thread in threads:
            thread.join(20)
        assert found == [[Outcome.OK]] * 3
        assert sum(name == "pwritev" and offset >= START for name, offset, _ in system.calls) == 1


def test_a_record_that_is_being_read_is_neither_evicted_nor_written_over(tmp_path: Path) -> None:
    blocks, system = Blocks(2), Failing()
    with opened(tmp_path, 1, system=system) as tier:
        blocks.put(tier, [0])
        gate, found = Gate("preadv"), []
        system.rule = gate
        thread = threading.Thread(target=lambda: found.append(blocks.found(tier, [0])))
        thread.start()
        assert gate.reached.acquire(timeout=20)
        assert blocks.put(tier, [1]).tolist() == [Outcome.FULL]
        gate.open.set()
        thread.join(20)
        assert found == [[True]] and blocks.put(tier, [1]).tolist() == [Outcome.OK]


def test_a_delete_waits_for_a_write_over_what_it_deletes(tmp_path: Path) -> None:
    """Until that has ended, the evicted record is still on disk; and the new one must not be erased in its place."""
    blocks, system = Blocks(2), Failing()
    with opened(tmp_path, 1, system=system) as tier:
        blocks.put(tier, [0])
        gate, found = Gate("pwritev"), []
        system.rule = gate
        thread = threading.Thread(target=lambda: found.append(blocks.put(tier, [1]).tolist()))
        thread.start()
        assert gate.reached.acquire(timeout=20)
        assert tier.delete(blocks.keys[:1], Call(time.monotonic() + 0.2)).tolist() == [Outcome.TIMEOUT]
        threading.Timer(0.1, gate.open.set).start()
        assert tier.delete(blocks.keys[:1], soon()).tolist() == [Outcome.MISS]
        thread.join(20)
        assert found == [[Outcome.OK]] and blocks.found(tier) == [False, True]


def test_a_write_waits_for_an_erasure_of_what_it_writes_over(tmp_path: Path) -> None:
    """Else the zeros might come last."""
    blocks, system = Blocks(2), Failing()
    with opened(tmp_path, 1, system=system) as tier:
        blocks.put(tier, [0])
        tier._store.index.drop(blocks.keys)  # the header is still there, and the slot is free
        gate, found = Gate("pwritev"), []
        system.rule = lambda name, fd, buffers, offset: gate(name, fd, buffers, offset) if len(buffers) == 1 else None
        deleting = threading.Thread(target=lambda: found.append(tier.delete(blocks.keys[:1], soon()).tolist()))
        deleting.start()
        assert gate.reached.acquire(timeout=20)
        writing = threading.Thread(target=lambda: found.append(blocks.put(tier, [1]).tolist()))
        writing.start()
        time.sleep(0.1)
        assert found == []
        gate.open.set()
        deleting.join(20)
        writing.join(20)
        assert sorted(found) == [[Outcome.OK], [Outcome.MISS]] and blocks.found(tier) == [False, True]


def test_a_probe_does_what_get_and_put_do(tmp_path: Path) -> None:
    system = Failing()
    with opened([tmp_path / "a", tmp_path / "b"], system=system) as tier:
        system.calls.clear()
        assert tier.probe(soon()) is None
        assert sorted(name for name, _, _ in system.calls) == ["preadv"] * 2 + ["pwritev"] * 2
        for name, word in (("pwritev", "writing"), ("preadv", "reading")):
            system.rule = raising(name, EIO, PROBE)
            trouble = tier.probe(soon())
            assert trouble is not None and word in trouble and str(tmp_path / "a") in trouble
        system.rule = lambda name, fd, buffers, offset: sum(map(len, buffers)) if name == "pwritev" else None
        assert tier.probe(soon()) is not None, "what was read is of the last probe"
        system.rule = lambda *_: None
        assert tier.probe(soon()) is None
        assert tier.probe(Call(time.monotonic() - 1)) is not None


@pytest.mark.parametrize("sync", ["none", "group", "dsync"])
def test_flushes(tmp_path: Path, sync: str) -> None:
    import fcntl
    import os

    blocks, system = Blocks(4), Failing()
    flushes: list[str] = []
    with opened(tmp_path, system=system, sync=sync, sync_seconds=0.02) as tier:
        system.rule = lambda name, fd, buffers, offset: flushes.append(name) if name == "fdatasync" else None
        flags = fcntl.fcntl(tier._store.slabs[0]._fd, fcntl.F_GETFL)
        assert bool(flags & os.O_DSYNC) == (sync == "dsync")
        blocks.put(tier)
        ends = time.monotonic() + (5 if sync == "group" else 0.1)
        while time.monotonic() < ends and not flushes:
            time.sleep(0.01)
        assert bool(flushes) == (sync == "group")
        time.sleep(0.1)
        assert len(flushes) <= 1, "nothing was written since"
    assert flushes, "closing flushes"


def test_a_flush_that_fails_is_counted_and_tried_again(tmp_path: Path) -> None:
    blocks, system = Blocks(1), Failing()
    with opened(tmp_path, system=system, sync="group", sync_seconds=0.02) as tier:
        system.rule = raising("fdatasync", EIO)
        blocks.put(tier)
        ends = time.monotonic() + 10
        while tier.failures().get("EIO", 0) < 2 and time.monotonic() < ends:
            time.sleep(0.01)
        assert tier.failures()["EIO"] >= 2
        system.rule = lambda *_: None


def test_a_close_that_fails_leaves_the_records(tmp_path: Path) -> None:
    blocks, system = Blocks(3), Failing()
    with opened(tmp_path, system=system) as tier:
        blocks.put(tier)
        system.rule = raising("fdatasync", EIO)
    assert any("was not closed as it should be" in note for note in tier.notes)
    with opened(tmp_path) as tier:
        assert all(blocks.found(tier))


def test_a_close_waits_for_calls_and_ends_threads(tmp_path: Path) -> None:
    blocks, system = Blocks(8), Failing()
    before = threading.active_count()
    with opened(tmp_path, system=system, writers=2) as tier:
        gate, found = Gate("pwritev"), []
        system.rule = gate
        thread = threading.Thread(target=lambda: found.append(blocks.put(tier)))
        thread.start()
        assert gate.reached.acquire(timeout=20)
        threading.Timer(0.2, gate.open.set).start()
        tier.close()
        thread.join(20)
        assert {Outcome.OK, Outcome.FAILED} == set(found[0].tolist())
    assert threading.active_count() == before
    with opened(tmp_path) as tier:
        assert blocks.found(tier) == (found[0] == Outcome.OK).tolist()


def test_calls_hold_no_gil_while_they_wait(tmp_path: Path) -> None:
    """Another Python thread goes on counting while a read hangs."""
    blocks, system = Blocks(1), Failing()
    with opened(tmp_path, system=system) as tier:
        blocks.put(tier)
        gate = Gate("preadv")
        system.rule = gate
        thread = threading.Thread(target=lambda: blocks.get(tier))
        thread.start()
        assert gate.reached.acquire(timeout=20)
        count = sum(1 for _ in range(100_000))
        assert count == 100_000 and thread.is_alive()
        gate.open.set()
        thread.join(20)


def test_all_policies(tmp_path: Path) -> None:
    blocks = Blocks(12)
    for policy in ("lru", "lfu", "arc", "s3fifo"):
        folder = tmp_path / policy
        for _ in range(2):
            tier = DiskTier(DiskOptions(paths=folder, capacity_bytes=capacity(8), policy=policy), FORM)
            assert (blocks.put(tier) == Outcome.OK).all()
            assert sum(blocks.found(tier)) == 8
            assert_whole(tier)
            crash(tier)


def test_a_closed_file_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvortex.tiers.disk import tier as module

    monkeypatch.setattr(module, "_CLOSING", 0.2)
    blocks, system = Blocks(1), Failing()
    tier = DiskTier(DiskOptions(paths=tmp_path, capacity_bytes=capacity(2)), FORM, system=system)
    gate = Gate("pwritev")
    system.rule = gate
    thread = threading.Thread(target=lambda: blocks.put(tier))
    thread.start()
    assert gate.reached.acquire(timeout=20)
    began = time.monotonic()
    tier.close()
    assert time.monotonic() - began < 5
    assert not (tmp_path / "kvortex.snapshot").exists()
    gate.open.set()
    thread.join(20)
    crash(tier)
    assert np.frombuffer(Patch(tmp_path).read(0, 112), "<u8")[11] == 0, "it is not said to be closed"
