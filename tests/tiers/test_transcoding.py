"""Between slots and a tier's records: every bit comes back or nothing does, whatever lies in the tier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.codecs import Codec, RecordShape, Tables, calibrate, make_codec
from kvortex.codecs.base import HEADER_BYTES as CODEC_HEADER_BYTES
from kvortex.digests import digest_records
from kvortex.errors import ConfigError
from kvortex.keys import Namespace
from kvortex.tiers.base import Call, Outcome
from kvortex.tiers.breaker import Breaker
from kvortex.tiers.codec_metrics import CodecTally
from kvortex.tiers.codings import TierCoding, begin, marked
from kvortex.tiers.envelope import ENVELOPE, ENVELOPE_BYTES, part_keys
from kvortex.tiers.guarded import Guarded
from kvortex.tiers.memory import MemoryStore, MemoryTier
from kvortex.tiers.record import HEADER_BYTES, RecordFormat
from kvortex.tiers.transcoding import Transcoded
from kvortex.tiers.ways import Terms, Trimmed, _with_zeros
from perf.faulty import FaultyTier
from tests.engine.coded import kv
from tests.pages import Bytes, keys_of
from tests.tiers.resigned import signed

SHAPE = RecordShape(1, 1, 64)
RECORDS = kv(np.random.default_rng(5), SHAPE, 40)
TABLES = calibrate(RECORDS, SHAPE)
OTHER_TABLES = calibrate(kv(np.random.default_rng(6), SHAPE, 40), SHAPE)
SPACE = Namespace(model="transcoding")
FORM = RecordFormat(SPACE.seed, 1 << 16)


def codec_of(name: str, tables: Tables = TABLES) -> Codec:
    return make_codec(name, SHAPE, tables)


def lost(own: Codec, record: Bytes, first: bool = False) -> Bytes:
    """What a codec gives back."""
    return np.frombuffer(own.decode(own.encode(record, first=first)), np.uint8)


def digests_of(rows: Bytes) -> Bytes:
    found = np.empty((len(rows), 16), np.uint8)
    digest_records(rows.ctypes.data + np.arange(len(rows)) * rows.strides[0], np.full(len(rows), rows.shape[1]), found)
    return found


def keys_for(*numbers: int, first: bool = False) -> Bytes:
    return marked(SPACE, keys_of(*numbers), np.full(len(numbers), first))


class Rig:
    """A way to a tier in memory, and slots of a pool with a codec, or without one."""

    def __init__(
        self, own: str, pool: str = "raw", most: int | None = None, store: MemoryStore | None = None, tables: Tables = TABLES
    ) -> None:
        self.pool, self.own = None if pool == "raw" else codec_of(pool, tables), codec_of(own, tables)
        self.coding = TierCoding(self.pool, self.own, CodecTally(own))
        self.form = self.coding.format_from(FORM)
        self.store = MemoryStore() if store is None else store
        self.tier = FaultyTier(self.store, self.form)
        self.tier.most_bytes = most
        self.guard = Guarded(self.tier, Breaker())
        self.way = Transcoded(self.guard, self.coding, "rig", 3)
        self.width = self.coding.slot_bytes

    def terms(self) -> Terms:
        return Terms(20.0, lambda: False)

    def slots_of(self, records: Bytes) -> Bytes:
        """What a pool's slots hold of records."""
        if self.pool is None:
            return records.copy()
        rows = np.zeros((len(records), self.width), np.uint8)
        assert (self.pool.encode_into(records, rows) > 0).all()
        return rows

    def put(self, keys: Bytes, slots: Bytes, digests: Bytes | None = None) -> list[int]:
        at = slots.ctypes.data + np.arange(len(slots)) * slots.strides[0]
        sizes, found = np.full(len(slots), slots.shape[1]), digests_of(slots) if digests is None else digests
        return self.way.put_from(keys, at, sizes, found, self.terms()).tolist()

    def get(self, keys: Bytes) -> tuple[list[int], Bytes, Any]:
        slots = np.full((len(keys), self.width), 0xA5, np.uint8)
        at = slots.ctypes.data + np.arange(len(slots)) * slots.strides[0]
        found = self.way.get_into(keys, at, np.full(len(keys), self.width), self.terms())
        good = found.outcomes == Outcome.OK
        assert (found.digests[good] == digests_of(slots)[good]).all() and (found.sizes[good] == self.width).all()
        assert not found.sizes[~good].any() and not found.digests[~good].any()
        return found.outcomes.tolist(), slots, found

    def name(self, key: Bytes) -> bytes:
        return self.form.namespace + key.tobytes()

    def plant(self, key: Bytes, payload: bytes, form: RecordFormat | None = None) -> None:
        """A record whose header and digest are right, whatever is in it."""
        self.store.put(self.name(key), signed(form or self.form, key, payload))

    def payload(self, key: Bytes) -> bytes:
        return self.store.objects[self.name(key)][HEADER_BYTES:]

    @property
    def refused(self) -> dict[str, int]:
        return self.coding.tally.stats().refused


