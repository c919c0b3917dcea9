"""A tier in memory that does to its callers what disks and servers do, when it is told to."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Digests, Fetched, Int64s, Outcome, Outcomes
from kvortex.tiers.memory import MemoryStore, MemoryTier
from kvortex.tiers.record import RecordFormat

# What a call can be told to do. Those of the first row happen to the call, those of the second to records that it is about.
CALL_FAULTS = ("raise", "failed", "timeout", "slow", "late", "hang", "nonsense", "scribble")
RECORD_FAULTS = ("flip", "torn", "longer", "foreign", "older", "lost", "empty")
FAULTS = CALL_FAULTS + RECORD_FAULTS


class FaultyTier(MemoryTier):
    """A :class:`MemoryTier` whose calls ask ``plan(operation)`` what is to go wrong, an entry of :data:`FAULTS` or None.

    Parameters
    ----------
    store, form
    plan
    slow_s
        How long a ``"slow"`` call sleeps before, and a ``"late"`` one after its work.
    seed
        Of where records are damaged.

    Attributes
    ----------
    gate : threading.Event
        Calls that hang wait for it, whatever their deadline is.
    hung : int
        Calls that wait for the gate now.
    calls : dict
        By operation.
    injected : dict
        Faults that happened, by name.
    """

    local = False

    def __init__(
        self,
        store: MemoryStore,
        form: RecordFormat,
        plan: Callable[[str], str | None] = lambda _: None,
        *,
        slow_s: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(store, form)
        self.plan, self.slow_s = plan, slow_s
        self.gate = threading.Event()
        self.hung = 0
        self.calls: dict[str, int] = {}
        self.injected: dict[str, int] = {}
        self._rng = np.random.default_rng(seed)
        self._guard = threading.Lock()
        self.closed = False

    def _begin(self, operation: str, keys: KeyArray) -> str | None:
        with self._guard:
            self.calls[operation] = self.calls.get(operation, 0) + 1
            fault = self.plan(operation)
            if fault is None:
                return None
            happened = fault not in RECORD_FAULTS or self._damage(fault, keys)
            self.injected[fault] = self.injected.get(fault, 0) + happened
            if fault in RECORD_FAULTS:
                return None
        if fault == "slow":
            time.sleep(self.slow_s)
        elif fault == "hang":
            with self._guard:
                self.hung += 1
            self.gate.wait()
            with self._guard:
                self.hung -= 1
        elif fault == "raise":
            raise OSError("injected")
        return fault

    def _damage(self, fault: str, keys: KeyArray) -> bool:
        """Changes one record of these keys as an old disk, another program or another version would; whether it was there."""
        name = self._name(keys[int(self._rng.integers(len(keys)))]) if len(keys) else b""
        record = self.store.get(name)
        if not record:
            return False
        changed = bytearray(record)
        at = int(self._rng.integers(len(changed)))
        if fault == "flip":
            changed[at] ^= 1 << int(self._rng.integers(8))
        elif fault == "torn":
            del changed[at:]
        elif fault == "longer":
            changed += bytes(int(self._rng.integers(1, 4096)))
        elif fault == "empty":
            changed.clear()
        elif fault == "older":
            changed[8] ^= 0xFF  # of the version
        elif fault == "foreign":
            others = [other for other in self.store.objects.values() if other != record]
            if not others:
                return False
            changed = bytearray(others[int(self._rng.integers(len(others)))])
        if fault == "lost":
            self.store.remove(name)
        else:
            self.store.put(name, bytes(changed))
        return True

    def contains(self, keys: KeyArray, call: Call) -> npt.NDArray[np.bool_] | None:
        fault = self._begin("contains", keys)
        if fault == "nonsense":
            return np.zeros(len(keys) + 1, bool)
        return None if fault in ("failed", "timeout") else super().contains(keys, call)

    def get_into(self, keys: KeyArray, addresses: Int64s, room: Int64s, call: Call) -> Fetched:
        fault, n = self._begin("get", keys), len(keys)
        if fault == "nonsense":
            return Fetched(np.full(n, 200, np.uint8), np.zeros(n, np.int64), np.zeros((n, 16), np.uint8))
        found = super().get_into(keys, addresses, room, call)
        if fault == "late":
            time.sleep(self.slow_s)
        if fault == "scribble":  # all that was promised of what is not OK is that it may have been overwritten in part
            for address, nbytes in zip(addresses.tolist(), room.tolist(), strict=True):
                ctypes.memset(address, 0xEE, int(nbytes) // 2)
            found.outcomes[:] = Outcome.FAILED
        return found if fault not in ("failed", "timeout") else found._replace(outcomes=_all(fault, n))

    def put_from(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, call: Call) -> Outcomes:
        fault: Any = self._begin("put", keys)
        if fault in ("failed", "timeout"):
            return _all(fault, len(keys))
        if fault == "nonsense":
            return np.zeros(0, np.uint8)
        return super().put_from(keys, addresses, sizes, digests, call)

    def delete(self, keys: KeyArray, call: Call) -> Outcomes:
        fault = self._begin("delete", keys)
        return _all(fault, len(keys)) if fault in ("failed", "timeout") else super().delete(keys, call)

    def probe(self, call: Call) -> str | None:
        fault = self._begin("probe", np.zeros((0, 32), np.uint8))
        return "injected" if fault in ("failed", "timeout", "nonsense", "scribble") else super().probe(call)

    def close(self) -> None:
        self.closed = True


def _all(fault: str, count: int) -> Outcomes:
    return np.full(count, Outcome.FAILED if fault == "failed" else Outcome.TIMEOUT, np.uint8)

