"""Every tensor that is no blocks of bytes is refused, and the message shows what was seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvortex.errors import LayoutError
from kvortex.layout import KVLayout, TensorSpec

P = 0x7F00_0000_0000


def refused(specs, *parts, **keywords):
    with pytest.raises(LayoutError) as caught:
        KVLayout.from_pointers(specs, **keywords)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("numbers", "keywords", "parts"), [
    ((P, (4, 0), (8, 1), 1), {}, ["empty"]),
    ((P, (0, 8), (8, 1), 1), {}, ["empty"]),
    ((P, (4, -8), (8, 1), 1), {}, ["empty"]),
    ((P, (4, 8), (-8, 1), 1), {}, ["axis 0", "negative stride -8"]),
    ((P, (4, 8), (8, -1), 1), {}, ["axis 1", "negative stride -1"]),
    ((P, (4, 8), (0, 1), 1), {}, ["axis 0", "broadcast"]),
    ((P, (4, 2, 8), (8, 0, 1), 1), {}, ["axis 1", "broadcast"]),
    ((P, (4, 8), (16, 2), 1), {}, ["no two elements"]),
    ((P, (4, 8), (1, 4), 1), {}, ["no two elements"]),
    ((P, (4, 8, 3), (24, 3, 1), 1), {"layer_axis": 2}, ["no two elements", "layer_axis"]),
    ((P, (4, 8), (7, 1), 1), {}, ["overlap", "axis 0 is 7 bytes", "span 8 bytes"]),
    ((P, (2, 4, 8), (24, 8, 1), 1), {"block_axis": 1}, ["overlap", "axis 0 is 24 bytes", "span 32 bytes"]),
    ((P, (4, 8), (8, 1), 2), {}, ["stride 1 of axis 1", "itemsize 2", "wrong dtype size"]),
    ((P, (4, 8), (17, 2), 2), {}, ["stride 17 of axis 0", "itemsize 2"]),
    ((P, (4, 8), (24, 3), 3), {}, ["3 bytes has the wrong dtype size"]),
    ((P, (4, 8), (8, 1), 0), {}, ["0 bytes has the wrong dtype size"]),
    ((0, (4, 8), (8, 1), 1), {}, ["pointer 0 is no address"]),
    ((-P, (4, 8), (8, 1), 1), {}, ["is no address"]),
    ((1 << 63, (4, 8), (8, 1), 1), {}, ["past the last address"]),
    ((P, (4, 8), (1 << 62, 1), 1), {}, ["past the last address"]),
    ((P, (4, 8), (8, 1), 1), {"block_axis": 2}, ["block_axis=2 is out of range", "2 axes"]),
    ((P, (4, 8), (8, 1), 1), {"block_axis": -3}, ["block_axis=-3 is out of range"]),
    ((P, (4, 8), (8, 1), 1), {"block_axis": True}, ["block_axis=True is no integer"]),
    ((P, (4, 8), (8, 1), 1), {"block_axis": None}, ["block_axis=None is no integer"]),
    ((P, (4, 8), (8, 1), 1), {"layer_axis": 0.0}, ["layer_axis=0.0 is no integer"]),
    ((P, (4, 8), (8, 1), 1), {"layer_axis": 5}, ["layer_axis=5 is out of range"]),
    ((P, (4, 8), (8, 1), 1), {"layer_axis": 0}, ["both axis 0"]),
    ((P, (4, 8), (8, 1), 1), {"layer_axis": -2}, ["both axis 0"]),
    ((P, (), (), 1), {}, ["out of range", "0 axes"]),
    ((P, (4, (1 << 20) + 1, 2), (1 << 23, 4, 1), 1), {}, [f"{(1 << 20) + 1} fragments of 2 bytes"]),
])
def test_one_tensor(numbers, keywords, parts):
    pointer, shape, strides, itemsize = numbers
    seen = [hex(pointer), f"shape {shape}", f"strides {strides} bytes", f"itemsize {itemsize}", "tensor 'kv'"]
    refused({"kv": numbers}, *parts, *seen, **keywords)


@pytest.mark.parametrize("numbers", [
    (True, (4, 8), (8, 1), 1), (1.5, (4, 8), (8, 1), 1), ("0x10", (4, 8), (8, 1), 1), (None, (4, 8), (8, 1), 1),
    (P, (4, True), (8, 1), 1), (P, (4, 8.0), (8, 1), 1), (P, 32, (8, 1), 1), (P, "48", (8, 1), 1),
    (P, (4, 8), (8, np.True_), 1), (P, (4, 8), None, 1), (P, (4, 8), (8, 1, 1), 1),
    (P, (4, 8), (8, 1), True), (P, (4, 8), (8, 1), None),
], ids=repr)
def test_numbers_that_are_none(numbers):
    refused([numbers], "tensor 0", repr(numbers[1]), repr(numbers[2]), "strides")


@pytest.mark.parametrize("device", ["cuda", "gpu:0", "cuda:-1", "cuda:x", "", None, 0])
def test_unknown_devices(device):
    refused([(P, (4, 8), (8, 1), 1)], "unknown device", device=device)


@pytest.mark.parametrize("specs", [5, None, "text", [5], [(P, (4, 8))], [None]], ids=repr)
def test_specs_that_are_none(specs):
    refused(specs, "no TensorSpec")


@pytest.mark.parametrize("empty", [[], {}, ()], ids=repr)
def test_no_tensors(empty):
    refused(empty, "at least one tensor")
    with pytest.raises(LayoutError, match="at least one tensor"):
        KVLayout.from_arrays(empty)


@pytest.mark.parametrize("order", [3, None, b"NHD", "\udc80", "N" * 10**6 + "\udc80", ["N"]], ids=lambda order: repr(order)[:9])
def test_order_that_is_no_text(order):
    refused((P, (4, 8), (8, 1), 1), "order=", "is no text", order=order)


class Evil:
    """Raises what nobody expects, whatever it is asked."""

    def _fail(self, *_):
        raise KeyError("planted")

    __iter__ = __index__ = __len__ = __repr__ = __getitem__ = __array__ = _fail


class EvilMapping(dict):
    def items(self):
        raise KeyError("planted")


@pytest.mark.parametrize("axis", [
    int, np.array(True), np.array(1.5), np.array("0"), np.True_, np.int64, [Evil()], Evil(), "0", b"0", np.array([True]),
    [None], 10**5000, -(10**5000), "x" * 10**6, [int], np.ma.array(True), object(),
], ids=lambda axis: type(axis).__name__)
@pytest.mark.parametrize("name", ["block_axis", "layer_axis"])
def test_axes_that_are_none(axis, name):
    if name == "layer_axis" and axis == [None]:
        return  # no layer axis, for each tensor
    other = {"layer_axis": {"block_axis": 1}, "block_axis": {}}[name]
    refused([(P, (4, 8), (8, 1), 1)], f"{name}=", **{name: axis}, **other)


@pytest.mark.parametrize("axis", [1, np.int8(1), np.array(1), np.array([1]), [np.array(1)], range(1, 2), -2])
def test_axes_that_are_integers_of_any_kind(axis):
    layout = KVLayout.from_pointers([(P, (2, 4, 8), (32, 8, 1), 1)], block_axis=axis)
    assert layout.num_blocks == 4 and layout.fragments.tolist() == [[P, 8, 0, 8], [P + 32, 8, 8, 8]]


@pytest.mark.parametrize("specs", [
    np.array(5), np.array(P), Evil(), [Evil()], EvilMapping(a=1), (Evil(), (4,), (1,), 1), int, "x" * 10**6, ["x" * 10**6],
    (np.array([P]), (4, 8), (8, 1), 1), (P, np.array(4), (8, 1), 1), (P, (4, 8), np.array(8), 1),
    (P, (4, 8), (8, 1), np.array([1, 1])),
    (P, Evil(), (8, 1), 1), (P, (4, Evil()), (8, 1), 1), (P, (4, 8), (8, 1), int), (P, [1] * 10**6, [1] * 10**6, 1),
    (10**5000, (4, 8), (8, 1), 1), (P, (4, 10**5000), (8, 1), 1), (P, (4, 8), (10**5000, 1), 1), (P, (4, 8), (8, 1), 10**5000),
    (P, (1,) * 65, (1,) * 65, 1), (P, itertools.count(1), (8, 1), 1), {"x" * 10**6: 5},
], ids=lambda specs: type(specs).__name__)
def test_pointers_that_are_none(specs):
    refused(specs)


@pytest.mark.parametrize("device", ["cuda:00", "cuda:01", "cuda:²", "cuda:" + "9" * 5000, "x" * 10**6, "cuda:0\n", ["host"]],
                         ids=lambda device: repr(device)[:9])
def test_devices_by_other_spellings(device):
    """The same GPU by two names would be two devices."""
    refused([(P, (4, 8), (8, 1), 1)], "unknown device", device=device)


@pytest.mark.parametrize("array", [
    np.ma.zeros((4, 8)), np.ma.array(np.zeros((4, 8)), mask=np.ones((4, 8))), [np.ma.zeros((4, 8))], {"a": np.ma.zeros((4, 8))},
], ids=lambda array: type(array).__name__)
def test_masked_arrays(array):
    with pytest.raises(LayoutError, match=r"is masked; pass the plain array under the mask"):
        KVLayout.from_arrays(array)


def test_no_message_fills_a_log():
    many = np.dtype([(f"field{i}", "O") for i in range(10**4)])
    long, wordy = type("T" * 10**6, (), {})(), type("T", (), {"__array_interface__": {"typestr": "x" * 10**6}})()
    for given in (np.zeros(3, many), long, wordy, {"x" * 10**6: np.zeros(0)}):
        with pytest.raises(LayoutError) as caught:
            KVLayout.from_arrays(given)
        assert len(str(caught.value)) < 1000
    assert len(repr(KVLayout.from_arrays(np.zeros((4, 8)), order="N" * 10**6))) < 400


def test_different_numbers_of_blocks():
    refused([(P, (4, 8), (8, 1), 1), (2 * P, (5, 8), (8, 1), 1)], "5 blocks", "tensor 0 has 4", "(4, 8)", "(5, 8)", "(8, 1)")


def test_more_blocks_than_kernels_can_count():
    most = 1 << 31
    assert KVLayout.from_pointers((P, (most, 8), (8, 1), 1)).num_blocks == most
    refused((P, (most + 1, 8), (8, 1), 1), f"{most + 1} blocks, more than {most}", "Check block_axis")


def test_several_devices():
    specs = [TensorSpec(P, (4, 8), (8, 1), 1, "cuda:0"), TensorSpec(2 * P, (4, 8), (8, 1), 1, "cuda:1")]
    refused(specs, "cuda:0", "cuda:1", "one layout for each device")


def test_too_many_fragments_over_all_tensors():
    specs = [(P + i * (1 << 36), (4, 1 << 19, 2), (1 << 21, 4, 1), 1) for i in range(3)]
    refused(specs, f"{3 << 19} fragments over 3 tensors", "(2097152, 4, 1)")


@pytest.mark.parametrize("block_count", [1, 4])
def test_the_same_tensor_twice(block_count):
    refused([(P, (block_count, 8), (8, 1), 1)] * 2, "tensor 1", "shares bytes with tensor 0", "(8, 1) bytes")
    array = np.zeros((block_count, 8))
    with pytest.raises(LayoutError, match="shares bytes with tensor 'a'"):
        KVLayout.from_arrays({"a": array, "b": array})


@pytest.mark.parametrize(("second", "what"), [
    ((P + 7, (4, 8), (32, 1), 1), "one byte of each block"),
    ((P + 25, (4, 8), (32, 1), 1), "the next block's first byte"),
    ((P + 96 + 7, (4, 8), (32, 1), 1), "the last block's last byte"),
    ((P + 8, (4, 8), (64, 1), 1), "another stride, the ranges meet"),
    ((P + 32, (4, 8), (32, 1), 1), "shifted by one block"),
])
def test_overlap_across_tensors(second, what):
    refused([(P, (4, 8), (32, 1), 1), second], "shares bytes")
    refused([second, (P, (4, 8), (32, 1), 1)], "shares bytes")


@pytest.mark.parametrize("second", [
    (P + 8, (4, 8), (32, 1), 1), (P + 24, (4, 8), (32, 1), 1), (P + 104, (4, 8), (64, 1), 1), (P + 128, (4, 8), (32, 1), 1),
])
def test_neighbours_are_no_overlap(second):
    for specs in ([(P, (4, 8), (32, 1), 1), second], [second, (P, (4, 8), (32, 1), 1)]):
        assert KVLayout.from_pointers(specs).record_bytes == 16


def test_a_refusal_of_an_array_names_the_tensor():
    array = np.zeros((4, 8))
    array.flags.writeable = False
    with pytest.raises(LayoutError, match=r"tensor 'layers\.1': numpy\.ndarray is read-only"):
        KVLayout.from_arrays({"layers.0": np.zeros((4, 8)), "layers.1": array})
    with pytest.raises(LayoutError, match="tensor 0: cannot read the memory of builtins.int"):
        KVLayout.from_arrays([5])
    with pytest.raises(LayoutError, match="cannot read the memory of builtins.object"):
        KVLayout.from_arrays(object())


def test_broadcast_and_flipped_arrays():
    with pytest.raises(LayoutError, match=r"broadcast.*strides \(0, 8\) bytes"):
        spec = np.lib.stride_tricks.as_strided(np.zeros(8), (4, 8), (0, 8))
        KVLayout.from_arrays(spec)
    with pytest.raises(LayoutError, match=r"negative stride -64.*strides \(-64, 8\) bytes"):
        KVLayout.from_arrays(np.zeros((4, 8))[::-1])
