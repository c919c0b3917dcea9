"""Counters: totals, and rates that are bytes over seconds of their own direction."""

from __future__ import annotations

from kvortex.stats import Counters, RouteStats
from kvortex.transfer.executor import Direction


def test_totals_and_rates() -> None:
    counters = Counters()
    counters.check(10, 4)
    counters.miss(6)
    counters.fail(2)
    counters.decline(7)
    counters.transfer(Direction.SAVE, "resident", 3, 300, 0.5)
    counters.transfer(Direction.SAVE, "mapped", 1, 100, 1.5)
    counters.transfer(Direction.LOAD, "mapped", 5, 500, 0.125)
    counters.transfer(Direction.LOAD, "mapped", 2, 200, 0.125)
    stats = counters.snapshot(evictions=5, resident=11, reserved=12, pinned=13, capacity=40)
    assert (stats.checked_blocks, stats.hit_blocks, stats.missed_blocks, stats.failed_blocks) == (10, 4, 6, 2)
    assert stats.declined_blocks == 7
    assert (stats.saved_blocks, stats.saved_bytes, stats.save_seconds) == (4, 400, 2.0)
    assert (stats.loaded_blocks, stats.loaded_bytes, stats.load_seconds) == (7, 700, 0.25)
    assert (stats.save_bytes_per_second, stats.load_bytes_per_second, stats.cache_hit_rate) == (200.0, 2800.0, 0.4)
    assert (stats.evictions, stats.resident_blocks, stats.reserved_blocks) == (5, 11, 12)
    assert (stats.pinned_blocks, stats.capacity_blocks) == (13, 40)
    assert stats.routes == (
        RouteStats("save", "resident", 1, 3, 300, 0.5),
        RouteStats("save", "mapped", 1, 1, 100, 1.5),
        RouteStats("load", "mapped", 2, 7, 700, 0.25),
    )


def test_before_anything_happened_all_rates_are_zero() -> None:
    stats = Counters().snapshot(0, 0, 0, 0, 1)
    assert (stats.save_bytes_per_second, stats.load_bytes_per_second, stats.cache_hit_rate) == (0.0, 0.0, 0.0)
