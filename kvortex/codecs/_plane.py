"""The plane code by the CPU: what the kernels of :mod:`kvortex.kernels.plane` do, byte by byte. Compiled.

Numbers of a tile (16 tokens of 64 neighbouring channels) and where its parts lie are in :mod:`kvortex.kernels.plane_form`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvortex.codecs.base import CODED, DECLINED, HEADER_BYTES, VERBATIM
from kvortex.jit import njit
from kvortex.kernels.plane_form import (
    CHANNELS,
    FIXED_WORDS,
    MOST_TAIL,
    RAW_TILE,
    ROWS,
    SIGN_AT,
    TILE_BYTES,
    VALUES,
)

_HEADER_WORDS = HEADER_BYTES // 4
_PAIRS = CHANNELS // 2
# Eight bytes of 0 or 1, as a number, times this: the top byte has a bit of each (Knuth, TAOCP 4A, 7.1.3).
_GATHER = np.uint64(0x0102040810204080)
_BYTE = np.uint64(56)


def _spread() -> Any:
    """(256,) uint64: eight bytes of 0 or 1, a bit of the index each."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    return bits.astype(np.uint8).view("<u8").ravel()


_SPREAD = _spread()


@njit(nogil=True, inline="always")
def _packed(bits: Any, at: int) -> Any:
    """32 bytes of 0 or 1 from word ``at`` of a view of eight bytes a word, as 32 bits."""
    word = np.uint32((bits[at] * _GATHER) >> _BYTE)
    word |= np.uint32((bits[at + 1] * _GATHER) >> _BYTE) << np.uint32(8)
    word |= np.uint32((bits[at + 2] * _GATHER) >> _BYTE) << np.uint32(16)
    return word | np.uint32((bits[at + 3] * _GATHER) >> _BYTE) << np.uint32(24)


@njit(nogil=True)
def _encode_tile(values: Any, at: int, step: int, base: Any, tile: Any, scratch: Any) -> Any:
    """Codes the tile whose first value is ``values[at]``, rows ``step`` apart, into ``tile``: fixed part and tail.

    Returns the tile's entry in the table.
    """
    words, chars = tile.view(np.uint32), tile.view(np.uint8)
    codes, escapes = scratch[0], scratch[1]
    low, high = scratch[2, :CHANNELS], scratch[2, CHANNELS : 2 * CHANNELS]
    second, exponents = scratch[2, 2 * CHANNELS : 3 * CHANNELS], scratch[2, 3 * CHANNELS : 4 * CHANNELS]
    low64, high64 = low.view(np.uint64), high.view(np.uint64)
    count = 0
    for row in range(ROWS):
        line = values[at + row * step : at + row * step + CHANNELS]
        signs = chars[SIGN_AT + row * CHANNELS : SIGN_AT + (row + 1) * CHANNELS]
        for j in range(CHANNELS):
            signs[j] = np.uint8((line[j] >> np.uint16(8)) & np.uint16(0x80)) | np.uint8(line[j] & np.uint16(0x7F))
        for odd in range(2):  # even channels, then odd ones
            for pair in range(_PAIRS):
                exponent = np.uint8(line[2 * pair + odd] >> np.uint16(7))  # the sign falls out
                below = np.int16(base[2 * pair + odd]) - np.int16(exponent)
                near = np.int16(below - 1)
                code = np.uint8(near) if np.uint16(near) < np.uint16(3) else np.uint8(3)
                late = np.int16(below - 3)
                late = late if np.uint16(late) < np.uint16(7) else np.int16(7)
                second[_PAIRS * odd + pair] = np.uint8(0) if below == 0 else np.uint8(late)
                exponents[_PAIRS * odd + pair] = exponent
                low[_PAIRS * odd + pair] = code & np.uint8(1)
                high[_PAIRS * odd + pair] = code >> np.uint8(1)
        words[4 * row] = _packed(low64, 0)
        words[4 * row + 1] = _packed(high64, 0)
        words[4 * row + 2] = _packed(low64, 4)
        words[4 * row + 3] = _packed(high64, 4)
        for place in range(CHANNELS):
            codes[count] = second[place]
            escapes[count] = exponents[place]
            count += low[place] & high[place]
    n_escapes = 0
    for k in range(count):
        escapes[n_escapes] = escapes[k]
        n_escapes += codes[k] == 7
    groups = (count + 31) >> 5
    tail = 12 * groups + (n_escapes + 3 & ~3)
    if tail > MOST_TAIL:
        for row in range(ROWS):
            for j in range(CHANNELS):
                tile[row * CHANNELS + j] = values[at + row * step + j]
        return RAW_TILE
    for k in range(count, 32 * groups):
        codes[k] = 0
    for group in range(groups):
        for bit in range(3):
            for k in range(32):
                low[k] = (codes[32 * group + k] >> bit) & 1
            words[FIXED_WORDS + 3 * group + bit] = _packed(low64, 0)
    start = 4 * FIXED_WORDS + 12 * groups
    for k in range(n_escapes):
        chars[start + k] = escapes[k]
    for k in range(n_escapes, n_escapes + 3 & ~3):
        chars[start + k] = 0
    return count | (n_escapes << 16)


