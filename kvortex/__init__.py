"""kvortex: paged KV-cache blocks between VRAM and pinned RAM, as fast as the link allows.

Everything public is here and is imported when it is first asked for: ``import kvortex`` alone loads neither NumPy nor
Numba and touches no GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvortex.config import KVortexConfig
    from kvortex.devices import Device, HostStream, open_device
    from kvortex.engine import KVortexEngine
    from kvortex.errors import (
        ArgumentError,
        BuildError,
        CodecError,
        CodecWarning,
        ConfigError,
        CorruptBlocksError,
        DeviceError,
        DeviceUnavailableError,
        EngineClosedError,
        IndexStateError,
        KVortexError,
        LayersMissingError,
        LayoutError,
        PinnedMemoryError,
        PoolFullError,
        PoolTimeoutError,
        ReentrantCallError,
        TraceError,
        TransferError,
        TransferTimeoutError,
    )
    from kvortex.layout import KVLayout, TensorSpec, blocks_of_slots, slot_mapping
    from kvortex.stats import EngineStats
    from kvortex.traces.recording import Recording
    from kvortex.transfer.ticket import Ticket

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BuildError",
    "CodecError",
    "CodecWarning",
    "ConfigError",
    "CorruptBlocksError",
    "Device",
    "DeviceError",
    "DeviceUnavailableError",
    "EngineClosedError",
    "EngineStats",
    "HostStream",
    "IndexStateError",
    "KVLayout",
    "KVortexConfig",
    "KVortexEngine",
    "KVortexError",
    "LayersMissingError",
    "LayoutError",
    "PinnedMemoryError",
    "PoolFullError",
    "PoolTimeoutError",
    "Recording",
    "ReentrantCallError",
    "TensorSpec",
    "Ticket",
    "TraceError",
    "TransferError",
    "TransferTimeoutError",
    "blocks_of_slots",
    "open_device",
    "slot_mapping",
]

_HOMES = {
    "Device": "kvortex.devices",
    "EngineStats": "kvortex.stats",
    "HostStream": "kvortex.devices",
    "KVLayout": "kvortex.layout",
    "KVortexConfig": "kvortex.config",
    "KVortexEngine": "kvortex.engine",
    "Recording": "kvortex.traces.recording",
    "TensorSpec": "kvortex.layout",
    "Ticket": "kvortex.transfer.ticket",
    "blocks_of_slots": "kvortex.layout",
    "open_device": "kvortex.devices",
    "slot_mapping": "kvortex.layout",
}

if not TYPE_CHECKING:  # a type checker would take this for a promise of every name

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module 'kvortex' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES.get(name, "kvortex.errors")), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
