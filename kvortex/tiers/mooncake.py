"""Mooncake Store: a tier of many machines' memory, for fleets that outgrow one machine and one Redis.

Its calls cannot be given up: one that waits for a machine that died goes on with its buffers. So it never sees a slot. Records
are copied to and from buffers of this tier, registered once; a call whose deadline passes is left behind with its buffer, which
is used again when it has come back. The copy is several times faster than Mooncake over TCP.

Mooncake's clients and its metrics listen on all interfaces without a login: for trusted networks only.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvortex.errors import ConfigError, cut, shown, told
from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Digests, Fetched, Int64s, Outcome, Outcomes, Tier
from kvortex.tiers.record import HEADER_BYTES, RecordFormat
from kvortex.tiers.remote.arrivals import PENDING, Arrivals, load_compiled
from kvortex.tiers.remote.checks import check_count
from kvortex.tiers.remote.probing import probe_record
from kvortex.tiers.remote.wire import Broken, Late, Stopped

_ALIGNED = 4096
_PATIENCE = 0.25  # seconds between two looks whether the call was cancelled
_MOST_LEFT_BEHIND = 64  # calls; with more of them there is no new one
_GOODBYE = 10.0  # seconds for calls that are left behind, when the tier closes
# Of Mooncake's error codes (mooncake-store/include/types.h) those that say more than that it failed.
_CODES = {-200: Outcome.FULL, -600: Outcome.MISS, -704: Outcome.MISS}
_IS_THERE = -705  # what a put of a key that was stored before is told
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class MooncakeOptions:
    """Options of a :class:`MooncakeTier`.

    Parameters
    ----------
    master
        ``host:port`` of ``mooncake_master``.
    hostname
        Of this machine, as others reach it.
    metadata
        Of Mooncake's metadata server; ``P2PHANDSHAKE`` for none.
    segment_bytes
        Memory of this process that the store may use; 0 to be only a client.
    protocol, devices
        ``"tcp"``, or ``"rdma"`` with its devices.
    buffers, buffer_bytes
        Calls under way at once, and the records of each in bytes; a buffer takes at least one record.
    """

    master: str
    hostname: str = "127.0.0.1"
    metadata: str = "P2PHANDSHAKE"
    segment_bytes: int = 0
    protocol: str = "tcp"
    devices: str = ""
    buffers: int = 4
    buffer_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for name in ("master", "hostname", "metadata", "protocol", "devices"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.isprintable() or (not value and name != "devices"):
                raise ConfigError(f"{name} must be a text that is not empty, not {shown(value)}")
        if not self.master.rpartition(":")[2].isdigit():
            raise ConfigError(f"master must be host:port of mooncake_master, not {shown(self.master)}")
        for name, least, most in (("segment_bytes", 0, 1 << 50), ("buffers", 1, 256), ("buffer_bytes", 1, 1 << 40)):
            check_count(name, getattr(self, name), least, most)


class _Buffer:
    """Registered memory for the records of one call."""

    def __init__(self, nbytes: int) -> None:
        self.memory = mmap.mmap(-1, nbytes)
        self.nbytes = nbytes
        self._anchor = ctypes.c_char.from_buffer(self.memory)  # keeps it mapped
        self.address = ctypes.addressof(self._anchor)


class MooncakeTier(Tier):
    """Records in Mooncake Store: the header, and the payload behind it.

    Raises
    ------
    ConfigError
        Mooncake is not installed, or cannot be loaded.
    """

    name = "mooncake"

    def __init__(self, options: MooncakeOptions, record_format: RecordFormat) -> None:
        self.options, self.format = options, record_format
        self._store_class = _import_mooncake()
        self._room = _aligned(HEADER_BYTES + record_format.most_bytes)
        self._buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        self._store: Any = None
        self._opening = threading.Lock()
        self._left_behind = 0
        self._counting = threading.Lock()
        self._process = os.getpid()
        self._closed = False
        self.trouble = ""  # what was wrong last, in words; for whoever asks
        load_compiled()

    def contains(self, keys: KeyArray, call: Call) -> npt.NDArray[np.bool_] | None:
        names = self._names(keys)
        found = self._guarded(lambda: self._wait(lambda store: store.batch_is_exist(names), call) if names else [])
        if not isinstance(found, list) or any(each < 0 for each in found):
            return None
        return np.array([each == 1 for each in found], np.bool_)

    def get_into(self, keys: KeyArray, addresses: Int64s, room: Int64s, call: Call) -> Fetched:
        arrivals = Arrivals(self.format, keys, addresses, room)
        names = self._names(keys)
        sizes = [HEADER_BYTES + min(each, self.format.most_bytes) for each in arrivals.room.tolist()]
        for some in self._shares(sizes):
            outcome = self._guarded(lambda some=some: self._get(arrivals, names, sizes, some, call))  # type: ignore[misc]
            arrivals.settle(outcome if isinstance(outcome, Outcome) else Outcome.FAILED, some)
        corrupt = arrivals.outcomes == Outcome.CORRUPT
        if corrupt.any():
            self.delete(keys[corrupt], call)
        return arrivals.fetched()

    def put_from(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, call: Call) -> Outcomes:
        names = self._names(keys)
        headers = self.format.headers(keys, sizes, digests).tobytes()
        outcomes = np.where(np.asarray(sizes) > self.format.most_bytes, Outcome.TOO_LARGE, PENDING).astype(np.uint8)
        lengths = [HEADER_BYTES + int(each) for each in sizes]
        todo = np.flatnonzero(outcomes == PENDING).tolist()
        for some in self._shares(lengths, todo):

            def put(some: list[int] = some) -> list[int]:
                with self._buffer(call) as (buffer, keep):
                    places = [buffer.address + self._room * place for place in range(len(some))]
                    for place, at in zip(places, some, strict=True):
                        ctypes.memmove(place, headers[at * HEADER_BYTES : (at + 1) * HEADER_BYTES], HEADER_BYTES)
                        ctypes.memmove(place + HEADER_BYTES, int(addresses[at]), int(sizes[at]))
                    mine, long = [names[at] for at in some], [lengths[at] for at in some]
                    return self._wait(lambda store: store.batch_put_from(mine, places, long), call, keep)

            found = self._guarded(put)
            for place, at in enumerate(some):
                outcomes[at] = self._outcome(found[place], "put") if isinstance(found, list) else found
        return outcomes

    def delete(self, keys: KeyArray, call: Call) -> Outcomes:
        outcomes = np.full(len(keys), Outcome.FAILED, np.uint8)
        for at, name in enumerate(self._names(keys)):
            found = self._guarded(lambda name=name: self._wait(lambda store: [store.remove(name, True)], call))  # type: ignore[misc]
            outcomes[at] = self._outcome(found[0], "remove") if isinstance(found, list) else found
        return outcomes

    def probe(self, call: Call) -> str | None:
        self.trouble = ""
        return probe_record(self, self.format, call, lambda: self.trouble)

    def close(self) -> None:
        """Waits some seconds for calls that were left behind; if one does not come back, its memory stays."""
        if self._closed:
            return
        self._closed = True
        store, self._store = self._store, None
        end = time.monotonic() + _GOODBYE
        while self._left_behind and time.monotonic() < end:
            time.sleep(0.01)
        if store is not None and not self._left_behind and self._process == os.getpid():
            store.close()

    def _names(self, keys: KeyArray) -> list[str]:
        prefix = f"kvx/{self.format.namespace.hex()}/"
        return [prefix + key.tobytes().hex() for key in keys]

    def _shares(self, lengths: Sequence[int], some: Sequence[int] | None = None) -> list[list[int]]:
        """Keys in groups whose records fit into a buffer."""
        some = range(len(lengths)) if some is None else some
        count = max(1, self.options.buffer_bytes // self._room)
        return [list(some[start : start + count]) for start in range(0, len(some), count)]

    def _get(self, arrivals: Arrivals, names: list[str], sizes: list[int], some: list[int], call: Call) -> Outcome:
        with self._buffer(call) as (buffer, keep):
            places = [buffer.address + self._room * place for place in range(len(some))]
            mine, room = [names[at] for at in some], [sizes[at] for at in some]
            found = self._wait(lambda store: store.batch_get_into(mine, places, room), call, keep)
            for at, place, count in zip(some, places, found, strict=True):
                if count < 0:
                    arrivals.outcomes[at] = self._outcome(count, "get")
                else:
                    arrivals.bring(at, place, min(count, sizes[at]))
            arrivals.judge(some)
        return Outcome.FAILED

    def _outcome(self, code: int, what: str) -> Outcome:
        if code >= 0:
            return Outcome.OK
        outcome = Outcome.OK if (code, what) == (_IS_THERE, "put") else _CODES.get(code, Outcome.FAILED)
        if outcome not in (Outcome.OK, Outcome.MISS):
            self.trouble = f"Mooncake answers {what} with {code}"
        return outcome

    def _guarded(self, work: Callable[[], Result]) -> Result | Outcome:
        """What ``work`` gives, or the outcome of all keys that it did not get to."""
        try:
            if self._closed or self._process != os.getpid():
                raise Broken("the tier is closed, or belongs to the process that this one was forked from")
            return work()
        except Broken as error:
            self.trouble = cut(str(error), 200)
            return error.outcome

    @contextlib.contextmanager
    def _buffer(self, call: Call):  # type: ignore[no-untyped-def]
        """A buffer, and a list that a call that is left behind puts it into; such a one comes back later by itself."""
        self._wait(lambda store: [0], call)  # the store is open, and buffers are made
        while True:
            try:
                buffer = self._buffers.get(timeout=min(call.left(), _PATIENCE))
                break
            except queue.Empty:
                _check(call)
        keep: list[_Buffer] = []
        try:
            yield buffer, (buffer, keep)
        finally:
            if not keep:
                self._buffers.put(buffer)

    def _wait(self, work: Callable[[Any], Any], call: Call, keep: tuple[_Buffer, list[_Buffer]] | None = None) -> list[int]:
        """The answer of one call of Mooncake's, on a thread of its own, which is left behind at the deadline."""
        done: Future[list[int]] = Future()
        _check(call)
        if self._left_behind >= _MOST_LEFT_BEHIND:
            raise Broken("Mooncake's calls do not come back")

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result([int(each) for each in work(self._opened())])
            except Exception as error:
                done.set_exception(error)

        thread = threading.Thread(target=run, name="kvortex-mooncake", daemon=True)
        try:
            thread.start()
            while True:
                try:
                    return done.result(min(call.left(), _PATIENCE))
                except FutureTimeoutError:
                    if done.done():  # it raised that itself
                        raise Broken("Mooncake took too long") from None
                    _check(call)
        except Broken:
            raise
        except Exception as error:
            raise Broken(told(error)) from None
        finally:
            if not done.cancel() and not done.done():  # it has begun
                with self._counting:
                    self._left_behind += 1
                if keep is not None:
                    keep[1].append(keep[0])
                done.add_done_callback(lambda _: self._came_back(keep[0] if keep is not None else None))

    def _came_back(self, buffer: _Buffer | None) -> None:
        if buffer is not None:
            self._buffers.put(buffer)
        with self._counting:
            self._left_behind -= 1

    def _opened(self) -> Any:
        """The store, set up by whichever call needs it first; that may take as long as the master does not answer."""
        with self._opening:
            if self._closed:
                raise Broken("the tier is closed")
            if self._store is None:
                options, store = self.options, self._store_class()
                buffers = [_Buffer(max(options.buffer_bytes // self._room, 1) * self._room) for _ in range(options.buffers)]
                total = sum(buffer.nbytes for buffer in buffers)
                code = store.setup(
                    options.hostname, options.metadata, options.segment_bytes, _aligned(total), options.protocol,
                    options.devices, options.master,
                )  # fmt: skip
                if code:
                    raise Broken(f"Mooncake cannot be set up with the master {options.master}: {code}")
                for buffer in buffers:
                    if store.register_buffer(buffer.address, buffer.nbytes):
                        store.close()
                        raise Broken("Mooncake does not register memory")
                for buffer in buffers:
                    self._buffers.put(buffer)
                self._store = store
            return self._store


def _check(call: Call) -> None:
    if not call.left():
        raise Late("the deadline passed")
    if call.cancelled():
        raise Stopped("the call was cancelled")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _import_mooncake() -> Any:
    try:
        return importlib.import_module("mooncake.store").MooncakeDistributedStore
    except ImportError as error:
        if getattr(error, "name", None) in ("mooncake", "mooncake.store"):
            cure = "pip install -e '.[mooncake]' in kvortex's checkout"
            raise ConfigError(f"a Mooncake tier needs its client, of the extra mooncake: {cure}") from None
        needs = "it needs the system's libibverbs1 and libnuma1"
        raise ConfigError(f"Mooncake's client does not load ({told(error)}): {needs}") from None
