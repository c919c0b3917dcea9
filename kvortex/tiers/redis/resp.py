"""RESP2, the protocol of Redis, as far as payloads need it: commands out, answers in.

Source: the Redis serialization protocol specification, redis.io/docs/latest/develop/reference/protocol-spec.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvortex.tiers.base import Call, Outcome
from kvortex.tiers.remote.wire import Broken, Wire

_LONGEST = 1 << 20  # bytes of one string in an answer that is no payload, and entries of an array: memory is taken for them
_MOST = 32 << 20  # bytes of such an answer, of which each entry takes some: CLUSTER SLOTS with every slot by itself has half
_ENTRY = 64
_DEEPEST = 8


class ServerError(Exception):
    """The server said ``-CODE text``; the connection is as good as before."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code, _, self.rest = text.partition(" ")

    @property
    def outcome(self) -> Outcome:
        """What that makes of a key."""
        return {"OOM": Outcome.FULL, "WRONGTYPE": Outcome.MISS}.get(self.code, Outcome.FAILED)

    @property
    def moved(self) -> tuple[bool, str] | None:
        """Of ``MOVED slot host:port`` and ``ASK slot host:port``, whether it is the latter, and the address."""
        parts = self.rest.split()
        return (self.code == "ASK", parts[1]) if self.code in ("MOVED", "ASK") and len(parts) == 2 else None


def command(*words: bytes) -> bytes:
    """A command of short words."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def long_set(key: bytes, value: Sequence[bytes | memoryview], options: Sequence[bytes]) -> list[bytes | memoryview]:
    """``SET key value options``, the value in parts that are not copied."""
    head = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (3 + len(options), len(key), key, sum(map(len, value)))
    return [head, *value, b"\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in options)]


def bulk_length(wire: Wire, call: Call) -> int:
    """The answer to a ``GET``: bytes that follow, to be read with :func:`end_bulk` behind them, or -1 for no such key.

    Raises
    ------
    ServerError
        The answer was an error, and is read.
    Broken
        It was no answer to a ``GET``.
    """
    kind, rest = _first_line(wire, call)
    if kind == b"-":
        wire.answered()
        raise ServerError(rest.decode("utf-8", "replace"))
    length = _number(rest) if kind == b"$" else -2
    if length < -1:
        raise Broken("the server's answer is none to GET")
    if length == -1:
        wire.answered()
    return length


def end_bulk(wire: Wire, call: Call) -> None:
    """The end of a bulk string."""
    end = bytearray(2)
    wire.into(memoryview(end), call)
    if end != b"\r\n":
        raise Broken("a value is longer than the server said")
    wire.answered()


def answer(wire: Wire, call: Call) -> object:
    """Any answer; an error is raised as ``ServerError``."""
    found = _Reader(wire, call).read(0)
    wire.answered()
    if isinstance(found, ServerError):
        raise found
    return found


class _Reader:
    """Of one answer."""

    def __init__(self, wire: Wire, call: Call) -> None:
        self._wire, self._call, self._left = wire, call, _MOST

    def read(self, depth: int) -> object:
        kind, rest = _first_line(self._wire, self._call)
        self._take(_ENTRY + len(rest))
        if kind == b"+":
            return rest.decode("utf-8", "replace")
        if kind == b"-":
            return ServerError(rest.decode("utf-8", "replace"))
        count = _number(rest)
        if kind == b":":
            return count
        if kind not in (b"$", b"*") or not -1 <= count <= _LONGEST or depth > _DEEPEST:
            raise Broken("the server does not speak RESP2")
        if count == -1:
            return None
        if kind == b"*":
            return [self.read(depth + 1) for _ in range(count)]
        self._take(count)
        value = bytearray(count + 2)
        self._wire.into(memoryview(value), self._call)
        if value[count:] != b"\r\n":
            raise Broken("a value is longer than the server said")
        return bytes(value[:count])

    def _take(self, nbytes: int) -> None:
        self._left -= nbytes
        if self._left < 0:
            raise Broken("the server's answer is too long")


def _first_line(wire: Wire, call: Call) -> tuple[bytes, bytes]:
    line = wire.line(call)
    return line[:1], line[1:]


def _number(text: bytes) -> int:
    if not text or len(text) > 20 or not (text[1:] if text[:1] == b"-" else text).isdigit():
        raise Broken("the server's answer has a length that is no number")
    return int(text)
