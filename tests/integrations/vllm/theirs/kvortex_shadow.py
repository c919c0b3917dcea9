"""A pytest plugin for vLLM's own tests of its offloading scheduler, by which kvortex carries out what their mocks are told.

Their runner drives vLLM's real scheduler and connector over a manager and a worker that must be its own mocks, since each test
says what the manager answers. Here the mocks stay, and behind each is kvortex's: its manager hears all that vLLM calls, and
gives the places, and its worker moves the pages of the test's tensors. Before a store these get bytes that were never there;
behind a load they must be those that were stored under that key. What a test only claims (a hit for a chunk that nobody stored)
is left out, and counted.

Run by ``.ci/vllm-tests``; written for the tests of vLLM 0.32.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

SLOTS = 1024
TALLY: Counter[str] = Counter()
_OPEN: list[Any] = []


class Method(MagicMock):
    """A method of their mock, whose answer somebody else may look at."""

    def __call__(self, *given: Any, **more: Any) -> Any:
        answer = super().__call__(*given, **more)
        return self.__dict__["behind"](answer, *given, **more)


def method(mock: Any, name: str, behind: Any, kind: type = Method) -> None:
    """Puts somebody behind a method, whatever a test makes that answer."""
    old = getattr(mock, name)
    new = kind(return_value=old.return_value)
    new.__dict__["behind"] = behind
    setattr(mock, name, new)


class Behind:
    """kvortex's manager behind a mock."""

    def __init__(self, manager: Any, load_spec: type) -> None:
        self.ours, self._load_spec, self._ledger = manager, load_spec, manager._manager.ledger
        self.claimed: set[bytes] = set()

    def lookup(self, answer: Any, key: Any, context: Any) -> Any:
        """A hit of theirs that is stored here must be one of ours."""
        if answer.name == "HIT" and self._ledger.slot_of(key) is not None:
            assert self.ours.lookup(key, context).name == "HIT"
            TALLY["hits of both"] += 1
        return answer

    def prepare_store(self, answer: Any, keys: Any, context: Any) -> Any:
        """What the test wants stored gets places here."""
        if answer is None:
            return None
        wanted = list(answer.keys_to_store)
        self._ledger.drop([key for key in wanted if self._ledger.slot_of(key) is not None])  # the test says so
        made = self.ours.prepare_store(wanted, context) if wanted else None
        if made is not None and made.keys_to_store == wanted:
            answer.store_spec.kvortex = made.store_spec
        elif made is not None:
            self.ours.complete_store(made.keys_to_store, context, False)
        return answer

    def complete_store(self, answer: Any, keys: Any, context: Any, success: bool = True) -> Any:
        """Chunks that were stored here are hits from now on."""
        pending = [key for key in keys if self._ledger.is_pending(key)]
        self.ours.complete_store(keys, context, success)
        for key in pending:
            assert (self.ours.lookup(key, context).name == "HIT") == success
        return answer

    def prepare_load(self, keys: Any, context: Any) -> Any:
        """Pins what is here."""
        keys = list(keys)
        spec = self._load_spec(keys)
        if keys and all(self._ledger.slot_of(key) is not None for key in keys):
            spec.kvortex = self.ours.prepare_load(keys, context)
        return spec

    def complete_load(self, answer: Any, keys: Any, context: Any) -> Any:
        """Gives pins back."""
        self.ours.complete_load(keys, context)
        return answer

    def touch(self, answer: Any, keys: Any, context: Any) -> Any:
        """As it is."""
        self.ours.touch(list(keys), context)
        return answer

    def reset_cache(self, answer: Any) -> Any:
        """Forgets all."""
        self.ours.reset_cache()
        return answer


