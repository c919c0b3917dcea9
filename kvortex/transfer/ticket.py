"""Tickets: what a caller holds of a running transfer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.errors import TransferError, TransferTimeoutError
from kvortex.transfer.executor import Completion, Direction, poll
from kvortex.transfer.plan import Int64s

Mask = npt.NDArray[np.bool_]


@dataclass(eq=False)
class Transfer:
    """One transfer as its engine sees it.

    Attributes
    ----------
    direction
    mask : (n,) bool
        Which blocks of the call succeed, as far as known; blocks of ``moved`` turn False when the transfer fails.
    completion
        None where nothing had to move.
    moved : (m,) int64
        Positions in ``mask`` of the blocks that move.
    slots : (m,) int64
        Their slots: reserved for a save, pinned for a load.
    nbytes
        Payload.
    after
        Saves of others that this call's blocks depend on, with the positions in ``mask``.
    """

    direction: Direction
    mask: Mask
    completion: Completion | None = None
    moved: Int64s = field(default_factory=lambda: np.empty(0, np.int64))
    slots: Int64s = field(default_factory=lambda: np.empty(0, np.int64))
    nbytes: int = 0
    after: list[tuple[Transfer, int, int]] = field(default_factory=list)  # (save, position here, position there)
    settled: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Ticket:
    """A running save or load.

    A ticket may be dropped: the transfer goes on, and its engine settles it (makes saved blocks visible, releases
    loaded ones) at its next call. Until a save is done the caller must not overwrite its pages, and until a load is done
    it must not read them, unless its stream waits: :meth:`add_to`.
    """

    def __init__(self, transfer: Transfer, settle: Callable[[Transfer], bool], timeout: float) -> None:
        self._transfer, self._settle, self._timeout = transfer, settle, timeout

    def done(self) -> bool:
        """Whether the transfer has ended, well or not. Never blocks."""
        return self._settle(self._transfer)

    def wait(self, timeout: float | None = None) -> Mask:
        """Waits for the end of the transfer.

        Parameters
        ----------
        timeout
            Seconds; None for the engine's ``transfer_timeout_s``.

        Returns
        -------
        (n,) bool
            :attr:`mask`.

        Raises
        ------
        TransferTimeoutError
            The deadline passed. The transfer goes on; wait again.
        """
        seconds = self._timeout if timeout is None else timeout
        if not poll(self.done, time.monotonic() + seconds):
            raise TransferTimeoutError(f"a {self.kind} of {self.nbytes} bytes was not done after {seconds} s")
        return self.mask

    def add_to(self, stream: Any) -> None:
        """Makes all later work of ``stream`` wait for the transfer, without blocking the caller.

        On the host device ``None`` stands for the calling thread itself, which then waits.
        """
        for transfer in (self._transfer, *(entry[0] for entry in self._transfer.after)):
            if transfer.completion is not None:
                transfer.completion.add_to(stream)

    def __await__(self) -> Generator[Any, None, Mask]:
        return self._poll_async().__await__()

    async def _poll_async(self) -> Mask:
        deadline, nap = time.monotonic() + self._timeout, 50e-6
        while not self.done():
            if time.monotonic() >= deadline:
                raise TransferTimeoutError(f"a {self.kind} of {self.nbytes} bytes was not done after {self._timeout} s")
            await asyncio.sleep(nap)
            nap = min(nap * 1.5, 2e-3)
        return self.mask

    @property
    def kind(self) -> str:
        """``"save"`` or ``"load"``."""
        return self._transfer.direction.value

    @property
    def mask(self) -> Mask:
        """(n,) bool, one for each key of the call: of a load, whether the page holds the block; of a save, whether the
        block is in the cache. Final once :meth:`done`; before, all False."""
        if not self.done():
            return np.zeros(len(self._transfer.mask), bool)
        return self._transfer.mask.copy()

    @property
    def error(self) -> TransferError | None:
        """Why blocks failed, once :meth:`done`; a block that was simply not there is no error."""
        completion = self._transfer.completion
        return completion.error if completion is not None and self.done() else None

    @property
    def nbytes(self) -> int:
        """Payload bytes that this transfer moves; 0 where everything was there already, or nothing was."""
        return self._transfer.nbytes

    @property
    def seconds(self) -> float:
        """Time that the device took, from its own events, in seconds; 0.0 until :meth:`done`."""
        completion = self._transfer.completion
        return completion.seconds if completion is not None and self.done() else 0.0

    def __repr__(self) -> str:
        state = "done" if self.done() else "running"
        return f"<Ticket {self.kind} of {len(self._transfer.mask)} blocks, {self.nbytes} bytes, {state}>"
