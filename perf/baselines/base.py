"""What every baseline has: pages, pinned memory for as many blocks as are moved, a clock, and how it is verified."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import numpy.typing as npt

from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceUnavailableError
from kvortex.memory.arena import PinnedArena
from perf.clock import Clock
from perf.methods import Method
from perf.pages import Pages, differing


class Baseline(Method):
    """What users would pick instead of kvortex.

    Parameters
    ----------
    pages
        Whose memory it moves, always ``pages.count`` blocks at a time.

    Attributes
    ----------
    host : PinnedArena
        Where the blocks go.
    clock : Clock

    Raises
    ------
    DeviceUnavailableError
        What it needs is not here; the message says what.
    """

    fragments_first = False  # whether a fragment of all blocks lies side by side in host memory, or a block's fragments
    clock: Clock

    def __init__(self, pages: Pages) -> None:
        self.pages, self.nbytes = pages, pages.moved
        self.require()
        self.host = PinnedArena(pages.device, pages.moved + 4095, pages.moved)
        try:
            self.open()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def require(self) -> None:
        """Raises DeviceUnavailableError for what is missing, before any memory is taken."""

    @abstractmethod
    def open(self) -> None:
        """Takes what is needed beside host memory."""

    def gpu(self) -> CudaDevice:
        """The GPU that has the pages."""
        if not isinstance(self.pages.device, CudaDevice):
            raise DeviceUnavailableError("needs a GPU")
        return self.pages.device

    def records(self) -> npt.NDArray[np.uint8]:
        """(64, n, fragment_bytes) view of host memory: each fragment of each block."""
        n, size = self.pages.count, self.pages.fragment_bytes
        whole = self.host.view(0, self.nbytes)
        return whole.reshape(-1, n, size) if self.fragments_first else whole.reshape(n, -1, size).swapaxes(0, 1)

    def check(self) -> int:
        """A save, against what is in the pages; then a load of other bytes, so that none of them can be left of the save."""
        before, records = self.pages.fill(), self.records()
        source, target = self.pages.halves()
        self.save(source)
        old = self.pages.view(before)
        wrong = differing(records, lambda at: old[at][source])
        np.invert(records, out=records)
        self.load(target)
        return wrong + self.pages.wrong_bytes(before, self.pages.memory.read(), source, target, records)

    def close(self) -> None:
        if hasattr(self, "clock"):  # else it never opened
            self.clock.close()
        self.host.close()
