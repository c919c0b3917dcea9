"""Digests of records in host memory, beside the definition written down in Python's integers."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex.digests import DIGEST_BYTES, digest_records
from tests.naive_digest import digest


def of(data: bytes) -> bytes:
    array = np.frombuffer(data, np.uint8)
    out = np.empty((1, DIGEST_BYTES), np.uint8)
    digest_records(np.array([array.ctypes.data]), np.array([len(data)]), out)
    return out.tobytes()


@pytest.mark.parametrize("nbytes", [0, 1, 3, 4, 15, 16, 511, 512, 513, 4096, 18432, 70001])
def test_the_digest_is_what_its_definition_says(nbytes: int) -> None:
    data = np.random.default_rng(nbytes).bytes(nbytes)
    assert of(data) == digest(data)


def test_records_of_zeros_that_differ_in_length_differ() -> None:
    assert len({of(bytes(nbytes)) for nbytes in range(0, 2000, 7)}) == len(range(0, 2000, 7))


def test_every_bit_of_a_record_counts_in_both_halves() -> None:
    data = bytearray(np.random.default_rng(1).bytes(1040))
    whole = of(bytes(data))
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        other = of(bytes(data))
        assert other[:8] != whole[:8] and other[8:] != whole[8:], bit
        data[bit // 8] ^= 1 << bit % 8


def test_rows_and_words_that_change_places_are_seen() -> None:
    data = np.random.default_rng(2).bytes(2048)
    assert of(data[512:1024] + data[:512] + data[1024:]) != of(data)
    assert of(data[4:8] + data[:4] + data[8:]) != of(data)


def test_many_at_once() -> None:
    data = np.random.default_rng(3).integers(0, 256, (5, 4096), np.uint8)
    sizes = np.array([4096, 0, 100, 4095, 512])
    out = np.empty((5, DIGEST_BYTES), np.uint8)
    digest_records(data.ctypes.data + 4096 * np.arange(5), sizes, out)
    assert [row.tobytes() for row in out] == [digest(row[:size].tobytes()) for row, size in zip(data, sizes, strict=True)]
