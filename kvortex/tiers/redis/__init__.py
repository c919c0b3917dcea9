"""Redis and Valkey, one server or a cluster: a tier that a fleet shares."""

from __future__ import annotations

from kvortex.tiers.redis.options import RedisOptions
from kvortex.tiers.redis.tier import RedisTier

__all__ = ["RedisOptions", "RedisTier"]
