"""The way of a tier with a codec of its own: slots are decoded, where the pool has a codec, coded by the tier's, and back.

All of that is done by the tier's threads, some blocks at a time, in compiled calls that hold no GIL, and in memory of the
thread.

What guards a block on its way: the digest of its slot is compared when it is read to be coded, and travels in the record's
envelope; the record has a digest of its own, as any; and what comes back exactly must have the slot's digest again. Of
what comes back with loss the digest is made anew. Whatever does not agree is a miss, counted by its cause.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.codecs import Codec
from kvortex.digests import digest_records
from kvortex.errors import ConfigError
from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Digests, Fetched, Int64s, Outcome, Outcomes
from kvortex.tiers.codec_metrics import DECODE, ENCODE, CodecTally
from kvortex.tiers.codings import TierCoding, begin
from kvortex.tiers.envelope import ENVELOPE, ENVELOPE_BYTES, Envelopes, causes, is_exact, is_of, make, part_keys
from kvortex.tiers.guarded import Guarded
from kvortex.tiers.remote.crew import Crew
from kvortex.tiers.scratch import Bytes, Scratch, Scratches, aligned, clear, copy, copy_digested, load_compiled, rows_at
from kvortex.tiers.ways import Terms, Way

_AT_ONCE_BYTES = 1 << 20  # of original bytes, in one call of a codec, but for a larger block
_LOADED: set[type[Codec]] = set()


class Transcoded(Way):
    """See the module.

    Parameters
    ----------
    guard
    coding
        With a codec of the tier's own.
    name
        Of the tier, for its threads.
    threads
        That code blocks of one batch at a time.

    Raises
    ------
    ConfigError
        The tier takes no payload that holds more than an envelope.
    """

    def __init__(self, guard: Guarded, coding: TierCoding, name: str = "tier", threads: int = 1) -> None:
        super().__init__(guard)
        assert coding.own is not None
        self._pool, self._own = coding.pool, coding.own
        self.tally: CodecTally = coding.tally
        self._slot_bytes, self._raw_bytes, self._worst = coding.slot_bytes, self._own.shape.raw_bytes, self._own.worst_bytes
        most = guard.tier.most_bytes or ENVELOPE_BYTES + self._worst
        self._each = min(self._worst, most - ENVELOPE_BYTES)  # of a part
        if self._each < ENVELOPE_BYTES:
            raise ConfigError(f"the tier takes payloads of {most} bytes, which hold no part of a coded record")
        self._parts = -(-self._worst // self._each)  # of a record at most
        self._stride = aligned(ENVELOPE_BYTES + self._each)
        self._at_once = max(1, _AT_ONCE_BYTES // self._raw_bytes)
        self._scratches, self._crew = Scratches(), Crew(f"{name}-codec", threads)
        load_compiled()
        for codec in (self._own, self._pool):
            if codec is not None and type(codec) not in _LOADED:
                _load(codec)

    def close(self) -> None:
        self._crew.close()

    def _share(self, count: int, work: Callable[[Scratch, slice], None], cancelled: Callable[[], bool]) -> None:
        """Does work for ``count`` blocks, some at a time, by several threads, each with memory of its own."""

        def job(some: slice, _: Call) -> None:
            with self._scratches.lent() as scratch:
                work(scratch, some)

        pieces = [slice(start, start + self._at_once) for start in range(0, count, self._at_once)]
        self._crew.run([functools.partial(job, some) for some in pieces], Call(math.inf, cancelled))

    # -- down

    def put_from(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, terms: Terms) -> Outcomes:
        outcomes = np.where(sizes == self._slot_bytes, Outcome.OK, Outcome.TOO_LARGE).astype(np.uint8)
        with self._scratches.lent() as scratch:
            rows = np.flatnonzero(outcomes == Outcome.OK)
            made = _Made(scratch, len(keys), aligned(ENVELOPE_BYTES + self._worst))

            def encode(mine: Scratch, some: slice) -> None:
                if terms.cancelled():
                    outcomes[rows[some]] = Outcome.CANCELLED
                else:
                    self._encode(mine, made, rows[some], keys, addresses, digests, outcomes)

            self._share(len(rows), encode, terms.cancelled)
            ready = made.coded > 0
            short = np.flatnonzero(ready & (made.coded <= self._each))
            if len(short):
                payloads = made.coded[short] + ENVELOPE_BYTES
                found = _digests_of(made.at[short], payloads)
                with terms.call() as call:
                    outcomes[short] = self.guard.put_from(keys[short], made.at[short], payloads, found, call)
            for at in np.flatnonzero(ready & (made.coded > self._each)).tolist():
                outcomes[at] = self._put_parts(scratch, keys[at], int(made.at[at]), int(made.coded[at]), terms)
        return outcomes

    def _encode(
        self,
        scratch: Scratch,
        made: _Made,
        rows: Int64s,
        keys: KeyArray,
        addresses: Int64s,
        digests: Digests,
        outcomes: Outcomes,
    ) -> None:
        """Payloads of some blocks: first parts with their envelopes, and behind these all of the record."""
        began, count = time.perf_counter(), len(rows)
        slots = scratch.rows("slots", count, self._slot_bytes)
        right = (copy_digested(addresses[rows], rows_at(slots), self._slot_bytes) == digests[rows]).all(1)
        records = slots
        if self._pool is not None:
            records = scratch.rows("records", count, self._raw_bytes)
            right &= self._pool.decode_into(slots, records)
        coded = scratch.rows("coded", count, self._worst)
        sizes = self._own.encode_into(records, coded, None if self._own.exact else begin(keys[rows]))
        right &= sizes > 0
        outcomes[rows[~right]] = Outcome.CORRUPT
        self.tally.refuse("slot", int((~right).sum()))
        rows, sizes = rows[right], sizes[right]
        parts = -(-sizes // self._each)
        exact = is_exact(self._own, coded)[right]
        envelopes = make(self._own, self._slot_bytes, sizes, exact, digests[rows], parts)
        starts = made.add(rows, sizes)
        copy(rows_at(coded)[right], starts + ENVELOPE_BYTES, sizes)
        long = parts > 1
        envelopes["whole"][long] = _digests_of(starts[long] + ENVELOPE_BYTES, sizes[long])
        _put_envelopes(envelopes, starts)
        before, seconds = len(rows) * self._slot_bytes, time.perf_counter() - began
        self.tally.count(ENCODE, len(rows), before, int(sizes.sum() + ENVELOPE_BYTES * parts.sum()), seconds)

    def _put_parts(self, scratch: Scratch, key: Bytes, address: int, coded: int, terms: Terms) -> int:
        """One record that is longer than the tier's payloads. The first part is stored when all others are."""
        parts = -(-coded // self._each)
        behind = np.arange(1, parts)
        sizes = np.minimum(self._each, coded - behind * self._each)
        starts = rows_at(scratch.rows("parts", parts - 1, self._stride))
        envelopes = np.repeat(_envelopes_at(np.array([address])), parts - 1)
        envelopes["part"] = behind
        copy(address + ENVELOPE_BYTES + behind * self._each, starts + ENVELOPE_BYTES, sizes)
        _put_envelopes(envelopes, starts)
        payloads = sizes + ENVELOPE_BYTES
        others = part_keys(self._space, key, parts)
        if terms.over():
            return Outcome.TIMEOUT
        with terms.call() as call:
            outcomes = self.guard.put_from(others, starts, payloads, _digests_of(starts, payloads), call)
        wrong = outcomes[outcomes != Outcome.OK]
        if len(wrong):
            return int(wrong[0])
        if terms.over():
            return Outcome.TIMEOUT
        first, whole = np.array([address]), np.array([self._each + ENVELOPE_BYTES])
        with terms.call() as call:
            return int(self.guard.put_from(key[None], first, whole, _digests_of(first, whole), call)[0])

    # -- up

    def get_into(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, terms: Terms) -> Fetched:
        n = len(keys)
        with self._scratches.lent() as scratch:
            starts = rows_at(scratch.rows("made", n, self._stride))
            with terms.call() as call:
                found = self.guard.get_into(keys, starts, np.full(n, self._each + ENVELOPE_BYTES), call)
            there = np.flatnonzero((found.outcomes == Outcome.OK) & (sizes == self._slot_bytes))
            lengths = found.sizes.copy()
            result = Fetched(found.outcomes, np.zeros(n, np.int64), np.zeros((n, 16), np.uint8))
            result.outcomes[(found.outcomes == Outcome.OK) & (sizes != self._slot_bytes)] = Outcome.MISS
            why = np.full(n, "", object)
            why[there[lengths[there] < ENVELOPE_BYTES]] = "length"
            there = there[lengths[there] >= ENVELOPE_BYTES]
            seen = _envelopes_at(starts[there])
            asked = None if self._own.exact else begin(keys[there])
            why[there] = causes(seen, lengths[there], self._own, self._slot_bytes, self._each, asked)
            fine = why[there] == ""
            there, seen = there[fine], seen[fine]
            short = seen["parts"] == 1
            rows, bodies = there[short], starts[there[short]] + ENVELOPE_BYTES
            mine = seen[short]

            def decode(own: Scratch, some: slice) -> None:
                self._decode(own, rows[some], bodies[some], mine[some], addresses, result, why)

            self._share(len(rows), decode, terms.cancelled)
            for at, envelope in zip(there[~short].tolist(), seen[~short], strict=True):
                self._get_parts(scratch, keys[at], at, int(starts[at]), envelope, addresses, result, why, terms)
        self._forget(keys, result, why, terms)
        return result

    def _decode(
        self,
        scratch: Scratch,
        rows: Int64s,
        bodies: Int64s,
        seen: Envelopes,
        addresses: Int64s,
        result: Fetched,
        why: npt.NDArray[np.object_],
    ) -> None:
        """Coded records into slots; what is none keeps its slot from being used, by its cause."""
        began, count = time.perf_counter(), len(rows)
        sizes = seen["coded_bytes"].astype(np.int64)
        coded = scratch.rows("coded", count, self._worst)
        copy(bodies, rows_at(coded), sizes)
        records = scratch.rows("records", count, self._raw_bytes)
        causes = np.where(is_of(self._own, coded, sizes), "", "codec").astype(object)
        good = self._own.decode_into(coded, records) & (causes == "")
        causes[~good & (causes == "")] = "body"
        slots = records
        if self._pool is not None:
            slots = scratch.rows("slots", count, self._slot_bytes)
            used = self._pool.encode_into(records, slots)
            causes[good & (used <= 0)] = "overlong"
            good &= used > 0
            clear(rows_at(slots)[good] + used[good], self._slot_bytes - used[good])
        at = np.flatnonzero(good)
        digests = copy_digested(rows_at(slots)[at], addresses[rows[at]], self._slot_bytes)
        same = (digests == seen["digest"][at]).all(1) | (seen["exact"][at] != 1)
        causes[at[~same]] = "digest"
        at, digests = at[same], digests[same]
        why[rows] = causes
        result.sizes[rows[at]], result.digests[rows[at]] = self._slot_bytes, digests
        before = int(sizes[at].sum() + ENVELOPE_BYTES * seen["parts"][at].astype(np.int64).sum())
        self.tally.count(DECODE, len(at), before, len(at) * self._slot_bytes, time.perf_counter() - began)

    def _get_parts(
        self,
        scratch: Scratch,
        key: Bytes,
        row: int,
        address: int,
        envelope: Any,
        addresses: Int64s,
        result: Fetched,
        why: npt.NDArray[np.object_],
        terms: Terms,
    ) -> None:
        """One record that lies in several parts, of which the first is there."""
        parts, coded = int(envelope["parts"]), int(envelope["coded_bytes"])
        behind = np.arange(1, parts)
        wanted = np.minimum(self._each, coded - behind * self._each)
        starts = rows_at(scratch.rows("parts", parts - 1, self._stride))
        room = np.full(parts - 1, self._each + ENVELOPE_BYTES)
        if terms.over():
            result.outcomes[row] = Outcome.TIMEOUT
            return
        with terms.call() as call:
            found = self.guard.get_into(part_keys(self._space, key, parts), starts, room, call)
        absent = found.outcomes[found.outcomes != Outcome.OK]
        if len(absent):
            if (absent > Outcome.CORRUPT).all():  # it may be there the next time
                result.outcomes[row] = absent[0]
            else:
                why[row] = "parts"
            return
        others = _envelopes_at(starts)
        expected = np.repeat(np.array([envelope], ENVELOPE), parts - 1)
        expected["part"] = behind
        same = others.tobytes() == expected.tobytes() and bool((found.sizes == wanted + ENVELOPE_BYTES).all())
        whole = scratch.rows("whole", 1, aligned(self._worst))
        body = rows_at(whole)
        if same:
            copy(np.array([address + ENVELOPE_BYTES]), body, np.array([self._each]))
            copy(starts + ENVELOPE_BYTES, body + behind * self._each, wanted)
            same = bool((_digests_of(body, np.array([coded]))[0] == envelope["whole"]).all())
        if not same:
            why[row] = "parts"
            return
        self._decode(scratch, np.array([row]), body, np.array([envelope], ENVELOPE), addresses, result, why)

    def _forget(self, keys: KeyArray, result: Fetched, why: npt.NDArray[np.object_], terms: Terms) -> None:
        """What cannot be used is a miss, and is deleted, lest a tier that has it does not take a better one."""
        wrong = np.flatnonzero(why != "")
        if not len(wrong):
            return
        for cause in sorted(set(why[wrong])):
            count = int((why == cause).sum())
            self.tally.refuse(cause, count)
        result.outcomes[wrong], result.sizes[wrong], result.digests[wrong] = Outcome.MISS, 0, 0
        if terms.over():
            return
        with terms.call() as call:
            self.delete(keys[wrong], call)

    def delete(self, keys: KeyArray, call: Call) -> Outcomes:
        outcomes = self.guard.delete(keys, call)
        if self._parts > 1 and len(keys):
            others = np.concatenate([part_keys(self._space, key, self._parts) for key in keys])
            self.guard.delete(others, call)
        return outcomes

    @property
    def _space(self) -> bytes:
        """What parts' keys are told apart by from keys of other tiers; records have the namespace in their headers."""
        return self._own.digest


class _Made:
    """Payloads that are ready: where each lies, one behind the other, and the bytes of each record; 0 for none."""

    def __init__(self, scratch: Scratch, count: int, most: int) -> None:
        self.at, self.coded = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._next = int(rows_at(scratch.rows("made", count, most), 1)[0]) if count else 0
        self._lock = threading.Lock()

    def add(self, rows: Int64s, sizes: Int64s) -> Int64s:
        """Places for some more, at multiples of a page, which are the caller's to fill. Thread-safe."""
        taken = -(-(sizes + ENVELOPE_BYTES) // 4096) * 4096
        with self._lock:
            first = self._next
            self._next += int(taken.sum())
        starts: Int64s = first + np.cumsum(taken) - taken
        self.at[rows], self.coded[rows] = starts, sizes
        return starts


def _digests_of(addresses: Int64s, sizes: Int64s) -> Digests:
    found = np.empty((len(addresses), 16), np.uint8)
    digest_records(addresses, sizes, found)
    return found


def _put_envelopes(envelopes: Envelopes, targets: Int64s) -> None:
    sources = envelopes.ctypes.data + np.arange(len(envelopes), dtype=np.int64) * ENVELOPE_BYTES
    copy(sources, targets, np.full(len(envelopes), ENVELOPE_BYTES, np.int64))


def _envelopes_at(addresses: Int64s) -> Envelopes:
    """(n,) ENVELOPE, copied."""
    found = np.empty(len(addresses), ENVELOPE)
    targets = found.ctypes.data + np.arange(len(found), dtype=np.int64) * ENVELOPE_BYTES
    copy(addresses, targets, np.full(len(found), ENVELOPE_BYTES, np.int64))
    return found


def _load(codec: Codec) -> None:
    """Loads what is compiled of a codec, or compiles it: once in a process, and not while the first block waits."""
    records = np.zeros((2, codec.shape.raw_bytes), np.uint8)
    coded = np.zeros((2, codec.worst_bytes), np.uint8)
    codec.encode_into(records, coded, np.array([False, True]))
    codec.decode_into(coded, records)
    _LOADED.add(type(codec))
