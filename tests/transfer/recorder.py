"""Driver functions for compiled code that do nothing but take their arguments down, and an account of what is ordered
after what by streams and events alone."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvortex.devices import driver as cu
from kvortex.transfer.plan import PARAMETERS, Int64s

_WORD = ctypes.c_longlong
_COUNTS = {
    cu.CTX_PUSH: 1,
    cu.CTX_POP: 1,
    cu.EVENT_RECORD: 2,
    cu.STREAM_WAIT: 3,
    cu.LAUNCH: 11,
    cu.COPY_TO_HOST: 4,
    cu.COPY_TO_DEVICE: 4,
    cu.COPY_LINES: 2,
    cu.STREAM_WAIT_VALUE: 4,
    cu.STREAM_WRITE_VALUE: 4,
    cu.COPY_BATCH: 8,
    cu.COPY_BATCH_12: 9,
}
_KEPT: list[Any] = []  # what is called by address when a test that failed has left an engine to the collector
QUESTIONS = range(cu.CTX_GET, cu.STREAM_CAPTURING + 1)
_NAMES = {
    cu.CTX_PUSH: "push",
    cu.CTX_POP: "pop",
    cu.EVENT_RECORD: "record",
    cu.STREAM_WAIT: "wait",
    cu.LAUNCH: "launch",
    cu.COPY_TO_HOST: "to_host",
    cu.COPY_TO_DEVICE: "to_device",
    cu.COPY_LINES: "lines",
    cu.STREAM_WAIT_VALUE: "wait_value",
    cu.STREAM_WRITE_VALUE: "write_value",
    cu.COPY_BATCH: "batch",
    cu.COPY_BATCH_12: "batch_12",
}


@dataclass(frozen=True)
class Call:
    """One call; ``parameters`` are the kernel's, of a launch, or the rectangle's, of a copy of lines, or of a batch its target
    addresses, source addresses and sizes, the six numbers of its attributes and the first copy that they are for."""

    name: str
    arguments: tuple[int, ...]
    parameters: tuple[int, ...] = ()

    @property
    def stream(self) -> int:
        """The stream that the call puts work on."""
        return {
            "record": lambda a: a[1],
            "wait": lambda a: a[0],
            "launch": lambda a: a[8],
            "to_host": lambda a: a[3],
            "to_device": lambda a: a[3],
            "lines": lambda a: a[1],
            "wait_value": lambda a: a[0],
            "write_value": lambda a: a[0],
            "batch": lambda a: a[7],
            "batch_12": lambda a: a[8],
        }[self.name](self.arguments)


class Recorder:
    """``functions`` is what ``kvortex.devices.driver.functions`` gives; ``fails`` maps a call's position to an error code;
    ``also`` is called with every call that does not fail. Questions, which change nothing, are not taken down: ``answer`` gets
    their number and arguments, and gives the code."""

    def __init__(
        self,
        fails: dict[int, int] | None = None,
        also: Callable[[Call], None] | None = None,
        answer: Callable[..., int] = lambda *_: 0,
    ) -> None:
        self.calls: list[Call] = []
        self.fails, self._also = fails or {}, also
        made = {at: self._function(at) for at in _COUNTS} | {at: _question(at, answer) for at in QUESTIONS}
        functions = [made[at] for at in range(len(made))]
        _KEPT.append(functions)
        addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]
        self.functions: Int64s = np.array(addresses, np.int64)

    def _function(self, which: int) -> Any:
        def take(*arguments: int) -> int:
            parameters: tuple[int, ...] = ()
            if which == cu.LAUNCH:
                pointers = (_WORD * PARAMETERS).from_address(arguments[9])
                parameters = tuple(_WORD.from_address(pointer).value for pointer in pointers)
            if which == cu.COPY_LINES:
                parameters = tuple((_WORD * 16).from_address(arguments[0]))
            if which in (cu.COPY_BATCH, cu.COPY_BATCH_12):
                lists = [tuple((_WORD * arguments[3]).from_address(at)) for at in arguments[:3]]
                attributes = (ctypes.c_int * 6).from_address(arguments[4])
                parameters = (*itertools.chain(*lists), *attributes, _WORD.from_address(arguments[5]).value)
            call = Call(_NAMES[which], arguments, parameters)
            self.calls.append(call)
            code = self.fails.get(len(self.calls) - 1, 0)
            if not code and self._also is not None:
                self._also(call)
            return code

        return ctypes.CFUNCTYPE(ctypes.c_int, *[_WORD] * _COUNTS[which])(take)

    @property
    def names(self) -> list[str]:
        return [call.name for call in self.calls]


def _question(which: int, answer: Callable[..., int]) -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_int, *[_WORD] * 3)(lambda *arguments: answer(which, *arguments))


def predecessors(calls: list[Call], fails: dict[int, int] | None = None) -> list[set[int]]:
    """For each call the positions of all calls that have surely ended when it runs, by streams' order and events; of a kernel
    that waits for a flag, when it goes on."""
    last: dict[int, set[int]] = {}  # of a stream: everything on it, and before it
    events: dict[int, set[int]] = {}
    flags: dict[tuple[int, ...], set[int]] = {}
    before: list[set[int]] = []
    for at, call in enumerate(calls):
        if call.name in ("push", "pop") or at in (fails or {}):
            before.append(set())
            continue
        known = last.setdefault(call.stream, set())
        before.append(set(known))
        if call.name == "wait":
            known |= events.get(call.arguments[1], set())
        if call.name == "write_value":
            flags[call.arguments[1:3]] = {*known, at}
        if call.name == "launch":
            known |= flags.get(call.parameters[9:11], set())
            before[-1] |= known
        known.add(at)
        if call.name == "record":
            events[call.arguments[0]] = set(known)
    return before
