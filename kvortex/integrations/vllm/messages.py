"""What scheduler and workers tell each other; pickled where they are different processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """Blocks to move, as the scheduler tells them to its workers.

    Attributes
    ----------
    slots : (n,) int64
        Of the ledger; -1 for a block that cannot be found, which then fails.
    names : (n, w) uint8
        What vLLM calls them.
    block_ids : (n,) int64
        Pages of the layout.
    """

    slots: Int64s
    names: npt.NDArray[np.uint8]
    block_ids: Int64s


@dataclass
class Done:
    """A transfer that has ended. ``failed`` are positions of blocks that did not move; their pages may hold anything."""

    number: int
    saved: bool
    failed: tuple[int, ...]
    nbytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """A transfer of one request's blocks; ``number`` is its name on both sides."""

    number: int
    request: str
    blocks: Blocks


@dataclass
class Orders:
    """What workers do in one step: ``fence`` first, the numbers of transfers whose pages are about to be used anew; then loads,
    and, behind the step's forward pass, saves."""

    fence: tuple[int, ...] = ()
    loads: list[Job] = field(default_factory=list)
    saves: list[Job] = field(default_factory=list)


@dataclass
class Report:
    """What workers say of a step: transfers that have ended, each with how many workers say so, and which positions failed on
    any of them."""

    ended: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def add(self, done: Done) -> None:
        """One more transfer of this worker."""
        self._merge(done.number, 1, done.failed)

    def merge(self, other: Report) -> None:
        """What another worker said too."""
        for number, (workers, failed) in other.ended.items():
            self._merge(number, workers, failed)

    def _merge(self, number: int, workers: int, failed: tuple[int, ...]) -> None:
        before, lost = self.ended.get(number, (0, ()))
        self.ended[number] = (before + workers, tuple(sorted({*lost, *failed})))

def rows_of(names: Any) -> npt.NDArray[np.uint8]:
    """Names as (n, w) uint8; shorter ones, such as there are none of in one batch of vLLM's, are filled with zeros."""
    width = max(map(len, names), default=1)
    joined = b"".join(bytes(name).ljust(width, b"\0") for name in names)
    return np.frombuffer(joined, np.uint8).reshape(-1, width).copy()
