"""What makes a strided tensor unfit to be read as blocks of bytes, and how that is told.

Every message shows the numbers that were seen and ends with what to change.
"""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import numpy as np

from kvortex.errors import LayoutError, shown
from kvortex.layout.tensors import TensorSpec

ITEMSIZES = (1, 2, 4, 8, 16)
_MAX_ADDRESS = (1 << 63) - 1  # fragments are held as int64


def refusal(label: str, spec: TensorSpec, problem: str, cure: str) -> LayoutError:
    """The error that says what is wrong with one tensor, what was seen, and what to change."""
    return LayoutError(f"{label}: {problem}; seen: {seen(spec)}. {cure}")


def seen(spec: TensorSpec) -> str:
    """A tensor's numbers, for messages."""
    return (
        f"pointer {spec.pointer:#x}, shape {shown(spec.shape)}, strides {shown(spec.strides)} bytes, itemsize {spec.itemsize}, "
        f"device {spec.device}"
    )


def checked_axis(axis: Any, what: str, label: str, spec: TensorSpec) -> int:
    """An axis counted from 0. Negative ones count from the end, as in numpy."""
    ndim = len(spec.shape)
    try:
        if isinstance(axis, (bool, np.bool_)):
            raise TypeError("a bool is no axis")
        number = operator.index(axis)
    except Exception as error:  # types and arrays have __index__ too, and it raises
        raise refusal(label, spec, f"{what}={shown(axis)} is no integer", "Give the number of an axis.") from error
    if not -ndim <= number < ndim:
        raise refusal(label, spec, f"{what}={shown(number)} is out of range", f"The tensor has {ndim} axes.")
    return number % ndim


def check_tensor(spec: TensorSpec, label: str) -> None:
    """Refuse a tensor whose elements are not a set of distinct, forward, whole-element addresses.

    Parameters
    ----------
    spec
        The tensor. Strides of axes of size 1 are never used, and so never judged.
    label
        What messages call it.

    Raises
    ------
    LayoutError
        Empty, a wrong itemsize or pointer, or strides that are negative, zero, no multiple of the itemsize, or so
        short that elements share bytes.
    """
    if prod(spec.shape) == 0 or any(size < 0 for size in spec.shape):
        raise refusal(label, spec, "it is empty", "Every axis needs at least one element.")
    if spec.itemsize not in ITEMSIZES:
        raise refusal(label, spec, f"an element of {spec.itemsize} bytes has the wrong dtype size",
                      f"Element sizes are {ITEMSIZES}; pass a view of such a type.")
    if spec.pointer <= 0:
        raise refusal(label, spec, f"the pointer {spec.pointer} is no address", "Pass the address of element (0, ..., 0).")
    for axis, (size, stride) in enumerate(zip(spec.shape, spec.strides, strict=True)):
        if size > 1:
            _check_stride(spec, label, axis, stride)
    _check_distinct(spec, label)


def _check_stride(spec: TensorSpec, label: str, axis: int, stride: int) -> None:
    if stride < 0:
        raise refusal(label, spec, f"axis {axis} has the negative stride {stride}", "Pass the array unflipped.")
    if stride == 0:
        raise refusal(label, spec, f"axis {axis} is broadcast (stride 0), so blocks share bytes",
                      "Pass the array before it was broadcast.")
    if stride % spec.itemsize:
        raise refusal(label, spec, f"the stride {stride} of axis {axis} is no multiple of the itemsize {spec.itemsize}, "
                      "a wrong dtype size", "Strides are in bytes; check them and the itemsize.")


def _check_distinct(spec: TensorSpec, label: str) -> None:
    """Each stride must reach past everything that the shorter strides span: then no two elements share a byte.

    Sufficient, and necessary for every layout that is axes nested in some order with padding anywhere.
    """
    span = spec.itemsize
    used = [axis for axis, size in enumerate(spec.shape) if size > 1]
    for axis in sorted(used, key=lambda axis: spec.strides[axis]):
        stride = spec.strides[axis]
        if stride < span:
            raise refusal(label, spec, f"its blocks or elements overlap: one step along axis {axis} is {stride} bytes, but the "
                          f"axes with shorter strides span {span} bytes", "Check the strides (in bytes) and the itemsize.")
        span += (spec.shape[axis] - 1) * stride
    if spec.pointer + span > _MAX_ADDRESS:
        raise refusal(label, spec, "it ends past the last address", "Check the pointer and the strides.")
