"""Connections, pools and crews by themselves; and TLS."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import signal
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvortex.tiers.base import Call, Outcome
from kvortex.tiers.redis import RedisOptions, RedisTier
from kvortex.tiers.remote import arrivals
from kvortex.tiers.remote.crew import Crew
from kvortex.tiers.remote.pool import Pool
from kvortex.tiers.remote.wire import Broken, Late, Wire
from kvortex.tiers.s3 import S3Options, S3Tier
from perf.memory_store import MemoryStore
from tests.tiers import servers
from tests.tiers.racks import FORMAT, Rack

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def soon(seconds: float = 5.0) -> Call:
    return Call(time.monotonic() + seconds)


def test_lines_and_payloads_come_apart_wherever_they_are_cut(pair: tuple[Wire, socket.socket]) -> None:
    wire, far = pair
    payload = bytes(range(256)) * 300
    stream = b"first\r\n" + payload + b"\r\nlast\r\n"
    for step in (1, 7, 4096, len(stream)):

        def feed(step: int = step) -> None:
            for at in range(0, len(stream), step):
                far.sendall(stream[at : at + step])

        feeder = threading.Thread(target=feed)
        feeder.start()
        room = bytearray(len(payload))
        assert wire.line(soon()) == b"first"
        wire.into(memoryview(room), soon())
        assert wire.line(soon()) == b"" and wire.line(soon()) == b"last" and room == payload
        feeder.join()
    assert wire.is_idle()


def test_what_nobody_asked_for_makes_a_connection_unfit(pair: tuple[Wire, socket.socket]) -> None:
    wire, far = pair
    assert wire.is_idle()
    far.sendall(b"x")
    assert not wire.is_idle()


def test_what_is_compiled_is_there_before_the_first_call() -> None:
    """It would take seconds of a call's time."""
    arrivals.load_compiled.cache_clear()
    RedisTier(RedisOptions(), FORMAT).close()
    assert arrivals.load_compiled.cache_info().currsize == 1


def test_steps_end_with_the_deadline(pair: tuple[Wire, socket.socket]) -> None:
    wire, far = pair
    room = memoryview(bytearray(8 << 20))
    for step in (lambda call: wire.line(call), lambda call: wire.into(room, call), lambda call: wire.send([room], call)):
        began = time.monotonic()
        with pytest.raises(Late):
            step(soon(0.1))
        assert 0.09 < time.monotonic() - began < 3
    drip = threading.Event()

    def feed() -> None:
        while not drip.wait(0.02):
            far.send(b"x")

    feeder = threading.Thread(target=feed)
    feeder.start()
    began = time.monotonic()
    with pytest.raises(Late):
        wire.into(room, soon(0.3))
    assert time.monotonic() - began < 3
    drip.set()
    feeder.join()


def test_a_pool_keeps_only_what_owes_nothing() -> None:
    made: list[tuple[Wire, socket.socket]] = []

    def connect(endpoint: str, call: Call) -> Wire:
        near, far = socket.socketpair()
        made.append((Wire(near), far))
        return made[-1][0]

    pool: Pool[str] = Pool(connect, 2)
    with pool.lend("a", soon()) as (wire, was_used):
        assert not was_used
    with pool.lend("a", soon()) as (again, was_used):
        assert again is wire and was_used
        again.send([b"?"], soon())
    with pool.lend("a", soon()) as (other, _):
        assert other is not wire and wire._sock.fileno() == -1
    with pytest.raises(ZeroDivisionError), pool.lend("a", soon()) as (other, _):
        other.send([b"?"], soon())
        raise ZeroDivisionError
    assert pool.waiting() == 0
    with pool.lend("a", soon()), pool.lend("a", soon()), pool.lend("a", soon()):
        pass
    assert pool.waiting() == 2
    with pool.lend("a", soon()) as (late, _):
        pool.close()
    assert pool.waiting() == 0 and late._sock.fileno() == -1
    with pytest.raises(Broken), pool.lend("a", soon()):
        pass
    for wire, far in made:
        wire.close()
        far.close()


