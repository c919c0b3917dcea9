"""Workers of this process, by engine: where vLLM runs scheduler and worker in one process, as it does for one GPU, the
scheduler asks at once what it would otherwise be told a step later."""

from __future__ import annotations

import weakref
from typing import Any

_WORKERS: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def register(engine_id: str, worker: Any) -> None:
    """A worker of this process; kept by its owner alone."""
    _WORKERS[engine_id] = worker


def worker_of(engine_id: str, world_size: int) -> Any | None:
    """The only worker of an engine, if it is in this process."""
    return _WORKERS.get(engine_id) if world_size == 1 else None


def workers() -> list[Any]:
    """All workers of this process: their ``store.engine`` has the statistics."""
    return list(_WORKERS.values())
