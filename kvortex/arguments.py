"""What callers hand in, checked before anything happens."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.errors import ArgumentError

Int64s = npt.NDArray[np.int64]


def integers(values: Any, name: str, count: int) -> Int64s:
    """A 1-d sequence of ``count`` integers as int64; refuses bools, floats, other shapes and lengths."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:  # ragged lists, arrays of a GPU, numbers of any size
        raise ArgumentError(f"{name} must be 1-d integers: {error}") from None
    if array.size == 0 and array.ndim == 1:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ArgumentError(f"{name} must be 1-d integers; seen: shape {array.shape}, dtype {array.dtype}")
    if len(array) != count:
        raise ArgumentError(f"{name} has {len(array)} entries for {count} keys")
    if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ArgumentError(f"{name} holds {int(array.max())}, which is no address or index of 63 bits")
    return np.array(array, np.int64)  # a copy: the caller may change its array while a transfer runs


def block_ids(values: Any, count: int, num_blocks: int) -> Int64s:
    """Ids of ``count`` different blocks below ``num_blocks``."""
    ids = integers(values, "block_ids", count)
    if count and (ids.min() < 0 or ids.max() >= num_blocks):
        bad = int(np.flatnonzero((ids < 0) | (ids >= num_blocks))[0])
        raise ArgumentError(f"block_ids[{bad}] = {ids[bad]}: the layout has blocks 0 to {num_blocks - 1}")
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(np.diff(ids[order]) == 0)
    if len(twice):
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
    if written:
        order = np.argsort(addresses, kind="stable")
        overlaps = np.flatnonzero(addresses[order][:-1] + lengths[order][:-1] > addresses[order][1:])
        if len(overlaps):
            first, second = order[overlaps[0] : overlaps[0] + 2].tolist()
            raise ArgumentError(f"buffers {first} and {second} overlap; a load writes each byte once")
    return addresses, lengths
