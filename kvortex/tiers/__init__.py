"""Tiers below host RAM: where records rest on disk and in stores that machines share."""

from __future__ import annotations

from kvortex.tiers.base import Call, Outcome, Tier
from kvortex.tiers.record import HEADER, HEADER_BYTES, RecordFormat

__all__ = ["HEADER", "HEADER_BYTES", "Call", "Outcome", "RecordFormat", "Tier"]
