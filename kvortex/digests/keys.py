"""The digest's definition, and the numbers that it multiplies with.

A record is padded with zeros to rows of 512 bytes, each 128 little-endian 32-bit words. Half ``h`` of the digest is

    D[h] = L[h] * nbytes + sum over rows j of  R[h][j] * sum over i of  C[h][i] * word(j, i)      (mod 2**64)

where the second half takes each word with its bytes reversed. ``C``, ``R`` and ``L`` are 64-bit numbers drawn once from
SplitMix64, the ``R`` made odd. Sums are in any order, and a part of a word may be added by itself: so any thread can add any
part of a record through loads of any width, and two kernels that cut a record differently agree.

Source: multilinear hashing (Carter and Wegman, "Universal classes of hash functions", 1979; Lemire and Kaser, "Strongly
universal string hashing is fast", 2014) twice, over columns and over rows.

Bound: take two different records of one length, chosen without looking at the numbers, and ``v`` (0 to 31) the lowest bit
in which any of their words differ. Over the choice of the numbers, ``D[0]`` agrees with a probability of at most
(65 - v) * 2**-(64 - v). For the differences, divided by 2**v, have an odd one in some column; the sum of that column over rows,
weighted by ``R``, is a multiple of 2**u with at most 2**-(u - 1), since the ``R`` are odd and otherwise uniform; and multiplied
by its ``C`` it then is 0 mod 2**(64 - v) with 2**-(64 - v - u). With ``v'`` for the words reversed, v + v' is 38 at most (one
byte, its highest bit), and the numbers of both halves are independent: both agree with at most 2100 * 2**-90 < 2**-78.9. Damage
within one word is always seen, a flipped bit among it, since no ``C`` is a multiple of 2**32. Words that random ones took the
place of go unseen with about 2**-128. Records of lengths n and n' agree with at most 2**-(128 - 2 * w), where 2**w is the
highest power of 2 that divides n - n'.

The numbers are public: it tells damage, not forgery.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16
ROW_BYTES = 512
COLUMNS = ROW_BYTES // 4
_ROWS_BYTES = 1 << 20  # tables of R are made for multiples of this, so that few are made
_STEP, _MIX_A, _MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64
_SEED_C, _SEED_R, _SEED_L = 0x6B766F7274657843, 0x6B766F7274657852, 0x6B766F727465784C  # "kvortexC", "..R", "..L"
Numbers = npt.NDArray[np.uint64]


def splitmix64(seed: int, count: int) -> Numbers:
    """The first ``count`` numbers of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    2014) from a seed."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_A)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_B)
        return z ^ (z >> np.uint64(31))


@functools.cache
def columns() -> Numbers:
    """``C``, (2, COLUMNS) uint64."""
    return splitmix64(_SEED_C, 2 * COLUMNS).reshape(2, COLUMNS)


@functools.cache
def lengths() -> Numbers:
    """``L``, (2,) uint64."""
    return splitmix64(_SEED_L, 2)


def rows(nbytes: int) -> Numbers:
    """``R`` for records of up to ``nbytes`` at least, (rows, 2) uint64: the halves of a row side by side. Read-only."""
    return _rows(-(-nbytes // _ROWS_BYTES))


@functools.lru_cache(4)
def _rows(steps: int) -> Numbers:
    found = (splitmix64(_SEED_R, 2 * steps * (_ROWS_BYTES // ROW_BYTES)) | np.uint64(1)).reshape(-1, 2)
    found.flags.writeable = False
    return found


def kernel_numbers(nbytes: int) -> Numbers:
    """(k,) uint64: ``C``, the halves of each column side by side, then ``R`` for records of up to ``nbytes`` and two rows more.
    What kernels read (:mod:`kvortex.kernels.digest`), some of them three rows at a time."""
    count = -(-nbytes // ROW_BYTES) + 2
    return np.concatenate((columns().T.ravel(), rows(count * ROW_BYTES)[:count].ravel()))
