"""Fixed-rate quantizers by the CPU: K by channel, V by token. Compiled; all floats are float32, in an order given here.

:mod:`kvortex.kernels.lossy_encode` and its neighbours make the same bytes on a GPU: what changes here changes there.

A plane's codes lie token by token, channel by channel: bytes where they have 8 bits, else in little-endian words:

- of 4 bits, a word of each 8 channels: byte j has channel j, and above it channel 4 + j;
- of 6 bits, of each 64 channels 8 such words of lower bits, then 8 half-words: nibble j has the upper two bits of channel j,
  and above them those of channel 4 + j;
- of 3 bits, of each 32 channels a word a bit, the lowest first: bit 8 * i + j is that of channel 4 * j + i.

So a lane of a GPU, which has bytes of four neighbours in each word, packs them by few instructions and trades none with others.
Before the codes lie a K plane's scales, u8[tokens / 16][channels], or a V plane's steps and zeros, fp16[tokens][heads][2].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvortex.jit import njit
from kvortex.jit.fused import fused

GROUP = 16  # tokens that share a scale of K
SCALE_ZERO = 128  # the scale that is 1
_NIBBLES, _PAIRS, _BITS = np.uint32(0x0F0F0F0F), np.uint32(0x03030303), np.uint32(0x01010101)
_FOUR, _TWO = np.uint32(4), np.uint32(2)
_HUGE = 0x6000  # the bf16 of 2**65
_NEAREST = np.float32(1.5 * 2.0**23)  # there float32 counts in ones: a sum with it, less it, is the nearest integer
_LARGEST_HALF = np.float32(65504)
_SUBNORMAL_STEP = np.float32(2.0**-24)
_LEAST_NORMAL = np.float32(2.0**-14)


def scales() -> Any:
    """(256,) float32: 2 to the quarter powers from -32 to 31.75, what the code of a scale stands for."""
    roots = np.array([1.0, 1.1892071150027210, 1.4142135623730951, 1.6817928305074290], np.float32)
    at = np.arange(256) - SCALE_ZERO
    return np.ldexp(roots[at & 3], at >> 2).astype(np.float32)


@njit(nogil=True)
def _half_down(value: Any, cell: Any, bits: Any) -> Any:
    """The largest fp16 that is not above a float32 of at most 65,504 in size, as bits."""
    cell[0] = abs(value)
    if cell[0] < _LEAST_NORMAL:
        half = np.uint32(cell[0] / _SUBNORMAL_STEP)
    else:
        half = (bits[0] >> np.uint32(13)) - np.uint32(112 << 10)
    if value < 0:
        if _from_half(half, cell, bits) < -value:
            half += np.uint32(1)
        half |= np.uint32(0x8000)
    return half


@njit(nogil=True)
def _half_up(value: Any, cell: Any, bits: Any) -> Any:
    """The smallest fp16 that is not below a float32 from 0 to 65,504, as bits."""
    half = np.uint32(_half_down(value, cell, bits))
    return half + np.uint32(1) if _from_half(half, cell, bits) < value else half


@njit(nogil=True)
def _from_half(half: Any, cell: Any, bits: Any) -> Any:
    """The float32 of a finite fp16."""
    size = np.uint32(half) & np.uint32(0x7FFF)
    if size < np.uint32(1 << 10):
        number = np.float32(size) * _SUBNORMAL_STEP
    else:
        bits[0] = (size << np.uint32(13)) + np.uint32(112 << 23)
        number = cell[0]
    return -number if half & 0x8000 else number


@njit(nogil=True)
def _rotate(row: Any, at: int, dim: int) -> None:
    """The Sylvester-Hadamard transform of ``row[at:at + dim]``, in place; its own inverse but for a factor of ``dim``."""
    half = 1
    while half < dim:
        for first in range(at, at + dim, 2 * half):
            for k in range(first, first + half):
                a, b = row[k], row[k + half]
                row[k], row[k + half] = a + b, a - b
        half *= 2


@njit(nogil=True)
def _pair_up(low: Any, high: Any) -> Any:
    """Lower four bits of two words' bytes."""
    return (low & _NIBBLES) | (high & _NIBBLES) << _FOUR


