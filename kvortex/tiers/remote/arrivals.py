"""Records of one batch while they arrive: where each goes, and what became of it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvortex.digests import host
from kvortex.digests.host import add_lengths, add_part, numbers
from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Digests, Fetched, Int64s, Outcome
from kvortex.tiers.record import HEADER, HEADER_BYTES, RecordFormat
from kvortex.tiers.remote import receiving
from kvortex.tiers.remote.wire import Wire, view_of

_PAYLOAD_BYTES = HEADER.fields["payload_bytes"][1]  # type: ignore[index]
_NOTHING = bytes(HEADER_BYTES)
PENDING = 255  # no outcome yet


@functools.cache
def load_compiled() -> None:
    """Loads what is compiled, which takes longer than some calls have time."""
    host.load_compiled()
    receiving.load_compiled()


class Arrivals:
    """Headers, outcomes and slots of n records. Threads that share one use different records."""

    def __init__(self, record_format: RecordFormat, keys: KeyArray, addresses: Int64s, room: Int64s) -> None:
        count = len(keys)
        self.format, self.keys = record_format, keys
        self.addresses, self.room = np.ascontiguousarray(addresses, np.int64), np.ascontiguousarray(room, np.int64)
        self.outcomes = np.full(count, PENDING, np.uint8)
        self.headers = np.zeros(count, HEADER)
        self._sums = np.zeros((count, 2), np.uint64)
        self._arrived, self._whole = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        self._numbers = numbers(record_format.most_bytes)
        self._bytes = view_of(self.headers.ctypes.data, count * HEADER_BYTES)

    def header(self, at: int) -> memoryview:
        """Where the header of one record is to go, and what came before of it is forgotten."""
        self._sums[at], self._arrived[at] = 0, False
        place = self._bytes[at * HEADER_BYTES : (at + 1) * HEADER_BYTES]
        place[:] = _NOTHING
        return place

    def payload_bytes(self, at: int) -> int:
        """What the header says, which nobody has checked yet; -1 where that does not fit into the slot."""
        start = at * HEADER_BYTES + _PAYLOAD_BYTES
        said = int.from_bytes(self._bytes[start : start + 8], "little")
        return said if said <= min(int(self.room[at]), self.format.most_bytes) else -1

    def take(self, wire: Wire, at: int, start: int, nbytes: int, call: Call) -> None:
        """Reads a part of one payload to its place. Its digest grows with it: the bytes are read again while they are near."""
        address, end = int(self.addresses[at]), start + nbytes
        while start < end:
            start += wire.summed(address + start, end - start, start, self._sums[at], self._numbers, call)

    def bring(self, at: int, address: int, nbytes: int) -> None:
        """A whole record that lies elsewhere in memory: copied, and digested where it lies then."""
        ctypes.memmove(self.headers.ctypes.data + at * HEADER_BYTES, address, min(nbytes, HEADER_BYTES))
        payload = nbytes - HEADER_BYTES
        is_whole = payload >= 0 and payload == self.payload_bytes(at)
        if is_whole:
            ctypes.memmove(int(self.addresses[at]), address + HEADER_BYTES, payload)
            add_part(int(self.addresses[at]), payload, 0, self._sums[at], self._numbers)
        self.arrived(at, is_whole)

    def arrived(self, at: int, is_whole: bool) -> None:
        """The header of a record has come, and its payload if ``is_whole``: it had the length that the header states."""
        self._arrived[at], self._whole[at] = True, is_whole

    def judge(self, some: Sequence[int]) -> None:
        """Says what became of those of ``some`` that arrived: together, which costs no more than one."""
        at = np.array([each for each in some if self._arrived[each]], np.int64)
        if not len(at):
            return
        headers = self.headers[at]
        outcomes = self.format.check_headers(headers, self.keys[at])
        fits = headers["payload_bytes"] <= self.room[at].astype(np.uint64)
        right = np.where(self._whole[at] & self._payload_checks(at), Outcome.OK, Outcome.CORRUPT)
        # Ours, and larger than the slot: a miss.
        self.outcomes[at] = np.where(outcomes == Outcome.OK, np.where(fits, right, Outcome.MISS), outcomes)
        self._arrived[at] = False

    def _payload_checks(self, at: Int64s) -> npt.NDArray[np.bool_]:
        headers = self.headers[at]
        found = add_lengths(self._sums[at], headers["payload_bytes"])
        return np.asarray((found == headers["digest"]).all(1))

    def settle(self, outcome: Outcome, some: Sequence[int] | slice = slice(None)) -> None:
        """Gives this outcome to all of ``some`` that have none."""
        outcomes = self.outcomes[some]
        self.outcomes[some] = np.where(outcomes == PENDING, outcome, outcomes)

    def fetched(self) -> Fetched:
        """What a tier hands out."""
        self.settle(Outcome.FAILED)
        ok = self.outcomes == Outcome.OK
        sizes = np.where(ok, self.headers["payload_bytes"], 0).astype(np.int64)
        digests: Digests = np.where(ok[:, None], self.headers["digest"], 0).astype(np.uint8)
        return Fetched(self.outcomes, sizes, digests)
