"""What a store of objects holds of kvortex's: counted and checked without an engine.

Who knows the store yields what lies there. Records say themselves which namespace they are of, so all that share a store are
looked at.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvortex.tiers.base import Outcome
from kvortex.tiers.record import HEADER, HEADER_BYTES, Headers, RecordFormat, check_payloads

_MOST_KEYS = 1000  # that a report names


class Name(NamedTuple):
    """What a record is called in the store, as its key and as the beginning of its namespace; bytes."""

    namespace: bytes
    key: bytes


@dataclass(frozen=True)
class Listing:
    """What a store holds.

    Parameters
    ----------
    namespaces
        Hexadecimal, each with the number of its records.
    records, payload_bytes
        Whose headers check, and their payloads' bytes as the headers say.
    others
        What has a record's name and is none: damaged, foreign, or of another version.
    """

    namespaces: tuple[str, ...]
    records: int
    payload_bytes: int
    others: int


@dataclass(frozen=True)
class Verified:
    """What reading every record of a store found.

    Parameters
    ----------
    right, corrupt
        Records whose payloads are what was stored, and those that are not, headers that do not check among them.
    incomplete
        Records of which the server has dropped a part, or that went while they were read: misses, which do no harm.
    keys
        Of those that are corrupt (hexadecimal), a thousand at most.
    """

    right: int
    corrupt: int
    incomplete: int
    keys: tuple[str, ...]


def list_records(found: Iterable[tuple[Name, bytes]]) -> Listing:
    """From names and the first bytes of what they name, at least a header's."""
    counts: collections.Counter[str] = collections.Counter()
    nbytes = others = 0
    for name, start in found:
        header = header_of(name, start)
        if header is None:
            others += 1
            continue
        counts[header["namespace"].tobytes().hex()] += 1
        nbytes += int(header["payload_bytes"][0])
    spaces = tuple(f"{space}: {count} records" for space, count in sorted(counts.items()))
    return Listing(spaces, sum(counts.values()), nbytes, others)


def verify_records(found: Iterable[tuple[Name, bytes, bytes | None]]) -> Verified:
    """From names, headers and payloads; None for a payload that is not, or not wholly, there."""
    right = incomplete = 0
    wrong: list[str] = []
    for name, start, payload in found:
        header = header_of(name, start)
        if header is not None and payload is None:
            incomplete += 1
        elif header is not None and payload is not None and is_whole(header, payload):
            right += 1
        else:
            wrong.append(name.key.hex())
    return Verified(right, len(wrong), incomplete, tuple(wrong[:_MOST_KEYS]))


def header_of(name: Name, start: bytes) -> Headers | None:
    """(1,) HEADER of what begins so, None where it is no record of that name."""
    if len(start) < HEADER_BYTES:
        return None
    header = np.frombuffer(start[:HEADER_BYTES], HEADER)
    space, key = header["namespace"].tobytes(), header["key"].tobytes()
    if key != name.key or not space.startswith(name.namespace):
        return None
    form = RecordFormat(space, int(header["payload_bytes"][0]), int(header["codec"][0]), int(header["block_bytes"][0]))
    return header if form.check_headers(header, np.ascontiguousarray(header["key"]))[0] == Outcome.OK else None


def is_whole(header: Headers, payload: bytes) -> bool:
    """Whether a payload is the one that was stored under this header."""
    if len(payload) != int(header["payload_bytes"][0]):
        return False
    memory = np.frombuffer(payload, np.uint8)
    where = np.array([memory.ctypes.data if len(memory) else 0])
    return bool(check_payloads(where, np.array([len(memory)]), np.ascontiguousarray(header["digest"]))[0])
