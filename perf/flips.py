"""Bits flipped on purpose, and how many of them digests show."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.digests.keys import kernel_numbers
from kvortex.errors import TransferError
from kvortex.kernels import build
from kvortex.transfer.plan import split_pieces
from perf.pages import Pages, moved

RECORDS, FRAGMENT_BYTES, FRAGMENTS = 500, 8192, 4  # of a round in staging


def in_pinned_ram(pages: Pages, tries: int) -> int:
    """Saves blocks, flips a bit of each but one in the pool, loads them; how many of ``tries`` loads said so.

    Raises
    ------
    TransferError
        The block that is whole did not arrive, or a block that is not was found again.
    """
    engine, rng, seen, left = pages.engine, pages.rng, 0, tries
    pages.fill()
    while left:
        count = min(left, pages.count - 1)
        source, target = (half[: count + 1] for half in pages.halves())
        keys = pages.keys()[: count + 1]
        moved(engine.save_blocks(keys, source))
        slots = engine._index.acquire(keys)
        for slot, bit in zip(slots[1:].tolist(), rng.integers(8 * pages.layout.record_bytes, size=count).tolist(), strict=True):
            view = engine._parts.arena.view(slot)
            view[bit // 8] ^= np.uint8(1 << bit % 8)
        engine._index.release(slots)
        mask = engine.load_blocks(keys, target).wait()
        if not mask[0] or engine.check_blocks(keys).tolist() != mask.tolist():
            raise TransferError("a block that was whole did not arrive, or one that was damaged is still there")
        seen += int((~mask[1:]).sum())
        left -= count
    return seen


def in_staging(device: CudaDevice, tries: int) -> int:
    """Gathers pages into a staging buffer by the kernel that digests, flips a bit of each record there, and scatters; how many
    of ``tries`` records have another digest then."""
    rng = np.random.default_rng(11)
    record = FRAGMENTS * FRAGMENT_BYTES
    pages, staging = (device.allocate(RECORDS * record) for _ in range(2))
    pages.write(rng.integers(0, 256, pages.nbytes, np.uint8))
    starts = pages.address + RECORDS * FRAGMENT_BYTES * np.arange(FRAGMENTS)
    rows = [[start, FRAGMENT_BYTES, at * FRAGMENT_BYTES, FRAGMENT_BYTES] for at, start in enumerate(starts.tolist())]
    pieces, ids = split_pieces(np.array(rows, np.int64)), np.arange(RECORDS, dtype=np.int32)
    numbers = kernel_numbers(record)
    table, blocks, constants = (device.allocate(data.nbytes) for data in (pieces, ids, numbers))
    for buffer, data in ((table, pieces), (blocks, ids), (constants, numbers)):
        buffer.write(data)
    sums = device.allocate(16 * RECORDS)
    counter = device.allocate(4)
    counter.write(np.zeros(4, np.uint8))
    launch = (staging.address, table.address, len(pieces), blocks.address, RECORDS, record, -1, counter.address)
    values = (*launch, constants.address, sums.address, 16, 0)
    seen, left = 0, tries
    while left:
        count = min(left, RECORDS)
        before = _run(device, "gather_digest", sums, values)
        data = staging.read()
        bits = rng.integers(8 * record, size=count)
        data[record * np.arange(count) + bits // 8] ^= (1 << bits % 8).astype(np.uint8)
        staging.write(data)
        differ = (_run(device, "scatter_digest", sums, values) != before).any(1)
        if differ[count:].any():
            raise TransferError("the digest of a record that nobody touched is another one")
        seen += int(differ[:count].sum())
        left -= count
    return seen


def _run(device: CudaDevice, name: str, sums: Any, values: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    sums.write(np.zeros(sums.nbytes, np.uint8))
    cubin = build.load(name, device.compute_capability)
    u64, i32 = ctypes.c_uint64, ctypes.c_int32
    with cu.current(device.context) as driver:
        module = cu.check(driver.cuModuleLoadData(cubin.code), "cuModuleLoadData")
        kernel = cu.check(driver.cuModuleGetFunction(module, cubin.entry.encode()), "cuModuleGetFunction")
        kinds = (u64, u64, i32, u64, i32, u64, i32, u64, u64, u64, u64, u64)
        cu.check(driver.cuLaunchKernel(kernel, 16, 1, 1, 512, 1, 1, 0, 0, (values, kinds), 0), "cuLaunchKernel")
        cu.check(driver.cuCtxSynchronize(), "cuCtxSynchronize")
        cu.check(driver.cuModuleUnload(module), "cuModuleUnload")
    found: npt.NDArray[np.uint64] = sums.read().view(np.uint64).reshape(-1, 2)
    return found
