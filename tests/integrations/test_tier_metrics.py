"""What tiers did, as Prometheus reads it: the numbers of ``get_stats``, and none without tiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.devices import HostDevice
from kvortex.tiers.memory import MemoryStore
from kvortex.tiers.record import HEADER, HEADER_BYTES, RecordFormat
from tests.engine.coded import Coded
from tests.engine.tiered import Tiers, save, until
from tests.integrations.test_prometheus import samples
from tests.pages import PagedCache, keys_of
from tests.tiers.resigned import signed

client: Any = pytest.importorskip("prometheus_client")
from kvortex.integrations.prometheus import prometheus_text  # noqa: E402


def test_the_numbers_are_those_of_the_tiers() -> None:
    cache = PagedCache.plain(HostDevice())
    tiers = Tiers(MemoryStore(1 << 20), MemoryStore(), breaker={"failures": 1, "pause_s": 60.0})
    with cache.engine(slots=4, tiers=tiers.config) as engine:
        for key in range(6):
            save(engine, cache, keys_of(key), [key])
            assert engine.flush(5.0)
        assert engine.prefetch(keys_of(0)).wait().all() and not engine.prefetch(keys_of(99)).wait().any()
        tiers[1].plan = lambda _: "raise"
        engine.prefetch(keys_of(98)).wait()
        until(lambda: engine.get_stats().tiers[1].breaker == "open")
        save(engine, cache, keys_of(50), [9])
        assert engine.flush(5.0)
        stats = engine.get_stats()
        seen = samples(prometheus_text(engine, {"rank": "0"}))
        assert stats.tiers[0].promoted_blocks == 1 and stats.tiers[1].errors == {"OSError": 1}
        for tier in stats.tiers:
            labels = (("rank", "0"), ("tier", tier.tier))
            for entry in tier.operations:
                op = (("op", entry.operation), *labels)
                for result, count in entry.outcomes.items():
                    key = "kvortex_tier_requests_total", tuple(sorted((*op, ("result", result))))
                    assert seen[key] == count > 0
                assert seen["kvortex_tier_bytes_total", op] == entry.nbytes
                assert seen["kvortex_tier_op_seconds_count", op] == entry.calls > 0
                assert seen["kvortex_tier_op_seconds_sum", op] == pytest.approx(entry.seconds)
                buckets = [key for key in seen if key[0] == "kvortex_tier_op_seconds_bucket" and set(op) < set(key[1])]
                bounds = {dict(key[1])["le"]: seen[key] for key in buckets}
                assert len(bounds) == len(entry.histogram) and max(bounds.values()) == bounds["+Inf"] == entry.calls
            for kind, count in tier.errors.items():
                assert seen["kvortex_tier_errors_total", (("kind", kind), *labels)] == count
            for reason, count in tier.dropped.items():
                assert seen["kvortex_tier_stores_dropped_total", tuple(sorted((*labels, ("reason", reason))))] == count
            assert seen["kvortex_tier_evictions_total", labels] == tier.evictions
            assert seen["kvortex_tier_corrupt_total", labels] == tier.corrupt
            assert seen["kvortex_tier_used_bytes", labels] == tier.used_bytes
            assert seen["kvortex_tier_queue_depth", labels] == 0
            assert seen.get(("kvortex_tier_capacity_bytes", labels)) == tier.capacity_bytes
            assert seen["kvortex_tier_breaker_state", labels] == {"closed": 0, "open": 2}[tier.breaker]
        assert {tier.breaker for tier in stats.tiers} == {"closed", "open"} and stats.tiers[1].dropped["breaker"] == 1


def test_without_tiers_there_are_no_such_families() -> None:
    with PagedCache.plain(HostDevice()).engine() as engine:
        assert "kvortex_tier" not in prometheus_text(engine)


def test_what_coding_did(tmp_path: Path) -> None:
    coded, store, keys = Coded.make(tmp_path), MemoryStore(), keys_of(1, 2)
    tiers = Tiers(store, codec="cachegen", write_timeout_s=20.0, read_timeout_s=20.0).config
    with coded.engine("raw", tiers=tiers) as engine:
        assert engine.save_blocks(keys, [1, 2], first=False).wait().all() and engine.flush()
    name, record = next(iter(store.objects.items()))
    header = np.frombuffer(record[:HEADER_BYTES], HEADER)[0]
    other = RecordFormat(header["namespace"].tobytes(), 1 << 20, 1, coded.shape.raw_bytes)
    store.put(name, signed(other, header["key"], record[HEADER_BYTES:]))
    with coded.engine("raw", tiers=tiers) as engine:
        assert engine.save_blocks(keys_of(3), [3], first=False).wait().all() and engine.flush()
        engine.prefetch(keys, first=False).wait()
        stats = engine.get_stats().tiers[0].codec
        seen = samples(prometheus_text(engine))
    assert stats is not None and stats.encoded_blocks == stats.decoded_blocks == 1
    labels = {"tier": "memory", "codec": "cachegen"}
    for op, did in (("encode", "encoded"), ("decode", "decoded")):
        key = tuple(sorted({**labels, "op": op}.items()))
        assert seen["kvortex_tier_codec_blocks_total", key] == getattr(stats, f"{did}_blocks")
        assert seen["kvortex_tier_codec_seconds_total", key] == getattr(stats, f"{op}_seconds") > 0
        for side in ("from", "to"):
            key = tuple(sorted({**labels, "op": op, "side": side}.items()))
            assert seen["kvortex_tier_codec_bytes_total", key] == getattr(stats, f"{did}_{side}_bytes") > 0
    assert stats.refused == {"codec": 1}
    assert seen["kvortex_tier_codec_refused_total", tuple(sorted({**labels, "cause": "codec"}.items()))] == 1


def test_tiers_that_are_not_coded_have_no_such_families() -> None:
    with PagedCache.plain(HostDevice()).engine(tiers=Tiers(MemoryStore()).config) as engine:
        assert "kvortex_tier_requests" in (text := prometheus_text(engine)) and "kvortex_tier_codec" not in text
