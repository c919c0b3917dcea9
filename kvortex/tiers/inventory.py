"""What a store of objects holds of kvortex's: counted and checked without an engine.

Who knows the store yields what lies there. Records say themselves which namespace they are of, so all that share a store are
looked at.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvortex.codecs import CODECS
from kvortex.digests.host import add_lengths, add_part, numbers
from kvortex.tiers.base import Outcome
from kvortex.tiers.record import HEADER, HEADER_BYTES, Headers, RecordFormat

PIECE = 4 << 20  # bytes of a payload that are in memory at once: whatever has a record's name may be as large as it likes
_MOST_NAMED = 1000  # keys, or namespaces, in a report


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
        Hexadecimal, each with the number of its records; beyond a thousand, those of all others together.
    records, payload_bytes
        Whose headers check, and their payloads' bytes as the headers say.
    others
        What has a record's name and is none: damaged, foreign, or of another version.
    codecs
        Names, each with the number of its records. Of a block that was divided, each part is one.
    """

    namespaces: tuple[str, ...]
    records: int
    payload_bytes: int
    others: int
    codecs: tuple[str, ...] = ()


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
    codecs: collections.Counter[int] = collections.Counter()
    records = nbytes = others = 0
    for name, start in found:
        header = header_of(name, start)
        if header is None:
            others += 1
            continue
        space = header["namespace"].tobytes().hex()
        if space in counts or len(counts) < _MOST_NAMED:
            counts[space] += 1
        codecs[int(header["codec"][0])] += 1
        records += 1
        nbytes += int(header["payload_bytes"][0])
    spaces = [f"{space}: {count} records" for space, count in sorted(counts.items())]
    if rest := records - sum(counts.values()):
        spaces.append(f"others: {rest} records")
    return Listing(tuple(spaces), records, nbytes, others, by_codec(codecs))


def by_codec(counts: Mapping[int, int]) -> tuple[str, ...]:
    """Numbers of records by the numbers of codecs in their headers, in words, by name; a thousand codecs at most."""
    names = {kind.number: name for name, kind in CODECS.items()}
    some = itertools.islice(counts.items(), _MOST_NAMED)
    return tuple(sorted(f"{names.get(number, f'codec {number}')}: {count} records" for number, count in some))


def verify_records(found: Iterable[tuple[Name, Outcome]]) -> Verified:
    """From names, and what became of each: ``OK``, ``CORRUPT``, or ``MISS`` for what is not, or not wholly, there."""
    counts: collections.Counter[Outcome] = collections.Counter()
    wrong: list[str] = []
    for name, outcome in found:
        counts[outcome] += 1
        if outcome == Outcome.CORRUPT and len(wrong) < _MOST_NAMED:
            wrong.append(name.key.hex())
    return Verified(counts[Outcome.OK], counts[Outcome.CORRUPT], counts[Outcome.MISS], tuple(wrong))


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


def check_payload(header: Headers, pieces: Iterable[bytes | memoryview]) -> Outcome:
    """Whether pieces, one behind the other, are the payload that was stored under a header; ``MISS`` where they end too soon:
    it went meanwhile. What is there must be as long as the header says, which sizes what is computed with."""
    nbytes, done = int(header["payload_bytes"][0]), 0
    sums, fixed = np.zeros(2, np.uint64), numbers(nbytes)
    for piece in pieces:
        memory = np.frombuffer(piece, np.uint8)
        if done + len(memory) > nbytes:
            return Outcome.CORRUPT
        add_part(memory.ctypes.data, len(memory), done, sums, fixed)
        done += len(memory)
    if done < nbytes:
        return Outcome.MISS
    return Outcome.OK if (add_lengths(sums[None], [nbytes]) == header["digest"]).all() else Outcome.CORRUPT


def check_record(name: Name, record: bytes) -> Outcome:
    """What a record that is in memory as a whole is."""
    header = header_of(name, record)
    if header is None or len(record) != HEADER_BYTES + int(header["payload_bytes"][0]):
        return Outcome.CORRUPT
    return check_payload(header, [memoryview(record)[HEADER_BYTES:]])
