"""Reading foreign arrays: numpy, DLPack, and both array interfaces, with producers of every vintage."""

from __future__ import annotations

import ctypes
import gc
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from kvortex.errors import LayoutError
from kvortex.layout import KVLayout, TensorSpec, dlpack
from kvortex.layout.tensors import tensor_spec

CPU, CUDA, CUDA_HOST, METAL, ROCM, MANAGED = 1, 2, 3, 8, 10, 13
PyCapsule_New = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


def numbers(spec):
    return spec.pointer, spec.shape, spec.strides, spec.itemsize, spec.device


def expected(array):
    return array.ctypes.data, array.shape, array.strides, array.itemsize, "host"


class Wrapped:
    """numpy's own DLPack, behind an object that is no numpy array."""

    def __init__(self, array):
        self.array = array
        self.calls = []

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **keywords):
        self.calls.append(keywords)
        return self.array.__dlpack__(**keywords)


class WrappedOld(Wrapped):
    """A producer from before versioned capsules."""

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__()


class Fake:
    """A capsule made by hand: any device, dtype, strides, flags."""

    def __init__(self, pointer=0x7000, shape=(4, 8), strides=(8, 1), *, device=(CUDA, 0), dtype=(2, 16, 1), offset=0,
                 flags=None, major=1):
        self.device, self.calls = device, []
        longs = lambda values: (ctypes.c_int64 * len(values))(*values)  # noqa: E731
        self.shape, self.strides = longs(shape), None if strides is None else longs(strides)
        tensor = dlpack._DLTensor(
            pointer, *device, len(shape), *dtype, ctypes.cast(self.shape, ctypes.POINTER(ctypes.c_int64)),
            ctypes.cast(self.strides, ctypes.POINTER(ctypes.c_int64)), offset,
        )
        self.name = b"dltensor" if flags is None else b"dltensor_versioned"
        self.managed = tensor if flags is None else dlpack._Versioned(major, 0, None, None, flags, tensor)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **keywords):
        self.calls.append(keywords)
        return PyCapsule_New(ctypes.addressof(self.managed), self.name, None)


class Interface:
    """An object with a `__cuda_array_interface__`, and a device if it is given one."""

    def __init__(self, *, device=None, **entries):
        self.__cuda_array_interface__ = {"shape": (4, 8), "typestr": "<f2", "data": (0x7000, False), "version": 3} | entries
        if device is not None:
            self.device = device


ARRAYS = [
    np.zeros((4, 6, 8), np.float32),
    np.zeros((4, 6, 8), np.float16).transpose(0, 2, 1),
    np.zeros((4, 6, 8), np.uint8)[1:, ::2, 3:],
    np.zeros((4, 6), np.complex128),
    np.zeros((4, 6), np.int64)[::-1],
    np.zeros((1, 6), np.bool_),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.strides}")
def test_numpy_and_its_dlpack_agree(array):
    for obj in (array, Wrapped(array), WrappedOld(array)):
        spec = tensor_spec(obj)
        assert numbers(spec) == expected(array) and spec.owner is obj


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2], ids=str)
def test_dtypes_that_numpy_cannot_name(dtype):
    array = np.zeros((4, 8), dtype)
    assert numbers(tensor_spec(array)) == expected(array)

    class Producer(Wrapped):  # numpy raises BufferError for these dtypes
        __array_interface__ = property(lambda self: self.array.__array_interface__)

    assert numbers(tensor_spec(Producer(array))) == expected(array)
    with pytest.raises(LayoutError, match=r"BufferError.*view\(uint16\).*TensorSpec"):
        tensor_spec(Wrapped(array))


def test_read_only_arrays_are_refused():
    array = np.zeros((4, 8))
    array.flags.writeable = False
    for obj in (array, Wrapped(array), SimpleNamespace(__array_interface__=array.__array_interface__)):
        with pytest.raises(LayoutError, match="read-?only"):
            tensor_spec(obj)
    with pytest.raises(LayoutError, match="readonly array"):
        tensor_spec(WrappedOld(array))


def test_python_objects_are_refused():
    with pytest.raises(LayoutError, match="Python objects"):
        tensor_spec(np.zeros(3, object))


