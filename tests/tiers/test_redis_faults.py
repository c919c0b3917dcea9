"""What the Redis tier makes of answers that are cut, damaged, late, or none at all."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvortex.errors import ConfigError
from kvortex.tiers import tools
from kvortex.tiers.base import Call, Outcome
from kvortex.tiers.redis import RedisOptions, RedisTier
from kvortex.tiers.redis.resp import answer
from kvortex.tiers.remote.wire import Broken, Wire
from tests.tiers.misbehaving import KINDS, Fault, Proxy, misbehaving
from tests.tiers.racks import FORMAT, Rack

TOLERANCE = 2.0  # seconds that a call may come back after its deadline, on a busy machine
pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture
def proxy(redis_port: int) -> Iterator[Proxy]:
    with misbehaving(redis_port) as proxy:
        yield proxy


def make(port: int, **options: object) -> RedisTier:
    return RedisTier(RedisOptions(url=f"redis://127.0.0.1:{port}", **options), FORMAT)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to_server", [False, True])
def test_a_fault_anywhere_in_the_stream_costs_keys_and_never_bytes(proxy: Proxy, kind: str, to_server: bool) -> None:
    """At places all over a batch's conversation; afterwards the tier serves, and no old answer comes to a new question."""
    rng = np.random.default_rng(KINDS.index(kind))
    rack = Rack([3000, 100, 70_000, 4096])
    tier = make(proxy.port, connections=1)
    tier_behind = make(proxy.upstream)
    is_slow = kind in ("stall", "drip")
    for _ in range(4 if is_slow else 40):
        rack.put(tier_behind)
        rack.get(tier)
        is_put = bool(rng.integers(2))
        span = 78_000 if is_put == to_server else 500 if to_server else 20
        fault = proxy.arm(Fault(kind, int(rng.integers(span)), to_server, int(rng.integers(1, 9)), seconds=0.05))
        seconds = 0.3 if is_slow or kind in ("drop", "insert", "flip") else 5.0
        outcomes = rack.put(tier, seconds=seconds) if is_put else rack.get(tier, seconds=seconds).outcomes
        assert set(outcomes.tolist()) <= set(Outcome) - {Outcome.CANCELLED}
        proxy.disarm()
        if kind in ("cut", "stall") and fault.fired.is_set() and not is_put:
            assert (outcomes != Outcome.OK).any() or kind == "cut"
        assert set(rack.get(tier).outcomes.tolist()) <= {Outcome.OK, Outcome.MISS, Outcome.CORRUPT}
        assert (rack.put(tier) == Outcome.OK).all() and rack.has(tier).all()
        assert (rack.get(tier).outcomes == Outcome.OK).all()
    tier.close()
    tier_behind.close()
    assert rack.wrong_bytes == 0 and rack.latest < TOLERANCE


def test_a_server_that_hangs_up_at_once_fails_quickly(proxy: Proxy) -> None:
    rack = Rack([4096] * 4)
    tier = make(proxy.port)
    proxy.refuse(True)
    started = time.monotonic()
    assert (rack.put(tier) == Outcome.FAILED).all() and (rack.get(tier).outcomes == Outcome.FAILED).all()
    assert time.monotonic() - started < 2
    proxy.refuse(False)
    assert (rack.put(tier) == Outcome.OK).all()
    tier.close()


class Scripted:
    """A server that answers each command with what ``reply`` makes of its words; None hangs up."""

    def __init__(self, reply: Callable[[list[bytes]], bytes | None]) -> None:
        self._reply = reply
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for sock in self._connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as lines:
            try:
                while line := lines.readline():
                    words = []
                    for _ in range(int(line[1:])):
                        words.append(lines.read(int(lines.readline()[1:]) + 2)[:-2])
                    reply = self._reply(words)
                    if reply is None:
                        return
                    sock.sendall(reply)
            except (OSError, ValueError):
                pass


NO_CLUSTER = b"-ERR This instance has cluster support disabled\r\n"


