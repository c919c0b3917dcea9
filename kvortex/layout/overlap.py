"""Whether fragments of different tensors share a byte: exact, and fast enough for a million of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def find_overlap(
    bases: NDArray[np.int64], strides: NDArray[np.int64], nbytes: NDArray[np.int64], num_blocks: int
) -> tuple[int, int] | None:
    """Find two fragments that share a byte in some pair of blocks.

    Fragments whose address ranges over all blocks do not meet are apart. Where they meet, they are apart exactly if
    both step from block to block by the same stride and lie at disjoint places within it. Ranges that meet with
    different strides are taken for an overlap: no layout of interleaved tensors looks like that.

    Parameters
    ----------
    bases, strides, nbytes
        int64, shape (F,): address of block 0, block stride (0 if there is one block) and size of each fragment.
    num_blocks
        Blocks of every fragment.

    Returns
    -------
    tuple of int, or None
        Indices of two fragments that overlap.
    """
    order = np.argsort(bases, kind="stable")
    base, stride, size = bases[order], strides[order], nbytes[order]
    end = base + (num_blocks - 1) * stride + size
    group = _groups_of_ranges(base, end)
    for member in np.unique(group[_suspects(base, stride, size, group)]):
        rows = np.flatnonzero(group == member)
        pair = _first_clash(base[rows], stride[rows], size[rows], end[rows])
        if pair is not None:
            return int(order[rows[pair[0]]]), int(order[rows[pair[1]]])
    return None


def _groups_of_ranges(base: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the chains of ranges that meet; `base` ascends. A range that meets no other is a group of its own."""
    reach = np.maximum.accumulate(end)
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(base[1:] >= reach[:-1], dtype=np.int64)))


def _suspects(
    base: NDArray[np.int64], stride: NDArray[np.int64], size: NDArray[np.int64], group: NDArray[np.int64]
) -> NDArray[np.intp]:
    """Fragments that may overlap another of their group. None of a group are suspect in every sane layout."""
    first = np.searchsorted(group, group)  # `group` ascends: the row where each row's group begins
    within = (base - base[first]) % np.maximum(stride, 1)
    sorted_rows = np.lexsort((within, group))
    place, room = within[sorted_rows], np.maximum(stride, 1)[sorted_rows]  # up to the end of the stride ...
    same = group[sorted_rows][1:] == group[sorted_rows][:-1]
    room[:-1] = np.where(same, np.minimum(room[:-1], place[1:]), room[:-1])  # ... or up to the next one's place
    crowded = sorted_rows[place + size[sorted_rows] > room]
    mixed = np.flatnonzero(stride != stride[first])
    lonely = np.bincount(group)[group] == 1
    found = np.concatenate((crowded, mixed))
    suspects: NDArray[np.intp] = found[~lonely[found]]
    return suspects


def _first_clash(
    base: NDArray[np.int64], stride: NDArray[np.int64], size: NDArray[np.int64], end: NDArray[np.int64]
) -> tuple[int, int] | None:
    """Every pair of one group whose ranges really meet, one fragment against all later ones at a time."""
    for i in range(len(base) - 1):
        later = slice(i + 1, int(np.searchsorted(base, end[i])))
        step = max(int(stride[i]), 1)
        place = (base[later] - base[i]) % step
        clash = (stride[later] != stride[i]) | (place < size[i]) | (place + size[later] > step)
        if clash.any():
            return i, i + 1 + int(np.argmax(clash))
    return None
