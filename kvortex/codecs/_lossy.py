"""Fixed-rate quantizers by the CPU: K by channel, V by token. Compiled; all floats are float32, in an order given here.

:mod:`kvortex.kernels.lossy_encode` and its neighbours make the same bytes on a GPU: what changes here changes there.

A plane's codes are bit planes: of each token, of each 32 neighbouring channels, a 32-bit word a bit, lowest first. Before
them lie a K plane's scales, u8[tokens / 16][channels], or a V plane's steps and zeros, fp16[tokens][heads][2].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvortex.jit import njit

GROUP = 16  # tokens that share a scale of K
SCALE_ZERO = 128  # the scale that is 1
_GATHER = np.uint64(0x0102040810204080)
_BYTE = np.uint64(56)
_HUGE = 0x6000  # the bf16 of 2**65
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
def _rotate(row: Any, at: int, dim: int, factor: Any) -> None:
    """The orthonormal Sylvester-Hadamard transform of ``row[at:at + dim]``, in place; its own inverse."""
    half = 1
    while half < dim:
        for first in range(at, at + dim, 2 * half):
            for k in range(first, first + half):
                a, b = row[k], row[k + half]
                row[k], row[k + half] = a + b, a - b
        half *= 2
    for k in range(at, at + dim):
        row[k] *= factor


@njit(nogil=True)
def _pack(codes: Any, bits: int, out: Any, at: int, scratch: Any, scratch64: Any) -> Any:
    """Writes a row's codes as bit planes to ``out[at:]``; gives the place behind."""
    for group in range(len(codes) // 32):
        part = codes[32 * group : 32 * group + 32]
        for bit in range(bits):
            for k in range(32):
                scratch[k] = (part[k] >> np.uint8(bit)) & np.uint8(1)
            word = np.uint32(0)
            for k in range(4):
                word |= np.uint32((scratch64[k] * _GATHER) >> _BYTE) << np.uint32(8 * k)
            out[at] = word
            at += 1
    return at


@njit(nogil=True)
def _unpack(codes: Any, bits: int, coded: Any, at: int) -> Any:
    """The reverse of :func:`_pack`."""
    for group in range(len(codes) // 32):
        part = codes[32 * group : 32 * group + 32]
        part[:] = 0
        for bit in range(bits):
            word = coded[at]
            for k in range(32):
                part[k] |= np.uint8(((word >> np.uint32(k)) & np.uint32(1)) << np.uint32(bit))
            at += 1
    return at


@njit(nogil=True)
def _encode_k(plane: Any, mean: Any, bits: int, table: Any, out: Any, at: int, work: Any) -> Any:
    """A K plane (tokens, channels) of float32 to ``out[at:]``: the place behind, or -1 where a scale would have to clip."""
    tokens, channels = plane.shape
    scale_bytes, codes, scratch, scratch64, most, step = work[0], work[1], work[2], work[3], work[4], work[5]
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
        packed = scale_bytes[:channels].view(np.uint32)
        begin = at + group * channels // 4
        out[begin : begin + channels // 4] = packed
        for row in range(GROUP * group, GROUP * group + GROUP):
            line = plane[row]
            for c in range(channels):
                q = np.floor((line[c] - mean[c]) * step[c])
                codes[c] = np.uint8(min(max(q, -half), half - np.float32(1)) + half)
            code_at = _pack(codes[:channels], bits, out, code_at, scratch, scratch64)
    return code_at


@njit(nogil=True)
def _decode_k(plane: Any, mean: Any, bits: int, table: Any, coded: Any, at: int, work: Any) -> Any:
    tokens, channels = plane.shape
    codes, step = work[1], work[5]
    half = np.float32(1 << (bits - 1))
    code_at = at + tokens // GROUP * channels // 4
    for group in range(tokens // GROUP):
        for c in range(channels):
            word = coded[at + (group * channels + c) // 4]
            step[c] = table[(word >> np.uint32(8 * (c & 3))) & np.uint32(255)] / half
        for row in range(GROUP * group, GROUP * group + GROUP):
            code_at = _unpack(codes[:channels], bits, coded, code_at)
            line = plane[row]
            for c in range(channels):
                line[c] = (np.float32(codes[c]) - half + np.float32(0.5)) * step[c] + mean[c]
    return code_at


@njit(nogil=True)
def _encode_v(plane: Any, dim: int, bits: int, factor: Any, out: Any, at: int, work: Any) -> Any:
    """A V plane likewise; ``factor`` is 1 / sqrt(dim), or 0 for no rotation."""
    tokens, channels = plane.shape
    codes, scratch, scratch64, cell, cell_bits = work[1], work[2], work[3], work[6], work[7]
    heads, most = channels // dim, np.float32((1 << bits) - 1)
    code_at = at + tokens * heads
    for row in range(tokens):
        line = plane[row]
        for head in range(heads):
            part = line[head * dim : head * dim + dim]
            if factor > 0:
                _rotate(part, 0, dim, factor)
            low, high = part[0], part[0]
            for k in range(dim):
                low, high = min(low, part[k]), max(high, part[k])
            if not (abs(low) <= _LARGEST_HALF and abs(high) <= _LARGEST_HALF):
                return -1
            zero_half = _half_down(low, cell, cell_bits)
            zero = _from_half(zero_half, cell, cell_bits)
            step_half = _half_up((high - zero) / most, cell, cell_bits)
            step = _from_half(step_half, cell, cell_bits)
            if (zero_half & np.uint32(0x7FFF)) >= np.uint32(0x7C00):
                return -1
            inverse = np.float32(1) / step if step > 0 else np.float32(0)
            out[at + row * heads + head] = step_half | zero_half << np.uint32(16)
            for k in range(dim):
                q = np.rint((part[k] - zero) * inverse)
                codes[head * dim + k] = np.uint8(min(max(q, np.float32(0)), most))
        code_at = _pack(codes[:channels], bits, out, code_at, scratch, scratch64)
    return code_at


@njit(nogil=True)
def _decode_v(plane: Any, dim: int, bits: int, factor: Any, coded: Any, at: int, work: Any) -> Any:
    tokens, channels = plane.shape
    codes, cell, cell_bits = work[1], work[6], work[7]
    heads = channels // dim
    code_at = at + tokens * heads
    for row in range(tokens):
        code_at = _unpack(codes[:channels], bits, coded, code_at)
        line = plane[row]
        for head in range(heads):
            word = coded[at + row * heads + head]
            step = _from_half(word & np.uint32(0xFFFF), cell, cell_bits)
            zero = _from_half(word >> np.uint32(16), cell, cell_bits)
            part = line[head * dim : head * dim + dim]
            for k in range(dim):
                part[k] = np.float32(codes[head * dim + k]) * step + zero
            if factor > 0:
                _rotate(part, 0, dim, factor)
    return code_at


@njit(nogil=True)
def _work(channels: int) -> Any:
    cell, scratch = np.zeros(1, np.float32), np.zeros(32, np.uint8)
    return (
        np.zeros(channels, np.uint8),
        np.zeros(channels, np.uint8),
        scratch,
        scratch.view(np.uint64),
        np.zeros(channels, np.float32),
        np.zeros(channels, np.float32),
        cell,
        cell.view(np.uint32),
    )


@njit(nogil=True)
def encode_lossy(values: Any, out: Any, is_key: Any, mean: Any, form: Any, factor: Any, table: Any, coded: Any) -> None:
    """Bodies of records.

    Parameters
    ----------
    values : (n, planes, tokens, channels) uint16
    out : (n, words of a body) uint32
    is_key : (planes,) bool
    mean : (planes, channels) float32
    form : (3,) int64
        Width of a head, bits of K, bits of V.
    factor : float32
        Of the rotation of V.
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
                at = _encode_v(plane, form[0], form[2], factor, out[record], at, work)
            coded[record] = at >= 0


@njit(nogil=True)
def decode_lossy(coded: Any, values: Any, is_key: Any, mean: Any, form: Any, factor: Any, table: Any, wanted: Any) -> None:
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
                at = _decode_v(plane, form[0], form[2], factor, coded[record], at, work)
            for row in range(tokens):
                for c in range(channels):
                    word = plane_bits[row, c]
                    word += np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
                    values[record, p, row, c] = np.uint16(word >> np.uint32(16))
