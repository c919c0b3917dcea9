"""Records in host memory, put into a tier and taken back: what came is compared with what went, byte for byte."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from kvortex.digests import digest_records
from kvortex.tiers.base import Call, Fetched, Outcome, Tier
from kvortex.tiers.record import RecordFormat

PAGE = 4096
NAMESPACE = bytes(range(32))
FORMAT = RecordFormat(NAMESPACE, 4 << 20)
_CANARY = 0xA5


class Rack:
    """n records of given sizes under random keys, and n slots to take them back into, with a page between slots that
    nobody may touch."""

    def __init__(self, sizes: Sequence[int], seed: int = 1, seconds: float = 20.0) -> None:
        rng = np.random.default_rng(seed)
        self.seconds = seconds
        self.keys = rng.integers(0, 256, (len(sizes), 32), np.uint8)
        self.sizes = np.array(sizes, np.int64)
        self._source, self.addresses = self._arena()
        self._target, self.targets = self._arena()
        for at, size in enumerate(sizes):
            self.payload(at)[:] = rng.integers(0, 256, size, np.uint8)
        self.digests = np.empty((len(sizes), 16), np.uint8)
        digest_records(self.addresses, self.sizes, self.digests)
        self.wrong_bytes = 0
        self.latest = 0.0  # seconds that a call came back after its deadline, at worst

    def _arena(self) -> tuple[np.ndarray, np.ndarray]:
        """Slots of whole pages, each followed by a page of canaries."""
        slots = -(-self.sizes // PAGE) * PAGE + PAGE
        memory = np.full(int(slots.sum()) + PAGE, _CANARY, np.uint8)
        start = -memory.ctypes.data % PAGE
        return memory[start:], memory.ctypes.data + start + np.cumsum(slots) - slots

    def payload(self, at: int) -> np.ndarray:
        """What was put."""
        start = int(self.addresses[at]) - self._source.ctypes.data
        return self._source[start : start + int(self.sizes[at])]

    def call(self, seconds: float | None = None) -> Call:
        return Call(time.monotonic() + (self.seconds if seconds is None else seconds))

    def put(self, tier: Tier, some: Sequence[int] | slice = slice(None), seconds: float | None = None) -> np.ndarray:
        call = self.call(seconds)
        found = tier.put_from(self.keys[some], self.addresses[some], self.sizes[some], self.digests[some], call)
        self._clock(call)
        assert found.shape == (len(self.keys[some]),) and (found <= max(Outcome)).all()
        return found

    def get(self, tier: Tier, some: Sequence[int] | slice = slice(None), seconds: float | None = None) -> Fetched:
        """Takes records back, and counts the bytes that are not what was put."""
        self._target[:] = _CANARY
        call = self.call(seconds)
        fetched = tier.get_into(self.keys[some], self.targets[some], self.sizes[some], call)
        self._clock(call)
        outcomes = fetched.outcomes
        assert outcomes.shape == (len(self.keys[some]),) and (outcomes <= max(Outcome)).all()
        for place, at in enumerate(np.arange(len(self.keys))[some]):
            start, size = int(self.targets[at]) - self._target.ctypes.data, int(self.sizes[at])
            if outcomes[place] == Outcome.OK:
                self.wrong_bytes += int((self._target[start : start + size] != self.payload(at)).sum())
                self.wrong_bytes += int(fetched.sizes[place] != size) + int((fetched.digests[place] != self.digests[at]).any())
            else:
                self.wrong_bytes += int(fetched.sizes[place] != 0) + int(fetched.digests[place].any())
            self.wrong_bytes += int((self._target[start + size : start + -(-size // PAGE) * PAGE + PAGE] != _CANARY).sum())
        return fetched

    def has(self, tier: Tier, seconds: float | None = None) -> np.ndarray | None:
        call = self.call(seconds)
        found = tier.contains(self.keys, call)
        self._clock(call)
        return found

    def _clock(self, call: Call) -> None:
        self.latest = max(self.latest, time.monotonic() - call.deadline)
