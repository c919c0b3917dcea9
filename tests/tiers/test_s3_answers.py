"""What the S3 tier makes of answers that a store should not give, word by word."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvortex.tiers.base import Call, Outcome
from kvortex.tiers.s3 import S3Options, S3Tier
from tests.tiers.racks import FORMAT, Rack

TOLERANCE = 2.0  # seconds that a call may come back after its deadline, on a busy machine
pytestmark = pytest.mark.usefixtures("nothing_leaks")
Reply = Callable[[str, bytes], bytes]


class Cut(bytes):
    """An answer after which the server hangs up."""


@contextlib.contextmanager
def scripted(reply: Reply) -> Iterator[str]:
    """The endpoint of a server that answers a method, and the body that came with it, with what ``reply`` makes of them."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads, sockets = [], list[socket.socket]()

    def serve(sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as lines, contextlib.suppress(OSError):
            while first := lines.readline():
                fields = dict(line.decode().strip().lower().split(": ", 1) for line in iter(lines.readline, b"\r\n") if line)
                body = lines.read(int(fields.get("content-length", 0)))
                said = reply(first.split()[0].decode(), body)
                sock.sendall(said)
                if isinstance(said, Cut):
                    sock.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sockets.append(sock)
            threads.append(threading.Thread(target=serve, args=(sock,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        listener.close()


def make(endpoint: str, **options: object) -> S3Tier:
    given = {"bucket": "bucket", "access_key_id": "k", "secret_access_key": "s", "connections": 1} | options
    return S3Tier(S3Options(endpoint=endpoint, **given), FORMAT)  # type: ignore[arg-type]


def answer(status: str, body: bytes = b"") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n" % (status.encode(), len(body)) + body


@pytest.mark.parametrize("status", ["201 Created", "202 Accepted", "203 Non-Authoritative", "204 No Content", "206 Partial"])
def test_only_a_200_is_an_object(status: str) -> None:
    """A cache or a gateway may answer a get with another success: nothing of that is in the slot."""
    rack = Rack([4096])
    stored = list[bytes]()

    def reply(method: str, body: bytes) -> bytes:
        if method == "PUT":
            stored.append(body)
            return answer("200 OK")
        return answer(status, b"" if "204" in status or method == "HEAD" else stored[-1])

    with scripted(reply) as endpoint:
        tier = make(endpoint)
        assert rack.put(tier)[0] == Outcome.OK
        assert rack.get(tier).outcomes[0] == Outcome.FAILED and tier.trouble
        found = rack.has(tier)
        assert found is None
        tier.close()
    assert rack.wrong_bytes == 0


def test_an_object_that_is_cut_is_asked_for_again_and_nothing_of_it_counts() -> None:
    """Nor is it taken for damaged, and deleted."""
    rack = Rack([1 << 16])
    stored, asked = list[bytes](), list[str]()

    def reply(method: str, body: bytes) -> bytes:
        asked.append(method)
        if method == "PUT":
            stored.append(body)
            return answer("200 OK")
        whole = answer("200 OK", stored[-1])
        return Cut(whole[:20_000]) if asked.count("GET") == 1 else whole

    with scripted(reply) as endpoint:
        tier = make(endpoint)
        assert rack.put(tier)[0] == Outcome.OK
        assert rack.get(tier).outcomes[0] == Outcome.OK and asked == ["PUT", "GET", "GET"]
        tier.close()
    assert rack.wrong_bytes == 0


@pytest.mark.parametrize("second", [b"", b"KVXRECRD"])
def test_a_header_that_came_before_does_not_complete_a_foreign_object(second: bytes) -> None:
    """Which would be taken for a damaged record, and deleted."""
    rack = Rack([1 << 16])
    stored, asked = list[bytes](), list[str]()

    def reply(method: str, body: bytes) -> bytes:
        asked.append(method)
        if method == "PUT":
            stored.append(body)
            return answer("200 OK")
        return Cut(answer("200 OK", stored[-1])[:20_000]) if asked.count("GET") == 1 else answer("200 OK", second)

    with scripted(reply) as endpoint:
        tier = make(endpoint)
        assert rack.put(tier)[0] == Outcome.OK
        assert rack.get(tier).outcomes[0] == Outcome.MISS and asked == ["PUT", "GET", "GET"]
        tier.close()


def test_a_part_of_an_object_does_not_complete_what_was_lost_before() -> None:
    """First a get that is cut in the payload, then an answer without the rest."""
    rack = Rack([1 << 16])
    stored, gets = list[bytes](), list[int]()

    def reply(method: str, body: bytes) -> bytes:
        if method == "PUT":
            stored.append(body)
            return answer("200 OK")
        gets.append(1)
        if len(gets) == 1:
            return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(stored[-1]) + stored[-1][:5000]
        return answer("206 Partial Content", stored[-1][5000:])

    with scripted(reply) as endpoint:
        tier = make(endpoint)
        assert rack.put(tier)[0] == Outcome.OK
        assert rack.get(tier, seconds=0.5).outcomes[0] != Outcome.OK
        assert rack.get(tier, seconds=0.5).outcomes[0] != Outcome.OK
        tier.close()
    assert rack.wrong_bytes == 0 and rack.latest < TOLERANCE


def test_a_call_that_waits_to_ask_again_can_be_cancelled() -> None:
    rack = Rack([4096])

    def reply(method: str, body: bytes) -> bytes:
        return answer("503 Slow Down")

    with scripted(reply) as endpoint:
        tier = make(endpoint, retries=100)
        began = time.monotonic()
        asked = Call(began + 30, lambda: time.monotonic() > began + 4.0)  # by then the pauses are seconds long
        assert tier.get_into(rack.keys, rack.targets, rack.sizes, asked).outcomes[0] == Outcome.CANCELLED
        assert time.monotonic() - began < 4.0 + TOLERANCE
        tier.close()


def test_what_a_closed_tier_is_asked_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing changes that; whoever closes it waits for these calls."""
    rack, pauses = Rack([4096] * 20), list[float]()
    monkeypatch.setattr("kvortex.tiers.s3.tier._sleep", lambda seconds, call: pauses.append(seconds))
    with scripted(lambda method, body: answer("404 Not Found")) as endpoint:
        tier = make(endpoint, connections=8)
        urls = tier._bucket.urls

        def close_meanwhile(method: str, names: object) -> object:
            tier._pool.close()
            return urls(method, names)  # type: ignore[arg-type]

        monkeypatch.setattr(tier._bucket, "urls", close_meanwhile)
        assert (rack.get(tier).outcomes == Outcome.FAILED).all() and not pauses and "closed" in tier.trouble
        tier.close()
