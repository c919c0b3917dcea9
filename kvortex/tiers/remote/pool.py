"""Connections that wait to be used again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, TypeVar

from kvortex.tiers.base import Call
from kvortex.tiers.remote.wire import Broken, Wire

Endpoint = TypeVar("Endpoint", bound=Hashable)


class Pool(Generic[Endpoint]):
    """Connections by endpoint, each lent to one thread at a time.

    Parameters
    ----------
    connect
        Makes a connection to an endpoint before the call's deadline, or raises ``Broken``.
    most_idle
        Connections kept for each endpoint while nobody uses them.
    """

    def __init__(self, connect: Callable[[Endpoint, Call], Wire], most_idle: int) -> None:
        self._connect = connect
        self._most_idle = most_idle
        self._idle: dict[Endpoint, list[Wire]] = {}
        self._process = os.getpid()
        self._closed = False

    @contextlib.contextmanager
    def lend(self, endpoint: Endpoint, call: Call, fresh: bool = False) -> Iterator[tuple[Wire, bool]]:
        """A connection, and whether it was used before. It comes back only if it owes no answer; else it is closed.

        ``fresh`` asks for a new one, and closes those that wait: one of them was found dead.
        """
        if fresh:
            self.forget(endpoint)
        wire = self._waiting(endpoint)
        was_used = wire is not None
        try:
            if wire is None:
                wire = self._connect(endpoint, call)
            yield wire, was_used
        finally:
            if wire is not None:
                self._take_back(endpoint, wire)

    def forget(self, endpoint: Endpoint) -> None:
        """Closes the connections to an endpoint that wait."""
        waiting = self._here().get(endpoint, [])
        while waiting:
            with contextlib.suppress(IndexError):  # another thread took it
                waiting.pop().close()

    def keep_only(self, endpoints: Iterable[Endpoint]) -> None:
        """Closes what waits for endpoints that are not among these: nobody will ask for them again."""
        mine = set(endpoints)
        for endpoint in set(self._here()) - mine:
            self.forget(endpoint)
            if not self._here().get(endpoint):
                self._here().pop(endpoint, None)

    def close(self) -> None:
        """Closes those that wait, and those in use when they come back."""
        self._closed = True
        for endpoint in list(self._here()):
            self.forget(endpoint)

    def is_closed(self) -> bool:
        return self._closed

    def waiting(self) -> int:
        """How many connections wait."""
        return sum(map(len, self._here().values()))

    def _here(self) -> dict[Endpoint, list[Wire]]:
        """Those of this process: what was forked has none, and leaves its parent's alone."""
        if self._process != os.getpid():
            self._idle, self._process = {}, os.getpid()
        return self._idle

    def _waiting(self, endpoint: Endpoint) -> Wire | None:
        if self._closed:
            raise Broken("the tier is closed")
        waiting = self._here().setdefault(endpoint, [])
        while True:
            try:
                wire = waiting.pop()
            except IndexError:
                return None
            if wire.is_idle():
                return wire
            wire.close()

    def _take_back(self, endpoint: Endpoint, wire: Wire) -> None:
        waiting = self._here().setdefault(endpoint, [])
        if wire.owed or self._closed or len(waiting) >= self._most_idle:
            wire.close()
            return
        waiting.append(wire)
        if self.is_closed():  # meanwhile, by another thread
            self.forget(endpoint)
