"""Digests by the CPU: what kernels compute while bytes stream through them, of bytes that lie in host memory.

A product of 64 by 32 bits is two of 32 by 32, which vector units have: of the lower one all 64 bits (``vpmuludq``), of the
higher one 32 (``vpmulld``), summed apart. The compiler makes vectors of the loops over a row.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvortex.devices.native import call
from kvortex.digests._rows import sum_rows
from kvortex.digests.keys import ROW_BYTES, Numbers, columns, lengths, rows
from kvortex.jit import njit

_PAIR = 8  # bytes of two words
_COPY_BYTES = 8192  # what is copied before it is digested: it is in the nearest cache then
_MASK = np.uint64(0xFFFFFFFF)
Fixed: TypeAlias = tuple[Numbers, Numbers, npt.NDArray[np.uint32], Numbers]


@intrinsic  # type: ignore[untyped-decorator]
def _pairs(typingctx: Any, address: Any) -> Any:
    """An address as a pointer to pairs of words."""
    return types.CPointer(types.uint64)(address), _as_pointer


@intrinsic  # type: ignore[untyped-decorator]
def _words(typingctx: Any, address: Any) -> Any:
    return types.CPointer(types.uint32)(address), _as_pointer


def _as_pointer(context: Any, builder: Any, signature: Any, given: Any) -> Any:
    number = context.cast(builder, given[0], signature.args[0], types.int64)
    return builder.inttoptr(number, context.get_value_type(signature.return_type))


@intrinsic  # type: ignore[untyped-decorator]
def _item(typingctx: Any, pointer: Any, at: Any) -> Any:
    """The ``at``-th number behind a pointer, which need not be aligned."""

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        number = context.cast(builder, given[1], signature.args[1], types.int64)
        return builder.load(builder.gep(given[0], [number]), align=1)

    return pointer.dtype(pointer, at), emit


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
def _reversed(typingctx: Any, number: Any) -> Any:
    """A number's bytes in the other order; of two words, each reversed and both exchanged."""
    if not isinstance(number, types.Integer):
        return None
    return number(number), lambda context, builder, signature, given: builder.bswap(given[0])


@intrinsic  # type: ignore[untyped-decorator]
def _more(typingctx: Any, total: Any, a: Any, b: Any) -> Any:
    """``total + a * b`` of 32-bit words, which Numba would widen."""
    if not all(kind == types.uint32 for kind in (total, a, b)):
        return None
    return total(total, a, b), lambda context, builder, signature, given: builder.add(given[0], builder.mul(given[1], given[2]))


@njit(nogil=True, inline="always")
def _sum_pairs(pairs, words, first, count, lows, highs):  # type: ignore[no-untyped-def]
    """Both halves' sums over ``count`` pairs of a row, the first of which is its ``first``-th. ``pairs`` and ``words`` are
    pointers to the same bytes."""
    a, b = np.uint64(0), np.uint64(0)
    for at in range(count):
        i = first + at
        pair = _item(pairs, at)
        turned = _reversed(pair)
        a += (pair & _MASK) * (lows[0, i] & _MASK) + (pair >> np.uint64(32)) * (lows[1, i] & _MASK)
        b += (turned >> np.uint64(32)) * (lows[2, i] & _MASK) + (turned & _MASK) * (lows[3, i] & _MASK)
    a_high, b_high = np.uint32(0), np.uint32(0)
    for at in range(2 * count):  # of these only 32 bits matter
        i = 2 * first + at
        word = _item(words, at)
        a_high = _more(a_high, word, highs[0, i])
        b_high = _more(b_high, _reversed(word), highs[1, i])
    return a + (np.uint64(a_high) << np.uint64(32)), b + (np.uint64(b_high) << np.uint64(32))


@njit(nogil=True)
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


@njit(nogil=True)
def sum_part(address, nbytes, offset, c, lows, highs, r):  # type: ignore[no-untyped-def]
    """What a part of a record adds to both halves of its digest, without what its length adds.

    Parameters
    ----------
    address, nbytes : int
        Where it lies; any alignment.
    offset : int
        Of the part in the record.
    c, lows, highs, r
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
            count = nbytes // ROW_BYTES
            a, b = sum_rows(address, count, lows.ctypes.data, highs.ctypes.data, r[j].ctypes.data)
            first, second, taken = first + a, second + b, count * ROW_BYTES
        else:
            count = min(nbytes, ROW_BYTES - within) // _PAIR
            a, b = _sum_pairs(_pairs(address), _words(address), within // _PAIR, count, lows, highs)
            first, second, taken = first + r[j, 0] * a, second + r[j, 1] * b, count * _PAIR
        address, offset, nbytes = address + taken, offset + taken, nbytes - taken
    a, b = _sum_bytes(address, nbytes, offset, c, r)
    return first + a, second + b


@njit(nogil=True)
def add_part(address, nbytes, offset, sums, fixed):  # type: ignore[no-untyped-def]
    """Adds what :func:`sum_part` gives to ``sums``, (2,) uint64; ``fixed`` is of :func:`numbers`."""
    c, lows, highs, r = fixed
    first, second = sum_part(address, nbytes, offset, c, lows, highs, r)
    sums[0] += first
    sums[1] += second


@njit(nogil=True)
def copy_part(memcpy, target, source, nbytes, of_source, offset, c, lows, highs, r):  # type: ignore[no-untyped-def]
    """Copies a part of a record, and gives what :func:`sum_part` does, of its source or its target: bytes that are in the
    nearest cache, since they were just copied."""
    first, second = np.uint64(0), np.uint64(0)
    done = 0
    while done < nbytes:
        count = min(_COPY_BYTES, nbytes - done)
        call(memcpy, (target + done, source + done, count))
        a, b = sum_part((source if of_source else target) + done, count, offset + done, c, lows, highs, r)
        first, second = first + a, second + b
        done += count
    return first, second


@njit(nogil=True)
def _digest_all(addresses, sizes, c, lows, highs, r, length, out):  # type: ignore[no-untyped-def]
    for at in range(addresses.size):
        first, second = sum_part(addresses[at], sizes[at], 0, c, lows, highs, r)
        out[at, 0] = first + length[0] * np.uint64(sizes[at])
        out[at, 1] = second + length[1] * np.uint64(sizes[at])


@functools.cache
def _parts_of_columns() -> tuple[Numbers, npt.NDArray[np.uint32]]:
    """(4, COLUMNS / 2) uint64, low words of the numbers of even columns and of odd ones, for each half; and (2, COLUMNS)
    uint32, the high words."""
    lows = np.stack([columns()[half, parity::2] & _MASK for half in range(2) for parity in range(2)])
    return lows, (columns() >> np.uint64(32)).astype(np.uint32)


def numbers(most_bytes: int) -> Fixed:
    """``c, lows, highs, r`` of :func:`sum_part`, for records of up to so many bytes."""
    return (columns(), *_parts_of_columns(), rows(most_bytes))


def add_lengths(sums: Numbers, sizes: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Digests, (n, 16) uint8, from (n, 2) uint64 sums over all parts of records and their (n,) lengths in bytes."""
    whole: npt.NDArray[np.uint8] = (sums + np.asarray(sizes, np.uint64).reshape(-1, 1) * lengths()).view(np.uint8)
    return whole


@functools.cache
def load_compiled() -> None:
    """Loads what is compiled, once in a process."""
    none = np.empty(0, np.int64)
    _digest_all(none, none, *numbers(0), lengths(), np.empty((0, 2), np.uint64))
    add_part(0, 0, 0, np.zeros(2, np.uint64), numbers(0))


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
