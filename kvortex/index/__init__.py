"""The host pool's index: which key lies in which slot, who holds it, and what goes next."""

from __future__ import annotations

from kvortex.errors import IndexStateError
from kvortex.index._lines import RESIDENT
from kvortex.index.core import DECLINED, NEW, PENDING
from kvortex.index.policies import ARC, LFU, LRU, POLICIES, S3FIFO, Policy
from kvortex.index.table import BlockIndex, IndexCounts, Reservation, load_compiled

__all__ = [
    "ARC",
    "DECLINED",
    "LFU",
    "LRU",
    "NEW",
    "PENDING",
    "POLICIES",
    "RESIDENT",
    "S3FIFO",
    "BlockIndex",
    "IndexCounts",
    "IndexStateError",
    "Policy",
    "Reservation",
    "load_compiled",
]
