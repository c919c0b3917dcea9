"""Where KV blocks are in memory: from arrays of any library to fragments of bytes, and tokens to slots."""

from __future__ import annotations

from kvortex.layout.layout import KVLayout
from kvortex.layout.slots import blocks_of_slots, slot_mapping
from kvortex.layout.tensors import TensorSpec

__all__ = ["KVLayout", "TensorSpec", "blocks_of_slots", "slot_mapping"]
