"""Records on local drives: bounded, checked, and found again after a restart, however the process ended."""

from __future__ import annotations

from kvortex.tiers.disk.options import DiskOptions
from kvortex.tiers.disk.tier import DiskTier
from kvortex.tiers.disk.tools import Listing, Verified, listing, purge, verify

__all__ = ["DiskOptions", "DiskTier", "Listing", "Verified", "listing", "purge", "verify"]