def test_capsules_are_left_to_their_destructor():
    array = np.zeros((4, 8))
    before = sys.getrefcount(array)
    for obj in (Wrapped(array), WrappedOld(array)):
        for _ in range(50):
            tensor_spec(obj)
        del obj
    gc.collect()
    assert sys.getrefcount(array) == before


@pytest.mark.parametrize(("device", "wanted"), [
    ((CPU, 0), "host"), ((CUDA_HOST, 2), "host"), ((CUDA, 3), "cuda:3"), ((MANAGED, 1), "cuda:1"),
])
@pytest.mark.parametrize("flags", [None, 0])
def test_devices(device, wanted, flags):
    assert tensor_spec(Fake(device=device, flags=flags)).device == wanted


@pytest.mark.parametrize("device", [METAL, ROCM, 99])
def test_other_devices_are_refused(device):
    with pytest.raises(LayoutError, match=f"device type {device}"):
        tensor_spec(Fake(device=(device, 0)))


@pytest.mark.parametrize(("dtype", "itemsize"), [
    ((4, 16, 1), 2), ((10, 8, 1), 1), ((6, 8, 1), 1), ((2, 32, 4), 16), ((17, 4, 2), 1), ((99, 64, 1), 8),
])
def test_any_dtype_code(dtype, itemsize):
    spec = tensor_spec(Fake(dtype=dtype))
    assert (spec.itemsize, spec.strides) == (itemsize, (8 * itemsize, itemsize))


@pytest.mark.parametrize("dtype", [(17, 4, 1), (0, 1, 1), (17, 6, 1), (2, 0, 1)])
def test_elements_of_part_of_a_byte_are_refused(dtype):
    with pytest.raises(LayoutError, match="no whole bytes"):
        tensor_spec(Fake(dtype=dtype))


def test_no_strides_are_c_order_and_offsets_count():
    spec = tensor_spec(Fake(0x7000, (2, 3, 4), None, offset=64, dtype=(2, 32, 1)))
    assert numbers(spec) == (0x7040, (2, 3, 4), (48, 16, 4), 4, "cuda:0")


@pytest.mark.parametrize(("keywords", "message"), [
    ({"flags": 1}, "read-only"), ({"flags": 2}, "copy of itself"), ({"flags": 0, "major": 2}, r"DLPack 2\.0"),
])
def test_versioned_capsules_say_more(keywords, message):
    with pytest.raises(LayoutError, match=message):
        tensor_spec(Fake(**keywords))


def test_consumed_and_foreign_capsules_are_refused():
    for answer in (None, 5, "text"):
        fake = Fake()
        fake.__class__ = type("Odd", (Fake,), {"__dlpack__": lambda self, answer=answer, **keywords: answer})
        with pytest.raises(LayoutError, match="capsule"):
            tensor_spec(fake)
    fake = Fake()
    fake.name = b"used_dltensor"
    with pytest.raises(LayoutError, match="already consumed"):
        tensor_spec(fake)


def test_no_stream_is_made_to_wait():
    cuda, host = Fake(), Fake(device=(CPU, 0))
    tensor_spec(cuda)
    tensor_spec(host)
    assert [call["stream"] for call in cuda.calls] == [-1]
    assert all("stream" not in call for call in host.calls)


def test_exporters_are_asked_for_no_copy():
    """Else a library may hand out a copy, whose bytes nobody would ever see again."""
    for given in (Fake(), Fake(device=(CPU, 0)), Wrapped(np.zeros((4, 8)))):
        tensor_spec(given)
        assert [call["copy"] for call in given.calls] == [False]
        assert given.calls[0]["max_version"][0] >= 1


@pytest.mark.parametrize("allowed", [{"stream", "max_version"}, {"stream"}, set()], ids=str)
def test_older_signatures(allowed):
    class Old(Fake):
        def __dlpack__(self, **keywords):
            if set(keywords) - allowed:
                raise TypeError("unexpected keyword")
            return super().__dlpack__(**keywords)

    old = Old()
    assert tensor_spec(old).pointer == 0x7000
    assert len(old.calls) == 1 and set(old.calls[0]) == allowed


