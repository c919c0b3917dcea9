"""A paged cache on a device and an engine over it, as every measurement uses them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import kvortex
from kvortex.devices import Device

LAYERS = 32
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
        self.fragment_bytes = fragment_bytes
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
        data = self.rng.integers(0, 1 << 63, self.memory.nbytes // 8, np.int64).view(np.uint8)
        self.memory.write(data)
        return data

    def keys(self) -> npt.NDArray[np.uint8]:
        """Keys that were never used, one for each block that is moved."""
        return self.rng.integers(0, 256, (self.count, 32), np.uint8)

    def halves(self) -> tuple[Ids, Ids]:
        """Two sets of pages, drawn at random, that have none in common."""
        source, target = self.rng.permutation(self.pages).reshape(2, self.count)
        return source, target

    def wrong_bytes(self, before: Any, after: Any, source: Ids, target: Ids) -> int:
        """Bytes that are not those of ``source``, in the pages ``target``; and bytes that changed, in all others."""
        old = before.reshape(LAYERS, 2, -1, self.fragment_bytes)
        new = after.reshape(LAYERS, 2, -1, self.fragment_bytes)
        others = np.setdiff1d(np.arange(self.pages), target)
        wrong = 0
        for layer in range(LAYERS):
            wrong += int((new[layer][:, target] != old[layer][:, source]).sum())
            wrong += int((new[layer][:, others] != old[layer][:, others]).sum())
        return wrong

    def round_trip(self) -> int:
        """Saves blocks, loads them elsewhere, and counts wrong bytes."""
        before, keys = self.fill(), self.keys()
        source, target = self.halves()
        moved(self.engine.save_blocks(keys, source))
        moved(self.engine.load_blocks(keys, target))
        return self.wrong_bytes(before, self.memory.read(), source, target)


def moved(ticket: kvortex.Ticket) -> kvortex.Ticket:
    """The ticket, once all of its blocks have moved; what did not move is no measurement."""
    if not ticket.wait().all() or not ticket.nbytes:
        raise kvortex.TransferError(f"a {ticket.kind} failed: {ticket.error}")
    return ticket
