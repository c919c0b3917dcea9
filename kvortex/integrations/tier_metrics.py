"""What tiers below RAM did, as families of Prometheus."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from kvortex.tiers.metrics import BUCKETS, TierStats

_STATES = {"closed": 0, "half_open": 1, "open": 2}
_BOUNDS = [*map(repr, BUCKETS), "+Inf"]


def families(tiers: Sequence[TierStats], names: Sequence[str], values: Sequence[str]) -> Iterator[Metric]:
    """One family a metric, with a label ``tier``; nothing where there are no tiers.

    Parameters
    ----------
    tiers
    names, values
        Labels that every sample gets.
    """
    if not tiers:
        return
    yield from _of_calls(tiers, [*names, "tier"], list(values))
    yield from _of_tiers(tiers, [*names, "tier"], list(values))


def _of_calls(tiers: Sequence[TierStats], names: list[str], values: list[str]) -> Iterator[Metric]:
    requests = CounterMetricFamily("kvortex_tier_requests", "Keys by outcome.", labels=[*names, "op", "result"])
    moved = CounterMetricFamily("kvortex_tier_bytes", "Payload bytes that went well.", labels=[*names, "op"])
    seconds = HistogramMetricFamily("kvortex_tier_op_seconds", "Duration of calls.", labels=[*names, "op"])
    for tier in tiers:
        for entry in tier.operations:
            labels = [*values, tier.tier, entry.operation]
            for result, count in entry.outcomes.items():
                requests.add_metric([*labels, result], count)
            moved.add_metric(labels, entry.nbytes)
            up_to = zip(_BOUNDS, map(float, itertools.accumulate(entry.histogram)), strict=True)
            seconds.add_metric(labels, list(up_to), entry.seconds)
    yield from (requests, moved, seconds)


def _of_tiers(tiers: Sequence[TierStats], names: list[str], values: list[str]) -> Iterator[Metric]:
    for name, text, label, counts in (
        ("errors", "Calls that failed, by cause.", "kind", [tier.errors for tier in tiers]),
        ("stores_dropped", "Blocks that were not stored, by reason.", "reason", [tier.dropped for tier in tiers]),
    ):
        counter = CounterMetricFamily(f"kvortex_tier_{name}", text, labels=[*names, label])
        for tier, by_label in zip(tiers, counts, strict=True):
            for value, count in by_label.items():
                counter.add_metric([*values, tier.tier, value], count)
        yield counter
    for name, text, field in (
        ("evictions", "Records that made room for others.", "evictions"),
        ("corrupt", "Records that were not what was stored; none was handed out.", "corrupt"),
        ("promoted_blocks", "Blocks brought into RAM.", "promoted_blocks"),
        ("breaker_trips", "How often the breaker opened.", "breaker_trips"),
    ):
        counter = CounterMetricFamily(f"kvortex_tier_{name}", text, labels=names)
        for tier in tiers:
            counter.add_metric([*values, tier.tier], getattr(tier, field))
        yield counter
    for name, text, field in (
        ("used_bytes", "Bytes of what is stored, headers and padding included.", "used_bytes"),
        ("capacity_bytes", "The most that may be stored.", "capacity_bytes"),
        ("queue_depth", "Blocks that wait to be written, or are being written.", "queue_blocks"),
        ("queue_bytes", "Their bytes.", "queue_bytes"),
    ):
        gauge = GaugeMetricFamily(f"kvortex_tier_{name}", text, labels=names)
        for tier in tiers:
            if getattr(tier, field) is not None:
                gauge.add_metric([*values, tier.tier], getattr(tier, field))
        yield gauge
    state = GaugeMetricFamily("kvortex_tier_breaker_state", "0: closed, 1: half open, 2: open.", labels=names)
    for tier in tiers:
        state.add_metric([*values, tier.tier], _STATES[tier.breaker])
    yield state
