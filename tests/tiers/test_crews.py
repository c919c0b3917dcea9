"""Threads that share the work of a call, and an interrupt at any line of it: who comes back has memory that nobody touches."""

from __future__ import annotations

import linecache
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from kvortex.tiers.base import Call
from kvortex.tiers.disk import crew as disk
from kvortex.tiers.remote import crew as remote
from tests.engine.test_interrupts import LIBRARY
from tests.engine.test_tier_interrupts import AnyPlace

pytestmark = pytest.mark.usefixtures("nothing_leaks")
Touch = Callable[[Call], None]


class Slowly(AnyPlace):
    """The interrupt comes when other threads have begun what there was to do."""

    def step(self, frame: FrameType, event: str, argument: Any) -> Any:
        try:
            return super().step(frame, event, argument)
        except KeyboardInterrupt:
            time.sleep(0.01)
            raise


def has_a_call(place: str) -> bool:
    """Python looks for signals where calls begin and end; a tracer is told of all lines."""
    name, _, line = place.rpartition(":")
    return "(" in linecache.getline(LIBRARY + name, int(line))


def of_remote(touch: Touch, call: Call) -> tuple[Callable[[], object], Callable[[], object]]:
    crew = remote.Crew("test", 3)
    return lambda: crew.run([touch] * 4, call), crew.close


def of_disk(touch: Touch, call: Call) -> tuple[Callable[[], object], Callable[[], object]]:
    crew = disk.Crew(1, 1, "kvortex-test")
    return lambda: crew.run(lambda at, pages: touch(call), 4, call), lambda: crew.close(10.0)


def of_turns(touch: Touch, call: Call) -> tuple[Callable[[], object], Callable[[], object]]:
    """A call is made in a turn on the disk, and then what came is looked at."""
    crew = disk.Crew(1, 1, "kvortex-test")

    def touch_too() -> int:
        touch(call)
        return 0

    return lambda: crew.run(lambda at, pages: disk.Turn(touch_too, lambda turn: touch(call)), 4, call), lambda: crew.close(10.0)


def of_turns_given_up(touch: Touch, call: Call) -> tuple[Callable[[], object], Callable[[], object]]:
    """At its deadline it has one call made, and the next one prepared."""
    crew = disk.Crew(1, 1, "kvortex-test")

    def touch_too() -> int:
        touch(call)
        return 0

    def run() -> None:
        crew.run(lambda at, pages: disk.Turn(touch_too, lambda turn: None), 4, Call(time.monotonic() + 0.01))

    return run, lambda: crew.close(10.0)


@pytest.mark.parametrize("crew", [of_remote, of_disk, of_turns, of_turns_given_up])
def test_an_interrupt_anywhere_leaves_nobody_at_work(crew: Callable[[Touch, Call], Any]) -> None:
    def interrupted(trap: AnyPlace) -> bool:
        back, late = threading.Event(), list[str]()

        def touch(call: Call) -> None:
            ends = time.monotonic() + 0.02
            while time.monotonic() < ends and not call.cancelled():
                time.sleep(0.001)
                if back.is_set():
                    late.append(trap.sprung)

        run, close = crew(touch, Call(time.monotonic() + 20))
        trap.run(run)
        back.set()
        close()
        assert not late
        return bool(trap.sprung)

    every = AnyPlace(None)
    assert not interrupted(every)
    mine = [place for place in every.seen if "crew.py" in place and has_a_call(place)]
    assert sum(interrupted(Slowly(place)) for place in mine) > 8
