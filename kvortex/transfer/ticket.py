"""Tickets: what a caller holds of a running transfer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from kvortex.arguments import integer, seconds
from kvortex.errors import ArgumentError, TransferError, TransferTimeoutError
from kvortex.transfer.executor import poll
from kvortex.transfer.transfer import Mask, Transfer


class Ticket:
    """A running save or load.

    A ticket may be dropped: the transfer goes on, and its engine settles it (makes saved blocks visible, releases
    loaded ones) at its next call. Until a save is done the caller must not overwrite its pages, and until a load is done
    it must not read them, unless its stream waits: :meth:`add_to`.
    """

    def __init__(
        self, transfer: Transfer, settle: Callable[[Transfer], bool], timeout: float, check_stream: Callable[[Any], None]
    ) -> None:
        self._transfer, self._settle, self._timeout, self._check_stream = transfer, settle, timeout, check_stream

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
        ArgumentError
            The timeout is no number of seconds.
        TransferTimeoutError
            The deadline passed. The transfer goes on; wait again.
        """
        allowed = self._timeout if timeout is None else seconds(timeout)
        if not poll(self.done, time.monotonic() + allowed):
            raise TransferTimeoutError(f"a {self.kind} of {self.nbytes} bytes was not done after {allowed} s")
        return self.mask

    def add_to(self, stream: Any) -> None:
        """Makes all later work of ``stream`` wait for the transfer, without blocking the caller.

        On the host device ``None`` stands for the calling thread itself, which then waits, at most ``transfer_timeout_s``.

        Raises
        ------
        ArgumentError
            It is no stream of the device, or cannot be waited for; also where nothing had to move.
        TransferTimeoutError
            On the host device, the deadline passed.
        """
        self._add_to(stream, None)

    def wait_layer(self, layer: int, stream: Any = None) -> None:
        """Makes all later work of ``stream`` wait until the pages hold one layer of what is loaded, at least.

        For a load that was asked for with ``layerwise=True``; of any other it waits for the whole. Does not block the
        caller, but where the caller itself is the stream: see :meth:`add_to`. Whether a page holds its block is only known
        once the ticket is done; so compute on blocks that :meth:`KVortexEngine.check_blocks` found, and look at
        :attr:`mask` before the result counts.

        Parameters
        ----------
        layer
            0 to the layout's ``num_layers`` - 1, in the order of the layout's tensors.
        stream
            As in :meth:`add_to`.

        Raises
        ------
        ArgumentError
            Of a save, of opaque buffers, and beyond the layers.
        """
        layers = self._transfer.layers
        if not layers:
            raise ArgumentError("wait_layer is for loads into pages of a layout; use add_to")
        self._add_to(stream, integer(layer, "layer", 0, layers - 1))

    def _add_to(self, stream: Any, layer: int | None) -> None:
        self.done()  # refuses in a forked child
        self._check_stream(stream)
        deadline = time.monotonic() + self._timeout
        for transfer in (self._transfer, *(save for save, _ in self._transfer.after)):
            if not poll(transfer.issued, deadline):  # a save that another thread is still preparing
                raise TransferTimeoutError(f"a {transfer.direction.value} was not issued after {self._timeout} s")
            if transfer.completion is not None:
                transfer.completion.add_to(stream, self._timeout, layer)

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
        """(n,) bool, one for each key of the call. Of a load: whether the page holds the block. Of a save: whether the
        block was in the cache already when the call was made, or was brought there by a transfer that has ended; another
        save may have evicted it since. Final once :meth:`done`; before, all False."""
        if not self.done():
            return np.zeros(len(self._transfer.mask), bool)
        return self._transfer.mask.copy()

    @property
    def error(self) -> TransferError | None:
        """Why blocks failed, once :meth:`done`; a block that was simply not there is no error."""
        return self._transfer.error if self.done() else None

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
        state = "done" if self._transfer.settled else "running"  # looks only: printing must not move anything
        return f"<Ticket {self.kind} of {len(self._transfer.mask)} blocks, {self.nbytes} bytes, {state}>"
