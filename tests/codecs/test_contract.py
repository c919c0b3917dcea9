"""What holds for every codec: names, digests, headers, and that damaged or foreign bytes are never handed out."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex.codecs import CODECS, RecordShape, Tables, lossless_for, make_codec, written_by
from kvortex.codecs.base import HEADER_BYTES, Codec
from kvortex.digests import digest_records
from kvortex.errors import CodecError
from kvortex.tiers import Outcome, RecordFormat
from kvortex.tiers.record import check_payloads
from tests.codecs.sample import tables_of

SHAPE = RecordShape(2, 2, 64)
TABLES = tables_of(SHAPE, np.random.default_rng(3), 128)
CODED = [name for name in CODECS if name != "raw"]


def records(count: int = 1, seed: int = 5) -> np.ndarray:
    """Numbers as attention has them, (n, raw_bytes) uint8."""
    numbers = np.random.default_rng(seed).normal(size=(count, SHAPE.raw_bytes // 2)).astype(np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def codec_of(name: str, shape: RecordShape = SHAPE, tables: Tables = TABLES) -> Codec:
    return make_codec(name, shape, tables)


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_is_deterministic_and_keeps_its_bounds(name: str) -> None:
    codec, record = codec_of(name), records()[0]
    coded = codec.encode(record)
    assert coded == codec_of(name).encode(record)
    assert len(coded) <= codec.slot_bytes <= codec.worst_bytes and codec.slot_bytes % 4 == 0
    back = codec.decode(coded)
    assert len(back) == SHAPE.raw_bytes
    assert (back == record.tobytes()) == codec.exact
    assert codec.decode(codec.encode(record, first=True)) == record.tobytes(), "what begins a sequence comes back exactly"


def test_the_digest_names_all_that_decides_bytes() -> None:
    mean = TABLES.mean.copy()
    mean[0, 0] ^= 1
    base = TABLES.base.copy()
    base[0, 0] ^= 1
    others = [codec_of(name) for name in CODED]
    others += [codec_of("plane", tables=Tables(TABLES.base, mean)), codec_of("plane", tables=Tables(base, TABLES.mean))]
    for shape in (RecordShape(2, 2, 64, order="HND"), RecordShape(2, 1, 128), RecordShape(4, 2, 64, parts="L")):
        others.append(codec_of("plane", shape, tables_of(shape, np.random.default_rng(3), 128)))
    digests = [codec.digest for codec in others]
    assert len(set(digests)) == len(digests) and {len(digest) for digest in digests} == {32}
    assert codec_of("plane").digest == digests[CODED.index("plane")]
    assert codec_of("raw").digest == b"", "a namespace is what it is without a codec"


def test_unknown_codecs_and_parameters_are_told() -> None:
    with pytest.raises(CodecError, match="codec = 'zip': must be one of raw, plane"):
        make_codec("zip", SHAPE, TABLES)
    with pytest.raises(CodecError, match="codec plane: .*budgets"):
        make_codec("plane", SHAPE, TABLES, budgets=1)
    with pytest.raises(CodecError, match="budget = 1.5"):
        make_codec("plane", SHAPE, TABLES, budget=1.5)
    with pytest.raises(CodecError, match="Calibrate with a sample"):
        make_codec("plane", SHAPE)
    with pytest.raises(CodecError, match="Calibrate with a sample"):
        make_codec("plane", RecordShape(3, 2, 64), TABLES)


def test_what_is_lossless_where() -> None:
    assert lossless_for(SHAPE) == "plane"
    assert lossless_for(RecordShape(2, 2, 64, dtype="float16")) == lossless_for(RecordShape(2, 1, 80)) == "raw"
    assert lossless_for(RecordShape(2, 2, 64, dtype="fp8_e4m3")) == lossless_for(RecordShape(2, 2, 64, 8)) == "raw"


@pytest.mark.parametrize("name", CODED)
def test_a_record_says_who_wrote_it(name: str) -> None:
    coded = codec_of(name).encode(records()[0])
    assert written_by(coded) == name
    assert written_by(coded[:63]) is None and written_by(b"x" + coded[1:]) is None
    assert written_by(coded[:4] + b"\xff\xff" + coded[6:]) is None


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("first", [False, True])
def test_every_bit_of_the_header_counts(name: str, first: bool) -> None:
    codec = codec_of(name)
    coded = codec.encode(records()[0], first=first)
    for bit in range(8 * HEADER_BYTES):
        damaged = bytearray(coded)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError, match=f"no record of {name}"):
            codec.decode(damaged)
        rows = np.frombuffer(bytes(damaged), np.uint8)[None]
        assert not codec.decode_into(rows, np.empty((1, SHAPE.raw_bytes), np.uint8)).any(), bit


@pytest.mark.parametrize("name", CODED)
def test_truncated_and_longer_records_are_refused(name: str) -> None:
    codec = codec_of(name)
    coded = codec.encode(records()[0])
    for size in (0, 1, 63, 64, 80, len(coded) // 2 & ~3, len(coded) - 4, len(coded) - 1):
        with pytest.raises(CodecError, match=f"no record of {name}"):
            codec.decode(coded[:size])
        if not size % 4:
            rows = np.frombuffer(coded[:size], np.uint8).reshape(1, size)
            assert not codec.decode_into(rows, np.empty((1, SHAPE.raw_bytes), np.uint8)).any()
    with pytest.raises(CodecError, match="and says"):
        codec.decode(coded + b"\0\0\0\0")


def test_records_of_other_codecs_and_tables_are_misses() -> None:
    writers = [codec_of(name) for name in CODED]
    writers.append(codec_of("plane", tables=tables_of(SHAPE, np.random.default_rng(3), 126)))
    for writer in writers:
        for reader in writers:
            rows = np.zeros((2, SHAPE.raw_bytes + 64), np.uint8)
            sizes = writer.encode_into(records(2), rows)
            seen = reader.decode_into(rows, np.empty((2, SHAPE.raw_bytes), np.uint8))
            assert seen.all() == (reader is writer) and seen.any() == (reader is writer)
            if reader is not writer:
                with pytest.raises(CodecError, match="written by codec|other parameters"):
                    reader.decode(rows[0, : sizes[0]])


@pytest.mark.parametrize("name", CODED)
def test_damage_anywhere_never_leads_out_of_bounds(name: str) -> None:
    """A decoder may be fooled by damaged bytes, which their keeper's digest tells; it never leaves its rows."""
    codec, rng = codec_of(name), np.random.default_rng(9)
    coded = np.zeros((64, codec.slot_bytes), np.uint8)
    sizes = codec.encode_into(records(64), coded)
    for row, size in zip(coded, sizes, strict=True):
        hits = HEADER_BYTES + rng.integers(0, size - HEADER_BYTES, rng.integers(1, 40))
        row[hits] ^= rng.integers(1, 256, len(hits), np.uint8)
    out = np.full((66, SHAPE.raw_bytes), 0x5A, np.uint8)
    codec.decode_into(coded, out[1:-1])
    assert (out[[0, -1]] == 0x5A).all()
    for row in coded[::7]:
        row[HEADER_BYTES:] = rng.integers(0, 256, codec.slot_bytes - HEADER_BYTES, np.uint8)
    codec.decode_into(coded, out[1:-1])
    assert (out[[0, -1]] == 0x5A).all()


