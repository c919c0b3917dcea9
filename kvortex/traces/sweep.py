"""Policies against pool sizes, on an index alone: no device, no pool, no bytes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvortex.index import BlockIndex
from kvortex.index.serving import serve
from kvortex.traces.format import Trace

_BATCH = 1 << 16  # block references of one compiled call, about: a few tens of milliseconds


@dataclass(frozen=True, eq=False)
class Run:
    """One policy on a pool of one size.

    Attributes
    ----------
    policy, admit_after, pool_blocks
    hits : (r,) int64
        Of each request: its leading blocks that were resident when it came, without a gap. 0 for what was stored
        without being asked for.
    evictions
    seconds
        Of the index, by the wall clock.
    """

    policy: str
    admit_after: int
    pool_blocks: int
    hits: npt.NDArray[np.int64]
    evictions: int
    seconds: float


def batches(trace: Trace) -> list[tuple[int, int]]:
    """(first, end) of the requests that one compiled call takes."""
    cuts = np.searchsorted(trace.starts, np.arange(_BATCH, len(trace.ids), _BATCH)).tolist()
    bounds = sorted({0, *cuts, len(trace)})
    return list(zip(bounds, bounds[1:], strict=False))


def play(trace: Trace, policy: str, pool_blocks: int, admit_after: int = 1, tell: Callable[[], None] = lambda: None) -> Run:
    """Serves a trace from an index of ``pool_blocks`` slots, the way a replay with data does.

    Parameters
    ----------
    trace
    policy
        A name of ``kvortex.index.POLICIES``.
    pool_blocks
        Of longer requests only so many leading blocks are used.
    admit_after
        Blocks are stored at the n-th offer.
    tell
        Called after each of the :func:`batches`.

    Raises
    ------
    ConfigError
        There is no such policy, or ``admit_after`` is none.
    """
    # A pool that holds all there is evicts nothing, and its size is nothing to anybody.
    slots = min(pool_blocks, max(1, trace.distinct))
    index, hits = BlockIndex(slots, policy, admit_after=admit_after), np.zeros(len(trace), np.int64)
    began = time.perf_counter()
    for first, end in batches(trace):
        hits[first:end] = serve(index, trace.keys, trace.starts[first : end + 1], pool_blocks, trace.stored[first:end])
        tell()
    return Run(policy, admit_after, pool_blocks, hits, index.counts().evictions, time.perf_counter() - began)


@dataclass(frozen=True)
class Grid:
    """What is played: every policy with every admission on every pool size."""

    policies: Sequence[str] = ("lru",)
    admit_after: Sequence[int] = (1,)
    pool_blocks: Sequence[int] = (3000,)

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        """(policy, admit_after, pool_blocks), sizes changing first."""
        return itertools.product(self.policies, self.admit_after, self.pool_blocks)

    def __len__(self) -> int:
        return len(self.policies) * len(self.admit_after) * len(self.pool_blocks)


def sweep(trace: Trace, grid: Grid, tell: Callable[[str], None] = lambda _: None) -> Iterator[Run]:
    """A run for each of the grid; ``tell`` hears after each batch what is being played."""
    for policy, admit_after, blocks in grid:
        text = f"{label(policy, admit_after)}, {blocks} blocks"
        yield play(trace, policy, blocks, admit_after, lambda: tell(text))  # noqa: B023


def label(policy: str, admit_after: int) -> str:
    """A policy and its admission in a few characters."""
    return policy if admit_after == 1 else f"{policy}, offer {admit_after}"
