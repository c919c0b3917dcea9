"""What a Redis server, or a cluster, holds of kvortex's: by redis-py alone, which knows how to walk through both."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kvortex.errors import ConfigError, told
from kvortex.tiers.base import Outcome
from kvortex.tiers.inventory import (
    PIECE,
    Listing,
    Name,
    Verified,
    check_payload,
    header_of,
    list_records,
    verify_records,
)
from kvortex.tiers.record import HEADER_BYTES
from kvortex.tiers.redis.options import RedisOptions
from kvortex.tiers.redis.servers import hidden_in, import_redis

_NAME = re.compile(rb"\{kvx:([0-9a-f]{16}):([0-9a-f]{64})\}:([hd])")
_HEADS, _ALL = b"{kvx:*}:h", b"{kvx:*}:[hd]"
_BATCH = 500  # names that a server is asked about at once
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
        found = _answers(client, _HEADS, lambda name: [_header(name)])
        return list_records((_name_of(name), start or b"") for name, (start,) in found if start != b"")  # else it went since


def verify(options: RedisOptions) -> Verified:
    """Reads every record, one after the other, and checks its payload. Changes nothing, nor how recently what was used, except
    under a ``maxmemory-policy`` by use. Raises as :func:`listing`."""
    with _client(options) as client:
        found = _answers(client, _HEADS, _about)
        return verify_records((_name_of(name), _verified(client, name, *about)) for name, about in found)


def purge(options: RedisOptions) -> int:
    """Removes every record, of all namespaces; the bytes of their strings. Raises as :func:`listing`."""
    removed = 0
    with _client(options) as client:
        for _, (length, gone) in _answers(client, _ALL, lambda name: [("STRLEN", name), ("UNLINK", name)]):
            removed += length or 0 if gone else 0
    return removed


def _answers(client: Any, pattern: bytes, commands: Callable[[bytes], list[Command]]) -> Iterator[tuple[bytes, list[Any]]]:
    """Names of records' strings, and the answers to what is asked about each."""
    names = (name for name in client.scan_iter(match=pattern, count=_BATCH) if _NAME.fullmatch(name))
    while some := list(itertools.islice(names, _BATCH)):
        asked = [commands(name) for name in some]
        found = iter(_asked(client, itertools.chain.from_iterable(asked)))
        for name, mine in zip(some, asked, strict=True):
            yield name, list(itertools.islice(found, len(mine)))


def _header(name: bytes) -> Command:
    return "GETRANGE", name, 0, HEADER_BYTES - 1


def _about(name: bytes) -> list[Command]:
    body = _body_of(name)
    return [_header(name), ("STRLEN", name), ("EXISTS", body), ("STRLEN", body)]


def _body_of(name: bytes) -> bytes:
    return name[:-1] + b"d"


def _verified(client: Any, name: bytes, start: bytes | None, head: int | None, there: int, body: int | None) -> Outcome:
    """One record, from what :func:`_about` asks; ``MISS`` where it went since, or a part of it."""
    if start == b"":
        return Outcome.MISS
    header = header_of(_name_of(name), start or b"")
    if header is None or head is None:
        return Outcome.CORRUPT
    if not there or body is None:
        return Outcome.MISS
    if head - HEADER_BYTES + body != int(header["payload_bytes"][0]):
        return Outcome.CORRUPT
    both = _pieces(client, _body_of(name), 0, body), _pieces(client, name, HEADER_BYTES, head)
    return check_payload(header, itertools.chain(*both))


def _pieces(client: Any, name: bytes, first: int, end: int) -> Iterator[bytes]:
    for start in range(first, end, PIECE):
        yield _asked(client, [("GETRANGE", name, start, min(start + PIECE, end) - 1)])[0] or b""


def _name_of(name: bytes) -> Name:
    match = _NAME.fullmatch(name)
    assert match is not None
    return Name(bytes.fromhex(match[1].decode()), bytes.fromhex(match[2].decode()))


def _asked(client: Any, commands: Iterable[Command]) -> list[Any]:
    """The answers to several commands; None where the server has something else than a string by that name. Raises what else
    the server has against it."""
    pipeline = client.pipeline(transaction=False)
    for words in commands:
        pipeline.execute_command(*words)
    found = pipeline.execute(raise_on_error=False)
    for error in found:
        if isinstance(error, Exception) and "WRONGTYPE" not in str(error):
            raise error
    return [None if isinstance(answer, Exception) else answer for answer in found]


@contextlib.contextmanager
def _client(options: RedisOptions) -> Iterator[Any]:
    redis = import_redis()
    terms = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": options.connect_timeout_s}
    url, client = _without_decoding(options.url), None
    try:
        try:
            client = redis.Redis.from_url(url, **terms)
            if client.info("cluster").get("cluster_enabled"):
                client.close()
                client = redis.RedisCluster.from_url(url, **terms)
        except (redis.exceptions.RedisError, OSError):
            raise
        except Exception as error:  # of options that it does not know
            raise ConfigError(f"url of a Redis tier cannot be used: {hidden_in(told(error), options.url)}") from None
        yield client
    except (redis.exceptions.RedisError, OSError) as error:
        raise ConfigError(f"the Redis server cannot be asked: {hidden_in(told(error), options.url)}") from None
    finally:
        if client is not None:
            client.close()


def _without_decoding(url: str) -> str:
    """Without the one option that changes what answers are; what a URL says goes before what is said beside it."""
    bare, _, query = url.partition("?")
    kept = [option for option in query.split("&") if option and option.partition("=")[0] != "decode_responses"]
    return f"{bare}?{'&'.join(kept)}" if kept else bare
