"""Reading what commands print, and a device whose memory cannot be seen."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.devices import DeviceBuffer, HostDevice
from kvortex.devices.host import HostBuffer


def rows(text: str) -> dict[str, str]:
    """Names and values of plain tables."""
    found = (re.fullmatch(r"  (\S.*?)  +(\S.*)", line) for line in text.splitlines())
    return {row[1]: row[2] for row in found if row}


class FarBuffer(DeviceBuffer):
    """RAM that shows itself by copies only, as VRAM does."""

    def __init__(self, nbytes: int) -> None:
        self._near = HostBuffer(nbytes)
        self.address, self.nbytes = self._near.address, nbytes
        self.copies = 0

    def write(self, data: npt.NDArray[Any], offset: int = 0) -> None:
        self.copies += 1
        self._near.write(data, offset)

    def read(self, offset: int = 0, nbytes: int | None = None) -> npt.NDArray[np.uint8]:
        self.copies += 1
        return self._near.read(offset, nbytes)

    def free(self) -> None:
        self._near.free()


class FarDevice(HostDevice):
    """The host device with :class:`FarBuffer`."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[FarBuffer] = []

    def allocate(self, nbytes: int) -> FarBuffer:  # type: ignore[override]
        self.buffers.append(FarBuffer(nbytes))
        return self.buffers[-1]
