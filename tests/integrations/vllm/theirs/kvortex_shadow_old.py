"""As kvortex_shadow.py, for vLLM 0.15.1 and the tests of 0.14.1: 0.15 has no source archive, and the interface is the same.

Their runner has no pages at all, so these are made here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kvortex_shadow import SLOTS, TALLY, Method, method
from kvortex_shadow import pytest_terminal_summary as pytest_terminal_summary

PAGES, PAGE_BYTES = 128, 4096
_WORKERS: list[Any] = []


class Once(Method):
    """vLLM hands in iterators that give their entries once."""

    def __call__(self, *given: Any, **more: Any) -> Any:
        return super().__call__(*(list(each) if isinstance(each, Iterator) else each for each in given), **more)


class Behind:
    """kvortex's manager behind a mock."""

    def __init__(self, manager: Any, load_spec: type) -> None:
        self.ours, self._load_spec, self._ledger = manager, load_spec, manager._manager.ledger

    def lookup(self, answer: Any, hashes: Any) -> Any:
        """Hits of theirs that are stored here must be ours."""
        for name in list(hashes)[: answer or 0]:
            if self._ledger.slot_of(name) is not None:
                assert self.ours.lookup(iter([name])) == 1
                TALLY["hits of both"] += 1
        return answer

    def prepare_store(self, answer: Any, hashes: Any) -> Any:
        """What the test wants stored gets places here."""
        if answer is None or not answer.block_hashes_to_store:
            return answer
        wanted = list(answer.block_hashes_to_store)
        self._ledger.drop([name for name in wanted if self._ledger.slot_of(name) is not None])
        made = self.ours.prepare_store(iter(wanted))
        if made is not None and made.block_hashes_to_store == wanted:
            answer.store_spec.kvortex = made.store_spec
        elif made is not None:
            self.ours.complete_store(iter(made.block_hashes_to_store), False)
        return answer

    def complete_store(self, answer: Any, hashes: Any, success: bool = True) -> Any:
        """Chunks that were stored here are hits from now on."""
        names = list(hashes)
        pending = [name for name in names if self._ledger.is_pending(name)]
        self.ours.complete_store(iter(names), success)
        for name in pending:
            assert (self.ours.lookup(iter([name])) == 1) == success
        return answer

    def prepare_load(self, hashes: Any) -> Any:
        """Pins what is here."""
        names = list(hashes)
        spec = self._load_spec(names)
        if names and all(self._ledger.slot_of(name) is not None for name in names):
            spec.kvortex = self.ours.prepare_load(iter(names))
        return spec

    def complete_load(self, answer: Any, hashes: Any) -> Any:
        """Gives pins back."""
        self.ours.complete_load(hashes)
        return answer

    def touch(self, answer: Any, hashes: Any) -> Any:
        """As it is."""
        self.ours.touch(hashes)
        return answer


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Exchanges their mocks before anything of theirs is imported."""
    from vllm import forward_context

    from tests.v1.kv_connector.unit import utils as common

    make, context = common.create_vllm_config, forward_context.ForwardContext

    def create_vllm_config(*given: Any, **more: Any) -> Any:
        made = make(*given, **({"model": os.environ["KVORTEX_MODEL"]} | more))
        made.model_config.skip_tokenizer_init = True
        return made

    common.create_vllm_config = create_vllm_config
    forward_context.ForwardContext = lambda *given, **more: context(*given, **({"slot_mapping": {}} | more))  # new in 0.15
    from tests.v1.kv_connector.unit import test_offloading_connector as theirs

    theirs.MockOffloadingSpec = shadow(theirs)


def shadow(theirs: Any) -> type:
    """Their mock of a spec, with kvortex's behind it."""
    from kvortex.config import KVortexConfig
    from kvortex.integrations.vllm import layouts, spec_old
    from kvortex.integrations.vllm.ledger import Ledger
    from kvortex.integrations.vllm.manager import Manager
    from kvortex.integrations.vllm.mover import Mover
    from kvortex.integrations.vllm.store import Store
    from kvortex.keys import Namespace

    class Handler(theirs.MockOffloadingHandler):  # type: ignore[misc,name-defined]
        def __init__(self, per_chunk: int) -> None:
            super().__init__()
            self._per_chunk, pages = per_chunk, torch.zeros((PAGES, PAGE_BYTES), dtype=torch.int8)
            self._pages, layout = pages.numpy(), layouts.canonical_layout([SimpleNamespace(tensor=pages)])
            slots = SLOTS // 8 * per_chunk
            config = KVortexConfig(cpu_pool_size_bytes=slots * PAGE_BYTES, device="host")
            self.ours = spec_old.KvortexWorker(Mover(Store(config, layout, slots), per_chunk, lambda: None))
            self._moves = {loads: spec_old.KvortexHandler(self.ours, loads=loads) for loads in (False, True)}
            self._stored: dict[tuple[bytes, int], Any] = {}
            self._random = np.random.default_rng(11)
            _WORKERS.append(self.ours)

        def transfer_async(self, job_id: int, spec: Any) -> bool:
            source, target = spec
            loads = isinstance(target, theirs.GPULoadStoreSpec)
            place, pages = (source, target.block_ids) if loads else (target, source.block_ids)
            if not hasattr(place, "kvortex"):
                TALLY["jobs that a test only claims"] += 1
            else:
                names = [(bytes(name), at) for name in place.block_hashes for at in range(self._per_chunk)][-len(pages) :]
                TALLY["loads that begin within a chunk"] += loads and names[0][1] > 0
                for page in pages.tolist():
                    self._pages[page] = 0 if loads else self._random.integers(-128, 128, PAGE_BYTES, np.int8)
                job = (place.kvortex, target) if loads else (source, place.kvortex)
                assert self._moves[loads].transfer_async(job_id, job)
                self._moves[loads].wait({job_id})
                assert self._moves[loads].get_finished() == [(job_id, True)]
                for name, page in zip(names, pages.tolist(), strict=True):
                    if loads:
                        assert (self._pages[page] == self._stored[name]).all(), f"page {page} is not what was stored"
                        TALLY["pages loaded and compared"] += 1
                    else:
                        self._stored[name] = self._pages[page].copy()
                TALLY["loads" if loads else "stores"] += 1
            return bool(super().transfer_async(job_id, spec))

    class Spec(theirs.MockOffloadingSpec):  # type: ignore[misc,name-defined]
        def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
            super().__init__(vllm_config, kv_cache_config)
            self._per_chunk = self.offloaded_block_size // self.gpu_block_size
            ledger = Ledger(SLOTS // 8, "lru", 1, Namespace())
            verifier = lambda: _WORKERS[-1].mover if _WORKERS else None  # noqa: E731
            behind = Behind(spec_old.KvortexManager(Manager(ledger, verifier, True), 16), theirs.MockLoadStoreSpec)
            for name in ("lookup", "prepare_store", "complete_store", "complete_load", "touch"):
                method(self.manager, name, getattr(behind, name), Once)
            self.manager.prepare_load = behind.prepare_load

        def get_handlers(self, *_: Any) -> Any:
            self.handler = Handler(self._per_chunk)
            yield from super().get_handlers(*_)

    return Spec


@pytest.fixture(autouse=True)
def _kvortex_ends() -> Any:
    """Pools are freed behind each test."""
    yield
    while _WORKERS:
        worker = _WORKERS.pop()
        worker.store.engine._index.check()
        worker.store.close()
