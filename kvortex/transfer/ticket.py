"""Tickets: what a caller holds of a running transfer."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from kvortex.arguments import integer, seconds
from kvortex.errors import ArgumentError, TransferError, TransferTimeoutError, shown
from kvortex.transfer.executor import Direction, poll
from kvortex.transfer.layerwise import LayerSave, layers_missing
from kvortex.transfer.transfer import Call, Mask, Transfer


class Ticket:
    """A running save or load.

    Of a layer-wise save a model's loop calls :meth:`save_layer` behind each layer, and :meth:`add_to` or :meth:`wait` at its
    end; :meth:`abort` where it could not go on. These are vLLM's ``save_kv_layer`` and ``wait_for_save``.

    A ticket may be dropped: the transfer goes on (a layer-wise save only if all layers have been announced), and its engine
    settles it (makes saved blocks visible, releases loaded ones) at its next call. Until a save is done the caller must not
    overwrite its pages, and until a load is done it must not read them, unless its stream waits: :meth:`add_to`.
    """

    def __init__(
        self,
        transfer: Transfer,
        settle: Callable[[Transfer], bool],
        timeout: float,
        check_stream: Callable[[Any], None],
        feed: Callable[[], AbstractContextManager[Call]],
        stream: Any = None,
        whole: Callable[[Mask], Mask] | None = None,
    ) -> None:
        self._whole = whole
        self._transfer, self._settle, self._timeout, self._check_stream = transfer, settle, timeout, check_stream
        self._feed, self._stream = feed, stream
        transfer.ticket = weakref.ref(self)

    def done(self) -> bool:
        """Whether the transfer has ended, well or not. Never blocks."""
        return self._settle(self._transfer)

    def save_layer(self, layer: int, stream: Any = None) -> None:
        """Says that the pages hold one layer of the blocks, as soon as what is on ``stream`` now is done.

        For a save that was asked for with ``layerwise=True``. Each layer is announced once, in any order and by any thread.
        Layers are saved in groups: with the last layer of a group all of its bytes are on their way, behind every stream
        that was named for one of its layers. Returns at once. The pages of a layer must not be overwritten before it is
        saved: see :meth:`wait_layer`.

        Does nothing where no block has to be moved, and where the save has failed: :attr:`error` tells. After an interrupt
        :attr:`missing_layers` says whether the layer was announced; the save may also have failed.

        Parameters
        ----------
        layer
            0 to the layout's ``num_layers`` - 1, in the order of the layout's tensors.
        stream
            As in :meth:`KVortexEngine.save_blocks`; None for the one that was given there.

        Raises
        ------
        ArgumentError
            The layer was announced before, or does not exist; it is no layer-wise save; or no stream of the device.
        DeviceError
            The driver cannot record an event on the stream. The layer is not announced.
        EngineClosedError
        """
        with self._feed() as call:
            layers = self._layers_to_save()
            number = integer(layer, "layer", 0, layers - 1)
            chosen = self._stream if stream is None else stream
            self._check_stream(chosen)
            completion = self._transfer.completion
            if isinstance(completion, LayerSave):
                completion.announce(number, chosen, call)

    def abort(self) -> bool:
        """Gives a layer-wise save up, as after a forward pass that failed: none of its blocks becomes visible.

        What is on its way goes on, and the slots are free when that has ended; :meth:`wait` waits for it.

        Returns
        -------
        bool
            False where the save had ended before, or had nothing to move.

        Raises
        ------
        ArgumentError
            It is no layer-wise save.
        EngineClosedError
        """
        with self._feed():
            self._layers_to_save()
            completion = self._transfer.completion
            return completion is not None and completion.abort(TransferError("the save was aborted by its caller"))

    @property
    def missing_layers(self) -> tuple[int, ...]:
        """Layers that :meth:`save_layer` was not called for, ascending; empty where that makes no difference any more."""
        completion = self._transfer.completion
        return completion.missing() if completion is not None else ()

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
        LayersMissingError
            Layers of this save have not been announced, at once.
        TransferTimeoutError
            The deadline passed. The transfer goes on; wait again.
        """
        allowed = self._timeout if timeout is None else seconds(timeout)
        self._check_announced()
        if not poll(self.done, time.monotonic() + allowed):
            raise self._late(allowed)
        return self.mask

    def add_to(self, stream: Any) -> None:
        """Makes all later work of ``stream`` wait for the transfer, without blocking the caller.

        On the host device ``None`` stands for the calling thread itself, which then waits, at most ``transfer_timeout_s``.

        Raises
        ------
        ArgumentError
            It is no stream of the device, or cannot be waited for; also where nothing had to move.
        LayersMissingError
            Layers of this save have not been announced, or of a save that brings blocks of this one.
        TransferTimeoutError
            On the host device, the deadline passed.
        """
        self._add_to(stream, None)

    def wait_layer(self, layer: int, stream: Any = None) -> None:
        """Makes all later work of ``stream`` wait until the pages hold one layer of what is loaded, at least; or, of a
        layer-wise save, until one layer at least is saved and its pages may be overwritten.

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
            Of any other save, of opaque buffers, and beyond the layers.
        LayersMissingError
            Layers that are saved together with this one have not been announced.
        """
        layers = self._transfer.layers
        if not layers:
            raise ArgumentError("wait_layer is for loads into pages of a layout, and for layer-wise saves; use add_to")
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
        self._check_announced()
        while not self.done():
            if time.monotonic() >= deadline:
                raise self._late(self._timeout)
            await asyncio.sleep(nap)
            nap = min(nap * 1.5, 2e-3)
        return self.mask

    def _layers_to_save(self) -> int:
        if self._transfer.direction is not Direction.SAVE or not self._transfer.layers:
            raise ArgumentError("only a save that was asked for with layerwise=True takes layers, or can be aborted")
        return self._transfer.layers

    def _check_announced(self) -> None:
        """Refuses to wait for what only the caller could bring about."""
        if not self.done() and (missing := self.missing_layers):
            raise layers_missing(missing)

    def _late(self, allowed: float) -> TransferTimeoutError:
        what = f"a {self.kind} of {self.nbytes} bytes was not done after {allowed} s"
        for save, _ in self._transfer.after:
            if save.completion is not None and (missing := save.completion.missing()):
                what += f"; it waits for another save, whose layers {shown(list(missing))} were not announced"
        return TransferTimeoutError(what)

    @property
    def kind(self) -> str:
        """``"save"`` or ``"load"``."""
        return self._transfer.direction.value

    @property
    def mask(self) -> Mask:
        """(n,) bool, one for each key of the call. Of a load: whether the page holds the block. Of a save: whether the
        block was in the cache already when the call was made, or was brought there by a transfer that has ended; another
        save may have evicted it since. False without an :attr:`error` says that the block was not admitted, having been
        offered less often than ``admit_after``, that it was on its way from a tier below just then, or that the codec
        could not bring it into a slot. Final once :meth:`done`; before, all False."""
        mask = self._transfer.mask.copy() if self.done() else np.zeros(len(self._transfer.mask), bool)
        return mask if self._whole is None else self._whole(mask)

    @property
    def found(self) -> Mask:
        """(n,) bool, one for each key of a load: which blocks were in RAM when it was called. Known as soon as there is a
        ticket, so that a model can be told to go on behind them without asking before; they stay there until the load has
        ended. What a tier below may have is not among them, and :attr:`mask` has the last word.

        Raises
        ------
        ArgumentError
            Of a save.
        """
        if self._transfer.direction is not Direction.LOAD:
            raise ArgumentError("found is for loads: what a save finds in the cache its mask tells when it is done")
        found = self._transfer.slots >= 0
        return found if self._whole is None else self._whole(found)

    @property
    def error(self) -> TransferError | None:
        """Why blocks failed, once :meth:`done`; a block that was simply not there is no error."""
        return self._transfer.error if self.done() else None

    @property
    def nbytes(self) -> int:
        """Payload bytes that this transfer moves; 0 where everything was there already, or nothing was. What is fetched from
        a tier below RAM counts once its way into the pages has begun."""
        return self._transfer.nbytes + self._transfer.fetched_bytes

    @property
    def seconds(self) -> float:
        """Time that the device took, from its own events, in seconds; 0.0 until :meth:`done`."""
        completion = self._transfer.completion
        return completion.seconds if completion is not None and self.done() else 0.0

    def __repr__(self) -> str:
        state = "done" if self._transfer.settled else "running"  # looks only: printing must not move anything
        count = len(self._transfer.mask if self._whole is None else self._whole(self._transfer.mask))
        return f"<Ticket {self.kind} of {count} blocks, {self.nbytes} bytes, {state}>"
