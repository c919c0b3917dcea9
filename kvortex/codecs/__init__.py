"""What a record becomes on its way to slower memory, and back: docs/codecs.md."""

from __future__ import annotations

from kvortex.codecs.base import Codec
from kvortex.codecs.registry import CODECS, lossless_for, make_codec, written_by
from kvortex.codecs.shape import RecordShape
from kvortex.codecs.tables import Tables, calibrate

__all__ = ["CODECS", "Codec", "RecordShape", "Tables", "calibrate", "lossless_for", "make_codec", "written_by"]
