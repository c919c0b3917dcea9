"""What lies under a prefix of a bucket: by obstore alone, which knows how to list."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kvortex.errors import ConfigError
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
from kvortex.tiers.s3.bucket import Bucket, plain
from kvortex.tiers.s3.options import S3Options

_TIMEOUT_S = 60.0  # of one answer
Entry = dict[str, Any]
Found = TypeVar("Found")


def listing(options: S3Options) -> Listing:
    """What is there: lists all names, and reads each header. Changes nothing.

    Raises
    ------
    ConfigError
        obstore is not installed, or the store cannot be asked.
    """

    def header(bucket: Bucket, entry: Entry, name: Name) -> bytes:
        if entry["size"] < HEADER_BYTES:
            return b""
        return bytes(bucket.obstore.get_range(bucket.store, entry["path"], start=0, end=HEADER_BYTES))

    with _told():
        return list_records((name, found) for name, found in _each(options, header) if found is not None)


def verify(options: S3Options) -> Verified:
    """Reads every record, several at once, and checks its payload. Changes nothing. Raises as :func:`listing`."""

    def verified(bucket: Bucket, entry: Entry, name: Name) -> Outcome:
        found = bucket.obstore.get(bucket.store, entry["path"])
        pieces = (memoryview(piece) for piece in found.stream(min_chunk_size=PIECE))
        start = next(pieces, memoryview(b""))
        record = header_of(name, bytes(start[:HEADER_BYTES]))
        if record is None or found.meta["size"] != HEADER_BYTES + int(record["payload_bytes"][0]):
            return Outcome.CORRUPT
        return check_payload(record, itertools.chain([start[HEADER_BYTES:]], pieces))

    with _told():
        return verify_records((name, Outcome.MISS if found is None else found) for name, found in _each(options, verified))


def purge(options: S3Options) -> int:
    """Removes every record under the prefix, of all namespaces; the bytes of their objects. What has other names stays. Raises
    as :func:`listing`."""
    removed = 0
    with _told():
        bucket = Bucket(options, _TIMEOUT_S)
        for entries in _pages(bucket, options):
            bucket.obstore.delete(bucket.store, [entry["path"] for entry, _ in entries])
            removed += sum(int(entry["size"]) for entry, _ in entries)
    return removed


def _each(options: S3Options, ask: Callable[[Bucket, Entry, Name], Found]) -> Iterator[tuple[Name, Found | None]]:
    """Names of records, and what ``ask`` gives of them, as many at once as there may be connections; None for what went since
    it was listed."""
    bucket = Bucket(options, _TIMEOUT_S)

    def asked(entry: Entry, name: Name) -> Found | None:
        try:
            return ask(bucket, entry, name)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(options.connections, "kvortex-s3-look") as pool:
        for entries in _pages(bucket, options):
            for start in range(0, len(entries), options.connections):  # so many records are in memory at once
                some = entries[start : start + options.connections]
                for (_, name), found in zip(some, pool.map(asked, *zip(*some, strict=True)), strict=True):
                    yield name, found


def _pages(bucket: Bucket, options: S3Options) -> Iterator[list[tuple[Entry, Name]]]:
    """Objects with names of records, and what the names say."""
    form = re.compile(re.escape(options.prefix) + "/([0-9a-f]{64})/([0-9a-f]{2})/([0-9a-f]{64})")
    for entries in bucket.obstore.list(bucket.store, prefix=options.prefix):
        found = []
        for entry in entries:
            match = form.fullmatch(entry["path"])
            if match is not None and match[3].startswith(match[2]):
                found.append((entry, Name(bytes.fromhex(match[1]), bytes.fromhex(match[3]))))
        if found:
            yield found


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # obstore's have no common class of their own
        raise ConfigError(f"the store cannot be asked: {plain(error)}") from None