@njit(nogil=True, inline="always")
def _tail_bytes(entry: Any) -> Any:
    """Bytes of a tile's tail by its entry in the table; -1 where no tile has that entry."""
    if entry == RAW_TILE:
        return MOST_TAIL + 4
    count, n_escapes = entry & 0xFFFF, entry >> 16
    if count > VALUES or n_escapes > count:
        return -1
    tail = 12 * ((count + 31) >> 5) + (n_escapes + 3 & ~3)
    return tail if tail <= MOST_TAIL else -1


@njit(nogil=True)
def encode_plane(values: Any, out: Any, header: Any, base: Any, form: Any, sizes: Any) -> None:
    """See :meth:`kvortex.codecs.base.Codec.encode_into`.

    Parameters
    ----------
    values : (n, values of a record) uint16
    out : (n, room / 4) uint32
    header : (16,) uint32
        Of a record that is coded.
    base : (planes, channels) uint8
    form : (3,) int64
        Groups of 16 tokens in a plane, tiles side by side in a row, words of the table with its fill.
    sizes : (n,) int64
        Gets the sizes.
    """
    planes, channels = base.shape
    groups, across, table_words = form[0], form[1], form[2]
    tiles = planes * groups * across
    tile, scratch = np.empty(TILE_BYTES, np.uint16), np.empty((3, VALUES), np.uint8)
    tile32 = tile.view(np.uint32)
    table_at, fixed_at = _HEADER_WORDS, _HEADER_WORDS + table_words
    tails_at = fixed_at + tiles * FIXED_WORDS
    verbatim_words = _HEADER_WORDS + values.shape[1] // 2
    for record in range(len(values)):
        room = out.shape[1]
        at, index = tails_at, 0
        for k in range(table_at + tiles, min(fixed_at, room)):
            out[record, k] = 0
        for plane in range(planes):
            for group in range(groups):
                for column in range(across):
                    first = (plane * groups + group) * ROWS * channels + column * CHANNELS
                    channel = column * CHANNELS
                    bases = base[plane, channel : channel + CHANNELS]
                    entry = _encode_tile(values[record], first, channels, bases, tile, scratch)
                    tail = _tail_bytes(entry) // 4
                    if at + tail <= room:
                        out[record, table_at + index] = entry
                        begin = fixed_at + index * FIXED_WORDS
                        out[record, begin : begin + FIXED_WORDS] = tile32[:FIXED_WORDS]
                        out[record, at : at + tail] = tile32[FIXED_WORDS : FIXED_WORDS + tail]
                    at += tail
                    index += 1
        stored = CODED
        if at >= verbatim_words:
            stored, at = VERBATIM, verbatim_words
        if at > room:
            stored = DECLINED
        elif stored == VERBATIM:
            out[record, _HEADER_WORDS:verbatim_words] = values[record].view(np.uint32)
        sizes[record] = -4 * at if stored == DECLINED else 4 * at
        out[record, :_HEADER_WORDS] = header
        out[record, 2] = stored
        out[record, 6] = np.uint32(4 * at & 0xFFFFFFFF)
        out[record, 7] = np.uint32((4 * at) >> 32)


