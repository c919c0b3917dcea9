"""Headers of records: what was written is recognised, and nothing else is."""

from __future__ import annotations

import numpy as np

from kvortex.tiers.base import Outcome
from kvortex.tiers.record import CHECKED_BYTES, HEADER, HEADER_BYTES, MAGIC, RecordFormat, _checks, check_payloads

FORM = RecordFormat(bytes(range(32)), 4096)
RNG = np.random.default_rng(1)
KEYS = RNG.integers(0, 256, (8, 32), np.uint8)
DIGESTS = RNG.integers(0, 256, (8, 16), np.uint8)
HEADERS = FORM.headers(KEYS, np.full(8, 100), DIGESTS, np.arange(8))


def test_a_header_is_144_little_endian_bytes() -> None:
    assert HEADER_BYTES == 144
    first = HEADERS[:1].tobytes()
    assert first[:8] == b"KVXRECRD" and int(MAGIC) == int.from_bytes(b"KVXRECRD", "little")
    assert first[8:16] == bytes([1, 0, 144, 0, 0, 0, 0, 0])
    assert first[16:24] == first[24:32] == (100).to_bytes(8, "little")
    assert first[32:64] == bytes(range(32)) and first[64:96] == KEYS[0].tobytes() and first[96:112] == DIGESTS[0].tobytes()


def test_the_start_of_one_header_is_that_of_many() -> None:
    for row, header in enumerate(HEADERS):
        start = FORM.start_of_header(KEYS[row].tobytes(), 100, DIGESTS[row].tobytes(), row)
        assert len(start) == CHECKED_BYTES == 128 and header.tobytes()[:CHECKED_BYTES] == start


def test_a_header_is_known_by_its_own_key_only() -> None:
    assert (FORM.check_headers(HEADERS, KEYS) == Outcome.OK).all()
    assert (FORM.check_headers(HEADERS, np.roll(KEYS, 1, 0)) == Outcome.MISS).all()


def test_another_namespace_is_a_miss() -> None:
    assert (RecordFormat(bytes(32), 4096).check_headers(HEADERS, KEYS) == Outcome.MISS).all()


def test_a_larger_payload_than_there_may_be_is_a_miss() -> None:
    assert (RecordFormat(bytes(range(32)), 99).check_headers(HEADERS, KEYS) == Outcome.MISS).all()


def test_every_bit_of_a_header_counts() -> None:
    for bit in range(8 * HEADER_BYTES):
        data = bytearray(HEADERS[:1].tobytes())
        data[bit // 8] ^= 1 << bit % 8
        assert FORM.check_headers(np.frombuffer(data, HEADER), KEYS[:1])[0] != Outcome.OK, bit


def test_another_version_codec_or_length_is_a_miss_though_its_header_checks() -> None:
    for field, value in (("version", 2), ("header_bytes", 160), ("codec", 1), ("block_bytes", 101), ("magic", 1)):
        header = HEADERS[:1].copy()
        header[field] = value
        header["check"] = _checks(header)
        assert FORM.check_headers(header, KEYS[:1])[0] == Outcome.MISS, field


def test_what_was_never_written_is_a_miss() -> None:
    assert (FORM.check_headers(np.zeros(8, HEADER), KEYS) == Outcome.MISS).all()


def test_payloads_are_checked_one_by_one() -> None:
    data = RNG.integers(0, 256, (3, 512), np.uint8)
    at, sizes = data.ctypes.data + 512 * np.arange(3), np.full(3, 512)
    digests = np.empty((3, 16), np.uint8)
    from kvortex.digests import digest_records

    digest_records(at, sizes, digests)
    data[1, 77] ^= 4
    assert check_payloads(at, sizes, digests).tolist() == [True, False, True]
