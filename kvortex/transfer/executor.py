"""The contract of an executor: it carries transfers out, and a completion tells how each one goes."""

from __future__ import annotations

import enum
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.errors import TransferError
from kvortex.transfer.plan import Int64s

_SPIN_S, _LONGEST_NAP_S = 300e-6, 1e-3  # the shortest nap takes as long as a short transfer
_PART = 64  # of what was waited so far, a nap: who waits longer may oversleep longer


class Direction(enum.Enum):
    """``SAVE`` moves pages to slots, ``LOAD`` slots to pages."""

    SAVE = "save"
    LOAD = "load"


class Mark(ABC):
    """What was on a stream at one moment: the place of a stream for a load that is prepared later. Used once."""

    @abstractmethod
    def busy(self) -> bool:
        """Whether some of it is not done."""


class Completion(ABC):
    """One transfer: prepared, then started, then ended.

    Attributes
    ----------
    started : bool
        Whether :meth:`start` went through, or :meth:`cancel` did.
    error : TransferError or None
        Set, once :meth:`query` is true, if the device failed.
    seconds : float
        Device-timed duration, once :meth:`query` is true.
    digests : (n, 16) uint8, or None
        Digests of the records, once :meth:`query` is true and there is no :attr:`error`: of what was read from the pages, or
        was written there, computed while it moved. None where the executor does not digest.
    unfit : (n,) bool, or None
        Once :meth:`query` is true and there is no :attr:`error`, which records a codec could not bring into their slots, or
        out of them; None for none. Their digests mean nothing.
    route : str
        How the bytes travel, for the counters; the name of a :class:`kvortex.transfer.routes.Route`, or ``"host"``.
    """

    route: str = "none"
    started: bool = False
    error: TransferError | None = None
    seconds: float = 0.0
    digests: npt.NDArray[np.uint8] | None = None
    unfit: npt.NDArray[np.bool_] | None = None

    @abstractmethod
    def start(self) -> None:
        """Issues the transfer. Called once. A failure of the device is told by :attr:`error`, later.

        An exception that gets out of here (an interrupt) may leave all, some or nothing issued; :meth:`cancel` and
        :meth:`query` cope with each.
        """

    @abstractmethod
    def cancel(self) -> None:
        """For a transfer whose :meth:`start` never came back: what was not issued by now never will be."""

    @abstractmethod
    def query(self) -> bool:
        """Whether all bytes are where they belong, or never will be. Never blocks; once true, stays true."""

    @abstractmethod
    def add_to(self, stream: Any, timeout: float, layer: int | None = None) -> None:
        """Makes later work of a stream wait for this transfer, or for what it moves of one layer at least.

        Blocks only where the caller itself is the stream.
        """

    def missing(self) -> tuple[int, ...]:
        """Layers that nobody has announced yet, of a layer-wise save that still wants them."""
        return ()

    def abort(self, error: TransferError) -> bool:
        """Gives a layer-wise save up, with that error; whether that was in time. Anything else cannot be given up."""
        return False


class Part(Completion):
    """A transfer that can also be one group of a layer-wise save: the streams that it waits for come one by one.

    Attributes
    ----------
    sums : (n, 2) uint64, or None
        What its bytes add to digests, once it has ended well; see :func:`kvortex.digests.host.add_lengths`.
    """

    sums: npt.NDArray[np.uint64] | None = None

    @abstractmethod
    def follow(self, stream: Any) -> None:
        """Makes :meth:`start` wait for what is on ``stream`` now, too. Of a transfer that has ended, does nothing."""


class Failed(Completion):
    """A transfer that could not be prepared: ended, with an error."""

    started = True

    def __init__(self, error: TransferError) -> None:
        self.error = error

    def start(self) -> None:
        """Nothing to issue."""

    def cancel(self) -> None:
        """Nothing to take back."""

    def query(self) -> bool:
        return True

    def add_to(self, stream: Any, timeout: float, layer: int | None = None) -> None:
        """Nothing to wait for."""


class Executor(ABC):
    """Carries out the transfers of one engine. Thread-safe. Transfers may overlap and finish in any order."""

    @abstractmethod
    def prepare_blocks(
        self,
        direction: Direction,
        blocks: Int64s,
        slots: Int64s,
        stream: Any,
        layerwise: bool = False,
        parts: Int64s | None = None,
    ) -> Completion:
        """A transfer of pages ``blocks`` (n,) of the layout to or from ``slots`` (n,), n > 0.

        ``parts`` (n,) says which slots hold a part of a block that a codec keeps exactly, and which (from 0); -1 for whole
        records. None where all are.

        With ``layerwise`` the first layers of all blocks move before the last ones; of a save, each group of layers when they
        have been announced (:class:`kvortex.transfer.layerwise.LayerSave`).

        ``stream`` may be a :class:`Mark` of this executor, unless it is ``layerwise`` and a save.

        Nothing moves before :meth:`Completion.start`, and then after the work that is on ``stream`` at that moment.
        Preparing and starting are two steps so that the owner of the slots has the completion in hand before the first
        byte moves, whatever interrupts it.
        """

    @abstractmethod
    def prepare_buffers(self, direction: Direction, addresses: Int64s, sizes: Int64s, slots: Int64s, stream: Any) -> Completion:
        """Contiguous buffers to or from ``slots``; all arrays (n,), n > 0. See :meth:`prepare_blocks`."""

    @abstractmethod
    def mark(self, stream: Any) -> Mark:
        """What is on a stream now. DeviceError where the driver cannot record an event there."""

    @abstractmethod
    def check_stream(self, stream: Any) -> None:
        """Raises ArgumentError for what is no stream of this device, or cannot be waited for."""

    def hurry_all(self) -> None:
        """Holds no transfer back any more, also none that comes yet: the engine is to end."""
        return

    @abstractmethod
    def close(self) -> None:
        """Frees what the executor owns. Nothing may be in flight. A second call does nothing."""


def poll(ready: Callable[[], bool], deadline: float) -> bool:
    """Calls ``ready`` until it is true or ``time.monotonic()`` reaches the deadline; spins briefly, then naps."""
    started = time.monotonic()
    while not ready():
        now = time.monotonic()
        if now >= deadline:
            return False
        if now - started > _SPIN_S:
            time.sleep(min((now - started) / _PART, _LONGEST_NAP_S, deadline - now))
    return True
