"""Readers that take no lock: a batch is seen as it was at one moment, in the order of real time, and nobody starves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from kvortex.index import NEW, BlockIndex, _reads, load_compiled
from kvortex.index._hash import GROUP

Look = Callable[[BlockIndex, np.ndarray], np.ndarray]
BATCH = 3000


def random_keys(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


def validated(index: BlockIndex, keys: np.ndarray) -> np.ndarray:
    return index.lookup(keys)


def planted(index: BlockIndex, keys: np.ndarray) -> np.ndarray:
    """A reader who looks as the real one does and does not care whether a writer was at work."""
    found, scratch = np.empty(len(keys), np.bool_), np.empty((2, GROUP), np.int64)
    _reads._look(*index._view[1:], keys.view(np.int64), scratch[0], scratch[1], found)
    return found


def matched(index: BlockIndex, keys: np.ndarray, run_of: Callable[[np.ndarray], int] | None = None) -> np.ndarray:
    """Each half by a call of its own."""
    runs = [(run_of or index.match)(half) for half in (keys[:BATCH], keys[BATCH:])]
    return np.concatenate([np.arange(BATCH) < run for run in runs])


def planted_match(index: BlockIndex, keys: np.ndarray) -> np.ndarray:
    scratch = np.empty((2, GROUP), np.int64)
    return matched(index, keys, lambda half: _reads._run(*index._view[1:], half.view(np.int64), scratch[0], scratch[1]))


STATES = {"none-none", "all-none", "none-all"}


def torn(look: Look, looks: int) -> tuple[int, set[str]]:
    """What a reader saw of two batches that replace each other, each in one call: mixtures, and whole states.

    It looks so many times at least, and goes on until it has seen all states, for a minute at most.

    The pool has room for one batch. Reserving the other evicts all of the first at once; commit shows all of it, and
    drop hides it.
    """
    index, keys = BlockIndex(BATCH), random_keys(2 * BATCH)
    load_compiled()  # before the race
    look(index, keys)
    stop, failures = threading.Event(), []

    def write() -> None:
        try:
            turn = 0
            while not stop.is_set():
                half = keys[BATCH * (turn % 2) : BATCH * (turn % 2 + 1)]
                slots, status, _ = index.reserve(half)
                assert (status == NEW).all()
                index.commit(slots)
                if turn % 3 == 0:
                    index.drop(half)
                turn += 1
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    mixed, seen, ends = 0, set(), time.monotonic() + 60
    while (looks > 0 or seen < STATES) and time.monotonic() < ends and not failures:
        found = look(index, keys)
        looks -= 1
        state = "-".join({0: "none", BATCH: "all"}.get(int(half.sum()), "some") for half in (found[:BATCH], found[BATCH:]))
        if state in STATES:
            seen.add(state)
        elif "some" in state or look in (validated, planted):  # both halves, where one call saw both
            mixed += 1
    stop.set()
    writer.join(60)
    assert not failures and not writer.is_alive()
    index.check()
    return mixed, seen


def test_a_batch_is_seen_at_one_moment() -> None:
    assert torn(validated, 2000) == (0, STATES)
    assert torn(matched, 2000) == (0, STATES)


def test_a_reader_that_does_not_validate_is_caught() -> None:
    """Else the test above could not fail."""
    assert any(torn(planted, 500)[0] for _ in range(20))
    assert any(torn(planted_match, 500)[0] for _ in range(20))


def test_readers_see_commits_in_the_order_of_real_time() -> None:
    """One key after another becomes resident. No reader may see fewer than any reader saw before its call began, fewer
    than were there then, or more than had been begun when its call ended."""
    count, threads = 4000, 4
    index, keys = BlockIndex(count + 64), random_keys(count)
    noise = random_keys(64, seed=1)
    load_compiled()
    begun, done, seen, failures = [0], [0], [0] * threads, []

    def read(me: int) -> None:
        while done[0] < count:
            least = max(done[0], *seen)
            run = index.match(keys) if me % 2 else int(index.lookup(keys).sum())
            if not least <= run <= begun[0]:
                failures.append((least, run, begun[0]))
                return
            seen[me] = run

    readers = [threading.Thread(target=read, args=(me,)) for me in range(threads)]
    for reader in readers:
        reader.start()
    for at in range(count):
        begun[0] = at + 1
        index.commit(index.reserve(keys[at : at + 1]).slots)
        done[0] = at + 1
        if at % 16 == 0:
            index.abort(index.reserve(noise).slots)  # keys move between buckets
    for reader in readers:
        reader.join(60)
    assert not failures and max(seen) > 0 and index.match(keys) == count


@pytest.mark.parametrize("method", ["lookup", "match"])
def test_who_looks_waits_for_no_lock_but_for_a_writer_at_work(method: str) -> None:
    index, keys = BlockIndex(4), random_keys(2)
    index.commit(index.reserve(keys).slots)
    results: list[object] = []

    def look() -> threading.Thread:
        thread = threading.Thread(target=lambda: results.append(getattr(index, method)(keys)), daemon=True)
        thread.start()
        return thread

    sequence = index._table.sequence
    with index._lock:
        look().join(60)
        assert len(results) == 1, "the lock is held, and nothing is written"
        sequence[0] += 1
        waiting = look()
        waiting.join(0.05)
        assert waiting.is_alive() and len(results) == 1
        sequence[0] += 1
    waiting.join(60)
    assert len(results) == 2 and np.all(results[0] == np.asarray(results[1])) and np.all(results[0])


def test_no_reader_starves_beside_writers_that_never_pause() -> None:
    index, keys, stop = BlockIndex(BATCH), random_keys(2 * BATCH), threading.Event()
    load_compiled()

    def write(half: np.ndarray) -> None:
        while not stop.is_set():
            slots, status, _ = index.reserve(half)
            index.abort(slots[status == NEW])

    writers = [threading.Thread(target=write, args=(keys[:BATCH],))]
    for writer in writers:
        writer.start()
    longest = 0.0
    for _ in range(100):
        began = time.monotonic()
        index.lookup(keys)
        longest = max(longest, time.monotonic() - began)
    stop.set()
    for writer in writers:
        writer.join(60)
    assert longest < 5


@pytest.mark.parametrize("call", ["reserve", "commit", "abort", "acquire", "release", "drop", "grow"])
@pytest.mark.parametrize("well", [True, False])
def test_every_writer_leaves_the_number_even(call: str, well: bool) -> None:
    """Also one that is refused; and the number has moved where something that readers look at has."""
    index, keys = BlockIndex(4, ready=3), random_keys(8)
    slots = index.reserve(keys[:2]).slots
    index.commit(slots[:1])
    held = index.acquire(keys[:1])
    before = int(index._table.sequence[0])
    good = {
        "reserve": keys[2:3], "commit": slots[1:], "abort": slots[1:], "acquire": keys[:1], "release": held,
        "drop": keys[:1], "grow": 4,
    }  # fmt: skip
    bad = {"reserve": keys, "commit": slots, "abort": slots, "acquire": keys[4:], "release": slots, "drop": keys[4:], "grow": 1}
    try:
        getattr(index, call)((good if well else bad)[call])
        refused = False
    except Exception:
        refused = True
    after = int(index._table.sequence[0])
    assert after % 2 == 0 and refused == (not well and call in ("reserve", "commit", "abort", "release"))
    assert (after > before) == (call == "drop" or (well and call in ("reserve", "commit", "abort")))
    index.check()
