"""Turns on a disk: so many at once, one right after another, and what they got seen by somebody else in the meantime."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.tiers import Call, Outcome
from kvortex.tiers.disk import reading, writing
from kvortex.tiers.disk.crew import Crew, RefusedError, Turn
from kvortex.tiers.disk.pages import Pages
from kvortex.tiers.disk.places import Places, marks_of
from tests.tiers.disk.rig import Blocks, Failing, Gate, assert_whole, opened, soon

pytestmark = pytest.mark.usefixtures("nothing_leaks")
Make = Callable[[int, int], Crew]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Crew] = []

    def one(turns: int, spare: int) -> Crew:
        made.append(Crew(turns, spare, "test"))
        return made[-1]

    yield one
    assert all(crew.close(5) for crew in made)


def until(what: Callable[[], object], seconds: float = 10.0) -> bool:
    ends = time.monotonic() + seconds
    while not what() and time.monotonic() < ends:
        time.sleep(0.001)
    return bool(what())


@pytest.mark.parametrize(("turns", "spare"), [(1, 1), (1, 2), (3, 1), (4, 2)])
def test_pages_are_a_steps_own_until_it_has_ended(make: Make, turns: int, spare: int) -> None:
    """And no more calls are made at once than there are turns; each answer comes to whom it belongs to."""
    crew, lock = make(turns, spare), threading.Lock()
    rng, now, most, ended = np.random.default_rng(0), [0], [0], list[int]()
    naps = rng.choice([0, 0, 0.0005, 0.002], (300, 3)).tolist()

    def step(at: int, pages: Pages) -> Turn:
        pages.put_header(at.to_bytes(4, "little") * 4)

        def call() -> int:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(naps[at][0])
            with lock:
                now[0] -= 1
            return at + 7

        def after(turn: Turn) -> None:
            time.sleep(naps[at][1])
            assert turn.done() == at + 7
            assert bytes(pages.header[:16]) == at.to_bytes(4, "little") * 4, "somebody else had these pages"
            ended.append(at)

        return Turn(call, after)

    callers = [threading.Thread(target=lambda: crew.run(step, 300, soon(60))) for _ in range(2)]
    for caller in callers:
        caller.start()
    assert crew.run(step, 300, soon(60)) == (300, Outcome.OK)
    for caller in callers:
        caller.join(60)
    assert most[0] == turns and sorted(ended) == sorted(3 * list(range(300)))


def test_a_thread_goes_on_before_anybody_looks_at_what_it_got(make: Make) -> None:
    """The same one: nobody has to wake up for the next call. The check of the first waits until the last call was made."""
    crew, prepared, by, seen = make(1, 2), set[int](), list[int](), list[int]()
    last = threading.Event()

    def step(at: int, pages: Pages) -> Turn:
        def call() -> int:
            by.append(threading.get_native_id())
            assert at == 2 or until(lambda: at + 1 in prepared)
            if at == 2:
                last.set()
            return at

        def after(turn: Turn) -> None:
            assert last.wait(10), "the disk waits for who looks at what it gave"
            seen.append(turn.done())

        prepared.add(at)
        return Turn(call, after)

    assert crew.run(step, 3, soon()) == (3, Outcome.OK)
    assert len(set(by)) == 1 and sorted(seen) == [0, 1, 2]


def test_a_call_comes_back_when_all_was_looked_at(make: Make) -> None:
    """Deadline or not: what was read and not yet checked is nothing to come back with."""
    crew, ended = make(2, 1), list[int]()

    def step(at: int, pages: Pages) -> Turn:
        def after(turn: Turn) -> None:
            time.sleep(0.2)
            ended.append(turn.done())

        return Turn(lambda: at, after)

    begun, why = crew.run(step, 30, Call(time.monotonic() + 0.1))
    assert why == Outcome.TIMEOUT and 0 < begun < 30
    count = len(ended)
    time.sleep(0.4)
    assert len(ended) == count > 0


@pytest.mark.parametrize("where", ["call", "after", "step"])
@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_what_any_part_raises_is_raised_and_the_threads_live(make: Make, where: str, kind: type[BaseException]) -> None:
    crew = make(1, 1)

    def fail(part: str, at: int) -> int:
        if part == where and at == 1:
            raise kind("a defect")
        return at

    def step(at: int, pages: Pages) -> Turn:
        fail("step", at)
        return Turn(lambda: fail("call", at), lambda turn: (turn.done(), fail("after", at))[0] and None)

    for _ in range(4):
        with pytest.raises(kind, match="a defect"):
            crew.run(step, 3, soon())
    where = "nowhere"
    assert crew.run(step, 3, soon()) == (3, Outcome.OK)


@pytest.mark.parametrize("begun_by", ["deadline", "cancelled"])
def test_what_is_prepared_when_the_disk_hangs_is_given_up(make: Make, begun_by: str) -> None:
    crew, gate, reached = make(1, 1), threading.Event(), threading.Event()
    refused: list[Outcome] = []

    def hang() -> int:
        reached.set()
        assert gate.wait(20)
        return 0

    def others(at: int, pages: Pages) -> Turn:
        def after(turn: Turn) -> None:
            try:
                turn.done()
            except RefusedError as error:
                refused.append(error.why)

        return Turn(lambda: 0, after)

    hung = threading.Thread(target=lambda: crew.run(lambda at, pages: Turn(hang, lambda turn: None), 1, soon()))
    hung.start()
    assert reached.wait(20)
    ends, late = time.monotonic() + 0.2, threading.Timer(8.0, gate.set)
    late.start()
    call = Call(ends) if begun_by == "deadline" else Call(ends + 20, lambda: time.monotonic() > ends)
    why = Outcome.TIMEOUT if begun_by == "deadline" else Outcome.CANCELLED
    assert crew.run(others, 3, call) == (1, why)
    assert not gate.is_set() and refused == [why]
    late.cancel()
    gate.set()
    hung.join(20)
    assert crew.run(others, 3, soon()) == (3, Outcome.OK) and len(refused) == 1


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_a_call_does_not_wait_for_a_disk_that_hangs_in_anothers(tmp_path: Path, name: str) -> None:
    blocks, system = Blocks(4), Failing()
    with opened(tmp_path, system=system, readers=1, writers=1) as tier:
        blocks.put(tier, [0, 1] if name == "preadv" else [])
        gate, found = Gate(name), list[Any]()
        system.rule = gate
        do = (lambda row, call: blocks.get(tier, row, call).outcomes) if name == "preadv" else (
            lambda row, call: blocks.put(tier, row, call))  # fmt: skip
        hung = threading.Thread(target=lambda: found.append(do([0], soon()).tolist()))
        hung.start()
        assert gate.reached.acquire(timeout=20)
        late = threading.Timer(8.0, gate.open.set)
        late.start()
        assert do([1], Call(time.monotonic() + 0.2)).tolist() == [Outcome.TIMEOUT]
        assert not gate.open.is_set(), "it came back with the other one"
        late.cancel()
        assert tier.contains(blocks.keys[:2], soon()).tolist() == [name == "preadv"] * 2
        gate.open.set()
        hung.join(20)
        assert found == [[Outcome.OK]]
        assert_whole(tier)
        assert do([1], soon()).tolist() == [Outcome.OK], "its place is free"
        assert tier.delete(blocks.keys[:2], soon()).tolist() == [Outcome.OK] * 2
        assert not any(tier._store.places._busy)


def test_what_is_prepared_after_its_call_was_given_up_is_not_done(make: Make) -> None:
    crew, became = make(1, 1), list[str]()
    call = Call(time.monotonic() + 0.2)

    def step(at: int, pages: Pages) -> Turn:
        time.sleep(0.6)

        def after(turn: Turn) -> None:
            with pytest.raises(RefusedError):
                turn.done()
            became.append("refused")

        return Turn(lambda: became.append("done") or 0, after)

    assert crew.run(step, 1, call) == (1, Outcome.TIMEOUT)
    assert became == ["refused"]


@pytest.mark.parametrize("late", [False, True])
def test_what_is_prepared_when_a_crew_is_closed_is_given_up(late: bool) -> None:
    """Before it is closed, or while it is: nobody is left who would take it back when the disk hangs in another's call."""
    crew, hang, began, prepares, prepared = Crew(1, 1, "test"), *(threading.Event() for _ in range(4))
    made: list[str] = []

    def hanging(at: int, pages: Pages) -> Turn:
        def call() -> int:
            began.set()
            hang.wait()
            return 0

        return Turn(call, lambda turn: None)

    def ready(at: int, pages: Pages) -> Turn:
        def after(turn: Turn) -> None:
            with pytest.raises(RefusedError):
                turn.done()

        prepares.set()
        assert not late or prepared.wait(10)
        return Turn(lambda: made.append("called") or 0, after)

    one = threading.Thread(target=crew.run, args=(hanging, 1, Call(time.monotonic() + 60)))
    other = threading.Thread(target=crew.run, args=(ready, 1, Call(time.monotonic() + 60)))
    one.start()
    assert began.wait(10)
    other.start()
    assert prepares.wait(10)
    if not late:
        assert until(lambda: crew._ready)
    closing = threading.Thread(target=crew.close, args=(0.1,))
    closing.start()
    assert until(lambda: crew._closed)
    prepared.set()
    other.join(10)
    assert not other.is_alive() and not made, "it waited for the disk, or something was begun"
    hang.set()
    one.join(10)
    closing.join(10)
    assert crew.close(5)


