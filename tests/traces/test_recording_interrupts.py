"""Interrupts and finalisers at any line of a call that is being recorded."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from kvortex.devices import HostDevice
from tests.engine.test_interrupts import Trap, anywhere
from tests.pages import PagedCache, keys_of
from tests.traces.test_recording import ids_of

CALLS: dict[str, Callable[[Any, Any, Path], Any]] = {
    "check": lambda engine, _, folder: engine.check_blocks(keys_of(5, 6)),
    "save": lambda engine, _, folder: engine.save_blocks(keys_of(5, 6), [5, 6]).wait(),
    "load": lambda engine, _, folder: engine.load_blocks(keys_of(5, 6), [5, 6]).wait(),
    "record": lambda engine, _, folder: engine.record(folder / "other"),
    "close": lambda engine, recording, folder: recording.close(),
}


class Entered(Trap):
    """Makes another call in the middle of one, as a finaliser may, instead of raising."""

    def __init__(self, line: int, engine: Any) -> None:
        super().__init__(line)
        self.engine, self.made = engine, 0

    def step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not self.made:
            self.left -= 1
            if self.left == 0:
                self.made = 1
                sys.settrace(None)
                self.engine.check_blocks(keys_of(90, 91))
                sys.settrace(self.enter)
        return self.step


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_line(name: str, tmp_path: Path) -> None:
    cache, folders = PagedCache.plain(HostDevice()), itertools.count()

    def interrupted(trap: Trap) -> bool:
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        with cache.engine() as engine:
            recording = engine.record(folder / "t")
            engine.check_blocks(keys_of(1, 2))
            trap.run(lambda: CALLS[name](engine, recording, folder))
            engine.check_blocks(keys_of(3))
            recording.close()
        thread = recording._writer._thread
        assert not thread.is_alive(), trap.sprung
        lines = ids_of(folder / "t")
        if name in ("check", "save", "load"):
            assert [len(ids) for ids in lines] in ([2, 1], [2, 2, 1]), trap.sprung
        else:
            assert lines[0] == [0, 1], trap.sprung
        assert trap.sprung or name == "close" or len(lines) == (2 if name == "record" else 3)
        return bool(trap.sprung)

    anywhere(interrupted)


@pytest.mark.parametrize("name", ["check", "save", "load"])
def test_another_call_in_the_middle_of_one(name: str, tmp_path: Path) -> None:
    cache, line = PagedCache.plain(HostDevice()), 1
    while True:
        path = tmp_path / str(line)
        with cache.engine() as engine:
            recording = engine.record(path)
            trap = Entered(line, engine)
            trap.run(lambda: CALLS[name](engine, recording, tmp_path))  # noqa: B023
            recording.close()
        lines = ids_of(path)
        assert sorted(map(len, lines)) == [2] * (1 + trap.made) and len(set(sum(lines, []))) == 2 + 2 * trap.made
        if not trap.made:
            break
        line += 1
    assert line > 10
