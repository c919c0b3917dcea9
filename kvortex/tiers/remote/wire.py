"""One connection: bytes out of host memory and into it without a copy on the way, and no step that outlives its deadline.

A connection is good for as long as every request got its whole answer. Whatever else happens (an error, a deadline, an
answer of another form, a signal in the middle) leaves ``owed`` above zero, and such a connection is closed, never used
again: what comes out of it next would be taken for the answer to another question.
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence

from kvortex.digests import host
from kvortex.digests.host import Fixed
from kvortex.digests.keys import Numbers
from kvortex.tiers.base import Call, Outcome
from kvortex.tiers.remote.receiving import PIECE, functions, receive_part

_READ_AHEAD = 4096  # bytes; what is read beyond a line and belongs to a payload is copied once more
PATIENCE = 0.25  # seconds between two looks whether the call was cancelled
_MOST_PARTS = 512  # of one sendmsg; Linux takes 1024
_TLS_PART = 1 << 18  # bytes handed to TLS at once
_SCRATCH = 1 << 16


class Broken(Exception):
    """The connection is of no more use; ``outcome`` is that of whatever was not answered."""

    outcome = Outcome.FAILED


class Late(Broken):
    """The deadline passed."""

    outcome = Outcome.TIMEOUT


class Stopped(Broken):
    """The call was cancelled."""

    outcome = Outcome.CANCELLED


def view_of(address: int, nbytes: int) -> memoryview:
    """Host memory as bytes, not owned: whoever asks keeps it alive."""
    return memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")


class Wire:
    """A connected socket, used by one thread at a time.

    Parameters
    ----------
    sock
        Plain or TLS.
    release
        Called once when the connection is closed; closes the socket.

    Attributes
    ----------
    owed : int
        Answers that were asked for and have not come whole.
    served : int
        Answers that came.
    """

    def __init__(self, sock: socket.socket, release: Callable[[], object] | None = None) -> None:
        self._sock = sock
        self._release = release or sock.close
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        self._buffer = memoryview(bytearray(_READ_AHEAD))
        self._start = self._end = 0
        self._patience = 0.0  # seconds that a step waits at most, as the socket was told
        self._looked = 0.0  # when a call was last asked whether it was cancelled
        self._is_blocking = False
        self.owed = self.served = 0

    def is_idle(self) -> bool:
        """Whether nothing is owed, nothing is here that nobody asked for, and the other side has not hung up."""
        if self.owed or self._start != self._end:
            return False
        try:
            if self._is_tls and self._sock.pending():  # type: ignore[attr-defined]
                return False
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            return not poll.poll(0)
        except (OSError, ValueError):
            return False

    def close(self) -> None:
        """Twice does no harm."""
        release, self._release = self._release, lambda: None
        with contextlib.suppress(OSError):
            release()

    def answered(self, answers: int = 1) -> None:
        """Answers have come whole."""
        self.owed -= answers
        self.served += answers

    def send(self, parts: Sequence[bytes | memoryview], call: Call, answers: int = 1) -> None:
        """Sends all of ``parts``, to which ``answers`` answers will be owed."""
        self.owed += answers
        if self._is_tls:  # has no sendmsg
            for part in parts:
                view = memoryview(part)
                while len(view):
                    view = view[self._step(lambda view=view: self._sock.send(view[:_TLS_PART]), call) :]  # type: ignore[misc]
            return
        left: list[bytes | memoryview] = [part for part in parts if len(part)]
        while left:
            count = self._step(lambda: self._sock.sendmsg(left[:_MOST_PARTS]), call)
            if len(left) <= _MOST_PARTS and count == sum(map(len, left)):  # mostly
                return
            done = 0
            while count:
                here = len(left[done])
                if count < here:
                    left[done] = memoryview(left[done])[count:]
                    break
                count -= here
                done += 1
            del left[:done]

    def line(self, call: Call) -> bytes:
        """The next line, without its end; longer than 4 KiB is none."""
        while True:
            here = bytes(self._buffer[self._start : self._end])
            at = here.find(b"\r\n")
            if at >= 0:
                self._start += at + 2
                return here[:at]
            if len(here) == _READ_AHEAD:
                raise Broken("the answer has a line without an end")
            self._fill(call)

    def _fill(self, call: Call) -> None:
        """Reads more behind what is here, and has room for it."""
        here = bytes(self._buffer[self._start : self._end])
        self._buffer[: len(here)] = here
        self._start, self._end = 0, len(here)
        self._end += self._receive(self._buffer[self._end :], call)

    def begins_with(self, wanted: bytes, call: Call) -> bool:
        """Whether the next bytes are these, and then they are read; else none is."""
        while (here := self._end - self._start) < len(wanted):
            if self._buffer[self._start : self._end] != wanted[:here]:
                return False
            self._fill(call)
        if self._buffer[self._start : self._start + len(wanted)] != wanted:
            return False
        self._start += len(wanted)
        return True

    def into(self, view: memoryview, call: Call) -> None:
        """Exactly as many bytes as ``view`` has, into it."""
        done = min(len(view), self._end - self._start)
        view[:done] = self._buffer[self._start : self._start + done]
        self._start += done
        while done < len(view):
            done += self._receive(view[done:], call, 0 if self._is_tls else socket.MSG_WAITALL)

    def summed(self, address: int, nbytes: int, offset: int, sums: Numbers, fixed: Fixed, call: Call) -> int:
        """Some of ``nbytes``, at least one, to an address, and what they add to a digest to ``sums``; how many.

        ``offset`` is that of the first in the record; ``fixed`` is of :func:`kvortex.digests.host.numbers`, and ``sums`` are
        (2,) uint64.
        """
        if call.cancelled():  # while much comes, no step waits in vain and looks
            raise Stopped("the call was cancelled")
        if self._start == self._end and not self._is_tls:
            left = self._patient(call)
            until = time.monotonic() + min(PATIENCE, left - self._patience)  # no piece waits beyond the deadline
            recv, clock = functions()
            done = receive_part(recv, clock, self._sock.fileno(), address, nbytes, offset, int(until * 1e9), sums, fixed)
            if done:
                return int(done)
        count = min(nbytes, PIECE if self._start == self._end else self._end - self._start)
        self.into(view_of(address, count), call)
        host.add_part(address, count, offset, sums, fixed)
        return count

    def skip(self, count: int, call: Call) -> None:
        """Reads ``count`` bytes and forgets them."""
        scratch = memoryview(bytearray(min(count, _SCRATCH)))
        while count:
            here = min(count, _SCRATCH)
            self.into(scratch[:here], call)
            count -= here

    def _receive(self, view: memoryview, call: Call, flags: int = 0) -> int:
        count = self._step(lambda: self._sock.recv_into(view, len(view), flags), call)
        if not count:
            raise Broken("the other side hung up")
        return count

    def _step(self, step: Callable[[], int], call: Call) -> int:
        """One call of the socket that may wait, until it did something."""
        while True:
            self._look(call)
            self._patient(call)
            try:
                return step()
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                pass
            except TimeoutError as error:
                if error.errno is not None:  # of the network, not of this step
                    raise Broken(f"the connection failed: {error}") from None
            except (OSError, ValueError) as error:
                raise Broken(f"the connection failed: {error}") from None
            if call.cancelled():
                raise Stopped("the call was cancelled")

    def _look(self, call: Call) -> None:
        """Now and then, whether the call was cancelled: a step that waits in vain asks anyway, one that gets little not."""
        now = time.monotonic()
        if now - self._looked >= PATIENCE:
            self._looked = now
            if call.cancelled():
                raise Stopped("the call was cancelled")

    def _patient(self, call: Call) -> float:
        """Has the socket wait no longer than the call; the seconds that are left of that."""
        left = call.left()
        if not left:
            raise Late("the deadline passed")
        self._wait_at_most(min(left, PATIENCE))
        return left

    def _wait_at_most(self, seconds: float) -> None:
        """Python's own time-out costs two more system calls a step, and keeps the kernel from filling a whole buffer in one;
        so a plain socket blocks, and the kernel ends the wait."""
        if seconds == self._patience:
            return
        self._patience = seconds
        if self._is_tls:
            self._sock.settimeout(seconds)
            return
        micros = max(1, int(seconds * 1e6))
        spec = struct.pack("@ll", micros // 1_000_000, micros % 1_000_000)
        try:
            if not self._is_blocking:
                self._sock.settimeout(None)
                self._is_blocking = True
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, spec)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, spec)
        except OSError as error:
            raise Broken(f"the connection failed: {error}") from None
