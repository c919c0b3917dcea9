"""Payloads from a socket to their place, and their digests."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvortex.digests.host import add_lengths, numbers
from kvortex.tiers.base import Call
from kvortex.tiers.remote.receiving import PIECE
from kvortex.tiers.remote.wire import Broken, Late, Stopped, Wire
from tests.naive_digest import digest

pytestmark = pytest.mark.usefixtures("nothing_leaks")
MOST = 8 * PIECE + 1001
FIXED = numbers(MOST)


naive = functools.cache(digest)  # which takes its time


def read(wire: Wire, room: np.ndarray, call: Call, sums: np.ndarray | None = None) -> np.ndarray:
    """Fills ``room`` from a wire; the digest of what came."""
    sums = np.zeros(2, np.uint64) if sums is None else sums
    done = 0
    while done < len(room):
        done += wire.summed(room.ctypes.data + done, len(room) - done, done, sums, FIXED, call)
    assert done == len(room)
    return add_lengths(sums[None], [len(room)])[0]


def soon(seconds: float = 20.0, cancelled: Callable[[], bool] = lambda: False) -> Call:
    return Call(time.monotonic() + seconds, cancelled)


@pytest.mark.parametrize("nbytes", [1, 5000, PIECE, 3 * PIECE + 77, MOST])
@pytest.mark.parametrize("step", [1000, PIECE - 1, MOST + 100])
def test_what_came_is_what_was_sent_and_so_is_its_digest(pair: tuple[Wire, socket.socket], nbytes: int, step: int) -> None:
    wire, far = pair
    payload = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    stream = b"a line\r\n" + payload.tobytes() + b"the next\r\n"

    def feed() -> None:
        for at in range(0, len(stream), step):
            far.sendall(stream[at : at + step])

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert wire.line(soon()) == b"a line"  # and some of the payload with it
    room = np.zeros(nbytes, np.uint8)
    found = read(wire, room, soon())
    assert wire.line(soon()) == b"the next"
    feeder.join()
    assert (room == payload).all()
    assert found.tobytes() == naive(payload.tobytes())


@pytest.fixture
def dripping(pair: tuple[Wire, socket.socket]) -> Iterator[tuple[Wire, threading.Event]]:
    """A payload that comes slowly, and steadily enough that no piece of it is waited for in vain."""
    wire, far = pair
    ended = threading.Event()

    def feed() -> None:
        with contextlib.suppress(OSError):
            while not ended.wait(0.05):
                far.sendall(bytes(PIECE))

    feeder = threading.Thread(target=feed)
    feeder.start()
    yield wire, ended
    ended.set()
    wire.close()  # lest the feeder waits for a reader that has gone
    feeder.join()


def test_a_payload_that_comes_slowly_ends_with_the_deadline(dripping: tuple[Wire, threading.Event]) -> None:
    wire, _ = dripping
    room = np.zeros(1000 * PIECE, np.uint8)
    began = time.monotonic()
    with pytest.raises(Late):
        wire_reads_all(wire, room, soon(0.6))
    assert 0.5 < time.monotonic() - began < 10


def test_and_with_its_cancellation(dripping: tuple[Wire, threading.Event]) -> None:
    wire, _ = dripping
    room = np.zeros(1000 * PIECE, np.uint8)
    began = time.monotonic()
    with pytest.raises(Stopped):
        wire_reads_all(wire, room, soon(60, lambda: time.monotonic() - began > 0.3))
    assert time.monotonic() - began < 10


def wire_reads_all(wire: Wire, room: np.ndarray, call: Call) -> None:
    fixed, sums, done = numbers(len(room)), np.zeros(2, np.uint64), 0
    while done < len(room):
        done += wire.summed(room.ctypes.data + done, len(room) - done, done, sums, fixed, call)


@pytest.mark.parametrize("what", ["line", "into", "skip", "send"])
def test_what_goes_on_and_on_ends_with_its_cancellation(pair: tuple[Wire, socket.socket], what: str) -> None:
    """Though no step of it waits in vain."""
    wire, far = pair
    ended, room = threading.Event(), memoryview(bytearray(8 << 20))

    def other_side() -> None:
        with contextlib.suppress(OSError):
            while not ended.wait(0.01):
                if what == "send":
                    far.recv(1000)
                else:
                    far.send(b"x" * (1 if what == "line" else 1000))

    other = threading.Thread(target=other_side)
    other.start()
    began = time.monotonic()
    call = soon(8, lambda: time.monotonic() - began > 0.3)
    steps: dict[str, Callable[[], object]] = {
        "line": lambda: wire.line(call),
        "into": lambda: wire.into(room, call),
        "skip": lambda: wire.skip(len(room), call),
        "send": lambda: wire.send([room], call),
    }
    try:
        with pytest.raises(Stopped):
            steps[what]()
    finally:
        ended.set()
        wire.close()
        other.join()


def test_who_hangs_up_in_a_payload_is_told(pair: tuple[Wire, socket.socket]) -> None:
    wire, far = pair
    far.sendall(bytes(3000))
    far.close()
    with pytest.raises(Broken, match="hung up"):
        read(wire, np.zeros(5000, np.uint8), soon())


def test_a_closed_connection_reads_nothing(pair: tuple[Wire, socket.socket]) -> None:
    wire, _ = pair
    wire.close()
    with pytest.raises(Broken):
        read(wire, np.zeros(5000, np.uint8), soon())
