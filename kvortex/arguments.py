"""What callers hand in, checked before anything happens."""

from __future__ import annotations

import itertools
import numbers
import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.errors import ArgumentError, cut, shown, told

Int64s = npt.NDArray[np.int64]
LARGEST = (1 << 63) - 1


def integers(values: Any, name: str, count: int) -> Int64s:
    """A 1-d sequence of ``count`` integers as int64; refuses what :func:`integer_array` does, and other lengths."""
    array = integer_array(values, name)
    if len(array) != count:
        raise ArgumentError(f"{name} has {len(array)} entries for {count} keys")
    if array.dtype.kind == "u" and array.size and int(array.max()) > LARGEST:  # of either byte order
        raise ArgumentError(f"{name} holds {int(array.max())}, which is no address or index of 63 bits")
    return np.array(array, np.int64)  # a copy: the caller may change its array while a transfer runs


def integer_array(values: Any, name: str) -> npt.NDArray[Any]:
    """A 1-d array of any integer type, copied only where NumPy must.

    Bools and floats are no integers, not even among integers; bytes are no array of small ones (a memoryview of wider
    items is an array like any other); and masked entries have no meaning.

    Raises
    ------
    ArgumentError
        With whatever the object itself raised as its cause.
    """
    if type(values) is np.ndarray and values.ndim == 1 and values.dtype.kind in "iu":  # first: look-ups wait for this
        return values
    try:
        return _read_sequence(values, name) if _is_sequence(values, name) else _read_array(values, name)
    except ArgumentError:
        raise
    except Exception as error:  # ragged lists, arrays of a GPU, and objects that raise whatever they like
        raise ArgumentError(f"{name} must be 1-d integers: {told(error)}") from error


def _is_sequence(values: Any, name: str) -> bool:
    """Whether to look at each item's type, since NumPy would turn ``[True, 2]`` into integers without a word."""
    if isinstance(values, (str, bytes, bytearray)) or (isinstance(values, memoryview) and values.itemsize == 1):
        raise ArgumentError(f"{name} must be 1-d integers; seen: {type(values).__name__}")
    return isinstance(values, Sequence) and not isinstance(values, memoryview)


def _read_sequence(values: Sequence[Any], name: str) -> npt.NDArray[Any]:
    items = list(itertools.islice(values, len(values) + 1))  # and no more, should it go on for ever
    if len(items) != len(values):
        raise ArgumentError(f"{name} has a length of {len(values)}, and gives another number of integers")
    for kind in sorted(set(map(type, items)), key=str):
        if issubclass(kind, bool) or not issubclass(kind, (int, np.integer)):
            raise ArgumentError(f"{name} must be 1-d integers; seen among them: {cut(kind.__name__)}")
    try:
        return np.array(items, np.int64)
    except OverflowError as error:
        raise ArgumentError(f"{name} holds an integer beyond 64 bits: {told(error)}") from error


def _read_array(values: Any, name: str) -> npt.NDArray[Any]:
    array = np.asanyarray(values)
    refuse_masked(array, name)
    if array.ndim == 1 and array.size == 0:
        return np.empty(0, np.int64)  # as empty arrays come, with NumPy's own float64
    if array.ndim != 1 or array.dtype.kind not in "iu":
        seen = f"shape {array.shape}, dtype {cut(str(array.dtype))}"
        raise ArgumentError(f"{name} must be 1-d integers; seen: {seen}")
    return np.asarray(array)


def refuse_masked(array: Any, name: str) -> None:
    """Raises ArgumentError for a masked array of NumPy, whose masked entries hold anything."""
    if is_masked(array):
        raise ArgumentError(f"{name} is a masked array, whose masked entries mean nothing; pass its compressed() or its data")


def is_masked(array: Any) -> bool:
    """Whether it is a masked array of NumPy."""
    masked = sys.modules.get("numpy.ma")  # NumPy loads it when somebody first asks; without it there can be none
    return masked is not None and isinstance(array, masked.MaskedArray)


def integer(value: Any, name: str, least: int, most: int = LARGEST) -> int:
    """One integer from ``least`` to ``most``; bools are none."""
    try:
        number = least - 1 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except Exception as error:
        raise ArgumentError(f"{name} = {shown(value)}: must be an integer from {least} to {most}") from error
    if not least <= number <= most:
        raise ArgumentError(f"{name} = {shown(value)}: must be an integer from {least} to {most}")
    return number


def seconds(timeout: Any) -> float:
    """A caller's timeout as a number of seconds."""
    number, is_real = -1.0, isinstance(timeout, numbers.Real) and not isinstance(timeout, bool)
    if is_real:
        try:
            number = float(timeout)
        except OverflowError:  # an integer beyond all floats
            number = float("inf") if timeout > 0 else -1.0
    if not number >= 0:
        raise ArgumentError(f"timeout = {shown(timeout)}: must be a number of seconds, 0 or more")
    return number


def block_ids(values: Any, count: int, num_blocks: int) -> Int64s:
    """Ids of ``count`` different blocks below ``num_blocks``."""
    ids = integers(values, "block_ids", count)
    if not count:
        return ids
    ascending = np.sort(ids)  # and no more, unless something is wrong: a load's first copy waits for this
    if ascending[0] < 0 or ascending[-1] >= num_blocks:
        bad = int(np.flatnonzero((ids < 0) | (ids >= num_blocks))[0])
        raise ArgumentError(f"block_ids[{bad}] = {ids[bad]}: the layout has blocks 0 to {num_blocks - 1}")
    if np.count_nonzero(ascending[1:] == ascending[:-1]):
        order = np.argsort(ids, kind="stable")
        twice = np.flatnonzero(np.diff(ids[order]) == 0)
        first, second = sorted(order[twice[0] : twice[0] + 2].tolist())
        raise ArgumentError(f"block_ids[{first}] and block_ids[{second}] are both {ids[first]}; one call names a block once")
    return ids


def buffers(pointers: Any, sizes: Any, count: int, most: int, *, written: bool) -> tuple[Int64s, Int64s]:
    """Addresses and lengths of ``count`` buffers of 1 to ``most`` bytes; those to be written must not overlap."""
    addresses, lengths = integers(pointers, "pointers", count), integers(sizes, "sizes", count)
    if not count:
        return addresses, lengths
    if addresses.min() <= 0:
        bad = int(np.argmin(addresses))
        raise ArgumentError(f"pointers[{bad}] = {addresses[bad]} is no address")
    if lengths.min() < 1 or lengths.max() > most:
        bad = int(np.flatnonzero((lengths < 1) | (lengths > most))[0])
        raise ArgumentError(f"sizes[{bad}] = {lengths[bad]}: a slot holds 1 to {most} bytes (see max_block_bytes)")
    if (addresses > LARGEST - lengths).any():
        bad = int(np.flatnonzero(addresses > LARGEST - lengths)[0])
        raise ArgumentError(f"buffer {bad} of {lengths[bad]} bytes at {addresses[bad]:#x} ends past the last address")
    if written:
        order = np.argsort(addresses, kind="stable")
        overlaps = np.flatnonzero(addresses[order][:-1] + lengths[order][:-1] > addresses[order][1:])
        if len(overlaps):
            first, second = order[overlaps[0] : overlaps[0] + 2].tolist()
            raise ArgumentError(f"buffers {first} and {second} overlap; a load writes each byte once")
    return addresses, lengths
