"""Paged KV caches for tests, on any device, with an obvious way to read and write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.config import KVortexConfig
from kvortex.devices import Device
from kvortex.devices.host import HostBuffer
from kvortex.engine import KVortexEngine
from kvortex.layout import KVLayout, TensorSpec

Bytes = npt.NDArray[np.uint8]


class Tensor:
    """A tensor of a device, seen from NumPy by copies. ``order`` is the order of axes in memory, ``pad`` extra bytes
    behind each step of an axis."""

    def __init__(
        self,
        device: Device,
        shape: Sequence[int],
        itemsize: int = 2,
        *,
        order: Sequence[int] | None = None,
        pad: dict[int, int] | None = None,
        shift: int = 0,
    ) -> None:
        self.shape, self.itemsize, self.shift = tuple(shape), itemsize, shift
        strides, step = [0] * len(shape), itemsize
        for axis in reversed(range(len(shape)) if order is None else order):
            strides[axis] = step
            step = step * shape[axis] + (pad or {}).get(axis, 0)
        self.strides = tuple(strides)
        self.buffer = device.allocate(step + shift)
        self.device = device

    def spec(self) -> TensorSpec:
        return TensorSpec(self.buffer.address + self.shift, self.shape, self.strides, self.itemsize, self.device.name, self)

    def view(self, memory: Bytes) -> npt.NDArray[np.uint8]:
        """(..., itemsize) uint8 view of a copy of the buffer."""
        return np.lib.stride_tricks.as_strided(memory[self.shift :], (*self.shape, self.itemsize), (*self.strides, 1))


class PagedCache:
    """Tensors with a common block axis, and what is in them."""

    def __init__(
        self, device: Device, tensors: list[Tensor], block_axis: int | list[int], layer_axis: int | None = None
    ) -> None:
        self.device, self.tensors = device, tensors
        self.axes = [block_axis] * len(tensors) if isinstance(block_axis, int) else block_axis
        self.layout = KVLayout.from_pointers([t.spec() for t in tensors], block_axis, layer_axis, device=device.name)
        self.rng = np.random.default_rng(7)

    @classmethod
    def plain(cls, device: Device, blocks: int = 24, layers: int = 2, page: Sequence[int] = (16, 4, 32)) -> PagedCache:
        """Layers of ``[2, B, *page]``."""
        return cls(device, [Tensor(device, (2, blocks, *page)) for _ in range(layers)], 1)

    def randomize(self) -> list[Bytes]:
        """Fills all memory, padding included, with random bytes and returns it."""
        for tensor in self.tensors:
            tensor.buffer.write(self.rng.integers(0, 256, tensor.buffer.nbytes, np.uint8))
        return self.memory()

    def memory(self) -> list[Bytes]:
        return [tensor.buffer.read() for tensor in self.tensors]

    def expected(self, memory: list[Bytes], source: list[Bytes], moves: Sequence[tuple[int, int]]) -> list[Bytes]:
        """``memory`` after block ``a`` of ``source`` was copied to block ``b``, for each ``(a, b)``."""
        result = [m.copy() for m in memory]
        for tensor, axis, new, old in zip(self.tensors, self.axes, result, source, strict=True):
            for a, b in moves:
                at: list[Any] = [slice(None)] * len(tensor.shape)
                to = at.copy()
                at[axis], to[axis] = a, b
                tensor.view(new)[tuple(to)] = tensor.view(old)[tuple(at)]
        return result

    def engine(self, slots: int = 32, **options: Any) -> KVortexEngine:
        record = -(-self.layout.record_bytes // 4096) * 4096
        # Guessed, lest tests depend on what was measured where they run.
        common: dict[str, Any] = {"device": self.device.name, "gpu_pool_size_bytes": 8 << 20, "calibrate": "never"}
        config = {"cpu_pool_size_bytes": slots * record} | common | options
        return KVortexEngine.create(KVortexConfig(**config), self.layout)


def assert_same(seen: list[Bytes], wanted: list[Bytes]) -> None:
    for at, (a, b) in enumerate(zip(seen, wanted, strict=True)):
        wrong = np.flatnonzero(a != b)
        assert not len(wrong), f"tensor {at}: {len(wrong)} of {len(a)} bytes differ, the first at {wrong[0]}"


def keys_of(*numbers: int) -> npt.NDArray[np.uint8]:
    """Keys that are the numbers themselves."""
    return np.array([list(int(n).to_bytes(32, "big")) for n in numbers], np.uint8).reshape(-1, 32)


def host_array(buffer: Any) -> Bytes:
    """The memory of a host device's buffer itself, not a copy."""
    assert isinstance(buffer, HostBuffer)
    return buffer.array