def test_answers_that_are_none() -> None:
    """To GET and to SET alike; and the connection is closed, not used again."""
    rack = Rack([4096])
    bad = [b":3\r\n", b"+PONG\r\n", b"$1_0\r\n0123456789\r\n",
           b"*2\r\n$1\r\na\r\n$1\r\nb\r\n", b"$x\r\n", b"$-7\r\n", b"hello\r\n", b"\r\n", b"x" * 9000,
           b"$3\r\nabcde\r\n", b"$99999999999999999999999\r\n", b"_\r\n", b">1\r\n+a\r\n"]  # fmt: skip
    for said in bad:

        def reply(words: list[bytes], said: bytes = said) -> bytes:
            if words[0] == b"CLUSTER":
                return NO_CLUSTER
            if words[0] == b"CONFIG":
                return b"*2\r\n$18\r\nproto-max-bulk-len\r\n$9\r\n536870912\r\n"
            return said

        with Scripted(reply) as server:
            tier = make(server.port)
            assert rack.put(tier, seconds=1)[0] in (Outcome.FAILED, Outcome.TIMEOUT), said
            assert rack.get(tier, seconds=1).outcomes[0] in (Outcome.FAILED, Outcome.TIMEOUT), said
            found = rack.has(tier, seconds=1)
            assert (found is not None and not found[0]) if said == b":3\r\n" else found is None, said
            tier.close()
    assert rack.wrong_bytes == 0 and rack.latest < TOLERANCE


def slots(host: bytes, port: bytes) -> bytes:
    return b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$%d\r\n%b\r\n:%b\r\n" % (len(host), host, port)


@pytest.mark.parametrize(
    ("cluster", "error"),
    [
        (slots(b"127.0.0.1", b"99999999999999999999"), b""),
        (slots(b"127.0.0.1", b"70000"), b""),
        (slots(b"127.0.0.1", b"-5"), b""),
        (slots(b"a" * 300, b"1"), b""),
        (slots(b"...", b"1"), b""),
        (slots(b"a\0b", b"1"), b""),
        (NO_CLUSTER, b"-ASK 1 127.0.0.1:99999999999999999999"),
        (NO_CLUSTER, "-ASK 1 127.0.0.1:²".encode()),
        (NO_CLUSTER, b"-ASK 1 ...:1"),
        (NO_CLUSTER, b"-ASK 1 127.0.0.1"),
    ],
)
def test_addresses_that_are_none_are_failures(cluster: bytes, error: bytes) -> None:
    rack = Rack([4096] * 2)
    with Scripted(lambda words: cluster if words[0] == b"CLUSTER" else error + b"\r\n") as server:
        tier = make(server.port)
        assert (rack.put(tier) == Outcome.FAILED).all() and (rack.get(tier).outcomes == Outcome.FAILED).all()
        assert rack.has(tier) is None and tier.trouble
        tier.close()


def test_what_a_server_says_cannot_command_a_terminal() -> None:
    rack = Rack([4096])
    with Scripted(lambda words: b"-ERR \x1b[2J\x07 \xff it is\r\n") as server:
        tier = make(server.port)
        assert rack.put(tier)[0] == Outcome.FAILED
        assert "it is" in tier.trouble and tier.trouble.isprintable()
        tier.close()
        with pytest.raises(ConfigError, match="it is") as caught:
            tools.act("ls", f"redis://127.0.0.1:{server.port}")
        assert str(caught.value).isprintable()


def test_an_answer_without_an_end_takes_little_memory() -> None:
    """Of many entries, each of which is short enough."""
    near, far = socket.socketpair()
    over = threading.Event()

    def feed() -> None:
        with contextlib.suppress(OSError):
            far.sendall(b"*1000000\r\n")
            while not over.is_set():
                far.sendall(b"$1000000\r\n" + bytes(1_000_000) + b"\r\n")

    feeder = threading.Thread(target=feed)
    feeder.start()
    wire = Wire(near)
    tracemalloc.start()
    try:
        with pytest.raises(Broken, match="too long"):
            answer(wire, Call(time.monotonic() + 3))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        over.set()
        wire.close()
        feeder.join()
        far.close()
    assert peak < 64 << 20


@pytest.mark.parametrize(
    ("error", "put", "get"),
    [
        (b"-OOM command not allowed when used memory > 'maxmemory'.", Outcome.FULL, Outcome.FULL),
        (b"-LOADING Redis is loading the dataset in memory", Outcome.FAILED, Outcome.FAILED),
        (b"-READONLY You can't write against a read only replica.", Outcome.FAILED, Outcome.FAILED),
        (b"-NOPERM this user has no permissions", Outcome.FAILED, Outcome.FAILED),
        (b"-ERR", Outcome.FAILED, Outcome.FAILED),
        (b"-MOVED 1 nowhere", Outcome.FAILED, Outcome.FAILED),
        (b"-MOVED 1 127.0.0.1:1", Outcome.FAILED, Outcome.FAILED),
        (b"-ASK 1 127.0.0.1:1", Outcome.FAILED, Outcome.FAILED),
        (b"-WRONGTYPE Operation against a key holding the wrong kind of value", Outcome.MISS, Outcome.MISS),
    ],
)
def test_errors_of_a_server_keep_the_connection(error: bytes, put: Outcome, get: Outcome) -> None:
    rack = Rack([4096] * 3)
    with Scripted(lambda words: error + b"\r\n") as server:
        tier = make(server.port, connections=1)
        if error.startswith(b"-LOADING"):
            assert (rack.put(tier) == put).all()
        else:
            assert (rack.put(tier) == put).all() and (rack.get(tier).outcomes == get).all(), tier.trouble
            assert tier._servers.pool.waiting() >= 1
        tier.close()


