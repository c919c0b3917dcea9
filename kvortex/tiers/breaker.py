"""A breaker: a tier that fails, or takes too long, is left alone for a while, and costs nothing meanwhile.

Closed, calls go through. Too many failures, or too much time lost, within a window open it: nobody calls the tier. After a
pause it is half open: one probe in the background says whether it works again. Each probe that fails makes the next pause
longer, and a part of each pause is drawn at random, so that a fleet does not come back in one moment.

Source: Nygard, "Release It!" (2007), chapter "Circuit Breaker"; the random part as in Brooker, "Exponential Backoff and
Jitter" (AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import collections
import enum
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvortex.errors import ConfigError, shown

_GROWTH, _JITTER = 2.0, 0.25


class BreakerState(enum.IntEnum):
    """As in metrics."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


@dataclass(frozen=True, kw_only=True)
class BreakerOptions:
    """What a tier may cost before it is left alone.

    Parameters
    ----------
    failures
        Calls that failed within the window.
    lost_s
        Seconds within the window that failed calls took, and successful ones beyond ``slow_s`` each.
    slow_s
        Seconds that a call may take.
    window_s
        Seconds that a failure counts.
    pause_s, longest_pause_s
        Until the first probe, and between later ones at most. A pause doubles with each probe that fails; up to a quarter is
        added at random.
    """

    failures: int = 5
    lost_s: float = 5.0
    slow_s: float = 2.0
    window_s: float = 30.0
    pause_s: float = 1.0
    longest_pause_s: float = 60.0

    def __post_init__(self) -> None:
        if isinstance(self.failures, bool) or not isinstance(self.failures, int) or self.failures < 1:
            raise ConfigError(f"failures = {shown(self.failures)}: must be an integer of at least 1")
        for name in ("lost_s", "slow_s", "window_s", "pause_s", "longest_pause_s"):
            check_seconds(name, getattr(self, name))


def check_seconds(name: str, value: object) -> None:
    """ConfigError where the value of an option is no time."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise ConfigError(f"{name} = {shown(value)}: must be a number of seconds above 0")


class Breaker:
    """The state of one tier. Thread-safe; ``closed`` is one attribute, to be read without a call.

    Parameters
    ----------
    options
    clock
        Seconds that only grow.
    draw
        A number from 0 to 1.

    Attributes
    ----------
    closed : bool
        Whether calls go through.
    trips : int
        How often it opened.
    reason : str
        Why it opened last; empty before.
    """

    def __init__(
        self,
        options: BreakerOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.options = BreakerOptions() if options is None else options
        self.closed, self.trips, self.reason = True, 0, ""
        self._clock, self._draw = clock, draw
        self._lock = threading.RLock()
        self._events: collections.deque[tuple[float, int, float]] = collections.deque()  # when, failures, seconds lost
        self._pause = self.options.pause_s
        self._until = 0.0
        self._probing = False

    @property
    def state(self) -> BreakerState:
        """For metrics."""
        if self.closed:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if self._probing else BreakerState.OPEN

    def record(self, seconds: float, failed: bool, why: str = "") -> None:
        """One call that came back after ``seconds``."""
        lost = seconds if failed else max(0.0, seconds - self.options.slow_s)
        if not failed and not lost:
            return
        with self._lock:
            now = self._clock()
            self._events.append((now, int(failed), lost))
            while self._events[0][0] < now - self.options.window_s:
                self._events.popleft()
            failures, total = sum(event[1] for event in self._events), sum(event[2] for event in self._events)
            if failures >= self.options.failures:
                last = f"; the last one: {why}" if why else ""
                self.trip(f"{failures} calls failed within {self.options.window_s:g} s{last}")
            elif total >= self.options.lost_s:
                self.trip(f"{total:.1f} s were lost to slow or failed calls within {self.options.window_s:g} s")

    def trip(self, why: str) -> None:
        """Opens it, if it is closed."""
        with self._lock:
            if self.closed:
                self.reason, self._pause = why, self.options.pause_s
                self.trips += 1
                self.closed = False
                self._pause_now()

    def _pause_now(self) -> None:
        self._events.clear()
        self._until = self._clock() + self._pause * (1 + _JITTER * self._draw())

    def rest(self) -> float:
        """Seconds until a probe is due, while it is open."""
        return max(0.0, self._until - self._clock())

    def wants_probe(self) -> bool:
        """Whether a probe is due; true once, until :meth:`probed` tells how it went."""
        with self._lock:
            if self.closed or self._probing or self._clock() < self._until:
                return False
            self._probing = True
            return True

    def probed(self, wrong: str | None) -> None:
        """How the probe went: None where the tier works."""
        with self._lock:
            self._probing = False
            if wrong is None:
                self._events.clear()
                self._pause = self.options.pause_s
                self.closed = True
                return
            self.reason = wrong
            self._pause = min(self._pause * _GROWTH, self.options.longest_pause_s)
            self._pause_now()
