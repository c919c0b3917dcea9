"""Digests of records in host memory, beside the definition written down in Python's integers."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex.devices.native import memcpy_address
from kvortex.digests import DIGEST_BYTES, digest_records
from kvortex.digests.host import add_lengths, copy_part, numbers
from kvortex.digests.keys import columns, rows
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


@pytest.mark.parametrize("shift", range(9))
def test_records_at_any_address(shift: int) -> None:
    data = np.random.default_rng(shift).integers(0, 256, 5000, np.uint8)
    for nbytes in (1, 7, 8, 9, 511, 520, 1029, 4990):
        out = np.empty((1, DIGEST_BYTES), np.uint8)
        digest_records(np.array([data.ctypes.data + shift]), np.array([nbytes]), out)
        assert out.tobytes() == digest(data[shift : shift + nbytes].tobytes())


@pytest.mark.parametrize("of_source", [True, False])
def test_parts_of_a_record_add_up_wherever_it_is_cut(of_source: bool) -> None:
    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, 30_000, np.uint8)
    copy = np.full(data.size + 64, 0xEE, np.uint8)
    fixed = numbers(data.size)
    for _ in range(20):
        cuts = np.concatenate(([0], np.sort(rng.integers(0, data.size + 1, 6)), [data.size])).tolist()
        sums = np.zeros((1, 2), np.uint64)
        copy[:] = 0xEE
        for first, last in zip(cuts[:-1], cuts[1:], strict=True):
            target, source = copy[32:].ctypes.data + first, data.ctypes.data + first
            part = copy_part(memcpy_address(), target, source, last - first, of_source, first, *fixed)
            sums += np.array(part, np.uint64)
        np.testing.assert_array_equal(copy[32:-32], data)
        assert (copy[:32] == 0xEE).all() and (copy[-32:] == 0xEE).all()
        assert add_lengths(sums, [data.size]).tobytes() == digest(data.tobytes())


def test_every_damage_to_a_single_word_is_seen() -> None:
    """By the numbers as they are: a product of 64 bits with a word is 0 only where both together have 64 factors of 2."""
    assert all(number % 2**32 for number in columns().ravel().tolist())
    assert (rows(1 << 24) % np.uint64(2) == 1).all()
