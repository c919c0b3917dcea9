"""An engine's counters for Prometheus. Needs the extra ``metrics``.

To serve them beside an application's own::

    from prometheus_client import REGISTRY, start_http_server
    from kvortex.integrations.prometheus import EngineCollector

    REGISTRY.register(EngineCollector(engine))
    start_http_server(9400)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvortex.engine import KVortexEngine
from kvortex.errors import EngineClosedError
from kvortex.integrations.tier_metrics import families
from kvortex.stats import EngineStats

_COUNTERS = {
    "checked_blocks": "Keys asked for by check_blocks.",
    "hit_blocks": "Keys asked for by check_blocks that were there.",
    "missed_blocks": "Keys asked for by load_blocks that were not there.",
    "overlong_blocks": "Blocks of saves that the codec could not bring into a slot.",
    "declined_blocks": "Keys offered by save_blocks that were not stored, for want of offers.",
    "failed_blocks": "Blocks of transfers that the device failed.",
    "corrupt_blocks": "Blocks that a load found to be others than were saved, by their digests.",
    "evictions": "Blocks that made room for others.",
}
_ROUTE_COUNTERS = {
    "transfers": ("kvortex_transfers", "Transfers that went well."),
    "blocks": ("kvortex_transfer_blocks", "Blocks that moved."),
    "nbytes": ("kvortex_transfer_bytes", "Payload bytes that moved."),
    "seconds": ("kvortex_transfer_seconds", "Device-timed seconds of transfers, summed."),
}
_SLOTS = ("resident", "reserved", "pinned", "capacity")


class EngineCollector(Collector):
    """Reads an engine's counters whenever it is asked; costs nothing in between.

    Parameters
    ----------
    engine
        Is not kept alive. Once it is gone or was shut down, there is nothing to collect.
    labels
        Put on every sample, to tell several engines of one process apart: ``{"rank": "0"}``.
    """

    def __init__(self, engine: KVortexEngine, labels: Mapping[str, str] | None = None) -> None:
        self._engine = weakref.ref(engine)
        self._names, self._values = list(labels or {}), list((labels or {}).values())

    def collect(self) -> Iterator[Metric]:
        """One family a counter; transfers carry the labels ``direction`` and ``route``, and what tiers did ``tier``."""
        engine = self._engine()
        try:
            stats = engine.get_stats() if engine is not None else None
        except EngineClosedError:
            stats = None
        if stats is not None:
            yield from self._families(stats)

    def _families(self, stats: EngineStats) -> Iterator[Metric]:
        for field, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"kvortex_{field}", text, labels=self._names)
            counter.add_metric(self._values, getattr(stats, field))
            yield counter
        for field, (name, text) in _ROUTE_COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=[*self._names, "direction", "route"])
            for entry in stats.routes:
                counter.add_metric([*self._values, entry.direction, entry.route], getattr(entry, field))
            yield counter
        slots = GaugeMetricFamily("kvortex_slots", "Slots of the pool, by state.", labels=[*self._names, "state"])
        for state in _SLOTS:
            slots.add_metric([*self._values, state], getattr(stats, f"{state}_blocks"))
        yield slots
        yield from families(stats.tiers, self._names, self._values)


def prometheus_text(engine: KVortexEngine, labels: Mapping[str, str] | None = None) -> str:
    """The engine's counters in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(engine, labels))
    return generate_latest(registry).decode()
