"""The way between slots and a tier: as they are, without the zeros behind short records, or through a codec of the tier's.

A way is what threads of a line call instead of the guarded tier. What a tier is asked in one batch may be several calls of
it, so a way is told how much time these have together; what is computed in between takes none of that.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np

from kvortex.codecs.base import HEADER, HEADER_BYTES, MAGIC
from kvortex.digests.keys import lengths
from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Digests, Fetched, Int64s, Outcome, Outcomes
from kvortex.tiers.codec_metrics import DECODE, ENCODE, CodecTally
from kvortex.tiers.guarded import Guarded
from kvortex.tiers.scratch import clear, copy, load_compiled


class Terms:
    """Time for the calls of one batch.

    Parameters
    ----------
    seconds
        Of all calls together.
    cancelled
        As of a :class:`Call`.
    """

    def __init__(self, seconds: float, cancelled: Callable[[], bool]) -> None:
        self._left, self.cancelled = seconds, cancelled

    def over(self) -> bool:
        """Whether there is no time for another call, which a tier could only be late with."""
        return self._left <= 0

    @contextlib.contextmanager
    def call(self) -> Iterator[Call]:
        """The terms of a call that begins now."""
        began = time.monotonic()
        yield Call(began + self._left, self.cancelled)
        self._left = max(0.0, self._left - (time.monotonic() - began))


class Way(ABC):
    """See the module. Thread-safe; nothing is raised for what may happen to a tier, or to a record."""

    tally: CodecTally | None = None

    def __init__(self, guard: Guarded) -> None:
        self.guard = guard

    @abstractmethod
    def put_from(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, terms: Terms) -> Outcomes:
        """Stores what slots hold: as :meth:`Tier.put_from`. ``CORRUPT`` for what is not what was saved."""

    @abstractmethod
    def get_into(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, terms: Terms) -> Fetched:
        """Fills slots: as :meth:`Tier.get_into`, with sizes and digests of what slots hold. ``sizes`` are what is wanted."""

    def delete(self, keys: KeyArray, call: Call) -> Outcomes:
        """As :meth:`Tier.delete`."""
        return self.guard.delete(keys, call)

    def close(self) -> None:  # noqa: B027 - most have none
        """Ends threads of its own, if it has any. Twice does no harm."""


class Direct(Way):
    """Records are what slots hold."""

    def put_from(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, terms: Terms) -> Outcomes:
        with terms.call() as call:
            return self.guard.put_from(keys, addresses, sizes, digests, call)

    def get_into(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, terms: Terms) -> Fetched:
        with terms.call() as call:
            return self.guard.get_into(keys, addresses, sizes, call)


class Trimmed(Way):
    """Records are what slots of a pool with a codec hold, without the zeros behind.

    Zeros add nothing to a digest but by their number, so that of a record follows from that of its slot and the other way
    round, and nothing is computed anew. Should the length in a record's header have been damaged in RAM, so is its digest.
    """

    def __init__(self, guard: Guarded, tally: CodecTally) -> None:
        super().__init__(guard)
        self.tally = tally
        load_compiled()

    def put_from(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, terms: Terms) -> Outcomes:
        began = time.perf_counter()
        used = _used(addresses, sizes)
        shorter = _with_zeros(digests, used - sizes)
        self._count(ENCODE, sizes, used, began)
        with terms.call() as call:
            return self.guard.put_from(keys, addresses, used, shorter, call)

    def get_into(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, terms: Terms) -> Fetched:
        with terms.call() as call:
            got = self.guard.get_into(keys, addresses, sizes, call)
        found = Fetched(got.outcomes.copy(), got.sizes.astype(np.int64), got.digests.astype(np.uint8))  # not the tier's own
        began = time.perf_counter()
        there = np.flatnonzero(found.outcomes == Outcome.OK)
        came = found.sizes[there]
        # All of a slot, as tiers had it before, or what its record says; a shorter one than a header says nothing.
        right = came == sizes[there]
        long = np.flatnonzero(~right & (came >= HEADER_BYTES) & (came < sizes[there]))
        right[long] = _used(addresses[there[long]], sizes[there[long]]) == came[long]
        self._refuse(found, there[~right])
        good = there[right]
        behind = sizes[good] - found.sizes[good]
        clear(addresses[good] + found.sizes[good], behind)
        self._count(DECODE, found.sizes[good], sizes[good], began)
        found.digests[good] = _with_zeros(found.digests[good], behind)
        found.sizes[good] = sizes[good]
        return found

    def _count(self, operation: str, before: Int64s, after: Int64s, began: float) -> None:
        if self.tally is not None and len(before):
            self.tally.count(operation, len(before), int(before.sum()), int(after.sum()), time.perf_counter() - began)

    def _refuse(self, found: Fetched, rows: Int64s) -> None:
        if self.tally is not None:
            self.tally.refuse("length", len(rows))
        found.outcomes[rows], found.sizes[rows], found.digests[rows] = Outcome.MISS, 0, 0


def _used(addresses: Int64s, sizes: Int64s) -> Int64s:
    """(n,) int64: how much of each slot its record takes, as its header says; all, where there is none."""
    seen = np.zeros(len(addresses), HEADER)
    starts = seen.ctypes.data + np.arange(len(seen), dtype=np.int64) * HEADER_BYTES
    copy(addresses, starts, np.minimum(sizes, HEADER_BYTES))
    used = seen["used_bytes"]
    right = (seen["magic"] == MAGIC) & (used >= HEADER_BYTES) & (used <= sizes.astype(np.uint64))
    return np.where(right, used.astype(np.int64), sizes)


def _with_zeros(digests: Digests, zeros: Int64s) -> Digests:
    """(n, 16) uint8: digests of the same records with so many zeros more behind them, or fewer."""
    words = np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2)
    more: Digests = (words + zeros.astype(np.uint64)[:, None] * lengths()).view(np.uint8)
    return more
