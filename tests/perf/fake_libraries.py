"""Stand-ins for torch and CuPy over a GPU made of RAM: only what the measurements call, with the libraries' own meaning."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np


def ram(address: int, nbytes: int) -> np.ndarray:
    """(nbytes,) uint8 view of memory."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


class Stream:
    """A context, with the handle that both libraries have under different names."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = self.ptr = 0x777

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Tensor:
    """What a ``torch.Tensor`` does here."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def view(self, what: Any) -> Tensor:
        return Tensor(self.array.view(what) if isinstance(what, type) else self.array.reshape(what))

    def to(self, _: Any, *, non_blocking: bool) -> Tensor:
        return Tensor(self.array.copy())

    def copy_(self, other: Tensor, *, non_blocking: bool) -> None:
        assert non_blocking and self.array.shape == other.array.shape
        self.array[...] = other.array

    def index_copy_(self, dim: int, index: Tensor, source: Tensor) -> None:
        assert dim == 1
        self.array[:, index.array] = source.array


def torch() -> SimpleNamespace:
    def as_tensor(owner: Any, *, device: Any) -> Tensor:
        face = owner.__cuda_array_interface__
        assert face["typestr"] == "|u1"
        return Tensor(ram(face["data"][0], face["shape"][0]))

    def index_select(source: Tensor, dim: int, index: Tensor, *, out: Tensor) -> None:
        np.take(source.array, index.array, axis=dim, out=out.array)

    cuda = SimpleNamespace(is_available=lambda: True, Stream=Stream, stream=lambda stream: stream)
    return SimpleNamespace(
        __version__="0.0-fake",
        cuda=cuda,
        int64=np.int64,
        device=lambda *_: "cuda",
        as_tensor=as_tensor,
        from_numpy=Tensor,
        empty=lambda shape, dtype, device: Tensor(np.empty(shape, dtype)),
        index_select=index_select,
    )


class Array(np.ndarray):
    """What a ``cupy.ndarray`` does here."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        here = self.ctypes.data
        return SimpleNamespace(
            copy_to_host_async=lambda there, nbytes, _: ctypes.memmove(there, here, nbytes),
            copy_from_host_async=lambda there, nbytes, _: ctypes.memmove(here, there, nbytes),
        )


def cupy() -> SimpleNamespace:
    def ndarray(shape: tuple[int, ...], dtype: Any, memory: Any) -> Array:
        assert int(np.prod(shape)) * 8 == memory.nbytes
        return ram(memory.address, memory.nbytes).view(dtype).reshape(shape).view(Array)

    def unowned(address: int, nbytes: int, owner: Any, ordinal: int) -> Any:
        return SimpleNamespace(address=address, nbytes=nbytes)

    cuda = SimpleNamespace(
        is_available=lambda: True,
        UnownedMemory=unowned,
        MemoryPointer=lambda memory, offset: memory,
        Device=Stream,
        Stream=Stream,
    )
    return SimpleNamespace(
        __version__="0.0-fake",
        cuda=cuda,
        ndarray=ndarray,
        empty=lambda shape, dtype: np.empty(shape, dtype).view(Array),
        take=lambda array, index, *, axis, out: np.take(array, index, axis=axis, out=out),
        asarray=np.array,
    )
