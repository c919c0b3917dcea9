"""The connector's two halves together, over pages of the host: what a request finds, what is saved, and what goes wrong."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from kvortex.config import KVortexConfig
from kvortex.devices import open_device
from kvortex.integrations.vllm.ledger import Ledger
from kvortex.integrations.vllm.messages import Orders, Report
from kvortex.integrations.vllm.scheduler import SchedulerSide
from kvortex.integrations.vllm.store import Store
from kvortex.integrations.vllm.worker import WorkerSide
from kvortex.keys import Namespace
from tests.integrations.vllm.tensors import FakeRequest, output_of
from tests.pages import PagedCache

BS = 4
PROMPT = list(range(100, 100 + 5 * BS + 2))  # five full blocks


class World:
    """A scheduler's half and workers' halves, each with pages of its own."""

    def __init__(self, slots: int = 16, ranks: int = 1) -> None:
        self.caches = [PagedCache.plain(open_device("host"), blocks=40) for _ in range(ranks)]
        for at, cache in enumerate(self.caches):
            cache.rng = np.random.default_rng(at)
            cache.randomize()
        size = slots * (-(-self.caches[0].layout.record_bytes // 4096) * 4096)
        self.workers = [
            WorkerSide(
                Store(KVortexConfig(cpu_pool_size_bytes=size, device="host", rank=r, world_size=ranks), c.layout, slots),
                lambda: None,
            )
            for r, c in enumerate(self.caches)
        ]
        self.side = SchedulerSide(Ledger(slots, "lru", 1, Namespace()), BS, ranks, lambda: None)
        self.received: list[set[str]] = []

    def page(self, number: int, rank: int = 0) -> bytes:
        """All bytes of a page."""
        tensors = zip(self.caches[rank].tensors, self.caches[rank].memory(), strict=True)
        return b"".join(np.ascontiguousarray(tensor.view(memory)[:, number]).tobytes() for tensor, memory in tensors)

    def step(self, orders: Orders, ranks: Sequence[int] | None = None) -> set[int]:
        """What workers do in a step, to its end, and what the scheduler is then told; pages that could not be filled."""
        bad: set[int] = set()
        for rank in range(len(self.workers)) if ranks is None else ranks:
            worker, told = self.workers[rank], pickle.loads(pickle.dumps(orders))
            worker.fence(told)
            worker.load(told)
            worker.save(told)
            worker.store.wait([job.number for job in [*told.loads, *told.saves]])
            self.received.append(worker.take_received())
            bad |= worker.take_bad_pages()
            self.side.absorb(pickle.loads(pickle.dumps(worker.take_report() or Report())))
        return bad

    def prefill(self, name: str, pages: list[int], tokens: list[int] = PROMPT) -> FakeRequest:
        """A request that is computed in one step, and saved."""
        request = FakeRequest(name, tokens, BS)
        assert self.side.matched(request, 0) == 0
        self.side.allocated(request, pages, 0)
        self.step(self.side.orders(output_of(new=[(name, pages, 0, len(tokens))])))
        return request

    def load(self, name: str, pages: list[int], tokens: list[int] = PROMPT, computed: int = 0) -> Orders:
        """A request that finds blocks, up to its orders."""
        request = FakeRequest(name, tokens, BS)
        found = self.side.matched(request, computed)
        self.side.allocated(request, pages, found)
        return self.side.orders(output_of())

    def close(self) -> None:
        """Nothing may be left over."""
        counts = self.side.ledger.counts()
        assert (counts.pinned, counts.reserved) == (0, 0)
        assert not self.side.busy and not self.side._on_page
        self.side.ledger._index.check()
        for worker in self.workers:
            assert not worker._jobs
            worker.store.close()


@pytest.fixture(params=[1, 2], ids=["one worker", "two workers"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(ranks=request.param)
    yield made
    made.close()


def test_what_was_computed_once_is_loaded_into_other_pages(world: World) -> None:
    world.prefill("a", [1, 2, 3, 4, 5, 6])
    world.side.finished("a")
    assert world.side.matched(FakeRequest("b", PROMPT, BS), 0) == 5 * BS
    assert world.side.matched(FakeRequest("b", PROMPT, BS), 2 * BS) == 3 * BS
    assert world.side.matched(FakeRequest("b", PROMPT, BS), 3) == 0  # no block's boundary
    assert world.step(world.load("b", [1, 2, 13, 14, 15, 16], computed=2 * BS)) == set()
    for rank in range(len(world.workers)):
        assert [world.page(p, rank) for p in (13, 14, 15)] == [world.page(p, rank) for p in (3, 4, 5)]
        assert world.page(16, rank) != world.page(6, rank)
    assert world.received[-1] == {"b"}


def test_blocks_are_found_when_all_workers_have_saved_them() -> None:
    world = World(ranks=2)
    request = FakeRequest("a", PROMPT, BS)
    world.side.matched(request, 0)
    world.side.allocated(request, [1, 2, 3, 4, 5, 6], 0)
    orders = world.side.orders(output_of(new=[("a", [1, 2, 3, 4, 5, 6], 0, len(PROMPT))]))
    world.step(orders, ranks=[0])
    assert world.side.matched(FakeRequest("b", PROMPT, BS), 0) == 0
    world.step(orders, ranks=[1])
    assert world.side.matched(FakeRequest("b", PROMPT, BS), 0) == 5 * BS
    world.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_block_that_one_worker_cannot_load_is_computed_and_forgotten(rank: int) -> None:
    world = World(ranks=2)
    world.prefill("a", [1, 2, 3, 4, 5, 6])
    store = world.workers[rank].store
    slot = world.side.ledger.slot_of(FakeRequest("a", PROMPT, BS).block_hashes[2])
    (there,) = store.engine._index.acquire(store._keys[[slot]])
    store.engine._index.release([there])
    store.engine._parts.arena.view(int(there))[100] ^= 4
    assert world.step(world.load("b", [11, 12, 13, 14, 15, 16])) == {13}
    assert world.received[-2:] == [{"b"}, {"b"}]
    assert world.side.matched(FakeRequest("c", PROMPT, BS), 0) == 2 * BS
    world.close()


def test_blocks_are_saved_as_they_become_full(world: World) -> None:
    request = FakeRequest("a", PROMPT, BS)
    world.side.matched(request, 0)
    world.side.allocated(request, [1, 2], 0)
    world.step(world.side.orders(output_of(new=[("a", [1, 2], 0, 2 * BS + 1)])))
    assert world.side.ledger.run(request.block_hashes) == 2
    world.step(world.side.orders(output_of(cached=[("a", [3, 4], 2 * BS + 1, BS)])))
    assert world.side.ledger.run(request.block_hashes) == 3
    request.grow(1, 2)  # the sixth block's hash is there, its last token not yet computed
    world.step(world.side.orders(output_of(cached=[("a", [5, 6], 3 * BS + 1, 2 * BS + 2)])))
    assert world.side.ledger.run(request.block_hashes) == 5
    world.step(world.side.orders(output_of(cached=[("a", None, 6 * BS - 1, 1)])))
    assert world.side.ledger.run(request.block_hashes) == 6


def test_blocks_with_generated_tokens_are_saved_only_where_that_is_wanted() -> None:
    world = World()
    world.side._prompts_only = True
    request = FakeRequest("a", PROMPT, BS)
    world.side.matched(request, 0)
    world.side.allocated(request, [1, 2, 3, 4, 5, 6, 7], 0)
    world.step(world.side.orders(output_of(new=[("a", [1, 2, 3, 4, 5, 6, 7], 0, len(PROMPT))])))
    request.grow(*range(6))
    world.step(world.side.orders(output_of(cached=[("a", None, len(PROMPT), 6)])))
    assert world.side.ledger.run(request.block_hashes) == 5
    world.close()


def test_who_gets_a_page_waits_for_transfers_that_use_it() -> None:
    world = World()
    request = FakeRequest("a", PROMPT, BS)
    world.side.matched(request, 0)
    world.side.allocated(request, [1, 2, 3, 4, 5, 6], 0)
    saving = world.side.orders(output_of(new=[("a", [1, 2, 3, 4, 5, 6], 0, len(PROMPT))]))
    (save,) = saving.saves
    # Preempted or finished: its pages go to others while the save runs. To one that is new, and to one that grows.
    other = FakeRequest("b", [7] * BS * 3, BS)
    world.side.matched(other, 0)
    world.side.allocated(other, [20, 5], 0)
    assert world.side.orders(output_of(new=[("b", [20, 5], 0, 1)])).fence == (save.number,)
    assert world.side.orders(output_of(cached=[("b", [6], 1, 1)])).fence == ()  # was no full block, so was not saved
    assert world.side.orders(output_of(cached=[("b", [2], 2, 1)])).fence == (save.number,)
    world.step(saving)
    assert world.side.orders(output_of(cached=[("b", [1], 2, 1)])).fence == ()
    # A load that is aborted in the middle: its pages are free for vLLM at once.
    loading = world.load("c", [31, 32, 33, 34, 35])
    world.side.finished("c")
    third = FakeRequest("d", [9] * BS, BS)
    world.side.matched(third, 0)
    world.side.allocated(third, [33], 0)
    assert world.side.orders(output_of()).fence == (loading.loads[0].number,)
    assert world.side.ledger.counts().pinned == 5
    world.step(loading)
    assert world.side.ledger.counts().pinned == 0
    for name in ("a", "b", "d"):
        world.side.finished(name)
    world.close()


def test_a_resumed_request_is_offered_anew(world: World) -> None:
    request = world.prefill("a", [1, 2, 3, 4, 5, 6])
    world.side.ledger.drop(request.block_hashes[1:3])
    world.side.matched(request, 0)
    world.side.allocated(request, [21, 22, 23, 24, 25, 26], 0)
    orders = world.side.orders(
        output_of(cached=[("a", [21, 22, 23, 24, 25, 26], 0, len(PROMPT))], resumed=["a"])
    )
    assert [job.blocks.block_ids.tolist() for job in orders.saves] == [[22, 23]]
    world.step(orders)


def test_a_pool_that_is_too_small_keeps_what_fits() -> None:
    world = World(slots=3)
    request = world.prefill("a", [1, 2, 3, 4, 5, 6])
    assert world.side.ledger.run(request.block_hashes) == 3 and world.side.skipped == 2
    world.prefill("b", [1, 2, 3], list(range(500, 500 + 2 * BS)))
    assert world.side.ledger.counts().evictions == 2
    assert world.step(world.load("c", [11, 12, 13, 14, 15, 16], list(range(500, 500 + 2 * BS)))) == set()
    assert [world.page(11), world.page(12)] == [world.page(1), world.page(2)]
    world.close()


def test_a_reset_forgets_also_what_is_being_saved(world: World) -> None:
    request = FakeRequest("a", PROMPT, BS)
    world.side.matched(request, 0)
    world.side.allocated(request, [1, 2, 3, 4, 5, 6], 0)
    orders = world.side.orders(output_of(new=[("a", [1, 2, 3, 4, 5, 6], 0, len(PROMPT))]))
    world.side.reset()
    world.step(orders)
    assert world.side.matched(FakeRequest("b", PROMPT, BS), 0) == 0 and not world.side.ledger.names()
    world.prefill("c", [1, 2, 3, 4, 5, 6])
    loading = world.load("d", [11, 12, 13, 14, 15, 16])
    world.side.reset()  # in the middle of a load: it goes on, and gives its pins back
    assert world.step(loading) == set()
    assert world.side.matched(FakeRequest("e", PROMPT, BS), 0) == 0


def test_pages_before_a_window_are_left_out(world: World) -> None:
    world.prefill("a", [1, 2, 3, 4, 5, 6])
    orders = world.load("b", [0, 0, 13, 14, 15, 16])
    assert orders.loads[0].blocks.block_ids.tolist() == [13, 14, 15]
    world.step(orders)
    assert world.page(13) == world.page(3)


def test_a_request_that_must_not_use_caches_finds_nothing(world: World) -> None:
    world.prefill("a", [1, 2, 3, 4, 5, 6])
    request = FakeRequest("b", PROMPT, BS)
    request.skip_reading_prefix_cache = True  # type: ignore[attr-defined]
    assert world.side.matched(request, 0) == 0