OK, MISS, CORRUPT = int(Outcome.OK), int(Outcome.MISS), int(Outcome.CORRUPT)
PARTS = ENVELOPE_BYTES + 1000  # payloads so small that any record of these has several parts
PAIRS = [("raw", "plane"), ("plane", "raw"), ("raw", "cachegen"), ("plane", "cachegen"), ("raw", "k4v4")]


@pytest.mark.parametrize("most", [None, PARTS])
@pytest.mark.parametrize(("pool", "own"), PAIRS)
def test_a_batch_goes_down_and_up(pool: str, own: str, most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.tiers.transcoding._AT_ONCE_BYTES", 3 * SHAPE.raw_bytes)  # several calls of the codecs
    rig, firsts = Rig(own, pool, most), np.arange(40) % 3 == 0
    keys, slots = marked(SPACE, keys_of(*range(40)), firsts), rig.slots_of(RECORDS)
    assert rig.put(keys, slots) == [OK] * 40
    again = Rig(own, pool, most, rig.store)
    outcomes, came, _ = again.get(np.concatenate((keys[::-1], keys_for(99))))
    assert outcomes == [OK] * 40 + [MISS] and not again.refused
    exact = firsts | rig.own.exact
    expected = np.stack([lost(rig.own, row, one) for row, one in zip(RECORDS, exact, strict=True)])
    assert (came[:40][::-1] == rig.slots_of(expected)).all() and (came[:40][::-1][exact] == slots[exact]).all()
    before, after = rig.coding.tally.stats(), again.coding.tally.stats()
    stored = sum(len(record) - HEADER_BYTES for record in rig.store.objects.values())
    assert after.decoded_from_bytes == before.encoded_to_bytes == stored
    assert (len(rig.store.objects) > 40) == (most is not None)
    assert rig.way.delete(keys, Call(1e12)).tolist() == [OK] * 40 and not rig.store.objects


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), kind=st.sampled_from(["model", "noise", "zeros", "nan", "mixed"]), first=st.booleans(),
    pool=st.sampled_from(["raw", "plane"]), own=st.sampled_from(["plane", "raw", "cachegen", "int8"]),
    most=st.one_of(st.none(), st.integers(2 * ENVELOPE_BYTES, 6000)),
)  # fmt: skip
def test_whatever_a_slot_holds_comes_back(seed: int, kind: str, first: bool, pool: str, own: str, most: int | None) -> None:
    if pool == own:
        own = {"raw": "plane", "plane": "raw"}[own]
    rng, record = np.random.default_rng(seed), np.zeros((1, SHAPE.raw_bytes), np.uint8)
    if kind == "model":
        record = kv(rng, SHAPE, 1)
    elif kind in ("noise", "mixed"):
        record = rng.integers(0, 256, record.shape, np.uint8)
    elif kind == "nan":
        record.view(np.uint16)[:, ::7] = 0x7FC1
    if kind == "mixed":
        record[:, : SHAPE.raw_bytes // 2] = kv(rng, SHAPE, 1)[:, : SHAPE.raw_bytes // 2]
    rig = Rig(own, pool, most)
    if rig.pool is not None and rig.pool.encode_into(record, np.zeros((1, rig.width), np.uint8))[0] < 0:
        return  # no slot holds that
    slots, key = rig.slots_of(record), keys_for(seed, first=first)
    assert rig.put(key, slots) == [OK]
    outcomes, came, _ = rig.get(key)
    wanted = lost(rig.own, record, first)[None]
    assert outcomes == [OK] and not rig.refused and (came == rig.slots_of(wanted)).all()
    assert not (first or rig.own.exact) or (came == slots).all()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 9000))
