"""Blocks that move again and again beside a computation."""

from __future__ import annotations

from typing import Any

import kvortex
from kvortex.devices import Device
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceUnavailableError
from perf.flow import tickets
from perf.pages import Ids, Pages, moved
from perf.report import progress
from perf.turns import Mover, Turns

# All buffers of a direction but one must last the link for longer than a kernel of 7 ms keeps that one; and a kernel that
# serves one should end within the last wave of a product, as a longer buffer's does not.
STAGING_BYTES, BUFFERS = 5 << 28, 5
BETTER = {"rate": "higher", "ratio": "higher", "slowdown": "lower"}
FIGURES = (*BETTER, "slowdown_least", "slowdown_most", "raw_rate", "raw_slowdown", "wrong_bytes")


def open_gpu(name: str) -> CudaDevice:
    """A device that something can compute on meanwhile. DeviceUnavailableError of another one."""
    device = kvortex.open_device(name)
    if not isinstance(device, CudaDevice):
        raise DeviceUnavailableError("this measurement needs a GPU")
    return device


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


def rows_of(turns: Turns, kind: Any, blocks: Blocks, named: dict[str, Any], what: str) -> list[dict[str, Any]]:
    """A row for each direction in which blocks of a kind took their turns: ``named``, and its figures. Checks pages behind
    loads, and tells each row as ``what``."""
    if (kind, "load") not in turns.failed:
        blocks.check()
    wrong = {"wrong_bytes": blocks.wrong_bytes}
    rows = [named | {"direction": way} | turns.figures(kind, way) | wrong for way in turns.ended(kind)]
    for row in rows:
        progress(f"{what}: {told(row)}")
    return rows


def told(row: dict[str, Any]) -> str:
    """A row while others are still measured."""
    return f"{row['direction']} {row['ratio']:.3f} at {row['slowdown']:.3f}; {row['wrong_bytes']} bytes wrong"
