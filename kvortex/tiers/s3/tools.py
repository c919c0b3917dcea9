"""What lies under a prefix of a bucket: by obstore alone, which knows how to list."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvortex.errors import ConfigError
from kvortex.tiers.inventory import Listing, Name, Verified, list_records, verify_records
from kvortex.tiers.record import HEADER_BYTES
from kvortex.tiers.s3.bucket import Bucket, plain
from kvortex.tiers.s3.options import S3Options

_TIMEOUT_S = 60.0  # of one answer
Objects = list[dict[str, Any]]


def listing(options: S3Options) -> Listing:
    """What is there: lists all names, and reads each header. Changes nothing.

    Raises
    ------
    ConfigError
        obstore is not installed, or the store cannot be asked.
    """

    def header(bucket: Bucket, entry: dict[str, Any]) -> bytes:
        if entry["size"] < HEADER_BYTES:
            return b""
        return bytes(bucket.obstore.get_range(bucket.store, entry["path"], start=0, end=HEADER_BYTES))

    with _told():
        return list_records(_each(options, header))


def verify(options: S3Options) -> Verified:
    """Reads every record, several at once, and checks its payload. Changes nothing. Raises as :func:`listing`."""

    def whole(bucket: Bucket, entry: dict[str, Any]) -> bytes:
        return bytes(bucket.obstore.get(bucket.store, entry["path"]).bytes())

    with _told():
        return verify_records((name, found[:HEADER_BYTES], found[HEADER_BYTES:]) for name, found in _each(options, whole))


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


def _each(options: S3Options, fetch: Callable[[Bucket, dict[str, Any]], bytes]) -> Iterator[tuple[Name, bytes]]:
    """Names of records, and what ``fetch`` gives of them, as many at once as there may be connections."""
    bucket = Bucket(options, _TIMEOUT_S)

    def fetched(entry: dict[str, Any]) -> bytes | None:
        try:
            return fetch(bucket, entry)
        except FileNotFoundError:
            return None  # it went since

    with ThreadPoolExecutor(options.connections, "kvortex-s3-look") as pool:
        for entries in _pages(bucket, options):
            for start in range(0, len(entries), options.connections):  # so many records are in memory at once
                some = entries[start : start + options.connections]
                for (_, name), found in zip(some, pool.map(fetched, [entry for entry, _ in some]), strict=True):
                    if found is not None:
                        yield name, found


def _pages(bucket: Bucket, options: S3Options) -> Iterator[list[tuple[dict[str, Any], Name]]]:
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
