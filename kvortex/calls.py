"""A public call of an engine, from its beginning to its end."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

from kvortex.errors import EngineClosedError

if TYPE_CHECKING:
    from kvortex.engine import KVortexEngine


class EngineCall:
    """One public call: refused after shutdown, waited for by shutdown, and settles what has ended meanwhile (``reap``).

    ``over`` becomes true when the call returns or raises. Should a second interrupt prevent even that, the weak
    reference in the engine dies with the frame.
    """

    def __init__(self, engine: KVortexEngine, *, reap: bool = True) -> None:
        self._reap = reap
        self._engine: KVortexEngine | None = engine  # until it is over: a transfer must not keep its engine alive
        self.thread = threading.get_ident()
        self.over = False

    def __enter__(self) -> EngineCall:
        engine = self._engine
        assert engine is not None
        if engine._parts.pid != os.getpid():
            raise EngineClosedError("this engine belongs to the process that this one was forked from; create one here")
        engine._calls[id(self)] = weakref.ref(self)  # before looking, so that shutdown either sees this call or stops it
        if engine._closed:
            self.__exit__()
            raise EngineClosedError("this engine was shut down")
        try:
            if self._reap:
                engine._flight.reap()
                engine._parts.grow()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True
        engine, self._engine = self._engine, None
        if engine is not None:
            engine._calls.pop(id(self), None)
