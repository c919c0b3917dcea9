"""Tables: what calibration finds, and the file that keeps it."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from kvortex.codecs import RecordShape, Tables, calibrate, make_codec
from kvortex.errors import CodecError
from kvortex.kernels import cache
from tests.codecs.sample import tables_of

SHAPE = RecordShape(2, 1, 64)


def cost(below: int) -> int:
    return 2 if 1 <= below <= 3 else 5 if below == 0 or 4 <= below <= 9 else 13


def test_bases_cost_the_fewest_bits_and_means_are_means() -> None:
    rng = np.random.default_rng(2)
    numbers = (rng.normal(size=(6, 4, 16, 64)) * np.exp2(rng.integers(-20, 20, (1, 4, 1, 64))) + 3).astype(np.float32)
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    tables = calibrate(bits.reshape(6, -1).view(np.uint8), SHAPE)
    kept = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(tables.means, kept.mean((0, 2), dtype=np.float64), rtol=2**-8)
    for plane, channel in [(0, 0), (3, 63), (1, 17)]:
        exponents = bits[:, plane, :, channel].ravel() >> 7 & 255
        bits_of = [sum(cost(base - int(e)) for e in exponents) for base in range(256)]
        assert bits_of[tables.base[plane, channel]] == min(bits_of)


def test_what_is_not_finite_leaves_no_mark_on_means() -> None:
    values = np.full((1, 4, 16, 64), 0x7FC1, np.uint16)
    assert (calibrate(values.reshape(1, -1).view(np.uint8), SHAPE).means == 0).all()
    values[:, :, :4] = 0x4000  # 2.0
    assert (calibrate(values.reshape(1, -1).view(np.uint8), SHAPE).means == 2).all()


def test_no_sample_and_other_dtypes_are_refused() -> None:
    with pytest.raises(CodecError, match="teaches nothing"):
        calibrate(np.empty((0, SHAPE.raw_bytes), np.uint8), SHAPE)
    with pytest.raises(CodecError, match="bfloat16"):
        calibrate(np.zeros((1, SHAPE.raw_bytes), np.uint8), RecordShape(2, 1, 64, dtype="float16"))


def test_a_file_comes_back(tmp_path: Path) -> None:
    shape = RecordShape(2, 3, 64, 32, "HND")
    tables = tables_of(shape, np.random.default_rng(1))
    tables.save(tmp_path / "deep" / "model.tables", shape)
    back, of = Tables.load(tmp_path / "deep" / "model.tables")
    assert of == shape and back.digest == tables.digest
    assert (back.base == tables.base).all() and (back.mean == tables.mean).all()
    with pytest.raises(ValueError, match="read-only"):
        back.base[0, 0] = 1


def test_the_longest_record_of_the_sample_measures_slots(tmp_path: Path) -> None:
    shape = RecordShape(8, 4, 128)
    numbers = np.random.default_rng(3).normal(size=(5, shape.raw_bytes // 2)).astype(np.float32)
    records = (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    tables = calibrate(records, shape)
    whole = make_codec("plane", shape, tables, budget=1)
    assert tables.longest == whole.encode_into(records, np.zeros((5, whole.slot_bytes), np.uint8)).max() > 0.6 * shape.raw_bytes
    codec = make_codec("plane", shape, tables)
    assert codec.slot_bytes % 4096 == 0 and codec.digest == whole.digest
    assert 0 <= codec.slot_bytes - tables.longest - int(0.02 * shape.raw_bytes) < 4096
    tables.save(tmp_path / "t", shape)
    assert Tables.load(tmp_path / "t")[0].longest == tables.longest
    noise = np.random.default_rng(4).integers(0, 256, records.shape, np.uint8)
    assert make_codec("plane", shape, calibrate(noise, shape)).slot_bytes == int(0.72 * shape.raw_bytes) & ~15
    assert calibrate(np.zeros((1, 512), np.uint8), RecordShape(1, 1, 8)).longest == 0  # which plane does not code


def test_a_file_of_the_version_before_says_nothing_of_lengths(tmp_path: Path) -> None:
    """And its tables have the digest that they had, or all that was stored by it would be lost."""
    made = tables_of(SHAPE, np.random.default_rng(1))
    assert made.longest == 0
    made.save(tmp_path / "t", SHAPE)
    body = cache.read(tmp_path / "t", b"KVXTABLE", 3)
    assert body is not None and cache.write(tmp_path / "t", b"KVXTABLE", 2, body[:-8])
    back, of = Tables.load(tmp_path / "t")
    assert of == SHAPE and back.longest == 0 and back.digest == made.digest
    assert make_codec("plane", SHAPE, back).slot_bytes == int(0.72 * SHAPE.raw_bytes) & ~15
    longer = Tables(back.base, back.mean, back.spread, back.counts, 5000)
    assert longer.digest != made.digest, "slots of other lengths are not told apart"


@pytest.mark.parametrize("damage", ["none", "empty", "truncated", "longer", "flipped", "version", "foreign"])
def test_a_damaged_file_is_told(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.tables"
    if damage != "none":
        tables_of(SHAPE, np.random.default_rng(1)).save(path, SHAPE)
        data = bytearray(path.read_bytes())
        if damage == "flipped":
            data[-1] ^= 1
        elif damage == "version":
            data[8] += 1
        elif damage == "foreign":
            data[:8] = b"ANOTHER!"
        elif damage == "longer":
            data += b"x"
        else:
            del data[0 if damage == "empty" else len(data) // 2 :]
        path.write_bytes(data)
    with pytest.raises(CodecError, match="no file of codec tables|calibrate anew"):
        Tables.load(path)


def test_a_pipe_is_no_file_to_wait_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    heard: list[str] = []

    def load() -> None:
        try:
            Tables.load(tmp_path / "pipe")
        except CodecError as error:
            heard.append(str(error))

    reader = threading.Thread(target=load)
    reader.start()
    reader.join(10)
    waited = reader.is_alive()
    if waited:  # gives it an end
        os.close(os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK))
        reader.join()
    assert not waited and "no file of codec tables" in heard[0]


def test_a_file_of_another_size_is_told(tmp_path: Path) -> None:
    from kvortex.kernels import cache

    for sizes, message in [
        ((2, 1, 64, 16, 0, 0, 0), "4 planes and 64 channels"),
        ((0, 1, 64, 16, 0, 0, 0), "layers = 0"),
        ((2, 1, 64, 16, 0, 2, 0), "cannot be"),
        ((2, 1, 1 << 31, 16, 0, 0, 0), "head_dim = "),
    ]:
        cache.write(tmp_path / "t", b"KVXTABLE", 2, struct.pack("<7I", *sizes) + bytes(10))
        with pytest.raises(CodecError, match=message):
            Tables.load(tmp_path / "t")
    for name in ("x" * 5000, "a\0b", "\ud800", "", "/", "/dev/zero"):
        with pytest.raises(CodecError, match="no file of codec tables"):
            Tables.load(name)
    cache.write(tmp_path / "t", b"KVXTABLE", 2, b"short")
    with pytest.raises(CodecError, match="no file of codec tables"):
        Tables.load(tmp_path / "t")


def test_tables_check_themselves(tmp_path: Path) -> None:
    base, mean = np.zeros((1, 64), np.uint8), np.full((1, 64), 0x7F80, np.uint16)
    with pytest.raises(CodecError, match="not finite"):
        Tables(base, mean)
    with pytest.raises(CodecError, match="planes, channels"):
        Tables(base, np.zeros((2, 64), np.uint16))
    for name in ("a\0b", str(tmp_path / "\ud800")):  # no names of files at all
        with pytest.raises(CodecError, match="cannot be written"):
            Tables(base, np.zeros((1, 64), np.uint16)).save(name, RecordShape(1, 1, 64, parts="L"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CodecError, match="cannot be written"):
        Tables(base, np.zeros((1, 64), np.uint16)).save(tmp_path / "file" / "t", RecordShape(1, 1, 64, parts="L"))
    with pytest.raises(CodecError, match="for no records of layers=2"):
        Tables(base, np.zeros((1, 64), np.uint16)).save(tmp_path / "t", SHAPE)
