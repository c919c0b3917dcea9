"""Questions to the driver: asked in the right context and mode, and both are as before afterwards."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from kvortex.devices import driver as cu
from kvortex.devices.asking import ask, ask_streams

OURS, THEIRS, RELAXED, GLOBAL = 0xC0FFEE, 0xBEEF, 2, 0


class Driver:
    """Functions by address, and the calling thread's context and capture mode."""

    def __init__(self, context: int) -> None:
        self.context, self.mode, self.fails = context, GLOBAL, dict[str, int]()
        self.asked: list[tuple[Any, ...]] = []
        self.exchanged = 0
        names = {cu.CTX_GET: self.get, cu.CTX_SET: self.set, cu.CAPTURE_MODE: self.exchange}
        names |= {cu.EVENT_QUERY: self.query, cu.STREAM_QUERY: self.query}
        form = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_longlong] * 3)
        self._kept = {at: form(function) for at, function in names.items()}
        self.functions = np.zeros(max(names) + 1, np.int64)
        for at, function in self._kept.items():
            self.functions[at] = ctypes.cast(function, ctypes.c_void_p).value

    def get(self, address: int, *_: int) -> int:
        ctypes.c_longlong.from_address(address).value = self.context
        return self.fails.get("get", 0)

    def set(self, context: int, *_: int) -> int:
        if "set" not in self.fails:
            self.context = context
        return self.fails.get("set", 0)

    def exchange(self, address: int, *_: int) -> int:
        cell = ctypes.c_int.from_address(address)
        self.exchanged += 1
        if "exchange" not in self.fails:
            cell.value, self.mode = self.mode, cell.value
        return self.fails.get("exchange", 0)

    def query(self, *arguments: int) -> int:
        self.asked.append((self.context, self.mode, arguments))
        return self.fails.get("query", 0)


@pytest.mark.parametrize("code", [0, 600, 700])
@pytest.mark.parametrize("context", [OURS, THEIRS, 0])
def test_everything_is_put_back(context: int, code: int) -> None:
    driver = Driver(context)
    driver.fails = {"query": code}
    assert ask(driver.functions, OURS, cu.EVENT_QUERY, 7, 8, 9) == code
    assert driver.asked == [(OURS, RELAXED, (7, 8, 9))]
    assert (driver.context, driver.mode) == (context, GLOBAL)


@pytest.mark.parametrize(("what", "asks"), [("get", 0), ("set", 0), ("exchange", 1)])
def test_a_refusal_before_the_question(what: str, asks: int) -> None:
    driver = Driver(THEIRS)
    driver.fails = {what: 201}
    assert ask(driver.functions, OURS, cu.EVENT_QUERY, 7) == (0 if asks else 201)
    assert len(driver.asked) == asks and (driver.context, driver.mode) == (THEIRS, GLOBAL)


@pytest.mark.parametrize("context", [OURS, THEIRS])
def test_streams_are_asked_until_one_answers_otherwise(context: int) -> None:
    driver = Driver(context)
    none = np.empty(0, np.int64)
    assert ask_streams(driver.functions, OURS, np.array([7, 8, 9])) == 0 == ask_streams(driver.functions, OURS, none)
    assert driver.exchanged == 4, "the mode is set once for all streams, and put back"
    assert [(ours, mode, stream) for ours, mode, (stream, *_) in driver.asked] == [(OURS, RELAXED, at) for at in (7, 8, 9)]
    driver.fails = {"query": 600}
    assert ask_streams(driver.functions, OURS, np.array([4, 5])) == 600 and [of[0] for *_, of in driver.asked[3:]] == [4]
    assert (driver.context, driver.mode) == (context, GLOBAL)


@pytest.mark.parametrize(("what", "asks"), [("get", 0), ("set", 0), ("exchange", 2)])
def test_a_refusal_before_streams_are_asked(what: str, asks: int) -> None:
    driver = Driver(THEIRS)
    driver.fails = {what: 201}
    assert ask_streams(driver.functions, OURS, np.array([7, 8])) == (0 if asks else 201)
    assert len(driver.asked) == asks and (driver.context, driver.mode) == (THEIRS, GLOBAL)