def test_a_crew_comes_back_when_nobody_works_any_more() -> None:
    crew = Crew("test", 4)
    at_work = [0]
    lock = threading.Lock()

    def job(call: Call) -> None:
        with lock:
            at_work[0] += 1
        time.sleep(0.05)
        with lock:
            at_work[0] -= 1

    crew.run([job] * 8, soon())
    assert at_work[0] == 0

    def fail(call: Call) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crew.run([job, job, fail, job, job, job], soon())
    assert at_work[0] == 0
    with pytest.raises(KeyboardInterrupt):  # on the caller's thread, while others are at work
        crew.run([_interrupt, job, job, job], soon())
    assert at_work[0] == 0
    crew.close()
    ran: list[int] = []
    crew.run([lambda call: ran.append(1)] * 3, soon())  # alone
    assert ran == [1, 1, 1]


def _interrupt(call: Call) -> None:
    time.sleep(0.02)
    raise KeyboardInterrupt


def test_a_busy_crew_does_not_keep_a_caller_waiting() -> None:
    crew = Crew("test", 2)
    over = threading.Event()
    busy = threading.Thread(target=crew.run, args=([lambda call: over.wait(10)] * 2, soon(20)))
    busy.start()
    time.sleep(0.05)
    began = time.monotonic()
    ran: list[int] = []
    crew.run([lambda call: ran.append(1)] * 4, soon(1))
    assert len(ran) == 4 and time.monotonic() - began < 5
    over.set()
    busy.join()
    crew.close()


