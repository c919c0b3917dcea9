"""What rows of ``perf plane`` on a GPU share: pages that hold records, and kernels that code them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import kvortex
from kvortex.codecs import RecordShape
from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.kernels import build
from perf.clock import CudaClock

THREADS = 256  # of a CTA
Bytes = npt.NDArray[np.uint8]


class Bench:
    """Pages and kernels on a GPU: pages ``source`` hold the records, pages ``target`` nothing yet.

    Parameters
    ----------
    device
    shape
        Of the records.
    records : (n, raw_bytes)
    slot_bytes
        The most of a coded record.
    names
        Of kernels, loaded once.
    ctas_each
        CTAs a multiprocessor.
    """

    def __init__(
        self, device: CudaDevice, shape: RecordShape, records: Bytes, slot_bytes: int, names: Sequence[str], ctas_each: int
    ) -> None:
        self.device, self.shape, self.records, self.clock = device, shape, records, CudaClock(device)
        n, self.pages = len(records), 2 * len(records)
        order = np.random.default_rng(1).permutation(self.pages).astype(np.int32)
        self.source, self.target = order[:n], order[n:]
        self.memory = device.allocate(self.pages * shape.raw_bytes)
        self.staging = device.allocate(n * pitch_of(slot_bytes))
        for plane in range(shape.planes):
            data = np.zeros((self.pages, shape.plane_bytes), np.uint8)
            data[self.source] = self.of_plane(records, plane)
            self.write_plane(plane, data)
        sizes = shape.planes, self.pages, shape.tokens, shape.channels
        strides = tuple(2 * int(np.prod(sizes[at + 1 :])) for at in range(4))
        layout = kvortex.KVLayout.from_pointers((self.memory.address, sizes, strides, 2), 1, 0, device=device.name)
        self.fragments = layout.fragments
        self._counter = self.upload(np.zeros(1, np.uint32))  # of kernels that share work out; others take no notice of it
        self._grid, self._functions = ctas_each * device.multiprocessors, {name: _loaded(device, name) for name in names}

    def upload(self, array: npt.NDArray[Any]) -> Any:
        """A copy in VRAM."""
        held = self.device.allocate(array.nbytes)
        held.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return held

    def of_plane(self, records: Bytes, plane: int) -> Bytes:
        """(n, plane_bytes) of records."""
        return records[:, plane * self.shape.plane_bytes : (plane + 1) * self.shape.plane_bytes]

    def read_plane(self, plane: int) -> Bytes:
        """(pages, plane_bytes): a plane of all pages."""
        nbytes = self.pages * self.shape.plane_bytes
        return np.asarray(self.memory.read(plane * nbytes, nbytes)).reshape(self.pages, -1)

    def write_plane(self, plane: int, data: Bytes) -> None:
        """The reverse."""
        self.memory.write(data.reshape(-1), plane * data.size)

    def launch(self, name: str, pitch: int, form: Any, extra: Any, ids: Any, blocks: int, run: int, *span: int) -> None:
        """Over all multiprocessors, on the clock's stream. ``span`` is what a decoder is told of tiles and tails."""
        u64, i32 = ctypes.c_uint64, ctypes.c_int32
        values = (self.staging.address, pitch, form.address, extra.address, ids.address, blocks, run, *span)
        with cu.current(self.device.context) as driver:
            packed = (*values, self._counter.address), (u64, u64, u64, u64, u64, i32, i32, *[i32] * len(span), u64)
            launched = driver.cuLaunchKernel(
                self._functions[name], self._grid, 1, 1, THREADS, 1, 1, 0, self.clock.stream, packed, 0
            )
            cu.check(launched, f"cuLaunchKernel of {name}")


def _loaded(device: CudaDevice, name: str) -> Any:
    cubin = build.load(name, device.compute_capability)
    with cu.current(device.context) as driver:
        module = cu.check(driver.cuModuleLoadData(cubin.code), "cuModuleLoadData")
        return cu.check(driver.cuModuleGetFunction(module, cubin.entry.encode()), "cuModuleGetFunction")


def pitch_of(slot_bytes: int) -> int:
    """Bytes from one coded record in staging to the next."""
    return -(-slot_bytes // 16) * 16
