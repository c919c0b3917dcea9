"""Groups of a layer-wise save start once, when their layers were announced, or never, whoever is interrupted meanwhile."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvortex.errors import ArgumentError, DeviceError, LayersMissingError, TransferError, TransferTimeoutError
from kvortex.transfer.executor import Part
from kvortex.transfer.layerwise import LayerSave

GROUP_OF = [0, 0, 1, 2, 2, 2]


class Call:
    over = False


class FakePart(Part):
    """Counts what is asked of it, and ends when it is told to."""

    route = "fake"

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.ends, self.cancelled, self.failure = True, False, None
        self.waiters: list[Any] = []

    def follow(self, stream: Any) -> None:
        if stream == "bad":
            raise DeviceError("planted")
        self.log.append(stream)

    def start(self) -> None:
        assert not self.cancelled, "started after nobody should have"
        self.log.append("start")
        if self.failure is KeyboardInterrupt:
            raise KeyboardInterrupt
        self.started = True

    def cancel(self) -> None:
        self.cancelled = True
        self.error, self.started = self.error or TransferError("cancelled"), True

    def query(self) -> bool:
        assert self.started, "asked before it was started"
        if isinstance(self.failure, TransferError):
            self.error = self.failure
        self.seconds = 0.25
        return self.ends or self.cancelled

    def add_to(self, stream: Any, timeout: float, layer: int | None = None) -> None:
        self.waiters.append(stream)


def save_of() -> tuple[LayerSave, list[FakePart]]:
    parts = [FakePart() for _ in range(3)]
    save = LayerSave(parts, np.array(GROUP_OF))
    save.start()
    return save, parts


def started(parts: list[FakePart]) -> list[int]:
    return [part.log.count("start") for part in parts]


def announce(save: LayerSave, layer: int, stream: Any = "s") -> None:
    """In a call of its own, which is over then."""
    call = Call()
    try:
        save.announce(layer, stream, call)
    finally:
        call.over = True


@pytest.mark.parametrize("seed", range(10))
def test_a_group_starts_with_its_last_layer_behind_every_stream(seed: int) -> None:
    save, parts = save_of()
    order = random.Random(seed).sample(range(6), 6)
    for at, layer in enumerate(order):
        assert not save.query() and sorted(save.missing()) == sorted(order[at:])
        announce(save, layer, f"stream of {layer}")
        assert started(parts) == [all(m in order[: at + 1] for m in range(6) if GROUP_OF[m] == group) for group in range(3)]
    for group, part in enumerate(parts):
        mine = [f"stream of {layer}" for layer in order if GROUP_OF[layer] == group]
        assert part.log == [*mine, "start"]
    assert save.missing() == () and save.query() and save.error is None and save.seconds == 0.75 and save.route == "fake"
    assert not save.abort(TransferError("too late")) and save.query() and save.error is None


def test_it_ends_with_its_last_group() -> None:
    save, parts = save_of()
    parts[1].ends = False
    for layer in range(6):
        announce(save, layer)
    assert not save.query()
    parts[1].ends = True
    assert save.query()


def test_a_second_announcement_is_refused() -> None:
    save, parts = save_of()
    announce(save, 0)
    announce(save, 2)
    for layer in (0, 2):
        with pytest.raises(ArgumentError, match=f"layer {layer} was announced already"):
            announce(save, layer)
    assert started(parts) == [0, 1, 0] and save.missing() == (1, 3, 4, 5)


def test_a_stream_that_cannot_be_waited_for_announces_nothing() -> None:
    save, parts = save_of()
    with pytest.raises(DeviceError):
        announce(save, 2, "bad")
    assert 2 in save.missing() and started(parts) == [0, 0, 0]
    announce(save, 2)
    assert started(parts) == [0, 1, 0]


def test_abort_waits_for_what_was_started_and_starts_nothing_more() -> None:
    save, parts = save_of()
    parts[1].ends = False
    announce(save, 2)
    announce(save, 0)
    error = TransferError("given up")
    assert save.abort(error) and not save.abort(TransferError("again"))
    assert save.missing() == () and not save.query(), "what was started still reads pages and writes slots"
    assert [part.cancelled for part in parts] == [True, False, True]
    announce(save, 1)
    announce(save, 3)
    assert started(parts) == [0, 1, 0]
    parts[1].ends = True
    assert save.query() and save.error is error


def test_a_group_that_fails_gives_the_rest_up() -> None:
    save, parts = save_of()
    parts[0].failure = TransferError("the GPU fell over")
    announce(save, 0)
    announce(save, 1)
    assert save.missing() == (2, 3, 4, 5), "nobody has looked yet"
    assert save.query() and save.error is parts[0].failure and save.missing() == ()
    announce(save, 2)
    assert started(parts) == [1, 0, 0]


def test_a_start_that_was_interrupted_fails_the_save() -> None:
    save, parts = save_of()
    parts[1].failure, parts[0].ends = KeyboardInterrupt, False
    announce(save, 0)
    announce(save, 1)
    call = Call()
    with pytest.raises(KeyboardInterrupt):
        save.announce(2, "s", call)
    assert not save.query() and not parts[1].cancelled, "the call is not over: it may be about to go on"
    call.over = True
    assert not save.query() and [part.cancelled for part in parts] == [False, True, True]
    parts[0].ends = True
    assert save.query() and str(save.error) == "cancelled"


@pytest.mark.parametrize("how", ["over", "lost"])
def test_a_start_that_never_came_is_noticed(how: str) -> None:
    """An interrupt between the announcement of the last layer and the start; and perhaps the call's frame is gone."""
    save, parts = save_of()

    class Interrupting(dict):  # type: ignore[type-arg]
        def setdefault(self, *arguments: Any) -> Any:
            raise KeyboardInterrupt

    starters, save._starters = save._starters, Interrupting()
    call = Call()
    with pytest.raises(KeyboardInterrupt):
        save.announce(2, "s", call)
    save._starters = starters
    assert save.missing() == (0, 1, 3, 4, 5) and not save.query() and not parts[1].cancelled
    if how == "over":
        call.over = True
    del call
    gc.collect()  # the exception's traceback
    assert save.query() and parts[1].cancelled and started(parts) == [0, 0, 0] and str(save.error) == "cancelled"


