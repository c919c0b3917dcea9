"""Slots of tokens and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.errors import ArgumentError
from kvortex.layout import blocks_of_slots, slot_mapping
from tests import naive_layout


@given(st.lists(st.integers(0, 1000), max_size=8), st.integers(1, 20), st.data())
def test_against_one_token_at_a_time(block_ids, block_size, data):
    tokens = data.draw(st.integers(0, len(block_ids) * block_size))
    slots = slot_mapping(block_ids, block_size, tokens)
    assert slots.dtype == np.int64 and slots.shape == (tokens,)
    assert slots.tolist() == naive_layout.slots(block_ids, block_size, tokens)
    ids, offsets = blocks_of_slots(slots, block_size)
    assert ids.tolist() == [block_ids[t // block_size] for t in range(tokens)]
    assert offsets.tolist() == [t % block_size for t in range(tokens)]


def test_all_tokens_by_default():
    assert slot_mapping(np.array([2, 0], np.uint8), 3).tolist() == [6, 7, 8, 0, 1, 2]
    assert slot_mapping([], 16).shape == slot_mapping([], 16, 0).shape == slot_mapping([3], 16, 0).shape == (0,)


def test_the_arguments_are_not_written():
    ids, slots = np.array([4, 1]), np.array([-1, 17])
    slot_mapping(ids, 16)
    blocks_of_slots(slots, 16)
    assert ids.tolist() == [4, 1] and slots.tolist() == [-1, 17]


def test_padding():
    ids, offsets = blocks_of_slots([-1, 0, 17, -1], 16)
    assert ids.tolist() == [-1, 0, 1, -1] and offsets.tolist() == [-1, 0, 1, -1]
    assert ids.dtype == offsets.dtype == np.int64
    ids, offsets = blocks_of_slots([-1, 5], 1)
    assert ids.tolist() == [-1, 5] and offsets.tolist() == [-1, 0]
    assert [part.shape for part in blocks_of_slots([], 16)] == [(0,), (0,)]


def test_a_few_tokens_of_a_huge_block():
    assert slot_mapping([1, 2], 1 << 40, 3).tolist() == [(1 << 40) + i for i in range(3)]


@pytest.mark.parametrize(("arguments", "message"), [
    (([-1], 16), "never negative"), (([1.5], 16), "float"), (([True], 16), "bool"), ((["a"], 16), "integers"),
    (([[1]], 16), "among them: list"), ((3, 16), r"1-d integers; seen: shape \(\)"), (([1], 0), "block_size = 0: must be"),
    (([1], -2), "block_size = -2"), (([1], 2.0), "block_size = 2.0"), (([1], True), "block_size = True"),
    (([1], 16, 17), "num_tokens = 17"), (([1], 16, -1), "num_tokens = -1"), (([1], 16, True), "num_tokens = True"),
    (([1], 16, 1.0), "num_tokens = 1.0: must be an integer from 0"), (([1], 1 << 63), "block_size = 9223372036854775808"),
    (([1 << 62], 16), "past the range"), (([1 << 63], 16), "64 bits"), ((np.array([1 << 63], np.uint64), 16), "past the range"),
    (([1 << 70], 16), "64 bits"), (([[1], [2, 3]], 16), "integers"), (([], 16, 1), "do not fit"),
    (([True, 2], 16), "among them: bool"), ((np.ma.array([1]), 16), "masked"), ((b"ab", 16), "seen: bytes"),
])
def test_bad_slot_mappings(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        slot_mapping(*arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    (([-2], 16), "holds -2"), (([0.5], 16), "float"), (([[0]], 16), "among them: list"), (([0], 0), "block_size = 0"),
    (([0], None), "block_size = None: must be an integer from 1"), (([True], 16), "bool"),
])
def test_bad_slots(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        blocks_of_slots(*arguments)
