"""Reading a DLPack capsule with ctypes: pointer, shape and strides of any dtype, the ones numpy cannot name included.

The capsule is only read. Its name is left as it is, so its own destructor frees it; the memory stays alive because
whoever asked keeps the producing object.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, NoReturn

from kvortex.errors import LayoutError, cut, shown

_HOST_TYPES = {1, 3}  # kDLCPU, kDLCUDAHost
_CUDA_TYPES = {2, 13}  # kDLCUDA, kDLCUDAManaged
_READ_ONLY, _IS_COPIED = 1, 2  # DLPACK_FLAG_BITMASK_*
_MAJOR = 1
_NO_SYNC = -1  # the stream that means: make nothing wait


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


@dataclass(frozen=True)
class DLPackView:
    """What a capsule said: address, shape, strides in bytes, bytes an element, device as ``"host"`` or ``"cuda:N"``."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    device: str


def read_dlpack(obj: Any) -> DLPackView:
    """Read an object that has ``__dlpack__``.

    Parameters
    ----------
    obj
        The producer. It must outlive every use of the result: the capsule is released before this returns.

    Returns
    -------
    DLPackView

    Raises
    ------
    LayoutError
        The capsule is read-only, a copy, of elements that are no whole bytes, or on a device that is neither host
        nor CUDA.
    Exception
        Whatever the producer raises when it cannot export itself.
    """
    kind = int(obj.__dlpack_device__()[0])
    if kind not in _HOST_TYPES | _CUDA_TYPES:
        raise LayoutError(f"{type_name(obj)} is on DLPack device type {kind}, which is neither host memory nor CUDA")
    capsule = _export(obj, on_cuda=kind in _CUDA_TYPES)
    return _read(capsule, obj)  # `capsule` is a local of this frame: it lives until its fields have been copied out


def _export(obj: Any, *, on_cuda: bool) -> Any:
    """Call ``__dlpack__`` with the newest signature the producer takes: newer capsules say read-only and copied."""
    stream: dict[str, Any] = {"stream": _NO_SYNC} if on_cuda else {}
    newest: dict[str, Any] = {"max_version": (_MAJOR, 0)}
    attempts = [{**stream, **newest, "copy": False}, {**stream, **newest}, stream, {}]
    for keywords in attempts[:-1]:
        try:
            return obj.__dlpack__(**keywords)
        except TypeError:  # an older signature; a TypeError about the array itself comes again from the last call
            continue
    return obj.__dlpack__(**attempts[-1])


def _read(capsule: Any, obj: Any) -> DLPackView:
    address = _pointer_of(capsule, b"dltensor_versioned")
    if address:
        managed = _Versioned.from_address(address)
        if managed.major != _MAJOR:
            raise LayoutError(f"{type_name(obj)} speaks DLPack {managed.major}.{managed.minor}; kvortex reads version {_MAJOR}")
        if managed.flags & _READ_ONLY:
            refuse_read_only(obj)
        if managed.flags & _IS_COPIED:
            raise LayoutError(f"{type_name(obj)} exports a copy of itself by DLPack; pass an array that can share its memory")
        return _view(managed.tensor, obj)
    address = _pointer_of(capsule, b"dltensor")
    if not address:
        raise LayoutError(f"{type_name(obj)} gave {shown(capsule)} for a DLPack capsule, or one that was already consumed")
    return _view(_DLTensor.from_address(address), obj)  # DLManagedTensor begins with its DLTensor


def _view(tensor: _DLTensor, obj: Any) -> DLPackView:
    bits = tensor.bits * tensor.lanes
    if bits == 0 or bits % 8:
        raise LayoutError(f"{type_name(obj)} has elements of {bits} bits, which are no whole bytes; pass it as `.view(uint8)`")
    if tensor.device_type not in _HOST_TYPES | _CUDA_TYPES:
        raise LayoutError(f"{type_name(obj)} is on DLPack device type {tensor.device_type}, neither host memory nor CUDA")
    itemsize = bits // 8
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[axis] * itemsize for axis in range(tensor.ndim))
    else:
        strides = c_strides(shape, itemsize)
    device = "host" if tensor.device_type in _HOST_TYPES else f"cuda:{tensor.device_id}"
    return DLPackView((tensor.data or 0) + tensor.byte_offset, shape, strides, itemsize, device)


def c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a packed array in C order."""
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def type_name(obj: Any) -> str:
    """The full name of an object's type, for messages."""
    return cut(f"{type(obj).__module__}.{type(obj).__qualname__}")


def refuse_read_only(obj: Any) -> NoReturn:
    """Raise the LayoutError for memory that its library calls read-only."""
    raise LayoutError(
        f"{type_name(obj)} is read-only, and loading blocks writes into it; pass a writable array, or the raw numbers "
        "TensorSpec(pointer, shape, strides_in_bytes, itemsize, device) where you know that its memory may be written"
    )


def _pointer_of(capsule: Any, name: bytes) -> int:
    """The address in a capsule of that name, or 0. Read through the C API, which checks the type and the name."""
    if not _is_valid(capsule, name):
        return 0
    return int(_get_pointer(capsule, name))


# Private copies of the two functions: setting argtypes on ctypes.pythonapi's own attributes would change them for
# every other library in the process.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