def test_a_call_that_is_over_just_now_has_started_its_group() -> None:
    """Asked for in this order: is the call over, was the group started."""
    save, parts = save_of()
    call = Call()
    save.announce(2, "s", call)
    parts[1].started = False

    class Late:
        @property
        def over(self) -> bool:
            parts[1].started = True
            return True

    late = Late()
    save._starters[1] = weakref.ref(late)
    assert not save.query() and not parts[1].cancelled


def test_before_it_was_started_it_can_be_cancelled() -> None:
    parts = [FakePart() for _ in range(3)]
    save = LayerSave(parts, np.array(GROUP_OF))
    save.cancel()
    assert save.started and save.query() and "interrupted" in str(save.error) and all(part.cancelled for part in parts)


def test_streams_wait_for_groups() -> None:
    save, parts = save_of()
    for layer in (None, 0, 5):
        with pytest.raises(LayersMissingError) as caught:
            save.add_to("s", 1.0, layer)
        assert caught.value.layers == tuple(at for at in range(6) if layer is None or GROUP_OF[at] == GROUP_OF[layer])
        assert str(list(caught.value.layers)) in str(caught.value)
    announce(save, 2)
    save.add_to("s", 1.0, 2)
    assert [part.waiters for part in parts] == [[], ["s"], []]
    for layer in (0, 1, 3, 4, 5):
        announce(save, layer)
    save.add_to("t", 1.0)
    assert [part.waiters for part in parts] == [["t"], ["s", "t"], ["t"]]


def test_a_stream_waits_until_another_thread_has_started_a_group() -> None:
    save, parts = save_of()
    held = threading.Event()
    start = parts[1].start
    parts[1].start = lambda: (held.wait(10), start())  # type: ignore[method-assign, assignment, func-returns-value]
    thread = threading.Thread(target=announce, args=(save, 2))
    thread.start()
    while save.missing() != (0, 1, 3, 4, 5):
        pass
    with pytest.raises(TransferTimeoutError, match="0.02 s"):
        save.add_to("s", 0.02, 2)
    held.set()
    save.add_to("s", 10.0, 2)
    thread.join()
    assert parts[1].waiters == ["s"]


def test_nothing_is_asked_of_the_stream_of_a_layer_once_the_save_has_failed() -> None:
    save, parts = save_of()
    save.abort(TransferError("given up"))
    for layer in range(6):
        announce(save, layer, "bad" if layer % 2 else "s")
    assert [part.log for part in parts] == [[], [], []] and not save._announced


class Meddling(dict):  # type: ignore[type-arg]
    """Lets others in right behind the n-th ``setdefault``, or in front of it."""

    def __init__(self, number: int, others: Callable[[], object], *, front: bool) -> None:
        self._left, self._others, self._front = number, others, front

    def setdefault(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._front and self._left == 0:
            self._others()
        found = super().setdefault(*arguments)
        if not self._front and self._left == 0:
            self._others()
        return found


def test_two_who_both_see_a_whole_group_start_it_once() -> None:
    save, parts = save_of()
    save._announced = Meddling(1, lambda: announce(save, 1), front=False)
    announce(save, 0)
    assert started(parts) == [1, 0, 0]


def test_a_layer_that_two_announce_at_once_counts_for_one() -> None:
    """The other hears of it, and its stream is waited for too: nobody can say who came first."""
    save, parts = save_of()
    save._announced = Meddling(1, lambda: announce(save, 2, "first"), front=True)
    with pytest.raises(ArgumentError, match="layer 2 was announced already"):
        announce(save, 2, "second")
    assert parts[1].log == ["second", "first", "start"]


@pytest.mark.parametrize("abort", [False, True])
def test_threads_that_announce_together_start_each_group_once(abort: bool) -> None:
    """And each layer counts for one of those who announce it."""
    rng = random.Random(3)
    for _ in range(200):
        save, parts = save_of()
        barrier, refused = threading.Barrier(4 + abort), [0] * 4

        def work(me: int, layers: list[int]) -> None:
            barrier.wait()  # noqa: B023
            for layer in layers:
                try:
                    announce(save, layer, me)  # noqa: B023
                except ArgumentError:
                    refused[me] += 1  # noqa: B023

        def end() -> None:
            barrier.wait()  # noqa: B023
            save.abort(TransferError("given up"))  # noqa: B023
            while not save.query():  # noqa: B023
                pass

        threads = [threading.Thread(target=work, args=(me, rng.sample(range(6), 6))) for me in range(4)]
        threads += [threading.Thread(target=end)] * abort
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert save.query() and max(started(parts)) <= 1
        if abort:
            assert str(save.error) == "given up" or (save.error is None and started(parts) == [1, 1, 1])
        else:
            assert save.error is None and started(parts) == [1, 1, 1] and sum(refused) == 18