@pytest.mark.parametrize("error", [BufferError, RuntimeError, TypeError, NotImplementedError])
def test_the_cuda_interface_steps_in_for_dlpack(error):
    class Both(Interface):
        def __dlpack_device__(self):
            return (CUDA, 1)

        def __dlpack__(self, **keywords):
            raise error("no such export")

    assert numbers(tensor_spec(Both(device=2))) == (0x7000, (4, 8), (16, 2), 2, "cuda:2")


@pytest.mark.parametrize(("device", "wanted"), [
    (None, "cuda:0"), (3, "cuda:3"), (SimpleNamespace(id=2), "cuda:2"), (SimpleNamespace(index=1), "cuda:1"),
    (SimpleNamespace(index=None), "cuda:0"), ("cuda", "cuda:0"), (True, "cuda:0"),
])
def test_ordinals_of_the_cuda_interface(device, wanted):
    assert tensor_spec(Interface(device=device)).device == wanted


@pytest.mark.parametrize(("typestr", "itemsize"), [
    ("<f2", 2), ("<V2", 2), ("|V1", 1), ("|u1", 1), (">f4", 4), ("<c16", 16), ("<U4", 16), ("|b1", 1),
])
@pytest.mark.parametrize("version", [2, 3])
def test_typestr_gives_only_a_width(typestr, itemsize, version):
    spec = tensor_spec(Interface(typestr=typestr, version=version))
    assert numbers(spec) == (0x7000, (4, 8), (8 * itemsize, itemsize), itemsize, "cuda:0")


def test_strides_of_the_cuda_interface():
    assert tensor_spec(Interface(strides=(32, 2))).strides == (32, 2)
    assert tensor_spec(Interface(strides=None)).strides == (16, 2)


@pytest.mark.parametrize(("entries", "message"), [
    ({"typestr": "|t4"}, "no whole bytes"), ({"typestr": "|O8"}, "no whole bytes"), ({"typestr": "nonsense"}, "no whole bytes"),
    ({"data": (0x7000, True)}, "read-only"), ({"data": b"bytes"}, "no data pointer"), ({"data": None}, "no data pointer"),
    ({"mask": object()}, "masked"), ({"data": (None, False)}, "the pointer"),
])
def test_cuda_interfaces_that_are_refused(entries, message):
    with pytest.raises(LayoutError, match=message):
        tensor_spec(Interface(**entries))


def test_interfaces_that_raise_are_told():
    class Raises:
        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("requires grad")

    with pytest.raises(LayoutError, match=r"Raises.*RuntimeError: requires grad.*detach\(\)"):
        tensor_spec(Raises())
    with pytest.raises(LayoutError, match="KeyError"):
        tensor_spec(SimpleNamespace(__cuda_array_interface__={}))


def test_specs_pass_through():
    spec = TensorSpec(1, (2,), (3,), 4)
    assert tensor_spec(spec) is spec and spec.device == "host"


def test_specs_hold_plain_integers():
    spec = TensorSpec(np.uint64(5), np.array([2, 3]), [np.int8(3), 1], np.int64(1), "cuda:0", owner=[])
    assert numbers(spec) == (5, (2, 3), (3, 1), 1, "cuda:0")
    assert all(type(value) is int for value in (spec.pointer, *spec.shape, *spec.strides, spec.itemsize))
    assert hash(spec) == hash(TensorSpec(5, (2, 3), (3, 1), 1, "cuda:0")) and "owner" not in repr(spec)


def test_a_layout_of_mixed_producers():
    arrays = [np.zeros((4, 8), np.uint16) for _ in range(3)]
    plain = KVLayout.from_arrays(arrays)
    mixed = KVLayout.from_arrays([arrays[0], Wrapped(arrays[1]), tensor_spec(WrappedOld(arrays[2]))])
    assert plain.fragments.tolist() == mixed.fragments.tolist()


def test_one_array_that_can_be_iterated_is_one_tensor():
    class Iterable(Wrapped):
        def __iter__(self):
            raise AssertionError("an array is not a sequence of arrays")

    assert KVLayout.from_arrays(Iterable(np.zeros((4, 8)))).num_layers == 1
