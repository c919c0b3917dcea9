"""A tier below vLLM's pool: what was stored comes back or is a miss, and nobody waits for a tier that fails or hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.errors import ConfigError, TransferTimeoutError
from kvortex.integrations.vllm import below
from kvortex.integrations.vllm.below import Chunks, Job, TierSide
from kvortex.integrations.vllm.questions import Questions
from kvortex.keys import Namespace
from kvortex.tiers.memory import MemoryStore, MemoryTier
from kvortex.tiers.options import TierOptions
from kvortex.tiers.record import RecordFormat
from kvortex.tiers.urls import OpenTier, open_tier

CHUNKS, NBYTES = 16, 8192
SPACE = Namespace(model="m", block_size=4)
FORM = RecordFormat(SPACE.seed, NBYTES)


def names(*numbers: int) -> list[bytes]:
    return [number.to_bytes(36, "big") for number in numbers]


def until(true: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (found := true()):
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    return found


class Pool:
    """vLLM's pool, and what its scheduler would do."""

    def __init__(self, opened: OpenTier, share: float = 0.5) -> None:
        self._memory = np.empty(CHUNKS * NBYTES + 4096, np.uint8)
        shift = -self._memory.ctypes.data % 4096
        self.bytes = self._memory[shift : shift + CHUNKS * NBYTES].reshape(CHUNKS, NBYTES)
        self.bytes[:] = np.random.default_rng(3).integers(0, 256, self.bytes.shape, np.uint8)
        self.side = TierSide(opened, SPACE, Chunks(int(self.bytes.ctypes.data), CHUNKS, NBYTES), share)
        self._jobs = 0

    def begin(self, loads: bool, these: list[bytes], chunks: list[int]) -> int:
        self._jobs += 1
        (self.side.load if loads else self.side.store)(Job(self._jobs, loads, these, np.array(chunks)))
        return self._jobs

    def move(self, loads: bool, these: list[bytes], chunks: list[int]) -> list[bool]:
        number = self.begin(loads, these, chunks)
        (job,) = until(self.side.finished)
        assert job.number == number
        return [bool(good) for good in job.good]

    def store(self, these: list[bytes], chunks: list[int]) -> list[bool]:
        return self.move(False, these, chunks)

    def load(self, these: list[bytes], chunks: list[int]) -> list[bool]:
        return self.move(True, these, chunks)

    def look(self, these: list[bytes], request: str = "r") -> list[str]:
        """Answers, in as many steps as they take."""

        def all_of_them() -> list[str] | None:
            found = [self.side.lookup(name, request) for name in these]
            self.side.step()
            return None if "retry" in found else found

        return list(until(all_of_them))


def memory(store: MemoryStore | None = None, **options: Any) -> OpenTier:
    return OpenTier(MemoryTier(MemoryStore() if store is None else store, FORM), TierOptions(**options))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def pool(store: MemoryStore) -> Iterator[Pool]:
    made = Pool(memory(store))
    yield made
    made.side.close()
    made.side.close()


def test_what_was_stored_comes_back_in_another_process_and_to_another_place(tmp_path: Path) -> None:
    url = f"disk:{tmp_path}?capacity=1MiB"
    pool = Pool(open_tier(url, FORM))
    assert pool.look(names(1, 2)) == ["miss", "miss"]
    assert pool.store(names(1, 2, 3), [0, 1, 2]) == [True] * 3
    want = pool.bytes.copy()
    pool.side.close()
    again = Pool(open_tier(url, FORM))
    again.bytes[:] = 0
    assert again.look(names(1, 2, 3, 4)) == ["hit", "hit", "hit", "miss"]
    assert again.load(names(3, 1), [9, 8]) == [True, True]
    expected = np.zeros_like(want)
    expected[9], expected[8] = want[2], want[0]
    assert (again.bytes == expected).all()
    stats = again.side.stats()
    assert (stats.tier, stats.promoted_blocks, stats.queue_blocks) == ("disk", 2, 0)
    again.side.close()