def test_zeros_add_their_number_to_a_digest(data: bytes, zeros: int) -> None:
    short = np.frombuffer(bytearray(data) + bytes(8), np.uint8)[None]
    long = np.frombuffer(bytearray(data) + bytes(zeros) + bytes(8), np.uint8)[None]
    both = digests_of(short[:, : len(data)]), digests_of(long[:, : len(data) + zeros])
    assert (_with_zeros(both[0], np.array([zeros])) == both[1]).all()
    assert (_with_zeros(both[1], np.array([-zeros])) == both[0]).all()


# -- without zeros

def test_slots_are_filled_with_zeros_behind_what_came() -> None:
    """Whatever lay there: the digest is of the whole slot, and nothing of an earlier block leaves with it."""
    rig, keys = Rig("plane", "raw"), keys_for(*range(6))
    rig.pool, rig.width = rig.own, rig.own.slot_bytes
    rig.way = Trimmed(rig.guard, rig.coding.tally)  # type: ignore[assignment]
    slots = rig.slots_of(RECORDS[:6])
    assert rig.put(keys, slots) == [OK] * 6
    used = [len(rig.own.encode(record)) for record in RECORDS[:6]]
    assert [len(rig.payload(key)) for key in keys] == used and max(used) < rig.width
    outcomes, came, found = rig.get(keys)
    assert outcomes == [OK] * 6 and (came == slots).all() and (found.digests == digests_of(slots)).all()
    stats = rig.coding.tally.stats()
    assert (stats.encoded_from_bytes, stats.encoded_to_bytes) == (6 * rig.width, sum(used))
    assert (stats.decoded_from_bytes, stats.decoded_to_bytes) == (sum(used), 6 * rig.width)
    damaged, digests = slots.copy(), digests_of(slots)
    damaged[2, 24] ^= 8  # of the length that the header says
    damaged[3, 500] ^= 8
    damaged[4, rig.width - 1] ^= 8  # of the zeros, which do not go
    rig.way.delete(keys, Call(1e12))
    assert rig.put(keys, damaged, digests) == [OK] * 6
    outcomes, came, _ = rig.get(keys)
    assert outcomes == [OK, OK, CORRUPT, CORRUPT, OK, OK]
    assert (came[[0, 1, 4, 5]] == slots[[0, 1, 4, 5]]).all()


# -- damage

