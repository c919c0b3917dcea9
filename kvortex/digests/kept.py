"""Digests of the blocks in a pool, one for each slot: kept when a block is saved, compared when it is loaded.

Both functions hold the GIL from looking at ``once`` to their last step. Whoever would use the slots anew needs it in between,
so a thread that comes late, or again after an interrupt, never touches what a slot holds by then.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from kvortex.digests.keys import DIGEST_BYTES
from kvortex.jit import njit

Digests = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]


@njit()
def _keep(once, slots, digests, kept):  # type: ignore[no-untyped-def]
    if once[0]:
        return False
    for at in range(len(slots)):
        kept[slots[at], 0], kept[slots[at], 1] = digests[at, 0], digests[at, 1]
    return True


@njit()
def _compare(once, slots, digests, kept, wrong):  # type: ignore[no-untyped-def]
    if once[0]:
        return False
    for at in range(len(slots)):
        wrong[at] = kept[slots[at], 0] != digests[at, 0] or kept[slots[at], 1] != digests[at, 1]
    return True


def keep(once: Digests, slots: Int64s, digests: Digests, kept: Digests) -> bool:
    """Puts digests in their slots' places, unless the slots were given back.

    Parameters
    ----------
    once : (1,) uint8
        Not 0 from the moment on in which the slots were given back.
    slots : (n,) int64
    digests : (n, 16) uint8
    kept : (slots, 16) uint8

    Returns
    -------
    bool
        Whether it did.
    """
    return bool(_keep(once, slots, digests.view(np.uint64), kept.view(np.uint64)))


def compare(once: Digests, slots: Int64s, digests: Digests, kept: Digests) -> npt.NDArray[np.bool_] | None:
    """(n,) bool: which digests are not those of their slots; None where the slots were given back. As :func:`keep`."""
    wrong = np.zeros(len(slots), np.bool_)
    return wrong if _compare(once, slots, digests.view(np.uint64), kept.view(np.uint64), wrong) else None


@functools.cache
def load_compiled() -> None:
    """Loads what is compiled, once in a process."""
    once, none, rows = np.zeros(1, np.uint8), np.empty(0, np.int64), np.empty((0, DIGEST_BYTES), np.uint8)
    keep(once, none, rows, rows)
    compare(once, none, rows, rows)
