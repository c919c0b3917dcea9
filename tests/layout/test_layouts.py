"""Every KV layout in use, each byte checked against plain numpy indexing and against loops over elements."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kvortex.layout import KVLayout
from kvortex.layout.fragments import merge
from tests import naive_layout

B, L, N, H, D = 5, 3, 4, 2, 6  # no two alike, and no product that equals another axis: mixed-up axes show


def filled(shape, dtype=np.uint16):
    """An array whose elements all differ."""
    return np.arange(np.prod(shape), dtype=np.int64).astype(dtype).reshape(shape)


def physical(shape, order, dtype=np.uint16):
    """A logical array of `shape` whose axes lie in memory in `order`, slowest first."""
    return filled([shape[axis] for axis in order], dtype).transpose(np.argsort(order))


def packed(array):
    return np.ascontiguousarray(array).tobytes()


def check(layout, arrays, block_axes, layer_axes=None, expected=None):
    """Every byte of every block: the right set, in the right order, read and written."""
    layer_axes = layer_axes or [None] * len(arrays)
    assert layout.num_blocks == arrays[0].shape[block_axes[0]]
    for block in range(layout.num_blocks):
        found = naive_layout.layout_addresses(layout, block)
        wanted = set().union(*(naive_layout.block_bytes(a, block, axis) for a, axis in zip(arrays, block_axes, strict=True)))
        assert set(found) == wanted and len(found) == len(wanted)
        in_order = []
        for array, axis, layer in zip(arrays, block_axes, layer_axes, strict=True):
            in_order += naive_layout.record_addresses(array, block, axis, layer)
        assert found == in_order
        if expected is not None:
            assert naive_layout.gather(layout, block) == expected(block)
    last = layout.fragments[-1]
    assert layout.layer_offsets[0] == 0 and layout.layer_offsets[-1] == layout.record_bytes == last[2] + last[3]
    assert np.all(np.diff(layout.layer_offsets) > 0) and len(layout.layer_offsets) == layout.num_layers + 1


def test_one_tensor_a_layer_key_and_value_first():
    arrays = [filled((2, B, N, H, D)) + 1000 * layer for layer in range(L)]
    layout = KVLayout.from_arrays(arrays, block_axis=1, order="NHD")
    check(layout, arrays, [1] * L, expected=lambda b: b"".join(packed(a[:, b]) for a in arrays))
    assert layout.fragments.shape == (2 * L, 4) and layout.num_layers == L
    assert layout.layer_offsets.tolist() == [layer * 2 * N * H * D * 2 for layer in range(L + 1)]


def test_one_tensor_a_layer_blocks_first():
    arrays = {f"model.layers.{layer}": filled((B, 2, N, H, D)) for layer in range(L)}
    layout = KVLayout.from_arrays(arrays)
    check(layout, list(arrays.values()), [0] * L, expected=lambda b: b"".join(packed(a[b]) for a in arrays.values()))
    assert layout.fragments.shape == (L, 4)
    assert all(owner is array for owner, array in zip(layout.owners, arrays.values(), strict=True))


@pytest.mark.parametrize("shape", [(B, H, N, 2 * D), (B, N, 576), (B, N, 656)], ids=["BHN2D", "mla", "fp8_ds_mla"])
def test_blocks_that_are_one_fragment(shape):
    array = filled(shape, np.uint8 if shape[-1] == 656 else np.uint16)
    layout = KVLayout.from_arrays(array)
    check(layout, [array], [0], expected=lambda b: packed(array[b]))
    assert layout.fragments.shape == (1, 4)


def test_cross_layer_tensor_is_one_merged_fragment():
    array = filled((B, L, 2, N, H, D))
    layout = KVLayout.from_arrays(array, layer_axis=1)
    check(layout, [array], [0], [1], expected=lambda b: packed(array[b]))
    assert layout.fragments.tolist() == [[array.ctypes.data, array.strides[0], 0, array[0].nbytes]]
    assert layout.num_layers == L and layout.layer_offsets.tolist() == [i * array[0, 0].nbytes for i in range(L + 1)]


def test_cross_layer_tensor_with_heads_outside_layers():
    array = physical((B, L, 2, N, H, D), (0, 4, 1, 2, 3, 5))  # memory: B, H, L, 2, N, D
    layout = KVLayout.from_arrays(array, block_axis=0, layer_axis=1)
    expected = lambda b: packed(array[b].transpose(0, 3, 1, 2, 4))  # noqa: E731 - layer, head, 2, N, D
    check(layout, [array], [0], [1], expected=expected)
    assert len(layout.fragments) == L * H


def test_layer_axis_is_first_even_where_memory_puts_it_inside():
    array = physical((B, L, 2, N, H, D), (0, 2, 4, 1, 3, 5))  # memory: B, 2, H, L, N, D
    layout = KVLayout.from_arrays(array, layer_axis=1)
    check(layout, [array], [0], [1], expected=lambda b: packed(array[b].transpose(0, 1, 3, 2, 4)))
    assert len(layout.fragments) == L * 2 * H


def test_key_and_value_outside_layers_outside_blocks():
    array = filled((2, L, B, N, H, D))
    layout = KVLayout.from_arrays(array, block_axis=2, layer_axis=1)
    check(layout, [array], [2], [1], expected=lambda b: packed(array[:, :, b].transpose(1, 0, 2, 3, 4)))
    assert len(layout.fragments) == 2 * L and layout.num_layers == L
    assert KVLayout.from_arrays(array, block_axis=-4, layer_axis=-5).fragments.tolist() == layout.fragments.tolist()


def test_heads_before_tokens_is_its_own_record():
    array = physical((2, B, N, H, D), (0, 1, 3, 2, 4))
    layout = KVLayout.from_arrays([array], block_axis=1)
    check(layout, [array], [1], expected=lambda b: packed(array[:, b].transpose(0, 2, 1, 3)))
    assert len(layout.fragments) == 2


@pytest.mark.parametrize("pad", ["tokens", "heads", "elements"])
def test_padded_strides(pad):
    room = {"tokens": (2, B, N + 1, H, D), "heads": (2, B, N, H + 1, D), "elements": (2, B, N, H, D + 2)}[pad]
    array = filled(room)[:, :, :N, :H, :D]
    layout = KVLayout.from_arrays([array], block_axis=1)
    check(layout, [array], [1], expected=lambda b: packed(array[:, b]))
    assert len(layout.fragments) == {"tokens": 2, "heads": 2 * N, "elements": 2 * N * H}[pad]


def test_tensors_of_different_page_sizes():
    arrays = [filled((2, B, N, H, D)), filled((B, 40), np.uint8), filled((B, 2, N, D), np.float32)]
    layout = KVLayout.from_arrays(arrays, block_axis=[1, 0, 0])
    check(layout, arrays, [1, 0, 0], expected=lambda b: packed(arrays[0][:, b]) + packed(arrays[1][b]) + packed(arrays[2][b]))
    assert np.diff(layout.layer_offsets).tolist() == [2 * N * H * D * 2, 40, 2 * N * D * 4]


def test_layer_axis_of_some_tensors():
    arrays = [filled((L, B, N, D)), filled((B, N, D))]
    layout = KVLayout.from_arrays(arrays, block_axis=(1, 0), layer_axis=(0, None))
    check(layout, arrays, [1, 0], [0, None], expected=lambda b: packed(arrays[0][:, b]) + packed(arrays[1][b]))
    assert layout.num_layers == L + 1


def test_several_tensors_with_layer_axes_are_one_after_the_other():
    keys, values = filled((L, B, N, H, D)), filled((L, B, N, H, D)) + 500
    layout = KVLayout.from_arrays([keys, values], block_axis=1, layer_axis=0)
    check(layout, [keys, values], [1, 1], [0, 0], expected=lambda b: packed(keys[:, b]) + packed(values[:, b]))
    assert layout.num_layers == 2 * L


@pytest.mark.parametrize("memory", ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"])
def test_views_into_one_allocation(memory):
    sizes = {"B": B, "L": L, "H": H, "N": N, "C": 2 * D}
    whole = filled([sizes[axis] for axis in memory])
    by_layer = whole.transpose([memory.index(axis) for axis in "LBHNC"])
    arrays = [by_layer[layer] for layer in range(L)]  # logical [B, H, N, C]
    layout = KVLayout.from_arrays(arrays, order=memory)
    check(layout, arrays, [0] * L)
    expected = {"LBHNC": L, "LBNHC": L, "LHBNC": L * H, "BLHNC": 1, "BLNHC": 1, "BHLNC": L * H}
    assert len(layout.fragments) == expected[memory]
    assert layout.num_layers == L


def test_views_of_keys_and_values_merge_into_one_fragment():
    array = filled((B, 2, N, H, D))
    layout = KVLayout.from_arrays([array[:, 0], array[:, 1]])
    check(layout, [array[:, 0], array[:, 1]], [0, 0], expected=lambda b: packed(array[b]))
    assert len(layout.fragments) == 1 and layout.num_layers == 2
    swapped = KVLayout.from_arrays([array[:, 1], array[:, 0]])
    check(swapped, [array[:, 1], array[:, 0]], [0, 0])
    assert len(swapped.fragments) == 2


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.bool_, np.float16, np.float32, np.float64, np.complex128, "V16",
                                   ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2], ids=str)
def test_dtypes_are_only_widths(dtype):
    array = np.zeros((2, B, N, H, D), dtype)
    array.view(np.uint8)[...] = np.random.default_rng(1).integers(0, 2, array.view(np.uint8).shape)
    layout = KVLayout.from_arrays(array, block_axis=1)
    check(layout, [array], [1], expected=lambda b: packed(array[:, b]))


def test_a_record_written_is_the_record_read():
    source = filled((2, B, N, H, D))
    target = np.zeros((B, 2, N + 3, H, D), np.uint16)[:, :, :N]
    save, load = KVLayout.from_arrays(source, block_axis=1), KVLayout.from_arrays(target)
    assert save.fingerprint == load.fingerprint
    for block in range(B):
        naive_layout.scatter(load, B - 1 - block, naive_layout.gather(save, block))
    np.testing.assert_array_equal(target[::-1].swapaxes(0, 1), source)


def test_one_block():
    array = filled((2, 1, N, H, D))
    layout = KVLayout.from_arrays(array, block_axis=1)
    check(layout, [array], [1], expected=lambda b: packed(array[:, b]))
    assert layout.fragments[:, 1].tolist() == [0]  # the two halves lie side by side


def test_one_block_does_not_merge_neighbouring_tensors():
    array = filled((2, 1, N))
    assert len(KVLayout.from_arrays([array[0], array[1]]).fragments) == 2


def test_a_block_of_one_element():
    array = filled((B,), np.float32)
    check(KVLayout.from_arrays(array), [array], [0], expected=lambda b: packed(array[b]))


def test_axes_may_begin_in_the_padding_of_the_axis_below():
    array = np.lib.stride_tricks.as_strided(filled((64,), np.uint8), (4, 2, 6), (14, 8, 1))
    layout = KVLayout.from_arrays(array)
    check(layout, [array], [0], expected=lambda b: packed(array[b]))
    assert len(layout.fragments) == 2


def test_only_fragments_that_step_alike_are_joined():
    starts, nbytes = merge(*(np.array(column) for column in ([0, 8, 16, 32], [64, 64, 32, 32], [8, 8, 8, 8])))
    assert starts.tolist() == [0, 2, 3] and nbytes.tolist() == [16, 8, 8]


def test_block_axis_with_the_largest_stride_is_not_needed():
    array = physical((B, H, N, D), (1, 0, 2, 3))
    layout = KVLayout.from_arrays(array)
    check(layout, [array], [0], expected=lambda b: packed(array[b]))
    assert len(layout.fragments) == H