@pytest.mark.parametrize("most", [None, PARTS])
@pytest.mark.parametrize("own", ["plane", "cachegen"])
def test_no_flipped_bit_is_handed_out(own: str, most: int | None) -> None:
    """Anywhere in what lies in the tier, header, envelope, parts and all."""
    rng, rig, key = np.random.default_rng(7), Rig(own, most=most), keys_for(1, first=True)
    assert rig.put(key, RECORDS[:1]) == [OK]
    whole = dict(rig.store.objects)
    for _ in range(600):
        name = list(whole)[rng.integers(len(whole))]
        hurt = bytearray(whole[name])
        at = int(rng.integers(8 * len(hurt)))
        hurt[at // 8] ^= 1 << at % 8
        rig.store.put(name, bytes(hurt))
        outcomes, _, _ = rig.get(key)
        assert outcomes[0] in (MISS, CORRUPT), at
        for each, record in whole.items():
            rig.store.put(each, record)
    assert rig.get(key)[0] == [OK]


def resigned_flips(rig: Rig, key: Bytes, bits: Any) -> list[int]:
    """What becomes of records that were changed before they were digested; each that comes is compared with the right one."""
    payload, seen = rig.payload(key[0]), []
    right = rig.get(key)[1]
    for bit in bits:
        hurt = bytearray(payload)
        hurt[bit // 8] ^= 1 << bit % 8
        rig.plant(key[0], bytes(hurt))
        outcomes, came, _ = rig.get(key)
        seen.append(outcomes[0])
        assert outcomes[0] in (OK, MISS)
        if outcomes[0] == OK:
            assert (came == right).all(), bit
        else:
            assert rig.name(key[0]) not in rig.store.objects, "what cannot be used is not kept"
    rig.plant(key[0], payload)
    assert rig.get(key)[0] == [OK]
    return seen


KEPT = [("raw", "plane", False), ("plane", "raw", False), ("plane", "cachegen", True)]


@pytest.mark.parametrize(("pool", "own", "first"), KEPT)
def test_damage_before_the_digest_is_seen_where_nothing_may_be_lost(pool: str, own: str, first: bool) -> None:
    rng, rig, key = np.random.default_rng(8), Rig(own, pool), keys_for(1, first=first)
    assert rig.put(key, rig.slots_of(RECORDS[:1])) == [OK]
    size = 8 * len(rig.payload(key[0]))
    seen = resigned_flips(rig, key, rng.integers(0, size, 400))
    assert seen.count(MISS) > 380 and {"digest", "body"} & set(rig.refused)


@pytest.mark.parametrize("own", ["cachegen", "int8"])
def test_what_leads_a_decoder_is_checked(own: str) -> None:
    """Each bit of envelope and header of a record with loss: what comes is right, or does not come."""
    rig, key = Rig(own), keys_for(1)
    assert rig.put(key, RECORDS[:1]) == [OK]
    seen = resigned_flips(rig, key, range(8 * (ENVELOPE_BYTES + CODEC_HEADER_BYTES)))
    free = 2 * 16 * 8  # digests, which are for what comes back exactly
    assert seen.count(MISS) >= 8 * (ENVELOPE_BYTES + CODEC_HEADER_BYTES) - free
    assert {"envelope", "length", "codec"} <= set(rig.refused)


@pytest.mark.parametrize("own", ["plane", "cachegen", "int8"])
def test_damaged_bodies_do_no_other_harm(own: str) -> None:
    """Cut anywhere, longer, or noise behind a right header: decoded, or refused; the next block is right all the same."""
    rng, rig, keys = np.random.default_rng(9), Rig(own), keys_for(1, 2)
    assert rig.put(keys, RECORDS[1:3]) == [OK, OK]
    payload, right = rig.payload(keys[0]), rig.get(keys)[1]
    start = ENVELOPE_BYTES + CODEC_HEADER_BYTES
    bodies = [payload[:at] for at in rng.integers(0, len(payload), 60)] + [payload + bytes(4), b""]
    for body in bodies:
        rig.plant(keys[0], body)
        outcomes, came, _ = rig.get(keys)
        assert outcomes == [MISS, OK] and (came[1] == right[1]).all()
    for _ in range(60):
        noise = rng.integers(0, 256, len(payload) - start, np.uint8).tobytes()
        rig.plant(keys[0], payload[:start] + noise)
        outcomes, came, _ = rig.get(keys)
        assert outcomes[1] == OK and (came[1] == right[1]).all() and (own != "plane" or outcomes[0] == MISS)
    assert sum(rig.refused.values()) >= len(bodies)


FOREIGN: dict[str, tuple[str, Callable[[Rig, Bytes], bytes]]] = {
    "another codec": ("codec", lambda rig, key: with_body(rig, key, codec_of("int8").encode(RECORDS[1]))),
    "other tables": ("codec", lambda rig, key: with_body(rig, key, codec_of("cachegen", OTHER_TABLES).encode(RECORDS[1]))),
    "another version": ("codec", lambda rig, key: with_body(rig, key, changed(rig.payload(key)[ENVELOPE_BYTES:], 6, 9))),
    "an envelope's older version": ("envelope", lambda rig, key: changed(rig.payload(key), 4, 0)),
    "an envelope's newer version": ("envelope", lambda rig, key: changed(rig.payload(key), 4, 2)),
    "no envelope": ("envelope", lambda rig, key: rig.payload(key)[ENVELOPE_BYTES:]),
    "a slot": ("envelope", lambda rig, key: RECORDS[1].tobytes()),
    "nothing": ("length", lambda rig, key: b""),
    "less than an envelope": ("length", lambda rig, key: rig.payload(key)[:ENVELOPE_BYTES - 1]),
    "another codec's number": ("codec", lambda rig, key: changed(rig.payload(key), 12, 2)),
    "an envelope alone": ("length", lambda rig, key: rig.payload(key)[:ENVELOPE_BYTES]),
}  # fmt: skip


def changed(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


def with_body(rig: Rig, key: Bytes, body: bytes) -> bytes:
    """The same envelope before other bytes, whose number it says."""
    envelope = np.frombuffer(bytearray(rig.payload(key)[:ENVELOPE_BYTES]), ENVELOPE)
    envelope["coded_bytes"] = len(body)
    return envelope.tobytes() + body


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_records_are_counted_misses(what: str) -> None:
    rig, key = Rig("cachegen"), keys_for(1)
    assert rig.put(key, RECORDS[1:2]) == [OK]
    cause, made = FOREIGN[what]
    rig.plant(key[0], made(rig, key[0]))
    assert rig.get(key)[0] == [MISS] and rig.refused == {cause: 1}
    assert rig.put(key, RECORDS[1:2]) == [OK] and rig.get(key)[0] == [OK], "a better one takes its place"


def test_a_record_of_another_codec_is_told_by_its_header() -> None:
    """The tier's own header says so, before anything is decoded: a miss, and counted by its cause."""
    rig, key = Rig("cachegen"), keys_for(1)
    other = RecordFormat(rig.form.namespace, rig.form.most_bytes, rig.form.codec + 1, SHAPE.raw_bytes)  # type: ignore[operator]
    assert rig.put(key, RECORDS[1:2]) == [OK]
    rig.plant(key[0], rig.payload(key[0]), other)
    assert rig.get(key)[0] == [MISS] and rig.refused == {"codec": 1}
    rig.plant(key[0], rig.payload(key[0]))
    stranger = MemoryTier(rig.store, RecordFormat(bytes(32), 1 << 20, rig.form.codec))
    assert not stranger.contains(key, Call(1e12)).any()  # type: ignore[union-attr]


def test_what_was_kept_with_loss_is_not_a_first_block() -> None:
    rig, key, first = Rig("int8"), keys_for(1), keys_for(1, first=True)
    assert begin(first).all() and not begin(key).any() and (key[:, :31] != first[:, :31]).any()
    assert rig.put(key, RECORDS[1:2]) == [OK]
    rig.plant(first[0], rig.payload(key[0]))
    assert rig.get(first)[0] == [MISS] and rig.refused == {"kind": 1}
    lying = changed(rig.payload(key[0]), 6, 1)  # and says that it lost nothing
    rig.plant(first[0], lying)
    assert rig.get(first)[0] == [MISS] and rig.refused == {"kind": 1, "digest": 1}


# -- several parts

def test_parts_that_do_not_belong_together() -> None:
    rig, key = Rig("plane", most=PARTS), keys_for(1)
    parts = -(-len(rig.own.encode(RECORDS[1])) // 1000)
    assert rig.put(key, RECORDS[1:2]) == [OK] and len(rig.store.objects) == parts > 2
    whole, others = dict(rig.store.objects), part_keys(rig.own.digest, key[0], parts)
    second = Rig("plane", most=PARTS)
    changed_record = RECORDS[1:2].copy()
    changed_record[0, :2] ^= 1  # of the same length, and not the same
    assert second.put(key, changed_record) == [OK] and len(second.store.objects) == parts

    def exchange(a: Bytes, payload: bytes) -> None:
        rig.plant(a, payload)

    cases: dict[str, Callable[[], Any]] = {
        "missing": lambda: rig.store.remove(rig.name(others[0])),
        "another's": lambda: exchange(others[0], second.payload(others[0])),
        "in another order": lambda: exchange(others[0], rig.payload(others[1])),
        "too short": lambda: exchange(others[0], rig.payload(others[0])[:-1]),
        "empty": lambda: exchange(others[0], b""),
        "a first part": lambda: exchange(others[1], rig.payload(key[0])),
        "of one moment, and of another": lambda: exchange(key[0], second.payload(key[0])),
    }
    for at, (name, hurt) in enumerate(cases.items(), 1):
        hurt()
        assert rig.get(key)[0] == [MISS] and rig.refused == {"parts": at}, name
        assert not rig.store.objects, "the rest is of no use"
        for each, record in whole.items():
            rig.store.put(each, record)
    assert rig.get(key)[0] == [OK]
    rig.plant(others[0], changed(rig.payload(others[0]), ENVELOPE_BYTES + 7, 99))  # the same envelope, and other bytes
    assert rig.get(key)[0] == [MISS] and rig.refused == {"parts": len(cases) + 1}


def test_a_part_that_is_late_is_no_damage() -> None:
    rig, key = Rig("plane", most=PARTS), keys_for(1)
    assert rig.put(key, RECORDS[1:2]) == [OK]
    held, answers = dict(rig.store.objects), iter([None, "timeout"])
    rig.tier.plan = lambda operation: next(answers) if operation == "get" else None
    assert rig.get(key)[0] == [int(Outcome.TIMEOUT)] and not rig.refused and rig.store.objects == held
    rig.tier.plan = lambda _: None
    assert rig.get(key)[0] == [OK]


def test_a_first_part_is_stored_last() -> None:
    """Who sees it may look for the others."""
    rig, keys = Rig("plane", most=PARTS), keys_for(1, 2)
    answers = iter(["failed", None, None])
    rig.tier.plan = lambda operation: next(answers) if operation == "put" else None
    assert rig.put(keys, RECORDS[1:3]) == [int(Outcome.FAILED), OK]
    assert rig.name(keys[0]) not in rig.store.objects
    rig.tier.plan = lambda _: None
    assert rig.get(keys)[0] == [MISS, OK] and not rig.refused


# -- what slots hold, and calls

@pytest.mark.parametrize("pool", ["raw", "plane"])
def test_a_damaged_slot_goes_no_further(pool: str) -> None:
    rig, keys = Rig({"raw": "plane", "plane": "raw"}[pool], pool), keys_for(1, 2, 3)
    slots = rig.slots_of(RECORDS[:3])
    digests = digests_of(slots)
    slots[1, 70] ^= 1
    assert rig.put(keys, slots, digests) == [OK, CORRUPT, OK] and rig.refused == {"slot": 1}
    assert len(rig.store.objects) == 2


def test_slots_that_hold_no_record_of_the_pool() -> None:
    rig, keys = Rig("raw", "plane"), keys_for(1, 2)
    slots = rig.slots_of(RECORDS[:2])
    slots[0, :8] = 0
    assert rig.put(keys, slots) == [CORRUPT, OK] and rig.refused == {"slot": 1}


def test_other_sizes_than_a_slots() -> None:
    rig, key, slots = Rig("plane"), keys_for(1), RECORDS[:1].copy()
    at = np.array([slots.ctypes.data])
    few = np.array([SHAPE.raw_bytes - 64])
    assert rig.way.put_from(key, at, few, digests_of(slots), rig.terms()).tolist() == [Outcome.TOO_LARGE]
    assert rig.put(key, slots) == [OK]
    assert rig.way.get_into(key, at, few, rig.terms()).outcomes.tolist() == [MISS] and not rig.refused


def test_what_does_not_fit_into_a_slot_of_the_pool() -> None:
    """A record that was stored above another pool's codec, whose slots are larger."""
    rig, key = Rig("raw", "plane"), keys_for(1)
    assert rig.put(key, rig.slots_of(RECORDS[:1])) == [OK]
    envelope = rig.payload(key[0])[:ENVELOPE_BYTES]
    rig.plant(key[0], envelope + np.random.default_rng(1).integers(0, 256, SHAPE.raw_bytes, np.uint8).tobytes())
    assert rig.get(key)[0] == [MISS] and rig.refused == {"overlong": 1}


def test_a_cancelled_batch_is_not_coded() -> None:
    rig, keys = Rig("plane"), keys_for(1, 2)
    slots = RECORDS[:2].copy()
    at, sizes = slots.ctypes.data + np.arange(2) * slots.strides[0], np.full(2, slots.shape[1])
    found = rig.way.put_from(keys, at, sizes, digests_of(slots), Terms(1.0, lambda: True))
    assert found.tolist() == [Outcome.CANCELLED] * 2 and not rig.coding.tally.stats().encoded_blocks


def test_a_tier_that_fails_is_told_so_and_nothing_is_refused() -> None:
    rig, keys = Rig("plane"), keys_for(1, 2)
    for fault in ("raise", "failed", "timeout", "nonsense"):
        rig.tier.plan = lambda _, fault=fault: fault  # type: ignore[misc]
        assert OK not in rig.put(keys, RECORDS[:2].copy()) + rig.get(keys)[0]
    assert not rig.refused


def test_batches_of_nothing() -> None:
    rig, none = Rig("plane"), keys_of()
    assert rig.put(none, RECORDS[:0].copy()) == [] and rig.get(none)[0] == []
    assert not len(rig.way.delete(none, Call(1e12)))


def test_a_tier_whose_payloads_hold_no_part() -> None:
    with pytest.raises(ConfigError, match="hold no part of a coded record"):
        Rig("plane", most=100)


def test_time_is_of_calls_and_not_of_what_is_between() -> None:
    terms = Terms(5.0, lambda: False)
    with terms.call() as call:
        assert 4.9 < call.left() <= 5.0
    terms._left = 0.0
    with terms.call() as call:
        assert call.left() == 0.0


def test_no_call_is_made_for_which_there_is_no_time() -> None:
    """The breaker would count each, and the tier has done nothing wrong by them."""
    rig, keys, slots = Rig("plane", most=PARTS), keys_for(1, 2, 3), RECORDS[:3].copy()
    at, sizes = slots.ctypes.data + np.arange(3) * slots.strides[0], np.full(3, slots.shape[1])
    assert rig.put(keys, slots) == [OK] * 3
    terms = rig.terms()
    rig.tier.plan = lambda _: setattr(terms, "_left", -1.0)  # the first call takes all of it
    calls = dict(rig.tier.calls)
    assert rig.way.put_from(keys, at, sizes, digests_of(slots), terms).tolist() == [Outcome.TIMEOUT] * 3
    assert rig.tier.calls["put"] == calls["put"] + 1
    terms = rig.terms()
    assert rig.way.get_into(keys, at, sizes, terms).outcomes.tolist() == [Outcome.TIMEOUT] * 3
    assert rig.tier.calls["get"] == calls.get("get", 0) + 1 and not rig.refused
    rig.tier.plan = lambda _: None
    assert rig.get(keys)[0] == [OK] * 3


def test_threads_have_memory_of_their_own() -> None:
    rig, keys = Rig("cachegen"), keys_for(*range(40))
    wrong: list[Any] = []

    def work(at: int) -> None:
        mine = slice(10 * at, 10 * at + 10)
        for _ in range(5):
            outcomes = rig.put(keys[mine], RECORDS[mine].copy())
            came, slots, _ = rig.get(keys[mine])
            right = np.stack([lost(rig.own, row) for row in RECORDS[mine]])
            if outcomes != [OK] * 10 or came != [OK] * 10 or (slots != right).any():
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 2 <= len(rig.way._scratches._idle) <= 4 + 4 + 3  # of calls, and of who codes for them
    most = 10 * (rig.own.worst_bytes + 2 * 4096) + 3 * (rig.own.worst_bytes + 4096) * 10
    assert all(scratch.nbytes() <= most for scratch in rig.way._scratches._idle)


def test_several_threads_code_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.tiers.transcoding._AT_ONCE_BYTES", SHAPE.raw_bytes)
    seen: set[str] = set()
    met = threading.Barrier(3, timeout=20)  # none goes on before three are there

    class Watched(Transcoded):
        def _encode(self, *given: Any) -> None:
            if len(seen) < 3:
                seen.add(threading.current_thread().name)
                met.wait()
            super()._encode(*given)

    rig, keys = Rig("cachegen"), keys_for(*range(3))
    rig.way = Watched(rig.guard, rig.coding, "rig", 3)
    assert rig.put(keys, RECORDS[:3].copy()) == [OK] * 3
    assert len(seen) == 3 and sum("rig-codec" in name for name in seen) == 2
    outcomes, came, _ = rig.get(keys)
    assert outcomes == [OK] * 3 and (came == np.stack([lost(rig.own, row) for row in RECORDS[:3]])).all()
    rig.way.close()
    assert not [thread for thread in threading.enumerate() if "rig-codec" in thread.name and thread.name in seen]
    assert rig.put(keys_for(9), RECORDS[9:10].copy()) == [OK], "by the caller alone"
