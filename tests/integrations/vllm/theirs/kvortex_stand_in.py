"""A pytest plugin for vLLM's own tests of its managers and tiers, by which kvortex's stand in the place of theirs.

For the tests that ask nothing of how vLLM's are made inside: ``.ci/vllm-tests`` names them. Written for the tests of vLLM 0.32.
"""

from __future__ import annotations

import time
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _kvortex_stands_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    module = request.module
    if hasattr(module, "CPUOffloadingManager"):
        monkeypatch.setattr(module, "CPUOffloadingManager", manager_of(module))
    if hasattr(module, "FileSystemTierManager"):
        monkeypatch.setattr(module, "FileSystemTierManager", tier_on_disk)
        monkeypatch.setattr(module, "lookup_and_wait", lookup_and_wait)


def manager_of(module: Any) -> type:
    """kvortex's manager, which says where chunks are in vLLM's words."""
    from kvortex.integrations.vllm.ledger import Ledger
    from kvortex.integrations.vllm.manager import Manager
    from kvortex.integrations.vllm.spec_new import KvortexManager
    from kvortex.keys import Namespace

    class Stands(KvortexManager):  # type: ignore[misc]
        medium = module.Medium.CPU

        def __init__(self, num_chunks: int, cache_policy: str = "lru", enable_events: bool = False, **_: Any) -> None:
            ledger = Ledger(num_chunks, cache_policy, 1, Namespace())
            super().__init__(Manager(ledger, lambda: None, enable_events))

        def prepare_load(self, keys: Any, req_context: Any) -> Any:
            place = super().prepare_load(keys, req_context).place
            return module.CPULoadStoreSpec(place.slots)

        def prepare_store(self, keys: Any, req_context: Any) -> Any:
            made = super().prepare_store(keys, req_context)
            if made is not None:
                made.store_spec = module.CPULoadStoreSpec(made.store_spec.place.slots)
            return made

    return Stands


def tier_on_disk(
    offloading_spec: Any, primary_kv_view: Any, tier_type: str, root_dir: str, n_read_threads: int = 2, **more: Any
) -> Any:
    """kvortex's tier on a disk, by the words of theirs."""
    from kvortex.integrations.vllm import KvortexTier

    more.pop("n_write_threads", None)
    url = f"disk:{root_dir}?capacity=64MiB"
    tier = KvortexTier(offloading_spec, primary_kv_view, tier_type, url=url, read_threads=n_read_threads, **more)
    tier.file_mapper = Files(tier, root_dir)
    return tier


class Files:
    """Their tests look for a chunk's file to see that it is stored."""

    def __init__(self, tier: Any, folder: str) -> None:
        self._side, self._folder = tier.side, folder

    def get_file_name(self, key: bytes) -> str:
        """A path that exists if the chunk is stored."""
        from kvortex.integrations.vllm.ledger import keys_of

        there = self._side._line.has(keys_of(self._side._namespace, [key]))[0]
        return self._folder if there else f"{self._folder}/no such chunk"


def lookup_and_wait(tier: Any, keys: Any, ctx: Any = None, timeout: float = 10.0) -> list[Any]:
    """As theirs, which looks into their tier for the answer."""
    from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext

    context = ReqContext(req_id="test") if ctx is None else ctx
    deadline = time.monotonic() + timeout
    while True:
        found = [tier.lookup(key, context) for key in keys]
        tier.on_schedule_end(ScheduleEndContext(new_req_ids=[], preempted_req_ids=()))
        if LookupResult.RETRY not in found or time.monotonic() > deadline:
            return found
        time.sleep(0.001)
