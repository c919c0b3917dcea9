"""The connector's half beside a model runner: moves what it is told, and tells what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from kvortex.integrations.vllm.messages import Job, Orders, Report
from kvortex.integrations.vllm.store import Store


class WorkerSide:
    """Carries out the orders of each step.

    Parameters
    ----------
    store
    stream
        Gives the stream that the model's kernels are on, None on the host.
    """

    def __init__(self, store: Store, stream: Callable[[], Any]) -> None:
        self.store, self._stream = store, stream
        self._jobs: dict[int, Job] = {}
        self._report = Report()
        self._received: set[str] = set()
        self._bad_pages: set[int] = set()
        self.counts: Counter[str] = Counter()

    def fence(self, orders: Orders) -> None:
        """Ahead of all else in a step, and harmless twice: no old transfer reads or writes a page that is used anew."""
        self.store.fence(orders.fence, self._stream())

    def load(self, orders: Orders) -> None:
        """Starts the step's loads."""
        for job in orders.loads:
            self._jobs[job.number] = job
            self.store.load(job.number, job.blocks, self._stream())

    def save(self, orders: Orders) -> None:
        """Starts the step's saves, behind the forward pass that is on the stream."""
        for job in orders.saves:
            self._jobs[job.number] = job
            self.store.save(job.number, job.blocks, self._stream())

    def poll(self) -> None:
        """Takes in what has ended."""
        for done in self.store.poll():
            job = self._jobs.pop(done.number)
            self._report.add(done)
            what = "saved" if done.saved else "loaded"
            failed = len(done.failed)
            moved = {f"{what}_blocks": len(job.blocks.slots) - failed, f"{what}_bytes": done.nbytes}
            self.counts.update(moved, **{f"not_{what}_blocks": failed})
            if not done.saved:
                self._received.add(job.request)
                self._bad_pages.update(job.blocks.block_ids[list(done.failed)].tolist())

    def take_received(self) -> set[str]:
        """Requests whose loads have ended since the last call."""
        self.poll()
        taken, self._received = self._received, set()
        return taken

    def take_bad_pages(self) -> set[int]:
        """Pages that loads could not fill, since the last call."""
        taken, self._bad_pages = self._bad_pages, set()
        return taken

    def take_report(self) -> Report | None:
        """What the scheduler has not been told."""
        self.poll()
        taken, self._report = self._report, Report()
        return taken if taken.ended else None

    def take_counts(self) -> dict[str, int]:
        """Blocks and bytes that moved since the last call."""
        taken, self.counts = +self.counts, Counter()
        return dict(taken)