def places(spec: Any, keys: Any, per_chunk: int) -> list[tuple[bytes, int]]:
    """Key and place in its chunk of each page of a job, as vLLM means it; written without looking at kvortex's."""
    found, first = [], 0
    for count, start in zip(spec.group_sizes, spec.block_indices, strict=True):
        skipped = start % per_chunk if count else 0
        found += [(bytes(keys[first + (skipped + at) // per_chunk]), (skipped + at) % per_chunk) for at in range(count)]
        first += -(-(skipped + count) // per_chunk) if count else 0
    assert first == len(keys)
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Exchanges their mocks before anything of theirs is imported."""
    from vllm.platforms.cpu import CpuPlatform

    from tests.v1.kv_connector.unit import utils as common

    make = common.create_vllm_config

    def create_vllm_config(*given: Any, **more: Any) -> Any:
        made = make(*given, **({"model": os.environ["KVORTEX_MODEL"]} | more))  # theirs would be fetched from a hub
        made.model_config.skip_tokenizer_init = True
        return made

    common.create_vllm_config = create_vllm_config
    CpuPlatform.support_hybrid_kv_cache = classmethod(lambda cls: True)  # the tests are of bookkeeping, not of attention
    from tests.v1.kv_connector.unit.offloading_connector import utils as theirs

    theirs.MockOffloadingSpec = shadow(theirs)


def shadow(theirs: Any) -> type:
    """Their mock of a spec, with kvortex's behind it."""

    class Worker(theirs.MockOffloadingWorker):  # type: ignore[misc,name-defined]
        def __init__(self, spec: Any, caches: Any) -> None:
            super().__init__()
            self._ours, self._per_chunk = spec.get_worker(caches), spec._per_chunk
            self._pages = [each.tensor.view(torch.int8).numpy() for each in caches.tensors]
            self._stored: dict[tuple[bytes, int], list[Any]] = {}
            self._random = np.random.default_rng(11)
            _OPEN.append(self._ours)

        def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
            if hasattr(dst_spec, "kvortex"):
                for page in src_spec.block_ids.tolist():
                    for pages in self._pages:
                        pages[page] = self._random.integers(-128, 128, pages[page].shape, np.int8)
                at = places(src_spec, dst_spec.offload_keys, self._per_chunk)
                for name, page in zip(at, src_spec.block_ids.tolist(), strict=True):
                    self._stored[name] = [pages[page].copy() for pages in self._pages]
                assert self._ours.submit_store(job_id, src_spec, dst_spec.kvortex)
                self._end(job_id, "stores")
            else:
                TALLY["stores that a test only claims"] += 1
            return bool(super().submit_store(job_id, src_spec, dst_spec))

        def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:
            if hasattr(src_spec, "kvortex"):
                for page in dst_spec.block_ids.tolist():
                    for pages in self._pages:
                        pages[page] = 0
                assert self._ours.submit_load(job_id, src_spec.kvortex, dst_spec)
                self._end(job_id, "loads")
                TALLY["loads that begin within a chunk"] += any(start % self._per_chunk for start in dst_spec.block_indices)
                at = places(dst_spec, src_spec.offload_keys, self._per_chunk)
                for name, page in zip(at, dst_spec.block_ids.tolist(), strict=True):
                    for pages, wanted in zip(self._pages, self._stored[name], strict=True):
                        assert (pages[page] == wanted).all(), f"page {page} is not what was stored under {name}"
                    TALLY["pages loaded and compared"] += 1
            else:
                TALLY["loads that a test only claims"] += 1
            return bool(super().submit_load(job_id, src_spec, dst_spec))

        def _end(self, job_id: int, what: str) -> None:
            self._ours.wait({job_id})
            (result,) = self._ours.get_finished()
            assert (result.job_id, result.success) == (job_id, True)
            TALLY[what] += 1

    class Spec(theirs.MockOffloadingSpec):  # type: ignore[misc,name-defined]
        def __init__(self, config: Any) -> None:
            from kvortex.integrations.vllm import KvortexOffloadingSpec

            super().__init__(config)
            nbytes = config.worker_kv_bytes_per_block or 4096  # 0 where a test has no worker, which a real vLLM always has
            extra = {"cpu_pool_size_bytes": SLOTS * -(-nbytes // 4096) * 4096 * config.cache.blocks_per_chunk}
            spec = KvortexOffloadingSpec(
                dataclasses.replace(config, extra_config=extra, worker_kv_bytes_per_block=nbytes)
            )
            self._kvortex, behind = spec, Behind(spec.get_manager(), theirs.MockLoadStoreSpec)
            for name in ("lookup", "prepare_store", "complete_store", "complete_load", "touch", "reset_cache"):
                method(self.manager, name, getattr(behind, name))
            self.manager.prepare_load = behind.prepare_load
            self._behind = behind

        def get_worker(self, caches: Any) -> Any:
            self.handler = Worker(self._kvortex, caches)
            return self.handler

    return Spec


@pytest.fixture(autouse=True)
def _kvortex_ends() -> Any:
    """Pools are freed behind each test."""
    yield
    while _OPEN:
        worker = _OPEN.pop()
        worker.store.engine._index.check()
        worker.shutdown()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What kvortex did."""
    for name, count in sorted(TALLY.items()):
        terminalreporter.write_line(f"kvortex: {count} {name}")