@njit(nogil=True)
def _upper(low: Any, high: Any) -> Any:
    """16 bits: the upper two of six of two words' bytes."""
    both = (low >> _FOUR & _PAIRS) | (high >> _FOUR & _PAIRS) << _TWO
    both |= both >> _FOUR
    return (both & np.uint32(0xFF)) | (both >> np.uint32(8) & np.uint32(0xFF00))


@njit(nogil=True)
def _spread(half: Any) -> Any:
    """Nibbles of 16 bits as the lower ones of four bytes."""
    both = (half & np.uint32(0xFF)) | (half & np.uint32(0xFF00)) << np.uint32(8)
    return (both | both << _FOUR) & _NIBBLES


@njit(nogil=True)
def _pack(codes: Any, bits: int, out: Any, at: int) -> Any:
    """Writes a row's codes to ``out[at:]``; gives the place behind."""
    words = codes.view(np.uint32)
    if bits == 8:
        out[at : at + len(words)] = words
        at += len(words)
    elif bits == 4:
        for k in range(0, len(words), 2):
            out[at] = _pair_up(words[k], words[k + 1])
            at += 1
    elif bits == 6:
        for first in range(0, len(words), 16):
            for k in range(8):
                out[at + k] = _pair_up(words[first + 2 * k], words[first + 2 * k + 1])
            for k in range(4):
                of = first + 4 * k
                halves = _upper(words[of], words[of + 1]), _upper(words[of + 2], words[of + 3])
                out[at + 8 + k] = halves[0] | halves[1] << np.uint32(16)
            at += 12
    else:
        for first in range(0, len(words), 8):
            for bit in range(bits):
                word = np.uint32(0)
                for k in range(8):
                    word |= (words[first + k] >> np.uint32(bit) & _BITS) << np.uint32(k)
                out[at] = word
                at += 1
    return at


