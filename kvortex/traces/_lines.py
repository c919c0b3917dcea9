"""From the ring to lines of JSON: keys to numbers, numbers to digits, in one compiled call without the GIL."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvortex.jit import njit
from kvortex.traces._naming import CALL, LAST_TIME, LINES, LOST_CALLS, Names, Numbers, is_new, name
from kvortex.traces._ring import CHECK, COUNT, KIND, LOST, SAVE, TAIL, TIME, Ring, give_back, is_ready

Text = npt.NDArray[np.uint8]

_DIGITS = 20  # of the largest 64-bit integer
_PER_KEY = _DIGITS + 2  # and what stands between two
_PER_LINE = 256  # what is around them


def _text(text: str) -> Text:
    return np.frombuffer(text.encode(), np.uint8).copy()


_TIMESTAMP, _INPUT, _STORED, _LOST, _CLOSE = (
    _text(part) for part in ('{"timestamp": ', ', "input_length": ', ', "stored": true', ', "dropped": ', "]}\n")
)


def opening(block_size: int) -> Text:
    """What stands between a line's tokens and its ids."""
    return _text(f', "output_length": 0, "block_size": {block_size}, "hash_ids": [')


def lost(time: int, block_size: int, calls: int) -> Text:
    """A line that is no request, of calls that no other line tells of."""
    return _text(f'{{"timestamp": {time}, "block_size": {block_size}, "dropped": {calls}}}\n')


def room(keys: int) -> int:
    """Bytes that a line of so many keys takes at most."""
    return _PER_LINE + _PER_KEY * keys


@njit(nogil=True)
def _put(out: Text, at: int, text: Text) -> int:
    out[at : at + text.size] = text
    return at + text.size


@njit(nogil=True)
def _put_number(out: Text, at: int, number: int) -> int:
    digits, rest = 1, number // 10
    while rest > 0:
        digits, rest = digits + 1, rest // 10
    for place in range(at + digits - 1, at - 1, -1):
        out[place] = 48 + number % 10
        number //= 10
    return at + digits


@njit(nogil=True)
def _put_ids(out: Text, at: int, ids: Numbers) -> int:
    for i in range(ids.size):
        if i > 0:
            out[at], out[at + 1] = 44, 32  # comma and space
            at += 2
        at = _put_number(out, at, ids[i])
    return at


@njit(nogil=True)
def write_lines(ring: Ring, names: Names, opening: Text, block_size: int, out: Text) -> tuple[int, int]:
    """Takes calls from the ring, as many as ``out`` has room for, and writes their lines there; (bytes, calls)."""
    rows, counters = ring.rows, names.counters
    size, tail, at, calls = rows.shape[0], int(ring.marks[TAIL]), 0, 0
    ids = np.empty(1, np.int64)
    while is_ready(ring, tail):
        header = rows[tail & (size - 1)]
        count, kind = header[COUNT], header[KIND]
        if at + _PER_LINE + _PER_KEY * count > out.size:
            break
        counters[CALL] += 1
        counters[LAST_TIME] = max(counters[LAST_TIME], header[TIME])  # a line's is never before the last one's
        counters[LOST_CALLS] += header[LOST]
        if ids.size < count:
            ids = np.empty(count, np.int64)
        own = 0
        for i in range(count):
            entry = name(names, rows, (tail + 1 + i) & (size - 1))
            if is_new(names, entry, kind):
                ids[own] = names.numbers[entry]
                own += 1
        if own > 0 or kind == CHECK:  # a prompt without a full block is a request too
            at = _put_number(out, _put(out, at, _TIMESTAMP), counters[LAST_TIME])
            at = _put_number(out, _put(out, at, _INPUT), own * block_size)
            if kind == SAVE:  # of keys that nobody had asked for: no request
                at = _put(out, at, _STORED)
            if counters[LOST_CALLS] > 0:
                at = _put_number(out, _put(out, at, _LOST), counters[LOST_CALLS])
            counters[LOST_CALLS] = 0
            at = _put_ids(out, _put(out, at, opening), ids[:own])
            at = _put(out, at, _CLOSE)
            counters[LINES] += 1
        tail += 1 + int(count)
        calls += 1
    give_back(ring, tail)
    return at, calls
