"""A record as every tier stores it: a header that says what it is, and the payload.

The header is 144 bytes, little-endian: magic, version, header length, codec, payload and block length, namespace, key,
digest of the payload, generation, 8 bytes of zeros, and a digest of all that. What does not check is a miss: a foreign or
truncated object, an older version, another namespace, another key.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvortex.digests import digest_records
from kvortex.keys import KeyArray
from kvortex.tiers.base import Digests, Int64s, Outcome, Outcomes

MAGIC = np.frombuffer(b"KVXRECRD", "<u8")[0]
VERSION = 1
HEADER = np.dtype(
    [
        ("magic", "<u8"),
        ("version", "<u2"),
        ("header_bytes", "<u2"),
        ("codec", "<u4"),
        ("payload_bytes", "<u8"),
        ("block_bytes", "<u8"),
        ("namespace", "u1", 32),
        ("key", "u1", 32),
        ("digest", "u1", 16),
        ("generation", "<u8"),
        ("zero", "<u8"),
        ("check", "u1", 16),
    ]
)
HEADER_BYTES = HEADER.itemsize
CHECKED_BYTES: int = HEADER.fields["check"][1]  # type: ignore[index]
_START = struct.Struct("<QHHIQQ32s32s16sQQ")
RAW = 0  # the codec of what is stored as it lies in a slot
Headers = npt.NDArray[np.void]


@dataclass(frozen=True)
class RecordFormat:
    """What all records of one engine have in common.

    Parameters
    ----------
    namespace
        32 bytes: engines whose records mean different things differ here.
    most_bytes
        Of a payload.
    codec
        Number of the codec that made the payloads; records of another are a ``MISS``. None takes any, for who only looks.
    block_bytes
        Of a block before a codec made a payload of it; None for ``RAW``, whose payload is the block.
    usual_bytes
        Of most payloads, where these differ in length: what a tier with slots of one size is to reserve. Whoever has a longer
        one divides it (:attr:`kvortex.tiers.Tier.most_bytes`). None for ``most_bytes``.
    foreign
        Told of how many records were found that are whole, and of these keys, and that another codec made.
    """

    namespace: bytes
    most_bytes: int
    codec: int | None = RAW
    block_bytes: int | None = None
    usual_bytes: int | None = None
    foreign: Callable[[int], None] | None = field(default=None, compare=False, repr=False)

    def headers(self, keys: KeyArray, sizes: Int64s, digests: Digests, generation: npt.ArrayLike = 0) -> Headers:
        """(n,) HEADER for n records of (n,) bytes."""
        found = np.zeros(len(keys), HEADER)
        found["magic"], found["version"], found["header_bytes"] = MAGIC, VERSION, HEADER_BYTES
        found["codec"] = self.codec or RAW
        found["payload_bytes"] = sizes
        found["block_bytes"] = sizes if self.block_bytes is None else self.block_bytes
        found["namespace"] = np.frombuffer(self.namespace, np.uint8)
        found["key"], found["digest"], found["generation"] = keys, digests, generation
        found["check"] = _checks(found)
        return found

    def start_of_header(self, key: bytes, size: int, digest: bytes, generation: int) -> bytes:
        """The first :data:`CHECKED_BYTES` of the header of one record, which its check is of: as :meth:`headers` makes them, in
        a fiftieth of the time."""
        block = size if self.block_bytes is None else self.block_bytes
        ours = (int(MAGIC), VERSION, HEADER_BYTES, self.codec or RAW, size, block, self.namespace)
        return _START.pack(*ours, key, digest, generation, 0)

    def check_headers(self, headers: Headers, keys: KeyArray) -> Outcomes:
        """(n,) uint8: ``OK`` where a header says that the payload behind it is the key's, ``CORRUPT`` where it does not
        check, else ``MISS``.

        Parameters
        ----------
        headers : (n,) HEADER
            As they were read. Bytes that were not there may be anything.
        keys : (n, 32) uint8
        """
        ours = (headers["magic"] == MAGIC) & (headers["version"] == VERSION) & (headers["header_bytes"] == HEADER_BYTES)
        whole = (headers["check"] == _checks(headers)).all(1)
        mine = (headers["namespace"] == np.frombuffer(self.namespace, np.uint8)).all(1) & (headers["key"] == keys).all(1)
        fits = headers["payload_bytes"] <= self.most_bytes
        if self.codec is not None:
            block = headers["payload_bytes"] if self.block_bytes is None else self.block_bytes
            same = headers["codec"] == self.codec
            if self.foreign is not None and (others := int((ours & whole & mine & ~same).sum())):
                self.foreign(others)
            fits &= same & (headers["block_bytes"] == block)
        found = np.where(mine & fits, Outcome.OK, Outcome.MISS)
        return np.where(ours, np.where(whole, found, Outcome.CORRUPT), Outcome.MISS).astype(np.uint8)


def _checks(headers: Headers) -> Digests:
    at = headers.ctypes.data + HEADER_BYTES * np.arange(len(headers))
    found = np.empty((len(headers), 16), np.uint8)
    digest_records(at, np.full(len(headers), CHECKED_BYTES), found)
    return found


def check_payloads(addresses: Int64s, sizes: Int64s, digests: Digests) -> npt.NDArray[np.bool_]:
    """(n,) bool: which payloads in host memory have the digest that they are said to have."""
    found = np.empty((len(addresses), 16), np.uint8)
    digest_records(addresses, sizes, found)
    return np.asarray((found == digests).all(1))
