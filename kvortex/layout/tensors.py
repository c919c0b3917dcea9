"""Where an array's bytes are: one plain description that every array library can be read into.

Nothing here interprets a dtype: of an element only its width in bytes is kept, because the same bf16 array is called
``<f2``, ``<V2`` or nothing at all by different versions of the same library.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvortex.arguments import is_masked
from kvortex.errors import LayoutError, cut, shown, told
from kvortex.layout.dlpack import c_strides, read_dlpack, refuse_read_only, type_name

_DEVICE = re.compile(r"host|cuda:(0|[1-9][0-9]{0,5})")
_TYPESTR = re.compile(r"[<>|=]?([a-zA-Z])([0-9]{1,9})")
_BYTES_PER_UNIT = {"U": 4}  # numpy counts UCS-4 characters in this one kind; every other kind counts bytes
_MAX_AXES = 64  # of NumPy
_NOT_BYTES = {"t", "O"}  # bit fields and object pointers


@dataclass(frozen=True)
class TensorSpec:
    """One strided array as addresses: no dtype, no copy, no library.

    Attributes
    ----------
    pointer
        Address of the element at index (0, ..., 0).
    shape
        Elements along each axis.
    strides
        Bytes (not elements) from one index to the next along each axis.
    itemsize
        Bytes of one element.
    device
        ``"host"`` or ``"cuda:N"``.
    owner
        The object that keeps the memory alive, held for as long as the spec is. ``None`` for raw pointers, whose
        memory the caller keeps alive.

    Raises
    ------
    LayoutError
        A value is no integer of 64 bits (bools count as none), there are more than 64 axes, shape and strides differ
        in length, or the device is unknown.
        Whether the numbers make sense as KV blocks is judged later, by :class:`kvortex.layout.KVLayout`.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    device: str = "host"
    owner: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        seen = (
            f"pointer {shown(self.pointer)}, shape {shown(self.shape)}, strides {shown(self.strides)} bytes, "
            f"itemsize {shown(self.itemsize)}"
        )
        object.__setattr__(self, "pointer", _integer(self.pointer, "the pointer", seen))
        object.__setattr__(self, "itemsize", _integer(self.itemsize, "the itemsize", seen))
        object.__setattr__(self, "shape", _integers(self.shape, "the shape", seen))
        object.__setattr__(self, "strides", _integers(self.strides, "the strides", seen))
        if len(self.shape) != len(self.strides):
            raise LayoutError(f"shape and strides differ in length ({seen}); give one stride in bytes for each axis")
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise LayoutError(f"unknown device {shown(self.device)} ({seen}); use 'host' or 'cuda:N', such as 'cuda:0'")


def tensor_spec(obj: Any) -> TensorSpec:
    """Read a foreign array into a :class:`TensorSpec`, without copying, importing its library or waiting for a stream.

    Tried in this order: numpy arrays, DLPack, ``__cuda_array_interface__``, ``__array_interface__``.

    Parameters
    ----------
    obj
        An array of any library, or a TensorSpec, which is returned as it is.

    Returns
    -------
    TensorSpec
        ``owner`` is `obj` itself. ``__cuda_array_interface__`` names no device: it is taken from ``obj.device`` where
        that holds an ordinal, and is ``cuda:0`` otherwise.

    Raises
    ------
    LayoutError
        The array is read-only, would be copied, has elements of less than a byte, lives on a device that is neither
        host nor CUDA, or speaks none of the protocols; the message says which protocol said what.
    """
    if isinstance(obj, TensorSpec):
        return obj
    if isinstance(obj, np.ndarray):
        return _from_numpy(obj)
    reasons: list[str] = []
    for name, read in _PROTOCOLS:
        try:
            if hasattr(obj, name):
                return read(obj)
        except LayoutError:
            raise  # the producer answered, and its answer will not do: another protocol would only hide that
        except Exception as error:  # producers raise whatever they like; the next protocol may work
            reasons.append(f"{name} raised {told(error)}")
    raise LayoutError(
        f"cannot read the memory of {type_name(obj)}: {'; '.join(reasons) or 'it speaks no array protocol'}. Pass a "
        "view of a plain integer type of the same width (`.view(uint16)`, `.view(uint8)`), detach it from autograd "
        "(`.detach()`), or give the raw numbers: TensorSpec(pointer, shape, strides_in_bytes, itemsize, device)"
    )


