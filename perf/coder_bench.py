"""What rows of ``perf plane`` on a GPU share: pages that hold records, and kernels that code them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import kvortex
from kvortex.codecs import RecordShape
from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.digests import digest_records
from kvortex.digests.host import add_lengths
from kvortex.digests.keys import kernel_numbers
from kvortex.kernels import build
from kvortex.kernels.plane_form import ENCODE_WARPS
from perf.clock import CudaClock

THREADS = 256
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
        CTAs of ``THREADS`` threads a multiprocessor.
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
        self.sums, self.numbers = self.upload(np.zeros((n, 2), np.uint64)), self.upload(kernel_numbers(pitch_of(slot_bytes)))
        self._counter = self.upload(np.zeros(1, np.uint32))  # of kernels that share work out; others take no notice of it
        self._grid, self._functions = ctas_each * device.multiprocessors, {name: _loaded(device, name) for name in names}

    def digests(self, work: Callable[[], Any]) -> npt.NDArray[np.uint64]:
        """(n, 2): sums that launches by ``work`` leave."""
        self.sums.write(np.zeros(16 * len(self.records), np.uint8))
        work()
        return np.asarray(self.sums.read().view(np.uint64).reshape(-1, 2))

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

    def launch(self, name: str, pitch: int, form: Any, extra: Any, ids: Any, blocks: int, run: int, *others: Any) -> None:
        """Over all multiprocessors, on the clock's stream. ``others`` are buffers of which kernels that digest are told."""
        u64, i32 = ctypes.c_uint64, ctypes.c_int32
        addresses = *(each.address for each in others), self._counter.address
        values = (self.staging.address, pitch, form.address, extra.address, ids.address, blocks, run, *addresses)
        threads = threads_of(name)
        with cu.current(self.device.context) as driver:
            packed = values, (u64, u64, u64, u64, u64, i32, i32, *[u64] * len(addresses))
            launched = driver.cuLaunchKernel(
                self._functions[name], self._grid * THREADS // threads, 1, 1, threads, 1, 1, 0, self.clock.stream, packed, 0
            )
            cu.check(launched, f"cuLaunchKernel of {name}")


def _loaded(device: CudaDevice, name: str) -> Any:
    cubin = build.load(name, device.compute_capability)
    with cu.current(device.context) as driver:
        module = cu.check(driver.cuModuleLoadData(cubin.code), "cuModuleLoadData")
        return cu.check(driver.cuModuleGetFunction(module, cubin.entry.encode()), "cuModuleGetFunction")


def wrong_digests(bench: Bench, work: Callable[[], Any], pitch: int, count: int = 8) -> int:
    """Bytes of digests by which launches by ``work`` and the host differ over records in staging, of the first ones."""
    rows = bench.staging.read(0, count * pitch)
    mine, sizes = np.empty((count, 16), np.uint8), np.full(count, pitch)
    digest_records(rows.ctypes.data + pitch * np.arange(count), sizes, mine)
    return int((add_lengths(bench.digests(work)[:count], sizes) != mine).sum())


def threads_of(name: str) -> int:
    """Of a CTA of a kernel."""
    return 32 * ENCODE_WARPS if name == "plane_encode" else THREADS


def pitch_of(slot_bytes: int) -> int:
    """Bytes from one coded record in staging to the next."""
    return -(-slot_bytes // 16) * 16
