"""The kernels on a GPU, against the obvious reference. Run under compute-sanitizer too."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.kernels import build
from tests.kernels.cases import CASES, GUARD, Case, numbers
from tests.naive_digest import sums

pytestmark = pytest.mark.gpu



class Sums:
    """Sums of ``count`` records in VRAM, and the table that kernels read for them; or, ``apart``, of as many pieces of each of
    them in pinned memory, where something else lies before."""

    def __init__(self, device: CudaDevice, count: int, nbytes: int, apart: int = 0) -> None:
        table = numbers(nbytes)
        self.table, self._device, self._apart = device.allocate(table.nbytes), device, apart
        self.table.write(table)
        size, self.kinds = 2 * count * max(1, apart), (ctypes.c_uint64,) * 4
        if apart:
            self._address = device.allocate_pinned(8 * size)
            self._seen = np.ctypeslib.as_array((ctypes.c_uint64 * size).from_address(self._address))
            self._seen[:] = 0xEEEE
        else:
            self._cells = device.allocate(8 * size)
            self._cells.write(np.full(size, 5, np.uint64))
        address = self._address if apart else self._cells.address
        self.values = (self.table.address, address, 16 * max(1, apart), 16 if apart else 0)

    def clear(self) -> None:
        """For pieces that there are not, which no kernel touches."""
        self._seen[:] = 0

    def read(self) -> list[tuple[int, int]]:
        if self._apart:
            rows = self._seen.reshape(-1, self._apart, 2).sum(1, np.uint64)
            self._device.free_pinned(self._address)
        else:
            rows = (self._cells.read().view(np.uint64) - np.uint64(5)).reshape(-1, 2)
        return [(int(first), int(second)) for first, second in rows]


def launch(device: CudaDevice, name: str, shape: tuple[int, int], values: tuple[int, ...], kinds: tuple[Any, ...]) -> None:
    cubin = build.load(name, device.compute_capability)
    with cu.current(device.context) as driver:
        module = cu.check(driver.cuModuleLoadData(cubin.code), "cuModuleLoadData")
        kernel = cu.check(driver.cuModuleGetFunction(module, cubin.entry.encode()), "cuModuleGetFunction")
        cu.check(driver.cuLaunchKernel(kernel, shape[0], 1, 1, shape[1], 1, 1, 0, 0, (values, kinds), 0), "cuLaunchKernel")
        cu.check(driver.cuCtxSynchronize(), "cuCtxSynchronize")
        cu.check(driver.cuModuleUnload(module), "cuModuleUnload")


@pytest.mark.parametrize("digests", ["none", "added up", "apart"])
@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_against_the_reference(case: Case, direction: str, digests: str) -> None:
    device = CudaDevice(0)
    rng = np.random.default_rng(1)
    memory = rng.integers(0, 256, case.memory_bytes, np.uint8)
    staging = rng.integers(0, 256, case.staging_bytes, np.uint8)
    pages, stage = device.allocate(memory.size), device.allocate(staging.size)
    pages.write(memory)
    stage.write(staging)
    pieces = case.pieces
    pieces[:, 0] += pages.address
    table, ids = device.allocate(pieces.nbytes), device.allocate(4 * len(case.blocks))
    table.write(pieces)
    ids.write(np.array(case.blocks, np.int32))
    only = case.blocks[0] if len(case.blocks) == 1 else -1
    counter = device.allocate(4)
    counter.write(np.zeros(4, np.uint8))
    of_records = ids.address, len(case.blocks), case.pitch, only
    values = (stage.address + GUARD, table.address, len(pieces), *of_records, counter.address)
    u64, i32 = ctypes.c_uint64, ctypes.c_int32
    kinds = (u64, u64, i32, u64, i32, u64, i32, u64)
    if digests != "none":
        found = Sums(device, len(case.blocks), sum(case.sizes), len(pieces) if digests == "apart" else 0)
        launch(device, direction + "_digest", (3, 128), (*values, *found.values), (*kinds, *found.kinds))
        assert found.read() == case.sums(memory if direction == "gather" else case.scattered(memory, staging))
    else:
        launch(device, direction, (3, 128), values, kinds)
    assert not counter.read().any(), "the next launch would find shares taken"
    if direction == "gather":
        np.testing.assert_array_equal(stage.read(), case.gathered(memory, staging))
        np.testing.assert_array_equal(pages.read(), memory)
    else:
        np.testing.assert_array_equal(pages.read(), case.scattered(memory, staging))
        np.testing.assert_array_equal(stage.read(), staging)


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_resident_against_the_reference(case: Case, direction: str, digests: bool) -> None:
    """Two chunks whose buffers are ready from the start, so the kernel needs nobody to end."""
    device = CudaDevice(0)
    rng = np.random.default_rng(2)
    memory = rng.integers(0, 256, case.memory_bytes, np.uint8)
    staging = rng.integers(0, 256, case.staging_bytes, np.uint8)
    pages, stage = device.allocate(memory.size), device.allocate(staging.size)
    pages.write(memory)
    stage.write(staging)
    whole = Case(**{**vars(case), "first": 0}).pieces
    whole[:, 0] += pages.address
    table, ids, flags = device.allocate(whole.nbytes), device.allocate(4 * len(case.blocks)), device.allocate(4 * 64)
    table.write(whole)
    ids.write(np.array(case.blocks, np.int32))
    before = np.zeros(64, np.uint32)
    before[[0, 32]], before[[16, 48]] = (3, 2**32 - 1), (7, 2**32 - 1)
    flags.write(before)
    half = (len(case.blocks) + 1) // 2
    rows = np.zeros((2, 8), np.int64)
    for at, (first, count) in enumerate([(0, half), (half, len(case.blocks) - half)]):
        begin = stage.address + GUARD + first * case.pitch - case.begin
        ready = flags.address + 128 * at
        rows[at] = (begin, first, count, case.first, len(case.pieces), ready, int(before[32 * at]), ready + 64)
    table_of_rows = device.allocate(rows.nbytes)
    table_of_rows.write(rows)
    values = (table_of_rows.address, len(rows), table.address, ids.address, case.pitch)
    kinds = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)
    if digests:
        found = Sums(device, len(case.blocks), sum(case.sizes))
        launch(device, direction + "_resident_digest", (2, 512), (*values, *found.values[:2]), (*kinds, *found.kinds[:2]))
        assert found.read() == case.sums(memory if direction == "gather" else case.scattered(memory, staging))
    else:
        launch(device, direction + "_resident", (2, 512), values, kinds)
    gathers = direction == "gather"
    np.testing.assert_array_equal(stage.read(), case.gathered(memory, staging) if gathers else staging)
    np.testing.assert_array_equal(pages.read(), memory if gathers else case.scattered(memory, staging))
    after = flags.read().view(np.uint32)
    assert after[[16, 48]].tolist() == [7 + 1024, 1023], "each of 1024 threads raises each chunk's flag once, and it wraps"


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_digests_of_what_is_only_read(case: Case, apart: bool) -> None:
    """Pages, and then the same memory as buffers, one of them empty."""
    device = CudaDevice(0)
    memory = np.random.default_rng(3).integers(0, 256, case.memory_bytes, np.uint8)
    pages, table, ids = device.allocate(memory.size), device.allocate(case.pieces.nbytes), device.allocate(4 * len(case.blocks))
    pages.write(memory)
    pieces = case.pieces
    pieces[:, 0] += pages.address
    table.write(pieces)
    ids.write(np.array(case.blocks, np.int32))
    found = Sums(device, len(case.blocks), sum(case.sizes), len(pieces) if apart else 0)
    kinds = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_uint64, ctypes.c_int32, ctypes.c_int32, *found.kinds)
    kinds += (ctypes.c_uint64, ctypes.c_uint32)  # a flag, which is not to be waited for
    only = case.blocks[0] if len(case.blocks) == 1 else -1
    values = (table.address, len(pieces), ids.address, len(case.blocks), only, *found.values, 0, 0)
    launch(device, "read_pages", (3, 128), values, kinds)
    assert found.read() == case.sums(memory)
    spans = [(case.starts[0], 4200), (0, 0), (case.starts[-1] + 1, 61), (0, memory.size)]
    spans = [(first, min(count, memory.size - first)) for first, count in spans]
    buffers = device.allocate(16 * len(spans))
    buffers.write(np.array([(pages.address + first, count) for first, count in spans]))
    most = -(-max(count for _, count in spans) // 4096)
    found = Sums(device, len(spans), memory.size, most if apart else 0)
    if apart:
        found.clear()
    launch(device, "read_buffers", (3, 128), (buffers.address, most, 0, len(spans), -1, *found.values, 0, 0), kinds)
    assert found.read() == [sums(memory[first:][:count].tobytes()) for first, count in spans]
