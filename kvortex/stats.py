"""What an engine did so far."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from kvortex.tiers.metrics import TierStats
from kvortex.transfer.executor import Direction


@dataclass(frozen=True)
class RouteStats:
    """What moved one way by one route, in transfers that went well.

    Attributes
    ----------
    direction
        ``"save"`` or ``"load"``.
    route
        ``"resident"``, ``"staged"``, ``"strided"``, ``"batched"``, ``"mapped"``, ``"direct"``, or ``"host"``; see
        ``transfer_route``.
    transfers, blocks, nbytes
        Operations, blocks, and bytes of payload.
    seconds
        Device-timed, summed over transfers; those that overlap count their time each.
    """

    direction: str
    route: str
    transfers: int = 0
    blocks: int = 0
    nbytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of an engine's counters.

    Of a block that a codec with loss keeps in several slots, as it does the first of a sequence, each part counts as one, but
    in ``checked_blocks`` and ``hit_blocks``.

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
    declined_blocks
        Keys offered by ``save_blocks`` that were not stored, because ``admit_after`` asks for more offers.
    failed_blocks
        Blocks of transfers that the device failed.
    evictions
        Blocks that made room for others.
    resident_blocks, reserved_blocks, pinned_blocks, capacity_blocks
        Slots by state: holding a block, being written, being read, and all that are ready (see
        :meth:`kvortex.KVortexEngine.wait_ready`).
    corrupt_blocks
        Blocks that a load found to be no longer what was saved, by their digests. They were dropped.
    overlong_blocks
        Blocks of saves that the codec could not bring into a slot, and that so were not stored: see ``codec``. 0 without one.
    routes
        The same blocks, bytes and seconds by direction and route; only those that were used.
    tiers
        Of each tier below RAM, the fastest first: :class:`kvortex.tiers.TierStats`.
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
    routes: tuple[RouteStats, ...] = ()
    declined_blocks: int = 0
    corrupt_blocks: int = 0
    tiers: tuple[TierStats, ...] = ()
    overlong_blocks: int = 0

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
        self.checked = self.hit = self.missed = self.failed = self.declined = self.corrupt = self.too_long = 0
        self._routes: dict[tuple[Direction, str], RouteStats] = {}

    def check(self, asked: int, found: int) -> None:
        """One ``check_blocks``."""
        with self._lock:
            self.checked += asked
            self.hit += found

    def miss(self, blocks: int) -> None:
        """Blocks that a load did not find."""
        with self._lock:
            self.missed += blocks

    def decline(self, blocks: int) -> None:
        """Blocks that a save was not allowed to store."""
        with self._lock:
            self.declined += blocks

    def transfer(self, direction: Direction, route: str, blocks: int, nbytes: int, seconds: float) -> None:
        """One transfer that went well."""
        with self._lock:
            old = self._routes.get((direction, route), RouteStats(direction.value, route))
            self._routes[direction, route] = RouteStats(
                old.direction, route, old.transfers + 1, old.blocks + blocks, old.nbytes + nbytes, old.seconds + seconds
            )

    def fail(self, blocks: int) -> None:
        """One transfer that did not."""
        with self._lock:
            self.failed += blocks

    def damage(self, blocks: int) -> None:
        """Blocks that a load found to be others than were saved."""
        with self._lock:
            self.corrupt += blocks

    def overlong(self, blocks: int) -> None:
        """Blocks that a codec could not bring into their slots."""
        with self._lock:
            self.too_long += blocks

    def snapshot(
        self,
        evictions: int,
        resident: int,
        reserved: int,
        pinned: int,
        capacity: int,
        tiers: tuple[TierStats, ...] = (),
    ) -> EngineStats:
        """The totals, with the numbers of the index and of tiers."""
        with self._lock:
            routes = tuple(self._routes.values())
            checked, hit, missed, failed = self.checked, self.hit, self.missed, self.failed
            declined, corrupt, too_long = self.declined, self.corrupt, self.too_long
        saved = [entry for entry in routes if entry.direction == Direction.SAVE.value]
        loaded = [entry for entry in routes if entry.direction == Direction.LOAD.value]
        return EngineStats(
            checked_blocks=checked,
            hit_blocks=hit,
            saved_blocks=sum(entry.blocks for entry in saved),
            saved_bytes=sum(entry.nbytes for entry in saved),
            save_seconds=sum(entry.seconds for entry in saved),
            loaded_blocks=sum(entry.blocks for entry in loaded),
            loaded_bytes=sum(entry.nbytes for entry in loaded),
            load_seconds=sum(entry.seconds for entry in loaded),
            missed_blocks=missed,
            failed_blocks=failed,
            evictions=evictions,
            resident_blocks=resident,
            reserved_blocks=reserved,
            pinned_blocks=pinned,
            capacity_blocks=capacity,
            routes=routes,
            declined_blocks=declined,
            corrupt_blocks=corrupt,
            tiers=tiers,
            overlong_blocks=too_long,
        )
