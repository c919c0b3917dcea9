"""The first two pages of a slab, which are the same twice: whose it is, how it is divided, and how it was left.

112 bytes, little-endian, zeros to the end of the page: magic, version, length, bytes of a slot, slots, namespace, store id
(random, of the slab), session (counts openings), whether it was closed, and a digest of all that.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import numpy as np

from kvortex.digests import digest_records
from kvortex.tiers.disk.pages import PAGE

SUPERBLOCK = np.dtype(
    [
        ("magic", "<u8"),
        ("version", "<u4"),
        ("bytes", "<u4"),
        ("slot_bytes", "<u8"),
        ("slots", "<u8"),
        ("namespace", "u1", 32),
        ("store", "u1", 16),
        ("session", "<u8"),
        ("closed", "<u8"),
        ("check", "u1", 16),
    ]
)
MAGIC = int.from_bytes(b"KVXSLAB0", "little")
VERSION = 1
COPIES = 2


@dataclass(frozen=True)
class Superblock:
    """What both copies say; see the module."""

    slot_bytes: int
    slots: int
    namespace: bytes
    store: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    session: int = 0
    closed: bool = False

    def page(self) -> bytes:
        """One copy."""
        raw = np.zeros(1, SUPERBLOCK)
        raw["magic"], raw["version"], raw["bytes"] = MAGIC, VERSION, SUPERBLOCK.itemsize
        raw["slot_bytes"], raw["slots"] = self.slot_bytes, self.slots
        raw["namespace"], raw["store"] = np.frombuffer(self.namespace, np.uint8), np.frombuffer(self.store, np.uint8)
        raw["session"], raw["closed"] = self.session, self.closed
        raw["check"] = np.frombuffer(digest_of(raw.tobytes()[:-16]), np.uint8)
        return raw.tobytes().ljust(PAGE, b"\0")


def read(pages: bytes) -> Superblock | None:
    """The newer of the copies that check; None where none does."""
    found = [_read(pages[at * PAGE : (at + 1) * PAGE]) for at in range(COPIES)]
    return max((each for each in found if each is not None), key=lambda each: (each.session, each.closed), default=None)


def _read(page: bytes) -> Superblock | None:
    if len(page) < SUPERBLOCK.itemsize:
        return None
    raw = np.frombuffer(page, SUPERBLOCK, 1)[0]
    ours = (int(raw["magic"]), int(raw["version"]), int(raw["bytes"])) == (MAGIC, VERSION, SUPERBLOCK.itemsize)
    if not ours or raw["check"].tobytes() != digest_of(raw.tobytes()[:-16]):
        return None
    namespace, store = raw["namespace"].tobytes(), raw["store"].tobytes()
    return Superblock(
        int(raw["slot_bytes"]), int(raw["slots"]), namespace, store, int(raw["session"]), bool(raw["closed"])
    )


def digest_of(data: bytes) -> bytes:
    """The 16 bytes that records have too."""
    array = np.frombuffer(data, np.uint8)
    out = np.empty((1, 16), np.uint8)
    digest_records(np.array([array.ctypes.data]), np.array([len(data)]), out)
    return out.tobytes()
