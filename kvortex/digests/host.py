"""Digests by the CPU: what kernels compute while bytes stream through them, of bytes that lie in host memory.

Two 32-bit words are taken at a time, as one of 64 bits. A product of 64 by 32 bits is two of 32 by 32, each of which vector
units have in one instruction (``vpmuludq``), summed apart; the compiler makes vectors of the loop over a row.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kvortex.devices.native import call
from kvortex.digests.keys import COLUMNS, ROW_BYTES, Numbers, columns, lengths, rows

_PAIR = 8  # bytes of two words
_PAIRS = ROW_BYTES // _PAIR
_COPY_BYTES = 8192  # what is copied before it is digested: it is in the nearest cache then
_MASK = np.uint64(0xFFFFFFFF)


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer."""
    if not isinstance(address, types.Integer):
        return None

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        number = context.cast(builder, given[0], signature.args[0], types.int64)
        return builder.inttoptr(number, context.get_value_type(signature.return_type))

    return types.CPointer(types.uint64)(address), emit


@intrinsic  # type: ignore[untyped-decorator]
def _pair(typingctx: Any, pointer: Any, at: Any) -> Any:
    """The ``at``-th two words behind a pointer, which need not be aligned."""
    if not isinstance(pointer, types.CPointer) or not isinstance(at, types.Integer):
        return None

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        number = context.cast(builder, given[1], signature.args[1], types.int64)
        return builder.load(builder.gep(given[0], [number]), align=1)

    return types.uint64(pointer, at), emit


@intrinsic  # type: ignore[untyped-decorator]
def _byte(typingctx: Any, address: Any) -> Any:
    """The byte at an address."""
    if not isinstance(address, types.Integer):
        return None

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        number = context.cast(builder, given[0], signature.args[0], types.int64)
        found = builder.load(builder.inttoptr(number, ir.IntType(8).as_pointer()))
        return builder.zext(found, ir.IntType(64))

    return types.uint64(address), emit


@intrinsic  # type: ignore[untyped-decorator]
def _reversed(typingctx: Any, pair: Any) -> Any:
    """Eight bytes in the other order: each word reversed, and both exchanged."""
    if not isinstance(pair, types.Integer):
        return None
    return types.uint64(pair), lambda context, builder, signature, given: builder.bswap(given[0])


@njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _sum_pairs(pointer, first, count, lanes):  # type: ignore[no-untyped-def]
    """Both halves' sums over ``count`` pairs of a row, the first of which is its ``first``-th."""
    a_low, a_high, b_low, b_high = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    for at in range(count):
        i = first + at
        pair = _pair(pointer, at)
        turned = _reversed(pair)
        even, odd = pair & _MASK, pair >> np.uint64(32)
        last, former = turned & _MASK, turned >> np.uint64(32)
        a_low += even * (lanes[0, i] & _MASK) + odd * (lanes[2, i] & _MASK)
        a_high += even * (lanes[1, i] & _MASK) + odd * (lanes[3, i] & _MASK)
        b_low += former * (lanes[4, i] & _MASK) + last * (lanes[6, i] & _MASK)
        b_high += former * (lanes[5, i] & _MASK) + last * (lanes[7, i] & _MASK)
    return a_low + (a_high << np.uint64(32)), b_low + (b_high << np.uint64(32))


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _sum_bytes(address, nbytes, offset, c, r):  # type: ignore[no-untyped-def]
    """A few bytes of a record from ``offset`` on, one at a time: a part of a word counts by itself."""
    first, second = np.uint64(0), np.uint64(0)
    for at in range(nbytes):
        j, within = (offset + at) // ROW_BYTES, (offset + at) % ROW_BYTES
        i, place = within // 4, np.uint64(8 * (within % 4))
        value = _byte(address + at)
        first += r[j, 0] * c[0, i] * (value << place)
        second += r[j, 1] * c[1, i] * (value << (np.uint64(24) - place))
    return first, second


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def sum_part(address, nbytes, offset, c, lanes, r):  # type: ignore[no-untyped-def]
    """What a part of a record adds to both halves of its digest, without what its length adds.

    Parameters
    ----------
    address, nbytes : int
        Where it lies; any alignment.
    offset : int
        Of the part in the record.
    c, lanes, r : (2, COLUMNS), (8, COLUMNS / 2), (rows, 2) uint64
        Of :func:`numbers`, for records at least as long.

    Returns
    -------
    first, second : uint64
    """
    head = min(nbytes, -offset % _PAIR)
    first, second = _sum_bytes(address, head, offset, c, r)
    address, offset, nbytes = address + head, offset + head, nbytes - head
    while nbytes >= _PAIR:
        j, within = offset // ROW_BYTES, offset % ROW_BYTES
        if within == 0 and nbytes >= ROW_BYTES:
            a, b = _sum_pairs(_pointer(address), 0, _PAIRS, lanes)
            taken = ROW_BYTES
        else:
            count = min(nbytes, ROW_BYTES - within) // _PAIR
            a, b = _sum_pairs(_pointer(address), within // _PAIR, count, lanes)
            taken = count * _PAIR
        first += r[j, 0] * a
        second += r[j, 1] * b
        address, offset, nbytes = address + taken, offset + taken, nbytes - taken
    a, b = _sum_bytes(address, nbytes, offset, c, r)
    return first + a, second + b


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def copy_part(memcpy, target, source, nbytes, of_source, offset, c, lanes, r):  # type: ignore[no-untyped-def]
    """Copies a part of a record, and gives what :func:`sum_part` does, of its source or its target: bytes that are in the
    nearest cache, since they were just copied."""
    first, second = np.uint64(0), np.uint64(0)
    done = 0
    while done < nbytes:
        count = min(_COPY_BYTES, nbytes - done)
        call(memcpy, (target + done, source + done, count))
        a, b = sum_part((source if of_source else target) + done, count, offset + done, c, lanes, r)
        first, second = first + a, second + b
        done += count
    return first, second


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _digest_all(addresses, sizes, c, lanes, r, length, out):  # type: ignore[no-untyped-def]
    for at in range(addresses.size):
        first, second = sum_part(addresses[at], sizes[at], 0, c, lanes, r)
        out[at, 0] = first + length[0] * np.uint64(sizes[at])
        out[at, 1] = second + length[1] * np.uint64(sizes[at])


@functools.cache
def _lanes() -> Numbers:
    """(8, COLUMNS / 2) uint64: low and high words of the numbers of even columns, then of odd ones, for each half."""
    found = np.empty((2, 2, 2, COLUMNS // 2), np.uint64)
    for parity in range(2):
        mine = columns()[:, parity::2]
        found[:, parity, 0], found[:, parity, 1] = mine & _MASK, mine >> np.uint64(32)
    return found.reshape(8, -1)


def numbers(most_bytes: int) -> tuple[Numbers, Numbers, Numbers]:
    """``c, lanes, r`` of :func:`sum_part`, for records of up to so many bytes."""
    return columns(), _lanes(), rows(most_bytes)


def add_lengths(sums: Numbers, sizes: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Digests, (n, 16) uint8, from (n, 2) uint64 sums over all parts of records and their (n,) lengths in bytes."""
    whole: npt.NDArray[np.uint8] = (sums + np.asarray(sizes, np.uint64).reshape(-1, 1) * lengths()).view(np.uint8)
    return whole


@functools.cache
def load_compiled() -> None:
    """Loads what is compiled, once in a process."""
    none = np.empty(0, np.int64)
    _digest_all(none, none, *numbers(0), lengths(), np.empty((0, 2), np.uint64))


def digest_records(
    addresses: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]
) -> None:
    """Digests of records in host memory, in one call without the GIL.

    Parameters
    ----------
    addresses, sizes : (n,) int64
        Where each record lies, at any alignment, and its bytes. Nobody may write there meanwhile.
    out : (n, 16) uint8, C-contiguous
        Gets the digests: the two halves as little-endian 64-bit numbers.
    """
    if len(addresses):
        _digest_all(addresses, sizes, *numbers(int(sizes.max())), lengths(), out.view(np.uint64))
