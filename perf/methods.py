"""What a measurement compares: ways to bring blocks to pinned memory and back, behind one small interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from perf.pages import Ids, Pages, moved
from perf.raw import RawCopy


class Method(ABC):
    """A way to move blocks.

    Attributes
    ----------
    name, how : str
        In tables, and in a sentence.
    nbytes : int
        What one call moves.
    """

    name: ClassVar[str]
    how: ClassVar[str]
    nbytes: int

    @abstractmethod
    def save(self, blocks: Ids) -> float:
        """Moves pages to host memory, waits for the end, and gives the device's seconds for it."""

    @abstractmethod
    def load(self, blocks: Ids) -> float:
        """Moves what was saved last to other pages, as many; likewise."""

    @abstractmethod
    def check(self) -> int:
        """Bytes that do not arrive in a save, and in a load."""

    @abstractmethod
    def close(self) -> None:
        """Frees what it owns."""


class Raw(Method):
    """The floor; it leaves the pages where they are."""

    name = "raw"
    how = "one contiguous DMA of as many bytes"

    def __init__(self, raw: RawCopy) -> None:
        self._raw, self.nbytes = raw, raw.nbytes

    def save(self, blocks: Ids) -> float:
        return self._raw.seconds(to_host=True)

    def load(self, blocks: Ids) -> float:
        return self._raw.seconds(to_host=False)

    def check(self) -> int:
        return self._raw.wrong_bytes()

    def close(self) -> None:
        self._raw.close()


class Kvortex(Method):
    """The engine over the pages, by the whole public call."""

    name = "kvortex"
    how = "save_blocks and load_blocks of an engine, each waited for"

    def __init__(self, pages: Pages) -> None:
        self._pages, self.nbytes = pages, pages.moved
        self._keys = pages.keys()

    def save(self, blocks: Ids) -> float:
        self._keys.view(np.int64)[:, 0] += 1  # other keys; drawing random ones would take longer than some calls do
        return moved(self._pages.engine.save_blocks(self._keys, blocks)).seconds

    def load(self, blocks: Ids) -> float:
        return moved(self._pages.engine.load_blocks(self._keys, blocks)).seconds

    def check(self) -> int:
        return self._pages.round_trip()

    def close(self) -> None:
        """Nothing: the pages own the engine."""
