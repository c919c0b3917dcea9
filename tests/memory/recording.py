"""A host device that keeps book of what is pinned, and refuses when told to."""

from __future__ import annotations

from kvortex.devices import HostDevice
from kvortex.errors import DeviceError


class RecordingDevice(HostDevice):
    """
    Attributes
    ----------
    pinned : dict
        Address to bytes of what is pinned now.
    log : list of (word, address)
    pins_before_refusal, allocations_before_refusal
        How many calls go well; None for all.
    """

    def __init__(self, pins_before_refusal: int | None = None, allocations_before_refusal: int | None = None) -> None:
        super().__init__()
        self.pinned: dict[int, int] = {}
        self.log: list[tuple[str, int]] = []
        self.pins_before_refusal, self.allocations_before_refusal = pins_before_refusal, allocations_before_refusal
        self.node: int | None = None
        self.refuses_to_undo = False

    def pin(self, address: int, nbytes: int) -> None:
        if self.pins_before_refusal is not None and len(self.pinned) >= self.pins_before_refusal:
            raise DeviceError("registration is forbidden here")
        assert address not in self.pinned and nbytes > 0
        self.pinned[address] = nbytes
        self.log.append(("pin", address))

    def unpin(self, address: int) -> None:
        self.log.append(("unpin", address))
        del self.pinned[address]
        if self.refuses_to_undo:
            raise DeviceError("the context is lost")

    def allocate_pinned(self, nbytes: int) -> int:
        if self.allocations_before_refusal is not None and len(self._pinned) >= self.allocations_before_refusal:
            raise DeviceError("no memory left")
        address = super().allocate_pinned(nbytes)
        self.log.append(("allocate", address))
        return address

    def free_pinned(self, address: int) -> None:
        self.log.append(("free", address))
        super().free_pinned(address)
        if self.refuses_to_undo:
            raise DeviceError("the context is lost")

    def numa_node(self) -> int | None:
        return self.node
