"""``kvortex record``: runs a program whose engines write traces, and says what is in them."""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from kvortex.cli import console
from kvortex.errors import ArgumentError, KVortexError
from kvortex.traces.format import read_trace
from kvortex.traces.recordings import VARIABLE


def run(arguments: argparse.Namespace) -> int:
    """The command; the program's exit status, 128 and the signal's number where one ended it.

    Raises
    ------
    ArgumentError
        The trace cannot be written, or the program cannot be run or made no engine.
    """
    program = arguments.program[1:] if arguments.program[:1] == ["--"] else arguments.program
    if not program:
        raise ArgumentError("record needs a program to run: kvortex record TRACE.jsonl -- PROGRAM [ARGUMENT ...]")
    path = _checked(arguments.trace)
    before = set(_traces(path))
    status = _wait(program, {**os.environ, VARIABLE: path})
    made = [trace for trace in _traces(path) if trace not in before]
    for trace in made:
        console.aside(f"recorded in {os.path.relpath(trace)}", _rows(trace))
    if not made and status == 0:
        raise ArgumentError(f"{program[0]}: made no engine of kvortex, so there is no trace")
    return status


def _checked(trace: str) -> str:
    path = os.path.abspath(trace)
    if not trace or os.path.lexists(path):
        reason = "is there already, and no trace is written over it" if trace else "names no file"
        raise ArgumentError(f"{trace!r}: {reason}; choose another name")
    if not os.path.isdir(os.path.dirname(path)) or not os.access(os.path.dirname(path), os.W_OK):
        raise ArgumentError(f"{trace}: no file can be written there")
    return path


def _traces(path: str) -> list[str]:
    """The traces that engines of one run write, in the order of their numbers."""
    stem, ending = os.path.splitext(path)
    numbered = {}
    for name in glob.glob(f"{glob.escape(stem)}-*{glob.escape(ending)}"):
        number = name[len(stem) + 1 : len(name) - len(ending)]
        if number.isdecimal():
            numbered[int(number)] = name
    return [*([path] if os.path.exists(path) else []), *(numbered[number] for number in sorted(numbered))]


def _wait(program: list[str], environment: dict[str, str]) -> int:
    try:
        child = subprocess.Popen(program, env=environment)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{program[0]}: {getattr(error, 'strerror', None) or error}") from None
    with _passing_on(child):
        status = child.wait()
    return 128 - status if status < 0 else status


@contextlib.contextmanager
def _passing_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """A terminal sends Ctrl-C to the program as well, which ends as it likes; SIGTERM comes to us alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hand_on(number: int, _: Any) -> None:
        child.send_signal(number)

    handlers: dict[int, Any] = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: hand_on}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rows(path: str) -> list[tuple[str, str]]:
    try:
        trace = read_trace(path)
    except KVortexError as error:  # an engine that was asked for nothing leaves an empty file
        return [("no requests", str(error))]
    rows = [
        ("requests", str(trace.asked)),
        ("block references", f"{trace.references} to blocks of {trace.block_tokens} tokens"),
        ("different blocks", str(trace.distinct)),
    ]
    if trace.stored.any():
        rows.append(("stored unasked", f"{len(trace.ids) - trace.references} blocks"))
    if trace.torn:
        rows.append(("cut off", "the last line, which is not whole"))
    return rows + ([("left out", f"{trace.dropped} calls, for which the writer was too slow")] if trace.dropped else [])
