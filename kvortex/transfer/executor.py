"""The contract of an executor: it carries transfers out, and a completion tells how each one goes."""

from __future__ import annotations

import enum
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from kvortex.errors import TransferError
from kvortex.transfer.plan import Int64s

_SPIN_S, _LONGEST_NAP_S = 100e-6, 1e-3


class Direction(enum.Enum):
    """``SAVE`` moves pages to slots, ``LOAD`` slots to pages."""

    SAVE = "save"
    LOAD = "load"


class Completion(ABC):
    """One issued transfer.

    Attributes
    ----------
    error : TransferError or None
        Set, once :meth:`query` is true, if the device failed.
    seconds : float
        Device-timed duration, once :meth:`query` is true.
    """

    error: TransferError | None = None
    seconds: float = 0.0

    @abstractmethod
    def query(self) -> bool:
        """Whether all bytes are where they belong, or never will be. Never blocks; once true, stays true."""

    @abstractmethod
    def add_to(self, stream: Any) -> None:
        """Makes later work of a stream wait for this transfer; never blocks the caller."""


class Failed(Completion):
    """A transfer that could not be issued: ended, with an error."""

    def __init__(self, error: TransferError) -> None:
        self.error = error

    def query(self) -> bool:
        return True

    def add_to(self, stream: Any) -> None:
        """Nothing to wait for."""


class Executor(ABC):
    """Issues transfers of one engine. Thread-safe. Transfers may overlap and finish in any order."""

    @abstractmethod
    def submit_blocks(self, direction: Direction, blocks: Int64s, slots: Int64s, stream: Any) -> Completion:
        """Moves pages ``blocks`` (n,) of the layout to or from ``slots`` (n,), n > 0, after the work on ``stream`` so far.

        A failure of the device is told by the completion.
        """

    @abstractmethod
    def submit_buffers(self, direction: Direction, addresses: Int64s, sizes: Int64s, slots: Int64s, stream: Any) -> Completion:
        """Moves contiguous buffers to or from ``slots``; all arrays (n,), n > 0. See :meth:`submit_blocks`."""

    @abstractmethod
    def check_stream(self, stream: Any) -> None:
        """Raises ArgumentError for what is no stream of this device."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the executor owns. Nothing may be in flight. A second call does nothing."""


def poll(ready: Callable[[], bool], deadline: float) -> bool:
    """Calls ``ready`` until it is true or ``time.monotonic()`` reaches the deadline; spins briefly, then naps."""
    nap, started = 20e-6, time.monotonic()
    while not ready():
        now = time.monotonic()
        if now >= deadline:
            return False
        if now - started > _SPIN_S:
            time.sleep(min(nap, deadline - now))
            nap = min(nap * 1.5, _LONGEST_NAP_S)
    return True