@njit(nogil=True)
def _decode_tile(tile: Any, entry: int, values: Any, at: int, step: int, base: Any, second: Any, spread: Any) -> Any:
    """The reverse of :func:`_encode_tile`; False where the planes contradict the entry."""
    if entry == RAW_TILE:
        raw = tile.view(np.uint16)
        for row in range(ROWS):
            for j in range(CHANNELS):
                values[at + row * step + j] = raw[row * CHANNELS + j]
        return True
    words, chars = tile.view(np.uint32), tile.view(np.uint8)
    count, n_escapes = entry & 0xFFFF, entry >> 16
    escapes, groups = 0, (count + 31) >> 5
    escapes_at = 4 * FIXED_WORDS + 12 * groups
    for group in range(groups):
        p, q, r = words[FIXED_WORDS + 3 * group], words[FIXED_WORDS + 3 * group + 1], words[FIXED_WORDS + 3 * group + 2]
        for k in range(32):
            code = ((p >> k) & 1) | (((q >> k) & 1) << 1) | (((r >> k) & 1) << 2)
            below = 0 if code == 0 else np.int32(code) + 3
            if code == 7:
                if escapes == n_escapes:
                    return False
                below = 16 + np.int32(chars[escapes_at + escapes])  # 16 and more: the exponent itself
                escapes += 1
            second[32 * group + k] = below
    if escapes != n_escapes:
        return False
    low, high, both = np.empty(CHANNELS, np.uint8), np.empty(CHANNELS, np.uint8), np.empty(CHANNELS, np.int16)
    low64, high64 = low.view(np.uint64), high.view(np.uint64)
    n = 0
    for row in range(ROWS):
        for k in range(4):
            low64[k] = spread[chars[16 * row + k]]
            high64[k] = spread[chars[16 * row + 4 + k]]
            low64[4 + k] = spread[chars[16 * row + 8 + k]]
            high64[4 + k] = spread[chars[16 * row + 12 + k]]
        for place in range(CHANNELS):
            both[place] = second[n]
            n += low[place] & high[place]
        line = values[at + row * step : at + row * step + CHANNELS]
        signs = chars[SIGN_AT + row * CHANNELS : SIGN_AT + (row + 1) * CHANNELS]
        for odd in range(2):
            for pair in range(_PAIRS):
                own, late = np.int16(base[2 * pair + odd]), both[_PAIRS * odd + pair]
                code = np.int16(low[_PAIRS * odd + pair]) + np.int16(2) * np.int16(high[_PAIRS * odd + pair])
                other = np.int16(own - late) if late < np.int16(16) else np.int16(late - np.int16(16))
                exponent = np.int16(own - np.int16(1) - code) if code < np.int16(3) else other
                sign = np.uint16(signs[2 * pair + odd])
                kept = ((sign & np.uint16(0x80)) << np.uint16(8)) | (sign & np.uint16(0x7F))
                line[2 * pair + odd] = np.uint16(kept) | np.uint16((np.uint16(exponent) & np.uint16(255)) << np.uint16(7))
    return n == count


@njit(nogil=True)
def decode_plane(coded: Any, values: Any, header: Any, base: Any, form: Any, spread: Any, good: Any) -> None:
    """See :meth:`kvortex.codecs.base.Codec.decode_into`; parameters as of :func:`encode_plane`.

    ``good`` is (n,) bool and gets whether each row is a record.
    """
    planes, channels = base.shape
    groups, across, table_words = form[0], form[1], form[2]
    tiles = planes * groups * across
    room, table_at, fixed_at = coded.shape[1], _HEADER_WORDS, _HEADER_WORDS + table_words
    tails_at = fixed_at + tiles * FIXED_WORDS
    verbatim_words = _HEADER_WORDS + values.shape[1] // 2
    second, tile = np.zeros(VALUES + 1, np.int16), np.zeros(TILE_BYTES, np.uint16)
    tile32 = tile.view(np.uint32)
    for record in range(len(coded)):
        good[record] = False
        same = room >= _HEADER_WORDS
        for k in range(_HEADER_WORDS):
            same = same and (k == 2 or k == 6 or k == 7 or coded[record, k] == header[k])
        if not same:
            continue
        stored, used = coded[record, 2], np.int64(coded[record, 6]) | np.int64(coded[record, 7]) << 32
        if stored == VERBATIM and used == 4 * verbatim_words and verbatim_words <= room:
            values[record].view(np.uint32)[:] = coded[record, _HEADER_WORDS:verbatim_words]
            good[record] = True
            continue
        if stored != CODED or tails_at > room:
            continue
        total = tails_at
        for index in range(tiles):
            tail = _tail_bytes(np.int64(coded[record, table_at + index]))
            total = total + tail // 4 if tail >= 0 else room + 1
        if 4 * total != used or total > room:
            continue
        whole, at, index = True, tails_at, 0
        for plane in range(planes):
            for group in range(groups):
                for column in range(across):
                    entry = np.int64(coded[record, table_at + index])
                    tail = _tail_bytes(entry) // 4
                    begin = fixed_at + index * FIXED_WORDS
                    tile32[:FIXED_WORDS] = coded[record, begin : begin + FIXED_WORDS]
                    tile32[FIXED_WORDS : FIXED_WORDS + tail] = coded[record, at : at + tail]
                    first, channel = (plane * groups + group) * ROWS * channels + column * CHANNELS, column * CHANNELS
                    bases = base[plane, channel : channel + CHANNELS]
                    whole &= _decode_tile(tile, entry, values[record], first, channels, bases, second, spread)
                    at += tail
                    index += 1
        good[record] = whole