@njit(nogil=True)
def _unpack(codes: Any, bits: int, coded: Any, at: int) -> Any:
    """The reverse of :func:`_pack`."""
    words = codes.view(np.uint32)
    if bits == 8:
        words[:] = coded[at : at + len(words)]
        at += len(words)
    elif bits == 4:
        for k in range(0, len(words), 2):
            words[k], words[k + 1] = coded[at] & _NIBBLES, coded[at] >> _FOUR & _NIBBLES
            at += 1
    elif bits == 6:
        for first in range(0, len(words), 16):
            for k in range(8):
                word, upper = coded[at + k], _spread(coded[at + 8 + k // 2] >> np.uint32(16 * (k & 1)))
                words[first + 2 * k] = (word & _NIBBLES) | (upper & _PAIRS) << _FOUR
                words[first + 2 * k + 1] = (word >> _FOUR & _NIBBLES) | (upper >> _TWO & _PAIRS) << _FOUR
            at += 12
    else:
        for first in range(0, len(words), 8):
            for k in range(8):
                words[first + k] = np.uint32(0)
                for bit in range(bits):
                    words[first + k] |= (coded[at + bit] >> np.uint32(k) & _BITS) << np.uint32(bit)
            at += bits
    return at


@njit(nogil=True)
def _floor(left: Any, step: Any) -> Any:
    """Of their product, exact; ``step`` is above 0."""
    q = np.floor(left * step)
    # The product was rounded up to q, or to -0.
    return q - np.float32(1) if fused(left, step, -q) < 0 or (q == 0 and left < 0) else q


@njit(nogil=True)
def _nearest(left: Any, step: Any) -> Any:
    """The whole number that is nearest to their product, exact, of two the even one; from 0 to 2**22."""
    return fused(left, step, _NEAREST) - _NEAREST


@njit(nogil=True)
def _encode_k(plane: Any, mean: Any, bits: int, table: Any, out: Any, at: int, work: Any) -> Any:
    """A K plane (tokens, channels) of float32 to ``out[at:]``: the place behind, or -1 where a scale would have to clip."""
    tokens, channels = plane.shape
    scale_bytes, codes, most, step = work[0], work[1], work[2], work[3]
    half = np.float32(1 << (bits - 1))
    code_at = at + tokens // GROUP * channels // 4
    for group in range(tokens // GROUP):
        most[:] = np.float32(0)
        for row in range(GROUP * group, GROUP * group + GROUP):
            line = plane[row]
            for c in range(channels):
                most[c] = max(most[c], abs(line[c] - mean[c]))
        for c in range(channels):
            if not most[c] <= table[255]:
                return -1
            low, high = 0, 255  # the first scale that is large enough
            while low < high:
                middle = (low + high) >> 1
                if table[middle] >= most[c]:
                    high = middle
                else:
                    low = middle + 1
            scale_bytes[c] = low
            step[c] = half / table[low]
        packed = scale_bytes.view(np.uint32)
        begin = at + group * channels // 4
        out[begin : begin + channels // 4] = packed
        for row in range(GROUP * group, GROUP * group + GROUP):
            line = plane[row]
            for c in range(channels):
                q = _floor(line[c] - mean[c], step[c])
                codes[c] = np.uint8(min(max(q, -half), half - np.float32(1)) + half)
            code_at = _pack(codes, bits, out, code_at)
    return code_at


@njit(nogil=True)
def _decode_k(plane: Any, mean: Any, bits: int, table: Any, coded: Any, at: int, work: Any) -> Any:
    tokens, channels = plane.shape
    codes, step = work[1], work[3]
    half = np.float32(1 << (bits - 1))
    code_at = at + tokens // GROUP * channels // 4
    for group in range(tokens // GROUP):
        for c in range(channels):
            word = coded[at + (group * channels + c) // 4]
            step[c] = table[(word >> np.uint32(8 * (c & 3))) & np.uint32(255)] / half
        for row in range(GROUP * group, GROUP * group + GROUP):
            code_at = _unpack(codes, bits, coded, code_at)
            line = plane[row]
            for c in range(channels):
                line[c] = fused(np.float32(codes[c]) - half + np.float32(0.5), step[c], mean[c])
    return code_at


@njit(nogil=True)
def _encode_v(plane: Any, dim: int, bits: int, factor: Any, out: Any, at: int, work: Any) -> Any:
    """A V plane likewise; what is rotated counts ``factor`` times, and 0 is for no rotation."""
    tokens, channels = plane.shape
    codes, cell, cell_bits = work[1], work[4], work[5]
    heads, most = channels // dim, np.float32((1 << bits) - 1)
    scale = factor if factor > 0 else np.float32(1)
    code_at = at + tokens * heads
    for row in range(tokens):
        line = plane[row]
        for head in range(heads):
            part = line[head * dim : head * dim + dim]
            if factor > 0:
                _rotate(part, 0, dim)
            low, high = part[0], part[0]
            for k in range(dim):
                low, high = min(low, part[k]), max(high, part[k])
            low, high = low * scale, high * scale
            if not (abs(low) <= _LARGEST_HALF and abs(high) <= _LARGEST_HALF):
                return -1
            zero_half = _half_down(low, cell, cell_bits)
            zero = _from_half(zero_half, cell, cell_bits)
            step_half = _half_up((high - zero) / most, cell, cell_bits)
            step = _from_half(step_half, cell, cell_bits)
            if (zero_half & np.uint32(0x7FFF)) >= np.uint32(0x7C00):
                return -1
            inverse = np.float32(1) / step * scale if step > 0 else np.float32(0)
            out[at + row * heads + head] = step_half | zero_half << np.uint32(16)
            zero /= scale
            for k in range(dim):
                q = _nearest(part[k] - zero, inverse)
                codes[head * dim + k] = np.uint8(min(max(q, np.float32(0)), most))
        code_at = _pack(codes, bits, out, code_at)
    return code_at


@njit(nogil=True)
def _decode_v(plane: Any, dim: int, bits: int, back: Any, coded: Any, at: int, work: Any) -> Any:
    """What is rotated back counts ``back`` times, and 0 is for no rotation."""
    tokens, channels = plane.shape
    codes, cell, cell_bits = work[1], work[4], work[5]
    heads, scale = channels // dim, back if back > 0 else np.float32(1)
    code_at = at + tokens * heads
    for row in range(tokens):
        code_at = _unpack(codes, bits, coded, code_at)
        line = plane[row]
        for head in range(heads):
            word = coded[at + row * heads + head]
            step = _from_half(word & np.uint32(0xFFFF), cell, cell_bits) * scale
            zero = _from_half(word >> np.uint32(16), cell, cell_bits) * scale
            part = line[head * dim : head * dim + dim]
            for k in range(dim):
                part[k] = np.float32(codes[head * dim + k]) * step + zero
            if back > 0:
                _rotate(part, 0, dim)
    return code_at


@njit(nogil=True)
def _work(channels: int) -> Any:
    cell = np.zeros(1, np.float32)
    return (
        np.zeros(channels, np.uint8),
        np.zeros(channels, np.uint8),
        np.zeros(channels, np.float32),
        np.zeros(channels, np.float32),
        cell,
        cell.view(np.uint32),
    )


@njit(nogil=True)
def encode_lossy(values: Any, out: Any, is_key: Any, mean: Any, form: Any, turn: Any, table: Any, coded: Any) -> None:
    """Bodies of records.

    Parameters
    ----------
    values : (n, planes, tokens, channels) uint16
    out : (n, words of a body) uint32
    is_key : (planes,) bool
    mean : (planes, channels) float32
    form : (3,) int64
        Width of a head, bits of K, bits of V.
    turn : (2,) float32
        What rotated values of V count, and what those that are rotated back: powers of two, together 1 / width of a head; 0
        where none are rotated.
    table : (256,) float32
        From :func:`scales`.
    coded : (n,) bool
        False where the values are not finite, or too large for any scale; true on entry for what is to be coded.
    """
    n, planes, tokens, channels = values.shape
    plane, work = np.empty((tokens, channels), np.float32), _work(channels)
    plane_bits = plane.view(np.uint32)
    for record in range(n):
        at = 0
        for p in range(planes):
            if not coded[record]:
                break
            largest = np.uint16(0)
            for row in range(tokens):
                for c in range(channels):
                    largest = max(largest, values[record, p, row, c] & np.uint16(0x7FFF))
                    plane_bits[row, c] = np.uint32(values[record, p, row, c]) << np.uint32(16)
            # A comparison of floats would miss a NaN, and sums of what is too large for any scale of V may be some.
            if largest >= (np.uint16(0x7F80) if is_key[p] else np.uint16(_HUGE)):
                at = -1
            elif is_key[p]:
                at = _encode_k(plane, mean[p], form[1], table, out[record], at, work)
            else:
                at = _encode_v(plane, form[0], form[2], turn[0], out[record], at, work)
            coded[record] = at >= 0


@njit(nogil=True)
def decode_lossy(coded: Any, values: Any, is_key: Any, mean: Any, form: Any, turn: Any, table: Any, wanted: Any) -> None:
    """The reverse, for the records that are ``wanted``, (n,) bool. Results are rounded to the nearest bf16, ties to even."""
    n, planes, tokens, channels = values.shape
    plane, work = np.empty((tokens, channels), np.float32), _work(channels)
    plane_bits = plane.view(np.uint32)
    for record in range(n):
        at = 0
        for p in range(planes):
            if not wanted[record]:
                break
            if is_key[p]:
                at = _decode_k(plane, mean[p], form[1], table, coded[record], at, work)
            else:
                at = _decode_v(plane, form[0], form[2], turn[1], coded[record], at, work)
            for row in range(tokens):
                for c in range(channels):
                    word = plane_bits[row, c]
                    word += np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
                    values[record, p, row, c] = np.uint16(word >> np.uint32(16))
