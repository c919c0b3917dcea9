"""Servers of a test session, and the check that a tier leaves no thread and no connection behind."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from kvortex.tiers.remote.wire import Wire
from tests.tiers import servers
from tests.tiers.misbehaving import until


@pytest.fixture(scope="package")
def redis_port() -> Iterator[int]:
    """A Redis of 256 MB that never evicts."""
    try:
        with servers.redis_server("--maxmemory", "256mb") as (port, _):
            yield port
    except servers.Absent as error:
        pytest.skip(str(error))


@pytest.fixture(scope="package")
def s3_endpoint() -> Iterator[str]:
    """moto's S3."""
    try:
        with servers.moto_server() as (endpoint, _):
            yield endpoint
    except servers.Absent as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", autouse=True)
def obstore_is_awake() -> None:
    """Its own threads and files live as long as the process, from its first request on: they are no leak."""
    servers.wake_obstore()


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """Threads of kvortex, and files and sockets of this process, are as many afterwards as before."""
    before = _held()
    yield
    assert until(lambda: _held() <= before), f"{_held()} threads and files, {before} before"


def _held() -> tuple[int, int]:
    threads = sum(thread.name.startswith("kvortex") for thread in threading.enumerate())
    return threads, len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pair() -> Iterator[tuple[Wire, socket.socket]]:
    """A connection, and its far end."""
    near, far = socket.socketpair()
    wire = Wire(near)
    yield wire, far
    wire.close()
    far.close()
