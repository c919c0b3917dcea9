"""Canonical CBOR (RFC 8949, section 4.2.1) of what vLLM hashes, written into a buffer by compiled code.

Each function writes at ``at`` and gives the place behind. A buffer needs 8 bytes more than what is written to it: a head
is stored with all the bytes that it could have, and what follows overwrites those that it does not.
"""

from __future__ import annotations

import numpy as np

from kvortex.jit import njit
from kvortex.keys._bytes import store_big_endian
from kvortex.keys._sha256 import Bytes

# Major types; no literals, since functions are compiled anew for each literal that they are called with.
UNSIGNED, NEGATIVE, BYTES, TEXT, ARRAY = (np.int64(major) for major in range(5))
NULL = 0xF6
LONGEST_HEAD = 9  # bytes


@njit(nogil=True)
def copy(target: Bytes, at: int, source: Bytes, begin: int, end: int) -> None:
    """``source[begin:end]`` to ``target`` from ``at`` on. Slices would do it too, and compile for seconds."""
    for p in range(begin, end):
        target[at + p - begin] = source[p]


@njit(nogil=True)
def write_head(buffer: Bytes, at: int, major: int, number: int) -> int:
    """A major type with its argument from 0 to 2**63 - 1, in as few bytes as it fits in."""
    # Branches on the size of random tokens are mispredicted every other time, and cost as much as the hash.
    size = (number >= 24) + (number >= 1 << 8) + 2 * (number >= 1 << 16) + 4 * (number >= 1 << 32)  # 0, 1, 2, 4 or 8
    step = (number >= 24) + (number >= 1 << 8) + (number >= 1 << 16) + (number >= 1 << 32)  # 0 to 4
    buffer[at] = major << 5 | (23 + step if step else number)
    store_big_endian(buffer, at + 1, np.uint64(number) << np.uint64((64 - 8 * size) & 63))
    return at + 1 + size


@njit(nogil=True)
def write_integer(buffer: Bytes, at: int, number: int) -> int:
    """An integer of 64 bits."""
    if number >= 0:
        return write_head(buffer, at, UNSIGNED, number)  # type: ignore[no-any-return,unused-ignore]
    return write_head(buffer, at, NEGATIVE, ~number)  # type: ignore[no-any-return,unused-ignore]


@njit(nogil=True)
def write_string(buffer: Bytes, at: int, major: int, data: Bytes, begin: int, end: int) -> int:
    """``data[begin:end]`` as ``BYTES``, or as ``TEXT``, whose UTF-8 it must then be."""
    at = write_head(buffer, at, major, end - begin)
    copy(buffer, at, data, begin, end)
    return at + end - begin