def test_a_turn_that_comes_up_just_as_its_call_is_given_up_is_not_had(make: Make) -> None:
    """Nobody has come to take it back yet."""
    crew, turns, refused = make(1, 1), list[Turn](), list[int]()

    def step(at: int, pages: Pages) -> Turn:
        def call() -> int:
            assert at == 0 and until(lambda: len(crew._ready) == 1)
            turns[0].batch.stopped = Outcome.CANCELLED
            return at

        def after(turn: Turn) -> None:
            try:
                turn.done()
            except RefusedError:
                refused.append(at)

        turns.append(Turn(call, after))
        return turns[-1]

    assert crew.run(step, 2, soon()) == (2, Outcome.CANCELLED)
    assert refused == [1]


@pytest.mark.parametrize(("turns", "spare"), [(1, 1), (1, 2), (2, 1)])
def test_steps_without_turns_do_not_keep_others_waiting(make: Make, turns: int, spare: int) -> None:
    """Many headers are erased, one after another, while somebody's records have been read and are to be checked."""
    crew, erased, prepared, checked = make(turns, spare), list[int](), list[int](), list[int]()

    def erase(at: int, pages: Pages) -> None:
        time.sleep(0.005)
        erased.append(at)

    def read(at: int, pages: Pages) -> Turn:
        def call() -> int:
            assert until(lambda: len(crew._ready) > 0 or len(prepared) == 10)
            return at

        prepared.append(at)
        return Turn(call, lambda turn: checked.append(turn.done()))

    erasing = threading.Thread(target=lambda: crew.run(erase, 400, soon()))
    erasing.start()
    assert until(lambda: erased)
    assert crew.run(read, 10, soon()) == (10, Outcome.OK)
    assert sorted(checked) == list(range(10)) and len(erased) < 200
    erasing.join(20)
    assert len(erased) == 400


