"""The spec for vLLM's offloading interface of manager and handlers (0.15 to 0.17)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vllm.v1.kv_offload import abstract, mediums, spec
from vllm.v1.kv_offload.worker import worker as handlers

from kvortex.integrations.vllm import asking, layouts, links, options
from kvortex.integrations.vllm.ledger import Ledger
from kvortex.integrations.vllm.manager import Manager, Place
from kvortex.integrations.vllm.mover import Mover
from kvortex.integrations.vllm.store import Store

_MEDIUM = "KVORTEX"


class KvortexPlace(abstract.LoadStoreSpec):  # type: ignore[misc]
    """Where chunks lie, from manager to worker."""

    def __init__(self, place: Place) -> None:
        self.place = place

    @staticmethod
    def medium() -> str:
        """What handlers are chosen by."""
        return _MEDIUM


class KvortexManager(abstract.OffloadingManager):  # type: ignore[misc]
    """vLLM's calls. Hashes come as iterators that give them once."""

    def __init__(self, manager: Manager, chunk_tokens: int) -> None:
        self._manager, self._chunk_tokens = manager, chunk_tokens

    def lookup(self, block_hashes: Iterable[Any]) -> int | None:
        """How many chunks from the first on can be loaded."""
        count = 0
        for name in block_hashes:
            if self._manager.lookup(name) != "hit":
                break
            count += 1
        return count

    def prepare_load(self, block_hashes: Iterable[Any]) -> KvortexPlace:
        """Pins chunks."""
        return KvortexPlace(self._manager.prepare_load(list(block_hashes)))

    def touch(self, block_hashes: Iterable[Any]) -> None:
        """These count as used."""
        self._manager.ledger.touch(list(block_hashes))

    def complete_load(self, block_hashes: Iterable[Any]) -> None:
        """Gives pins back."""
        self._manager.complete_load(block_hashes)

    def prepare_store(self, block_hashes: Iterable[Any]) -> Any:
        """Slots for new chunks; None where there are none."""
        made = self._manager.prepare_store(list(block_hashes))
        return None if made is None else abstract.PrepareStoreOutput(made.names, KvortexPlace(made.place), made.evicted)

    def complete_store(self, block_hashes: Iterable[Any], success: bool = True) -> None:
        """Chunks can be loaded from now on."""
        self._manager.complete_store(block_hashes, success)

    def take_events(self) -> Iterable[Any]:
        """What came and went."""
        for names, removed in self._manager.take_changes():
            yield abstract.OffloadingEvent(
                block_hashes=names, block_size=self._chunk_tokens, medium=_MEDIUM, removed=removed
            )


class KvortexHandler(handlers.OffloadingHandler):  # type: ignore[misc]
    """vLLM's jobs of one direction."""

    def __init__(self, both: KvortexWorker, loads: bool) -> None:
        self._both, self._loads = both, loads

    def transfer_async(self, job_id: int, spec: Any) -> bool:
        """Starts a job."""
        source, target = spec
        if self._loads:
            self._both.mover.load(job_id, target.block_ids, source.place, None)
        else:
            self._both.mover.save(job_id, source.block_ids, target.place, None)
        return True

    def get_finished(self) -> list[tuple[int, bool]]:
        """Jobs of this direction that have ended."""
        return self._both.take(saved=not self._loads)

    def wait(self, job_ids: set[int]) -> None:
        """Blocks until jobs have ended, of either direction."""
        self._both.mover.wait(job_ids)


class KvortexWorker:
    """What the handlers of both directions share."""

    def __init__(self, mover: Mover) -> None:
        self.mover, self.store = mover, mover.store
        self._ended: dict[bool, list[tuple[int, bool]]] = {True: [], False: []}

    def take(self, *, saved: bool) -> list[tuple[int, bool]]:
        """Jobs that have ended since the last call, and whether well."""
        for done in self.mover.poll():
            self._ended[done.saved].append((done.number, done.saved or not done.failed))
        taken, self._ended[saved] = self._ended[saved], []
        return taken


class KvortexOffloadingSpec(spec.OffloadingSpec):  # type: ignore[misc]
    """kvortex behind vLLM's OffloadingConnector."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, kv_cache_config)
        self._caches = asking.cache_of(kv_cache_config)
        self._identity = asking.identity_of(vllm_config, self._caches.block_size)
        self._options = options.read_options(self.extra_config, self._identity, options.OF_VLLM)
        self._per_chunk = self.offloaded_block_size // self.gpu_block_size
        self._chunks = options.slots_for(self._options, self._caches.block_bytes, self._per_chunk)

    def get_manager(self) -> KvortexManager:
        """The scheduler's half."""
        space = options.ledger_namespace(self._options)
        ledger = Ledger(self._chunks, self._options.eviction_policy, self._options.admit_after, space)
        events = getattr(self.vllm_config, "kv_events_config", None)
        is_told = bool(events is not None and events.enable_kv_cache_events)
        return KvortexManager(Manager(ledger, self._verifier, is_told), self.offloaded_block_size)

    def get_handlers(self, kv_caches: Any, attn_backends: Any) -> Iterator[tuple[Any, Any, Any]]:
        """The worker's half, with its pool."""
        axes = layouts.block_axes(kv_caches, attn_backends)
        layout = layouts.layout_of(kv_caches, axes, self._caches.num_blocks)
        first = next(iter(kv_caches.values()))
        store = Store(self._options, layout, self._chunks * self._per_chunk)
        worker = KvortexWorker(Mover(store, self._per_chunk, lambda: layouts.current_stream(first)))
        links.register(self._identity.engine_id, worker)
        yield mediums.GPULoadStoreSpec, KvortexPlace, KvortexHandler(worker, loads=False)
        yield KvortexPlace, mediums.GPULoadStoreSpec, KvortexHandler(worker, loads=True)

    def _verifier(self) -> Mover | None:
        worker = links.worker_of(self._identity.engine_id, self._identity.world_size)
        return None if worker is None else worker.mover
