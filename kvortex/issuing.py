"""From slots that a transfer holds to bytes on their way, and the second part of loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex import arguments
from kvortex.errors import ArgumentError, DeviceError, TransferError
from kvortex.keys import KeyArray
from kvortex.layout import KVLayout
from kvortex.parts import Parts
from kvortex.tiers.promotion import Promotion
from kvortex.transfer.executor import Completion, Direction, Executor, Failed, Mark
from kvortex.transfer.plan import Int64s
from kvortex.transfer.transfer import Transfer


@dataclass(frozen=True)
class Memory:
    """Where blocks are on the device, and what becomes of them in slots; arrays are (n,), a row for each slot.

    Attributes
    ----------
    paged
        Whether ``pages`` are ids of the layout's pages; else they are addresses of buffers.
    pages
    payload
        Bytes of pages or buffers that a row moves.
    lengths
        Bytes of the records that slots hold: the same, where no codec shortens them.
    parts
        Of a block that a codec keeps exactly in several slots, which part of it a row is; -1 for whole blocks. None where all
        are.
    """

    paged: bool
    pages: Int64s
    payload: Int64s
    lengths: Int64s
    parts: Int64s | None = None

    def __getitem__(self, rows: Int64s | npt.NDArray[np.bool_]) -> Memory:
        parts = None if self.parts is None else self.parts[rows]
        return Memory(self.paged, self.pages[rows], self.payload[rows], self.lengths[rows], parts)


def memory_of(
    layout: KVLayout | None, most: int, count: int, block_ids: Any, pointers: Any, sizes: Any, direction: Direction
) -> Memory:
    """What a call names: ``count`` pages of the layout, or buffers of up to ``most`` bytes; ArgumentError for neither."""
    if sizes is None and pointers is None:
        if layout is None:
            raise ArgumentError("this engine has no layout: pass pointers and sizes")
        if block_ids is None:
            raise ArgumentError("block_ids are missing")
        ids = arguments.block_ids(block_ids, count, layout.num_blocks)
        payload = np.full(count, layout.record_bytes, np.int64)
        return Memory(True, ids, payload, payload)
    if sizes is None or (pointers is None) == (block_ids is None):
        raise ArgumentError("opaque buffers need pointers and sizes, and no block_ids")
    given = block_ids if pointers is None else pointers
    addresses, lengths = arguments.buffers(given, sizes, count, most, written=direction is Direction.LOAD)
    return Memory(False, addresses, lengths, lengths)


def start(executor: Executor, transfer: Transfer, memory: Memory, stream: Any, layerwise: bool) -> None:
    """Issues what the transfer holds slots for. A failure of the device ends on the transfer, not here."""
    moved = transfer.moved()
    if not len(moved):
        return
    mine = memory if len(moved) == len(transfer.slots) else memory[moved]
    transfer.payload = mine.payload
    transfer.nbytes = int(mine.payload.sum())
    transfer.completion = _prepare(executor, transfer, transfer.slots[moved], mine, stream, layerwise)
    transfer.completion.start()


def _prepare(
    executor: Executor, transfer: Transfer, slots: Int64s, memory: Memory, stream: Any, layerwise: bool
) -> Completion:
    try:
        if memory.paged:
            return executor.prepare_blocks(transfer.direction, memory.pages, slots, stream, layerwise, memory.parts)
        return executor.prepare_buffers(transfer.direction, memory.pages, memory.lengths, slots, stream)
    except (DeviceError, TransferError) as error:
        return Failed(TransferError(f"a {transfer.direction.value} could not be prepared: {error}"))


class Rest(Promotion):
    """What a load did not find in RAM: fetched from tiers below, and then moved as a transfer of its own.

    It is the call in which that transfer is made: the transfer counts as issued when this is over. Where this is never
    submitted (an interrupt), it dies with the caller's frame, and the transfer has moved nothing.

    Parameters
    ----------
    keys, memory
        Of n blocks that were not in RAM.
    deadline
        When what is not in RAM becomes a miss.
    parts, whole
        The engine's, and the load.
    stream
        What was on it when this was made is what the transfer waits for.
    """

    def __init__(
        self, keys: KeyArray, memory: Memory, deadline: float, parts: Parts, whole: Transfer, stream: Any, layerwise: bool
    ) -> None:
        super().__init__(keys, memory.lengths, deadline)
        self._memory, self._parts, self._whole, self._layerwise = memory, parts, whole, layerwise
        self.transfer = parts.flight.open(whole.direction, len(keys), self)
        self.transfer.layers, self.transfer.mask = whole.layers, np.zeros(len(keys), bool)
        self._mark: Mark | None = parts.executor.mark(stream)

    def finish(self, mask: npt.NDArray[np.bool_]) -> None:
        """Moves what is in RAM by now."""
        parts, transfer = self._parts, self.transfer
        mark, self._mark = self._mark, None  # which goes back where nothing waits for it
        try:
            parts.index.acquire(self.keys, self.sizes, taken=transfer.slots)
        except ArgumentError:  # a record of another length came by one of these keys
            parts.counters.miss(len(self.keys))
            return
        self.mask = transfer.mask = transfer.slots >= 0
        parts.counters.miss(len(self.keys) - int(transfer.mask.sum()))
        start(parts.executor, transfer, self._memory, mark, self._layerwise)
        self._whole.fetched_bytes = transfer.nbytes


def rest_of(
    parts: Parts, whole: Transfer, keys: KeyArray, memory: Memory, stream: Any, layerwise: bool, longest: float
) -> Rest | None:
    """The second part of a load, where a tier may have what is not in RAM; it may take ``longest`` seconds."""
    if parts.cascade is None or not parts.cascade.is_awake():
        return None
    missing = np.flatnonzero(~whole.mask)
    if not len(missing):
        return None
    missing = missing[parts.cascade.may_have(keys[missing])]
    if not len(missing):
        return None
    rest = Rest(keys[missing], memory[missing], parts.cascade.deadline(longest), parts, whole, stream, layerwise)
    whole.after.append((rest.transfer, missing))
    return rest
