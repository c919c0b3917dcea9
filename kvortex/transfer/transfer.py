"""One transfer as its engine sees it: what it holds, and what became of it."""

from __future__ import annotations

import weakref
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvortex.errors import TransferError
from kvortex.transfer.executor import Completion, Direction
from kvortex.transfer.plan import Int64s

KeyArray = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


class Call(Protocol):
    """The engine's call that a transfer is made in; ``over`` when it has returned or raised."""

    over: bool


class Transfer:
    """A transfer, registered before it takes anything, so that no interrupt can lose what it holds.

    Attributes
    ----------
    number : int
        Different for each transfer of an engine.
    direction
    slots : (n,) int64
        Of a load, what it pins, filled by the index in the step that pins; -1 for a miss. Of a save, see
        ``reservation``.
    once : (1,) uint8
        Set by the index in the step that gives the slots back.
    completion
        None where nothing had to move.
    payload, nbytes
        Bytes of pages or buffers that move, of each slot that it holds, (m,), and in all.
    layers
        Of a load into pages, and of a layer-wise save: layers of the layout. Else 0.
    ticket
        The caller's, by a weak reference; None until there is one.
    after
        Saves of other calls that bring blocks of this one, each with their positions in ``mask``; and of a load, its
        second part, which moves what has to be fetched from a tier first.
    saved
        Of a save whose blocks tiers below RAM are offered: keys and sizes, (n, 32) and (n,).
    keys : (n, 32) uint8, or None
        Of a save through a codec, which may be unable to bring some of its blocks into their slots.
    unfit, once_unfit : int, (1,) uint8
        How many these were; and set in the step that gives their slots back, which ``once`` does not stand for.
    fetched_bytes
        Payload of the second part, once that is issued.
    mask : (n,) bool
        Which blocks succeed, as far as known.
    error
        Why blocks failed; once ``settled``.
    corrupt
        Blocks of a load whose digests differ; once ``ended``.
    ended
        The slots were given back: saved blocks are visible, or aborted; loaded ones released.
    settled
        ``ended``, and so are the transfers of ``after``: ``mask`` and ``error`` are final.
    """

    def __init__(self, number: int, direction: Direction, call: Call, slots: Int64s) -> None:
        self.number, self.direction, self.slots = number, direction, slots
        self._call = weakref.ref(call)  # one that an interrupt kept from ever being over dies with its frame
        self.once, self.once_unfit = np.zeros(1, np.uint8), np.zeros(1, np.uint8)
        self.keys: KeyArray | None = None
        self.completion: Completion | None = None
        self.payload: Int64s = np.empty(0, np.int64)
        self.nbytes = self.layers = self.unfit = 0
        self.ticket: weakref.ref[object] | None = None
        self.after: list[tuple[Transfer, Int64s]] = []
        self.mask: Mask = np.ones(len(slots), bool)
        self.saved: tuple[KeyArray, Int64s] | None = None
        self.fetched_bytes = 0
        self.error: TransferError | None = None
        self.corrupt = 0
        self.ended = self.settled = False

    def moved(self) -> Int64s:
        """Positions in ``mask`` of the blocks that this transfer moves itself."""
        return np.flatnonzero(self.slots >= 0)

    def issued(self) -> bool:
        """Whether everything that will move is on its way, or nothing ever will be."""
        if self.completion is not None and self.completion.started:
            return True
        return self._is_called()

    def is_deserted(self) -> bool:
        """Whether nobody holds its ticket, or ever will."""
        return self._is_called() and (self.ticket is None or self.ticket() is None)  # in this order

    def _is_called(self) -> bool:
        """Whether the call that made it is over, or was lost."""
        call = self._call()
        return call is None or call.over
