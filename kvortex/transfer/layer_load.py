"""Layer-wise loads whose first layers are on their way before the transfer of the others is planned.

Listing the copies of hundreds of blocks by layers takes the host longer than a layer takes on the link. So the first groups
of layers are a transfer of their own, issued at once where blocks are few runs of neighbours in the pool, and the rest is
planned while they move.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvortex.digests.host import add_lengths
from kvortex.errors import DeviceError, TransferError, TransferTimeoutError
from kvortex.transfer.executor import Completion, Part, poll
from kvortex.transfer.plan import Int64s
from kvortex.transfer.routes import Route


class LayerLoad(Completion):
    """A load of two parts, which ends when both have. Its ``seconds`` are those of both, without what was between them.

    Parameters
    ----------
    first
        The first layers, prepared.
    make_rest
        Prepares the others. Called once, when the first ones are on their way.
    layers
        How many layers are in ``first``.
    sizes : (n,) int64
        Bytes of the records; None where they are not digested.
    """

    def __init__(self, first: Part, make_rest: Callable[[], Part], layers: int, sizes: Int64s | None) -> None:
        self.route = first.route
        self._first, self._make_rest, self._layers, self._sizes = first, make_rest, layers, sizes
        self._rest: Part | None = None
        self._lost: TransferError | None = None  # why there never will be a rest
        self._ended = False

    def start(self) -> None:
        self._first.start()
        try:
            self._rest = self._make_rest()
            self._rest.start()
        except (DeviceError, TransferError, MemoryError) as error:  # bytes move: whoever called must have a ticket for them
            self._lost = TransferError(f"a load could not be issued beyond layer {self._layers - 1}: {error!r}")
            if self._rest is not None:
                self._rest.cancel()  # what is issued, or left to a thread, goes on
        self.started = True

    def cancel(self) -> None:
        if not self._first.started:
            self._first.cancel()
        if self._rest is None:
            self._lost = TransferError("the call was interrupted before all layers were issued")
        elif not self._rest.started:
            self._rest.cancel()
        self.started = True

    def query(self) -> bool:
        if self._ended:
            return True
        parts = [self._first] if self._rest is None else [self._first, self._rest]
        if len(parts) == 1 and self._lost is None:
            return False
        if not all([part.query() for part in parts]):
            return False
        self.seconds = sum(part.seconds for part in parts)
        self.error = next((error for error in (self._lost, *(part.error for part in parts)) if error is not None), None)
        sums = [part.sums for part in parts if part.sums is not None]
        if self.error is None and self._sizes is not None and len(sums) == len(parts):
            self.digests = add_lengths(np.add.reduce(sums), self._sizes)
        self._ended = True
        return True

    def add_to(self, stream: Any, timeout: float, layer: int | None = None) -> None:
        deadline = time.monotonic() + timeout
        # Kernels of a resident load are one behind another; staged ones have streams of their own, and who waits for a later
        # layer waits for some of these alone.
        if layer is None or layer < self._layers or self.route == Route.STAGED.value:
            self._first.add_to(stream, timeout, None if layer is None else min(layer, self._layers - 1))
        if layer is not None and layer < self._layers:
            return
        if not poll(self._is_known, deadline):  # another thread is planning it
            raise TransferTimeoutError(f"the last layers of a load were not planned after {timeout} s")
        if self._rest is not None:
            self._rest.add_to(stream, max(0.0, deadline - time.monotonic()), layer)

    def _is_known(self) -> bool:
        return self._rest is not None or self._lost is not None
