"""A thread for each CPU, which share what NumPy and Numba do without the GIL."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

Task = Callable[[], object]


class Workers:
    """Runs independent tasks side by side; the calling thread is one of the workers.

    BLAS is held to one thread each (where threadpoolctl is installed), since BLAS's own threads spin when they wait for each
    other, and lose most of their rate on a machine that has something else to do.

    Parameters
    ----------
    count
        Threads; None for as many as the process has CPUs.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count or len(os.sched_getaffinity(0))
        self._others = ThreadPoolExecutor(max(1, self.count - 1), thread_name_prefix="model")
        self._limits = contextlib.ExitStack()
        with contextlib.suppress(ImportError):
            import threadpoolctl

            self._limits.enter_context(threadpoolctl.threadpool_limits(1, user_api="blas"))

    def run(self, tasks: Iterable[Task]) -> None:
        """Returns when all tasks are done; the first ones are begun first. Raises what one of them raised."""
        left = collections.deque(tasks)

        def work() -> None:
            with contextlib.suppress(IndexError):
                while True:
                    left.popleft()()

        others = [self._others.submit(work) for _ in range(min(self.count, len(left)) - 1)]
        try:
            work()
        finally:
            left.clear()
            for other in others:
                other.result()

    def split(self, length: int, step: int = 16) -> list[slice]:
        """Ranges that cover ``length``, one a worker, that begin at multiples of ``step``."""
        size = -(-length // (self.count * step)) * step
        return [slice(first, min(first + size, length)) for first in range(0, length, size)]

    def close(self) -> None:
        """Ends the threads, and gives BLAS its own back."""
        self._others.shutdown()
        self._limits.close()
