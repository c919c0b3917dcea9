"""The spec for vLLM's offloading interface of manager and worker (0.26 and newer)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from vllm.v1.kv_offload import base

from kvortex.errors import ConfigError
from kvortex.integrations.vllm import layouts, links, options
from kvortex.integrations.vllm.ledger import Ledger
from kvortex.integrations.vllm.manager import Manager, Place
from kvortex.integrations.vllm.mover import Mover
from kvortex.integrations.vllm.store import Store

_RESULTS = {"hit": base.LookupResult.HIT, "pending": base.LookupResult.HIT_PENDING, "miss": base.LookupResult.MISS}


class KvortexPlace(base.LoadStoreSpec):  # type: ignore[misc]
    """Where chunks lie, from manager to worker."""

    def __init__(self, place: Place) -> None:
        self.place = place


class KvortexManager(base.OffloadingManager):  # type: ignore[misc]
    """vLLM's calls, one by one."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def lookup(self, key: Any, req_context: Any) -> Any:
        """Whether a chunk can be loaded."""
        return _RESULTS[self._manager.lookup(key)]

    def prepare_load(self, keys: Collection[Any], req_context: Any) -> KvortexPlace:
        """Pins chunks."""
        return KvortexPlace(self._manager.prepare_load(list(keys)))

    def touch(self, keys: Collection[Any], req_context: Any) -> None:
        """These count as used."""
        self._manager.ledger.touch(list(keys))

    def complete_load(self, keys: Collection[Any], req_context: Any) -> None:
        """Gives pins back."""
        self._manager.complete_load(keys)

    def prepare_store(self, keys: Collection[Any], req_context: Any) -> Any:
        """Slots for new chunks; None where there are none."""
        made = self._manager.prepare_store(list(keys))
        return None if made is None else base.PrepareStoreOutput(made.names, KvortexPlace(made.place), made.evicted)

    def complete_store(self, keys: Collection[Any], req_context: Any, success: bool = True) -> None:
        """Chunks can be loaded from now on."""
        self._manager.complete_store(keys, success)

    def on_new_request(self, req_context: Any) -> Any:
        """Chunks are offered as they are computed."""
        return base.RequestOffloadingContext()

    def take_events(self) -> Iterable[Any]:
        """What came and went."""
        for names, removed in self._manager.take_changes():
            yield base.OffloadingEvent(keys=names, medium=base.Medium.CPU, removed=removed)

    def reset_cache(self) -> None:
        """Forgets all."""
        self._manager.reset()


class KvortexWorker(base.OffloadingWorker):  # type: ignore[misc]
    """vLLM's jobs."""

    def __init__(self, mover: Mover) -> None:
        self.mover, self.store = mover, mover.store

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Starts to store pages."""
        self.mover.save(job_id, src_spec.block_ids, dst_spec.place, _groups(src_spec))
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:
        """Starts to load pages. All are as quick as they can be, ``expedited`` or not."""
        self.mover.load(job_id, dst_spec.block_ids, src_spec.place, _groups(dst_spec))
        return True

    def get_finished(self) -> list[Any]:
        """Jobs that have ended."""
        return [
            base.TransferResult(done.number, done.saved or not done.failed, done.nbytes, done.seconds)
            for done in self.mover.poll()
        ]

    def wait(self, job_ids: set[int]) -> None:
        """Blocks until jobs have ended."""
        self.mover.wait(job_ids)

    def shutdown(self) -> None:
        """Frees the pool."""
        self.store.close()


class KvortexOffloadingSpec(base.OffloadingSpec):  # type: ignore[misc]
    """kvortex behind vLLM's OffloadingConnector."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        identity = options.Identity(
            model=config.model.name,
            dtype=config.model.dtype,
            block_size=config.groups[0].tokens_per_block,
            rank=config.parallel.rank,
            world_size=config.parallel.world_size,
            engine_id=config.engine_id,
        )
        if getattr(config, "canonical_layout", False):
            raise ConfigError(f"{options.SOURCE}: 'canonical_layout': kvortex keeps each rank's own bytes; leave it out")
        self._identity, self._per_chunk = identity, config.cache.blocks_per_chunk
        self._options = options.read_options(config.extra_config, identity, options.OF_VLLM)
        if config.worker_kv_bytes_per_block < 1:
            raise ConfigError("vLLM does not say how many bytes a block has (worker_kv_bytes_per_block is 0)")
        self._chunks = options.slots_for(self._options, config.worker_kv_bytes_per_block, self._per_chunk)

    def get_manager(self) -> KvortexManager:
        """The scheduler's half."""
        space = options.ledger_namespace(self._options)
        ledger = Ledger(self._chunks, self._options.eviction_policy, self._options.admit_after, space)
        return KvortexManager(Manager(ledger, self._verifier, self.config.enable_kv_cache_events))

    def get_worker(self, kv_caches: Any) -> KvortexWorker:
        """The worker's half, with its pool."""
        layout = layouts.canonical_layout(kv_caches.tensors)
        first = kv_caches.tensors[0].tensor
        store = Store(self._options, layout, self._chunks * self._per_chunk)
        worker = KvortexWorker(Mover(store, self._per_chunk, lambda: layouts.current_stream(first)))
        links.register(self._identity.engine_id, worker)
        return worker

    def _verifier(self) -> Mover | None:
        worker = links.worker_of(self._identity.engine_id, self._identity.world_size)
        return None if worker is None else worker.mover


def _groups(spec: Any) -> list[tuple[int, int]]:
    return list(zip(spec.group_sizes, spec.block_indices, strict=True))
