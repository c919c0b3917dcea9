"""What an engine owns, made and freed as one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvortex.codecs import Codec
from kvortex.config import KVortexConfig
from kvortex.devices import Device
from kvortex.devices.cuda import CudaDevice
from kvortex.digests.kept import load_compiled as load_compiled_digests
from kvortex.digests.keys import DIGEST_BYTES
from kvortex.errors import TransferTimeoutError
from kvortex.flight import Flight
from kvortex.index import BlockIndex, load_compiled
from kvortex.keys import load_compiled as load_compiled_keys
from kvortex.layout import KVLayout
from kvortex.memory.arena import PinnedArena
from kvortex.stats import Counters
from kvortex.tiers.cascade import Cascade
from kvortex.tiers.room import Room
from kvortex.tiers.urls import OpenTier
from kvortex.transfer.executor import Executor
from kvortex.transfer.plan import Pool
from kvortex.transfer.profiles.profile import Profile
from kvortex.transfer.routes import Route

_LONGEST_EXIT_S = 5.0  # that the end of a process waits for tiers
_CLOSING_SHARE = 0.2  # of the time for an end, which calls that run have to come back
_HOST_THREADS = 2  # of each direction, unless num_transfer_streams says how many
_CODED_TIMES, _CODED_PART = 4, 64


class Parts:
    """What an engine owns, apart from the engine itself, so that it can be freed when the engine is dropped."""

    def __init__(
        self,
        config: KVortexConfig,
        layout: KVLayout | None,
        device: Device,
        record_bytes: int,
        tiers: Sequence[OpenTier] = (),
        codec: Codec | None = None,
    ) -> None:
        self.pid = os.getpid()
        self.record_bytes = record_bytes
        self.layout = layout  # running transfers touch its tensors: they must outlive the engine's last transfer
        notes: list[str] = []
        profile = _profile(config, device, notes)  # before threads fill the pool, which would be measured as well
        with contextlib.ExitStack() as undo:
            self.arena = PinnedArena(device, config.cpu_pool_size_bytes, record_bytes, numa=config.enable_numa)
            undo.callback(self.arena.close)
            self.arena.notes.extend(notes)
            self.executor = _executor(config, layout, device, self.arena, profile, codec)
            undo.callback(self.executor.close)
            load_compiled()
            load_compiled_keys()
            load_compiled_digests()
            policy, admit_after = config.eviction_policy, config.admit_after
            self.index = BlockIndex(self.arena.slots, policy, admit_after=admit_after, ready=self.arena.ready)
            self.counters = Counters()
            self.digests = None
            if config.digests:  # (slots, 16) uint8: of the block in each slot that is resident
                self.digests = np.zeros((self.arena.slots, DIGEST_BYTES), np.uint8)
            numbers = itertools.count(1)
            self.cascade = self._cascade(tiers, numbers, config.tier_pool_share) if tiers else None
            saved = None
            if self.cascade is not None:
                undo.callback(self.cascade.close, time.monotonic() + _LONGEST_EXIT_S)
                saved = self.cascade.offer
            self.flight = Flight(self.index, self.counters, self.digests, saved, numbers)
            undo.pop_all()

    def _cascade(self, tiers: Sequence[OpenTier], numbers: Iterator[int], share: float) -> Cascade:
        number = functools.partial(next, numbers)
        room = Room(self.index, self.arena.address, self.arena.slot_bytes, self.digests, number, share)
        return Cascade(tiers, room)

    def grow(self) -> None:
        """Gives the index the slots that have become ready. Twice does no harm."""
        if self.arena.ready != self.index.ready:
            self.index.grow(self.arena.ready)

    def wait_for_more(self, timeout: float) -> bool:
        """Whether the index got slots that it did not have, now or after a wait."""
        before = self.index.ready
        self.arena.wait(before + 1, timeout)
        self.grow()
        return self.index.ready > before

    def abandon(self, timeout: float) -> None:
        """When the engine is no longer reachable: frees at once, or in the background when transfers still run.

        The collector may bring us here in any thread, also in one that the transfers need to end.
        """
        ending = not threading.main_thread().is_alive()  # the interpreter is: it starts no threads, or does not wait for them
        if self.pid == os.getpid() and not ending and (self.flight.drain(0.0) or not self._is_quiet()):
            threading.Thread(target=self.dispose, args=(timeout,), name="kvortex-dispose", daemon=True).start()
        else:
            self.dispose(min(timeout, _LONGEST_EXIT_S) if ending and self.cascade is not None else timeout)

    def end(self, timeout: float) -> str:
        """Waits for the end of all transfers, and closes the tiers when they have what waits for them, or most of the time
        is over. Empty, or what still runs, while which nothing may be freed."""
        deadline = time.monotonic() + timeout
        if self.cascade is not None:
            self.cascade.stop_fetching()
        self.executor.hurry_all()
        if left := self.flight.drain(timeout):
            return f"{left} transfers are still running"
        if self.cascade is not None and not self.cascade.closed:
            self.cascade.flush(deadline - _CLOSING_SHARE * (deadline - time.monotonic()))
            if left := self.cascade.close(deadline):
                return f"{left} calls of tiers below RAM are still running"
        return ""

    def _is_quiet(self) -> bool:
        """Whether there are no tiers to wait for."""
        return self.cascade is None or self.cascade.closed

    def dispose(self, timeout: float) -> None:
        """Frees everything, unless a transfer does not end: then its memory is leaked rather than written after free."""
        if self.pid != os.getpid():
            return
        try:
            left = self.end(timeout)
        except BaseException:  # an interrupt: what runs is not known
            _KEPT.append(self)
            raise
        if left:
            _KEPT.append(self)
            return
        with contextlib.ExitStack() as then:
            then.callback(self.arena.close)
            try:
                self.executor.close()
            except TransferTimeoutError:  # a thread of its own still writes
                then.pop_all()
                _KEPT.append(self)
                raise


_KEPT: list[Parts] = []  # of engines that are gone, whose transfers would not end


def _profile(config: KVortexConfig, device: Device, notes: list[str]) -> Profile | None:
    """What transfers on a GPU are shaped by; None for the host device."""
    if not isinstance(device, CudaDevice):
        return None
    from kvortex.transfer.profiles.calibrate import profile_for

    return _overridden(profile_for(device, config.calibrate, notes), config)


def _executor(
    config: KVortexConfig,
    layout: KVLayout | None,
    device: Device,
    arena: PinnedArena,
    profile: Profile | None,
    codec: Codec | None,
) -> Executor:
    pool = Pool(arena.address, arena.slot_bytes, arena.segment_slots)
    fragments: npt.NDArray[np.int64] = np.empty((0, 4), np.int64) if layout is None else layout.fragments
    layer_offsets: npt.NDArray[np.int64] = np.zeros(1, np.int64) if layout is None else layout.layer_offsets
    if isinstance(device, CudaDevice) and profile is not None:
        from kvortex.transfer.cuda import CudaExecutor

        route = None if config.transfer_route == "auto" else Route(config.transfer_route)
        blocks = 0 if layout is None else layout.num_blocks
        budget = config.gpu_pool_size_bytes or _staging_bytes(device, profile, codec)
        options = (profile, route, config.beside_compute, config.digests, codec, config.link_shares)
        return CudaExecutor(device, fragments, layer_offsets, blocks, pool, budget, *options)
    from kvortex.transfer.host import HostExecutor

    threads = config.num_transfer_streams or _HOST_THREADS
    return HostExecutor(fragments, layer_offsets, pool, threads, config.digests, codec)


def _staging_bytes(device: CudaDevice, profile: Profile, codec: Codec | None) -> int:
    """As the profile says, for blocks as they are. Through a codec four times as much, as far as that is no more than a 64th of
    the GPU's memory: between chunks the link stands still, and coded ones have launches of their own (``perf coded``: on an
    H200 plane was saved 1.37 and 1.405 times as fast as by a DMA with 256 MiB and 1 GiB). Nor more than half of what is free:
    beside a model that has all but a little an engine is to be had as it is without a codec."""
    mine = profile.staging_bytes
    if codec is None:
        return mine
    return max(mine, min(_CODED_TIMES * mine, device.memory_bytes // _CODED_PART, device.free_bytes // 2))


def _overridden(profile: Profile, config: KVortexConfig) -> Profile:
    """A profile with what the config says instead."""
    streams, buffers = config.num_transfer_streams or profile.streams, config.staging_buffers or profile.buffers
    return dataclasses.replace(profile, streams=streams, buffers=buffers)