@pytest.fixture
def silent() -> Iterator[int]:
    """A port where nobody says yes or no: its queue is full."""
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = undo.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.mark.parametrize("kind", ["redis", "rediss", "s3"])
def test_a_name_with_several_addresses_has_one_deadline(kind: str, silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them gets a part of it, so the last has a chance."""
    tier: S3Tier | RedisTier
    if kind == "s3":
        login = {"access_key_id": "k", "secret_access_key": "s"}
        tier = S3Tier(S3Options(bucket="some", endpoint=f"http://127.0.0.1:{silent}", **login), FORMAT)  # type: ignore[arg-type]
    else:
        tier = RedisTier(RedisOptions(url=f"{kind}://127.0.0.1:{silent}"), FORMAT)
    tried = list[object]()
    address = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", silent))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [tried.append(1) or address for _ in range(4)])
    rack = Rack([4096])
    assert rack.get(tier, seconds=0.8).outcomes[0] in (Outcome.TIMEOUT, Outcome.FAILED) and tried
    assert rack.latest < 1.2  # each with all of the time would be 2.4 late
    tier.close()


def test_the_last_of_several_addresses_is_tried_in_time(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    login = {"access_key_id": "k", "secret_access_key": "s"}
    with contextlib.closing(MemoryStore()) as store:
        tier = S3Tier(S3Options(bucket="some-bucket", endpoint=store.endpoint, **login), FORMAT)  # type: ignore[arg-type]
        common = socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
        addresses = [(*common, ("127.0.0.1", port)) for port in (silent, silent, store.port)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
        rack = Rack([4096])
        assert rack.put(tier, seconds=3.0)[0] == Outcome.OK
        tier.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of 127.0.0.1, signed by itself, and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    built = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("certificate")
    (folder / "cert.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))
    private = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()))
    return folder / "cert.pem", folder / "key.pem"


def test_redis_over_tls(certificate: tuple[Path, Path]) -> None:
    cert, key = map(str, certificate)
    rack = Rack([3 << 20, 4096, 300])
    port = servers.free_port()
    try:
        with servers.redis_server("--tls-port", str(port), "--tls-cert-file", cert, "--tls-key-file", key,
                                  "--tls-ca-cert-file", cert, "--tls-auth-clients", "no") as (_, server):  # fmt: skip
            tier = RedisTier(RedisOptions(url=f"rediss://127.0.0.1:{port}/1?ssl_ca_certs={cert}"), FORMAT)
            assert (rack.put(tier) == Outcome.OK).all() and (rack.get(tier).outcomes == Outcome.OK).all(), tier.trouble
            server.pause()
            assert (rack.get(tier, seconds=0.3).outcomes == Outcome.TIMEOUT).all()
            assert (rack.put(tier, seconds=0.3) == Outcome.TIMEOUT).all() and rack.latest < 2
            server.resume()
            assert (rack.get(tier).outcomes == Outcome.OK).all()
            tier.close()
            stranger = RedisTier(RedisOptions(url=f"rediss://127.0.0.1:{port}"), FORMAT)
            assert (rack.put(stranger) == Outcome.FAILED).all() and "certificate" in stranger.trouble.lower()
            stranger.close()
    except (servers.Absent, RuntimeError) as error:
        pytest.skip(f"no Redis with TLS: {error}")
    assert rack.wrong_bytes == 0


def test_s3_over_tls(certificate: tuple[Path, Path]) -> None:
    cert, key = map(str, certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    rack = Rack([3 << 20, 4096, 300])
    store = MemoryStore(context=context)
    login = {"access_key_id": "k", "secret_access_key": "s"}
    options = {"bucket": "some-bucket", "endpoint": f"https://127.0.0.1:{store.port}", "retries": 0, **login}
    tier = S3Tier(S3Options(ca_file=cert, **options), FORMAT)  # type: ignore[arg-type]
    assert (rack.put(tier) == Outcome.OK).all() and (rack.get(tier).outcomes == Outcome.OK).all(), tier.trouble
    assert rack.has(tier).all() and tier.probe(rack.call()) is None
    stranger = S3Tier(S3Options(**options), FORMAT)  # type: ignore[arg-type]
    assert (rack.put(stranger) == Outcome.FAILED).all() and "certificate" in stranger.trouble.lower()
    stranger.close()
    tier.close()
    store.close()
    assert rack.wrong_bytes == 0


def test_a_crew_works_in_a_process_that_was_forked_while_it_began_a_thread() -> None:
    crew, ran = Crew("test", 3), list[int]()
    with crew._lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which is what this is about
        child = os.fork()
        if not child:
            signal.alarm(10)
            try:
                crew.run([lambda call: ran.append(1)] * 4, soon())
            finally:
                os._exit(0 if len(ran) == 4 else 1)
    assert os.waitpid(child, 0)[1] == 0
    crew.close()


def test_a_crew_without_threads_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have no more of them, or may be about to end."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    crew, ran = Crew("test", 3), list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        crew.run([lambda call: ran.append(1)] * 4, soon())
    assert ran == [1] * 4
    crew.run([lambda call: ran.append(2)] * 4, soon())  # what could not be begun does not begin now
    assert ran == [1] * 4 + [2] * 4
    crew.close()


def test_what_tls_holds_back_makes_a_connection_unfit(certificate: tuple[Path, Path]) -> None:
    """It was sent with the last answer, and is not on the socket any more."""
    cert, key = map(str, certificate)
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=cert)
    server.load_cert_chain(cert, key)
    near, far = socket.socketpair()
    sides = list[ssl.SSLSocket]()
    accepting = threading.Thread(target=lambda: sides.append(server.wrap_socket(far, server_side=True)))
    accepting.start()
    wire = Wire(client.wrap_socket(near, server_hostname="127.0.0.1"))
    accepting.join()
    room = memoryview(bytearray(3))
    sides[0].sendall(b"yes")
    wire.into(room, soon())
    assert wire.is_idle()
    sides[0].sendall(b"yes, and no")
    wire.into(room, soon())
    assert not wire.is_idle()
    wire.close()
    sides[0].close()
