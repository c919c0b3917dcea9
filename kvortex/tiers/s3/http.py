"""HTTP/1.1 as far as objects need it, on connections with deadlines: a body out of host memory, a body into it.

Source: RFC 9112 (messages) and RFC 9110 (semantics).
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvortex.tiers.base import Call
from kvortex.tiers.remote.wire import Broken, Late, Wire

_MOST_HEADERS = 128
_MOST_TEXT = 1 << 16  # bytes of an answer that is no object


class Endpoint(NamedTuple):
    """Where to connect."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True)
class Head:
    """Status and headers of an answer, names in lower case."""

    status: int
    headers: dict[str, str]
    has_body: bool

    @property
    def length(self) -> int | None:
        """Bytes of the body, None where only its end says it."""
        if not self.has_body:
            return 0
        said = self.headers.get("content-length", "")
        if "transfer-encoding" in self.headers or not said.isascii() or not said.isdigit() or len(said) > 18:
            return None
        return int(said)


def connect(endpoint: Endpoint, timeout: float, context: ssl.SSLContext | None, call: Call) -> Wire:
    """A connection, with TLS for ``https``. Names are looked up by the system, which has a deadline of its own."""
    end = min(call.deadline, time.monotonic() + timeout)
    if end <= time.monotonic():
        raise Late("the deadline passed")
    sock = None
    try:
        sock = _dial(endpoint, end)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            sock.settimeout(max(0.001, end - time.monotonic()))
            plain, sock = sock, None  # which TLS closes if it fails
            sock = context.wrap_socket(plain, server_hostname=endpoint.host)
        return Wire(sock)
    except TimeoutError:
        _close(sock)
        raise (Broken if call.left() else Late)("the store does not answer: connecting took too long") from None
    except (OSError, ValueError) as error:
        _close(sock)
        raise Broken(f"no connection to the store: {error}") from None
    except BaseException:
        _close(sock)
        raise


def _dial(endpoint: Endpoint, end: float) -> socket.socket:
    """The first of a name's addresses that answers. Each may take its part of the time: of two, one may be of no use here."""
    addresses = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    trouble = OSError("the name has no address")
    for at, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.001, (end - time.monotonic()) / (len(addresses) - at)))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            trouble = error
        except BaseException:
            sock.close()
            raise
    raise trouble


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()


def request(wire: Wire, method: str, host: str, target: str, body: Sequence[bytes | memoryview], call: Call) -> Head:
    """Sends a request and reads the head of the answer."""
    head = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: kvortex\r\nAccept-Encoding: identity\r\n"
    if method == "PUT":
        head += f"Content-Type: application/octet-stream\r\nContent-Length: {sum(map(len, body))}\r\n"
    wire.send([f"{head}\r\n".encode("ascii"), *body], call)
    while True:
        found = _read_head(wire, method, call)
        if found.status >= 200:  # before, the store only says that it is at it
            return found


def finish(wire: Wire, head: Head) -> None:
    """The body was read: the connection may be used again, if the store will have it."""
    if head.headers.get("connection", "").lower() != "close":
        wire.answered()


def text(wire: Wire, head: Head, call: Call) -> bytes:
    """A short body, such as what an error says; longer than 64 KiB is left where it is, and the connection is lost."""
    length = head.length
    if length is None and head.headers.get("transfer-encoding", "").lower() == "chunked":
        found = _chunks(wire, call)
    elif length is None or length > _MOST_TEXT:
        return b""
    else:
        found = _exactly(wire, length, call)
    finish(wire, head)
    return found


def _chunks(wire: Wire, call: Call) -> bytes:
    found = b""
    while True:
        said = wire.line(call).partition(b";")[0].strip()
        try:
            length = int(said, 16)
        except ValueError:
            raise Broken("the store's answer has a chunk without a length") from None
        if not 0 <= length <= _MOST_TEXT or len(found) + length > _MOST_TEXT:
            raise Broken("the store's answer is too long for an error")
        found += _exactly(wire, length, call)
        if length == 0:
            _fields(wire, call)
            return found
        if wire.line(call):
            raise Broken("the store's answer has a chunk without an end")


def _exactly(wire: Wire, count: int, call: Call) -> bytes:
    found = bytearray(count)
    wire.into(memoryview(found), call)
    return bytes(found)


def _read_head(wire: Wire, method: str, call: Call) -> Head:
    version, _, rest = wire.line(call).partition(b" ")
    status = rest[:3]
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or not status.isdigit() or len(status) != 3:
        raise Broken("the store does not speak HTTP/1.1")
    headers = _fields(wire, call)
    if version == b"HTTP/1.0":
        headers["connection"] = "close"
    number = int(status)
    return Head(number, headers, method != "HEAD" and number >= 200 and number not in (204, 304))


def _fields(wire: Wire, call: Call) -> dict[str, str]:
    found: dict[str, str] = {}
    for _ in range(_MOST_HEADERS):
        line = wire.line(call)
        if not line:
            return found
        name, colon, value = line.decode("latin-1").partition(":")
        name, value = name.lower(), value.strip()
        if not colon or found.get(name, value) != value and name == "content-length":
            raise Broken("the store's answer has headers that are none")
        found[name] = value
    raise Broken("the store's answer has too many headers")
