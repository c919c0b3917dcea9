"""Blocks of 2 MiB through the Redis and S3 tiers, against what bare clients do with the same blocks on the same server.

By turns, each method with as many threads and connections. ``raw_gb_per_s`` is of the fastest bare one by its median, which
``bare`` names: for Redis redis-py without hiredis, and raw sockets that ask for one block after another (``raw``) or for four
ahead (``raw pipelined``); for S3 obstore with unsigned payloads. Bare clients check no digest, and redis-py and obstore need
not bring a block into its slot. ``ratio`` is the median of the rounds' ratios of rates, tier to that one. Redis is a real
server; S3 is SeaweedFS, which is slow itself, and ``memory_store.py``, which only holds bytes and so shows the clients.
``wrong_bytes`` counts bytes that came back to the tier other than they were stored.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.digests import digest_records
from kvortex.tiers import Call, Outcome, RecordFormat, Tier
from perf.report import progress

BLOCK = 2 << 20
BLOCKS, ROUNDS = 32, 31
_SECONDS = 120.0
_AHEAD = 4
Bytes = npt.NDArray[np.uint8]
Work = Callable[[], None]


class Memory:
    """Blocks to store, and room of the same shape; (n, block) uint8, page-aligned."""

    def __init__(self, blocks: int, block: int) -> None:
        self.data, self.room = (np.frombuffer(mmap.mmap(-1, blocks * block), np.uint8).reshape(blocks, block) for _ in range(2))
        self.data[:] = np.random.default_rng(5).integers(0, 256, (blocks, block), np.uint8)
        self.keys = np.random.default_rng(6).integers(0, 256, (blocks, 32), np.uint8)
        self.sizes = np.full(blocks, block)
        self.digests = np.empty((blocks, 16), np.uint8)
        digest_records(self.at(self.data), self.sizes, self.digests)

    @staticmethod
    def at(memory: Bytes) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = memory.ctypes.data + memory.shape[1] * np.arange(len(memory))
        return found

    def wrong(self) -> int:
        """Bytes in the room that are not what was stored; and the room is made wrong for the next time."""
        found = sum(int((mine != theirs).sum()) for mine, theirs in zip(self.room, self.data, strict=True))
        self.room[:, ::4096] ^= 0xFF
        return found


class Method:
    """One way to put all blocks and to get them."""

    def __init__(self, name: str, put: Work, get: Work) -> None:
        self.name, self.put, self.get = name, put, get


def tiered(tier: Tier, memory: Memory) -> Method:
    def put() -> None:
        call = Call(time.monotonic() + _SECONDS)
        _all_ok(tier.put_from(memory.keys, memory.at(memory.data), memory.sizes, memory.digests, call))

    def get() -> None:
        call = Call(time.monotonic() + _SECONDS)
        _all_ok(tier.get_into(memory.keys, memory.at(memory.room), memory.sizes, call).outcomes)

    return Method(tier.name, put, get)


def _all_ok(outcomes: npt.NDArray[np.uint8]) -> None:
    if (outcomes != Outcome.OK).any():
        raise OSError(f"a batch ended with {sorted({Outcome(each).name for each in outcomes.tolist()})}")


def _spread(depth: int, blocks: int, work: Callable[[int, list[int]], None]) -> Work:
    """``work`` for each of ``depth`` threads, with its number and its blocks."""

    def run() -> None:
        failures: list[BaseException] = []

        def one(number: int) -> None:
            try:
                work(number, list(range(blocks))[number::depth])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(1, depth)]
        for thread in threads:
            thread.start()
        one(0)
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    return run


@contextlib.contextmanager
def bare_redis(port: int, memory: Memory, depth: int) -> Iterator[list[Method]]:
    import redis

    blocks = len(memory.data)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(redis.Redis(port=port)) for _ in range(depth)]
        sockets = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(depth)]
        for sock in sockets:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def library_put(number: int, mine: list[int]) -> None:
            for at in mine:
                clients[number].set(f"bare{at}", memoryview(memory.data[at]))

        def library_get(number: int, mine: list[int]) -> None:
            for at in mine:
                clients[number].get(f"bare{at}")

        def raw(ahead: int) -> tuple[Work, Work]:
            def put(number: int, mine: list[int]) -> None:
                for at, wait in _windows(mine, ahead):
                    if at is not None:
                        _send(sockets[number], _set_head(at, memory.data[at]), memory.data[at])
                    if wait is not None:
                        _expect(sockets[number], b"+OK\r\n")

            def get(number: int, mine: list[int]) -> None:
                for at, wait in _windows(mine, ahead):
                    if at is not None:
                        sockets[number].sendall(b"*2\r\n$3\r\nGET\r\n" + _name(at))
                    if wait is not None:
                        _expect(sockets[number], b"$%d\r\n" % memory.room.shape[1])
                        _fill(sockets[number], memory.room[wait])
                        _expect(sockets[number], b"\r\n")

            return _spread(depth, blocks, put), _spread(depth, blocks, get)

        yield [
            Method("redis-py", _spread(depth, blocks, library_put), _spread(depth, blocks, library_get)),
            Method("raw", *raw(1)),
            Method("raw pipelined", *raw(_AHEAD)),
        ]


def _windows(mine: list[int], ahead: int) -> Iterator[tuple[int | None, int | None]]:
    """What to ask for and what to wait for next, with so many under way."""
    for place in range(len(mine) + ahead - 1):
        waits = place - ahead + 1
        yield (mine[place] if place < len(mine) else None), (mine[waits] if waits >= 0 else None)


def _name(at: int) -> bytes:
    return b"$%d\r\nbare%d\r\n" % (len(f"bare{at}"), at)


def _set_head(at: int, block: Bytes) -> bytes:
    return b"*3\r\n$3\r\nSET\r\n" + _name(at) + b"$%d\r\n" % len(block)


def _send(sock: socket.socket, head: bytes, block: Bytes) -> None:
    left = [memoryview(head), memoryview(block), memoryview(b"\r\n")]
    while left:
        count = sock.sendmsg(left)
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]


def _expect(sock: socket.socket, wanted: bytes) -> None:
    found = b""
    while len(found) < len(wanted):
        found += sock.recv(len(wanted) - len(found))
    if found != wanted:
        raise OSError(f"the server says {found!r}")


def _fill(sock: socket.socket, room: Bytes) -> None:
    view = memoryview(room)
    while len(view):
        view = view[sock.recv_into(view) :]


@contextlib.contextmanager
def bare_s3(endpoint: str, memory: Memory, depth: int) -> Iterator[list[Method]]:
    import obstore
    from obstore.store import S3Store

    from tests.tiers import servers

    store = S3Store(
        servers.S3_BUCKET, endpoint=endpoint, access_key_id=servers.S3_KEY, secret_access_key=servers.S3_SECRET,
        region="us-east-1", unsigned_payload=True, client_options={"allow_http": True, "timeout": "120s"},
    )  # fmt: skip

    def put(number: int, mine: list[int]) -> None:
        for at in mine:
            obstore.put(store, f"bare/{at}", memoryview(memory.data[at]), use_multipart=False)

    def get(number: int, mine: list[int]) -> None:
        for at in mine:
            if len(obstore.get(store, f"bare/{at}").bytes()) != memory.data.shape[1]:
                raise OSError("an object is short")

    blocks = len(memory.data)
    yield [Method("obstore", _spread(depth, blocks, put), _spread(depth, blocks, get))]


@contextlib.contextmanager
def _memory_store() -> Iterator[tuple[str, object]]:
    from tests.tiers import servers

    port = servers.free_port()
    endpoint = f"http://127.0.0.1:{port}"
    server = servers.Server([sys.executable, "-m", "perf.memory_store", str(port)], lambda: servers._is_http_up(endpoint))
    server.start()
    try:
        yield endpoint, server
    finally:
        server.stop()


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Puts and gets with few and with many connections.

    Each row: ``tier``, ``server``, ``operation`` (``put`` or ``get``), ``block_bytes``, ``depth`` (connections), ``gb_per_s``,
    ``raw_gb_per_s``, ``bare``, ``ratio``, ``wrong_bytes``. A server that is not installed has no rows.
    """
    from tests.tiers import servers

    block, blocks, rounds = (64 << 10, 8, 2) if quick else (BLOCK, BLOCKS, ROUNDS)
    memory, form = Memory(blocks, block), RecordFormat(bytes(32), block)
    found: list[dict[str, Any]] = []
    with contextlib.suppress(servers.Absent), servers.redis_server("--maxmemory", "1gb") as (port, _):
        from kvortex.tiers.redis import RedisOptions, RedisTier

        for depth in (1, 4):
            progress(f"redis-server, {depth} at once")
            tier: Tier = RedisTier(RedisOptions(url=f"redis://127.0.0.1:{port}", connections=depth), form)
            with contextlib.closing(tier), bare_redis(port, memory, depth) as bare:
                found += _compare(tiered(tier, memory), bare, memory, "redis-server", depth, rounds)
    for server, start in (("memory_store", _memory_store), ("seaweedfs", servers.seaweedfs_server)):
        if quick and server == "seaweedfs":
            continue
        with contextlib.suppress(servers.Absent), start() as (endpoint, _):
            from kvortex.tiers.s3 import S3Options, S3Tier

            for depth in (1, 8):
                progress(f"{server}, {depth} at once")
                login = {"access_key_id": servers.S3_KEY, "secret_access_key": servers.S3_SECRET}
                options = S3Options(bucket=servers.S3_BUCKET, endpoint=endpoint, connections=depth, **login)
                tier = S3Tier(options, form)
                with contextlib.closing(tier), bare_s3(endpoint, memory, depth) as bare:
                    turns = rounds if server == "memory_store" else -(-rounds // 3)
                    found += _compare(tiered(tier, memory), bare, memory, server, depth, turns)
    return found


def _compare(mine: Method, bare: list[Method], memory: Memory, server: str, depth: int, rounds: int) -> list[dict[str, Any]]:
    times: dict[tuple[str, str], list[float]] = {}
    wrong = {"put": 0, "get": 0}
    methods = [mine, *bare]
    for turn in range(-1, rounds):  # the first is to warm up
        for operation in ("put", "get"):
            for method in methods if turn % 2 else methods[::-1]:
                began = time.perf_counter()
                getattr(method, operation)()
                if turn >= 0:
                    times.setdefault((method.name, operation), []).append(time.perf_counter() - began)
                if operation == "get" and method is mine:
                    wrong["get"] += memory.wrong()
    return [_row(mine, bare, operation, times, memory, server, depth, wrong[operation]) for operation in ("put", "get")]


def _row(
    mine: Method, bare: list[Method], operation: str, times: dict[tuple[str, str], list[float]], memory: Memory,
    server: str, depth: int, wrong: int,
) -> dict[str, Any]:  # fmt: skip
    best = min(bare, key=lambda method: statistics.median(times[method.name, operation]))
    ours, theirs = times[mine.name, operation], times[best.name, operation]
    nbytes = memory.data.size
    return {
        "tier": mine.name,
        "server": server,
        "operation": operation,
        "block_bytes": memory.data.shape[1],
        "depth": depth,
        "gb_per_s": nbytes / statistics.median(ours) / 1e9,
        "raw_gb_per_s": nbytes / statistics.median(theirs) / 1e9,
        "bare": best.name,
        "ratio": statistics.median(other / own for own, other in zip(ours, theirs, strict=True)),
        "wrong_bytes": wrong,
    }
