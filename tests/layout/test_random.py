"""Random layouts and random sets of fragments, against loops over every byte."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.errors import LayoutError
from kvortex.layout import KVLayout
from kvortex.layout.overlap import find_overlap
from tests import naive_layout


@st.composite
def logical_array(draw, num_blocks=None):
    """Shape, block axis, layer axis and dtype."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    block_axis = draw(st.integers(0, len(shape) - 1))
    if num_blocks is not None:
        shape[block_axis] = num_blocks
    layer_axis = draw(st.sampled_from([None, *(axis for axis in range(len(shape)) if axis != block_axis)]))
    return shape, block_axis, layer_axis, draw(st.sampled_from([np.uint8, np.uint16, np.float32]))


@st.composite
def strided_array(draw, num_blocks=None, logical=None):
    """An array with axes in any order in memory and padding anywhere but inside the element; its block and layer axis."""
    shape, block_axis, layer_axis, dtype = logical or draw(logical_array(num_blocks))
    order = draw(st.permutations(range(len(shape))))
    room = [shape[axis] + draw(st.sampled_from([0, 0, 0, 1, 2])) for axis in order]
    whole = np.arange(np.prod(room)).astype(dtype).reshape(room)
    part = whole[tuple(slice(draw(st.integers(0, r - shape[a])), None) for r, a in zip(room, order, strict=True))]
    part = part[tuple(slice(shape[axis]) for axis in order)]
    return part.transpose(np.argsort(order)), block_axis, layer_axis


@st.composite
def strided_arrays(draw):
    num_blocks = draw(st.integers(1, 4))
    return draw(st.lists(strided_array(num_blocks), min_size=1, max_size=3))


@settings(max_examples=300, deadline=None)
@given(strided_arrays())
def test_fragments_cover_every_byte_once_in_record_order(drawn):
    arrays, block_axes, layer_axes = (list(part) for part in zip(*drawn, strict=True))
    try:
        layout = KVLayout.from_arrays(arrays, block_axes, layer_axes)
    except LayoutError as error:
        assert "no two elements" in str(error)
        return
    everything = []
    for block in range(layout.num_blocks):
        found = naive_layout.layout_addresses(layout, block)
        wanted = []
        for array, block_axis, layer_axis in zip(arrays, block_axes, layer_axes, strict=True):
            wanted += naive_layout.record_addresses(array, block, block_axis, layer_axis)
        assert found == wanted
        everything += found
    elements = set()
    for array, block_axis in zip(arrays, block_axes, strict=True):
        for block in range(layout.num_blocks):
            elements |= naive_layout.block_bytes(array, block, block_axis)
    assert len(everything) == len(set(everything)) and set(everything) == elements
    check_numbers(layout)


def check_numbers(layout):
    """What holds of every layout."""
    base, stride, offset, nbytes = layout.fragments.T
    assert np.all(offset == np.cumsum(nbytes) - nbytes) and offset[-1] + nbytes[-1] == layout.record_bytes
    assert np.all(layout.fragments % layout.alignment == 0)
    assert layout.alignment == 16 or np.any(layout.fragments % (2 * layout.alignment))
    if layout.num_blocks > 1:
        assert np.all(stride >= nbytes)
        assert not np.any((base[:-1] + nbytes[:-1] == base[1:]) & (stride[:-1] == stride[1:]))  # nothing left to merge


@settings(max_examples=300, deadline=None)
@given(logical_array(), st.data())
def test_fingerprints_are_equal_exactly_where_records_mean_the_same(logical, data):
    """Of two arrays of one logical shape: a block copied by its record is the same elements, or the fingerprints differ."""
    one, other = data.draw(strided_array(logical=logical)), data.draw(strided_array(logical=logical))

    def build(drawn):
        array, block_axis, layer_axis = drawn
        return KVLayout.from_arrays(array, block_axis, layer_axis)

    def elements(drawn, block):
        array, block_axis, layer_axis = drawn
        kept = np.take(array, block, axis=block_axis)
        if layer_axis is None:
            return kept[None]
        return np.moveaxis(kept, layer_axis - (layer_axis > block_axis), 0)

    try:
        first, second = build(one), build(other)
    except LayoutError:
        return
    one[0][...] = np.arange(one[0].size).reshape(one[0].shape)  # at most 1024 elements, told apart within uint16
    other[0][...] = 0
    naive_layout.scatter(second, 0, naive_layout.gather(first, first.num_blocks - 1))
    same = elements(one, first.num_blocks - 1).tobytes() == elements(other, 0).tobytes()
    if logical[3] != np.uint8:
        assert same == (first.fingerprint == second.fingerprint)
    elif first.fingerprint == second.fingerprint:
        assert same


@settings(max_examples=600, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(100, 160), st.sampled_from([12, 12, 12, 20]), st.integers(1, 6)), min_size=1, max_size=6),
)
def test_overlap_is_exact(num_blocks, fragments):
    if num_blocks == 1:
        fragments = [(base, 0, nbytes) for base, _, nbytes in fragments]
    base, stride, nbytes = (np.array(part, np.int64) for part in zip(*fragments, strict=True))
    pair = find_overlap(base, stride, nbytes, num_blocks)
    truth = naive_layout.overlap(fragments, num_blocks)
    if pair is None:
        assert not truth
    elif stride[pair[0]] == stride[pair[1]]:
        assert pair[0] != pair[1] and naive_layout.overlap([fragments[i] for i in pair], num_blocks)
    else:  # ranges that meet with different strides are refused, overlap or not
        low, high = sorted(pair, key=lambda i: base[i])
        assert base[high] < base[low] + (num_blocks - 1) * stride[low] + nbytes[low]


def test_a_million_fragments_are_checked_and_merged_in_a_moment():
    count = 1 << 20
    layout = KVLayout.from_pointers((1 << 40, (1000, count, 16), (16, 16 * 1000 * 2, 1), 1))
    assert layout.fragments.shape == (count, 4) and layout.record_bytes == count * 16
    interleaved = [((1 << 40) + layer * 64, (1000, 1 << 13, 32), (64 * 64 << 13, 64 * 64, 1), 1) for layer in range(64)]
    layout = KVLayout.from_pointers(interleaved)
    assert layout.fragments.shape == (64 << 13, 4)
