"""A paged cache on a device and an engine over it, as every measurement uses them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

import kvortex
from kvortex.devices import Device

LAYERS = 32
WAYS = ("save", "load")
Ids = npt.NDArray[np.int64]


class Pages:
    """Blocks of 32 layers of K and V, so of 64 fragments, in one allocation; twice as many as are moved at a time.

    Parameters
    ----------
    device
    fragment_bytes
    payload
        About as many bytes are moved at a time: ``count`` blocks.
    sets
        The pool holds as many times ``count`` blocks.
    options
        Of the engine.
    """

    def __init__(self, device: Device, fragment_bytes: int, payload: int, *, sets: int = 1, **options: Any) -> None:
        self.device, self.fragment_bytes = device, fragment_bytes
        self.count = max(1, payload // (2 * LAYERS * fragment_bytes))
        self.pages = 2 * self.count
        layer_bytes = 2 * self.pages * fragment_bytes
        self.memory = device.allocate(LAYERS * layer_bytes)
        shape, strides = (2, self.pages, fragment_bytes), (self.pages * fragment_bytes, fragment_bytes, 1)
        addresses = self.memory.address + layer_bytes * np.arange(LAYERS)
        specs = [kvortex.TensorSpec(int(address), shape, strides, 1, device.name) for address in addresses]
        self.layout = kvortex.KVLayout.from_pointers(specs, block_axis=1, device=device.name)
        self.moved = self.count * self.layout.record_bytes
        slot_bytes = -(-self.layout.record_bytes // 4096) * 4096
        options = {"cpu_pool_size_bytes": sets * self.count * slot_bytes, "device": device.name} | options
        self.engine = kvortex.KVortexEngine.create(kvortex.KVortexConfig(**options), self.layout)
        self.engine.wait_ready()
        self.rng = np.random.default_rng(fragment_bytes)

    def close(self) -> None:
        """Frees everything."""
        self.engine.shutdown()
        self.memory.free()

    def fill(self) -> npt.NDArray[np.uint8]:
        """Random bytes in all pages, and a copy of them."""
        data = np.empty(self.memory.nbytes, np.uint8)
        rows = data.view(np.int64).reshape(2 * LAYERS, -1)
        randoms = self.rng.spawn(len(rows))

        def one(at: int) -> int:
            rows[at] = randoms[at].integers(0, 1 << 63, rows.shape[1], np.int64)
            return 0

        _sum(one)
        self.memory.write(data)
        return data

    def view(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """(64, pages, fragment_bytes): each fragment of each page, of a copy of the memory."""
        return data.reshape(2 * LAYERS, self.pages, self.fragment_bytes)

    def keys(self) -> npt.NDArray[np.uint8]:
        """Keys that were never used, one for each block that is moved."""
        return self.rng.integers(0, 256, (self.count, 32), np.uint8)

    def halves(self) -> tuple[Ids, Ids]:
        """Two sets of pages, drawn at random, that have none in common."""
        source, target = self.rng.permutation(self.pages).reshape(2, self.count)
        return source, target

    def wrong_bytes(self, before: Any, after: Any, source: Ids, target: Ids, saved: Any = None) -> int:
        """Bytes that are not those of ``source``, in the pages ``target``; and bytes that changed, in all others.

        Parameters
        ----------
        before, after : (nbytes,) uint8
            All memory, before the load and after it.
        saved : (64, n, fragment_bytes) uint8
            What was to be loaded; None for what is in the pages ``source`` of ``before``.
        """
        old, new = self.view(before), self.view(after)
        others = np.setdiff1d(np.arange(self.pages), target)

        def one(at: int) -> int:
            wanted = old[at][source] if saved is None else saved[at]
            return int((new[at][target] != wanted).sum()) + int((new[at][others] != old[at][others]).sum())

        return _sum(one)

    def round_trip(self) -> int:
        """Saves blocks, loads them elsewhere, and counts wrong bytes."""
        before, keys = self.fill(), self.keys()
        source, target = self.halves()
        moved(self.engine.save_blocks(keys, source))
        moved(self.engine.load_blocks(keys, target))
        return self.wrong_bytes(before, self.memory.read(), source, target)


def differing(a: Any, b: Callable[[int], Any]) -> int:
    """Bytes that differ between rows of ``a``, one a fragment, and what ``b`` gives for each."""
    return _sum(lambda at: int((a[at] != b(at)).sum()))


def _sum(count: Callable[[int], int]) -> int:
    """The sum over all fragments of a block; on several threads, since NumPy holds no GIL in these loops."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return sum(pool.map(count, range(2 * LAYERS)))


def routes_of(device: Device) -> tuple[str, ...]:
    """Every ``transfer_route`` that a device can be told; the host device has one way."""
    every = "auto", "mapped", "strided", "batched", "staged", "resident"
    return every if device.name.startswith("cuda") else ("auto",)


def moved(ticket: kvortex.Ticket) -> kvortex.Ticket:
    """The ticket, once all of its blocks have moved; what did not move is no measurement."""
    if not ticket.wait().all() or not ticket.nbytes:
        raise kvortex.TransferError(f"a {ticket.kind} failed: {ticket.error}")
    return ticket
