"""SHA-256 in compiled code: FIPS 180-4, by the CPU's own instructions where it has them, else by plain arithmetic.

Every function takes ``hardware``: whether to use the instructions, as :func:`kvortex.keys._sha_ni.available` says. Both
ways give the same bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvortex.jit import njit
from kvortex.keys import _sha_ni
from kvortex.keys._bytes import store_big_endian
from kvortex.keys._constants import INITIAL_STATE, ROUND_CONSTANTS

Bytes = npt.NDArray[np.uint8]
State = npt.NDArray[np.uint32]
BLOCK = 64  # bytes that one compression takes
PADDING = 72  # bytes that a buffer must have room for behind a message
_INITIAL = np.array(INITIAL_STATE, np.uint32)
_K = np.array(ROUND_CONSTANTS, np.uint32)
_ZERO = np.int64(0)  # functions are compiled anew for each literal that they are called with


@njit(nogil=True, inline="always")
def rotated(x: int, count: int) -> np.uint32:
    """A uint32 rotated to the right."""
    return np.uint32((x >> count) | (x << (32 - count)))


@njit(nogil=True)
def compress_plainly(state: State, data: Bytes, at: int, blocks: int) -> None:
    """As :func:`kvortex.keys._sha_ni.compress`, on any CPU."""
    w = np.empty(64, np.uint32)
    for start in range(at, at + BLOCK * blocks, BLOCK):
        for t in range(16):
            p = start + 4 * t
            w[t] = (data[p] << 24) | (data[p + 1] << 16) | (data[p + 2] << 8) | data[p + 3]
        for t in range(16, 64):
            x, y = w[t - 15], w[t - 2]
            s0 = rotated(x, 7) ^ rotated(x, 18) ^ (x >> 3)
            s1 = rotated(y, 17) ^ rotated(y, 19) ^ (y >> 10)
            w[t] = np.uint32(w[t - 16] + s0 + w[t - 7] + s1)
        a, b, c, d, e, f, g, h = state[0], state[1], state[2], state[3], state[4], state[5], state[6], state[7]
        for t in range(64):
            s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)
            s0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)
            t1 = np.uint32(h + s1 + (g ^ (e & (f ^ g))) + _K[t] + w[t])
            t2 = np.uint32(s0 + ((a & b) | (c & (a | b))))
            h, g, f, e, d, c, b, a = g, f, e, np.uint32(d + t1), c, b, a, np.uint32(t1 + t2)
        state[0] += a
        state[1] += b
        state[2] += c
        state[3] += d
        state[4] += e
        state[5] += f
        state[6] += g
        state[7] += h


@njit(nogil=True)
def compress(state: State, data: Bytes, at: int, blocks: int, hardware: bool) -> None:
    """Takes ``blocks`` (at least 1) times 64 bytes of ``data`` from ``at`` on into the state."""
    if hardware:
        _sha_ni.compress(state, data, at, blocks)
    else:
        compress_plainly(state, data, at, blocks)


@njit(nogil=True)
def start(state: State) -> None:
    """The state before the first block of a message."""
    for k in range(8):
        state[k] = _INITIAL[k]


@njit(nogil=True)
def write_padding(buffer: Bytes, begin: int, end: int, length: int) -> int:
    """Ends the message of ``length`` bytes whose last part is ``buffer[begin:end]``; gives the blocks that part has now."""
    blocks = (end - begin + 9 + BLOCK - 1) // BLOCK
    last = begin + BLOCK * blocks
    store_big_endian(buffer, end, np.uint64(1) << np.uint64(63))
    for p in range(end + 8, last - 8, 8):
        store_big_endian(buffer, p, 0)
    store_big_endian(buffer, last - 8, 8 * length)
    return blocks


@njit(nogil=True)
def write_state(state: State, out: Bytes, at: int) -> None:
    """The state as a digest, to ``out[at : at + 32]``."""
    for k in range(4):
        store_big_endian(out, at + 8 * k, np.uint64(state[2 * k]) << np.uint64(32) | np.uint64(state[2 * k + 1]))


@njit(nogil=True)
def digest_in_place(buffer: Bytes, begin: int, end: int, state: State, out: Bytes, at: int, hardware: bool) -> None:
    """SHA-256 of ``buffer[begin:end]`` to ``out[at : at + 32]``; overwrites up to ``PADDING`` bytes behind the message."""
    blocks = write_padding(buffer, begin, end, end - begin)
    start(state)
    compress(state, buffer, begin, blocks, hardware)
    write_state(state, out, at)


@njit(nogil=True)
def digest(data: Bytes, at: int, length: int, scratch: Bytes, state: State, out: Bytes, to: int, hardware: bool) -> None:
    """SHA-256 of ``data[at : at + length]``, which stays as it is, to ``out[to : to + 32]``; ``scratch`` has 128 bytes."""
    whole = length // BLOCK
    start(state)
    if whole:
        compress(state, data, at, whole, hardware)
    rest = length - BLOCK * whole
    for p in range(rest):
        scratch[p] = data[at + BLOCK * whole + p]
    compress(state, scratch, _ZERO, write_padding(scratch, _ZERO, rest, length), hardware)
    write_state(state, out, to)
