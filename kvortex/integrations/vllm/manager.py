"""The spec's half beside vLLM's scheduler, without vLLM's classes: what is promised, and where it lies."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvortex.integrations.vllm.ledger import Ledger
from kvortex.integrations.vllm.messages import Int64s, rows_of

_LOOKED_AT_FOR_S = 1.0  # a request that waits for pages is looked up in every step; its blocks are not read each time


class Verifier(Protocol):
    """A worker of this process that can look at what it stored."""

    def check(self, slots: Int64s, names: npt.NDArray[np.uint8]) -> str:
        """``"good"``, ``"writing"`` while a save into the slots has not ended, or ``"bad"``."""


@dataclass(frozen=True)
class Place:
    """Chunks by slot and name, as manager and worker tell each other."""

    slots: Int64s
    names: npt.NDArray[np.uint8]


class Stores(NamedTuple):
    """What is to be stored of what was offered, where, and what had to go for it."""

    names: list[bytes]
    place: Place
    evicted: list[bytes]


class Change(NamedTuple):
    """Blocks that came or went, for vLLM's events."""

    names: list[bytes]
    removed: bool


class Manager:
    """Promises only what is in RAM of every rank, pinned from the promise on, and undamaged.

    vLLM ends its engine when a load fails that a spec has promised (vLLM issue 39732). So where the worker is in this process,
    bytes are looked at before a block is called a hit. Elsewhere they are trusted: a worker that finds a damaged block
    lets vLLM end.

    Parameters
    ----------
    ledger
        Its slots are chunks.
    verifier
        Gives the worker of this process, or None.
    events
        Whether anybody takes :meth:`take_changes`.
    """

    def __init__(self, ledger: Ledger, verifier: Callable[[], Verifier | None], events: bool) -> None:
        self.ledger, self._verifier = ledger, verifier
        self._changes: list[Change] | None = [] if events else None
        self._pins: dict[bytes, list[int]] = defaultdict(list)
        self._looked_at: dict[int, float] = {}

    def lookup(self, name: bytes) -> str:
        """``"hit"``, ``"pending"`` while it is being written, or ``"miss"``."""
        slot = self.ledger.slot_of(name)
        if slot is None:
            return "pending" if self.ledger.is_pending(name) else "miss"
        verifier = self._verifier()
        if verifier is None or self._looked_at.get(slot, 0.0) > time.monotonic():
            return "hit"
        found = verifier.check(np.array([slot]), rows_of([name]))
        if found == "good":
            self._looked_at[slot] = time.monotonic() + _LOOKED_AT_FOR_S
            return "hit"
        if found == "bad":
            self.ledger.drop([name])
            self._tell([name], removed=True)
        return "miss"

    def prepare_load(self, names: Sequence[bytes]) -> Place:
        """Pins blocks that are here, until :meth:`complete_load`."""
        slots = self.ledger.pin(names)
        for name, slot in zip(names, slots.tolist(), strict=True):
            self._pins[name].append(slot)
            self._looked_at.pop(slot, None)  # each load is promised on a look of its own
        return Place(slots, rows_of(names))

    def complete_load(self, names: Iterable[bytes]) -> None:
        """Their bytes have been read."""
        for name in names:
            if self._pins.get(name):
                self.ledger.unpin([self._pins[name].pop()])
                if not self._pins[name]:
                    del self._pins[name]

    def prepare_store(self, names: Sequence[bytes]) -> Stores | None:
        """Slots for blocks that are not here, and are admitted; None where none could be had."""
        names = list(dict.fromkeys(names))
        made = self.ledger.reserve(names)
        mine = [names[i] for i in made.positions.tolist()]
        missing = made.full and any(self.ledger.slot_of(each) is None and not self.ledger.is_pending(each) for each in names)
        if missing:
            return None
        for slot in made.slots.tolist():
            self._looked_at.pop(slot, None)
        self._tell(made.evicted, removed=True)
        return Stores(mine, Place(made.slots, rows_of(mine)), made.evicted)

    def complete_store(self, names: Iterable[bytes], success: bool) -> None:
        """Every rank has written these, or one could not."""
        if success:
            self._tell(self.ledger.commit(names), removed=False)
        else:
            self.ledger.abort(names)

    def reset(self) -> None:
        """Forgets all. vLLM waits for transfers that run before it starts others, and says nothing more of them."""
        self._tell(self.ledger.names(), removed=True)
        self.ledger.reset()
        self._pins.clear()
        self._looked_at.clear()

    def take_changes(self) -> list[Change]:
        """What came and went since the last call."""
        if not self._changes:
            return []
        taken, self._changes = self._changes, []
        return taken

    def _tell(self, names: list[bytes], *, removed: bool) -> None:
        if self._changes is not None and names:
            self._changes.append(Change(names, removed))
