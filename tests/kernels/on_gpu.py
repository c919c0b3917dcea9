"""Buffers in VRAM, launches of kernels, and digests of what they leave, for tests on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvortex.digests import digest_records
from kvortex.digests.host import add_lengths
from kvortex.kernels import build


class Gpu:
    """A GPU, and what a test has put there."""

    def __init__(self) -> None:
        from kvortex.devices.cuda import CudaDevice

        self.device = CudaDevice(0)
        self.held: list[Any] = []
        self.kernels: dict[str, Any] = {}

    def upload(self, array: np.ndarray) -> Any:
        self.held.append(self.device.allocate(array.nbytes))
        self.held[-1].write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return self.held[-1]

    def launch(self, name: str, grid: int, threads: int, values: tuple[Any, ...], kinds: tuple[Any, ...]) -> None:
        """By parameters of these ctypes, and until it has ended."""
        from kvortex.devices import driver as cu

        with cu.current(self.device.context) as driver:
            if name not in self.kernels:
                cubin = build.load(name, self.device.compute_capability)
                module = cu.check(driver.cuModuleLoadData(cubin.code), "cuModuleLoadData")
                self.kernels[name] = cu.check(driver.cuModuleGetFunction(module, cubin.entry.encode()), "cuModuleGetFunction")
            launched = driver.cuLaunchKernel(self.kernels[name], grid, 1, 1, threads, 1, 1, 0, 0, (values, kinds), 0)
            cu.check(launched, "cuLaunchKernel")
            cu.check(driver.cuCtxSynchronize(), "cuCtxSynchronize")


def host_digests(rows: np.ndarray) -> np.ndarray:
    """(n, 16): of rows, by the CPU."""
    n, pitch = rows.shape
    rows, made = np.ascontiguousarray(rows), np.empty((n, 16), np.uint8)
    digest_records(rows.ctypes.data + pitch * np.arange(n), np.full(n, pitch), made)
    return made


def found_digests(sums: Any, pitch: int) -> np.ndarray:
    """(n, 16): of rows of ``pitch`` bytes, by sums that kernels left in a buffer."""
    found = sums.read().view(np.uint64).reshape(-1, 2)
    return add_lengths(found, np.full(len(found), pitch))
