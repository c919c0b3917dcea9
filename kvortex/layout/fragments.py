"""From one strided tensor to fragments: the runs of bytes of a block that lie contiguous, and where each block's are.

The innermost axes that follow each other without a gap are one run; every combination of the axes that remain is one
fragment. A record holds a block's fragments packed: layer first, then the remaining axes in logical order. Bytes inside
a run stay in memory order, since to copy them in any other order would cost a kernel that moves single elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from kvortex.layout.checks import check_tensor, checked_axis, refusal
from kvortex.layout.tensors import TensorSpec

MAX_BLOCKS = 1 << 31  # kernels read block ids as int32
MAX_FRAGMENTS = 1 << 20  # one row each in every plan; more of them is a wrong block axis, not a model


@dataclass(frozen=True)
class TensorBlocks:
    """One tensor cut into blocks.

    Attributes
    ----------
    num_blocks
        Elements along the block axis.
    block_stride
        Bytes from one block to the next; 0 if there is only one block.
    bases
        int64, shape (F,): address of each fragment of block 0, in record order.
    nbytes
        int64, shape (F,): bytes of each fragment.
    num_layers
        Elements along the layer axis; 1 without one.
    shape
        Elements along each axis but the block and layer axes, in logical order.
    record_strides
        Bytes in the record from one index to the next along each axis of `shape`; 0 for axes of size 1.
    """

    num_blocks: int
    block_stride: int
    bases: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    num_layers: int
    shape: tuple[int, ...]
    record_strides: tuple[int, ...]


def cut_tensor(spec: TensorSpec, block_axis: int, layer_axis: int | None, label: str) -> TensorBlocks:
    """Cut one tensor into blocks, and its blocks into fragments.

    Parameters
    ----------
    spec
        The tensor.
    block_axis, layer_axis
        Which axes count blocks and layers; negative ones count from the end.
    label
        What messages call the tensor.

    Returns
    -------
    TensorBlocks
        Fragments that touch are already one.

    Raises
    ------
    LayoutError
        The tensor is unfit (see :func:`kvortex.layout.checks.check_tensor`), an axis is out of range, both axes are the
        same, no two elements of a block lie side by side, or there would be more than ``MAX_FRAGMENTS`` fragments.
    """
    block = checked_axis(block_axis, "block_axis", label, spec)
    layer = None if layer_axis is None else checked_axis(layer_axis, "layer_axis", label, spec)
    if block == layer:
        raise refusal(label, spec, f"layer_axis and block_axis are both axis {block}", "Blocks and layers need an axis each.")
    check_tensor(spec, label)

    inner = [axis for axis, size in enumerate(spec.shape) if size > 1 and axis != block]
    run = _contiguous_run(spec, [axis for axis in inner if axis != layer])
    outer = [axis for axis in inner if axis == layer] + [axis for axis in inner if axis not in run and axis != layer]
    run_bytes = spec.itemsize * prod(spec.shape[axis] for axis in run)
    bases, nbytes = _fragments(spec, outer, run_bytes, label)
    if not run and len(bases) > 1:
        raise refusal(label, spec, "no two elements of a block lie side by side, so every element would be a copy of its own",
                      "Check block_axis and layer_axis, or lay the tensor out with an inner axis that is contiguous.")

    kept = [axis for axis in range(len(spec.shape)) if axis not in (block, layer)]
    steps = {axis: spec.strides[axis] for axis in run}
    step = run_bytes
    for axis in reversed(outer):
        steps[axis] = step
        step *= spec.shape[axis]
    return TensorBlocks(
        num_blocks=spec.shape[block],
        block_stride=spec.strides[block] if spec.shape[block] > 1 else 0,  # a single block's stride is whatever it is
        bases=bases,
        nbytes=nbytes,
        num_layers=1 if layer is None else spec.shape[layer],
        shape=tuple(spec.shape[axis] for axis in kept),
        record_strides=tuple(steps.get(axis, 0) for axis in kept),
    )


def _contiguous_run(spec: TensorSpec, axes: list[int]) -> list[int]:
    """The axes that follow each other in memory without a gap, from the element upwards.

    The layer axis is not offered: where it lies inside the run, the run ends, because the record puts it first.
    """
    run, nbytes = [], spec.itemsize
    for axis in sorted(axes, key=lambda axis: spec.strides[axis]):
        if spec.strides[axis] != nbytes:
            break
        run.append(axis)
        nbytes *= spec.shape[axis]
    return run


def _fragments(
    spec: TensorSpec, outer: list[int], run_bytes: int, label: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bases and sizes of block 0's fragments, the first of the outer axes slowest."""
    count = prod(spec.shape[axis] for axis in outer)
    if count > MAX_FRAGMENTS:
        raise refusal(label, spec, f"a block would be {count} fragments of {run_bytes} bytes, more than {MAX_FRAGMENTS}",
                      "Check block_axis, or lay the tensor out with longer contiguous runs.")
    bases = np.array([spec.pointer], dtype=np.int64)
    for axis in outer:
        steps = np.arange(spec.shape[axis], dtype=np.int64) * spec.strides[axis]
        bases = (bases[:, None] + steps).reshape(-1)
    starts, nbytes = merge(bases, np.zeros(count, np.int64), np.full(count, run_bytes, np.int64))
    return bases[starts], nbytes


def merge(
    bases: NDArray[np.int64], strides: NDArray[np.int64], nbytes: NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Join each fragment that ends where the next one in record order begins, if both step alike from block to block.

    Parameters
    ----------
    bases, strides, nbytes
        int64, shape (F,), F >= 1: address of block 0, block stride and size of each fragment, in record order.

    Returns
    -------
    starts
        intp, shape (M,): the fragments that begin a merged one.
    nbytes
        int64, shape (M,): bytes of each merged fragment.
    """
    joined = (bases[:-1] + nbytes[:-1] == bases[1:]) & (strides[:-1] == strides[1:])
    starts = np.flatnonzero(np.concatenate(([True], ~joined)))
    return starts, np.add.reduceat(nbytes, starts)