@pytest.mark.parametrize("name", CODED)
def test_in_a_tier_every_damaged_byte_is_seen(name: str) -> None:
    """Header, payload and codec together, as a tier keeps them."""
    codec = codec_of(name)
    payload = np.frombuffer(codec.encode(records()[0]), np.uint8).copy()
    size, keys = np.array([payload.size]), np.zeros((1, 32), np.uint8)
    at, digest = np.array([payload.ctypes.data]), np.empty((1, 16), np.uint8)
    digest_records(at, size, digest)
    form = RecordFormat(codec.digest, codec.worst_bytes, codec.number, SHAPE.raw_bytes)
    header = form.headers(keys, size, digest)
    assert form.check_headers(header, keys)[0] == Outcome.OK and check_payloads(at, size, digest).all()
    for where in np.random.default_rng(1).integers(0, payload.size, 200):
        payload[where] ^= 1 << where % 8
        assert not check_payloads(at, size, digest).any()
        payload[where] ^= 1 << where % 8
    other = RecordFormat(codec.digest, codec.worst_bytes, codec.number + 1, SHAPE.raw_bytes)
    assert other.check_headers(header, keys)[0] == Outcome.MISS, "a codec that the reader lacks"
    another = RecordFormat(codec.digest, codec.worst_bytes, codec.number, SHAPE.raw_bytes + 2)
    assert another.check_headers(header, keys)[0] == Outcome.MISS, "blocks of another length"


@pytest.mark.parametrize("name", CODECS)
def test_arrays_that_do_not_fit_are_told(name: str) -> None:
    codec, good = codec_of(name), records(2)
    out = np.empty((2, codec.worst_bytes), np.uint8)
    for bad in (good[0], good[:, :-4], good.view(np.uint16), good[:, ::2], good.tolist()):
        with pytest.raises(CodecError, match="records must"):
            codec.encode_into(bad, out)  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="too small"):
        codec.encode_into(good, out[:1])
    with pytest.raises(CodecError, match="too small"):
        codec.encode_into(good, out[:, :60])
    with pytest.raises(CodecError, match="multiples of 4"):
        codec.encode_into(good, np.empty((2, codec.worst_bytes + 1), np.uint8)[:, 1:])
    with pytest.raises(CodecError, match="out must"):
        codec.decode_into(out, good[:, :-4])
    with pytest.raises(CodecError, match="are no record"):
        codec.encode(b"1234")
