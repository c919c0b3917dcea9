"""What NumPy has no call for: pages of bfloat16, rotary embedding, the causal part of softmax. Plain loops for Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_FAST: dict[str, Any] = {"cache": True, "nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
MASKED = np.float32(-np.inf)


@njit(**_FAST)
def rms_norm(x, weight, epsilon, out):
    """Each row of ``x`` over its root mean square, times ``weight``."""
    for row in range(x.shape[0]):
        total = np.float32(0)
        for at in range(x.shape[1]):
            total += x[row, at] * x[row, at]
        scale = np.float32(1) / np.sqrt(total / np.float32(x.shape[1]) + epsilon)
        for at in range(x.shape[1]):
            out[row, at] = x[row, at] * scale * weight[at]


@njit(**_FAST)
def rotate(x, cos, sin, start, scale, out):
    """Rotary embedding, halves rotated against each other, as in llama.

    ``x`` is (rows, heads, d) and ``out`` (heads, rows, d); ``cos`` and ``sin`` are (positions, d / 2), and row r has position
    ``start + r``.
    """
    half = x.shape[2] // 2
    for row in range(x.shape[0]):
        for head in range(x.shape[1]):
            for at in range(half):
                c, s = cos[start + row, at], sin[start + row, at]
                a, b = x[row, head, at], x[row, head, at + half]
                out[head, row, at] = (a * c - b * s) * scale
                out[head, row, at + half] = (b * c + a * s) * scale


@njit(**_FAST)
def write_pages(bits, pages, table, start, count):
    """Rounds rows to bfloat16 and puts them into their pages.

    Parameters
    ----------
    bits : (heads, rows, d) uint32
        float32 values, seen as integers.
    pages : (blocks, block_size, heads, d) uint16
    table : (n,) int64
        The sequence's pages, in order.
    start, count
        Position of the first row, and how many of the rows are written.
    """
    size = pages.shape[1]
    for row in range(count):
        page, place = table[(start + row) // size], (start + row) % size
        for head in range(bits.shape[0]):
            for at in range(bits.shape[2]):
                word = np.uint64(bits[head, row, at])
                even = (word >> np.uint64(16)) & np.uint64(1)
                pages[page, place, head, at] = np.uint16((word + np.uint64(0x7FFF) + even) >> np.uint64(16))


@njit(**_FAST)
def read_pages(pages, table, head, count, bits):
    """The first ``count`` positions of one head, from their pages into (rows, d) uint32: float32 values as integers."""
    size = pages.shape[1]
    for row in range(count):
        page, place = table[row // size], row % size
        for at in range(bits.shape[1]):
            bits[row, at] = np.uint32(pages[page, place, head, at]) << np.uint32(16)


@njit(**_FAST)
def mask_future(scores, rows, start):
    """Row r of ``scores`` (n, context) is of the query at position ``start + r % rows``: what comes after it is masked."""
    for row in range(scores.shape[0]):
        scores[row, start + row % rows + 1 :] = MASKED


@njit(**_FAST)
def divide_by_sums(weights, rows, start, values, out):
    """The end of softmax: ``values`` (n, d), a row for each of ``weights``, over that row's sum, into ``out``.

    ``out`` is (rows, heads, d), and n = heads * rows, head after head.
    """
    for row in range(weights.shape[0]):
        total = np.float32(0)
        for at in range(start + row % rows + 1):
            total += weights[row, at]
        for at in range(values.shape[1]):
            out[row % rows, row // rows, at] = values[row, at] / total
