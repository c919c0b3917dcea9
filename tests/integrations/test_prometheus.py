"""Counters as Prometheus reads them: the engine's numbers, by direction and route, and nothing once it is gone."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from kvortex.devices import Device
from tests.pages import PagedCache, keys_of

client: Any = pytest.importorskip("prometheus_client")
from kvortex.integrations.prometheus import EngineCollector, prometheus_text  # noqa: E402


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels, as Prometheus' own reader sees them."""
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_the_numbers_are_the_engines(device: Device) -> None:
    with PagedCache.plain(device).engine(slots=3) as engine:
        engine.save_blocks(keys_of(1, 2, 3), [1, 2, 3]).wait()
        engine.save_blocks(keys_of(4), [4]).wait()
        engine.load_blocks(keys_of(4, 9), [5, 6]).wait()
        engine.check_blocks(keys_of(1, 4, 9))
        stats = engine.get_stats()
        seen = samples(prometheus_text(engine, {"rank": "3"}))
        rank = ("rank", "3")
        assert seen["kvortex_checked_blocks_total", (rank,)] == 3
        assert seen["kvortex_hit_blocks_total", (rank,)] == stats.hit_blocks > 0
        assert seen["kvortex_missed_blocks_total", (rank,)] == 1 and seen["kvortex_failed_blocks_total", (rank,)] == 0
        assert seen["kvortex_evictions_total", (rank,)] == 1
        assert seen["kvortex_slots", (rank, ("state", "capacity"))] == 3
        assert seen["kvortex_slots", (rank, ("state", "resident"))] == 3
        assert len(stats.routes) >= 2 and sum(entry.transfers for entry in stats.routes) == 3
        for entry in stats.routes:
            labels = (("direction", entry.direction), rank, ("route", entry.route))
            assert seen["kvortex_transfers_total", labels] == entry.transfers
            assert seen["kvortex_transfer_blocks_total", labels] == entry.blocks
            assert seen["kvortex_transfer_bytes_total", labels] == entry.nbytes > 0
            assert seen["kvortex_transfer_seconds_total", labels] == pytest.approx(entry.seconds)
        assert sum(entry.nbytes for entry in stats.routes if entry.direction == "save") == stats.saved_bytes


@pytest.mark.parametrize("how", ["shutdown", "drop"])
def test_an_engine_that_is_gone_has_no_numbers_and_stops_no_others(device: Device, how: str) -> None:
    registry = client.CollectorRegistry()
    cache = PagedCache.plain(device)
    engine, other = cache.engine(slots=3), cache.engine(slots=5)
    registry.register(EngineCollector(engine, {"engine": "a"}))
    registry.register(client.Gauge("other", "another library's", registry=None))
    assert 'kvortex_slots{engine="a",state="capacity"} 3.0' in client.generate_latest(registry).decode()
    if how == "shutdown":
        engine.shutdown()
    else:
        del engine
        gc.collect()
    text = client.generate_latest(registry).decode()
    assert "kvortex" not in text and "other 0.0" in text
    other.shutdown()
