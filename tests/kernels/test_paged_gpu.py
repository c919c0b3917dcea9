"""The kernels on a GPU, against the obvious reference. Run under compute-sanitizer too."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.kernels.cases import CASES, GUARD, Case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_against_the_reference(case: Case, direction: str) -> None:
    from kvortex.devices import driver as cu
    from kvortex.devices.cuda import CudaDevice
    from kvortex.kernels import build

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
    cubin = build.load(direction, device.compute_capability)
    values = (stage.address + GUARD, table.address, len(pieces), ids.address, len(case.blocks), case.pitch)
    kinds = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int32, ctypes.c_uint64, ctypes.c_int32, ctypes.c_uint64)
    with cu.current(device.context) as driver:
        module = cu.check(driver.cuModuleLoadData(cubin.code), "cuModuleLoadData")
        kernel = cu.check(driver.cuModuleGetFunction(module, cubin.entry.encode()), "cuModuleGetFunction")
        cu.check(driver.cuLaunchKernel(kernel, 3, 1, 1, 128, 1, 1, 0, 0, (values, kinds), 0), "cuLaunchKernel")
        cu.check(driver.cuCtxSynchronize(), "cuCtxSynchronize")
    if direction == "gather":
        np.testing.assert_array_equal(stage.read(), case.gathered(memory, staging))
        np.testing.assert_array_equal(pages.read(), memory)
    else:
        np.testing.assert_array_equal(pages.read(), case.scattered(memory, staging))
        np.testing.assert_array_equal(stage.read(), staging)


@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_resident_against_the_reference(case: Case, direction: str) -> None:
    """Two chunks whose buffers are ready from the start, so the kernel needs nobody to end."""
    from kvortex.devices import driver as cu
    from kvortex.devices.cuda import CudaDevice
    from kvortex.kernels import build

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
    cubin = build.load(direction + "_resident", device.compute_capability)
    values = (table_of_rows.address, len(rows), table.address, ids.address, case.pitch)
    kinds = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)
    with cu.current(device.context) as driver:
        module = cu.check(driver.cuModuleLoadData(cubin.code), "cuModuleLoadData")
        kernel = cu.check(driver.cuModuleGetFunction(module, cubin.entry.encode()), "cuModuleGetFunction")
        cu.check(driver.cuLaunchKernel(kernel, 2, 1, 1, 512, 1, 1, 0, 0, (values, kinds), 0), "cuLaunchKernel")
        cu.check(driver.cuCtxSynchronize(), "cuCtxSynchronize")
    gathers = direction == "gather"
    np.testing.assert_array_equal(stage.read(), case.gathered(memory, staging) if gathers else staging)
    np.testing.assert_array_equal(pages.read(), memory if gathers else case.scattered(memory, staging))
    after = flags.read().view(np.uint32)
    assert after[[16, 48]].tolist() == [7 + 1024, 1023], "each of 1024 threads raises each chunk's flag once, and it wraps"
