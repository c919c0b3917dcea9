"""Blocks that move again and again beside a computation."""

from __future__ import annotations

from typing import Any

import kvortex
from kvortex.devices import Device
from perf.flow import tickets
from perf.pages import Ids, Pages, moved
from perf.turns import Mover

# All buffers of a direction but one must last the link for longer than a kernel of 7 ms keeps that one; and a kernel that
# serves one should end within the last wave of a product, as a longer buffer's does not.
STAGING_BYTES, BUFFERS = 5 << 28, 5


class Blocks:
    """Blocks of fragments of one length, and an engine that moves them.

    Parameters
    ----------
    device, fragment_bytes, payload
        As of :class:`perf.pages.Pages`.
    options
        Of the engine.

    Attributes
    ----------
    wrong_bytes : int
        Of a round trip, and of what :meth:`check` was called for.
    """

    def __init__(self, device: Device, fragment_bytes: int, payload: int, **options: Any) -> None:
        staging = {"gpu_pool_size_bytes": STAGING_BYTES, "staging_buffers": BUFFERS}
        options = {"beside_compute": True, **staging, **options}
        self._pages = Pages(device, fragment_bytes, payload, sets=3, **options)
        self.wrong_bytes = self._pages.round_trip()
        self._before = self._pages.memory.read()
        self._source, self._target = self._pages.halves()
        self._saved: Ids = self._pages.keys()
        self.close = self._pages.close

    def save(self) -> kvortex.Ticket:
        """Starts a save by keys that are new."""
        return self._pages.engine.save_blocks(self._pages.keys(), self._source)

    def load(self) -> kvortex.Ticket:
        """Starts a load of what :meth:`save_again` saved."""
        return self._pages.engine.load_blocks(self._saved, self._target)

    def save_again(self) -> None:
        """Before loads: other saves have evicted what was to be loaded."""
        self._saved = self._pages.keys()
        moved(self._pages.engine.save_blocks(self._saved, self._source))

    def check(self) -> None:
        """Behind loads: adds to ``wrong_bytes`` what the last one did not bring, or changed elsewhere."""
        after = self._pages.memory.read()
        self.wrong_bytes += self._pages.wrong_bytes(self._before, after, self._source, self._target)

    def movers(self) -> tuple[Mover, Mover]:
        """Of saves and of loads."""
        return Mover(tickets(self.save)), Mover(tickets(self.load), self.save_again)
