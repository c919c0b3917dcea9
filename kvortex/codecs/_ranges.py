"""Uniform quantization and interleaved range coding (rANS) by the CPU. Compiled; floats are float32, in an order given here.

A *stream* is the values of some neighbouring planes, in the order of the record. 32 coders take turns, each with a state of its
own, so that a warp decodes 32 neighbouring channels of a token at a time (Giesen, *Interleaved entropy coders*, 2014; Duda,
*Asymmetric numeral systems*, 2009). States have 32 bits and words 16; probabilities are in 2**14ths. The decoder reads words in
the order of its values, so the encoder goes backwards.

Of a value, the channel's mean is taken off, and what is left is counted in steps of its plane, to the nearest. What is too far
away for a table's last symbol is that symbol, an escape, and its number of steps follows behind the words, 16 bits.

A stream is 32 states, as many words as its entry in the table says, and its escapes; words and escapes each filled to 4 bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvortex.jit import njit

LANES = 32
PROBABILITY_BITS = 14
LEAST_STATE = 1 << 16
MOST_STEPS = (1 << 15) - 1
_SHIFT, _MASK = np.uint64(PROBABILITY_BITS), np.uint64((1 << PROBABILITY_BITS) - 1)
_LEAST, _WORD = np.uint64(LEAST_STATE), np.uint64(16)


@njit(nogil=True)
def _quantize(values: Any, first: int, last: int, mean: Any, step: Any, steps: Any) -> Any:
    """Steps of the values of planes ``first`` to ``last``; False where one is not finite or too far away."""
    at = 0
    bits = np.empty(1, np.uint32)
    number = bits.view(np.float32)
    for p in range(first, last):
        for row in range(values.shape[1]):
            for c in range(values.shape[2]):
                bits[0] = np.uint32(values[p, row, c]) << np.uint32(16)
                q = np.rint((number[0] - mean[p, c]) / step[p])
                if not abs(q) <= np.float32(MOST_STEPS):  # nor is a NaN
                    return False
                steps[at] = np.int32(q)
                at += 1
    return True


@njit(nogil=True)
def _encode_stream(
    steps: Any, first: int, tokens: int, kinds: Any, most: Any, starts: Any, words: Any, escapes: Any, states: Any
) -> Any:
    """Codes ``steps``; counts of words and escapes. ``words`` and ``escapes`` are filled from their ends."""
    channels = kinds.shape[1]
    n_words, n_escapes = 0, 0
    states[:] = np.uint32(LEAST_STATE)
    for at in range(len(steps) - 1, -1, -1):
        row = at // channels
        kind = kinds[first + row // tokens, at - row * channels]
        symbol = steps[at] + most[kind]
        if symbol < 0 or symbol > 2 * most[kind]:
            n_escapes += 1
            escapes[len(escapes) - n_escapes] = np.int16(steps[at])
            symbol = 2 * most[kind] + 1
        start = np.uint64(starts[kind, symbol])
        share = np.uint64(starts[kind, symbol + 1]) - start
        state = np.uint64(states[at % LANES])
        if state >= share << np.uint64(32 - PROBABILITY_BITS):
            n_words += 1
            words[len(words) - n_words] = np.uint16(state & np.uint64(0xFFFF))
            state >>= _WORD
        states[at % LANES] = np.uint32((state // share << _SHIFT) + state % share + start)
    return n_words, n_escapes


@njit(nogil=True)
def encode_ranges(
    values: Any,
    out: Any,
    at: int,
    form: Any,
    mean: Any,
    step: Any,
    kinds: Any,
    most: Any,
    starts: Any,
    coded: Any,
    sizes: Any,
) -> None:
    """Bodies of records.

    Parameters
    ----------
    values : (n, planes, tokens, channels) uint16
    out : (n, room / 4) uint32
    at : int
        Word at which the body begins.
    form : (1,) int64
        Planes of a stream.
    mean, step : (planes, channels) and (planes,) float32
    kinds : (planes, channels) uint8
        Which table each channel has.
    most : (tables,) int64
        Steps beyond which a value escapes.
    starts : (tables, symbols + 1) uint16
        Where the share of each symbol begins.
    coded : (n,) bool
        True on entry for what is to be coded; False where a value is not finite, or too far away.
    sizes : (n,) int64
        Gets the words of each record, which may be more than ``room``; then only what fits is written.
    """
    n, planes, tokens, channels = values.shape
    per, each = form[0], tokens * channels
    streams = -(-planes // per)
    steps = np.empty(per * each, np.int32)
    words, escapes = np.empty(per * each, np.uint16), np.empty(per * each, np.int16)
    states = np.empty(LANES, np.uint32)
    for record in range(n):
        end, room = at + 2 * streams, out.shape[1]
        for stream in range(streams):
            if not coded[record]:
                break
            first = stream * per
            last = min(first + per, planes)
            mine = steps[: (last - first) * each]
            if not _quantize(values[record], first, last, mean, step, mine):
                coded[record] = False
                break
            n_words, n_escapes = _encode_stream(mine, first, tokens, kinds, most, starts, words, escapes, states)
            size = LANES + (n_words + 1) // 2 + (n_escapes + 1) // 2
            if end + size <= room:
                line = out[record]
                line[at + 2 * stream], line[at + 2 * stream + 1] = np.uint32(n_words), np.uint32(n_escapes)
                line[end : end + LANES] = states
                _pack(line, end + LANES, words, n_words)
                _pack(line, end + LANES + (n_words + 1) // 2, escapes, n_escapes)
            end += size
        sizes[record] = end


@njit(nogil=True)
def _pack(line: Any, at: int, halves: Any, count: int) -> None:
    """The last ``count`` of an array of 16 bits, two a word."""
    begin = len(halves) - count
    for k in range(0, count, 2):
        word = np.uint32(halves[begin + k]) & np.uint32(0xFFFF)
        if k + 1 < count:
            word |= (np.uint32(halves[begin + k + 1]) & np.uint32(0xFFFF)) << np.uint32(16)
        line[at + k // 2] = word


@njit(nogil=True)
def _half(line: Any, at: int, k: int) -> Any:
    return (line[at + k // 2] >> np.uint32(16 * (k & 1))) & np.uint32(0xFFFF)


@njit(nogil=True)
def _decode_stream(
    line: Any,
    at: int,
    n_words: int,
    n_escapes: int,
    values: Any,
    first: int,
    last: int,
    mean: Any,
    step: Any,
    kinds: Any,
    most: Any,
    starts: Any,
) -> Any:
    """The reverse of :func:`_encode_stream`; False where it does not end as it began."""
    tokens, channels = values.shape[1], values.shape[2]
    states = np.empty(LANES, np.uint64)
    for lane in range(LANES):
        states[lane] = np.uint64(line[at + lane])
    words_at = at + LANES
    escapes_at = words_at + (n_words + 1) // 2
    word, escape, lane = 0, 0, 0
    bits = np.empty(1, np.uint32)
    number = bits.view(np.float32)
    for p in range(first, last):
        for row in range(tokens):
            for c in range(channels):
                kind = kinds[p, c]
                state = states[lane]
                place = state & _MASK
                low, high = 0, 2 * most[kind] + 2  # the last symbol that begins at or before the place
                while high - low > 1:
                    middle = (low + high) >> 1
                    if np.uint64(starts[kind, middle]) <= place:
                        low = middle
                    else:
                        high = middle
                start = np.uint64(starts[kind, low])
                state = (np.uint64(starts[kind, low + 1]) - start) * (state >> _SHIFT) + place - start
                if state < _LEAST:
                    if word == n_words:
                        return False
                    state = state << _WORD | np.uint64(_half(line, words_at, word))
                    word += 1
                states[lane] = state
                lane = (lane + 1) % LANES
                steps = np.int64(low) - most[kind]
                if steps > most[kind]:
                    if escape == n_escapes:
                        return False
                    steps = np.int64(np.int16(_half(line, escapes_at, escape)))
                    escape += 1
                number[0] = np.float32(steps) * step[p] + mean[p, c]
                whole = bits[0] + np.uint32(0x7FFF) + ((bits[0] >> np.uint32(16)) & np.uint32(1))
                values[p, row, c] = np.uint16(whole >> np.uint32(16))
    for lane in range(LANES):
        if states[lane] != _LEAST:
            return False
    return word == n_words and escape == n_escapes


@njit(nogil=True)
def decode_ranges(
    coded: Any,
    used: Any,
    values: Any,
    at: int,
    form: Any,
    mean: Any,
    step: Any,
    kinds: Any,
    most: Any,
    starts: Any,
    wanted: Any,
) -> None:
    """The reverse, for the records that are ``wanted``, (n,) bool, which becomes False where a body contradicts itself.

    ``used`` is (n,) int64: words of each record. Other parameters as of :func:`encode_ranges`.
    """
    n, planes, tokens, channels = values.shape
    per = form[0]
    streams = -(-planes // per)
    for record in range(n):
        if not wanted[record]:
            continue
        line, end = coded[record], np.int64(at + 2 * streams)
        whole = end <= used[record]
        for stream in range(streams):
            if not whole:
                break
            first = stream * per
            last = min(first + per, planes)
            n_words, n_escapes = np.int64(line[at + 2 * stream]), np.int64(line[at + 2 * stream + 1])
            size = LANES + (n_words + 1) // 2 + (n_escapes + 1) // 2
            whole = end + size <= used[record]
            if whole:
                mine = values[record]
                whole = _decode_stream(line, end, n_words, n_escapes, mine, first, last, mean, step, kinds, most, starts)
            end += size
        wanted[record] = whole and end == used[record]
