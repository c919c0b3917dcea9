"""S3 and what speaks its protocol: a tier of any size that a fleet shares."""

from __future__ import annotations

from kvortex.tiers.s3.options import S3Options
from kvortex.tiers.s3.tier import S3Tier
from kvortex.tiers.s3.tools import listing, purge, verify

__all__ = ["S3Options", "S3Tier", "listing", "purge", "verify"]
