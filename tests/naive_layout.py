"""Slow, obvious references for kvortex.layout: Python loops over single elements, no cleverness to get wrong."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np


def element_address(array, index):
    """Address of one element of a numpy array."""
    return array.ctypes.data + sum(i * stride for i, stride in zip(index, array.strides, strict=True))


def block_bytes(array, block, block_axis):
    """Addresses of every byte of one block of one array, as a set."""
    addresses = set()
    for index in np.ndindex(*array.shape):
        if index[block_axis] == block:
            start = element_address(array, index)
            addresses.update(range(start, start + array.itemsize))
    return addresses


def record_addresses(array, block, block_axis, layer_axis=None):
    """Address of every byte of one block's record, in record order.

    Layers first; then the axes that are not part of the contiguous run, in logical order; then the run in memory order.
    """
    axes = [axis for axis in range(array.ndim) if axis not in (block_axis, layer_axis) and array.shape[axis] > 1]
    run, run_bytes = [], array.itemsize
    while True:
        following = [axis for axis in axes if axis not in run and array.strides[axis] == run_bytes]
        if not following:
            break
        run.append(following[0])
        run_bytes *= array.shape[following[0]]
    outer = ([] if layer_axis is None else [layer_axis]) + [axis for axis in axes if axis not in run]
    addresses = []
    for combination in itertools.product(*(range(array.shape[axis]) for axis in outer)):
        index = [0] * array.ndim
        index[block_axis] = block
        for axis, i in zip(outer, combination, strict=True):
            index[axis] = i
        start = element_address(array, index)
        addresses.extend(range(start, start + run_bytes))
    return addresses


def layout_addresses(layout, block):
    """Address of every byte of one block's record, as a layout's fragments say, in record order."""
    record = [None] * layout.record_bytes
    for base, stride, offset, nbytes in layout.fragments.tolist():
        for i in range(nbytes):
            assert record[offset + i] is None, "two fragments fill the same byte of a record"
            record[offset + i] = base + block * stride + i
    assert None not in record, "no fragment fills a byte of the record"
    return record


def gather(layout, block):
    """One block's record, read from memory by the layout's fragments. Host layouts only."""
    record = bytearray(layout.record_bytes)
    for base, stride, offset, nbytes in layout.fragments.tolist():
        record[offset : offset + nbytes] = ctypes.string_at(base + block * stride, nbytes)
    return bytes(record)


def scatter(layout, block, record):
    """Write one block's record into memory by the layout's fragments. Host layouts only."""
    for base, stride, offset, nbytes in layout.fragments.tolist():
        ctypes.memmove(base + block * stride, record[offset : offset + nbytes], nbytes)


def overlap(fragments, num_blocks):
    """Whether any two (base, stride, nbytes) share a byte in any pair of blocks."""
    seen = set()
    for base, stride, nbytes in fragments:
        for block in range(num_blocks):
            span = range(base + block * stride, base + block * stride + nbytes)
            if seen.intersection(span):
                return True
            seen.update(span)
    return False


def slots(block_ids, block_size, num_tokens):
    """Slot of each token, one token at a time."""
    return [block_ids[token // block_size] * block_size + token % block_size for token in range(num_tokens)]
