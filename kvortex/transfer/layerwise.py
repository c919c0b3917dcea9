"""Layer-wise saves: a transfer for each group of layers, started when a model has computed the last of them."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvortex.digests.host import add_lengths
from kvortex.errors import ArgumentError, LayersMissingError, TransferError, TransferTimeoutError, shown
from kvortex.transfer.executor import Completion, Part, poll
from kvortex.transfer.plan import Int64s
from kvortex.transfer.transfer import Call


class LayerSave(Completion):
    """A save that is told layer by layer what is there to be saved, in any order and by any thread.

    Each group starts with the announcement of its last layer, behind every stream on which one of its layers was announced.
    The save ends when all groups have; after an error, or :meth:`abort`, when those have that were started.

    There is no lock, so a finaliser or another thread may call anything in the middle of anything. What only one may do goes
    to whom ``dict.setdefault`` lets in, which is one step.

    Parameters
    ----------
    parts
        The transfer of each group, prepared.
    group_of : (L,) int64
        Group of each layer.
    sizes : (n,) int64
        Bytes of the records.
    """

    def __init__(self, parts: Sequence[Part], group_of: Int64s, sizes: Int64s | None = None) -> None:
        self._sizes = sizes
        self.route = parts[0].route
        self._parts, self._group_of = parts, group_of.tolist()
        self._layers: list[list[int]] = [np.flatnonzero(group_of == group).tolist() for group in range(len(parts))]
        self._announced: dict[int, weakref.ref[Call]] = {}  # layer to the call that announced it
        self._starters: dict[int, weakref.ref[Call] | None] = {}  # group to the call that starts it; None: it never will be
        self._verdict: dict[str, TransferError | None] = {}
        self._ended = False

    def start(self) -> None:
        """Nothing is issued before layers are announced."""
        self.started = True

    def cancel(self) -> None:
        self.abort(TransferError("the call was interrupted before any layer could be announced"))
        self.started = True

    def announce(self, layer: int, stream: Any, call: Call) -> None:
        """Takes down that ``layer`` is whole after what is on ``stream`` now; starts its group if it is the last one.

        Does nothing where the save has failed. An interrupt leaves the layer announced, or not, or the save failed.

        Parameters
        ----------
        layer
        stream
            Of the device; None for its default stream.
        call
            That this happens in. Once it is over, what it had not started never will be.

        Raises
        ------
        ArgumentError
            The layer was announced before.
        DeviceError
            The stream cannot be waited for. The layer is not announced.
        """
        if layer in self._announced:
            raise _twice(layer)
        if self._verdict:
            return
        group, mine = self._group_of[layer], weakref.ref(call)
        self._parts[group].follow(stream)  # before the layer counts, so that whoever starts the group waits for this stream
        if self._announced.setdefault(layer, mine) is not mine:
            raise _twice(layer)
        if self._is_whole(group) and self._starters.setdefault(group, mine) is mine:
            self._parts[group].start()

    def missing(self) -> tuple[int, ...]:
        if self._verdict:
            return ()
        return tuple(layer for layer in range(len(self._group_of)) if layer not in self._announced)

    def abort(self, error: TransferError) -> bool:
        return self._verdict.setdefault("error", error) is error

    def query(self) -> bool:
        if self._ended:
            return True
        self._cancel_lost()
        for part in self._parts:
            if part.started and part.query() and part.error is not None and self.abort(part.error):
                self._cancel_lost()
        if not all(part.started and part.query() for part in self._parts):
            return False
        first = next((part.error for part in self._parts if part.error is not None), None)
        self.error = self._verdict.setdefault("error", first)
        self.seconds = sum(part.seconds for part in self._parts)
        if len(self._parts) == 1:  # where there is a codec: it takes whole records
            self.unfit = self._parts[0].unfit
        sums = [part.sums for part in self._parts if part.sums is not None]
        if self._sizes is not None and len(sums) == len(self._parts):
            self.digests = add_lengths(np.add.reduce(sums), self._sizes)
        self._ended = True
        return True

    def add_to(self, stream: Any, timeout: float, layer: int | None = None) -> None:
        """See :meth:`Completion.add_to`; LayersMissingError where that would be a wait for what nobody has announced."""
        groups = range(len(self._parts)) if layer is None else (self._group_of[layer],)
        if missing := tuple(absent for absent in self.missing() if self._group_of[absent] in groups):
            raise layers_missing(missing)
        deadline = time.monotonic() + timeout
        for part in (self._parts[group] for group in groups):
            if not poll(functools.partial(self._is_issued, part), deadline):  # another thread is starting it
                raise TransferTimeoutError(f"layers of a save were not issued after {timeout} s")
            part.add_to(stream, timeout)

    def _is_issued(self, part: Part) -> bool:
        return part.started or self.query()

    def _is_whole(self, group: int) -> bool:
        return all(layer in self._announced for layer in self._layers[group])

    def _cancel_lost(self) -> None:
        for group, part in enumerate(self._parts):
            if self._is_lost(group) and not part.started:  # in this order: it may have just been started
                part.cancel()

    def _is_lost(self, group: int) -> bool:
        """Whether nobody will start this group any more, or its start was interrupted, or is over."""
        if group not in self._starters:
            stranded = self._is_whole(group) and all(_is_over(self._announced[layer]) for layer in self._layers[group])
            if not stranded and self._verdict.get("error") is None:
                return False
        starter = self._starters.setdefault(group, None)
        return starter is None or _is_over(starter)


def _is_over(reference: weakref.ref[Call]) -> bool:
    call = reference()
    return call is None or call.over


def _twice(layer: int) -> ArgumentError:
    return ArgumentError(f"layer {layer} was announced already: what it was then is saved, and nothing that came later")


def layers_missing(layers: tuple[int, ...]) -> LayersMissingError:
    """The error that names layers which were not announced."""
    error = LayersMissingError(f"layers {shown(list(layers))} were not announced: call save_layer for each, or abort")
    error.layers = layers
    return error
