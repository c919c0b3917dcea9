"""What an engine did so far."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from kvortex.transfer.executor import Direction


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of an engine's counters.

    Attributes
    ----------
    checked_blocks, hit_blocks
        Keys asked for by ``check_blocks``, and those of them that were there.
    saved_blocks, saved_bytes, save_seconds
        Blocks and payload bytes that moved to the pool, and their device-timed seconds: from the start of the first
        gather to the end of the last copy of each transfer, summed. Transfers that overlap count their time each.
    loaded_blocks, loaded_bytes, load_seconds
        The same for the way back.
    missed_blocks
        Keys asked for by ``load_blocks`` that were not there.
    failed_blocks
        Blocks of transfers that the device failed.
    evictions
        Blocks that made room for others.
    resident_blocks, reserved_blocks, pinned_blocks, capacity_blocks
        Slots by state: holding a block, being written, being read, and all.
    """

    checked_blocks: int
    hit_blocks: int
    saved_blocks: int
    saved_bytes: int
    save_seconds: float
    loaded_blocks: int
    loaded_bytes: int
    load_seconds: float
    missed_blocks: int
    failed_blocks: int
    evictions: int
    resident_blocks: int
    reserved_blocks: int
    pinned_blocks: int
    capacity_blocks: int

    @property
    def cache_hit_rate(self) -> float:
        """``hit_blocks / checked_blocks``, 0.0 before the first check."""
        return self.hit_blocks / self.checked_blocks if self.checked_blocks else 0.0

    @property
    def save_bytes_per_second(self) -> float:
        """Payload over device-timed seconds, 0.0 before the first save."""
        return self.saved_bytes / self.save_seconds if self.save_seconds else 0.0

    @property
    def load_bytes_per_second(self) -> float:
        """Payload over device-timed seconds, 0.0 before the first load."""
        return self.loaded_bytes / self.load_seconds if self.load_seconds else 0.0


class Counters:
    """Running totals; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finaliser that runs inside may count too
        self.checked = self.hit = self.missed = self.failed = 0
        self.blocks = dict.fromkeys(Direction, 0)
        self.bytes = dict.fromkeys(Direction, 0)
        self.seconds = dict.fromkeys(Direction, 0.0)

    def check(self, asked: int, found: int) -> None:
        """One ``check_blocks``."""
        with self._lock:
            self.checked += asked
            self.hit += found

    def miss(self, blocks: int) -> None:
        """Blocks that a load did not find."""
        with self._lock:
            self.missed += blocks

    def transfer(self, direction: Direction, blocks: int, nbytes: int, seconds: float) -> None:
        """One transfer that went well."""
        with self._lock:
            self.blocks[direction] += blocks
            self.bytes[direction] += nbytes
            self.seconds[direction] += seconds

    def fail(self, blocks: int) -> None:
        """One transfer that did not."""
        with self._lock:
            self.failed += blocks

    def snapshot(self, evictions: int, resident: int, reserved: int, pinned: int, capacity: int) -> EngineStats:
        """The totals, with the index's numbers."""
        save, load = Direction.SAVE, Direction.LOAD
        with self._lock:
            return EngineStats(
                checked_blocks=self.checked,
                hit_blocks=self.hit,
                saved_blocks=self.blocks[save],
                saved_bytes=self.bytes[save],
                save_seconds=self.seconds[save],
                loaded_blocks=self.blocks[load],
                loaded_bytes=self.bytes[load],
                load_seconds=self.seconds[load],
                missed_blocks=self.missed,
                failed_blocks=self.failed,
                evictions=evictions,
                resident_blocks=resident,
                reserved_blocks=reserved,
                pinned_blocks=pinned,
                capacity_blocks=capacity,
            )
