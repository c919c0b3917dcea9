"""The host pool's index: which key lies in which slot, who holds it, and what goes next."""

from __future__ import annotations

from kvortex.errors import IndexStateError
from kvortex.index.core import NEW, PENDING, RESIDENT
from kvortex.index.policies import LRU, POLICIES, Policy
from kvortex.index.table import BlockIndex, IndexCounts, Reservation, load_compiled

__all__ = [
    "LRU",
    "NEW",
    "PENDING",
    "POLICIES",
    "RESIDENT",
    "BlockIndex",
    "IndexCounts",
    "IndexStateError",
    "Policy",
    "Reservation",
    "load_compiled",
]
