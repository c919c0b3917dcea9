"""What a Redis server, or a cluster, holds of kvortex's: by redis-py alone, which knows how to walk through both."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kvortex.errors import ConfigError, told
from kvortex.tiers.inventory import Listing, Name, Verified, list_records, verify_records
from kvortex.tiers.record import HEADER_BYTES
from kvortex.tiers.redis.options import RedisOptions
from kvortex.tiers.redis.servers import hidden_in, import_redis

_NAME = re.compile(rb"\{kvx:([0-9a-f]{16}):([0-9a-f]{64})\}:([hd])")
_HEADS, _ALL = b"{kvx:*}:h", b"{kvx:*}:[hd]"
_BATCH = 500  # names that a server is asked about at once
_WHOLE_BATCH = 16  # and strings that it is to send
_TIMEOUT_S = 30.0  # of one answer
Command = tuple[Any, ...]


def listing(options: RedisOptions) -> Listing:
    """What is there; changes nothing.

    Raises
    ------
    ConfigError
        redis-py is not installed, or the server cannot be asked.
    """
    with _client(options) as client:
        return list_records(_heads(client, lambda name: ("GETRANGE", name, 0, HEADER_BYTES - 1), _BATCH))


def verify(options: RedisOptions) -> Verified:
    """Reads every record, one after the other, and checks its payload. Changes nothing, nor how recently what was used, except
    under a ``maxmemory-policy`` by use. Raises as :func:`listing`."""
    with _client(options) as client:
        return verify_records(_records(client))


def purge(options: RedisOptions) -> int:
    """Removes every record, of all namespaces; the bytes of their strings. Raises as :func:`listing`."""
    removed = 0
    with _client(options) as client:
        for names in _batches((name for name in client.scan_iter(match=_ALL, count=_BATCH) if _NAME.fullmatch(name)), _BATCH):
            lengths = _asked(client, [("STRLEN", name) for name in names])
            gone = _asked(client, [("UNLINK", name) for name in names])
            removed += sum(int(length) for length, one in zip(lengths, gone, strict=True) if one)
    return removed


def _heads(client: Any, command: Callable[[bytes], Command], batch: int) -> Iterator[tuple[Name, bytes]]:
    """Names of records, and what a command gives of the string with the header."""
    names = (name for name in client.scan_iter(match=_HEADS, count=_BATCH) if _NAME.fullmatch(name))
    for some in _batches(names, batch):
        for name, found in zip(some, _asked(client, map(command, some)), strict=True):
            if found != b"":  # else it went since
                yield _name_of(name), found or b""  # which is no record: the server has something else there


def _records(client: Any) -> Iterator[tuple[Name, bytes, bytes | None]]:
    for name, start in _heads(client, lambda name: ("GET", name), _WHOLE_BATCH):
        (body,) = _asked(client, [("GET", b"{kvx:%b:%b}:d" % (name.namespace.hex().encode(), name.key.hex().encode()))])
        yield name, start, None if body is None else body + start[HEADER_BYTES:]


def _name_of(name: bytes) -> Name:
    match = _NAME.fullmatch(name)
    assert match is not None
    return Name(bytes.fromhex(match[1].decode()), bytes.fromhex(match[2].decode()))


def _batches(names: Iterable[bytes], count: int) -> Iterator[list[bytes]]:
    following = iter(names)
    while some := list(itertools.islice(following, count)):
        yield some


def _asked(client: Any, commands: Iterable[Command]) -> list[Any]:
    """The answers to several commands; None for those that are errors, and for what is not there."""
    pipeline = client.pipeline(transaction=False)
    for words in commands:
        pipeline.execute_command(*words)
    return [None if isinstance(found, Exception) else found for found in pipeline.execute(raise_on_error=False)]


@contextlib.contextmanager
def _client(options: RedisOptions) -> Iterator[Any]:
    redis = import_redis()
    terms = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": options.connect_timeout_s, "decode_responses": False}
    client = None
    try:
        client = redis.Redis.from_url(options.url, **terms)
        if client.info("cluster").get("cluster_enabled"):
            client.close()
            client = redis.RedisCluster.from_url(options.url, **terms)
        yield client
    except (redis.exceptions.RedisError, OSError) as error:
        raise ConfigError(f"the Redis server cannot be asked: {hidden_in(told(error), options.url)}") from None
    finally:
        if client is not None:
            client.close()
