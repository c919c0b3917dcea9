"""What every tier can do: the contract between the cascade and a disk, a server or a store."""

from __future__ import annotations

import enum
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvortex.keys import KeyArray

Int64s = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint8]
Outcomes = npt.NDArray[np.uint8]


class Outcome(enum.IntEnum):
    """What became of one key in a batch. Whatever is not ``OK`` is a miss to who wanted the block."""

    OK = 0
    MISS = 1  # not there, or what is there belongs to somebody else, another version or another size
    CORRUPT = 2  # it is there, and is not what was stored; it was dropped
    FULL = 3  # no room, or not admitted
    TOO_LARGE = 4  # more than the tier takes
    FAILED = 5  # the disk or the server said no, or was not to be reached
    TIMEOUT = 6  # the deadline passed
    CANCELLED = 7


@dataclass(frozen=True)
class Call:
    """Terms of one call.

    Parameters
    ----------
    deadline
        ``time.monotonic()`` at which the call is to give up what is not done.
    cancelled
        Asked between steps; true gives up what has not begun.
    """

    deadline: float
    cancelled: Callable[[], bool] = lambda: False

    def left(self) -> float:
        """Seconds until the deadline, 0.0 when it has passed."""
        return max(0.0, self.deadline - time.monotonic())


class Fetched(NamedTuple):
    """What :meth:`Tier.get_into` found: for n keys (n,) uint8 outcomes, (n,) int64 bytes and (n, 16) uint8 digests.

    Sizes and digests of keys that are not ``OK`` are 0.
    """

    outcomes: Outcomes
    sizes: Int64s
    digests: Digests


def answer(outcomes: Outcomes) -> npt.NDArray[np.bool_] | None:
    """What :meth:`Tier.contains` gives where it found out so much about each key."""
    known = np.isin(outcomes, (Outcome.OK, Outcome.MISS)).all()
    return np.asarray(outcomes == Outcome.OK) if known else None


class Tier(ABC):
    """Where records rest under their keys. Thread-safe; calls block, and hold no GIL while they wait.

    A call never raises for what may happen to a disk or a server: it says so for each key. It may come back later than its
    deadline only where the system gives no way to give up (a read of a disk that has vanished), and never touches the
    buffers after it has come back.

    A tier is a cache: it may lose any record at any time, and what it hands out is exactly what was stored under that key in
    that namespace, checked by the digest in the record's header, or nothing.

    Attributes
    ----------
    name : str
        Of the kind, for metrics and messages: ``"disk"``, ``"redis"``, ``"s3"``.
    capacity_bytes : int or None
        None where somebody else bounds it.
    local : bool
        Whether :meth:`contains` is a look into this process's memory, which is asked on a caller's thread.
    most_bytes : int or None
        Of a payload, where the tier has slots of one size; None for what its record format says.
    """

    name: str
    capacity_bytes: int | None = None
    local: bool = False
    most_bytes: int | None = None

    @abstractmethod
    def contains(self, keys: KeyArray, call: Call) -> npt.NDArray[np.bool_] | None:
        """Which of n keys are there, (n,) bool; None where that cannot be found out, which counts as a failed call. Promises
        nothing about a later get."""

    @abstractmethod
    def get_into(self, keys: KeyArray, addresses: Int64s, room: Int64s, call: Call) -> Fetched:
        """Reads payloads into host memory, and checks them.

        Parameters
        ----------
        keys : (n, 32) uint8
        addresses : (n,) int64
            Where each payload is to lie; multiples of 4096, pinned. What is not ``OK`` may have been overwritten in part.
        room : (n,) int64
            Bytes there; a larger payload is a ``MISS``.
        call
        """

    @abstractmethod
    def put_from(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, call: Call) -> Outcomes:
        """Stores payloads; ``OK`` also for a key that was there already.

        Parameters
        ----------
        keys : (n, 32) uint8
        addresses, sizes : (n,) int64
            As in :meth:`get_into`; nobody writes there meanwhile.
        digests : (n, 16) uint8
            Of the payloads.
        call
        """

    @abstractmethod
    def delete(self, keys: KeyArray, call: Call) -> Outcomes:
        """Forgets keys: ``OK`` where one was there, ``MISS`` where none was."""

    def used_bytes(self) -> int | None:
        """Bytes of what is stored, headers and padding included; None where only somebody else knows."""
        return None

    def evictions(self) -> int:
        """Records that made room for others, since the start; 0 where somebody else evicts."""
        return 0

    @abstractmethod
    def probe(self, call: Call) -> str | None:
        """Whether it works: None, or what is wrong. Does what get and put do, with a record of its own."""

    @abstractmethod
    def close(self) -> None:
        """Ends threads and connections; what was stored stays where the tier keeps things. Twice does no harm."""