def test_a_length_that_is_huge_takes_no_memory() -> None:
    """Answers that are no payloads are short; and what is asked for is only had when it comes."""
    rack = Rack([4096])
    with Scripted(lambda words: b"$1000000000\r\nx") as server:
        tier = make(server.port, connections=1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert rack.has(tier, seconds=1) is None and rack.put(tier, seconds=1)[0] != Outcome.OK
        assert rack.get(tier, seconds=1).outcomes[0] != Outcome.OK
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
        tier.close()
    assert rack.wrong_bytes == 0 and rack.latest < TOLERANCE


@pytest.mark.parametrize("how", [b"ASK", b"MOVED"])
def test_a_record_that_moves_between_its_strings_is_read_anew(how: bytes) -> None:
    """What came of it before counts no more; nor is it taken for damaged, and deleted."""
    rack = Rack([70_000])
    stored: dict[bytes, bytes] = {}
    said: list[bytes] = []

    def reply(words: list[bytes]) -> bytes:
        said.append(words[0])
        if words[:2] == [b"CLUSTER", b"SLOTS"]:
            return b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n" % server.port
        if words[0] == b"SET":
            stored[words[1]] = words[2]
        elif words[0] == b"GET" and said.count(b"GET") == 2:
            return b"-%b 1 127.0.0.1:%d\r\n" % (how, server.port)
        elif words[0] == b"GET":
            return b"$%d\r\n%b\r\n" % (len(stored[words[1]]), stored[words[1]])
        return b"+OK\r\n"

    with Scripted(reply) as server:
        tier = make(server.port)
        assert rack.put(tier)[0] == Outcome.OK
        assert rack.get(tier).outcomes[0] == Outcome.OK and said.count(b"GET") == 4 and b"UNLINK" not in said
        tier.close()
    assert rack.wrong_bytes == 0


def test_connections_to_servers_that_left_a_cluster_are_closed() -> None:
    """Addresses come and go where a cluster's machines do."""
    rack = Rack([4096] * 3)
    ports: list[int] = []

    def reply(words: list[bytes]) -> bytes:
        if words[:2] == [b"CLUSTER", b"SLOTS"]:
            return b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n" % ports[-1]
        return b":0\r\n"

    with Scripted(reply) as home, Scripted(reply) as first, Scripted(reply) as second:
        ports.append(first.port)
        tier = make(home.port)
        pool = tier._servers.pool
        assert not rack.has(tier).any() and set(pool._here()) == {("127.0.0.1", home.port), ("127.0.0.1", first.port)}
        ports.append(second.port)
        tier._servers.doubt()
        assert not rack.has(tier).any() and set(pool._here()) == {("127.0.0.1", home.port), ("127.0.0.1", second.port)}
        tier.close()


def test_redirections_in_a_circle_end() -> None:
    rack = Rack([4096] * 3)
    ports: list[int] = []

    def reply(words: list[bytes]) -> bytes:
        if words[:2] == [b"CLUSTER", b"SLOTS"]:
            return b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n" % ports[0]
        return b"-MOVED 1 127.0.0.1:%d\r\n" % ports[0]

    with Scripted(reply) as server:
        ports.append(server.port)
        tier = make(server.port)
        assert (rack.put(tier) == Outcome.FAILED).all() and (rack.get(tier).outcomes == Outcome.FAILED).all()
        tier.close()


def test_a_login_that_drips_ends_with_the_deadline() -> None:
    """Byte by byte, each in time: together they are not."""
    rack = Rack([4096])
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def drip() -> None:
        sock, _ = listener.accept()
        with sock:
            try:
                while not over.wait(0.1):
                    sock.sendall(b"+")
            except OSError:
                pass

    thread = threading.Thread(target=drip)
    thread.start()
    tier = RedisTier(RedisOptions(url=f"redis://:p@127.0.0.1:{listener.getsockname()[1]}"), FORMAT)
    assert rack.get(tier, seconds=0.5).outcomes[0] == Outcome.TIMEOUT and rack.latest < TOLERANCE
    over.set()
    thread.join()
    tier.close()
    listener.close()