def _from_numpy(array: np.ndarray[Any, Any]) -> TensorSpec:
    if is_masked(array):
        raise LayoutError(f"{type_name(array)} is masked; pass the plain array under the mask, its `.data`")
    if array.dtype.hasobject:
        raise LayoutError(f"a numpy array of dtype {cut(str(array.dtype))} holds Python objects, not bytes")
    if not array.flags.writeable:
        refuse_read_only(array)
    return TensorSpec(array.ctypes.data, array.shape, array.strides, array.dtype.itemsize, "host", array)


def _from_dlpack(obj: Any) -> TensorSpec:
    found = read_dlpack(obj)
    return TensorSpec(found.pointer, found.shape, found.strides, found.itemsize, found.device, obj)


def _from_cuda_interface(obj: Any) -> TensorSpec:
    return _from_interface(obj, obj.__cuda_array_interface__, f"cuda:{_ordinal(obj)}")


def _from_array_interface(obj: Any) -> TensorSpec:
    return _from_interface(obj, obj.__array_interface__, "host")


_PROTOCOLS = (
    ("__dlpack__", _from_dlpack),
    ("__cuda_array_interface__", _from_cuda_interface),
    ("__array_interface__", _from_array_interface),
)


def _from_interface(obj: Any, interface: dict[str, Any], device: str) -> TensorSpec:
    data, typestr = interface.get("data"), str(interface["typestr"])
    match = _TYPESTR.fullmatch(typestr)
    if match is None or match[1] in _NOT_BYTES:
        kind = shown(typestr)
        raise LayoutError(f"{type_name(obj)} has elements of type {kind}, which are no whole bytes; pass `.view(uint8)`")
    if not isinstance(data, tuple):
        raise LayoutError(f"{type_name(obj)} names no data pointer in its array interface (data is {shown(data)})")
    if interface.get("mask") is not None:
        raise LayoutError(f"{type_name(obj)} is masked; pass the plain array under the mask")
    if data[1]:
        refuse_read_only(obj)
    itemsize = int(match[2]) * _BYTES_PER_UNIT.get(match[1], 1)
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    return TensorSpec(data[0], shape, c_strides(shape, itemsize) if strides is None else strides, itemsize, device, obj)


def _ordinal(obj: Any) -> int:
    """The CUDA ordinal of an array whose interface does not hold one."""
    device = getattr(obj, "device", None)
    for candidate in (getattr(device, "id", None), getattr(device, "index", None), device):
        if isinstance(candidate, int) and not isinstance(candidate, bool):
            return candidate
    return 0


def _integer(value: Any, what: str, seen: str) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise LayoutError(f"{what} holds a bool ({seen}); give integers")
    try:
        number = operator.index(value)
    except Exception as error:
        raise LayoutError(f"{what} holds {shown(value)}, which is no integer ({seen}); give integers") from error
    if number.bit_length() > 64:
        raise LayoutError(f"{what} holds {shown(number)}, which is beyond 64 bits ({seen})")
    return number


def _integers(values: Any, what: str, seen: str) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise LayoutError(f"{what} is no sequence of integers ({seen})")
    try:
        items = list(itertools.islice(values, _MAX_AXES + 1))
    except Exception as error:  # arrays of no dimension say that they can be iterated
        raise LayoutError(f"{what} is no sequence of integers ({seen}): {told(error)}") from error
    if len(items) > _MAX_AXES:
        raise LayoutError(f"{what} has more than {_MAX_AXES} axes ({seen})")
    return tuple(_integer(value, what, seen) for value in items)
