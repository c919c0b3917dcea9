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
