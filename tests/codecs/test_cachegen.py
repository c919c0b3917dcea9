"""The entropy-coded codec: its bytes against a slow coder, every value to half a step, and tables that are shares of one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.codecs import RecordShape, Tables, calibrate, make_codec
from kvortex.codecs.cachegen import LEVELS, CacheGenCodec, _shares
from kvortex.codecs.tables import BINS
from kvortex.errors import CodecError
from tests.codecs.sample import MODELS, SHAPES, records_of, tables_of, values_of
from tests.naive_codecs import cachegen_record

SHAPE = RecordShape(2, 1, 64)
Patterns = npt.NDArray[np.uint16]


def numbers_of(patterns: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return (patterns.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def bf16(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """(n, bytes): rounded towards zero."""
    bits = numbers.astype(np.float32).view(np.uint32) >> np.uint32(16)
    return bits.astype(np.uint16).reshape(len(numbers), -1).view(np.uint8)


def codec_of(shape: RecordShape = SHAPE, tables: Tables | None = None, level: int = 1) -> CacheGenCodec:
    made = make_codec("cachegen", shape, tables or tables_of(shape, np.random.default_rng(3), 128), level=level)
    assert isinstance(made, CacheGenCodec)
    return made


@pytest.mark.parametrize("width", [0.0, 1.0, 6.0, 30.0, 3000.0])
@settings(max_examples=2)
@given(seed=st.integers(0, 1 << 30), level=st.integers(0, 2), per_stream=st.integers(1, 4))
def test_bytes_are_those_of_the_description_and_values_are_near(width: float, seed: int, level: int, per_stream: int) -> None:
    """Far too narrow and far too wide for the tables as well: then most values escape."""
    rng, codec = np.random.default_rng(seed), codec_of(level=level)
    codec._form[:] = per_stream  # planes, before anybody asks for the digest
    record = bf16(rng.normal(size=(1, SHAPE.raw_bytes // 2)) * width)[0]
    room = np.zeros((1, codec.worst_bytes), np.uint8)
    (size,) = codec.encode_into(record[None], room)
    coded = room[0, :size].tobytes()
    if coded[8]:  # kept exactly, since that is shorter
        assert codec.decode(coded) == record.tobytes() and width > 10
        return
    assert coded == cachegen_record(record, codec)
    back = np.frombuffer(codec.decode(coded), np.uint8)
    was, now = (numbers_of(part).reshape(SHAPE.planes, -1) for part in (record, back))
    step = codec._step[:, None].astype(np.float64)
    assert (np.abs(was - now) <= step / 2 * 1.001 + np.abs(was) * 2.0**-8 + np.abs(now) * 2.0**-8).all()


@pytest.mark.parametrize("value", [0x7F80, 0xFF80, 0x7FC1, 0x7F7F])
def test_what_no_step_reaches_is_kept_exactly(value: int) -> None:
    codec, record = codec_of(), bf16(np.random.default_rng(1).normal(size=(1, SHAPE.raw_bytes // 2)))[0].copy()
    record.view(np.uint16)[100] = value
    coded = codec.encode(record)
    assert codec.decode(coded) == record.tobytes()
    assert codec.encode_into(record[None], np.zeros((1, codec.slot_bytes), np.uint8))[0] < 0


def test_a_room_that_is_too_small_is_told_what_is_needed() -> None:
    codec, records = codec_of(), bf16(np.random.default_rng(1).normal(size=(3, SHAPE.raw_bytes // 2)))
    room = np.zeros((3, codec.worst_bytes), np.uint8)
    sizes = codec.encode_into(records, room)
    guarded = np.full((3, 1024), 0x5A, np.uint8)
    assert (codec.encode_into(records, guarded[:, :512]) == -sizes).all()
    assert (guarded[:, 512:] == 0x5A).all()
    assert not codec.decode_into(guarded[:, :512].copy(), np.empty_like(records)).any()


@pytest.mark.parametrize("width", [0.0, 1.0])
def test_every_damaged_count_and_state_is_seen(width: float) -> None:
    """What a stream begins and ends with is checked by the decoder itself; words are for the digest of a record's keeper."""
    codec, record = codec_of(), bf16(np.random.default_rng(1).normal(size=(1, SHAPE.raw_bytes // 2)) * width)[0]
    coded = codec.encode(record)
    counts, states = range(8 * 64, 8 * 72), range(8 * 72, 8 * (72 + 128), 37)
    for bit in (*counts, *states):
        damaged = bytearray(coded)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError, match="contradicts itself"):
            codec.decode(damaged)


def test_shares_are_whole_and_none_is_empty() -> None:
    rng = np.random.default_rng(5)
    most_counts = np.full((2, BINS), (1 << 32) - 1)
    for counts in (rng.integers(0, 1 << 20, (2, BINS)), np.eye(2, BINS, 7), most_counts, np.zeros((2, BINS))):
        most, starts = _shares(counts.astype(np.uint32))
        for far, line in zip(most.tolist(), starts, strict=True):
            assert line[0] == 0 and line[2 * far + 2] == 1 << 14
            assert (np.diff(line[: 2 * far + 3].astype(np.int64)) > 0).all()


def test_levels_and_tables_that_cannot_be() -> None:
    tables = tables_of(SHAPE, np.random.default_rng(3), 128)
    for level in (-1, len(LEVELS), True, 1.0, "1"):
        with pytest.raises(CodecError, match="level = "):
            make_codec("cachegen", SHAPE, tables, level=level)
    with pytest.raises(CodecError, match="say nothing of distributions"):
        make_codec("cachegen", SHAPE, Tables(tables.base, tables.mean))
    digests = {codec_of(level=level).digest for level in range(len(LEVELS))}
    assert len(digests) == len(LEVELS)


def test_a_latent_is_coded() -> None:
    shape = RecordShape(3, 1, 512, parts="L")
    records = bf16(np.random.default_rng(2).normal(size=(20, shape.raw_bytes // 2)))
    codec = codec_of(shape, calibrate(records, shape))
    coded = np.zeros((20, codec.worst_bytes), np.uint8)
    sizes, back = codec.encode_into(records, coded), np.empty_like(records)
    assert codec.decode_into(coded, back).all() and records.size / sizes.sum() > 3.5
    assert np.abs(numbers_of(records) - numbers_of(back)).max() < 0.25


@pytest.mark.parametrize("model", MODELS)
def test_real_kv(model: str) -> None:
    shape, records = SHAPES[model], records_of(values_of(model))
    half = len(records) // 2
    codec = make_codec("cachegen", shape, calibrate(records[1:half], shape))
    coded, back = np.zeros((len(records) - half, codec.worst_bytes), np.uint8), np.empty_like(records[half:])
    sizes = codec.encode_into(records[half:], coded)
    assert codec.decode_into(coded, back).all()
    assert records[half:].size / sizes.sum() >= 4.2 and (sizes <= codec.slot_bytes).all()
