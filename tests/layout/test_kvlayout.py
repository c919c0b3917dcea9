"""KVLayout as an object: raw pointers, immutability, alignment, lifetime, text, imports."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import subprocess
import sys
import weakref

import numpy as np
import pytest

from kvortex.errors import LayoutError
from kvortex.layout import KVLayout, TensorSpec
from kvortex.layout import layout as module

BASE = 0x7F12_3400_0000  # no memory is there: nothing but arithmetic may touch it


def test_raw_pointers_of_a_gpu():
    size = 2 * 1000 * 16 * 8 * 128 * 2
    strides = (size // 2, 32768, 2048, 256, 2)
    layout = KVLayout.from_pointers([(BASE + layer * size, (2, 1000, 16, 8, 128), strides, 2) for layer in range(32)],
                                    block_axis=1, device="cuda:3")
    assert (layout.num_blocks, layout.num_layers, layout.device, layout.record_bytes) == (1000, 32, "cuda:3", 32 * 2 * 32768)
    assert layout.fragments.tolist() == [[BASE + f * size // 2, 32768, f * 32768, 32768] for f in range(64)]
    assert layout.owners == () and layout.alignment == 16


def test_one_tuple_one_spec_and_a_mapping():
    numbers = (BASE, (10, 64), (64, 1), 1)
    alone = KVLayout.from_pointers(numbers)
    assert alone.device == "cuda:0"
    spec = TensorSpec(*numbers, device="cuda:1", owner="me")
    layout = KVLayout.from_pointers(spec, device="cuda:0")
    assert layout.device == "cuda:1" and layout.owners == ("me",)
    assert KVLayout.from_arrays(spec).fragments.tolist() == alone.fragments.tolist()
    assert KVLayout.from_pointers({"a": numbers}).fingerprint == alone.fingerprint
    assert KVLayout.from_pointers([list(numbers)]).fingerprint == alone.fingerprint
    foreign = (np.int64(BASE), [np.int32(10), 64], np.array([64, 1]), np.uint8(1))
    assert KVLayout.from_pointers(foreign).fragments.tolist() == alone.fragments.tolist()


def test_what_goes_on_for_ever_is_refused(monkeypatch):
    monkeypatch.setattr(module, "MAX_FRAGMENTS", 1000)
    array = np.zeros((2, 4, 8), np.float32)
    with pytest.raises(LayoutError, match="arrays holds more than 1000 tensors"):
        KVLayout.from_arrays(itertools.repeat(array), 1)
    with pytest.raises(LayoutError, match="block_axis names 101 or more axes for 1 tensors"):
        KVLayout.from_arrays([array], itertools.repeat(1))


def test_generators_of_arrays():
    arrays = [np.zeros((4, 8)) for _ in range(3)]
    assert KVLayout.from_arrays(array for array in arrays).num_layers == 3


def test_immutable():
    layout = KVLayout.from_arrays(np.zeros((4, 8)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.num_blocks = 3
    for array in (layout.fragments, layout.layer_offsets):
        assert array.dtype == np.int64 and array.flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(
    ("offset", "block_bytes", "wanted"), [(0, 64, 16), (8, 64, 8), (0, 24, 8), (4, 64, 4), (2, 64, 2), (0, 33, 1)]
)
def test_alignment(offset, block_bytes, wanted):
    assert KVLayout.from_pointers((BASE + offset, (10, block_bytes), (block_bytes, 1), 1)).alignment == wanted


def test_alignment_of_record_offsets_and_sizes():
    specs = [(BASE, (10, 8), (64, 1), 1), (BASE + 4096, (10, 64), (64, 1), 1)]
    assert KVLayout.from_pointers(specs).alignment == 8


def test_owners_live_as_long_as_the_layout():
    class Array(np.ndarray):
        pass

    array = np.zeros((4, 8)).view(Array)
    alive = weakref.ref(array)
    layout = KVLayout.from_arrays([array])
    del array
    gc.collect()
    assert alive() is not None
    del layout
    gc.collect()
    assert alive() is None


def test_text():
    layout = KVLayout.from_pointers([(BASE, (10, 64), (64, 1), 1), (BASE + 4096, (10, 32), (64, 1), 1)], order="NHD")
    text = layout.describe()
    for part in ("10 blocks", "96 bytes", "cuda:0", "2 layers", "2 fragments", "32 to 64 bytes", "NHD"):
        assert part in text
    assert layout.fingerprint.hex()[:12] in text
    assert repr(layout) == f"KVLayout({text})"


def test_axes_for_each_tensor_must_be_as_many():
    with pytest.raises(LayoutError, match="block_axis names 2 axes for 1 tensors"):
        KVLayout.from_arrays([np.zeros((4, 8))], block_axis=[0, 0])
    with pytest.raises(LayoutError, match="layer_axis names 1 axes for 2 tensors"):
        KVLayout.from_arrays([np.zeros((4, 8)), np.zeros((4, 8))], layer_axis=[None])


def test_importing_it_imports_no_framework():
    code = "import sys, kvortex.layout; print([m for m in ('torch', 'cupy', 'jax', 'numba', 'cuda') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
