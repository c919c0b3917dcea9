"""The lossless codec: every bit comes back, whatever the bits are; and how short real KV becomes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.codecs import RecordShape, calibrate, make_codec
from kvortex.codecs.base import CODED, DECLINED, HEADER, HEADER_BYTES, VERBATIM, Bytes, Codec
from kvortex.errors import CodecError
from kvortex.kernels.plane_form import MOST_TAIL, RAW_TILE
from tests.codecs.sample import MODELS, SHAPES, records_of, tables_of, values_of
from tests.kernels.plane_cases import EDGES, change_code, edges
from tests.naive_codecs import plane_record

SMALL = RecordShape(1, 2, 64)  # two planes of two tiles
RNG = np.random.default_rng(7)


def plane(shape: RecordShape = SMALL, base: int | None = None) -> Codec:
    return make_codec("plane", shape, tables_of(shape, np.random.default_rng(1), base))


def round_trip(codec: Codec, records: Bytes, room: int | None = None) -> np.ndarray:
    """Asserts that every record comes back, with guards around everything; gives the sizes."""
    room = codec.worst_bytes if room is None else room
    coded = np.full((len(records) + 2, room), 0xA5, np.uint8)
    sizes = codec.encode_into(records, coded[1:-1])
    back = np.full((len(records) + 2, records.shape[1]), 0x5A, np.uint8)
    assert (coded[[0, -1]] == 0xA5).all()
    assert (sizes > 0).all() and codec.decode_into(coded[1:-1], back[1:-1]).all()
    assert (back[[0, -1]] == 0x5A).all()
    assert (back[1:-1] == records).all()
    for row, size in zip(coded[1:-1], sizes, strict=True):
        assert (row[size:] == 0xA5).all(), "bytes behind a record stay as they are"
    return sizes


def stored(codec: Codec, record: Bytes) -> int:
    return int(np.frombuffer(codec.encode(record)[:HEADER_BYTES], HEADER)["stored"][0])


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("model", MODELS)
def test_real_kv_within_its_slot(model: str, order: str) -> None:
    """Tables from the first half of the text, ratio on the second, headers and fill included."""
    like = SHAPES[model]
    shape = RecordShape(like.layers, like.heads, like.head_dim, order=order)
    records = records_of(values_of(model), order)
    half = len(records) // 2
    codec = make_codec("plane", shape, calibrate(records[1:half], shape))
    assert codec.slot_bytes <= 0.72 * shape.raw_bytes
    sizes = round_trip(codec, records, codec.slot_bytes)
    assert records[half:].size / sizes[half:].sum() >= 1.47
    assert records.size / sizes.sum() >= 1.47


@pytest.mark.parametrize("model", MODELS)
def test_real_kv_is_coded_as_described(model: str) -> None:
    shape = SHAPES[model]
    records = records_of(values_of(model))
    codec = make_codec("plane", shape, calibrate(records, shape))
    for record in records[:2]:
        assert codec.encode(record) == plane_record(record, codec)


PAGES = {
    "zeros": np.zeros((16, 256), np.uint16),
    "negative zeros": np.full((16, 256), 0x8000, np.uint16),
    "infinities": np.full((16, 256), 0x7F80, np.uint16),
    "NaN payloads": (RNG.integers(0x7F81, 0x8000, (16, 256)) | RNG.integers(0, 2, (16, 256)) << 15).astype(np.uint16),
    "denormals": RNG.integers(0, 0x80, (16, 256)).astype(np.uint16),
    "tiny exponents": (RNG.integers(0, 12, (16, 256)) << 7).astype(np.uint16),
    "huge exponents": (RNG.integers(240, 256, (16, 256)) << 7).astype(np.uint16),
    "anything": RNG.integers(0, 1 << 16, (16, 256)).astype(np.uint16),
}


@pytest.mark.parametrize("base", [0, 3, 127, 255, None])
@pytest.mark.parametrize("name", PAGES)
def test_hostile_pages(name: str, base: int | None) -> None:
    codec, record = plane(base=base), PAGES[name].reshape(1, -1).view(np.uint8)
    round_trip(codec, record)
    assert codec.encode(record) == plane_record(record[0], codec)


@pytest.mark.parametrize("odd", [0, 1])
def test_every_exponent_under_every_base(odd: int) -> None:
    """65,536 pairs, in even and odd channels, each beside values that are no escapes."""
    shape = RecordShape(256, 1, 64, parts="L")  # a plane for each base
    tables = tables_of(shape, RNG)
    base = tables.base.copy()
    base[:] = np.arange(256)[:, None]
    codec = make_codec("plane", shape, type(tables)(base, tables.mean))
    usual = np.clip(np.arange(256) - 2, 0, 255).astype(np.uint16) << 7
    records = np.empty((16, 256, 16, 64), np.uint16)
    records[:] = usual[:, None, None]
    exponents = np.arange(256, dtype=np.uint16).reshape(16, 16)
    records[:, :, :, odd::2] = (exponents << 7)[:, None, :, None]
    round_trip(codec, records.reshape(16, -1).view(np.uint8))


@given(st.binary(min_size=2048, max_size=2048), st.sampled_from([0, 1, 9, 10, 127, 255, None]), st.integers(0, 3))
@settings(max_examples=60)
def test_any_bytes(data: bytes, base: int | None, near: int) -> None:
    """Bytes as they come, or with exponents drawn to one place, so that all tiers are used."""
    shape = RecordShape(1, 1, 64, parts="L")
    codec = plane(shape, base)
    values = np.frombuffer(data, np.uint16)
    if near:
        values = values & 0x807F | ((values >> 7 & (1 << near) - 1) + (base or 0) & 255) << 7
    record = values.astype(np.uint16).view(np.uint8)[None]
    round_trip(codec, record)
    assert codec.encode(record) == plane_record(record[0], codec)


def test_a_hundred_million_values() -> None:
    """Random signs and mantissas; exponents around the bases, wide or narrow, and anything in between."""
    shape, rng = RecordShape(2, 2, 64), np.random.default_rng(11)
    codec = plane(shape)
    count = 2**16 * 16 // shape.tokens // 8
    lean = np.repeat(codec.tables.base[:, None, :], 16, 1).reshape(-1).astype(np.int16)  # type: ignore[attr-defined]
    done = 0
    for turn in range(100_000_000 // (count * lean.size) + 1):
        bits = rng.integers(0, 1 << 16, (count, lean.size), np.uint16)
        reach = (0, 3, 4, 9, 12, 300)[turn % 6]
        if reach:
            exponents = lean - (bits >> 7 & 255).astype(np.int16) % (reach + 1) + (turn // 6 % 3 - 1)
            bits = bits & 0x807F | (exponents.astype(np.uint16) & 255) << 7
        round_trip(codec, bits.view(np.uint8))
        done += bits.size
    assert done >= 100_000_000


def edge_records(codec: Codec) -> Bytes:
    """(4, raw_bytes) of two tiles, with tails of all kinds of lengths."""
    pages = edges(np.random.default_rng(3), codec.tables.base)  # type: ignore[attr-defined]
    return np.stack(pages).reshape(len(pages), -1).view(np.uint8)


def test_tails_of_all_lengths_are_coded_as_described() -> None:
    codec = plane(RecordShape(1, 1, 64), 127)
    records = edge_records(codec)
    round_trip(codec, records)
    for record, tiles in zip(records, EDGES, strict=True):
        coded = codec.encode(record)
        assert coded == plane_record(record, codec)
        for entry, (second, third) in zip(np.frombuffer(coded[64:72], np.uint32).tolist(), tiles, strict=True):
            fits = 12 * -(-second // 32) + -(-third // 4) * 4 <= MOST_TAIL
            assert entry == (second | third << 16 if fits else RAW_TILE)


@pytest.mark.parametrize(("what", "at"), [("first tier", 64 + 16), ("one escape more", 0), ("one escape less", 196)])
def test_a_tile_that_contradicts_its_entry_is_told(what: str, at: int) -> None:
    """Of the two tiles the first has 512 and 3 values of the upper tiers, and the second one nothing but escapes."""
    codec = plane(RecordShape(1, 1, 64), 127)
    coded = np.zeros((1, codec.worst_bytes), np.uint8)
    record = edge_records(codec)[2:3]
    codec.encode_into(record, coded)
    if what == "first tier":
        change_code(coded[0], at)
    else:
        place = codec.fixed_bytes + at  # type: ignore[attr-defined]
        assert (coded[0, place] & 7 == 7) == (what == "one escape less")
        coded[0, place] = coded[0, place] & 0xF8 | (6 if what == "one escape less" else 7)
    assert not codec.decode_into(coded, np.empty_like(record)).any()


def test_records_of_the_version_before_are_none() -> None:
    """Their codes lie otherwise, and nothing else in them says so."""
    codec, record = plane(), PAGES["denormals"].reshape(1, -1).view(np.uint8)
    coded = np.zeros((1, codec.worst_bytes), np.uint8)
    codec.encode_into(record, coded)
    assert codec.version == 2 == coded[0, :HEADER_BYTES].view(HEADER)["version"][0]
    coded[0, :HEADER_BYTES].view(HEADER)["version"] = 1
    back = np.full_like(record, 0x5A)
    assert not codec.decode_into(coded, back).any() and (back == 0x5A).all()
    assert "version 1" in str(codec.refusal(coded[0]))


def test_a_tile_that_would_grow_is_kept_and_a_record_that_would_grow_too() -> None:
    codec, raw = plane(base=0), SMALL.raw_bytes
    wild = (RNG.integers(30, 60, (16, 256)) << 7).astype(np.uint16)
    assert stored(codec, wild.view(np.uint8)) == VERBATIM and len(codec.encode(wild)) == 64 + raw == codec.worst_bytes
    tame = np.zeros((16, 256), np.uint16)
    tame.reshape(2, 16, 2, 64)[0, :, 0] = 40 << 7  # one of four tiles
    assert stored(codec, tame.view(np.uint8)) == CODED
    assert len(codec.encode(tame)) == 64 + 16 + 2048 + 3 * (1280 + 12 * 32)


def test_what_does_not_fit_its_slot_is_declined_and_says_so() -> None:
    codec = plane()
    wild = RNG.integers(0, 1 << 16, (3, 4096)).astype(np.uint16).view(np.uint8)
    out = np.full((3, codec.slot_bytes), 0xA5, np.uint8)
    needed = codec.encode_into(wild, out)
    assert (needed < -codec.slot_bytes).all()
    header = out[:, :HEADER_BYTES].copy().view(HEADER)[:, 0]
    assert (header["stored"] == DECLINED).all() and (header["used_bytes"] == -needed).all()
    back = np.zeros_like(wild)
    assert not codec.decode_into(out, back).any() and not back.any()
    tight = np.empty((3, -int(needed[0]) - 4), np.uint8)
    assert (codec.encode_into(wild, tight) == needed).all()
    round_trip(codec, wild, -int(needed[0]))


@pytest.mark.parametrize("shape", [RecordShape(1, 1, 80), RecordShape(1, 1, 64, 8), RecordShape(1, 1, 64, dtype="float16")])
def test_other_records_are_refused(shape: RecordShape) -> None:
    with pytest.raises(CodecError, match="Use codec raw"):
        plane(shape)


def test_bytes_do_not_depend_on_the_batch_or_the_room() -> None:
    codec = plane(base=40)
    records = (RNG.integers(30, 42, (5, 4096)) << 7).astype(np.uint16).view(np.uint8)
    out = np.zeros((5, codec.worst_bytes), np.uint8)
    sizes = codec.encode_into(records, out)
    for record, row, size in zip(records, out, sizes, strict=True):
        assert codec.encode(record) == row[:size].tobytes()


@pytest.mark.parametrize("model", MODELS)
def test_slots_measured_by_a_sample_hold_what_is_not_in_it(model: str) -> None:
    """Blocks of the rest of the text, and its first one, whose attention sinks no sample has; and they need not be longer."""
    shape = SHAPES[model]
    records = records_of(values_of(model))
    count = len(records)
    for first, last in ((1, count // 2), (count // 2, count), (1, count)):
        tables = calibrate(records[first:last], shape)
        whole = make_codec("plane", shape, tables, budget=1)
        sizes = whole.encode_into(records, np.zeros((count, whole.slot_bytes), np.uint8))
        assert tables.longest == sizes[first:last].max() <= sizes.max() < tables.longest + 0.015 * shape.raw_bytes
        slot_bytes = make_codec("plane", shape, tables).slot_bytes
        assert sizes.max() <= slot_bytes <= tables.longest + 0.02 * shape.raw_bytes + 4096