def test_a_record_is_not_told_of_before_it_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a call that was interrupted back before nobody looks at its memory."""
    blocks, checking, go = Blocks(3), threading.Semaphore(0), threading.Event()
    told: list[Any] = []
    real, fetched = reading.digest_records, reading.Fetched

    def slowly(*what: Any) -> None:
        checking.release()
        assert go.wait(20)
        real(*what)

    def made(*parts: Any) -> Any:
        told.append(fetched(*parts))
        return told[-1]

    with opened(tmp_path, readers=1) as tier:
        blocks.put(tier)
        monkeypatch.setattr(reading, "digest_records", slowly)
        monkeypatch.setattr(reading, "Fetched", made)
        ended = threading.Event()
        thread = threading.Thread(target=lambda: (blocks.get(tier), ended.set()))
        thread.start()
        for _ in range(2):
            assert checking.acquire(timeout=20)
        assert (told[0].outcomes != Outcome.OK).all() and not told[0].sizes.any() and not ended.wait(0.1)
        assert tier._store.index.counts().pinned == 3
        go.set()
        thread.join(20)
        assert (told[0].outcomes == Outcome.OK).all()
        go.clear()
        threading.Timer(0.3, go.set).start()
        asked = iter([False] * 2 + [True])
        me = threading.get_ident()

        def cancelled() -> bool:
            if threading.get_ident() == me and next(asked):
                raise KeyboardInterrupt
            return False

        with pytest.raises(KeyboardInterrupt):
            blocks.get(tier, call=Call(time.monotonic() + 20, cancelled))
        assert go.is_set(), "it came back while a thread looked at its memory"
        assert_whole(tier)
        assert all(blocks.found(tier))


def test_only_who_has_a_turn_takes_a_cpu(make: Make) -> None:
    """While all turns are taken, a thread that is woken to look at something takes no CPU from who woke it."""
    crew, prepared = make(1, 1), set[int]()
    of_calls, of_afters = list[int](), list[int]()

    def step(at: int, pages: Pages) -> Turn:
        def call() -> int:
            of_calls.append(os.sched_getscheduler(0))
            assert until(lambda: len(of_afters) == at and crew._idle and (at == 3 or at + 1 in prepared))
            return at

        def after(turn: Turn) -> None:
            of_afters.append(os.sched_getscheduler(0))

        prepared.add(at)
        return Turn(call, after)

    assert crew.run(step, 4, soon()) == (4, Outcome.OK)
    assert of_calls == [os.SCHED_OTHER] * 4
    assert sorted(of_afters) == [os.SCHED_OTHER] + [os.SCHED_BATCH] * 3, "the last is for who had the last turn"
    assert until(lambda: crew._idle == 2)
    threads = [thread.native_id for thread in crew._threads]
    assert [os.sched_getscheduler(thread or 0) for thread in threads] == [os.SCHED_OTHER] * 2, "a new call is begun at once"


def test_a_policy_that_somebody_chose_is_left_alone(make: Make) -> None:
    seen: set[int] = set()

    def look(at: int, pages: Pages) -> Turn:
        def call() -> int:
            seen.add(os.sched_getscheduler(0))
            time.sleep(0.001)
            return 0

        return Turn(call, lambda turn: seen.add(os.sched_getscheduler(0)))

    def choose() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        crew = make(1, 1)
        for _ in range(2):
            crew.run(look, 50, soon())

    chooser = threading.Thread(target=choose)
    chooser.start()
    chooser.join(20)
    assert seen == {os.SCHED_BATCH}


def test_keys_that_differ_are_told_apart() -> None:
    """The order is that of keys; some differ only behind the first word."""
    rng = np.random.default_rng(4)
    for n in (0, 1, 2, 60):
        keys = rng.integers(0, 3, (n, 4)).astype(np.uint64)
        for some in (keys, keys[:, ::-1], rng.integers(0, 2**63, (n, 4)).astype(np.uint64)):
            rows = np.ascontiguousarray(some).view(np.uint8).reshape(n, 32)
            first, same = writing._distinct(rows)
            listed = [row.tobytes() for row in rows]
            different = list(dict.fromkeys(listed))
            assert first.tolist() == [listed.index(row) for row in different]
            assert same.tolist() == [different.index(row) for row in listed]


def test_who_waits_for_an_erasure_hears_of_its_end() -> None:
    places, key = Places(1), np.ones((1, 32), np.uint8)
    mark, began = marks_of(key)[0], threading.Event()
    places.begin(0, key[0], mark, 1, 1)
    places.end(0, whole=True)
    assert places.begin_erasing(0, frozenset({int(mark)}))
    waiting = threading.Thread(target=lambda: (places.begin(0, key[0], mark, 1, 2), began.set()))
    waiting.start()
    assert until(lambda: places._waiting) and not began.is_set()
    asked = time.monotonic()
    places.end(0, whole=True, erased=True)
    assert began.wait(10) and time.monotonic() - asked < 0.5, "it looked again of its own accord"
    waiting.join(10)
