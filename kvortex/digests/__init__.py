"""Digests of records: 128 bits, the same from a kernel that moves the bytes and from the host."""

from __future__ import annotations

from kvortex.digests.host import digest_records
from kvortex.digests.keys import DIGEST_BYTES

__all__ = ["DIGEST_BYTES", "digest_records"]
