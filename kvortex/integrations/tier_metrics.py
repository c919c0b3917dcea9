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
    yield from _of_codecs(tiers, [*names, "tier", "codec"], list(values))


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


def _of_codecs(tiers: Sequence[TierStats], names: list[str], values: list[str]) -> Iterator[Metric]:
    """Of tiers whose records are coded; nothing where none has such."""
    coded = [(tier.tier, tier.codec) for tier in tiers if tier.codec is not None]
    if not coded:
        return
    blocks = CounterMetricFamily("kvortex_tier_codec_blocks", "Blocks that were coded, or decoded.", labels=[*names, "op"])
    text = "Bytes of these blocks, before and after."
    moved = CounterMetricFamily("kvortex_tier_codec_bytes", text, labels=[*names, "op", "side"])
    seconds = CounterMetricFamily("kvortex_tier_codec_seconds", "Time that took a tier's threads.", labels=[*names, "op"])
    text = "Blocks that could not be coded or decoded, by cause; none was handed out."
    refused = CounterMetricFamily("kvortex_tier_codec_refused", text, labels=[*names, "cause"])
    for tier, stats in coded:
        for op, did in (("encode", "encoded"), ("decode", "decoded")):
            labels = [*values, tier, stats.codec, op]
            blocks.add_metric(labels, getattr(stats, f"{did}_blocks"))
            seconds.add_metric(labels, getattr(stats, f"{op}_seconds"))
            for side in ("from", "to"):
                moved.add_metric([*labels, side], getattr(stats, f"{did}_{side}_bytes"))
        for cause, count in stats.refused.items():
            refused.add_metric([*values, tier, stats.codec, cause], count)
    yield from (blocks, moved, seconds, refused)
