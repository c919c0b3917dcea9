"""What the scheduler knows: which named block lies in which slot of every rank's pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvortex.errors import PoolFullError
from kvortex.index import NEW, BlockIndex, IndexCounts
from kvortex.keys import KeyArray, Namespace, adopt
from kvortex.keys.arrays import KEY_BYTES

Int64s = npt.NDArray[np.int64]


class Reserved(NamedTuple):
    """What :meth:`Ledger.reserve` made: positions of the names that got slots, these slots, and whose bytes lay there; and
    whether there was room for none."""

    positions: Int64s
    slots: Int64s
    evicted: list[bytes]
    full: bool = False


class Ledger:
    """Slots by name. The ranks' workers put and find bytes by slot, so what is here is true for all of them.

    A name is bytes that vLLM made: a block's hash, or its offload key. It is *pending* while ranks write it, and *here* when
    all have. The index decides what is evicted; beside it a dictionary holds the same, since vLLM asks for one name at a time.

    Parameters
    ----------
    slots
        Of each rank's pool, as few as the smallest has.
    policy, admit_after
        As in :class:`kvortex.KVortexConfig`.
    namespace
        What the blocks are of, but for the rank and the layout, which differ between ranks.
    """

    def __init__(self, slots: int, policy: str, admit_after: int, namespace: Namespace) -> None:
        self.slots, self._policy, self._admit_after, self._namespace = slots, policy, admit_after, namespace
        self.reset()

    def reset(self) -> None:
        """Forgets all, pins and reservations too. Nobody may use a slot that he was given before."""
        self._index = BlockIndex(self.slots, self._policy, admit_after=self._admit_after)
        self._here: dict[bytes, int] = {}
        self._pending: dict[bytes, int] = {}
        self._names: list[bytes | None] = [None] * self.slots  # what was put there last, gone or not

    def slot_of(self, name: bytes) -> int | None:
        """The slot of a block that can be loaded."""
        return self._here.get(name)

    def is_pending(self, name: bytes) -> bool:
        """Whether ranks are writing it."""
        return name in self._pending

    def run(self, names: Sequence[bytes]) -> int:
        """How many names from the first on are here without a gap."""
        for at, name in enumerate(names):
            if name not in self._here:
                return at
        return len(names)

    def names(self) -> list[bytes]:
        """All that are here."""
        return list(self._here)

    def reserve(self, names: Sequence[bytes]) -> Reserved:
        """Slots for those of n different names that are neither here nor pending, evicting others; as many as surely fit, from
        the first on, if not all do. Those that are here count as used."""
        try:
            return self._reserve(names)
        except PoolFullError:
            counts = self._index.counts()
            mine = sum(name in self._here for name in names)
            room = counts.free + counts.resident - counts.pinned - mine  # at least: some of mine may be pinned
            missing = [at for at, name in enumerate(names) if name not in self._here and name not in self._pending]
            if room < 1 or not missing:
                return Reserved(np.empty(0, np.int64), np.empty(0, np.int64), [], full=True)
            try:
                return self._reserve(names[: missing[min(room, len(missing)) - 1] + 1])
            except PoolFullError:
                return Reserved(np.empty(0, np.int64), np.empty(0, np.int64), [], full=True)

    def _reserve(self, names: Sequence[bytes]) -> Reserved:
        made = self._index.reserve(self._keys(names))
        positions = np.flatnonzero(made.status == NEW)
        slots, evicted = made.slots[positions], []
        for at, slot in zip(positions.tolist(), slots.tolist(), strict=True):
            before = self._names[slot]
            if before is not None and self._here.get(before) == slot:
                del self._here[before]
                evicted.append(before)
            self._names[slot] = names[at]
            self._pending[names[at]] = slot
        return Reserved(positions, slots, evicted)

    def commit(self, names: Iterable[bytes]) -> list[bytes]:
        """All ranks have written these: they are here. Those that are not pending are left out; the others are returned."""
        mine = [name for name in names if name in self._pending]
        self._index.commit([self._pending[name] for name in mine])
        for name in mine:
            self._here[name] = self._pending.pop(name)
        return mine

    def abort(self, names: Iterable[bytes]) -> None:
        """These were not written, by one rank at least."""
        mine = [name for name in names if name in self._pending]
        self._index.abort([self._pending.pop(name) for name in mine])

    def pin(self, names: Sequence[bytes]) -> Int64s:
        """Slots of names that must not be evicted until :meth:`unpin`; -1 for those that are not here."""
        return self._index.acquire(self._keys(names))

    def unpin(self, slots: Int64s | Sequence[int]) -> None:
        """Gives pins back; -1 is skipped."""
        self._index.release(slots)

    def touch(self, names: Sequence[bytes]) -> None:
        """These count as used."""
        here = list(dict.fromkeys(name for name in names if name in self._here))
        if here:
            self.unpin(self.pin(here))

    def drop(self, names: Iterable[bytes]) -> None:
        """Forgets names. A pinned slot is free again when its pins are."""
        mine = [name for name in names if self._here.pop(name, None) is not None]
        if mine:
            self._index.drop(self._keys(mine))

    def counts(self) -> IndexCounts:
        """Slots by state."""
        return self._index.counts()

    def _keys(self, names: Sequence[bytes]) -> KeyArray:
        return keys_of(self._namespace, names)


def keys_of(namespace: Namespace, names: Sequence[bytes]) -> KeyArray:
    """(n, 32) uint8: keys for vLLM's names."""
    keys = np.empty((len(names), KEY_BYTES), np.uint8)
    lengths = np.array([len(name) for name in names], np.int64)
    for length in np.unique(lengths):  # one, but for vLLM's keys of unfinished blocks
        at = np.flatnonzero(lengths == length)
        keys[at] = adopt(namespace, [names[i] for i in at.tolist()])
    return keys
