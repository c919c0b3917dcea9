"""What a tier did so far: counters by outcome and cause, and how long calls took."""

from __future__ import annotations

import bisect
import threading
from dataclasses import dataclass, field

import numpy as np

from kvortex.tiers.base import Outcome, Outcomes
from kvortex.tiers.codec_metrics import CodecStats

# Upper ends of the buckets of all latency histograms, in seconds; the last bucket, beyond them, has none.
BUCKETS = tuple(1e-4 * 2.0**power for power in range(20))
OPERATIONS = ("contains", "get", "put", "delete", "probe")


@dataclass(frozen=True)
class OperationStats:
    """Calls of one kind.

    Attributes
    ----------
    operation
        ``"contains"``, ``"get"``, ``"put"``, ``"delete"`` or ``"probe"``.
    calls, keys, nbytes, seconds
        Calls that came back, their keys, payload bytes of keys that went well, and time spent, summed.
    outcomes
        Keys by outcome, in lower case: ``{"ok": 12, "miss": 3}``.
    histogram
        Calls by duration: one number for each of :data:`BUCKETS`, and one for longer ones.
    """

    operation: str
    calls: int
    keys: int
    nbytes: int
    seconds: float
    outcomes: dict[str, int] = field(default_factory=dict)
    histogram: tuple[int, ...] = ()


@dataclass(frozen=True)
class TierStats:
    """A snapshot of one tier below RAM.

    Attributes
    ----------
    tier
        Its kind, and from the second of a kind on a number: ``"redis"``, ``"redis-2"``.
    breaker
        ``"closed"``, ``"half_open"`` or ``"open"``.
    breaker_trips, breaker_reason
        How often it opened, and why it did last.
    operations
        Those that were used.
    errors
        Calls that failed, by cause: names of outcomes and of exceptions, and ``"Overdue"`` for calls that did not come back
        in time.
    corrupt
        Records that were not what was stored; none of them was handed out.
    used_bytes, capacity_bytes
        None where somebody else knows.
    evictions
        Records that made room for others.
    queue_blocks, queue_bytes
        That wait to be written, or are being written.
    dropped
        Blocks that were not stored, by reason: ``"breaker"``, ``"queue_full"``, ``"evicted"`` (from RAM, before they were
        written), ``"admission"``, ``"size"``, ``"closed"``, and names of outcomes.
    promoted_blocks
        Brought into RAM from here.
    codec
        What coding did to records of this tier; None where they are what slots of a pool without a codec hold.
    """

    tier: str
    breaker: str
    breaker_trips: int
    breaker_reason: str
    operations: tuple[OperationStats, ...]
    errors: dict[str, int]
    corrupt: int
    used_bytes: int | None
    capacity_bytes: int | None
    evictions: int
    queue_blocks: int
    queue_bytes: int
    dropped: dict[str, int]
    promoted_blocks: int
    codec: CodecStats | None = None

    def of(self, operation: str) -> OperationStats:
        """One kind of calls, zeros where there were none."""
        found = [entry for entry in self.operations if entry.operation == operation]
        return found[0] if found else OperationStats(operation, 0, 0, 0, 0.0)


class Tally:
    """Running totals of one tier; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finaliser that runs inside may count too
        self._calls: dict[str, list[float]] = {}  # operation to calls, keys, bytes, seconds
        self._outcomes: dict[str, list[int]] = {}
        self._histograms: dict[str, list[int]] = {}
        self._errors: dict[str, int] = {}
        self._dropped: dict[str, int] = {}
        self.promoted = 0

    def call(self, operation: str, outcomes: Outcomes, nbytes: int, seconds: float) -> None:
        """One call that came back."""
        counts = np.bincount(outcomes, minlength=len(Outcome))
        with self._lock:
            totals = self._calls.setdefault(operation, [0, 0, 0, 0.0])
            for at, more in enumerate((1, len(outcomes), nbytes, seconds)):
                totals[at] += more
            by_outcome = self._outcomes.setdefault(operation, [0] * len(Outcome))
            for at in np.flatnonzero(counts).tolist():
                by_outcome[at] += int(counts[at])
            self._histograms.setdefault(operation, [0] * (len(BUCKETS) + 1))[bisect.bisect_left(BUCKETS, seconds)] += 1

    def error(self, kind: str) -> None:
        """One failure, by cause."""
        with self._lock:
            self._errors[kind] = self._errors.get(kind, 0) + 1

    def drop(self, reason: str, blocks: int) -> None:
        """Blocks that will not be stored."""
        if blocks:
            with self._lock:
                self._dropped[reason] = self._dropped.get(reason, 0) + blocks

    def promote(self, blocks: int) -> None:
        """Blocks that came into RAM."""
        with self._lock:
            self.promoted += blocks

    def operations(self) -> tuple[OperationStats, ...]:
        """Those that were used."""
        with self._lock:
            return tuple(self._operation(name) for name in OPERATIONS if name in self._calls)

    def _operation(self, name: str) -> OperationStats:
        calls, keys, nbytes, seconds = self._calls[name]
        by_outcome = zip(Outcome, self._outcomes[name], strict=True)
        outcomes = {outcome.name.lower(): count for outcome, count in by_outcome if count}
        return OperationStats(name, int(calls), int(keys), int(nbytes), seconds, outcomes, tuple(self._histograms[name]))

    def errors(self) -> dict[str, int]:
        """By cause."""
        with self._lock:
            return dict(self._errors)

    def dropped(self) -> dict[str, int]:
        """By reason."""
        with self._lock:
            return dict(self._dropped)

    def corrupt(self) -> int:
        """Keys whose records were not what was stored."""
        with self._lock:
            return sum(counts[Outcome.CORRUPT] for counts in self._outcomes.values())
