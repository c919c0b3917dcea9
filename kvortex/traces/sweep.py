"""Policies against pool sizes, on an index alone: no device, no pool, no bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
    policy, pool_blocks
    hits : (r,) int64
        Of each request: its leading blocks that were resident when it came, without a gap.
    evictions
    seconds
        Of the index, by the wall clock.
    """

    policy: str
    pool_blocks: int
    hits: npt.NDArray[np.int64]
    evictions: int
    seconds: float


def batches(trace: Trace) -> list[tuple[int, int]]:
    """(first, end) of the requests that one compiled call takes."""
    cuts = np.searchsorted(trace.starts, np.arange(_BATCH, len(trace.ids), _BATCH)).tolist()
    bounds = sorted({0, *cuts, len(trace)})
    return list(zip(bounds, bounds[1:], strict=False))


def play(trace: Trace, policy: str, pool_blocks: int, tell: Callable[[], None] = lambda: None) -> Run:
    """Serves a trace from an index of ``pool_blocks`` slots, the way a replay with data does.

    Parameters
    ----------
    trace
    policy
        A name of ``kvortex.index.POLICIES``.
    pool_blocks
        Of longer requests only so many leading blocks are used.
    tell
        Called after each of the :func:`batches`.

    Raises
    ------
    ConfigError
        There is no such policy, or no index can have so many slots.
    """
    index, hits = BlockIndex(pool_blocks, policy), np.zeros(len(trace), np.int64)
    began = time.perf_counter()
    for first, end in batches(trace):
        hits[first:end] = serve(index, trace.keys, trace.starts[first : end + 1], pool_blocks)
        tell()
    return Run(policy, pool_blocks, hits, index.counts().evictions, time.perf_counter() - began)


def sweep(
    trace: Trace, policies: list[str], pool_blocks: list[int], tell: Callable[[str], None] = lambda _: None
) -> Iterator[Run]:
    """Every policy on every pool size; ``tell`` hears after each batch what is being played."""
    for policy in policies:
        for blocks in pool_blocks:
            yield play(trace, policy, blocks, lambda: tell(f"{policy}, {blocks} blocks"))  # noqa: B023
