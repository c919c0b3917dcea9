"""What a worker has: a pool, and bytes in it by the scheduler's slots."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.config import KVortexConfig
from kvortex.engine import KVortexEngine
from kvortex.errors import ConfigError, KVortexError, told
from kvortex.integrations.vllm.checking import undamaged
from kvortex.integrations.vllm.messages import Blocks, Done
from kvortex.keys import KeyArray, adopt
from kvortex.layout import KVLayout
from kvortex.transfer.ticket import Ticket

Int64s = npt.NDArray[np.int64]
log = logging.getLogger(__name__)
_SLOT_BYTES = 8  # of a slot's number, behind the name


@dataclass
class _Running:
    number: int
    saved: bool
    blocks: Blocks
    at: Int64s  # positions that the ticket moves
    keys: KeyArray
    ticket: Ticket | None
    failed: list[int] = field(default_factory=list)


class Store:
    """An engine whose blocks are found by slot. One thread uses it.

    What lies in a slot is replaced by the next save into it, whoever is told so: the scheduler evicts, and this obeys. A key of
    the engine is made of the name and the slot, so bytes of another block are never found, even where both sides disagree.

    Parameters
    ----------
    config, layout
        Of the engine.
    slots
        How many blocks the scheduler counts on.

    Raises
    ------
    ConfigError
        The pool holds fewer.
    """

    def __init__(self, config: KVortexConfig, layout: KVLayout, slots: int) -> None:
        # Whom the scheduler admits is admitted. An engine that counted offers again would leave out what is promised then.
        self.engine = KVortexEngine.create(dataclasses.replace(config, admit_after=1), layout)
        try:
            there = self.engine.wait_ready()
            if there < slots:
                raise ConfigError(
                    f"cpu_pool_size_bytes = {config.cpu_pool_size_bytes}: this worker's pool holds {there} blocks of "
                    f"{layout.record_bytes} bytes, and the scheduler counts on {slots}; lower it if memory could not be had "
                    f"({'; '.join(self.engine.notes) or 'no notes'})"
                )
            self._keys = np.zeros((slots, 32), np.uint8)
            self._held = np.zeros(slots, bool)
            self._running: dict[int, _Running] = {}
        except BaseException:
            self.engine.shutdown()
            raise

    def save(self, number: int, blocks: Blocks, stream: Any = None) -> None:
        """Starts saving pages into slots, behind what is on ``stream``. What was there is gone, also if this fails."""
        run = _Running(number, True, blocks, np.arange(len(blocks.slots)), self._name(blocks), None)
        self._running[number] = run
        try:
            before = blocks.slots[self._held[blocks.slots]]
            self._held[before] = False
            self.engine.drop_blocks(self._keys[before])
            self._keys[blocks.slots] = run.keys
            run.ticket = self.engine.save_blocks(run.keys, blocks.block_ids, stream=stream)
        except KVortexError as error:
            log.warning("kvortex could not save %d blocks: %s", len(blocks.slots), told(error))
            run.failed = list(range(len(blocks.slots)))

    def load(self, number: int, blocks: Blocks, stream: Any = None) -> None:
        """Starts loading slots into pages, behind what is on ``stream``. What is not there fails, and its page stays as it is;
        what is not what was saved fails too, and its page may hold anything."""
        keys = self._name(blocks)
        there = self._there(blocks, keys)
        run = _Running(number, False, blocks, np.flatnonzero(there), keys[there], None, np.flatnonzero(~there).tolist())
        self._running[number] = run
        if run.failed:
            log.warning("kvortex: %d of %d blocks are gone, and must be computed", len(run.failed), len(there))
        try:
            if len(run.at):
                run.ticket = self.engine.load_blocks(run.keys, blocks.block_ids[run.at], stream=stream)
        except KVortexError as error:
            log.warning("kvortex could not load %d blocks: %s", len(run.at), told(error))
            run.failed = list(range(len(blocks.slots)))

    def good(self, blocks: Blocks) -> npt.NDArray[np.bool_]:
        """Which blocks are in their slots and undamaged, (n,) bool, by a look at all their bytes. Pages do not matter."""
        keys = self._name(blocks)
        good = self._there(blocks, keys)
        good[good] = undamaged(self.engine, keys[good])
        return good

    def _there(self, blocks: Blocks, keys: KeyArray) -> npt.NDArray[np.bool_]:
        """Into which slots just these blocks were saved, (n,) bool."""
        here = blocks.slots >= 0
        at = blocks.slots[here]
        there = np.zeros(len(here), bool)
        there[here] = self._held[at] & (self._keys[at] == keys[here]).all(axis=1)
        return there

    def held(self, slots: Int64s) -> npt.NDArray[np.bool_]:
        """Into which slots something was saved, (n,) bool."""
        return self._held[slots]

    def is_writing(self, slots: Int64s) -> bool:
        """Whether a save into one of these slots has not ended."""
        return any(run.saved and np.isin(slots, run.blocks.slots).any() for run in self._running.values())

    def poll(self) -> list[Done]:
        """What has ended since the last call. Never blocks."""
        ended = [run for run in list(self._running.values()) if run.ticket is None or run.ticket.done()]
        return [self._end(self._running.pop(run.number)) for run in ended]

    def _end(self, run: _Running) -> Done:
        failed = set(run.failed)
        if run.ticket is not None:
            mask = run.ticket.mask
            if run.saved:
                self._held[run.blocks.slots[mask]] = True
            failed.update(run.at[~mask].tolist())
            if run.ticket.error is not None:
                log.warning("kvortex: a %s failed: %s", run.ticket.kind, told(run.ticket.error))
        nbytes, seconds = (run.ticket.nbytes, run.ticket.seconds) if run.ticket is not None else (0, 0.0)
        return Done(run.number, run.saved, tuple(sorted(failed)), nbytes, seconds)

    def fence(self, numbers: Any, stream: Any = None) -> None:
        """Makes ``stream`` wait for transfers, or the caller where that is the stream. Unknown numbers have ended.

        Raises
        ------
        TransferTimeoutError
            They do not end: going on would overwrite pages that are still read, or written.
        """
        for number in numbers:
            run = self._running.get(number)
            if run is not None and run.ticket is not None:
                run.ticket.add_to(stream)

    def wait(self, numbers: Any) -> None:
        """Waits for transfers; as :meth:`fence`."""
        for number in numbers:
            run = self._running.get(number)
            if run is not None and run.ticket is not None:
                run.ticket.wait()

    def close(self) -> None:
        """Waits for what runs, and frees the pool."""
        started = time.monotonic()
        self.engine.shutdown()
        self._running.clear()
        log.info("kvortex's pool is freed after %.1f s", time.monotonic() - started)

    def _name(self, blocks: Blocks) -> KeyArray:
        width = blocks.names.shape[1]
        rows = np.empty((len(blocks.slots), width + _SLOT_BYTES), np.uint8)
        rows[:, :width] = blocks.names
        rows[:, width:] = blocks.slots.astype("<i8")[:, None].view(np.uint8)
        return adopt(self.engine.namespace, rows)
