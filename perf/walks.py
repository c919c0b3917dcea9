"""What random memory costs by itself: loads that know their address, and loads that wait for the one before."""

from __future__ import annotations

import statistics
import time

import numpy as np
import numpy.typing as npt

from kvortex.index._memory import zeros
from kvortex.jit import njit

LINE_BYTES = 64
_CELLS = LINE_BYTES // 8

Cells = npt.NDArray[np.int64]


@njit(nogil=True)
def _gather(lines: Cells, at: Cells) -> int:
    """Sum of a word of each line that is named: as many misses at once as the processor can have."""
    total = 0
    for i in range(at.size):
        total += lines[at[i] * _CELLS]
    return total


@njit(nogil=True)
def _chase(lines: Cells, start: int, steps: int) -> int:
    """Follows a chain from line to line: one miss at a time."""
    at = start
    for _ in range(steps):
        at = lines[at * _CELLS]
    return at


@njit(nogil=True)
def reckon(steps: int) -> int:
    """Arithmetic in registers without the GIL: what other programs leave of the processor."""
    x = 1
    for _ in range(steps):
        x = (x * 6364136223846793005 + 1442695040888963407) & 0x7FFFFFFFFFFF
    return x


class Walks:
    """Random lines of memory like the index's: as many bytes, aligned and on huge pages as those are.

    Parameters
    ----------
    nbytes
        Of the memory.
    steps
        Loads of each walk.
    """

    def __init__(self, nbytes: int, steps: int, rng: np.random.Generator) -> None:
        self._lines = zeros(nbytes // LINE_BYTES * LINE_BYTES).view(np.int64)
        self._count, self._steps, self._rng = nbytes // LINE_BYTES, steps, rng
        # One cycle through all lines in random order (a permutation, closed), so no chain is short.
        order = rng.permutation(self._count)
        self._lines[order * _CELLS] = np.roll(order, -1)
        self._at = 0
        self.gather_ns()
        self.chase_ns()

    def gather_ns(self) -> float:
        """ns a load, of loads that overlap."""
        at = self._rng.integers(0, self._count, self._steps)
        began = time.perf_counter()
        _gather(self._lines, at)
        return (time.perf_counter() - began) / self._steps * 1e9

    def chase_ns(self) -> float:
        """ns a load, of loads that wait for each other."""
        began = time.perf_counter()
        self._at = int(_chase(self._lines, self._at, self._steps))
        return (time.perf_counter() - began) / self._steps * 1e9

    def medians(self, rounds: int) -> tuple[float, float]:
        """Of gather and chase, by turns."""
        pairs = [(self.gather_ns(), self.chase_ns()) for _ in range(rounds)]
        return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)
