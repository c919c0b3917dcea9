"""What callers hand in: copied, and whatever it does when it is looked at, refused by a typed error that names it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from kvortex import arguments
from kvortex.errors import ArgumentError
from kvortex.keys import Namespace, as_keys, block_keys
from kvortex.layout import blocks_of_slots, slot_mapping

TOP = (1 << 63) - 1


class Planted(Exception):
    """Nothing that NumPy or Python would raise."""


def fail(*_: object, **__: object) -> Any:
    raise Planted("planted")


class BadArray:
    __array__ = fail


class BadLength(list):
    __len__ = __iter__ = fail


class BadSequence(Sequence):
    __len__ = __getitem__ = __iter__ = fail


class BadInt(int):
    __int__ = __index__ = fail


class BadBytes(bytes):
    __len__ = fail


class GivesMasked:
    def __array__(self, *_: object, **__: object) -> Any:
        return np.ma.array([1, 2], mask=[True, False])


READERS: list[Callable[[Any], object]] = [
    lambda given: arguments.integers(given, "ids", 2),
    lambda given: arguments.block_ids(given, 2, 10),
    lambda given: arguments.buffers(given, [1, 1], 2, 10, written=False),
    lambda given: arguments.buffers([1, 2], given, 2, 10, written=False),
    lambda given: block_keys(Namespace(), given),
    lambda given: slot_mapping(given, 16),
    lambda given: blocks_of_slots(given, 16),
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("given", [BadArray(), BadLength([1, 2]), BadSequence()], ids=lambda given: type(given).__name__)
def test_what_raises_when_it_is_read_is_the_cause_of_a_typed_error(read: Callable[[Any], object], given: Any) -> None:
    with pytest.raises(ArgumentError, match="must be 1-d integers: Planted: planted") as caught:
        read(given)
    assert isinstance(caught.value.__cause__, Planted)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "given",
    [[True, 2], (1, np.True_), bytearray(b"ab"), memoryview(b"ab"), b"ab", "ab", np.ma.array([1, 2]), GivesMasked(), [1, None],
     [1 << 64, 1], np.array([1, TOP + 1], np.uint64), memoryview(np.array([True, False])), {1, 2}, object(), None],
    ids=repr,
)  # fmt: skip
def test_what_is_no_array_of_integers(read: Callable[[Any], object], given: Any) -> None:
    with pytest.raises(ArgumentError):
        read(given)


def test_integers_that_raise_are_refused_or_read() -> None:
    """NumPy reads them as the integers that they are, without asking; another one may ask."""
    with contextlib.suppress(ArgumentError):
        assert arguments.integers([BadInt(1), 2], "ids", 2).tolist() == [1, 2]


@pytest.mark.parametrize("keys", [BadLength([b"x" * 32]), BadSequence(), [BadBytes(b"x" * 32)]], ids=lambda k: type(k).__name__)
def test_keys_that_raise(keys: Any) -> None:
    with pytest.raises(ArgumentError, match="keys cannot be read: Planted: planted") as caught:
        as_keys(keys)
    assert isinstance(caught.value.__cause__, Planted)


@pytest.mark.parametrize("parent", [BadLength([1]), BadSequence(), BadArray()], ids=lambda parent: type(parent).__name__)
def test_parents_that_raise(parent: Any) -> None:
    with pytest.raises(ArgumentError, match="parent must be one key"):
        block_keys(Namespace(), range(16), parent)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint64])
def test_the_result_is_a_copy(dtype: type) -> None:
    """A transfer may still run when the caller writes its next ids into the same array."""
    given = np.array([3, 4], dtype)
    ids, (addresses, sizes) = arguments.block_ids(given, 2, 10), arguments.buffers(given, given, 2, 10, written=False)
    given[:] = 9
    for array in (ids, addresses, sizes, arguments.integers(given - 5, "ids", 2) - 1):
        assert array.dtype == np.int64 and array.tolist() in ([3, 4], [3, 3])
        assert not np.shares_memory(array, given)


def test_memoryviews_of_wide_items_are_arrays() -> None:
    assert arguments.integers(memoryview(np.array([5, 6], np.int32)), "ids", 2).tolist() == [5, 6]


def test_buffers_end_inside_the_address_space() -> None:
    addresses, sizes = arguments.buffers([TOP - 8, 16], [8, 8], 2, 8, written=True)
    assert (addresses + sizes).tolist() == [TOP, 24]
    for written in (True, False):
        with pytest.raises(ArgumentError, match="buffer 1 of 9 bytes at 0x7ffffffffffffff7 ends past the last address"):
            arguments.buffers([16, TOP - 8], [8, 9], 2, 9, written=written)
        with pytest.raises(ArgumentError, match="ends past"):
            arguments.buffers([TOP], [TOP], 1, TOP, written=written)


@pytest.mark.parametrize(("value", "least"), [(True, 0), (np.True_, 0), (1.0, 0), ("1", 0), (0, 1), (-1, 0), (1 << 63, 0),
                                             (10**5000, 0), (np.array([1]), 0), (None, 0), (int, 0), (BadArray(), 0)],
                         ids=lambda value: type(value).__name__)  # fmt: skip
def test_what_is_no_integer(value: Any, least: int) -> None:
    with pytest.raises(ArgumentError, match=f"^it = .*: must be an integer from {least} to ") as caught:
        arguments.integer(value, "it", least)
    assert len(str(caught.value)) < 250


def test_integers_of_any_kind() -> None:
    assert [arguments.integer(value, "it", 0) for value in (0, 5, np.uint8(7), np.array(3), TOP)] == [0, 5, 7, 3, TOP]


@pytest.mark.parametrize("timeout", [float("nan"), -1, -(10**400), "1", True, None, [1], 1j, np.array([1.0]), "x" * 10**6])
def test_what_is_no_timeout(timeout: Any) -> None:
    with pytest.raises(ArgumentError, match="must be a number of seconds, 0 or more") as caught:
        arguments.seconds(timeout)
    assert len(str(caught.value)) < 250


def test_timeouts() -> None:
    assert [arguments.seconds(timeout) for timeout in (0, 1.5, np.float32(2), 10**400)] == [0, 1.5, 2, float("inf")]
