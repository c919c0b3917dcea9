"""Redis and Valkey, one server or a cluster: a tier that a fleet shares."""

from __future__ import annotations

from kvortex.tiers.redis.options import RedisOptions
from kvortex.tiers.redis.tier import RedisTier
from kvortex.tiers.redis.tools import listing, purge, verify

__all__ = ["RedisOptions", "RedisTier", "listing", "purge", "verify"]
