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
_HALF = ROWS // 2
_NONE = np.uint8(255)  # instead of a code of the second tier, where there is none


@njit(nogil=True)
def _row(line: Any, base: Any, late: Any, exponents: Any, codes: Any, signs: Any) -> None:
    """Of a row's values codes of the second tier, exponents, and codes of the first tier, and signs and mantissas."""
    for j in range(CHANNELS):
        exponent = np.uint8(line[j] >> np.uint16(7))  # the sign falls out
        below = np.int16(base[j]) - np.int16(exponent)
        near = np.int16(below - 1)
        far = np.int16(below - 3)
        far = far if np.uint16(far) < np.uint16(7) else np.int16(7)
        far = np.int16(0) if below == 0 else far
        first = np.uint16(near) < np.uint16(3)
        late[j] = _NONE if first else np.uint8(far)
        codes[j] = np.uint8(near) if first else np.uint8(3)
        exponents[j] = exponent
        signs[j] = np.uint8((line[j] >> np.uint16(8)) & np.uint16(0x80)) | np.uint8(line[j] & np.uint16(0x7F))


@njit(nogil=True)
def _encode_tile(values: Any, at: int, step: int, base: Any, tile: Any, scratch: Any) -> Any:
    """Codes the tile whose first value is ``values[at]``, rows ``step`` apart, into ``tile``: fixed part and tail.

    Returns the tile's entry in the table.
    """
    words, chars = tile.view(np.uint32), tile.view(np.uint8)
    late, exponents = scratch[0].reshape(ROWS, CHANNELS), scratch[1].reshape(ROWS, CHANNELS)
    codes, second, escapes = scratch[2], scratch[3], scratch[4]
    row_codes, row_signs = codes[:CHANNELS], codes[CHANNELS : 2 * CHANNELS]
    pairs, sign_pairs = row_codes.view(np.uint16), row_signs.view(np.uint16)
    words[: SIGN_AT // 4] = 0
    for row in range(ROWS):
        _row(values[at + row * step : at + row * step + CHANNELS], base, late[row], exponents[row], row_codes, row_signs)
        half, shift = row // _HALF, np.uint32(2 * (row % _HALF))
        first = words[half * _PAIRS : (half + 1) * _PAIRS]
        for k in range(_PAIRS):
            first[k] |= (np.uint32(pairs[k] & np.uint16(3)) | np.uint32(pairs[k] >> np.uint16(8)) << np.uint32(16)) << shift
        signs = tile[SIGN_AT // 2 + half * _HALF * _PAIRS + row % _HALF :]
        for k in range(_PAIRS):
            signs[_HALF * k] = sign_pairs[k]
    count = 0
    for half in range(2):
        for channel in range(CHANNELS):
            for row in range(_HALF * half, _HALF * half + _HALF):
                second[count] = late[row, channel]
                escapes[count] = exponents[row, channel]
                count += late[row, channel] != _NONE
    groups = (count + 31) >> 5
    second[count : 32 * groups] = 0
    for sixteen in range(2 * groups):
        own = second[16 * sixteen : 16 * sixteen + 16]
        a, b, c, d = _nibbles(own, 0), _nibbles(own, 4), _nibbles(own, 8), _nibbles(own, 12)
        low = a | (d & np.uint32(0x1111)) << np.uint32(3)
        high = b | (d & np.uint32(0x2222)) << np.uint32(2)
        words[FIXED_WORDS + 3 * (sixteen >> 1) + (sixteen & 1)] = low | high << np.uint32(16)
        short = c | (d & np.uint32(0x4444)) << np.uint32(1)
        tile[2 * FIXED_WORDS + 6 * (sixteen >> 1) + 4 + (sixteen & 1)] = np.uint16(short)
    n_escapes, start = 0, 4 * FIXED_WORDS + 12 * groups
    for k in range(0, 32 * groups, 4):
        for place in (k, k + 2, k + 1, k + 3):
            chars[start + n_escapes] = escapes[place]
            n_escapes += second[place] == 7
    tail = 12 * groups + (n_escapes + 3 & ~3)
    if tail > MOST_TAIL:
        for row in range(ROWS):
            for j in range(CHANNELS):
                tile[row * CHANNELS + j] = values[at + row * step + j]
        return RAW_TILE
    chars[start + n_escapes : start + (n_escapes + 3 & ~3)] = 0
    return count | (n_escapes << 16)


@njit(nogil=True, inline="always")
def _nibbles(codes: Any, at: int) -> Any:
    """Four codes as 16 bits, in the order in which nibbles have them."""
    low = np.uint32(codes[at]) | np.uint32(codes[at + 2]) << np.uint32(4)
    return low | np.uint32(codes[at + 1]) << np.uint32(8) | np.uint32(codes[at + 3]) << np.uint32(12)


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
    tile, scratch = np.empty(TILE_BYTES, np.uint16), np.empty((5, VALUES), np.uint8)
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
def _second_tier(tile: Any, entry: int, second: Any) -> Any:
    """Of each code how far below the base the exponent is, or 256 and the exponent itself. False: it contradicts itself."""
    words, chars = tile.view(np.uint32), tile.view(np.uint8)
    groups, n_escapes, escapes = ((entry & 0xFFFF) + 31) >> 5, entry >> 16, 0
    escapes_at = 4 * FIXED_WORDS + 12 * groups
    for sixteen in range(2 * groups):
        word = words[FIXED_WORDS + 3 * (sixteen >> 1) + (sixteen & 1)]
        short = np.uint32(tile[2 * FIXED_WORDS + 6 * (sixteen >> 1) + 4 + (sixteen & 1)])
        spare = (word >> np.uint32(3)) & np.uint32(0x1111) | (word >> np.uint32(18)) & np.uint32(0x2222)
        spare |= (short >> np.uint32(1)) & np.uint32(0x4444)
        for eight in range(2):
            nibbles = short & np.uint32(0x7777) | spare << np.uint32(16) if eight else word & np.uint32(0x77777777)
            for k in range(8):
                code = np.int32((nibbles >> np.uint32(4 * k)) & np.uint32(7))
                below = 0 if code == 0 else code + np.int32(3)
                if code == 7:
                    if escapes == n_escapes:
                        return False
                    below = 256 + np.int32(chars[escapes_at + escapes])
                    escapes += 1
                place = 2 * (k & 1) + (k >> 1 & 1)  # of a four 0, 2, 1, 3
                second[16 * sixteen + 8 * eight + (k & 4) + place] = below
    return escapes == n_escapes


@njit(nogil=True)
def _decode_tile(tile: Any, entry: int, values: Any, at: int, step: int, base: Any, second: Any, late: Any) -> Any:
    """The reverse of :func:`_encode_tile`; False where it contradicts its entry."""
    if entry == RAW_TILE:
        for row in range(ROWS):
            for j in range(CHANNELS):
                values[at + row * step + j] = tile[row * CHANNELS + j]
        return True
    if not _second_tier(tile, entry, second):
        return False
    words, n = tile.view(np.uint32), 0
    for half in range(2):
        for pair in range(_PAIRS):
            word = words[half * _PAIRS + pair]
            marks = word & word >> np.uint32(1)
            for odd in range(2):
                for row in range(_HALF):
                    late[_HALF * half + row, 2 * pair + odd] = second[n]
                    n += (marks >> np.uint32(16 * odd + 2 * row)) & np.uint32(1)
    codes, sign_bytes = np.empty(CHANNELS, np.uint8), np.empty(CHANNELS, np.uint8)
    pairs, sign_pairs = codes.view(np.uint16), sign_bytes.view(np.uint16)
    for row in range(ROWS):
        half, shift = row // _HALF, np.uint32(2 * (row % _HALF))
        first, signs = words[half * _PAIRS :], tile[SIGN_AT // 2 + half * _HALF * _PAIRS + row % _HALF :]
        for k in range(_PAIRS):
            both = first[k] >> shift
            pairs[k] = np.uint16(both & np.uint32(3)) | np.uint16((both >> np.uint32(8)) & np.uint32(0x300))
            sign_pairs[k] = signs[_HALF * k]
        line, own_late = values[at + row * step : at + row * step + CHANNELS], late[row]
        for j in range(CHANNELS):
            own, far, code = np.int16(base[j]), own_late[j], np.int16(codes[j])
            other = np.int16(own - far) if far < np.int16(256) else far  # of which 8 bits count
            exponent = np.int16(own - np.int16(1) - code) if code < np.int16(3) else other
            sign = np.uint16(sign_bytes[j])
            kept = ((sign & np.uint16(0x80)) << np.uint16(8)) | (sign & np.uint16(0x7F))
            line[j] = np.uint16(kept) | np.uint16((np.uint16(exponent) & np.uint16(255)) << np.uint16(7))
    return n == entry & 0xFFFF


@njit(nogil=True)
def decode_plane(coded: Any, values: Any, header: Any, base: Any, form: Any, good: Any) -> None:
    """See :meth:`kvortex.codecs.base.Codec.decode_into`; parameters as of :func:`encode_plane`.

    ``good`` is (n,) bool and gets whether each row is a record.
    """
    planes, channels = base.shape
    groups, across, table_words = form[0], form[1], form[2]
    tiles = planes * groups * across
    room, table_at, fixed_at = coded.shape[1], _HEADER_WORDS, _HEADER_WORDS + table_words
    tails_at = fixed_at + tiles * FIXED_WORDS
    verbatim_words = _HEADER_WORDS + values.shape[1] // 2
    second, tile = np.zeros(VALUES, np.int16), np.zeros(TILE_BYTES, np.uint16)
    late = np.zeros((ROWS, CHANNELS), np.int16)
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
                    whole &= _decode_tile(tile, entry, values[record], first, channels, bases, second, late)
                    at += tail
                    index += 1
        good[record] = whole