def test_first_a_question_is_asked_and_all_of_a_step_together(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.store(names(1), [0])
    asked: list[int] = []
    contains = pool.side._line.tier.contains
    monkeypatch.setattr(pool.side._line.tier, "contains", lambda keys, call: (asked.append(len(keys)), contains(keys, call))[1])
    assert [pool.side.lookup(name, "r") for name in names(1, 2, 3)] == ["retry"] * 3
    assert pool.look(names(1, 2, 3)) == ["hit", "miss", "miss"]
    assert asked == [2]  # the first was seen there when it was stored
    pool.side.forget("r")
    assert not len(pool.side._questions)


def test_a_damaged_record_fails_its_chunk_and_is_not_promised_again(pool: Pool, store: MemoryStore) -> None:
    pool.store(names(1, 2, 3), [0, 1, 2])
    assert pool.look(names(1, 2, 3)) == ["hit"] * 3
    name = [*store.objects][1]
    store.objects[name] = store.objects[name][:-1] + bytes([store.objects[name][-1] ^ 1])
    assert pool.load(names(1, 2, 3), [8, 9, 10]) == [True, False, True]
    assert (pool.bytes[8] == pool.bytes[0]).all() and (pool.bytes[10] == pool.bytes[2]).all()
    assert pool.look(names(1, 2, 3)) == ["hit", "miss", "hit"]
    assert pool.side.stats().corrupt == 1
    pool.store(names(2), [1])
    assert pool.look(names(2)) == ["hit"] and pool.load(names(2), [9]) == [True]
    assert (pool.bytes[9] == pool.bytes[1]).all()


def test_a_record_that_cannot_be_read_is_a_miss_to_its_request_though_the_tier_has_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.store(names(1), [0])
    assert pool.look(names(1)) == ["hit"]
    with monkeypatch.context() as broken:
        broken.setattr(pool.side._line.tier, "get_into", lambda *a: (_ for _ in ()).throw(OSError("planted")))
        assert pool.load(names(1), [5]) == [False]
    assert pool.look(names(1)) == ["miss"]  # or it would be promised and promoted for ever
    assert pool.look(names(1), "another") == ["miss"]
    for request in ("r", "another"):
        pool.side.forget(request)
    assert pool.look(names(1), "later") == ["hit"]


def test_other_engines_and_models_find_nothing(store: MemoryStore, pool: Pool) -> None:
    pool.store(names(1), [0])
    other = Namespace(model="other", block_size=4)
    tier = MemoryTier(store, RecordFormat(other.seed, NBYTES))
    side = TierSide(OpenTier(tier, TierOptions()), other, pool.side._chunks, 0.5)
    side.lookup(names(1)[0], "r")
    side.step()
    assert until(lambda: (found := side.lookup(names(1)[0], "r")) != "retry" and found) == "miss"
    side.close()


class Hanging(MemoryTier):
    """Whatever is asked of it waits."""

    def __init__(self) -> None:
        super().__init__(MemoryStore(), FORM)
        self.go = threading.Event()

    def contains(self, keys: Any, call: Any) -> Any:
        self.go.wait(60)
        return super().contains(keys, call)

    def get_into(self, keys: Any, addresses: Any, room: Any, call: Any) -> Any:
        self.go.wait(60)
        return super().get_into(keys, addresses, room, call)

    def put_from(self, keys: Any, addresses: Any, sizes: Any, digests: Any, call: Any) -> Any:
        self.go.wait(60)
        return super().put_from(keys, addresses, sizes, digests, call)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    made = Hanging()
    yield made
    made.go.set()


def test_a_tier_that_hangs_keeps_its_own_threads_and_nobody_else(hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(OpenTier(hanging, TierOptions(read_threads=1, read_timeout_s=0.05, write_timeout_s=0.05)))
    assert pool.look(names(1)) == ["miss"]  # when its question was not answered in time
    first = pool.begin(True, names(2), [0])  # the only reading thread hangs in the question
    (job,) = until(pool.side.finished)
    assert (job.number, job.good.tolist()) == (first, [False])
    stored = pool.begin(False, names(3), [1])
    until(lambda: not pool.side._waiting)
    monkeypatch.setattr(below, "_DRAIN_S", 0.02)
    monkeypatch.setattr(below, "_FLUSH_S", 0.02)
    with pytest.raises(TransferTimeoutError, match=f"jobs {stored} of tier memory have not ended"):
        pool.side.drain()
    until(lambda: pool.side.finished() or not pool.side._line.breaker.closed)  # overdue: nobody asks it any more
    assert pool.side.lookup(names(4)[0], "r") == "miss"
    assert pool.store(names(5), [2]) == [False] and pool.side.stats().dropped == {"breaker": 1}
    with pytest.raises(TransferTimeoutError, match="vLLM's pool must stay"):
        pool.side.close()
    hanging.go.set()
    until(lambda: not any(thread.is_alive() for thread in pool.side._line.threads))
    pool.side.close()


def test_a_slow_tier_keeps_a_share_of_the_pool_pinned_and_no_more(hanging: Hanging) -> None:
    pool = Pool(OpenTier(hanging, TierOptions(write_timeout_s=30)), share=0.25)
    large = pool.begin(False, names(*range(6)), list(range(6)))  # alone even more than the share
    rest = pool.begin(False, names(7), [7])
    (job,) = until(pool.side.finished)
    assert job.number == rest and pool.side.stats().dropped == {"queue_full": 1}
    hanging.go.set()
    (job,) = until(pool.side.finished)
    assert job.number == large and job.good.all()
    assert pool.store(names(7), [7]) == [True]
    pool.side.close()


def test_chunks_that_wait_behind_a_call_that_hangs_are_given_back_when_that_is_noticed(hanging: Hanging) -> None:
    """vLLM keeps them pinned: only the chunk that may still be read cannot be spared."""
    pool = Pool(OpenTier(hanging, TierOptions(read_timeout_s=0.05, write_timeout_s=0.05)))
    hung = pool.begin(False, names(1), [1])
    until(lambda: not pool.side._waiting)
    behind = [pool.begin(False, names(at), [at]) for at in (2, 3)]
    ended: list[Job] = []
    until(lambda: ended.extend(pool.side.finished()) or len(ended) == 2)
    assert [job.number for job in ended] == behind and not any(job.good.any() for job in ended)
    stats = pool.side.stats()
    assert (stats.breaker, stats.queue_blocks, stats.dropped) == ("open", 1, {"breaker": 2})
    hanging.go.set()
    (job,) = until(pool.side.finished)
    assert job.number == hung and pool.side.stats().queue_blocks == 0
    pool.side.close()


@pytest.mark.parametrize("end", ["close", "drain"])
def test_what_waits_is_stored_in_the_end(pool: Pool, store: MemoryStore, end: str) -> None:
    for at in range(8):
        pool.begin(False, names(at), [at])
    getattr(pool.side, end)()
    assert len(store.objects) == 8 and len(pool.side.finished()) == 8 and pool.side.stats().queue_blocks == 0


def test_what_has_not_begun_in_the_end_is_given_up(hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(OpenTier(hanging, TierOptions(write_timeout_s=30)))
    for at in range(4):
        pool.begin(False, names(at), [at])
    until(lambda: len(pool.side._waiting) == 3)
    monkeypatch.setattr(below, "_FLUSH_S", 0.02)
    threading.Timer(0.1, hanging.go.set).start()
    pool.side.drain()
    ended = pool.side.finished()
    assert len(ended) == 4 and sum(job.good.all() for job in ended) == 1 and pool.side.stats().queue_blocks == 0
    pool.side.close()


@pytest.mark.parametrize("loads", [False, True])
def test_a_drain_ends_a_job_of_many_calls_behind_the_one_that_runs(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, loads: bool
) -> None:
    """A tier that is slow but works would otherwise keep vLLM until the time is up, and end it."""
    monkeypatch.setattr(below, "_FLUSH_S", 0.02)
    pool = Pool(memory(store, batch_blocks=1))
    if loads:
        pool.store(names(1, 2, 3), [1, 2, 3])
    tier, name, calls, drains = pool.side._line.tier, "get_into" if loads else "put_from", [], threading.Event()
    whole = getattr(tier, name)

    def slow(*given: Any) -> Any:
        calls.append(given)
        drains.wait(30)
        return whole(*given)

    monkeypatch.setattr(tier, name, slow)
    flush = pool.side._flush
    monkeypatch.setattr(pool.side, "_flush", lambda: (flush(), threading.Timer(0.2, drains.set).start()))
    pool.begin(loads, names(1, 2, 3), [4, 5, 6])
    until(lambda: calls)
    pool.side.drain()
    (job,) = pool.side.finished()
    assert job.good.tolist() == [True, False, False] and len(calls) == 1
    assert pool.move(loads, names(1, 2, 3), [4, 5, 6]) == [True] * 3  # later ones go on
    pool.side.close()


def test_a_side_whose_threads_cannot_all_be_started_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def few(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", few)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Pool(memory())
    assert len(started) == 2
    until(lambda: not any(thread.is_alive() for thread in started))


@pytest.mark.parametrize("chunk", [CHUNKS, -1])
def test_a_chunk_that_the_pool_does_not_have_fails_its_job(pool: Pool, store: MemoryStore, chunk: int) -> None:
    assert pool.store(names(1, 2), [0, chunk]) == [False, False] and not store.objects
    pool.store(names(1), [0])
    before = pool.bytes.copy()
    assert pool.load(names(1), [chunk]) == [False] and (pool.bytes == before).all()
    assert pool.side.stats().errors == {"no such chunk": 2}


def test_options_of_a_tier_are_kept(store: MemoryStore) -> None:
    pool = Pool(memory(store, mode="read"))
    assert pool.store(names(1), [0]) == [False] and not store.objects and pool.side.stats().dropped == {}
    pool.side.close()
    pool = Pool(memory(store, admit_after=2))
    assert pool.store(names(1), [0]) == [False] and pool.side.stats().dropped == {"admission": 1}
    assert pool.store(names(1), [0]) == [True]
    pool.side.close()
    pool = Pool(memory(store, most_bytes=NBYTES - 1))
    assert pool.store(names(2), [0]) == [False] and pool.side.stats().dropped == {"size": 1}
    pool.side.close()
    with pytest.raises(ConfigError, match="mode = 'back'"):
        Pool(memory(store, mode="back"))
    with pytest.raises(ConfigError, match="tiers need multiples of 4096"):
        Chunks(4096, 1, 5000)


def test_answers_last_as_long_as_their_requests_and_questions_are_asked_once() -> None:
    now = [0.0]
    questions = Questions(5.0, lambda: now[0])
    assert questions.ask(b"a", "r") is None and questions.ask(b"a", "s") is None and questions.ask(b"b", "r") is None
    assert questions.take() == [b"a", b"b"] and questions.take() == []
    questions.learn({b"a": True, b"unknown": True})
    questions.learn({b"a": False})  # late, of an older question
    assert questions.ask(b"a", "r") is True
    now[0] = 6.0
    assert questions.ask(b"b", "r") is False
    questions.correct([b"a", b"unknown"], False)
    assert questions.ask(b"a", "s") is False
    questions.forget("r")
    questions.forget("nobody")
    assert len(questions) == 1 and questions.ask(b"a", "s") is False
    questions.forget("s")
    questions.ask(b"c", "t")
    questions.forget("t")
    assert len(questions) == 0 and questions.take() == []
