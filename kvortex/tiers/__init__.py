"""Tiers below host RAM: where records rest on disk and in stores that machines share."""

from __future__ import annotations

from kvortex.tiers.base import Call, Outcome, Tier
from kvortex.tiers.breaker import BreakerOptions
from kvortex.tiers.codec_metrics import CodecStats
from kvortex.tiers.metrics import OperationStats, TierStats
from kvortex.tiers.options import TierOptions
from kvortex.tiers.promotion import Prefetch
from kvortex.tiers.record import HEADER, HEADER_BYTES, RecordFormat

__all__ = [
    "HEADER",
    "HEADER_BYTES",
    "BreakerOptions",
    "Call",
    "CodecStats",
    "OperationStats",
    "Outcome",
    "Prefetch",
    "RecordFormat",
    "Tier",
    "TierOptions",
    "TierStats",
]
