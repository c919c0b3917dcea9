"""What stands before a coded record in a tier: whose slot it was made of, and which part of it this is.

64 bytes, little-endian, the beginning of a payload as tiers keep it (:mod:`kvortex.tiers.record`), whose digest guards them
too: magic, version, whether every bit comes back, number of this part, number of parts, number of the codec, bytes of what
the slot held, bytes of the coded record over all its parts, digest of what the slot held, and, where there are several
parts, the digest of the coded record. Behind it are the bytes of the part.

A tier with slots of one size keeps what is longer in several parts, each a record under a key of its own; the first has
the block's.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.codecs import Codec
from kvortex.codecs.base import EXACT, HEADER
from kvortex.codecs.base import HEADER_BYTES as CODEC_HEADER_BYTES
from kvortex.keys import KeyArray
from kvortex.tiers.base import Digests, Int64s

MAGIC = int.from_bytes(b"KVXT", "little")
VERSION = 1
ENVELOPE = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("exact", "<u2"),
        ("part", "<u2"),
        ("parts", "<u2"),
        ("codec", "<u4"),
        ("slot_bytes", "<u8"),
        ("coded_bytes", "<u8"),
        ("digest", "u1", 16),
        ("whole", "u1", 16),
    ]
)
ENVELOPE_BYTES = ENVELOPE.itemsize
Envelopes = npt.NDArray[np.void]
Flags = npt.NDArray[np.bool_]


def make(own: Codec, slot_bytes: int, coded: Int64s, exact: Flags, digests: Digests, parts: Int64s) -> Envelopes:
    """(n,) ENVELOPE of first parts."""
    found = np.zeros(len(coded), ENVELOPE)
    found["magic"], found["version"], found["codec"] = MAGIC, VERSION, own.number
    found["exact"], found["parts"] = exact, parts
    found["slot_bytes"], found["coded_bytes"], found["digest"] = slot_bytes, coded, digests
    return found


def causes(seen: Envelopes, sizes: Int64s, own: Codec, slot_bytes: int, each: int, begins: Flags | None) -> list[str]:
    """Why first parts are none of a record of ``own``; empty for those that are.

    Parameters
    ----------
    seen, sizes
        What was read, and the bytes of each payload, at least those of an envelope.
    own, slot_bytes
        The tier's codec, and bytes of what slots hold.
    each
        Bytes of a part behind its envelope, at most.
    begins
        Which were asked for exactly; None where nothing is lost.
    """
    coded = seen["coded_bytes"]
    right = (coded > 0) & (coded <= own.worst_bytes) & (seen["slot_bytes"] == slot_bytes)
    parts = -(-np.where(right, coded, 0).astype(np.int64) // each)
    first = np.minimum(np.where(right, coded, 0).astype(np.int64), each)
    right &= (seen["parts"] == parts) & (seen["part"] == 0) & (sizes == ENVELOPE_BYTES + first)
    found = np.full(len(seen), "", object)
    if begins is not None:
        found[begins & (seen["exact"] != 1)] = "kind"
    found[(seen["exact"] > 1) | (own.exact & (seen["exact"] != 1))] = "envelope"
    found[~right] = "length"
    found[seen["codec"] != own.number] = "codec"
    found[(seen["magic"] != MAGIC) | (seen["version"] != VERSION)] = "envelope"
    return list(found)


def is_exact(own: Codec, coded: Any) -> Flags:
    """(n,) bool: which coded records, (n, room) uint8, give every bit back."""
    if own.exact:
        return np.ones(len(coded), np.bool_)
    return np.asarray(headers_of(coded)["stored"] == EXACT)


def is_of(own: Codec, coded: Any, sizes: Int64s) -> Flags:
    """(n,) bool: which coded records say that they are of this codec, version, parameters and tables. Raw ones say nothing."""
    if not own.digest:
        return np.ones(len(coded), np.bool_)
    seen, header = headers_of(coded), own.header[0]
    same = np.asarray((seen["digest"] == header["digest"]).all(1) & (sizes >= CODEC_HEADER_BYTES))
    for name in ("magic", "codec", "version", "raw_bytes"):
        same &= seen[name] == header[name]
    return same


def headers_of(coded: Any) -> npt.NDArray[np.void]:
    """(n,) HEADER of coded records, (n, room) uint8, copied."""
    return np.ascontiguousarray(coded[:, :CODEC_HEADER_BYTES]).view(HEADER)[:, 0]


def part_keys(namespace: bytes, key: npt.NDArray[np.uint8], parts: int) -> KeyArray:
    """(parts - 1, 32) uint8: the keys of all parts but the first, SHA-256 of a tag, namespace, key and the part's number."""
    start = b"kvortex-tier-part-1" + namespace + key.tobytes()
    made = b"".join(hashlib.sha256(start + part.to_bytes(2, "little")).digest() for part in range(1, parts))
    return np.frombuffer(bytearray(made), np.uint8).reshape(-1, 32)
