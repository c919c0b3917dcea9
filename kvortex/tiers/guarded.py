"""A tier behind its breaker: calls are counted and timed, and whatever comes out of them, nothing is raised."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvortex.errors import told
from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Digests, Fetched, Int64s, Outcome, Outcomes, Tier
from kvortex.tiers.breaker import Breaker
from kvortex.tiers.metrics import Tally

_GRACE_S = 0.5  # after its deadline, until a call counts as one that hangs
_FAILURES = (Outcome.FAILED, Outcome.TIMEOUT)
Result = TypeVar("Result")


class Guarded:
    """Calls one tier. Thread-safe.

    A call is made whatever the breaker says: who calls looks at ``breaker.closed`` first.

    Parameters
    ----------
    tier
    breaker
    clock
        As ``time.monotonic``, by which calls have their deadlines.
    """

    def __init__(self, tier: Tier, breaker: Breaker, clock: Callable[[], float] = time.monotonic) -> None:
        self.tier, self.breaker, self.tally = tier, breaker, Tally()
        self._clock = clock
        self._numbers = itertools.count()
        self._running: dict[int, tuple[float, str]] = {}  # calls that have not come back: deadline and operation
        self._late: dict[int, None] = {}

    def contains(self, keys: KeyArray, call: Call) -> npt.NDArray[np.bool_] | None:
        """Which keys are there; None where that could not be found out."""

        def ask() -> tuple[npt.NDArray[np.bool_] | None, Outcomes, int]:
            seen = self.tier.contains(keys, call)
            if seen is None:
                return None, np.full(len(keys), Outcome.FAILED, np.uint8), 0
            found = np.asarray(seen, bool)
            _expect(found.shape == (len(keys),), found)
            return found, np.where(found, Outcome.OK, Outcome.MISS).astype(np.uint8), 0

        return self._run("contains", len(keys), call, ask, None)

    def get_into(self, keys: KeyArray, addresses: Int64s, room: Int64s, call: Call) -> Fetched:
        """See :meth:`Tier.get_into`."""
        n = len(keys)

        def get() -> tuple[Fetched, Outcomes, int]:
            found = Fetched(*map(np.asarray, self.tier.get_into(keys, addresses, room, call)))
            outcomes = _outcomes(found.outcomes, n)
            _expect(found.sizes.shape == (n,) and found.digests.shape == (n, 16), found)
            return Fetched(outcomes, found.sizes, found.digests), outcomes, int(found.sizes[outcomes == Outcome.OK].sum())

        failed = Fetched(np.full(n, Outcome.FAILED, np.uint8), np.zeros(n, np.int64), np.zeros((n, 16), np.uint8))
        return self._run("get", n, call, get, failed)

    def put_from(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, call: Call) -> Outcomes:
        """See :meth:`Tier.put_from`."""

        def put() -> tuple[Outcomes, Outcomes, int]:
            outcomes = _outcomes(self.tier.put_from(keys, addresses, sizes, digests, call), len(keys))
            return outcomes, outcomes, int(sizes[outcomes == Outcome.OK].sum())

        return self._run("put", len(keys), call, put, np.full(len(keys), Outcome.FAILED, np.uint8))

    def delete(self, keys: KeyArray, call: Call) -> Outcomes:
        """See :meth:`Tier.delete`."""

        def delete() -> tuple[Outcomes, Outcomes, int]:
            outcomes = _outcomes(self.tier.delete(keys, call), len(keys))
            return outcomes, outcomes, 0

        return self._run("delete", len(keys), call, delete, np.full(len(keys), Outcome.FAILED, np.uint8))

    def probe(self, call: Call) -> str | None:
        """See :meth:`Tier.probe`; tells the breaker."""

        def probe() -> tuple[str | None, Outcomes, int]:
            wrong = self.tier.probe(call)
            return wrong, np.array([Outcome.OK if wrong is None else Outcome.FAILED], np.uint8), 0

        failed: str | None = "the probe raised an exception"
        wrong = self._run("probe", 1, call, probe, failed)
        if wrong is None and self._clock() > call.deadline:
            wrong = "the probe came back after its deadline"
        self.breaker.probed(wrong)
        return wrong

    def _run(
        self, operation: str, count: int, call: Call, body: Callable[[], tuple[Result, Outcomes, int]], failed: Result
    ) -> Result:
        number, began = next(self._numbers), self._clock()
        self._running[number] = call.deadline, operation
        try:
            result, outcomes, nbytes = body()
            why = _why(outcomes)
        except Exception as error:  # a tier may raise nothing; one that does must not take others with it
            result, outcomes, nbytes = failed, np.full(count, Outcome.FAILED, np.uint8), 0
            why = type(error).__name__
            reason = told(error)
        else:
            reason = why
        finally:
            self._running.pop(number, None)
        seconds, late = self._clock() - began, self._late.pop(number, 0) is None
        self.tally.call(operation, outcomes, nbytes, seconds)
        if why:
            self.tally.error(why)
        if operation != "probe" and not late:
            self.breaker.record(seconds, bool(why), reason)
        return result

    def overdue(self) -> int:
        """Calls that have not come back in time. The first time that one is found so opens the breaker."""
        now, found = self._clock(), 0
        for number, (deadline, operation) in list(self._running.items()):
            if now > deadline + _GRACE_S:
                found += 1
                if number not in self._late:
                    self._late[number] = None
                    if number not in self._running:  # it came back meanwhile
                        self._late.pop(number, None)
                        continue
                    self.tally.error("Overdue")
                    self.breaker.trip(f"a {operation} has not come back {now - deadline:.1f} s after its deadline")
        return found

    def running(self) -> int:
        """Calls that have not come back."""
        return len(self._running)


def _outcomes(seen: Any, count: int) -> Outcomes:
    outcomes = np.asarray(seen)
    _expect(outcomes.shape == (count,) and outcomes.dtype.kind in "iu", outcomes)
    _expect(not count or (outcomes.min() >= 0 and outcomes.max() < len(Outcome)), outcomes)
    return outcomes.astype(np.uint8)


def _expect(right: bool, seen: Any) -> None:
    if not right:
        raise TypeError(f"the tier answered with something else than an entry a key: {type(seen).__name__}")


def _why(outcomes: Outcomes) -> str:
    """What kind of failure a call was; empty for none. A record that is missing, damaged or refused for its size is none."""
    return next((kind.name for kind in _FAILURES if (outcomes == kind).any()), "")
