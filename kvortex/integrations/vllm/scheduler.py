"""The connector's half beside vLLM's scheduler: which blocks a request finds, and which are saved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvortex.integrations.vllm.ledger import Ledger
from kvortex.integrations.vllm.messages import Blocks, Int64s, Job, Orders, Report, rows_of


@dataclass
class _Request:
    """A request that vLLM has not finished.

    ``hashes`` is vLLM's own list, which grows; ``prompt`` are the tokens that it came with. ``pages`` are its block ids, as far
    as they were told. Blocks before ``offered`` were offered to be saved.
    """

    hashes: Sequence[bytes]
    prompt: int
    pages: list[int] = field(default_factory=list)
    offered: int = 0
    computed: int = 0


@dataclass
class _Running:
    saved: bool
    names: list[bytes]
    slots: Int64s
    pages: list[int]
    left: int
    failed: set[int] = field(default_factory=set)
    doomed: bool = False  # the cache was reset meanwhile


class SchedulerSide:
    """Knows of every transfer until all workers have said that it ended.

    Pages are vLLM's: it may free them while a transfer still reads or writes them (a preemption, an abort, a window that has
    moved on). So each page of a running transfer is remembered, and whoever gets it next is held up until that has ended
    (``Orders.fence``); nothing else must know of preemptions.

    Parameters
    ----------
    ledger
    block_size
        Tokens of a block, which are also those of a hash.
    workers
        How many must say that a transfer has ended.
    ask
        Gives what a worker in this process has to say, at once; None where it is elsewhere and says it behind a step.
    prompts_only
        Blocks with tokens that were generated are not saved.
    """

    def __init__(
        self, ledger: Ledger, block_size: int, workers: int, ask: Callable[[], Report | None], *, prompts_only: bool = False
    ) -> None:
        self.ledger, self._block_size, self._workers, self._ask = ledger, block_size, workers, ask
        self._prompts_only = prompts_only
        self._numbers = itertools.count(1)
        self._requests: dict[str, _Request] = {}
        self._running: dict[int, _Running] = {}
        self._on_page: dict[int, set[int]] = {}
        self._orders = Orders()
        self._fence: set[int] = set()
        self.skipped = 0  # blocks that found no slot

    # -- what the scheduler asks

    def matched(self, request: Any, computed: int) -> int:
        """Tokens behind the first ``computed`` ones that can be loaded. Asked as often as vLLM likes."""
        self._absorb_now()
        known = self._requests[request.request_id] = _Request(request.block_hashes, request.num_prompt_tokens)
        known.computed = computed
        if computed % self._block_size or getattr(request, "skip_reading_prefix_cache", False):
            return 0
        first, full = computed // self._block_size, request.num_tokens // self._block_size
        return self.ledger.run(known.hashes[first:full]) * self._block_size

    def allocated(self, request: Any, pages: Sequence[int], external: int) -> None:
        """vLLM has given a request its pages; ``external`` tokens of them are to be loaded."""
        known = self._requests.setdefault(request.request_id, _Request(request.block_hashes, request.num_prompt_tokens))
        first = known.computed // self._block_size
        self._guard(pages[max(first, len(known.pages)) :])
        known.pages = list(pages)
        if external:
            self._start_load(request.request_id, known, first, -(-external // self._block_size))

    def _start_load(self, name: str, known: _Request, first: int, count: int) -> None:
        at = [i for i in range(first, first + count) if known.pages[i]]  # page 0 stands for none, before a window
        names = [known.hashes[i] for i in at]
        slots, pages = self.ledger.pin(names), [known.pages[i] for i in at]
        self._orders.loads.append(self._run(name, False, names, slots, pages))

    def orders(self, output: Any) -> Orders:
        """What workers are to do in the step that vLLM has just scheduled."""
        for new in output.scheduled_new_reqs:
            if (known := self._requests.get(new.req_id)) is not None:
                known.pages = list(new.block_ids[0])
                self._offer(new.req_id, known, new.num_computed_tokens + output.num_scheduled_tokens[new.req_id])
        cached = output.scheduled_cached_reqs
        resumed = getattr(cached, "resumed_req_ids", ())
        for name, pages, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if (known := self._requests.get(name)) is None:
                continue
            more = list(pages[0]) if pages else []
            if name in resumed:
                known.pages, known.offered = more, 0
            else:
                self._guard(more)
                known.pages += more
            self._offer(name, known, computed + output.num_scheduled_tokens[name])
        orders, self._orders = self._orders, Orders()
        orders.fence, self._fence = tuple(sorted(self._fence)), set()
        return orders

    def _offer(self, name: str, known: _Request, computed: int) -> None:
        """Saves blocks of a request that are full behind this step, and are not there yet."""
        tokens = min(computed, known.prompt) if self._prompts_only else computed
        full = min(tokens // self._block_size, len(known.hashes), len(known.pages))
        at = [i for i in range(known.offered, full) if known.pages[i]]
        known.offered = max(full, known.offered)
        names = list(dict.fromkeys(known.hashes[i] for i in at))
        if len(names) != len(at) or not at:  # nothing, or no such thing as vLLM's hashes
            return
        made = self.ledger.reserve(names)
        self.skipped += sum(1 for each in names if self.ledger.slot_of(each) is None and not self.ledger.is_pending(each))
        mine = made.positions.tolist()
        if mine:
            pages = [known.pages[at[i]] for i in mine]
            self._orders.saves.append(self._run(name, True, [names[i] for i in mine], made.slots, pages))

    def _run(self, request: str, saved: bool, names: list[bytes], slots: Int64s, pages: list[int]) -> Job:
        number = next(self._numbers)
        self._running[number] = _Running(saved, names, slots, pages, self._workers)
        for page in pages:
            self._on_page.setdefault(page, set()).add(number)
        return Job(number, request, Blocks(slots, rows_of(names), np.array(pages, np.int64)))

    def _guard(self, pages: Iterable[int]) -> None:
        if self._on_page:
            for page in pages:
                self._fence.update(self._on_page.get(page, ()))

    # -- what it is told

    def finished(self, name: str) -> None:
        """vLLM is done with a request. What still moves of it goes on."""
        self._requests.pop(name, None)

    def absorb(self, report: Report | None) -> None:
        """Takes in what workers say."""
        for number, (workers, failed) in report.ended.items() if report is not None else ():
            run = self._running.get(number)
            if run is None:
                continue
            run.left -= workers
            run.failed.update(failed)
            if run.left <= 0:
                self._end(number, self._running.pop(number))

    def _absorb_now(self) -> None:
        self.absorb(self._ask())

    def _end(self, number: int, run: _Running) -> None:
        lost = [run.names[i] for i in sorted(run.failed)]
        if run.saved and run.doomed:
            self.ledger.abort(run.names)
        elif run.saved:
            self.ledger.abort(lost)
            self.ledger.commit(run.names)  # without those
        else:
            self.ledger.drop(lost)
            self.ledger.unpin(run.slots)
        for page in run.pages:
            on = self._on_page.get(page)
            if on is not None:
                on.discard(number)
                if not on:
                    del self._on_page[page]

    @property
    def busy(self) -> bool:
        """Whether transfers run."""
        return bool(self._running)

    def reset(self) -> None:
        """Forgets all blocks, also those that are being saved just now."""
        self._absorb_now()
        for run in self._running.values():
            run.doomed = True
        self.ledger.drop(self.ledger.names())
        for known in self._requests.values():
            known.offered = 0
